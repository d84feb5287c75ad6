"""Four-bit codes for blocks of weights: the scale and zero point whose error costs least.

Rounding to nearest takes the scale from the largest weight of a block, which is seldom the best for
the others. Here some narrower ranges are tried, each with the scale that is best for its codes.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from edgekit.errors import UsageError


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Rows: TypeAlias = npt.NDArray[np.float32]
    Codes: TypeAlias = npt.NDArray[np.uint8]


# Of the whole range. Finer or further steps gain 2 % of the error at three times the time.
RANGES = (1.0, 0.92, 0.84, 0.76)
SHIFTS = (-1, 0, 1)  # of the zero point
_TOP = 15  # the largest code
_CHUNK_WEIGHTS = 2**17  # what a thread holds of each array: 512 KiB, a share of the cache
DAMPING = 0.1  # of the mean, added to every column, so that no column is free to err


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What stands for blocks of weights: ``scale * (code - zero)``."""

    codes: "Codes"
    scales: "Rows"
    zeros: "Codes"


def fit(blocks: "Rows", importance: "Rows | None", *, is_symmetric: bool) -> Fitted:
    """Return codes, scales and zero points, on all processors.

    Args:
        blocks: float32, shape ``(rows, blocks, weights of a block)``.
        importance: How much a squared error counts, by column; None counts all alike.
        is_symmetric: Whether every zero point is 8, else one from 0 to 15 is chosen.
    """
    import numpy as np

    weights = _weights(blocks, importance)
    step = max(1, _CHUNK_WEIGHTS // (blocks.shape[1] * blocks.shape[2]))
    parts = [blocks[first : first + step] for first in range(0, len(blocks), step)]
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda part: _fit_part(part, weights, is_symmetric), parts))
    return Fitted(
        codes=np.concatenate([part.codes for part in found]),
        scales=np.concatenate([part.scales for part in found]),
        zeros=np.concatenate([part.zeros for part in found]),
    )


def _weights(blocks: "Rows", importance: "Rows | None") -> "Rows":
    import numpy as np

    if importance is None:
        return np.ones((1, 1, 1), np.float32)
    mean = importance.mean(dtype=np.float64) or 1.0
    damped = (importance / mean + DAMPING).astype(np.float32)
    return damped.reshape(1, *blocks.shape[1:])


def _fit_part(blocks: "Rows", weights: "Rows", is_symmetric: bool) -> Fitted:
    import numpy as np

    search = _Search(blocks, weights)
    for scales, zeros in _starts(blocks, is_symmetric=is_symmetric):
        search.try_out(scales, zeros)
    search.try_out(search.scales, search.zeros)  # a better scale may round otherwise
    if not np.isfinite(search.scales).all():
        raise UsageError("a weight is too large for four bits", hint="take F32")
    return search.result()


def _starts(blocks: "Rows", *, is_symmetric: bool) -> Iterator["tuple[Rows, Rows]"]:
    """Yield scales and zero points to try."""
    import numpy as np

    if is_symmetric:  # the weight of largest magnitude becomes -8: there is no +8
        at = np.abs(blocks).argmax(-1, keepdims=True)
        extremes = np.take_along_axis(blocks, at, -1)[..., 0]
        for share in RANGES:
            yield extremes * np.float32(share / -8), np.full_like(extremes, 8)
        return
    low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
    for share in RANGES:
        scales = (high - low) * np.float32(share / _TOP)
        zeros = np.rint(-low * np.float32(share) * inverse(scales))
        for shift in SHIFTS:
            yield scales, np.clip(zeros + shift, 0, _TOP)


class _Search:
    """Keeps, block by block, the best of all that is tried.

    With codes less their zero point c and importance w, the best scale for x is
    sum(w x c) / sum(w c c), and it takes sum(w x c)^2 / sum(w c c) off the squared error.
    """

    def __init__(self, blocks: "Rows", weights: "Rows") -> None:
        import numpy as np

        self._blocks, self._weights = blocks, weights
        self._weighted = blocks * weights
        self._gains = np.full(blocks.shape[:-1], -1, np.float32)
        self.scales = np.zeros(blocks.shape[:-1], np.float32)
        self.zeros = np.zeros_like(self.scales)

    def try_out(self, scales: "Rows", zeros: "Rows") -> None:
        import numpy as np

        centred = self._centred(scales, zeros)
        along = (self._weighted * centred).sum(-1)
        best_scales = along * inverse((self._weights * centred * centred).sum(-1))
        gains = along * best_scales
        is_better = gains > self._gains
        np.copyto(self._gains, gains, where=is_better)
        np.copyto(self.scales, best_scales, where=is_better)
        np.copyto(self.zeros, zeros, where=is_better)

    def result(self) -> Fitted:
        import numpy as np

        codes = self._centred(self.scales, self.zeros) + self.zeros[..., None]
        return Fitted(
            codes=codes.astype(np.uint8), scales=self.scales, zeros=self.zeros.astype(np.uint8)
        )

    def _centred(self, scales: "Rows", zeros: "Rows") -> "Rows":
        """Return the nearest codes, less their zero point."""
        import numpy as np

        codes = self._blocks * inverse(scales)[..., None]
        np.rint(codes, out=codes)
        below = -zeros[..., None]
        return np.clip(codes, below, below + _TOP, out=codes)


def inverse(scales: "Rows") -> "Rows":
    """Return one divided by each scale, and 0 for blocks of zeros."""
    import numpy as np

    return np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
