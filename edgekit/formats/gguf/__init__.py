"""GGUF: what llama.cpp loads."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.formats import ContextLimit, Layout, MemoryUse, Progress
from edgekit.formats.gguf import architectures, memory, runtime, split, storage
from edgekit.quant.recipe import Recipe


if TYPE_CHECKING:
    from edgekit.model.checkpoint_protocol import CheckpointProtocol


STORAGES, RECIPES = storage.STORAGES, storage.RECIPES
ENDING = ".gguf"
VARIANTS = ()
RUNTIME = "llama.cpp"
EXTRA = "gguf"
RUN_EXTRA = "run-gguf"
# F32, F16 and BF16 are twice and four times as large as Q8_0 and say the same.
DEFAULT_RECIPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")


def is_run_here(variant: str | None) -> bool:
    """Return True: the runtime is a program of this machine."""
    del variant  # there is none
    return True


def runtime_state() -> str:
    """Start llama.cpp and say which it is."""
    return f"llama.cpp, as llama-cpp-python {runtime.library().__version__} brings it"


def lay_out(
    checkpoint: "CheckpointProtocol",
    recipe: Recipe,
    *,
    split_bytes: int | None = None,
    variant: None = None,
) -> Layout:
    """Return what the file or files will hold and their exact size, from headers alone."""
    from edgekit.formats.gguf import conversion

    del variant  # there is one build for all programs
    return conversion.lay_out(checkpoint, recipe, split_bytes=split_bytes)


def context_limit(checkpoint: "CheckpointProtocol") -> ContextLimit:
    """Return how far llama.cpp agrees with the checkpoint."""
    return architectures.context_limit(checkpoint.spec)


def memory_use(
    checkpoint: "CheckpointProtocol", layout: Layout, *, context_tokens: int, repacks: bool
) -> MemoryUse:
    """Return what llama.cpp will hold, by the sizes of its buffers."""
    del repacks  # files are read, not mapped, so a repacked weight is held once too
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
    """Write ``model.gguf``, or its parts; beside a single file a ``Modelfile`` for Ollama."""
    from edgekit.formats.gguf import conversion, ollama, pretokenizers
    from edgekit.text import corpus

    del variant  # there is one build for all programs
    pre = pretokenizers.find_pre(checkpoint.text, corpus=corpus.lines())
    entry = conversion.convert(
        checkpoint, recipe, directory, pre=pre, progress=progress, split_bytes=split_bytes
    )
    if entry == conversion.ENTRY:  # Ollama takes one file only
        context = context_tokens or context_limit(checkpoint).tokens
        ollama.write(checkpoint, directory, entry, context_tokens=context)
    return entry


def load(
    path: Path, *, context_tokens: int, threads: int | None = None, has_exact_cache: bool = False
) -> runtime.GgufSession:
    """Open a file in llama.cpp."""
    return runtime.GgufSession(
        path, context_tokens=context_tokens, threads=threads, has_exact_cache=has_exact_cache
    )


def runtime_ids(path: Path, texts: Sequence[str]) -> list[list[int]]:
    """Return what llama.cpp's own tokenizer makes of ``texts``, special tokens parsed."""
    return runtime.runtime_ids(path, texts)


def files(path: Path) -> list[Path]:
    """Return the parts of a file that was split, or the file itself."""
    return split.paths(path)


def contents(path: Path) -> list[tuple[str, tuple[int, ...], str]]:
    """Return name, shape and storage of every tensor in a file, and in the parts after it."""
    return [(info.name, info.shape, info.storage) for info in split.read_tensors(path)]
