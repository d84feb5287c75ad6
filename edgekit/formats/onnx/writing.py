"""ONNX on the workstation: what the files will hold and cost, and the writing of them."""

from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.formats import BuildRequest, ContextLimit, Layout, MemoryUse
from edgekit.formats.onnx import clients, conversion, memory
from edgekit.progress import Advance


if TYPE_CHECKING:
    from edgekit.model.checkpoint_protocol import CheckpointProtocol


def lay_out(checkpoint: "CheckpointProtocol", request: BuildRequest) -> Layout:
    """Return what the files will hold and their exact size, from headers alone."""
    return conversion.lay_out(checkpoint, request)


def context_limit(
    checkpoint: "CheckpointProtocol", *, compiles: bool | None = False
) -> ContextLimit:
    """Return the model's own limit: the graph computes every position."""
    del compiles  # nothing is
    return ContextLimit(
        tokens=checkpoint.spec.context_tokens, reason="the model was made for no more"
    )


def memory_use(
    checkpoint: "CheckpointProtocol", layout: Layout, *, context_tokens: int, by_app: bool
) -> MemoryUse:
    """Return what ONNX Runtime will hold."""
    del by_app  # nothing in it depends on who calls the runtime
    return memory.use(checkpoint.spec, layout, context_tokens=context_tokens)


def convert(
    checkpoint: "CheckpointProtocol",
    request: BuildRequest,
    directory: Path,
    *,
    progress: Advance,
) -> str:
    """Write the model and its weights into ``onnx``, and what other programs read next to it."""
    entry = conversion.convert(checkpoint, request, directory, progress=progress)
    context = request.context_tokens or context_limit(checkpoint).tokens
    clients.write(checkpoint, request.recipe, directory, entry, context_tokens=context)
    return entry
