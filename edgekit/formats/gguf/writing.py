"""GGUF on the workstation: what a file will hold and cost, and the writing of it."""

from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.formats import BuildRequest, ContextLimit, Layout, MemoryUse
from edgekit.formats.gguf import (
    architectures,
    conversion,
    memory,
    ollama,
    pretokenizers,
)
from edgekit.progress import Advance
from edgekit.text import corpus


if TYPE_CHECKING:
    from edgekit.model.checkpoint_protocol import CheckpointProtocol


def lay_out(checkpoint: "CheckpointProtocol", request: BuildRequest) -> Layout:
    """Return what the file or files will hold and their exact size, from headers alone."""
    return conversion.lay_out(checkpoint, request)


def context_limit(
    checkpoint: "CheckpointProtocol", *, compiles: bool | None = False
) -> ContextLimit:
    """Return how far llama.cpp agrees with the checkpoint."""
    del compiles  # nothing is
    graph = architectures.choose(checkpoint.spec, family=checkpoint.architecture)
    return architectures.context_limit(checkpoint.spec, graph)


def memory_use(
    checkpoint: "CheckpointProtocol", layout: Layout, *, context_tokens: int, by_app: bool
) -> MemoryUse:
    """Return what llama.cpp will hold, by the sizes of its buffers."""
    use = memory.use_by_app if by_app else memory.use
    return use(checkpoint.spec, layout, context_tokens=context_tokens)


def convert(
    checkpoint: "CheckpointProtocol",
    request: BuildRequest,
    directory: Path,
    *,
    progress: Advance,
) -> str:
    """Write ``model.gguf``, or its parts; next to a single file a ``Modelfile`` for Ollama."""
    pre = pretokenizers.find_pre(checkpoint.text, corpus=corpus.lines())
    entry = conversion.convert(checkpoint, request, directory, pre=pre, progress=progress)
    if entry == conversion.ENTRY:  # Ollama takes one file only
        context = request.context_tokens or context_limit(checkpoint).tokens
        ollama.write(checkpoint, directory, entry, context_tokens=context)
    return entry
