"""What ExecuTorch holds in memory while it answers.

XNNPACK packs every weight into memory of its own and lets go of the file; an embedding that no head
is tied to stays mapped. So do the embeddings of layers, of which only what a text reads is there.
Keys, values and what passes between delegates are set aside when a program is loaded, for as many
tokens as it was exported for.
"""

import math
from typing import assert_never

from edgekit.formats import Layout, MemoryUse
from edgekit.model.mixers import Attention, DeltaNet, ShortConv
from edgekit.model.spec import DecoderSpec


BATCH_TOKENS = 256  # are read at once; a longer prompt takes no more memory, and little more time
CACHE_ITEM_BYTES = 4  # float32 keys, values and states
# An interpreter with numpy, the libraries and edgekit; what XNNPACK keeps of a layer besides its
# weights; what one entry of the vocabulary costs in `tokenizers`. Measured on x86-64 with
# SmolLM2-135M and no tokenizer, VmHWM in MiB: exported for 512 tokens 206 for 8da4w, 252 for 8da8w,
# 724 for F32; for 2048 tokens 296 for 8da4w. These sums, less the tokenizer's 23, are 195, 240, 705
# and 301.
RUNTIME_BYTES = 40 * 2**20
LAYER_BYTES = 2**19
VOCABULARY_ENTRY_BYTES = 500
# What Linux maps at least (fault_around_bytes) where a row of a table is read that nobody packs.
# File systems with larger pieces soon have all of it there, but the system may take that back.
# Of random weights in the shapes of Gemma 4 E2B (8da8w, 1024 tokens) VmHWM was 2832 MiB; these
# sums, less the tokenizer's, are 2788.
MAPPED_BYTES = 64 * 2**10


def use(
    spec: DecoderSpec, layout: Layout, *, context_tokens: int, call_tokens: int | None = None
) -> MemoryUse:
    """Return the parts, when the most is held.

    Args:
        spec: The decoder.
        layout: What the program holds.
        context_tokens: What its caches hold.
        call_tokens: How many a call may read; None: as many.
    """
    tables = [it.size_bytes for it in layout.placements if it.role == "layer_embedding"]
    sizes = [it.size_bytes for it in layout.placements if it.role != "layer_embedding"]
    mapped = sum(min(size, MAPPED_BYTES * context_tokens) for size in tables)
    most = call_tokens or context_tokens
    running = batch_bytes(spec, context_tokens=context_tokens, call_tokens=most)
    return MemoryUse(
        weights_bytes=sum(sizes) + mapped,
        cache_bytes=cache_bytes(spec, context_tokens=context_tokens),
        # While a weight is packed, the file's copy of it is there too; later, a prompt is read.
        compute_bytes=planned_bytes(spec, context_tokens=context_tokens, call_tokens=most)
        + max(*sizes, running),
        runtime_bytes=RUNTIME_BYTES
        + LAYER_BYTES * len(spec.layers)
        + VOCABULARY_ENTRY_BYTES * spec.vocab_size,
    )


def cache_bytes(spec: DecoderSpec, *, context_tokens: int) -> int:
    """Return the size of all keys and values, and of the states that layers keep instead."""
    widths = sum(2 * attention.key_value_width for _, _, attention in spec.caches())
    return CACHE_ITEM_BYTES * widths * context_tokens + spec.states_bytes


def planned_bytes(spec: DecoderSpec, *, context_tokens: int, call_tokens: int) -> int:
    """Return what is set aside between delegates: their inputs and outputs, for a longest call."""
    layers = range(len(spec.layers))
    read = max(_read_channels(spec, index) for index in layers)
    made = max(_made_channels(spec, index) for index in layers)
    caches = max((2 * a.key_value_width for _, _, a in spec.caches()), default=0)
    donors = {a.cache_of for _, _, a in spec.attentions()}  # what is read of theirs stays
    shared = sum(2 * a.key_value_width for index, _, a in spec.caches() if index in donors)
    own = spec.layer_embedding
    embedded = spec.hidden_size + own.width if own else 0
    state = max((math.prod(shape) for _, _, shape in spec.states()), default=0)
    return 4 * (
        call_tokens * (2 * spec.hidden_size + embedded + read + made)
        + context_tokens * (caches + shared)  # as far as they are filled, a layer at a time
        + 5 * state  # zeros, both to choose from, what was chosen, and what is left
        + spec.vocab_size
    )


def _read_channels(spec: DecoderSpec, index: int) -> int:
    """Return how many numbers of a token the second half of a layer reads, caches apart."""
    match spec.mixer(index):
        case Attention() as a:
            return a.query_rows
        case ShortConv(taps=taps):
            return (1 + taps) * spec.hidden_size
        case DeltaNet() as net:
            return net.value_width + 2 * net.value_heads + net.taps * net.channels
        case other:
            assert_never(other)


def _made_channels(spec: DecoderSpec, index: int) -> int:
    """Return how many numbers of a token the first half of a layer makes."""
    match spec.mixer(index):
        case Attention() as a:
            return a.query_rows + 2 * a.key_value_width
        case ShortConv():
            return 2 * spec.hidden_size
        case DeltaNet() as net:
            return net.value_width + 2 * net.value_heads + net.channels
        case other:
            assert_never(other)


def batch_bytes(spec: DecoderSpec, *, context_tokens: int, call_tokens: int) -> int:
    """Return what XNNPACK needs to read some tokens of a prompt at once: scores, and an MLP.

    Twice: as a text grows, scores move to a larger place.
    """
    batch = min(BATCH_TOKENS, call_tokens)
    heads = max((attention.heads for _, _, attention in spec.attentions()), default=0)
    widths = heads * context_tokens + mlp_channels(spec) + 2 * spec.hidden_size
    return 2 * 4 * batch * widths


def mlp_channels(spec: DecoderSpec) -> int:
    """Return how many channels the widest MLP has at once: its products, and what they become."""
    bent = {"silu": 2, "gelu_tanh": 2, "relu2": 2, "xielu": 4}[spec.activation]
    widest = max(spec.mlp(index).intermediate_size for index in range(len(spec.layers)))
    return (bent + spec.is_gated) * widest
