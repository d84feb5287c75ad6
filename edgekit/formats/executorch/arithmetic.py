"""What of a decoder's arithmetic every back-end does alike, out of operators of its own.

A `DecoderSpec` says which norms there are, what rotates first and how an MLP bends what it is
given; here that is read once. A back-end adds the operators, and where its caches are.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Generic, Literal, TypeVar, assert_never

from edgekit.model.mixers import Attention, QueryGrowth
from edgekit.model.norm import Norm
from edgekit.model.rope import Rope
from edgekit.model.spec import XIELU_BETA, DecoderSpec


V = TypeVar("V")  # what stands for a tensor

# How many operators `Arithmetic` makes of an activation that no back-end has.
RELU2_OPERATORS, XIELU_OPERATORS = 2, 11
# Activations that grow as squares do, past what float16 can hold.
SQUARES = frozenset({"relu2", "xielu"})


def bias_of(role: str) -> str:
    """Return the role of what is added to the product with a matrix, if anything is.

    >>> bias_of("layers.3.down"), bias_of("token_embedding")
    ('layers.3.down_bias', 'output_head_bias')
    """
    return f"{'output_head' if role == 'token_embedding' else role}_bias"


def ropes(spec: DecoderSpec) -> tuple[Rope, ...]:
    """Return the rotations of a decoder, each once, in the order of its layers."""
    return tuple(dict.fromkeys(layer.rope for layer in spec.layers if layer.rope))


def query_growth(spec: DecoderSpec) -> QueryGrowth | None:
    """Return how queries grow with their positions, in the layers where they do."""
    return next((a.query_growth for _, _, a in spec.attentions() if a.query_growth), None)


class Arithmetic(ABC, Generic[V]):
    """A decoder in the operators of a back-end.

    Where one is given a role, it is that of the layer at hand, with the prefix that the back-end
    knows the layer's weights by.
    """

    spec: DecoderSpec

    def _before(self, role: str, x: V) -> V:
        """Return what attention or the MLP reads of the residual stream."""
        return self._normalize(self.spec.norm, role, x) if self.spec.has_pre_norms else x

    def _after(self, role: str, x: V) -> V:
        """Return what is added to the residual stream of what attention or the MLP gives."""
        return self._normalize(self.spec.norm, role, x) if self.spec.has_post_norms else x

    def _steps_of_heads(
        self, a: Attention, *, rotates: bool
    ) -> Iterator[Literal["normalize", "rotate"]]:
        """Yield what is done with queries and keys, in this order."""
        if a.query_key_norm and not a.normalizes_after_rope:
            yield "normalize"
        if rotates:
            yield "rotate"
        if a.query_key_norm and a.normalizes_after_rope:
            yield "normalize"

    def _normalize_heads(self, a: Attention, role: str, x: V, heads: int) -> V:
        """Return queries or keys after their norm, which sees the heads apart or all at once."""
        assert a.query_key_norm is not None  # noqa: S101 - else it is no step
        if a.head_norms == "together":
            joined = self._normalize(a.query_key_norm, role, self._join_heads(x, heads, a.head_dim))
            return self._split_heads(joined, heads, a.head_dim)
        return self._normalize(a.query_key_norm, role, x)

    def _activate(self, prefix: str, x: V) -> V:
        """Return what the MLP makes of its first product."""
        activation = self.spec.activation
        match activation:
            case "silu":
                return self._silu(x)
            case "gelu_tanh":
                return self._gelu_tanh(x)
            case "relu2":
                positive = self._relu(x)
                return self._multiply(positive, positive)
            case "xielu":
                return self._xielu(prefix, x)
            case _:
                assert_never(activation)

    def _xielu(self, prefix: str, x: V) -> V:
        """Return xIELU by the slopes that `slopes` makes of what was learned.

        Below zero its formula has the smaller of x and a number that no float32 next to one tells
        from zero; x itself is as exact, and above zero nothing is left of that part.
        """
        positive = self._relu(x)
        negative = self._subtract(x, positive)
        square = self._multiply(positive, positive)
        bent = self._subtract(self._exponential(negative), self._add(negative, 1.0))
        above = self._multiply(square, self._vector(f"{prefix}xielu_positive"))
        below = self._multiply(bent, self._vector(f"{prefix}xielu_negative"))
        return self._add(self._add(above, below), self._multiply(x, XIELU_BETA))

    @abstractmethod
    def _normalize(self, norm: Norm, role: str, x: V) -> V:
        """Normalize the last axis; Gemma's ones are in its weights already."""

    @abstractmethod
    def _split_heads(self, x: V, heads: int, width: int) -> V:
        """Return the channels of all heads with an axis for the heads, ``width`` channels each."""

    @abstractmethod
    def _join_heads(self, x: V, heads: int, width: int) -> V:
        """Return heads as the channels of all."""

    @abstractmethod
    def _vector(self, role: str) -> V:
        """Return a weight that is no matrix."""

    @abstractmethod
    def _add(self, x: V, y: V | float) -> V:
        """Return a sum of the shape of ``x``."""

    @abstractmethod
    def _subtract(self, x: V, y: V) -> V:
        """Return a difference of the shape of ``x``."""

    @abstractmethod
    def _multiply(self, x: V, y: V | float) -> V:
        """Return a product of the shape of ``x``."""

    @abstractmethod
    def _relu(self, x: V) -> V:
        """Return zero for what is smaller."""

    @abstractmethod
    def _exponential(self, x: V) -> V:
        """Return e to the power of what is no larger than zero."""

    @abstractmethod
    def _silu(self, x: V) -> V:
        """Return x times its sigmoid."""

    @abstractmethod
    def _gelu_tanh(self, x: V) -> V:
        """Return GELU by a tanh."""
