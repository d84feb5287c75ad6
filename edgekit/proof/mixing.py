"""How the tokens of a text see each other, in torch: the mixers of a `DecoderSpec`."""

from typing import TYPE_CHECKING, TypeAlias, assert_never

from edgekit.model.mixers import DELTA_EPSILON, Attention, DeltaNet, QueryGrowth, ShortConv
from edgekit.model.norm import Norm
from edgekit.model.rope import Rope
from edgekit.model.spec import DecoderSpec, Layer
from edgekit.proof.arithmetic import Weights, normalize, soften


if TYPE_CHECKING:
    import torch

    Caches: TypeAlias = dict[int, tuple[torch.Tensor, torch.Tensor]]

QUERY_BLOCK_TOKENS = 256  # scores of 32 heads over 4,096 keys take 128 MiB
DELTA_CHUNK_TOKENS = 64  # a system of so many equations is solved for each head


def mix(
    spec: DecoderSpec, index: int, weights: Weights, x: "torch.Tensor", caches: "Caches"
) -> "torch.Tensor":
    """Return what a layer's mixer makes of a whole text.

    Args:
        spec: The decoder.
        index: Of the layer.
        weights: Of the layer.
        x: What it reads, ``(tokens, hidden_size)``.
        caches: Keys and values of earlier layers that a later one reads; this one's join them.

    Returns:
        Of shape ``(tokens, hidden_size)``, float32.
    """
    match mixer := spec.mixer(index):
        case Attention():
            return _attend(spec, index, weights, x, caches)
        case ShortConv():
            return _convolve_gated(mixer, weights, x)
        case DeltaNet():
            return _apply_delta(mixer, weights, x)
        case _:
            assert_never(mixer)


def _attend(
    spec: DecoderSpec, index: int, weights: Weights, x: "torch.Tensor", caches: "Caches"
) -> "torch.Tensor":
    layer, a = spec.layers[index], spec.mixer(index)
    assert isinstance(a, Attention)  # noqa: S101 - for the type checker
    query = weights.project("query", x, has_bias=a.has_qkv_bias).unflatten(-1, (a.heads, -1))
    gate = None
    if a.has_output_gate:
        query, gate = query.chunk(2, dim=-1)
    query = _position(a, layer, weights, "query_norm", query)
    if a.query_growth:
        query = _grow(a.query_growth, query)
    if a.cache_of is None:
        cache = _keys_and_values(a, layer, weights, x)
        if any(other.cache_of == index for _, _, other in spec.attentions()):
            caches[index] = cache
    else:
        cache = caches[a.cache_of]
    # (tokens, heads, width) -> (heads, tokens, width)
    query, key, value = (part.transpose(0, 1) for part in (query, *cache))
    shared_by = a.heads // a.num_kv_heads
    key, value = key.repeat_interleave(shared_by, 0), value.repeat_interleave(shared_by, 0)
    mixed = _weigh(a, layer.window_tokens, query, key, value).transpose(0, 1)
    if gate is not None:
        mixed = mixed * gate.sigmoid()
    if a.has_head_gate:
        mixed = mixed * weights.project("head_gate", x).sigmoid()[..., None]
    joined = mixed.reshape(len(x), a.query_width)
    return weights.project("attention_output", joined, has_bias=a.has_output_bias)


