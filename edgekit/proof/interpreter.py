"""What a checkpoint says, in float32, for models larger than memory.

An interpreter of `DecoderSpec` in torch. All texts pass through layer 0, then through layer 1, so
the weights of one layer are in memory at a time; the output head is applied in blocks of rows.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias, assert_never

from edgekit.errors import UsageError
from edgekit.formats import DecoderWeights
from edgekit.model.spec import (
    XIELU_BETA,
    XIELU_EPSILON,
    Activation,
    Attention,
    DecoderSpec,
    Layer,
    Norm,
    QueryGrowth,
    Rope,
)
from edgekit.progress import Advance
from edgekit.runtime import reading


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    Observer: TypeAlias = Callable[[str, torch.Tensor], None]

QUERY_BLOCK_TOKENS = 256  # scores of 32 heads over 4,096 keys take 128 MiB
HEAD_BLOCK_BYTES = 64 * 2**20  # rows of the output head in memory at a time


def logits(
    model: DecoderWeights, texts: Sequence[Sequence[int]]
) -> Iterator["npt.NDArray[np.float32]"]:
    """Yield the logits of each text, in order, of shape ``(tokens, vocabulary)``.

    One text's logits are in memory at a time, so keep texts short where the vocabulary is large:
    512 tokens of 152,000 words are 297 MiB.

    Raises:
        UsageError: If a text is empty, longer than the context, or has an unknown token id.
    """
    for states in hidden_states(model, texts):
        yield apply_head(model, states).numpy()


def hidden_states(
    model: DecoderWeights,
    texts: Sequence[Sequence[int]],
    *,
    observe: "Observer | None" = None,
    advance: Advance = lambda _: None,
) -> "list[torch.Tensor]":
    """Return what the output head reads: for each text float32 ``(tokens, hidden_size)``.

    Args:
        model: The decoder and its weights.
        texts: Token ids.
        observe: Called with the role of every matrix of a layer and what it is multiplied with,
            ``(tokens, columns)``, text by text.
        advance: Told how many tokens just passed through one layer.

    Raises:
        UsageError: As `logits`.
    """
    import torch

    for text in texts:
        _refuse_text(model.spec, text)
    with torch.inference_mode():
        states = [_embed(model, text) for text in texts]
        for index, layer in enumerate(model.spec.layers):
            weights = _Weights(model, prefix=f"layers.{index}.", observe=observe)
            for at, x in enumerate(states):
                states[at] = _apply_layer(model.spec, layer, weights, x)
                advance(len(x))
        final = _Weights(model, prefix="")
        return [_normalize(model.spec.norm, final, "final_norm", x) for x in states]


class InterpreterSession:
    """A model without a runtime, as a session: every call reads the whole text again.

    Weights stay in memory once read.
    """

    def __init__(self, model: DecoderWeights, *, context_tokens: int) -> None:
        self.vocabulary_tokens = model.spec.vocab_size
        self.context_tokens = context_tokens
        self._model = _Held(model)
        self._read: list[int] = []

    def prefill(self, ids: Sequence[int]) -> "npt.NDArray[np.float32]":
        """Read ``ids`` after what was read; return float32 ``(vocabulary_tokens,)`` logits.

        Raises:
            UsageError: If ``ids`` is empty, has an unknown id, or outgrows the context.
        """
        reading.refuse_empty(ids)
        reading.refuse(self, ids, cached_tokens=len(self._read))
        text = [*self._read, *ids]
        (states,) = hidden_states(self._model, [text])
        self._read = text
        found: npt.NDArray[np.float32] = apply_head(self._model, states[-1:]).numpy()[0]
        return found

    def decode(self, token: int) -> "npt.NDArray[np.float32]":
        """Read one token more; return float32 ``(vocabulary_tokens,)`` logits."""
        return self.prefill([token])

    def all_logits(self, ids: Sequence[int]) -> "npt.NDArray[np.float32]":
        """Read ``ids`` alone; return float32 ``(len(ids), vocabulary_tokens)`` logits."""
        reading.refuse(self, ids, cached_tokens=0)
        self._read = list(ids)
        return next(logits(self._model, [ids]))

    def rewind(self, tokens: int) -> bool:
        """Forget what was read after so many tokens; it always can."""
        del self._read[tokens:]
        return True

    def reset(self) -> None:
        """Forget what was read."""
        self._read = []

    def close(self) -> None:
        """Give the weights back."""
        self._model.forget()


class _Held:
    """A model whose weights are read once."""

    def __init__(self, model: DecoderWeights) -> None:
        self.spec = model.spec
        self._model = model
        self._kept: dict[str, npt.NDArray[np.float32]] = {}

    def weight(
        self, role: str, first_row: int = 0, rows: int | None = None
    ) -> "npt.NDArray[np.float32]":
        if role not in self._kept:
            self._kept[role] = self._model.weight(role)
        return self._kept[role][first_row : None if rows is None else first_row + rows]

    def forget(self) -> None:
        self._kept.clear()


def _refuse_text(spec: DecoderSpec, ids: Sequence[int]) -> None:
    if not 0 < len(ids) <= spec.context_tokens:
        raise UsageError(f"a text has {len(ids)} tokens, expected 1 to {spec.context_tokens}")
    if min(ids) < 0 or max(ids) >= spec.vocab_size:
        raise UsageError(
            f"a text has token id {min(ids) if min(ids) < 0 else max(ids)}, "
            f"the vocabulary has {spec.vocab_size}"
        )


class _Weights:
    """Weights of one layer by role, read when first asked for and then kept."""

    def __init__(
        self, model: DecoderWeights, *, prefix: str, observe: "Observer | None" = None
    ) -> None:
        self._model = model
        self._prefix = prefix
        self._observe = observe
        self._kept: dict[str, torch.Tensor] = {}

    def __getitem__(self, role: str) -> "torch.Tensor":
        import torch

        if role not in self._kept:
            self._kept[role] = torch.from_numpy(self._model.weight(self._prefix + role))
        return self._kept[role]

    def project(self, role: str, x: "torch.Tensor", *, has_bias: bool) -> "torch.Tensor":
        from torch.nn import functional

        if self._observe:
            self._observe(self._prefix + role, x)
        return functional.linear(x, self[role], self[f"{role}_bias"] if has_bias else None)


def _embed(model: DecoderWeights, ids: Sequence[int]) -> "torch.Tensor":
    """Return the rows of the embedding that a text needs, and read no others."""
    import torch

    rows = {id: model.weight("token_embedding", id, 1)[0] for id in set(ids)}
    found = torch.stack([torch.from_numpy(rows[id]) for id in ids])
    return found * model.spec.embedding_scale


def apply_head(model: DecoderWeights, states: "torch.Tensor") -> "torch.Tensor":
    """Return float32 ``(tokens, vocab_size)`` logits, some rows of the head in memory at a time."""
    import torch

    spec = model.spec
    role = "token_embedding" if spec.is_tied else "output_head"
    block = max(1, HEAD_BLOCK_BYTES // (4 * spec.hidden_size))
    found = torch.empty(len(states), spec.vocab_size)
    for first in range(0, spec.vocab_size, block):
        rows = min(block, spec.vocab_size - first)
        head = torch.from_numpy(model.weight(role, first, rows))
        torch.matmul(states, head.T, out=found[:, first : first + rows])
    if spec.has_head_bias:
        found += torch.from_numpy(model.weight("output_head_bias"))
    return found if spec.final_logit_softcap is None else _cap(found, spec.final_logit_softcap)


def _apply_layer(
    spec: DecoderSpec, layer: Layer, weights: _Weights, x: "torch.Tensor"
) -> "torch.Tensor":
    read = _normalize(spec.norm, weights, "attention_norm", x) if spec.has_pre_norms else x
    attended = _attend(spec.attention, layer, weights, read)
    if spec.has_post_norms:
        attended = _normalize(spec.norm, weights, "attention_post_norm", attended)
    if spec.residual == "serial":
        x = x + attended
        read = _normalize(spec.norm, weights, "mlp_norm", x) if spec.has_pre_norms else x
    changed = _apply_mlp(spec, weights, read)
    if spec.has_post_norms:
        changed = _normalize(spec.norm, weights, "mlp_post_norm", changed)
    return x + changed if spec.residual == "serial" else x + attended + changed


def _normalize(norm: Norm, weights: _Weights, role: str, x: "torch.Tensor") -> "torch.Tensor":
    """Normalize the last axis; a weight of two dimensions is one row for each head."""
    if norm.kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x * (x.square().mean(-1, keepdim=True) + norm.epsilon).rsqrt()
    weight = weights[role]
    x = x * (1 + weight if norm.unit_offset else weight)
    return x + weights[f"{role}_bias"] if norm.has_bias else x


def _apply_mlp(spec: DecoderSpec, weights: _Weights, x: "torch.Tensor") -> "torch.Tensor":
    up = weights.project("up", x, has_bias=spec.has_mlp_bias)
    if spec.is_gated:
        gate = weights.project("gate", x, has_bias=spec.has_mlp_bias)
        activated = _activate(spec.activation, weights, gate) * up
    else:
        activated = _activate(spec.activation, weights, up)
    return weights.project("down", activated, has_bias=spec.has_mlp_bias)


def _activate(activation: Activation, weights: _Weights, x: "torch.Tensor") -> "torch.Tensor":
    from torch.nn import functional

    match activation:
        case "silu":
            return functional.silu(x)
        case "gelu_tanh":
            return functional.gelu(x, approximate="tanh")
        case "relu2":
            return x.relu().square()
        case "xielu":
            return _xielu(x, weights["xielu_positive"], weights["xielu_negative"])
        case _:
            assert_never(activation)


def _xielu(x: "torch.Tensor", positive: "torch.Tensor", negative: "torch.Tensor") -> "torch.Tensor":
    import torch
    from torch.nn import functional

    rising = functional.softplus(positive) * x.square()
    below = x.clamp(max=XIELU_EPSILON).expm1() - x
    falling = (XIELU_BETA + functional.softplus(negative)) * below
    return torch.where(x > 0, rising, falling) + XIELU_BETA * x


def _attend(
    attention: Attention, layer: Layer, weights: _Weights, x: "torch.Tensor"
) -> "torch.Tensor":
    query, key, value = _project(attention, weights, x)
    norm, normalizes_last = attention.query_key_norm, attention.normalizes_after_rope
    if norm and not normalizes_last:
        query = _normalize_heads(attention, norm, weights, "query_norm", query)
        key = _normalize_heads(attention, norm, weights, "key_norm", key)
    if layer.rope:
        query, key = _rotate(layer.rope, query), _rotate(layer.rope, key)
    if norm and normalizes_last:
        query = _normalize_heads(attention, norm, weights, "query_norm", query)
        key = _normalize_heads(attention, norm, weights, "key_norm", key)
    if attention.query_growth:
        query = _grow(attention.query_growth, query)
    # (tokens, heads, width) -> (heads, tokens, width)
    query, key, value = (part.transpose(0, 1) for part in (query, key, value))
    shared_by = attention.heads // attention.num_kv_heads
    key, value = key.repeat_interleave(shared_by, 0), value.repeat_interleave(shared_by, 0)
    mixed = _mix(attention, layer.window_tokens, query, key, value)
    joined = mixed.transpose(0, 1).reshape(len(x), attention.query_width)
    return weights.project("attention_output", joined, has_bias=attention.has_output_bias)


def _project(
    attention: Attention, weights: _Weights, x: "torch.Tensor"
) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor]":
    """Return queries, keys and values, of shape ``(tokens, heads, head width)``."""
    query, key, value = (
        weights.project(role, x, has_bias=attention.has_qkv_bias).unflatten(
            -1, (heads, attention.head_dim)
        )
        for role, heads in (
            ("query", attention.heads),
            ("key", attention.num_kv_heads),
            ("value", attention.num_kv_heads),
        )
    )
    return query, key, value


def _normalize_heads(
    attention: Attention, norm: Norm, weights: _Weights, role: str, x: "torch.Tensor"
) -> "torch.Tensor":
    """Normalize ``(tokens, heads, head width)``: each head, or all channels of a token."""
    if attention.head_norms == "together":
        return _normalize(norm, weights, role, x.flatten(1)).view_as(x)
    return _normalize(norm, weights, role, x)


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


def _mix(
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
            scores = _cap(scores, attention.attn_logit_softcap)
        distance = torch.arange(first, last)[:, None] - torch.arange(start, last)
        hidden = distance < 0
        if window_tokens is not None:
            hidden |= distance >= window_tokens
        shares = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        mixed[:, first:last] = shares @ value[:, start:last]
    return mixed


def _cap(x: "torch.Tensor", cap: float) -> "torch.Tensor":
    return cap * (x / cap).tanh()
