"""What WebLLM, or MLC's engine on a phone, holds on the GPU while it answers.

Held against the requirements that WebLLM publishes for its own models: see test_mlc_memory.py.
"""

import math
from typing import TYPE_CHECKING

from edgekit.formats import Layout, MemoryUse
from edgekit.formats.mlc import decoders, packing
from edgekit.formats.mlc.libraries import PREFILL_CHUNK_TOKENS
from edgekit.model.mixers import DeltaNet


if TYPE_CHECKING:
    from edgekit.model.spec import DecoderSpec


PAGE_TOKENS = 16  # of the cache; WebLLM 0.2.86 and MLC's engine
_HALF, _FULL = 2, 4  # bytes of a number the model computes with
# Besides the GPU's memory: the page's heap while shards arrive, the library, the tokenizer.
# Measured once, in Chromium 156: 110 MB of heap for SmolLM2-135M as q4f32_1, 76 MB of files.
RUNTIME_BYTES = 40 * 2**20


def prefill_chunk_tokens(context_tokens: int) -> int:
    """Return how many tokens of a prompt are read at once; prebuilt libraries take no more."""
    return min(context_tokens, PREFILL_CHUNK_TOKENS)


def use(
    architecture: str,
    spec: "DecoderSpec",
    layout: Layout,
    *,
    context_tokens: int,
    chunk_tokens: int | None = None,
) -> MemoryUse:
    """Return the parts; ``chunk_tokens`` of a prompt are read at once, by default as in WebLLM."""
    item_bytes = _HALF if layout.needs_shader_f16 else _FULL
    name = decoders.model_type(architecture, spec)
    return MemoryUse(
        weights_bytes=weights_bytes(layout),
        cache_bytes=cache_bytes(spec, context_tokens=context_tokens, item_bytes=item_bytes),
        compute_bytes=compute_bytes(
            name, spec, item_bytes=item_bytes,
            chunk_tokens=chunk_tokens or prefill_chunk_tokens(context_tokens),
        ),
        runtime_bytes=RUNTIME_BYTES,
    )  # fmt: skip


def vram_bytes(memory: MemoryUse) -> int:
    """Return what the GPU holds: WebLLM's ``vram_required_MB``, MLC's ``estimated_vram_bytes``."""
    return memory.weights_bytes + memory.cache_bytes + memory.compute_bytes


def weights_bytes(layout: Layout) -> int:
    """Return the weights in memory, where a float32 that is stored as bfloat16 is whole again."""
    total = 0
    for placement in layout.placements:
        total += placement.size_bytes
        if placement.tensor_type.endswith("BF16"):
            total += _widened_bytes(placement.tensor_type, placement.size_bytes)
    return total


def _widened_bytes(tensor_type: str, size_bytes: int) -> int:
    """Return what float32 takes beyond bfloat16."""
    if tensor_type not in packing.GROUPS:
        return size_bytes
    scale_bytes = (
        packing.TENSOR_TYPES[tensor_type].block_bytes - 16
    )  # a group's codes are four words
    return size_bytes // packing.TENSOR_TYPES[tensor_type].block_bytes * scale_bytes


def cache_bytes(spec: "DecoderSpec", *, context_tokens: int, item_bytes: int) -> int:
    """Return the size of all keys and values, in whole pages, and of what delta nets keep.

    Their matrices are float32 in any case; the one state that WebLLM keeps is the current one.
    """
    tokens = -(-context_tokens // PAGE_TOKENS) * PAGE_TOKENS
    width = sum(attention.key_value_width for _, _, attention in spec.caches())
    states = sum(
        math.prod(shape) * (_FULL if name == "recurrent" else item_bytes)
        for _, name, shape in spec.states()
    )
    return 2 * width * item_bytes * tokens + states


def compute_bytes(name: str, spec: "DecoderSpec", *, chunk_tokens: int, item_bytes: int) -> int:
    """Return what TVM plans for activations while a chunk of a prompt is read.

    The factors are those that give WebLLM's published figures back, which are planned sizes: in
    float16, five times the MLP and twice the hidden state; in float32, four times and once. Of a
    decoder with delta nets it is less of both, and what all nets read from their states, twice.
    """
    is_half = item_bytes == _HALF
    mlp, hidden = (5, 2) if is_half else (4, 1)
    nets = [layer.mixer for layer in spec.layers if isinstance(layer.mixer, DeltaNet)]
    if nets:
        mlp, hidden = (2, 0) if is_half else (2, 1)
    widths = mlp * spec.intermediate_size + hidden * spec.hidden_size
    widths += sum(2 * net.value_width for net in nets)
    widths += sum((3 if is_half else 2) * net.channels for net in nets[:1])
    total = chunk_tokens * widths * item_bytes
    if decoders.plans_logits(name, spec):
        total += chunk_tokens * spec.vocab_size * _FULL
    return total
