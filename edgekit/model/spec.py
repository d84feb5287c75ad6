"""A decoder as data: everything in which small language models differ.

A family reads a ``config.json`` into a `DecoderSpec`; a format turns a `DecoderSpec` into its own
keys, graph or module. Neither knows the other.

Weights carry format-neutral role names: ``token_embedding``, ``layers.3.query``, ``final_norm``.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, Self

from edgekit.errors import UsageError


Activation = Literal["silu", "gelu_tanh", "relu2", "xielu"]
Shape = tuple[int, ...]

# xIELU (Huang and Schlag 2024) has two learned slopes a layer, stored before their softplus:
# x > 0: softplus(xielu_positive) x^2 + beta x
# else: (beta + softplus(xielu_negative)) (expm1(min(x, epsilon)) - x) + beta x
XIELU_BETA = 0.5
XIELU_EPSILON = -1e-6


@dataclass(frozen=True, kw_only=True)
class Norm:
    """A normalization over the last axis.

    ``rms`` is ``x / sqrt(mean(x ** 2) + epsilon) * w``; ``layer`` subtracts the mean first.
    """

    kind: Literal["rms", "layer"]
    epsilon: float
    has_bias: bool = False
    unit_offset: bool = False  # Gemma stores w and multiplies by 1 + w

    def __post_init__(self) -> None:
        """Refuse an epsilon that is larger than what it is added to.

        Raises:
            UsageError: If it is above 1, or below 0.
        """
        if not 0 <= self.epsilon <= 1:
            raise UsageError(
                f"the epsilon of a norm is {self.epsilon:g}, expected a number from 0 to 1",
                hint="1e-5 and 1e-6 are usual",
            )


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Every frequency divided by the same factor."""

    factor: float


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Slow frequencies divided by ``factor``, fast ones kept, a ramp between (Llama 3.1)."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_context_tokens: int

    def divisor(self, wave_tokens: float) -> float:
        """Return what divides the frequency whose full turn takes ``wave_tokens``."""
        turns = self.original_context_tokens / wave_tokens
        low, high = self.low_frequency_factor, self.high_frequency_factor
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        return 1 / ((1 - kept) / self.factor + kept)


