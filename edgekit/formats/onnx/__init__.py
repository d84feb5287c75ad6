"""ONNX: what ONNX Runtime loads, and what is built upon it.

A bundle is laid out as ONNX Runtime GenAI, transformers.js and Optimum look for models: settings
and tokenizer in its root, the graph and its weights in ``onnx``, under the name transformers.js has
for such a model: ``model.onnx`` (F32), ``model_fp16.onnx`` (F16, F16_GPU), ``model_quantized.onnx``
(INT8), ``model_q4.onnx`` (four bits) and ``model_q4f16.onnx`` (UINT4_GPU).

Recipes whose names end in ``_GPU`` multiply, attend and cache in float16, as a GPU with
``shader-f16`` does best; sums over layers, norms and logits stay in float32. A CPU runs them too,
where the others are made for it. See `storage.INT8_ACTIVATIONS` for what rounds on the way.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.formats import ContextLimit, Layout, MemoryUse, Progress
from edgekit.formats.onnx import memory, model, runtime, storage
from edgekit.quant.recipe import Recipe


if TYPE_CHECKING:
    from edgekit.model.checkpoint_protocol import CheckpointProtocol


STORAGES, RECIPES = storage.STORAGES, storage.RECIPES
ENDING = ".onnx"
VARIANTS = ()
RUNTIME = "ONNX Runtime"
EXTRA = "onnx"
RUN_EXTRA = "run-onnx"
# F32 and F16 take as much memory as each other, four times that of INT8, and say the same.
DEFAULT_RECIPES = ("INT8", "UINT4", "UINT4_ALL")


def is_run_here(variant: str | None) -> bool:
    """Return True: the runtime is a program of this machine."""
    del variant  # there is none
    return True


def runtime_state() -> str:
    """Start ONNX Runtime and say which it is and what it computes with."""
    return f"ONNX Runtime {runtime.library().__version__}, {runtime.processors()}"


def lay_out(
    checkpoint: "CheckpointProtocol",
    recipe: Recipe,
    *,
    split_bytes: int | None = None,
    variant: None = None,
) -> Layout:
    """Return what the files will hold and their exact size, from headers alone."""
    from edgekit.formats.onnx import conversion

    del variant  # there is one build for all programs
    return conversion.lay_out(checkpoint, recipe, split_bytes=split_bytes)


def context_limit(checkpoint: "CheckpointProtocol") -> ContextLimit:
    """Return the model's own limit: the graph computes every position."""
    return ContextLimit(
        tokens=checkpoint.spec.context_tokens, reason="the model was made for no more"
    )


def memory_use(
    checkpoint: "CheckpointProtocol", layout: Layout, *, context_tokens: int, repacks: bool
) -> MemoryUse:
    """Return what ONNX Runtime will hold."""
    del repacks  # it packs weights on every processor
    return memory.use(checkpoint.spec, layout, context_tokens=context_tokens)


def convert(  # noqa: PLR0913 - the parameters of `Format.convert`
    checkpoint: "CheckpointProtocol",
    recipe: Recipe,
    directory: Path,
    *,
    progress: Progress,
    context_tokens: int | None = None,
    split_bytes: int | None = None,
    variant: None = None,
) -> str:
    """Write the model and its weights into ``onnx``, and beside that what other programs read."""
    from edgekit.formats.onnx import clients, conversion

    del variant  # there is one build for all programs
    entry = conversion.convert(
        checkpoint, recipe, directory, progress=progress, split_bytes=split_bytes
    )
    context = context_tokens or context_limit(checkpoint).tokens
    clients.write(checkpoint, recipe, directory, entry, context_tokens=context)
    return entry


def load(
    path: Path, *, context_tokens: int, threads: int | None = None, has_exact_cache: bool = False
) -> runtime.OnnxSession:
    """Open a model in ONNX Runtime."""
    del has_exact_cache  # it is float32 anyway
    return runtime.OnnxSession(path, context_tokens=context_tokens, threads=threads)


def runtime_ids(path: Path, texts: Sequence[str]) -> None:
    """Return None: ONNX Runtime reads no text."""
    del path, texts


def files(path: Path) -> list[Path]:
    """Return the model file and the files of its weights."""
    return model.files(path)


def contents(path: Path) -> list[tuple[str, tuple[int, ...], str]]:
    """Return name, shape and storage of every weight, whatever tensors hold it."""
    return storage.contents(path)