def _keys_and_values(
    a: Attention, layer: Layer, weights: Weights, x: "torch.Tensor"
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Return keys and values, of shape ``(tokens, heads, head width)``."""
    by_head = (a.num_kv_heads, a.head_dim)
    key = weights.project("key", x, has_bias=a.has_qkv_bias).unflatten(-1, by_head)
    value = key
    if not a.values_are_keys:
        value = weights.project("value", x, has_bias=a.has_qkv_bias).unflatten(-1, by_head)
    if a.value_norm_epsilon is not None:
        value = value * (value.square().mean(-1, keepdim=True) + a.value_norm_epsilon).rsqrt()
    return _position(a, layer, weights, "key_norm", key), value


def _position(
    a: Attention, layer: Layer, weights: Weights, role: str, x: "torch.Tensor"
) -> "torch.Tensor":
    """Normalize and rotate queries or keys."""
    norm = a.query_key_norm
    if norm and not a.normalizes_after_rope:
        x = _normalize_heads(a, norm, weights, role, x)
    if layer.rope:
        x = _rotate(layer.rope, x)
    if norm and a.normalizes_after_rope:
        x = _normalize_heads(a, norm, weights, role, x)
    return x


def _normalize_heads(
    attention: Attention, norm: Norm, weights: Weights, role: str, x: "torch.Tensor"
) -> "torch.Tensor":
    """Normalize ``(tokens, heads, head width)``: each head, or all channels of a token."""
    if attention.head_norms == "together":
        return normalize(norm, weights, role, x.flatten(1)).view_as(x)
    return normalize(norm, weights, role, x)


def _grow(growth: QueryGrowth, query: "torch.Tensor") -> "torch.Tensor":
    import torch

    steps = torch.arange(len(query)) // growth.step_tokens
    return query * (1 + growth.rate * steps.to(torch.float32).log1p())[:, None, None]


def _rotate(rope: Rope, x: "torch.Tensor") -> "torch.Tensor":
    """Turn the first channels of every head by the position; ``x`` is (tokens, heads, width)."""
    import torch

    exponents = torch.arange(0, rope.width, 2, dtype=torch.float32) / rope.width
    divisors = torch.tensor(rope.divisors(len(x)), dtype=torch.float32)
    frequencies = 1.0 / (divisors * rope.theta**exponents)
    angles = torch.arange(len(x), dtype=torch.float32)[:, None, None] * frequencies
    cosine, sine = (wave * rope.attention_factor for wave in (angles.cos(), angles.sin()))
    first, second = x[..., : rope.width].chunk(2, dim=-1)
    turned = (first * cosine - second * sine, second * cosine + first * sine)
    return torch.cat((*turned, x[..., rope.width :]), dim=-1)


def _weigh(
    attention: Attention,
    window_tokens: int | None,
    query: "torch.Tensor",
    key: "torch.Tensor",
    value: "torch.Tensor",
) -> "torch.Tensor":
    """Return the values each query sees, weighted; some queries at a time, to bound memory."""
    import torch

    tokens = query.shape[1]
    mixed = torch.empty_like(query)
    for first in range(0, tokens, QUERY_BLOCK_TOKENS):
        last = min(first + QUERY_BLOCK_TOKENS, tokens)
        start = 0 if window_tokens is None else max(0, first + 1 - window_tokens)
        scores = query[:, first:last] @ key[:, start:last].mT * attention.softmax_scale
        if attention.attn_logit_softcap is not None:
            scores = soften(scores, attention.attn_logit_softcap)
        distance = torch.arange(first, last)[:, None] - torch.arange(start, last)
        hidden = distance < 0
        if window_tokens is not None:
            hidden |= distance >= window_tokens
        shares = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        mixed[:, first:last] = shares @ value[:, start:last]
    return mixed


def _convolve_gated(conv: ShortConv, weights: Weights, x: "torch.Tensor") -> "torch.Tensor":
    before, after, x = weights.project("conv_in", x, has_bias=conv.has_bias).chunk(3, dim=-1)
    mixed = _convolve(weights["conv_taps"], before * x)
    if conv.has_bias:
        mixed = mixed + weights["conv_taps_bias"]
    return weights.project("conv_output", after * mixed, has_bias=conv.has_bias)


def _convolve(taps: "torch.Tensor", x: "torch.Tensor") -> "torch.Tensor":
    """Return each channel's last tokens times its taps; ``x`` is ``(tokens, channels)``."""
    from torch.nn import functional

    count = taps.shape[1]
    earlier = functional.pad(x, (0, 0, count - 1, 0))
    by_tap = (earlier[tap : tap + len(x)] * taps[:, tap] for tap in range(count))
    return sum(by_tap, start=x.new_zeros(()))


def _apply_delta(net: DeltaNet, weights: Weights, x: "torch.Tensor") -> "torch.Tensor":
    import torch
    from torch.nn import functional

    mixed = functional.silu(_convolve(weights["delta_taps"], weights.project("delta_qkv", x)))
    query, key, value = mixed.split([net.key_width, net.key_width, net.value_width], dim=-1)
    query = _unit(query.unflatten(-1, (net.key_heads, -1))) * net.key_head_dim**-0.5
    key = _unit(key.unflatten(-1, (net.key_heads, -1)))
    query, key = (part.repeat_interleave(net.values_per_key, 1) for part in (query, key))
    beta = weights.project("delta_beta", x).sigmoid()
    step = weights.project("delta_alpha", x) + weights["delta_decay_bias"]
    log_decay = -weights["delta_decay"].exp() * functional.softplus(step)
    value = value.unflatten(-1, (net.value_heads, -1))
    state = x.new_zeros((net.value_heads, net.key_head_dim, net.value_head_dim))
    read = []
    # (tokens, heads, ...) -> (heads, tokens, ...)
    parts = [part.transpose(0, 1) for part in (query, key, value, log_decay, beta)]
    for first in range(0, len(x), DELTA_CHUNK_TOKENS):
        chunk = [part[:, first : first + DELTA_CHUNK_TOKENS] for part in parts]
        found, state = _read_chunk(*chunk, state=state)
        read.append(found)
    found = normalize(net.norm, weights, "delta_norm", torch.cat(read, dim=1).transpose(0, 1))
    gate = functional.silu(weights.project("delta_gate", x).unflatten(-1, (net.value_heads, -1)))
    return weights.project("delta_output", (found * gate).flatten(1))


def _unit(x: "torch.Tensor") -> "torch.Tensor":
    return x * (x.square().sum(-1, keepdim=True) + DELTA_EPSILON).rsqrt()


def _read_chunk(  # noqa: PLR0913 - what the rule is about
    query: "torch.Tensor",
    key: "torch.Tensor",
    value: "torch.Tensor",
    log_decay: "torch.Tensor",
    beta: "torch.Tensor",
    *,
    state: "torch.Tensor",
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Apply the gated delta rule to some tokens at once, without a loop over them.

    What each token writes depends on what those before it in the chunk wrote: a triangular system
    of equations. Source: Yang et al. 2024, "Gated Delta Networks", section 3.3.

    Args:
        query: Float32 ``(heads, tokens, key width)``.
        key: As ``query``.
        value: Float32 ``(heads, tokens, value width)``.
        log_decay: Float32 ``(heads, tokens)``, none above 0.
        beta: Float32 ``(heads, tokens)``, how much of a value is written.
        state: Float32 ``(heads, key width, value width)``.

    Returns:
        What is read, shaped as ``value``, and the state afterwards.
    """
    import torch

    tokens = query.shape[1]
    total = log_decay.cumsum(-1)
    later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    # masked before exp: above the diagonal it would overflow
    between = (total[..., :, None] - total[..., None, :]).masked_fill(later, -torch.inf).exp()
    weighted = key * beta[..., None]
    onto = (weighted @ key.mT * between).tril(-1) + torch.eye(tokens)
    seen = total.exp()[..., None]
    wanted = value * beta[..., None] - (weighted * seen) @ state
    written = torch.linalg.solve_triangular(onto, wanted, upper=False, unitriangular=True)
    read = (query * seen) @ state + (query @ key.mT * between) @ written
    left = (total[..., -1:] - total).exp()[..., None]
    return read, state * total[..., -1:].exp()[..., None] + (key * left).mT @ written
