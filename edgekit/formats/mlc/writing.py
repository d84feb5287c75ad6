"""MLC on the workstation: what the files will hold and cost, and the writing of them."""

from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.formats import BuildRequest, ContextLimit, Layout, MemoryUse
from edgekit.formats.mlc import artifact, decoders, memory
from edgekit.formats.mlc.compiling import tools
from edgekit.progress import Advance


if TYPE_CHECKING:
    from edgekit.model.checkpoint_protocol import CheckpointProtocol


def lay_out(checkpoint: "CheckpointProtocol", request: BuildRequest) -> Layout:
    """Return what the files will hold and their exact size, from headers and the chat template."""
    return artifact.lay_out(checkpoint, request)


def context_limit(
    checkpoint: "CheckpointProtocol", *, compiles: bool | None = False
) -> ContextLimit:
    """Return how far MLC, or a library of the model's own, computes what the checkpoint says."""
    has_own = compiles or (compiles is None and tools.are_here_for_browsers())
    return decoders.context_limit(checkpoint.architecture, checkpoint.spec, has_own=has_own)


def memory_use(
    checkpoint: "CheckpointProtocol", layout: Layout, *, context_tokens: int, by_app: bool
) -> MemoryUse:
    """Return what the GPU and the page will hold."""
    del by_app  # nothing in it depends on who calls the runtime
    return memory.use(
        checkpoint.architecture, checkpoint.spec, layout, context_tokens=context_tokens
    )


def convert(
    checkpoint: "CheckpointProtocol",
    request: BuildRequest,
    directory: Path,
    *,
    progress: Advance,
) -> str:
    """Write the weights, the settings, and what an app pastes."""
    context = request.context_tokens or context_limit(checkpoint, compiles=request.compiles).tokens
    return artifact.convert(
        checkpoint, request, directory, progress=progress, context_tokens=context
    )
