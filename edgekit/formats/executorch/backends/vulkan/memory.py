"""What a phone holds while Vulkan computes; estimated, not measured on one."""

from edgekit.formats import Layout, MemoryUse
from edgekit.formats.executorch.memory import (
    RUNTIME_BYTES,
    VOCABULARY_ENTRY_BYTES,
    mlp_channels,
)
from edgekit.model.spec import DecoderSpec


def use(spec: DecoderSpec, layout: Layout, *, context_tokens: int, batch_tokens: int) -> MemoryUse:
    """Return the parts for a phone's GPU, which shares its memory.

    The GPU has weights, caches and what passes between operators in memory of its own; the
    embedding is read from the file. While weights are packed, the largest is there twice.
    """
    a, item_bytes = spec.attention, 2 if layout.is_half else 4
    sizes = [placement.size_bytes for placement in layout.placements]
    scores = 2 * a.heads * batch_tokens * context_tokens
    widths = mlp_channels(spec) + 4 * spec.hidden_size + 2 * a.query_width + 4 * a.key_value_width
    passing = item_bytes * (scores + batch_tokens * widths + spec.vocab_size)
    return MemoryUse(
        weights_bytes=sum(sizes),
        # The operator is shown the shape of a cache by one more that all layers share.
        cache_bytes=item_bytes * a.key_value_width * context_tokens * (2 * len(spec.layers) + 1),
        compute_bytes=passing + max(sizes),
        runtime_bytes=RUNTIME_BYTES + VOCABULARY_ENTRY_BYTES * spec.vocab_size,
    )
