"""What ONNX Runtime holds in memory while it answers."""

from edgekit.decoder import DecoderSpec
from edgekit.formats import Layout, MemoryUse, Placement
from edgekit.formats.onnx.graph import cache_width
from edgekit.formats.onnx.runtime import BATCH_TOKENS
from edgekit.formats.onnx.storage import BLOCK_WEIGHTS, BLOCKS


CACHE_ITEM_BYTES = 4  # float32 keys and values
# An interpreter with numpy, the library and edgekit; the library's picture of a layer; what one
# entry of the vocabulary costs in `tokenizers`. Measured on x86-64 with SmolLM2-135M and a context
# of 512: VmHWM was 320 MiB for INT8, 271 for UINT4, 735 for F32 and 745 for F16, where these sums
# give 326, 277, 756 and 756; for INT8 with 2048, 391 and 407.
RUNTIME_BYTES = 64 * 2**20
LAYER_BYTES = 2**19
VOCABULARY_ENTRY_BYTES = 500
_SCALE_BYTES = 4


def use(spec: DecoderSpec, layout: Layout, *, context_tokens: int) -> MemoryUse:
    """Return the parts, when the most is held: weights are packed while the file is mapped."""
    return MemoryUse(
        weights_bytes=sum(weight_bytes(spec, placement) for placement in layout.placements),
        cache_bytes=cache_bytes(spec, context_tokens=context_tokens),
        compute_bytes=compute_bytes(spec, context_tokens=context_tokens),
        runtime_bytes=RUNTIME_BYTES
        + LAYER_BYTES * len(spec.layers)
        + VOCABULARY_ENTRY_BYTES * spec.vocabulary,
    )


def weight_bytes(spec: DecoderSpec, placement: Placement) -> int:
    """Return what a weight takes in memory: packed for multiplication, and what that leaves over.

    Scales are packed with their codes and kept beside them; an embedding that is also the head is
    there in both forms; float16 is made float32, and the largest matrix is held twice meanwhile.
    """
    is_head = placement.role == ("token_embedding" if spec.is_tied else "output_head")
    is_read_only_by_row = placement.role == "token_embedding" and not is_head
    if placement.storage == "F16" and not is_read_only_by_row:
        return placement.parameters * (8 if is_head else 4)
    held = placement.size_bytes
    if placement.storage in BLOCKS:
        held += placement.parameters // BLOCK_WEIGHTS * _SCALE_BYTES
    return held + placement.size_bytes if is_head and spec.is_tied else held


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
