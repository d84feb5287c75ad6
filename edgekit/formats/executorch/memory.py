"""What ExecuTorch holds in memory while it answers.

XNNPACK packs every weight into memory of its own and lets go of the file; an embedding that no head
is tied to stays mapped. Keys, values and what passes between delegates are set aside when a program
is loaded, for as many tokens as it was exported for.
"""

from edgekit.formats import Layout, MemoryUse
from edgekit.model.spec import DecoderSpec


BATCH_TOKENS = 256  # are read at once; a longer prompt takes no more memory, and little more time
CACHE_ITEM_BYTES = 4  # float32 keys and values
# An interpreter with numpy, the libraries and edgekit; what XNNPACK keeps of a layer besides its
# weights; what one entry of the vocabulary costs in `tokenizers`. Measured on x86-64 with
# SmolLM2-135M and no tokenizer, VmHWM in MiB: exported for 512 tokens 206 for 8da4w, 252 for 8da8w,
# 724 for F32; for 2048 tokens 296 for 8da4w. These sums, less the tokenizer's 23, are 195, 240, 705
# and 301.
RUNTIME_BYTES = 40 * 2**20
LAYER_BYTES = 2**19
VOCABULARY_ENTRY_BYTES = 500


def use(spec: DecoderSpec, layout: Layout, *, context_tokens: int) -> MemoryUse:
    """Return the parts, when the most is held."""
    sizes = [placement.size_bytes for placement in layout.placements]
    running = batch_bytes(spec, context_tokens=context_tokens)
    return MemoryUse(
        weights_bytes=sum(sizes),
        cache_bytes=cache_bytes(spec, context_tokens=context_tokens),
        # While a weight is packed, the file's copy of it is there too; later, a prompt is read.
        compute_bytes=planned_bytes(spec, context_tokens=context_tokens) + max(*sizes, running),
        runtime_bytes=RUNTIME_BYTES
        + LAYER_BYTES * len(spec.layers)
        + VOCABULARY_ENTRY_BYTES * spec.vocab_size,
    )


def cache_bytes(spec: DecoderSpec, *, context_tokens: int) -> int:
    """Return the size of all keys and values."""
    widths = sum(2 * attention.key_value_width for _, _, attention in spec.caches())
    return widths * CACHE_ITEM_BYTES * context_tokens


def planned_bytes(spec: DecoderSpec, *, context_tokens: int) -> int:
    """Return what is set aside between delegates: their inputs and outputs, for a whole context."""
    of_attention = (2 * a.query_width + 4 * a.key_value_width for _, _, a in spec.attentions())
    widths = 2 * spec.hidden_size + max(of_attention, default=0)
    donors = {a.cache_of for _, _, a in spec.attentions()}  # what they hand out stays
    widths += sum(2 * a.key_value_width for index, _, a in spec.attentions() if index in donors)
    if own := spec.layer_embedding:
        widths += spec.hidden_size + own.width
    return 4 * (context_tokens * widths + spec.vocab_size)


def batch_bytes(spec: DecoderSpec, *, context_tokens: int) -> int:
    """Return what XNNPACK needs to read some tokens of a prompt at once: scores, and an MLP.

    Twice: as a text grows, scores move to a larger place.
    """
    batch = min(BATCH_TOKENS, context_tokens)
    heads = max((attention.heads for _, _, attention in spec.attentions()), default=0)
    widths = heads * context_tokens + mlp_channels(spec) + 2 * spec.hidden_size
    return 2 * 4 * batch * widths


def mlp_channels(spec: DecoderSpec) -> int:
    """Return how many channels the widest MLP has at once: its products, and what they become."""
    bent = {"silu": 2, "gelu_tanh": 2, "relu2": 2, "xielu": 4}[spec.activation]
    widest = max(spec.mlp(index).intermediate_size for index in range(len(spec.layers)))
    return (bent + spec.is_gated) * widest
