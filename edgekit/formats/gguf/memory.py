"""What llama.cpp holds in memory while it answers, by the sizes of its buffers."""

from dataclasses import replace

from edgekit.formats import Layout, MemoryUse
from edgekit.formats.gguf.architectures import CONTEXT_PADDING_TOKENS
from edgekit.formats.gguf.runtime import BATCH_TOKENS
from edgekit.model.mixers import Attention, DeltaNet, Mixer, ShortConv
from edgekit.model.spec import DecoderSpec, Layer, Mlp


CACHE_ITEM_BYTES = 2  # float16 keys and values, llama.cpp's default
# An interpreter with numpy, the libraries and edgekit; what one entry of the vocabulary costs in
# `tokenizers` and in llama.cpp together. Measured on x86-64 with SmolLM2-135M Q8_0: VmHWM was 233
# MiB with a context of 512 and 314 MiB with 4096, where these sums give 236 and 317.
RUNTIME_BYTES = 48 * 2**20
VOCABULARY_ENTRY_BYTES = 800
# n_ubatch of llama.cpp. Of 150 published cells of three phones (docs/targets.md) the compute buffer
# is this many rows of logits and of two hidden states, within 17 MiB.
APP_BATCH_TOKENS = 512
_LEFT_ON_DISK = "layer_embedding"
# Up to here llama.cpp maps it as the rest unless it is told otherwise: lazy_read in
# src/llama-model-loader.cpp of llama.cpp 0c1e57098.
LAZY_BYTES = 4 * 2**30


def use(spec: DecoderSpec, layout: Layout, *, context_tokens: int) -> MemoryUse:
    """Return the parts; the weights are those of the file, read and not mapped.

    But for the embeddings of the layers, of which a token's row is read when it is needed.
    """
    held = (it.size_bytes for it in layout.placements if it.role != _LEFT_ON_DISK)
    return MemoryUse(
        weights_bytes=sum(held),
        cache_bytes=cache_bytes(spec, context_tokens=context_tokens),
        compute_bytes=compute_bytes(spec, context_tokens=context_tokens),
        runtime_bytes=RUNTIME_BYTES + VOCABULARY_ENTRY_BYTES * spec.vocab_size,
    )


def use_by_app(spec: DecoderSpec, layout: Layout, *, context_tokens: int) -> MemoryUse:
    """Return the parts in an app that links llama.cpp and leaves its settings as they are.

    It makes room for the logits of every row of a batch, maps the file, and keeps what its kernels
    lay out again next to it: of a tied embedding, the copy that is the head.
    """
    head = [it.size_bytes for it in layout.placements if it.role == "token_embedding"]
    tables = [it.size_bytes for it in layout.placements if it.role == _LEFT_ON_DISK]
    mapped = sum(table for table in tables if table <= LAZY_BYTES)
    room = 4 * APP_BATCH_TOKENS * (spec.vocab_size + 2 * spec.hidden_size)
    own = use(spec, layout, context_tokens=context_tokens)
    return replace(
        own,
        weights_bytes=own.weights_bytes + mapped + (sum(head) if spec.is_tied else 0),
        compute_bytes=max(own.compute_bytes, room),
        runtime_bytes=VOCABULARY_ENTRY_BYTES * spec.vocab_size // 2,  # without Python
    )


def cache_bytes(spec: DecoderSpec, *, context_tokens: int) -> int:
    """Return the size of all keys, values and states.

    A layer with a window keeps no more than it sees, one that reads those of another layer none.
    """
    return spec.states_bytes + sum(
        2 * attention.key_value_width * CACHE_ITEM_BYTES * _cells(layer, context_tokens)
        for _, layer, attention in spec.caches()
    )


def _cells(layer: Layer, context_tokens: int) -> int:
    """Return how many tokens a layer keeps.

    Source: ``llama_kv_cache_iswa`` in src/llama-kv-cache-iswa.cpp of llama.cpp 0c1e57098: a window
    and one batch, rounded up.
    """
    context = _padded(context_tokens)
    if layer.window_tokens is None:
        return context
    return min(context, _padded(layer.window_tokens + BATCH_TOKENS))


def _padded(tokens: int) -> int:
    return -(-tokens // CONTEXT_PADDING_TOKENS) * CONTEXT_PADDING_TOKENS


def compute_bytes(spec: DecoderSpec, *, context_tokens: int) -> int:
    """Return the size of the buffer for one batch: activations, mask, and one row of logits."""
    batch = min(BATCH_TOKENS, context_tokens)
    layers = range(len(spec.layers))
    widest = max(
        *(_mlp_width(spec, spec.mlp(it)) for it in layers),
        *(_mixer_width(spec.mixer(it), spec.hidden_size) for it in layers),
        # The embeddings of all layers, as they are read, projected, normalized and added.
        4 * len(spec.layers) * spec.layer_embedding.width if spec.layer_embedding else 0,
    )
    mask = _padded(context_tokens) * (4 + 2)  # float32, and its float16 copy for flash attention
    return batch * (4 * (widest + spec.hidden_size) + mask) + 4 * spec.vocab_size


def _mlp_width(spec: DecoderSpec, mlp: Mlp) -> int:
    """Return how many numbers a token takes in an MLP at once, in experts those of all it takes."""
    gate_and_up = (2 if spec.is_gated else 1) * mlp.intermediate_size
    if not mlp.experts:
        return gate_and_up + spec.hidden_size
    inside = mlp.experts.used * max(gate_and_up, mlp.intermediate_size + spec.hidden_size)
    return inside + 2 * mlp.experts.count + spec.hidden_size


def _mixer_width(mixer: Mixer, hidden_size: int) -> int:
    """Return how many numbers a token takes there at once.

    Of the last two as llama.cpp 0c1e57098 said of random ones ("compute buffer size"): 6.5 hidden
    widths for a convolution, and for a delta net 2.6 besides what it convolves and its values.
    """
    match mixer:
        case Attention():
            return 4 * hidden_size
        case ShortConv():
            return 6 * hidden_size
        case DeltaNet():
            return 2 * (mixer.channels + mixer.value_width + hidden_size)
