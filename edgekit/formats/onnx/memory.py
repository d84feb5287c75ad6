"""What ONNX Runtime holds in memory while it answers."""

from edgekit.formats import Layout, MemoryUse
from edgekit.formats.onnx.graph import cache_width
from edgekit.formats.onnx.runtime import BATCH_TOKENS
from edgekit.formats.onnx.tensor_types import BLOCKS
from edgekit.model.mixers import Attention, DeltaNet, ShortConv
from edgekit.model.spec import EXPERT_MATRICES, DecoderSpec
from edgekit.quant.planned import PlannedWeight


# An interpreter with numpy, the library and edgekit; the library's picture of a layer; what one
# entry of the vocabulary costs in `tokenizers`. Measured on x86-64 with SmolLM2-135M and a context
# of 512, in MiB of VmHWM, and what these sums give:
#   F32 735 and 756, F16 761 and 756, F16_GPU 810 and 839, INT8 319 and 326, UINT4 271 and 277,
#   UINT4_GPU 279 and 272, UINT4_128 263 and 271; with 2048 tokens, INT8 391 and 407, UINT4 341 and
#   358, UINT4_GPU 336 and 319.
# Of random numbers in the shapes of Gemma 4 E2B, INT8, 4478 after 500 different tokens, 5836 after
# 5500, and 5967: of its tables, 2520, what has been looked up stays until the system needs it.
# Of experts of 896 columns, 32 in each of 3 layers 1024 wide, in a context of 512, while a session
# loads: F32 2320 and 2190, F16 2295 and 2186, INT8 766 and 712, INT4 468 and 450, UINT4 464 and
# 458.
# With session.disable_prepacking a model is merely mapped at load (INT8 99, UINT4 99), but the
# first prompt unpacks the head in float32 (372, 324), and every token the rest again.
RUNTIME_BYTES = 64 * 2**20
LAYER_BYTES = 2**19
VOCABULARY_ENTRY_BYTES = 500


def use(spec: DecoderSpec, layout: Layout, *, context_tokens: int) -> MemoryUse:
    """Return the parts, when the most is held: weights are packed while the file is mapped."""
    is_half = layout.is_half
    return MemoryUse(
        weights_bytes=sum(
            weight_bytes(spec, placement, is_half=is_half) for placement in layout.placements
        ),
        cache_bytes=cache_bytes(spec, context_tokens=context_tokens, is_half=is_half),
        compute_bytes=compute_bytes(spec, context_tokens=context_tokens),
        runtime_bytes=RUNTIME_BYTES
        + LAYER_BYTES * len(spec.layers)
        + VOCABULARY_ENTRY_BYTES * spec.vocab_size,
    )


def weight_bytes(spec: DecoderSpec, placement: PlannedWeight, *, is_half: bool) -> int:
    """Return what a weight takes in memory: packed for multiplication, and what that leaves over.

    Scales are packed with their codes and kept next to them; an embedding that is also the head is
    there in both forms, and so are matrices of experts, two of which become one at load; the
    largest matrix is held twice meanwhile. A CPU multiplies in float32: in a float32 graph float16
    is converted at once, in one of float16 layers are held in both.
    """
    is_head = placement.role == ("token_embedding" if spec.is_tied else "output_head")
    is_of_experts = placement.role.endswith(EXPERT_MATRICES)
    if placement.role in spec.looked_up:
        return placement.size_bytes
    if placement.tensor_type == "F16":
        layers_item_bytes, head_item_bytes = (6, 4) if is_half else (4, 8)
        if is_of_experts:
            return placement.parameters * 8
        return placement.parameters * (head_item_bytes if is_head else layers_item_bytes)
    held = placement.size_bytes
    if placement.tensor_type in BLOCKS:
        scales = placement.parameters // BLOCKS[placement.tensor_type].weights
        held += scales * (8 if is_half else 4)
    is_twice = (is_head and spec.is_tied) or is_of_experts
    return held + placement.size_bytes if is_twice else held


def cache_bytes(spec: DecoderSpec, *, context_tokens: int, is_half: bool) -> int:
    """Return the size of all keys and values, and of states, which are written beside the last."""
    item_bytes = 2 if is_half else 4
    token_bytes = sum(_key_value_width(a) for _, _, a in spec.caches()) * item_bytes
    return token_bytes * context_tokens + 2 * spec.states_bytes


def _key_value_width(attention: Attention) -> int:
    """Return how many numbers of a token a layer caches, or copies from the layer that does."""
    return 2 * attention.num_kv_heads * cache_width(attention)


def compute_bytes(spec: DecoderSpec, *, context_tokens: int) -> int:
    """Return the size of what one batch of a prompt needs: activations and attention scores."""
    batch = min(BATCH_TOKENS, context_tokens)
    widest = 2 * spec.hidden_size + max(_widest(spec, index) for index in range(len(spec.layers)))
    if own := spec.layer_embedding:  # as codes and float32, and what is added to it
        widest += 3 * own.width * len(spec.layers)
    scores = max((a.heads for _, _, a in spec.attentions()), default=0) * context_tokens
    copied = max(
        (_key_value_width(a) for _, _, a in spec.attentions() if not a.has_cache), default=0
    )
    return 4 * (batch * (widest + scores) + copied * context_tokens + spec.vocab_size)


def _widest(spec: DecoderSpec, index: int) -> int:
    """Return the columns that an MLP, or what convolves in a layer, has at a time."""
    mixer, mlp = spec.mixer(index), 3 * spec.mlp(index).intermediate_size
    match mixer:
        case ShortConv():
            return max(mlp, 6 * spec.hidden_size)  # made, b * x, its columns, and what they give
        case DeltaNet():
            return max(mlp, 3 * mixer.channels + mixer.value_width)
        case Attention():
            return mlp
