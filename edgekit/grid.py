"""Weights on a grid: codes for blocks of a row, a scale for each, perhaps a zero point.

A format says what its grid is and packs what comes back; how weights find their codes is decided
here, once for all formats. Rounding to nearest takes the scale from the largest weight of a block,
which is seldom the best for the others. So some narrower ranges are tried, each with the scale that
is best for its codes.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias, assert_never

from edgekit.errors import UsageError


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Rows: TypeAlias = npt.NDArray[np.float32]
    Codes: TypeAlias = npt.NDArray[np.uint8] | npt.NDArray[np.int8]


Precision = Literal["float32", "float16", "bfloat16"]

# Of the whole range. Finer or further steps gain 2 % of the error at three times the time.
RANGES = (1.0, 0.92, 0.84, 0.76)
SHIFTS = (0, -1, 1)  # of the zero point
DAMPING = 0.1  # of the mean, added to every column, so that no column is free to err
_CHUNK_WEIGHTS = 2**17  # what a thread holds of each array: 512 KiB, a share of the cache


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
        """Return the weights that the codes stand for, as rows."""
        import numpy as np

        centred = self.codes.astype(np.float32) - self.zeros.astype(np.float32)[..., None]
        values: Rows = centred * self.scales[..., None]
        return values.reshape(len(values), -1)


def nearest(values: "Rows", grid: Grid) -> Fitted:
    """Round to the nearest code of a range as wide as a block's weights; for fine grids.

    The arguments and errors are those of `fit`.
    """
    _refuse_large(values, grid)
    blocks = _blocks(values, grid)
    scales, zeros = next(_starts(blocks, grid))
    return _fitted(blocks, _rounded(scales, grid), zeros, grid)


def fit(values: "Rows", importance: "Rows | None", grid: Grid) -> Fitted:
    """Return codes, scales and zero points whose squared error is small, on all processors.

    Args:
        values: float32, shape ``(rows, columns)``; the columns fill blocks.
        importance: How much a squared error counts, by column; None counts all alike.
        grid: What a block can become.

    Raises:
        UsageError: If a weight is too large for the scales.
    """
    _refuse_large(values, grid)
    blocks = _blocks(values, grid)
    weights = _weights(blocks, importance)
    step = max(1, _CHUNK_WEIGHTS // values.shape[1])
    parts = [blocks[first : first + step] for first in range(0, len(blocks), step)]
    with ThreadPoolExecutor() as pool:
        return _joined(list(pool.map(lambda part: _fit_part(part, weights, grid), parts)))


# Largest scales; where they have the range of float32, squares of codes shall keep room above.
_MAX_SCALES: Mapping[Precision, float] = {"float32": 1e30, "bfloat16": 1e30, "float16": 65504}


def _refuse_large(values: "Rows", grid: Grid) -> None:
    import numpy as np

    largest = float(np.abs(values).max(initial=0))
    if not largest <= _MAX_SCALES[grid.scales] * (grid.top - grid.bottom) / 2:
        raise UsageError(
            f"a weight is {largest:g}, too large for scales in {grid.scales}",
            hint="choose a --quant that keeps the weights in float32",
        )


def _blocks(values: "Rows", grid: Grid) -> "Rows":
    return values.reshape(len(values), -1, grid.block_weights)


def _joined(parts: list[Fitted]) -> Fitted:
    import numpy as np

    return Fitted(
        codes=np.concatenate([part.codes for part in parts]),
        scales=np.concatenate([part.scales for part in parts]),
        zeros=np.concatenate([part.zeros for part in parts]),
    )


def _weights(blocks: "Rows", importance: "Rows | None") -> "Rows":
    import numpy as np

    if importance is None or not importance.any():
        return np.ones((1, 1, 1), np.float32)
    mean = float(importance.mean(dtype=np.float64))
    damped = (importance / mean + DAMPING).astype(np.float32)
    return damped.reshape(1, *blocks.shape[1:])


def _fit_part(blocks: "Rows", weights: "Rows", grid: Grid) -> Fitted:
    search = _Search(blocks, weights, grid)
    for scales, zeros in _starts(blocks, grid):
        search.try_out(scales, zeros)
    search.try_out(search.scales, search.zeros)  # a better scale may round otherwise
    return _fitted(blocks, search.scales, search.zeros, grid)


def _starts(blocks: "Rows", grid: Grid) -> Iterator["tuple[Rows, Rows]"]:
    """Yield scales and zero points for shares of the range of each block, the plain one first."""
    import numpy as np

    if grid.zero is not None:
        extremes = _extremes(blocks, grid)
        zeros = np.full_like(extremes, grid.zero)
        yield from ((extremes * np.float32(share / grid.reach), zeros) for share in RANGES)
        return
    low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
    for share in RANGES:
        scales = (high - low) * np.float32(share / (grid.top - grid.bottom))
        zeros = grid.bottom + np.rint(-low * np.float32(share) * inverse(scales))
        for shift in SHIFTS:
            yield scales, np.clip(zeros + shift, grid.bottom, grid.top)


def _extremes(blocks: "Rows", grid: Grid) -> "Rows":
    """Return the largest weight of each block, as a scale may have its sign."""
    import numpy as np

    at = np.abs(blocks).argmax(-1, keepdims=True)
    found: Rows = np.take_along_axis(blocks, at, -1)[..., 0]
    return found if grid.has_negative_scales else np.abs(found)


class _Search:
    """Keeps, block by block, the best of all that is tried.

    With codes less their zero point c and importance w, a scale s for x takes
    s (2 sum(w x c) - s sum(w c c)) off the squared error, most for sum(w x c) / sum(w c c).
    """

    def __init__(self, blocks: "Rows", weights: "Rows", grid: Grid) -> None:
        import numpy as np

        self._blocks, self._weights, self._grid = blocks, weights, grid
        self._weighted = blocks * weights
        self._gains = np.full(blocks.shape[:-1], -np.inf, np.float32)
        self.scales = np.zeros(blocks.shape[:-1], np.float32)
        self.zeros = np.zeros_like(self.scales)

    def try_out(self, scales: "Rows", zeros: "Rows") -> None:
        import numpy as np

        centred = _centred(self._blocks, scales, zeros, self._grid)
        # einsum: twice as fast as a product and its sum, as nothing is written in between.
        along = np.einsum("rbk,rbk->rb", self._weighted, centred)
        weights = np.broadcast_to(self._weights, centred.shape)
        across = np.einsum("rbk,rbk->rb", weights, np.square(centred, out=centred))
        best_scales = _rounded(along * inverse(across), self._grid)
        gains = best_scales * (2 * along - best_scales * across)
        is_better = gains > self._gains
        np.copyto(self._gains, gains, where=is_better)
        np.copyto(self.scales, best_scales, where=is_better)
        np.copyto(self.zeros, zeros, where=is_better)


def _centred(blocks: "Rows", scales: "Rows", zeros: "Rows", grid: Grid) -> "Rows":
    """Return the nearest codes, less their zero point."""
    import numpy as np

    codes = blocks * inverse(scales)[..., None]
    np.rint(codes, out=codes)
    zeros = zeros[..., None]
    np.maximum(codes, grid.bottom - zeros, out=codes)
    np.minimum(codes, grid.top - zeros, out=codes)
    return codes


def _fitted(blocks: "Rows", scales: "Rows", zeros: "Rows", grid: Grid) -> Fitted:
    import numpy as np

    codes = _centred(blocks, scales, zeros, grid) + zeros[..., None]
    whole: tuple[Codes, Codes] = (codes.astype(np.uint8), zeros.astype(np.uint8))
    if grid.bottom < 0:
        whole = (codes.astype(np.int8), zeros.astype(np.int8))
    return Fitted(codes=whole[0], scales=scales, zeros=whole[1])


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
            return to_bfloat16(scales)
        case _:
            assert_never(grid.scales)


FLOAT16_OVERFLOW = 65520  # from here on float16 rounds to infinity


def to_float16(values: "Rows", *, hint: str) -> "npt.NDArray[np.float16]":
    """Round to the nearest float16.

    Raises:
        UsageError: If that would be infinity; ``hint`` is the way out.
    """
    import numpy as np

    largest = float(np.abs(values).max(initial=0))
    if largest >= FLOAT16_OVERFLOW:
        raise UsageError(f"a weight is {largest:g}, too large for F16", hint=hint)
    return values.astype("<f2")


def packed_pairs(codes: "Codes") -> "npt.NDArray[np.uint8]":
    """Put two codes of four bits into a byte, the first into its lower half."""
    import numpy as np

    packed: npt.NDArray[np.uint8] = np.bitwise_or(
        codes[..., 0::2], np.left_shift(codes[..., 1::2], 4)
    )
    return packed


def to_bfloat16(values: "Rows") -> "Rows":
    """Round to the nearest bfloat16, ties to even, kept in float32; the lower 16 bits are 0."""
    import numpy as np

    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    found: Rows = ((bits + np.uint32(0x7FFF) + even) & np.uint32(0xFFFF_0000)).view(np.float32)
    return found


def inverse(scales: "Rows") -> "Rows":
    """Return one divided by each scale, and 0 for blocks of zeros or of subnormal numbers."""
    import numpy as np

    is_regular = np.abs(scales) >= np.finfo(np.float32).tiny
    return np.divide(1, scales, out=np.zeros_like(scales), where=is_regular)
