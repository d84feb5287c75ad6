"""What ExecuTorch holds in memory while it answers."""

from edgekit.decoder import DecoderSpec
from edgekit.formats import Layout, MemoryUse


CACHE_ITEM_BYTES = 4  # float32 keys and values
RUNTIME_BYTES = 64 * 2**20


def use(spec: DecoderSpec, layout: Layout, *, context_tokens: int) -> MemoryUse:
    """Return the parts, when the most is held: XNNPACK packs its weights beside the mapped file."""
    return MemoryUse(
        weights_bytes=2 * sum(placement.size_bytes for placement in layout.placements),
        cache_bytes=cache_bytes(spec, context_tokens=context_tokens),
        compute_bytes=compute_bytes(spec, context_tokens=context_tokens),
        runtime_bytes=RUNTIME_BYTES,
    )


def cache_bytes(spec: DecoderSpec, *, context_tokens: int) -> int:
    """Return the size of all keys and values."""
    token_bytes = 2 * spec.attention.key_value_width * CACHE_ITEM_BYTES
    return len(spec.layers) * token_bytes * context_tokens


def compute_bytes(spec: DecoderSpec, *, context_tokens: int) -> int:
    """Return the size of activations and attention scores of a prompt as long as the context."""
    widest = 3 * spec.mlp_width + 2 * spec.hidden_width
    scores = 2 * spec.attention.heads * context_tokens
    return 4 * (context_tokens * (widest + scores) + spec.vocabulary)
