"""Mixers that keep a state, in ONNX Runtime's ``CausalConvWithState`` and ``LinearAttention``.

All of it is float32, in graphs of half precision too. A row of a batch may end with tokens that are
none (see `graph`), and no position hides from a state what was read into it. So a convolution keeps
the columns before those, and a delta net neither forgets nor learns where one is.
Source: docs/ContribOperators.md of ONNX Runtime 1.32.
"""

from dataclasses import dataclass

from edgekit.formats.onnx.model import CONTRIB
from edgekit.formats.onnx.operators import FLOAT32, Operators
from edgekit.model.mixers import DELTA_EPSILON, DeltaNet, ShortConv


# Has both operators, and computes with them what 1.32 does; 1.25.0 has neither.
FIRST_VERSION = "1.25.1"


def state_name(layer: int | str, state: str, *, of: str = "past") -> str:
    """Return what transformers.js calls a state of a layer, as an input or, of ``present``, after.

    >>> state_name(3, "conv"), state_name(3, "recurrent", of="present")
    ('past_conv.3', 'present_recurrent.3')
    """
    return f"{of}_{state}.{layer}"


@dataclass(frozen=True, kw_only=True)
class DeltaInputs:
    """What the matrices of a delta net make of what it reads: float32 (batch, tokens, …)."""

    qkv: str
    beta: str
    alpha: str
    gate: str


@dataclass(frozen=True, kw_only=True)
class Convolution:
    """A causal convolution of each channel by itself."""

    weight: str  # (channels, taps)
    channels: int
    taps: int
    bias: str = ""  # (channels,)
    activation: str = "none"


@dataclass(frozen=True, kw_only=True)
class Recurrence:
    """Adds such mixers to a graph, and knows what the rows of a batch hold at this step."""

    graph: Operators
    counts: str  # int64 (batch, 1): of the tokens of a row, which come first
    marks: str  # float32 (batch, tokens, 1): one for each token, zero for what is none

    def short_conv(self, made: str, index: int, mixer: ShortConv, channels: int) -> str:
        """Return what a gated convolution makes of its three parts, before it is projected.

        Args:
            made: float32 ``(batch, tokens, 3 * channels)``: b, c and x.
            index: Of the layer.
            mixer: What it computes.
            channels: Of each part.
        """
        g, taps = self.graph, f"layers.{index}.conv_taps"
        b, c, x = self._split(made, index, (channels,) * 3)
        bias = f"{taps}_bias" if mixer.has_bias else ""
        how = Convolution(weight=taps, channels=channels, taps=mixer.taps, bias=bias)
        return g.op("Mul", c, self._convolve(g.op("Mul", b, x), index, how))

    def delta_net(self, made: DeltaInputs, index: int, mixer: DeltaNet) -> str:
        """Return what a delta net reads from its state, gated, before it is projected.

        Args:
            made: By its matrices.
            index: Of the layer.
            mixer: What it computes.
        """
        g, prefix = self.graph, f"layers.{index}.delta_"
        how = Convolution(
            weight=f"{prefix}taps", channels=mixer.channels, taps=mixer.taps, activation="silu"
        )
        sizes = (mixer.key_width, mixer.key_width, mixer.value_width)
        query, key, value = self._split(self._convolve(made.qkv, index, how), index, sizes)
        query, key = (self._of_length_one(x, mixer) for x in (query, key))
        beta = g.op("Mul", g.op("Sigmoid", made.beta), self.marks)
        speed = g.op("Softplus", g.op("Add", made.alpha, f"{prefix}decay_bias"))
        rate = g.op("Neg", g.op("Exp", f"{prefix}decay"))  # of a constant: once, at load
        decay = g.op("Mul", g.op("Mul", speed, rate), self.marks)
        past, present = (state_name(index, "recurrent", of=of) for of in ("past", "present"))
        read = g.op(
            "LinearAttention", query, key, value, past, decay, beta,
            domain=CONTRIB, outputs=(f"read_{index}", present),
            q_num_heads=mixer.key_heads, kv_num_heads=mixer.value_heads,
            update_rule="gated_delta", scale=mixer.key_head_dim**-0.5,
        )  # fmt: skip
        read = g.op("Reshape", read, g.constant(0, 0, mixer.value_heads, mixer.value_head_dim))
        read = g.op(
            "SimplifiedLayerNormalization", read, f"{prefix}norm",
            axis=-1, epsilon=float(mixer.norm.epsilon), stash_type=FLOAT32,
        )  # fmt: skip
        read = g.op("Reshape", read, g.constant(0, 0, mixer.value_width))
        return g.op("Mul", read, g.op("Mul", made.gate, g.op("Sigmoid", made.gate)))

    def _split(self, x: str, index: int, sizes: tuple[int, ...]) -> tuple[str, ...]:
        """Return parts of the last axis."""
        parts = tuple(f"part_{number}_of_{index}" for number in range(len(sizes)))
        self.graph.op("Split", x, self.graph.constant(*sizes), outputs=parts, axis=-1)
        return parts

    def _of_length_one(self, x: str, mixer: DeltaNet) -> str:
        """Divide each head of queries or keys by its length."""
        g = self.graph
        x = g.op("Reshape", x, g.constant(0, 0, mixer.key_heads, mixer.key_head_dim))
        square = g.op("ReduceSum", g.op("Mul", x, x), g.constant(-1), keepdims=1)
        length = g.op("Sqrt", g.op("Add", square, g.scalar(DELTA_EPSILON)))
        return g.op("Reshape", g.op("Div", x, length), g.constant(0, 0, mixer.key_width))

    def _convolve(self, x: str, index: int, how: Convolution) -> str:
        """Convolve ``(batch, tokens, channels)``, and keep the last columns that are tokens."""
        g = self.graph
        past, present = (state_name(index, "conv", of=of) for of in ("past", "present"))
        columns = g.op("Transpose", x, perm=(0, 2, 1))
        weight = g.op("Unsqueeze", how.weight, g.constant(1))
        mixed = g.op(
            "CausalConvWithState", columns, weight, how.bias, past,
            domain=CONTRIB, outputs=(f"convolved_{index}", f"last_columns_{index}"),
            activation=how.activation,
        )  # fmt: skip
        # The operator's own state ends with the last column, whether that is a token or not.
        kept = g.op("Add", self.counts, g.constant(*range(how.taps - 1)))
        kept = g.op(
            "Expand", g.op("Unsqueeze", kept, g.constant(1)), g.constant(1, how.channels, 1)
        )
        known = g.op("Concat", past, columns, axis=2)
        g.op("GatherElements", known, kept, outputs=(present,), axis=2)
        return g.op("Transpose", mixed, perm=(0, 2, 1))
