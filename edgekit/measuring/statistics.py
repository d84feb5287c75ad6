"""Statistics of few samples: bounds of a median, spread, drift; no distribution is assumed.

Timings have long tails, so nothing here assumes a shape. A bound for the median is an order
statistic: of ten samples, at most eight lie below the median with a probability of 98.9 %, so the
ninth is above it that often.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


CONFIDENCE = 0.95  # of each one-sided bound


@dataclass(frozen=True, kw_only=True)
class MedianBounds:
    """Two samples between which the median lies, each side with at least `CONFIDENCE`."""

    low: float
    high: float
    rank: int  # ``high`` is the sample of this rank, counted from 1; ``low`` mirrors it
    samples: int
    confidence: float  # of one side

    def basis(self, side: Literal["low", "high"]) -> str:
        """How one bound came about, in words."""
        extreme = "largest" if (side == "high") == (self.rank == self.samples) else "smallest"
        place = extreme if self.rank == self.samples else f"{ordinal(self.rank)} {extreme}"
        return f"{place} of {self.samples} samples, {self.confidence:.1%} confidence"


def bounds_of_median(samples: Sequence[float]) -> MedianBounds | None:
    """Return one-sided bounds for the median, or None below five samples.

    The upper bound is the smallest sample that is above the median with at least `CONFIDENCE`:
    the probability that fewer than ``rank`` of ``n`` samples fall below the median is a sum of
    binomial coefficients over ``2 ** n``.
    """
    ordered = sorted(samples)
    count = len(ordered)
    below = 0
    for rank in range(1, count + 1):
        below += math.comb(count, rank - 1)
        confidence = below / 2**count
        if confidence >= CONFIDENCE:
            return MedianBounds(
                low=ordered[count - rank],
                high=ordered[rank - 1],
                rank=rank,
                samples=count,
                confidence=confidence,
            )
    return None


def quantile(samples: Sequence[float], share: float) -> float:
    """Return the sample below or at which ``share`` of all samples lie (nearest rank)."""
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def coefficient_of_variation(samples: Sequence[float]) -> float:
    """Return the standard deviation as a share of the mean; 0 for fewer than two samples."""
    mean = statistics.fmean(samples) if samples else 0.0
    if len(samples) < 2 or mean == 0:
        return 0.0
    return statistics.stdev(samples) / mean


def drift(samples: Sequence[float]) -> float | None:
    """Return how much the median of the second half differs from the first, as a share of it.

    The samples are in the order they were taken; the middle one of an odd number belongs to
    neither half. None below ten samples: medians of fewer than five move by chance.
    """
    half = len(samples) // 2
    if half < 5 or (first := statistics.median(samples[:half])) == 0:
        return None
    return statistics.median(samples[-half:]) / first - 1


def ordinal(number: int) -> str:
    """Return ``"1st"``, ``"2nd"``, ``"9th"``, ``"12th"``."""
    suffixes = {1: "st", 2: "nd", 3: "rd"}
    suffix = "th" if number % 100 in {11, 12, 13} else suffixes.get(number % 10, "th")
    return f"{number}{suffix}"
