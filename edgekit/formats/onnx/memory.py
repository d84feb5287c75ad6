"""What ONNX Runtime holds in memory while it answers."""

from collections.abc import Iterator

from edgekit.decoder import DecoderSpec
from edgekit.formats import Layout, MemoryUse, Placement
from edgekit.formats.onnx.graph import cache_width
from edgekit.formats.onnx.runtime import BATCH_TOKENS


CACHE_ITEM_BYTES = 4  # float32 keys and values
RUNTIME_BYTES = 64 * 2**20
VOCABULARY_ENTRY_BYTES = 800


def use(spec: DecoderSpec, layout: Layout, *, context_tokens: int) -> MemoryUse:
    """Return the parts."""
    return MemoryUse(
        weights_bytes=sum(_weight_bytes(spec, layout)),
        cache_bytes=cache_bytes(spec, context_tokens=context_tokens),
        compute_bytes=compute_bytes(spec, context_tokens=context_tokens),
        runtime_bytes=RUNTIME_BYTES + VOCABULARY_ENTRY_BYTES * spec.vocabulary,
    )


def _weight_bytes(spec: DecoderSpec, layout: Layout) -> Iterator[int]:
    for placement in layout.placements:
        yield placement.size_bytes


def cache_bytes(spec: DecoderSpec, *, context_tokens: int) -> int:
    """Return the size of all keys and values."""
    heads = spec.attention.key_value_heads
    token_bytes = 2 * heads * cache_width(spec) * CACHE_ITEM_BYTES
    return len(spec.layers) * token_bytes * context_tokens


def compute_bytes(spec: DecoderSpec, *, context_tokens: int) -> int:
    """Return the size of what one batch of a prompt needs: activations and attention scores."""
    batch = min(BATCH_TOKENS, context_tokens)
    widest = 3 * spec.mlp_width + 2 * spec.hidden_width
    scores = spec.attention.heads * context_tokens
    return 4 * (batch * (widest + scores) + spec.vocabulary)
