"""ExecuTorch on the workstation: what a program will hold and cost, and the writing of it."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit import installed
from edgekit.formats import BuildRequest, ContextLimit, Layout, MemoryUse
from edgekit.formats.executorch import app_kit, backends, conversion
from edgekit.progress import Advance


if TYPE_CHECKING:
    from edgekit.model.checkpoint_protocol import CheckpointProtocol


def lay_out(checkpoint: "CheckpointProtocol", request: BuildRequest) -> Layout:
    """Return what the file will hold and about how large it gets, from headers alone."""
    context = request.context_tokens or context_limit(checkpoint).tokens
    return conversion.lay_out(checkpoint, replace(request, context_tokens=context))


def context_limit(
    checkpoint: "CheckpointProtocol", *, compiles: bool | None = False
) -> ContextLimit:
    """Return the model's own limit, or with a longrope where its other factors begin.

    A program has those too, and edgekit's session reads a text again when it gets there; programs
    of others do not.
    """
    del compiles  # nothing is
    border = checkpoint.spec.original_max_position_embeddings
    if border is not None and border < checkpoint.spec.context_tokens:
        return ContextLimit(
            tokens=border,
            reason="beyond, every position is rotated differently, and phones' runners do not read "
            "a text again",
        )
    return ContextLimit(
        tokens=checkpoint.spec.context_tokens, reason="the model was made for no more"
    )


def memory_use(
    checkpoint: "CheckpointProtocol", layout: Layout, *, context_tokens: int, by_app: bool
) -> MemoryUse:
    """Return what ExecuTorch will hold."""
    del by_app  # nothing in it depends on who calls the runtime
    backend = backends.of(layout.variant)
    spec = checkpoint.spec.within(context_tokens)
    return backend.writing.memory_use(spec, layout, context_tokens=context_tokens)


def convert(
    checkpoint: "CheckpointProtocol",
    request: BuildRequest,
    directory: Path,
    *,
    progress: Advance,
) -> str:
    """Write ``model.pte`` and what the developer of an app wants next to it."""
    installed.require("torch", "executorch", purpose="writing a program", extra="executorch")
    context = request.context_tokens or context_limit(checkpoint).tokens
    request = replace(request, context_tokens=context)
    variant = conversion.variant_of(checkpoint.spec, request)
    entry = conversion.convert(checkpoint, request, directory, progress=progress)
    app_kit.write(checkpoint, directory, entry, context_tokens=context, variant=variant)
    return entry
