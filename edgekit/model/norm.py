"""Normalizations."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from edgekit.errors import UsageError
from edgekit.model.shapes import Shape


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


def norm_weights(role: str, norm: Norm, shape: Shape) -> Iterator[tuple[str, Shape]]:
    """Yield the weight of a norm and its bias."""
    yield role, shape
    if norm.has_bias:
        yield f"{role}_bias", shape
