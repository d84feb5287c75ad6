"""Error feedback: one matrix, column by column, each error moved to the columns that follow.

A matrix W is multiplied with inputs x, so rounding it to Q costs the trace of (W - Q) H (W - Q)^T,
where H is the second moment of the inputs. When one column is rounded, the best that the others can
do about its error is linear in it, and read off a Cholesky factor of the inverse of H. The scales
of a block are chosen for the weights as they are when its turn comes.
Source: Frantar and others, "GPTQ", arXiv 2210.17323; the order of blocks is edgekit's.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from edgekit.quant.lattice import BlockScales, Lattice, round_column


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Rows: TypeAlias = npt.NDArray[np.float32]
    Columns: TypeAlias = npt.NDArray[np.float32]
    Codes: TypeAlias = npt.NDArray[np.uint8]
    Stored: TypeAlias = npt.NDArray[np.generic]


# Of the mean square of an input, added to each: no column is free to err.
DAMPING = 0.1
_PART_ROWS = 512  # of a thread; fixed, so that no result depends on the number of processors
_LAZY_COLUMNS = 32  # the errors of so many columns reach what follows at once


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """How the errors of columns are made up for, for all matrices that read the same inputs.

    In ``order``, an error of column j over ``factor[j, j]``, times ``factor[j, k]``, is taken off
    each later column k.
    """

    order: "npt.NDArray[np.intp]"  # columns as they are rounded, block by block
    factor: "Rows"  # upper triangle, float32 (columns, columns)
    importance: "Columns"  # in the order of the matrix

    @classmethod
    def of(cls, moment: "npt.NDArray[np.float64]", *, block_weights: int) -> "Feedback":
        """Factorize a second moment: the sum of x x^T, float64 ``(columns, columns)``."""
        import numpy as np

        squares = np.diagonal(moment)
        mean = float(squares.mean()) or 1.0  # where nothing ever passed, all columns count alike
        damped = moment / mean
        damped[np.diag_indices_from(damped)] += DAMPING
        importance = np.diagonal(damped).astype(np.float32)
        order = _order(importance, block_weights)
        return cls(order=order, factor=_factor(damped, order), importance=importance)


def _factor(moment: "npt.NDArray[np.float64]", order: "npt.NDArray[np.intp]") -> "Rows":
    """Return the upper Cholesky factor of the inverse, in this order of columns."""
    import numpy as np
    import torch

    lower, failed = torch.linalg.cholesky_ex(torch.from_numpy(moment[np.ix_(order, order)]))
    while failed:  # rounding made it indefinite
        moment[np.diag_indices_from(moment)] += DAMPING
        lower, failed = torch.linalg.cholesky_ex(torch.from_numpy(moment[np.ix_(order, order)]))
    inverse = torch.cholesky_inverse(lower)
    found: Rows = torch.linalg.cholesky(inverse, upper=True).float().numpy()
    return found


def _order(importance: "Columns", block_weights: int) -> "npt.NDArray[np.intp]":
    """Return columns so that what counts most comes first, as far as blocks stay together."""
    import numpy as np

    columns = len(importance)
    starts = np.arange(0, columns, block_weights)
    sums = [importance[start : start + block_weights].sum() for start in starts]
    found = []
    for start in starts[np.argsort(-np.array(sums), kind="stable")]:
        inside = importance[start : start + block_weights]
        found.append(start + np.argsort(-inside, kind="stable"))
    return np.concatenate(found)


@dataclass(frozen=True, kw_only=True)
class Solved:
    """A matrix on a lattice."""

    stored: "list[Stored]"  # as the format keeps it, rows first
    values: "Rows"  # what that stands for, float32 (rows, columns)


def solve(values: "Rows", feedback: Feedback, lattice: Lattice) -> Solved:
    """Round a matrix, float32 ``(rows, columns)``.

    Raises:
        UsageError: If a weight is too large for the scales of the lattice.
    """
    import numpy as np

    parts = [values[first : first + _PART_ROWS] for first in range(0, len(values), _PART_ROWS)]
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda part: _solve_rows(part, feedback, lattice), parts))
    return Solved(
        stored=[
            np.concatenate(same) for same in zip(*(part.stored for part in found), strict=True)
        ],
        values=np.concatenate([part.values for part in found]),
    )


def _solve_rows(values: "Rows", feedback: Feedback, lattice: Lattice) -> Solved:
    import numpy as np

    rows = _Rows(values, feedback, lattice)
    for first, last, start in _runs(feedback.order, lattice):
        if start not in rows.blocks:
            rows.choose(first, start)
        rows.round_run(slice(first, last), rows.blocks[start])
    blocks = [rows.blocks[start] for start in sorted(rows.blocks)]
    return Solved(
        stored=lattice.pack(np.ascontiguousarray(rows.codes.T), blocks),
        values=np.ascontiguousarray(rows.rounded.T),
    )


def _runs(order: "npt.NDArray[np.intp]", lattice: Lattice) -> Iterator[tuple[int, int, int]]:
    """Yield places that are rounded together: first, last, and where their block begins."""
    first = 0
    while first < len(order):
        start = int(order[first]) // lattice.block_weights * lattice.block_weights
        end = first + min(lattice.block_weights, len(order) - start)
        for at in range(first, end, _LAZY_COLUMNS):
            yield at, min(at + _LAZY_COLUMNS, end), start
        first = end


class _Rows:
    """Some rows on their way onto a lattice; arrays have the columns first."""

    def __init__(self, values: "Rows", feedback: Feedback, lattice: Lattice) -> None:
        import numpy as np

        self._feedback, self._lattice = feedback, lattice
        self._left = np.ascontiguousarray(values.T[feedback.order])  # what is not rounded yet
        self.codes = np.empty(self._left.shape, np.uint8)
        self.rounded = np.empty(self._left.shape, np.float32)
        self.blocks: dict[int, BlockScales] = {}  # by the first column

    def choose(self, first: int, start: int) -> None:
        """Choose the scales of the block of columns from ``start``, in places from ``first``."""
        import numpy as np

        order, width = (
            self._feedback.order,
            min(self._lattice.block_weights, len(self._left) - start),
        )
        block = np.empty((self._left.shape[1], width), np.float32)
        block[:, order[first : first + width] - start] = self._left[first : first + width].T
        importance = self._feedback.importance[start : start + width]
        self.blocks[start] = self._lattice.choose(block, importance)

    def round_run(self, run: slice, block: BlockScales) -> None:
        """Round some columns; their errors reach each other at once, and all others at the end."""
        import numpy as np

        left, factor, levels = self._left, self._feedback.factor, self._lattice.levels
        columns = self._feedback.order[run]
        groups = columns % self._lattice.block_weights // self._lattice.group_weights
        errors = np.empty((len(columns), left.shape[1]), np.float32)
        for at, place in enumerate(range(run.start, run.stop)):
            scales, offsets = block.scales[:, groups[at]], block.offsets[:, groups[at]]
            codes = round_column(left[place], scales, offsets, levels)
            value = levels[codes] * scales + offsets
            self.codes[columns[at]], self.rounded[columns[at]] = codes, value
            errors[at] = (left[place] - value) / factor[place, place]
            later = slice(place + 1, run.stop)
            left[later] -= np.multiply.outer(factor[place, later], errors[at])
        left[run.stop :] -= factor[run, run.stop :].T @ errors