@dataclass(frozen=True, kw_only=True)
class LongRopeScaling:
    """One divisor per frequency, another set once the text outgrows the original context."""

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_context_tokens: int
    attention_factor: float


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """Slow frequencies divided by ``factor``, fast ones kept, and a ramp by their number between.

    Source: Peng et al. 2023, and ``_compute_yarn_parameters`` of transformers 5.
    """

    factor: float
    fast_turns: float  # in the original context: a frequency that makes more is kept
    slow_turns: float  # one that makes fewer is divided
    original_context_tokens: int
    attention_factor: float
    is_truncated: bool  # whether the ramp begins and ends at whole numbers of frequencies

    def divisors(self, width: int, theta: float) -> tuple[float, ...]:
        """Return what divides each frequency."""
        low, high = (self._index(turns, width, theta) for turns in self._turns)
        if self.is_truncated:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        ramp = 0.001 if low == high else high - low
        shares = (min(max((i - low) / ramp, 0.0), 1.0) for i in range(width // 2))
        return tuple(1 / (share / self.factor + 1 - share) for share in shares)

    @property
    def _turns(self) -> tuple[float, float]:
        return self.fast_turns, self.slow_turns

    def _index(self, turns: float, width: int, theta: float) -> float:
        """Return which frequency makes so many turns in the original context."""
        wave_tokens = self.original_context_tokens / (turns * 2 * math.pi)
        return width * math.log(wave_tokens) / (2 * math.log(theta))


def yarn_attention_factor(factor: float, weight: float = 1.0) -> float:
    """Return what YaRN multiplies sine and cosine with where a model does not say."""
    return 1.0 if factor <= 1 else 1 + 0.1 * weight * math.log(factor)


RopeScaling = LinearScaling | Llama3Scaling | LongRopeScaling | YarnScaling


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions on the first ``width`` channels of every head, halves rotated together."""

    width: int
    theta: float
    scaling: RopeScaling | None = None

    @property
    def attention_factor(self) -> float:
        """What multiplies sine and cosine."""
        scaling = self.scaling
        if isinstance(scaling, LongRopeScaling | YarnScaling):
            return scaling.attention_factor
        return 1.0

    @property
    def original_max_position_embeddings(self) -> int | None:
        """The longest text before every position is rotated differently; None: any."""
        scaling = self.scaling
        return scaling.original_context_tokens if isinstance(scaling, LongRopeScaling) else None

    def divisors(self, text_tokens: int) -> tuple[float, ...]:
        """Return what divides each frequency ``theta ** (-2 i / width)`` in a text of this length.

        Only longrope looks at the length: past the original context, *every* position of the text
        takes the long factors.
        """
        match self.scaling:
            case None:
                return (1.0,) * (self.width // 2)
            case LinearScaling(factor=factor):
                return (factor,) * (self.width // 2)
            case Llama3Scaling() as scaling:
                waves = (
                    2 * math.pi * self.theta ** (2 * i / self.width) for i in range(self.width // 2)
                )
                return tuple(scaling.divisor(wave) for wave in waves)
            case YarnScaling() as scaling:
                return scaling.divisors(self.width, self.theta)
            case LongRopeScaling() as scaling:
                is_long = text_tokens > scaling.original_context_tokens
                return scaling.long_factors if is_long else scaling.short_factors


@dataclass(frozen=True, kw_only=True)
class QueryGrowth:
    """Queries that grow with their position, by a step at every multiple of a length.

    A rotated query at position p is multiplied by ``1 + rate * ln(1 + floor(p / step_tokens))``:
    nothing in the first ``step_tokens`` positions. Source: Llama 4, Ministral 3 in transformers 5.
    """

    rate: float
    step_tokens: int


@dataclass(frozen=True, kw_only=True)
class Multipliers:
    """What muP multiplies with, folded into weights when a checkpoint reads them.

    No format sees them: `Checkpoint.weight` returns the products. What multiplies scores is in the
    queries (their norm, if they have one), on top of ``softmax_scale``.
    """

    embedding: float = 1.0
    query: float = 1.0
    residual: float = 1.0  # what attention and the MLP add
    logits: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Grouped-query attention; the same in every layer.

    ``head_norms`` says how the norms of queries and keys see the heads: ``alike``, each head by
    itself with one row of weights for all; ``apart``, each with a row of its own (StableLM 2 12B);
    ``together``, one norm over the channels of all heads (OLMo 2).
    """

    heads: int
    num_kv_heads: int
    head_dim: int
    softmax_scale: float  # multiplies q · k
    attn_logit_softcap: float | None = None  # Gemma 2: cap * tanh(score / cap)
    query_key_norm: Norm | None = None
    head_norms: Literal["alike", "apart", "together"] = "alike"
    normalizes_after_rope: bool = False  # HunYuan: queries and keys, once they are rotated
    query_growth: "QueryGrowth | None" = None  # Ministral 3
    has_qkv_bias: bool = False
    has_output_bias: bool = False

    @property
    def query_width(self) -> int:
        """Columns of all queries together."""
        return self.heads * self.head_dim

    @property
    def key_value_width(self) -> int:
        """Columns of all keys together; the values have as many."""
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What may change from one layer to the next."""

    rope: Rope | None  # SmolLM3 leaves it out of every fourth layer
    window_tokens: int | None = None  # attends to this many last tokens, itself included


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """A decoder-only transformer.

    ``serial`` residuals add attention before the MLP reads; ``parallel`` ones let both read the
    same normalized input. The MLP is ``down(activation(gate(x)) * up(x))``, or without a gate
    ``down(activation(up(x)))``.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    context_tokens: int
    layers: tuple[Layer, ...]
    attention: Attention
    norm: Norm
    activation: Activation = "silu"
    residual: Literal["serial", "parallel"] = "serial"
    has_pre_norms: bool = True  # OLMo 2 has none before attention and before the MLP
    has_post_norms: bool = False  # Gemma 2: also after attention and after the MLP
    is_gated: bool = True
    has_mlp_bias: bool = False
    has_head_bias: bool = False
    multipliers: Multipliers = Multipliers()  # already in the weights
    embedding_scale: float = 1.0
    final_logit_softcap: float | None = None
    is_tied: bool = False  # the output head is the token embedding

    def weights(self) -> Iterator[tuple[str, Shape]]:
        """Yield every weight the decoder needs, by role, with its shape, in the order of use.

        Matrices are ``(rows out, columns in)``, as a checkpoint stores them.
        """
        yield "token_embedding", (self.vocab_size, self.hidden_size)
        for index in range(len(self.layers)):
            for role, shape in self._layer_weights():
                yield f"layers.{index}.{role}", shape
        yield from _norm_weights("final_norm", self.norm, (self.hidden_size,))
        if not self.is_tied:
            yield "output_head", (self.vocab_size, self.hidden_size)
        if self.has_head_bias:
            yield "output_head_bias", (self.vocab_size,)

    def within(self, context_tokens: int) -> Self:
        """Return the decoder of texts this long at most: what none of them reaches is left out."""
        growth = self.attention.query_growth
        if growth and growth.step_tokens >= context_tokens:
            growth = None
        return replace(
            self,
            attention=replace(self.attention, query_growth=growth),
            layers=tuple(
                replace(layer, window_tokens=None)
                if layer.window_tokens is not None and layer.window_tokens >= context_tokens
                else layer
                for layer in self.layers
            ),
        )

    def unit_offset(self, role: str) -> bool:
        """Tell whether a weight is of a norm that multiplies by one more than it stores."""
        part = role.rpartition(".")[2]
        norm = self.attention.query_key_norm if part in {"query_norm", "key_norm"} else self.norm
        return part.endswith("norm") and norm is not None and norm.unit_offset

    def multiplier(self, role: str) -> float:
        """Return what a stored weight is multiplied with, so that nothing else need be.

        What the layers add is scaled in the norms after attention and MLP where there are any;
        scores in the norm of the queries; and logits in the last norm, which also takes back what
        an embedding that is the head brings.
        """
        part, by = role.rpartition(".")[2].removesuffix("_bias"), self.multipliers
        last = {"attention_post_norm", "mlp_post_norm"}
        if part in (last if self.has_post_norms else {"attention_output", "down"}):
            return by.residual
        if self.scales_queries(role):
            return by.query
        if part == "token_embedding":
            return by.embedding
        if part == "final_norm":
            return by.logits / by.embedding if self.is_tied else by.logits
        return by.logits if role == "output_head_bias" else 1.0

    def scales_queries(self, role: str) -> bool:
        """Tell whether a weight is the last that queries are multiplied with: their norm or own."""
        part = role.rpartition(".")[2].removesuffix("_bias")
        return part == ("query_norm" if self.attention.query_key_norm else "query")

    def rotated_pairs(self, role: str) -> "Pairs | None":
        """Return which of a weight's rows are rotated channels, None if none are."""
        rope = next((layer.rope for layer in self.layers if layer.rope), None)
        part = role.rpartition(".")[2].removesuffix("_bias")
        if rope is None or part not in {"query", "key", "query_norm", "key_norm"}:
            return None
        is_apart = part.endswith("norm") and self.attention.head_norms == "apart"
        return Pairs(self.attention.head_dim, rope.width, axis=1 if is_apart else 0)

    @property
    def original_max_position_embeddings(self) -> int | None:
        """The smallest border of its ropes."""
        borders = (
            layer.rope.original_max_position_embeddings for layer in self.layers if layer.rope
        )
        return min((border for border in borders if border is not None), default=None)

    def without_unit_offsets(self) -> Self:
        """Return the decoder whose norms multiply by what they store, ones included."""
        attention, norm = self.attention, replace(self.norm, unit_offset=False)
        if attention.query_key_norm:
            of_heads = replace(attention.query_key_norm, unit_offset=False)
            attention = replace(attention, query_key_norm=of_heads)
        return replace(self, attention=attention, norm=norm)

    def _layer_weights(self) -> Iterator[tuple[str, Shape]]:
        hidden = (self.hidden_size,)
        if self.has_pre_norms:
            yield from _norm_weights("attention_norm", self.norm, hidden)
        yield from self._attention_weights()
        if self.has_post_norms:
            yield from _norm_weights("attention_post_norm", self.norm, hidden)
        if self.has_pre_norms and self.residual == "serial":
            yield from _norm_weights("mlp_norm", self.norm, hidden)
        for role in ("gate", "up") if self.is_gated else ("up",):
            yield from _linear_weights(
                role, self.intermediate_size, self.hidden_size, self.has_mlp_bias
            )
        if self.activation == "xielu":
            yield from (("xielu_positive", (1,)), ("xielu_negative", (1,)))
        yield from _linear_weights(
            "down", self.hidden_size, self.intermediate_size, self.has_mlp_bias
        )
        if self.has_post_norms:
            yield from _norm_weights("mlp_post_norm", self.norm, hidden)

    def _attention_weights(self) -> Iterator[tuple[str, Shape]]:
        a, hidden = self.attention, self.hidden_size
        yield from _linear_weights("query", a.query_width, hidden, a.has_qkv_bias)
        yield from _linear_weights("key", a.key_value_width, hidden, a.has_qkv_bias)
        yield from _linear_weights("value", a.key_value_width, hidden, a.has_qkv_bias)
        if a.query_key_norm:
            for role, heads in (("query_norm", a.heads), ("key_norm", a.num_kv_heads)):
                shapes = {
                    "alike": (a.head_dim,),
                    "apart": (heads, a.head_dim),
                    "together": (heads * a.head_dim,),
                }
                yield from _norm_weights(role, a.query_key_norm, shapes[a.head_norms])
        yield from _linear_weights("attention_output", hidden, a.query_width, a.has_output_bias)


def _linear_weights(
    role: str, rows: int, columns: int, has_bias: bool
) -> Iterator[tuple[str, Shape]]:
    yield role, (rows, columns)
    if has_bias:
        yield f"{role}_bias", (rows,)


def _norm_weights(role: str, norm: Norm, shape: Shape) -> Iterator[tuple[str, Shape]]:
    yield role, shape
    if norm.has_bias:
        yield f"{role}_bias", shape


@dataclass(frozen=True)
class Pairs:
    """Channels of heads that are rotated two by two: the first ``rotated`` of each ``head_dim``."""

    head_dim: int
    rotated: int
    axis: Literal[0, 1] = 0  # of the weight: the one that counts channels

    def order(self, to: Literal["halves", "neighbours"]) -> tuple[int, ...]:
        """Return where each channel of a head stands in the other of the two orders."""
        half, turned = self.rotated // 2, range(self.rotated)
        if to == "neighbours":
            places = (channel // 2 + channel % 2 * half for channel in turned)
        else:
            places = (channel % half * 2 + channel // half for channel in turned)
        return (*places, *range(self.rotated, self.head_dim))


@dataclass(frozen=True)
class Source:
    """Where a weight lives in the checkpoint: a tensor, or some rows of a fused one.

    Or in several: StableLM 2 12B stores the norm of each head by itself. Then ``siblings`` are the
    rows after the first, one tensor each.
    """

    tensor: str
    first_row: int = 0
    rows: int | None = None  # None: all of them
    siblings: tuple[str, ...] = ()
    neighbours: Pairs | None = None  # stored with the two channels of each pair side by side

    @property
    def tensors(self) -> tuple[str, ...]:
        """Every tensor it reads."""
        return (self.tensor, *self.siblings)
