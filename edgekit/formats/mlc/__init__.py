"""MLC: models for WebLLM in the browser and for MLC's engine on phones."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from edgekit.errors import UsageError
from edgekit.formats import ContextLimit, Layout, MemoryUse, Progress
from edgekit.formats.mlc import decoders, memory, packing, reading, shards
from edgekit.quant.recipe import Recipe


if TYPE_CHECKING:
    from edgekit.formats.mlc.reading import Weights
    from edgekit.model.checkpoint_protocol import CheckpointProtocol
    from edgekit.model.spec import DecoderSpec


STORAGES, RECIPES = packing.STORAGES, packing.RECIPES
ENDING = shards.CACHE
VARIANTS = ("chat", "raw-prompt")
RUNTIME = "WebLLM"
EXTRA = RUN_EXTRA = "mlc"
# q4f32_1 for browsers whose GPU does not compute in float16. q0f32 says the same as q0f16 and takes
# twice its memory.
DEFAULT_RECIPES = ("q0f16", "q4f32_1", "q4f16_1")


def is_run_here(variant: str | None) -> bool:
    """Return False: a browser or a phone runs it."""
    del variant
    return False


def runtime_state() -> str:
    """Return what runs the artifacts: nothing that could be started here."""
    return "WebLLM, in a browser with WebGPU, or MLC's engine on a phone; not on this machine"


def lay_out(
    checkpoint: "CheckpointProtocol",
    recipe: Recipe,
    *,
    split_bytes: int | None = None,
    variant: str | None = None,
) -> Layout:
    """Return what the files will hold and their exact size, from headers and the chat template."""
    from edgekit.formats.mlc import artifact

    return artifact.lay_out(
        checkpoint, recipe, split_bytes=split_bytes, variant=variant or VARIANTS[0]
    )


def context_limit(checkpoint: "CheckpointProtocol") -> ContextLimit:
    """Return how far MLC computes what the checkpoint says."""
    return decoders.context_limit(checkpoint.architecture, checkpoint.spec)


def memory_use(
    checkpoint: "CheckpointProtocol", layout: Layout, *, context_tokens: int, repacks: bool
) -> MemoryUse:
    """Return what the GPU and the page will hold."""
    del repacks  # weights are computed with as they are stored
    return memory.use(
        checkpoint.architecture, checkpoint.spec, layout, context_tokens=context_tokens
    )


def convert(  # noqa: PLR0913 - the parameters of `Format.convert`
    checkpoint: "CheckpointProtocol",
    recipe: Recipe,
    directory: Path,
    *,
    progress: Progress,
    context_tokens: int | None = None,
    split_bytes: int | None = None,
    variant: str | None = None,
) -> str:
    """Write the weights, the settings, and what an app pastes."""
    from edgekit.formats.mlc import artifact

    layout = lay_out(checkpoint, recipe, split_bytes=split_bytes, variant=variant)
    context = context_tokens or context_limit(checkpoint).tokens
    return artifact.convert(
        checkpoint, recipe, directory, layout=layout, progress=progress, context_tokens=context
    )


def load(
    path: Path, *, context_tokens: int, threads: int | None = None, has_exact_cache: bool = False
) -> NoReturn:
    """Refuse: a browser runs it.

    Raises:
        UsageError: Always.
    """
    del context_tokens, threads, has_exact_cache
    raise UsageError(
        f"{path} runs in WebLLM, in a browser with WebGPU",
        hint=f"serve {path.parent} with `python -m http.server` and open its page",
    )


def read_back(path: Path, spec: "DecoderSpec") -> "Weights":
    """Return the weights as MLC multiplies with them, every hash checked."""
    return reading.open_weights(path, spec)


def runs_on(variant: str | None) -> str:
    """Return what is needed to run the artifacts."""
    del variant
    return "a browser with WebGPU, or MLC's engine on a phone"


def runtime_ids(path: Path, texts: Sequence[str]) -> None:
    """Return None: WebLLM's tokenizer is the one edgekit reads text with, compiled for browsers."""
    del path, texts


def files(path: Path) -> list[Path]:
    """Return the tensor cache, its twin for older loaders, and the shards."""
    return list(shards.files(path))


def contents(path: Path) -> list[tuple[str, tuple[int, ...], str]]:
    """Return role, shape and storage of every weight, whatever tensors hold it."""
    return reading.contents(path)
