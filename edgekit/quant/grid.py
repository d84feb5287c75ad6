"""Weights on a grid: codes for blocks of a row, a scale for each, perhaps a zero point.

A format says what its grid is and packs what comes back; how weights find their codes is decided
here, once for all formats. Rounding to nearest takes the scale from the largest weight of a block,
which is seldom the best for the others. So some narrower ranges are tried, each with the scale that
is best for its codes.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias, assert_never

from edgekit.errors import UsageError
from edgekit.quant.damping import damped
from edgekit.quant.rounding import bfloat16, from_bfloat16


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Rows: TypeAlias = npt.NDArray[np.float32]
    # Of shape (blocks of a row, weights of a block, rows): what is said of a block meets all of its
    # weights in long runs of numbers, which is what numpy is fast at.
    Blocks: TypeAlias = npt.NDArray[np.float32]
    Codes: TypeAlias = npt.NDArray[np.uint8] | npt.NDArray[np.int8]


Precision = Literal["float32", "float16", "bfloat16"]

# Of the whole range. Finer or further steps gain 2 % of the error at three times the time.
RANGES = (1.0, 0.92, 0.84, 0.76)
SHIFTS = (0, -1, 1)  # of the zero point
DAMPING = 0.1  # see `damped`
_PART_WEIGHTS = 2**18  # for a thread: 1 MiB of float32; with less, threads wait for each other


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What numbers a block of weights can become: ``scale * (code - zero)``."""

    block_weights: int  # of a row; they share a scale
    bottom: int  # the smallest code
    top: int  # the largest
    zero: int | None  # the zero point of every block; None: each block has its own
    scales: Precision = "float32"
    has_negative_scales: bool = True  # so that the largest weight can take the longer side

    @property
    def reach(self) -> int:
        """What the largest weight of a block becomes, less the one zero point.

        The longer side, where a scale may turn it to the other; else what both sides have.
        """
        assert self.zero is not None  # noqa: S101 - asked of symmetric grids only
        up, down = self.top - self.zero, self.bottom - self.zero
        if not self.has_negative_scales:
            return min(up, -down)
        return up if up >= -down else down


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What stands for blocks of weights.

    Codes have the shape ``(rows, blocks, weights of a block)``, scales and zero points
    ``(rows, blocks)``. Scales are float32, rounded to what the grid can hold.
    """

    codes: "Codes"
    scales: "Rows"
    zeros: "Codes"

    def values(self) -> "Rows":
        """Return the weights that the codes stand for: float32, shape ``(rows, columns)``."""
        import numpy as np

        centred = self.codes.astype(np.float32) - self.zeros.astype(np.float32)[..., None]
        values: Rows = centred * self.scales[..., None]
        return values.reshape(len(values), -1)


def nearest(values: "Rows", grid: Grid) -> Fitted:
    """Round to the nearest code of a range as wide as a block's weights; for fine grids.

    The arguments and errors are those of `fit`.
    """
    return _by_parts(lambda blocks: _nearest_part(blocks, grid), values, grid)


def fit(values: "Rows", importance: "Rows | None", grid: Grid) -> Fitted:
    """Return codes, scales and zero points whose squared error is small, on all processors.

    Args:
        values: float32, shape ``(rows, columns)``; the columns fill blocks.
        importance: How much a squared error counts, by column; None counts all alike.
        grid: What a block can become.

    Raises:
        UsageError: If a weight is too large for the scales.
    """
    weights = None if importance is None else damped(importance, share=DAMPING)
    return fit_weighted(values, weights, grid)


def fit_weighted(values: "Rows", weights: "Rows | None", grid: Grid) -> Fitted:
    """Do as `fit`, with weights that are taken as they are: none may be negative."""
    by_block = None if weights is None else weights.reshape(-1, grid.block_weights)
    return _by_parts(lambda blocks: _fit_part(blocks, by_block, grid), values, grid)


def _by_parts(fit_part: "Callable[[Blocks], Fitted]", values: "Rows", grid: Grid) -> Fitted:
    _refuse_large(values, grid)
    step = -(-len(values) // max(1, round(values.size / _PART_WEIGHTS)))
    parts = [values[first : first + step] for first in range(0, len(values), step)]
    return _joined([*_pool().map(lambda part: fit_part(_blocks(part, grid)), parts)])


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor()


# Largest scales; where they have the range of float32, squares of codes must keep room above.
_MAX_SCALES: Mapping[Precision, float] = {"float32": 1e30, "bfloat16": 1e30, "float16": 65504}


def _refuse_large(values: "Rows", grid: Grid) -> None:
    largest = max(float(values.max(initial=0)), -float(values.min(initial=0)))
    if not largest <= _MAX_SCALES[grid.scales] * (grid.top - grid.bottom) / 2:
        raise UsageError(
            f"a weight is {largest:g}, too large for scales in {grid.scales}",
            hint="choose a --quant that keeps the weights in float32",
        )


def _blocks(values: "Rows", grid: Grid) -> "Blocks":
    """Return the blocks of some rows, the rows last."""
    import numpy as np

    columns = np.ascontiguousarray(values.T)
    return columns.reshape(-1, grid.block_weights, len(values))


def _joined(parts: list[Fitted]) -> Fitted:
    import numpy as np

    return Fitted(
        codes=np.concatenate([part.codes for part in parts]),
        scales=np.concatenate([part.scales for part in parts]),
        zeros=np.concatenate([part.zeros for part in parts]),
    )


def _nearest_part(blocks: "Blocks", grid: Grid) -> Fitted:
    scales, zero_points = next(_starts(blocks, grid))
    return _fitted(blocks, _rounded(scales, grid), zero_points[0], grid)


def _fit_part(blocks: "Blocks", weights: "Rows | None", grid: Grid) -> Fitted:
    search = _Search(blocks, weights, grid)
    for scales, zero_points in _starts(blocks, grid):
        search.try_out(scales, zero_points)
    search.try_out(search.scales, [search.zeros])  # a better scale may round otherwise
    return _fitted(blocks, search.scales, search.zeros, grid)


def _starts(blocks: "Blocks", grid: Grid) -> "Iterator[tuple[Rows, list[Rows]]]":
    """Yield scales, and zero points to go with them, for shares of the range of each block.

    The whole range and its own zero points come first.
    """
    import numpy as np

    low, high = np.minimum(blocks.min(1), 0), np.maximum(blocks.max(1), 0)
    if grid.zero is not None:
        extremes = _extremes(low, high, grid)
        zeros = np.full_like(extremes, grid.zero)
        yield from ((extremes * np.float32(share / grid.reach), [zeros]) for share in RANGES)
        return
    for share in RANGES:
        scales = (high - low) * np.float32(share / (grid.top - grid.bottom))
        zeros = grid.bottom + np.rint(-low * np.float32(share) * inverse(scales))
        yield scales, [np.clip(zeros + shift, grid.bottom, grid.top) for shift in SHIFTS]


def _extremes(low: "Rows", high: "Rows", grid: Grid) -> "Rows":
    """Return the largest weight of each block, as a scale may have its sign."""
    import numpy as np

    down_is_longer = -low > high
    found: Rows = np.where(down_is_longer, low, high)
    return found if grid.has_negative_scales else np.abs(found)


class _Search:
    """Keeps, block by block, the best of all that is tried.

    With codes less their zero point c and importance w, a scale s for x takes
    s (2 sum(w x c) - s sum(w c c)) off the squared error, most for sum(w x c) / sum(w c c).
    """

    def __init__(self, blocks: "Blocks", weights: "Rows | None", grid: Grid) -> None:
        import numpy as np

        self._blocks, self._weights, self._grid = blocks, weights, grid
        self._weighted = blocks if weights is None else blocks * weights[..., None]
        self._steps, self._centred = np.empty_like(blocks), np.empty_like(blocks)
        self._gains = np.full_like(blocks[:, 0], -np.inf)
        self.scales = np.zeros_like(self._gains)
        self.zeros = np.zeros_like(self._gains)

    def try_out(self, scales: "Rows", zero_points: "Iterable[Rows]") -> None:
        _round_to_steps(self._blocks, scales, out=self._steps)
        for zeros in zero_points:
            _centre(self._steps, zeros, self._grid, out=self._centred)
            self._judge(zeros)

    def _judge(self, zeros: "Rows") -> None:
        import numpy as np

        # einsum: twice as fast as a product and its sum, as nothing is written in between.
        along = np.einsum("bkr,bkr->br", self._weighted, self._centred)
        across = self._across()
        best_scales = _rounded(along * inverse(across), self._grid)
        gains = best_scales * (2 * along - best_scales * across)
        is_better = gains > self._gains
        np.copyto(self._gains, gains, where=is_better)
        np.copyto(self.scales, best_scales, where=is_better)
        np.copyto(self.zeros, zeros, where=is_better)

    def _across(self) -> "Rows":
        import numpy as np

        found: Rows
        if self._weights is None:
            found = np.einsum("bkr,bkr->br", self._centred, self._centred)
        else:
            squares = np.square(self._centred, out=self._centred)
            found = np.einsum("bk,bkr->br", self._weights, squares)
        return found


def _round_to_steps(blocks: "Blocks", scales: "Rows", *, out: "Blocks") -> None:
    import numpy as np

    np.multiply(blocks, inverse(scales)[:, None], out=out)
    np.rint(out, out=out)


def _centre(steps: "Blocks", zeros: "Rows", grid: Grid, *, out: "Blocks") -> None:
    """Keep steps within the grid: the nearest codes, less their zero point."""
    import numpy as np

    np.maximum(steps, (grid.bottom - zeros)[:, None], out=out)
    np.minimum(out, (grid.top - zeros)[:, None], out=out)


def _fitted(blocks: "Blocks", scales: "Rows", zeros: "Rows", grid: Grid) -> Fitted:
    import numpy as np

    codes = np.empty_like(blocks)
    _round_to_steps(blocks, scales, out=codes)
    _centre(codes, zeros, grid, out=codes)
    codes += zeros[:, None]
    return Fitted(
        codes=np.moveaxis(whole(codes, grid), -1, 0).copy(),
        scales=scales.T.copy(),
        zeros=whole(zeros, grid).T.copy(),
    )


def whole(codes: "npt.NDArray[np.floating] | npt.NDArray[np.int16]", grid: Grid) -> "Codes":
    """Return codes, whole numbers already, in the type of a grid's codes; the shape is kept."""
    import numpy as np

    return codes.astype(np.int8) if grid.bottom < 0 else codes.astype(np.uint8)


def _rounded(scales: "Rows", grid: Grid) -> "Rows":
    """Return scales as the grid can hold them, in float32."""
    import numpy as np

    match grid.scales:
        case "float32":
            return scales
        case "float16":
            largest = np.float32(_MAX_SCALES["float16"])  # the best for some codes may be above
            return scales.clip(-largest, largest).astype(np.float16).astype(np.float32)
        case "bfloat16":
            return from_bfloat16(bfloat16(scales))
        case _:
            assert_never(grid.scales)


def inverse(scales: "Rows") -> "Rows":
    """Return one divided by each scale, and 0 for blocks of zeros or of subnormal numbers.

    float32, of the shape of ``scales``.
    """
    import numpy as np

    is_regular = np.abs(scales) >= np.finfo(np.float32).tiny
    return np.divide(1, scales, out=np.zeros_like(scales), where=is_regular)
