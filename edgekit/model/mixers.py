"""What lets the tokens of a text see each other: the first half of every layer.

A mixer names its weights and what it keeps of the text so far. Attention keeps a row of keys and
values for every token; the others a state of fixed size, which is float32, zero before the first
token of a text, and cannot be taken back to an earlier token.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from edgekit.model.norm import Norm, norm_weights
from edgekit.model.shapes import Shape, linear_weights


@dataclass(frozen=True, kw_only=True)
class QueryGrowth:
    """Queries that grow with their position, by a step at every multiple of a length.

    A rotated query at position p is multiplied by ``1 + rate * ln(1 + floor(p / step_tokens))``:
    nothing in the first ``step_tokens`` positions. Source: Llama 4, Ministral 3 in transformers 5.
    """

    rate: float
    step_tokens: int


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Grouped-query attention.

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
    value_norm_epsilon: float | None = None  # Gemma 4: values of each head, an RMS norm of ones
    query_growth: QueryGrowth | None = None  # Ministral 3
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    # Qwen3.5: each head's rows of the query matrix are its query, then as many of a gate, whose
    # sigmoid multiplies what the head has mixed.
    has_output_gate: bool = False
    has_head_gate: bool = False  # LFM3: a sigmoid of one row of ``head_gate`` multiplies each head
    values_are_keys: bool = False  # Gemma 4 31B: values are keys before their norm and rope
    cache_of: int | None = None  # Gemma 4: the earlier layer whose keys and values it reads

    @property
    def query_width(self) -> int:
        """Columns of all queries together."""
        return self.heads * self.head_dim

    @property
    def query_rows(self) -> int:
        """Rows of the matrix that makes the queries, and their gates where they have any."""
        return self.query_width * (2 if self.has_output_gate else 1)

    @property
    def key_value_width(self) -> int:
        """Columns of all keys together; the values have as many."""
        return self.num_kv_heads * self.head_dim

    @property
    def has_cache(self) -> bool:
        """Whether it keeps keys and values of its own."""
        return self.cache_of is None

    def states(self, hidden_size: int) -> Mapping[str, Shape]:
        """Return nothing: keys and values grow with the text."""
        del hidden_size
        return {}

    def weights(self, hidden_size: int) -> Iterator[tuple[str, Shape]]:
        """Yield its weights by role, in the order of use."""
        yield from linear_weights("query", self.query_rows, hidden_size, self.has_qkv_bias)
        if self.has_cache:
            made = ("key",) if self.values_are_keys else ("key", "value")
            for role in made:
                yield from linear_weights(
                    role, self.key_value_width, hidden_size, self.has_qkv_bias
                )
        if self.has_head_gate:
            yield "head_gate", (self.heads, hidden_size)
        if self.query_key_norm:
            normalized = [("query_norm", self.heads)]
            normalized += [("key_norm", self.num_kv_heads)] if self.has_cache else []
            for role, heads in normalized:
                shapes = {
                    "alike": (self.head_dim,),
                    "apart": (heads, self.head_dim),
                    "together": (heads * self.head_dim,),
                }
                yield from norm_weights(role, self.query_key_norm, shapes[self.head_norms])
        yield from linear_weights(
            "attention_output", hidden_size, self.query_width, self.has_output_bias
        )


@dataclass(frozen=True, kw_only=True)
class ShortConv:
    """A gated convolution over the last few tokens, channel by channel (LFM2).

    ``conv_in`` makes three rows of ``hidden_size``: b, c and x. What is kept is b * x of the last
    ``taps - 1`` tokens; the result is ``conv_output(c * conv(b * x))``. Nothing is activated. Of
    ``conv_taps`` the last column meets the newest token. Source: ``Lfm2ShortConv``, transformers 5.
    """

    taps: int
    has_bias: bool = False

    def states(self, hidden_size: int) -> Mapping[str, Shape]:
        """Return what it keeps, by name: float32, oldest token first."""
        return {"conv": (hidden_size, self.taps - 1)}

    def weights(self, hidden_size: int) -> Iterator[tuple[str, Shape]]:
        """Yield its weights by role, in the order of use."""
        yield from linear_weights("conv_in", 3 * hidden_size, hidden_size, self.has_bias)
        yield from linear_weights("conv_taps", hidden_size, self.taps, self.has_bias)
        yield from linear_weights("conv_output", hidden_size, hidden_size, self.has_bias)


# Added to the sum of squares of a query or key: a constant of the published kernels.
DELTA_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class DeltaNet:
    """A gated delta net (Yang et al. 2024; Qwen3.5), which keeps a matrix for each value head.

    ``silu(conv(delta_qkv x))`` holds queries and keys of ``key_heads`` and values of
    ``value_heads``; queries and keys are divided by their length (`DELTA_EPSILON` in the root),
    queries by the root of ``key_head_dim`` too. Key head i serves value heads i * r to
    i * r + r - 1. With ``beta = sigmoid(delta_beta x)`` and
    ``g = -exp(delta_decay) * softplus(delta_alpha x + delta_decay_bias)``, a token does
    ``S *= exp(g); S += k (beta * (v - k S)); o = q S`` to the state S of each value head; then
    ``delta_output(rms(o) * delta_norm * silu(delta_gate x))``, head by head.
    """

    key_heads: int
    value_heads: int
    key_head_dim: int
    value_head_dim: int
    taps: int
    norm: Norm  # of what is read from the state; an RMS norm without a unit offset

    @property
    def key_width(self) -> int:
        """Channels of all keys together; the queries have as many."""
        return self.key_heads * self.key_head_dim

    @property
    def value_width(self) -> int:
        """Channels of all values together."""
        return self.value_heads * self.value_head_dim

    @property
    def channels(self) -> int:
        """What the convolution sees: queries, keys, values."""
        return 2 * self.key_width + self.value_width

    @property
    def values_per_key(self) -> int:
        """How many value heads one key head serves."""
        return self.value_heads // self.key_heads

    def states(self, hidden_size: int) -> Mapping[str, Shape]:
        """Return what it keeps, by name: float32; the convolution's before its activation."""
        del hidden_size
        matrices = (self.value_heads, self.key_head_dim, self.value_head_dim)
        return {"conv": (self.channels, self.taps - 1), "recurrent": matrices}

    def weights(self, hidden_size: int) -> Iterator[tuple[str, Shape]]:
        """Yield its weights by role, in the order of use."""
        yield "delta_qkv", (self.channels, hidden_size)
        yield "delta_taps", (self.channels, self.taps)
        yield "delta_beta", (self.value_heads, hidden_size)
        yield "delta_alpha", (self.value_heads, hidden_size)
        yield "delta_decay", (self.value_heads,)
        yield "delta_decay_bias", (self.value_heads,)
        yield "delta_gate", (self.value_width, hidden_size)
        yield "delta_norm", (self.value_head_dim,)
        yield "delta_output", (hidden_size, self.value_width)


Mixer = Attention | ShortConv | DeltaNet
