"""Lattices: what the columns of a block can become once its scales are chosen.

`edgekit.quant.grid` finds codes for all weights of a block at once. A solver that moves the error
of one column to the next must choose the scales of a block first and then round column by column.
What it needs to know of a tensor type for that is a `Lattice`; it knows no format.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from edgekit.quant import grid
from edgekit.quant.grid import Fitted, Grid


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Rows: TypeAlias = npt.NDArray[np.float32]
    Codes: TypeAlias = npt.NDArray[np.uint8]
    Stored: TypeAlias = npt.NDArray[np.generic]


@dataclass(frozen=True, kw_only=True)
class BlockScales:
    """What is chosen of a block: in each row, a group of weights is ``scale * level + offset``."""

    scales: "Rows"  # (rows, groups)
    offsets: "Rows"  # (rows, groups)
    stored: Any  # the same as the tensor type keeps it, for `Lattice.pack`


class Lattice(Protocol):
    """How weights of one tensor type are rounded by a solver, and written."""

    @property
    def block_weights(self) -> int:
        """How many weights of a row have their scales chosen together."""
        ...

    @property
    def group_weights(self) -> int:
        """How many of them share a scale and an offset."""
        ...

    @property
    def levels(self) -> "Rows":
        """What the codes 0, 1, … stand for, ascending: float32, shape ``(codes,)``."""
        ...

    def choose(self, values: "Rows", importance: "Rows") -> BlockScales:
        """Return scales for a block in which the weighted squared error is small.

        Args:
            values: float32, shape ``(rows, block_weights)``; a row's last block may be narrower
                where the tensor type pads rows.
            importance: How much an error counts in each column: shape ``(block_weights,)``.

        Raises:
            UsageError: If a weight is too large for the scales.
        """
        ...

    def pack(self, codes: "Codes", blocks: Sequence[BlockScales]) -> "list[Stored]":
        """Return what an artifact stores of some rows, an array with the rows first for each part.

        Args:
            codes: Places in `levels`: uint8, shape ``(rows, columns)``.
            blocks: Of every block of a row, from left to right.
        """
        ...


def round_column(values: "Rows", scales: "Rows", offsets: "Rows", levels: "Rows") -> "Codes":
    """Return the place of the nearest level for a column: uint8, shape ``(rows,)``.

    Args:
        values: float32, shape ``(rows,)``.
        scales: Of the same shape; where it is 0, only the offset can be had.
        offsets: Of the same shape.
        levels: Ascending, shape ``(codes,)``.
    """
    import numpy as np

    steps = (values - offsets) * grid.inverse(scales)
    if len(levels) - 1 == levels[-1] - levels[0]:  # whole numbers without a gap
        places: Codes = (np.rint(steps).clip(levels[0], levels[-1]) - levels[0]).astype(np.uint8)
        return places
    borders = (levels[1:] + levels[:-1]) / 2
    found: Codes = np.searchsorted(borders, steps).astype(np.uint8)
    return found


@dataclass(frozen=True, kw_only=True)
class GridLattice:
    """The lattice of a `Grid`, written by the format that it belongs to."""

    grid: Grid
    write: Callable[[Fitted, int], "list[Stored]"]  # of rows of so many columns

    @property
    def block_weights(self) -> int:
        """A grid's blocks are its groups."""
        return self.grid.block_weights

    @property
    def group_weights(self) -> int:
        """A grid's blocks are its groups."""
        return self.grid.block_weights

    @cached_property
    def levels(self) -> "Rows":
        """The codes of the grid: float32, shape ``(codes,)``."""
        import numpy as np

        return np.arange(self.grid.bottom, self.grid.top + 1, dtype=np.float32)

    def choose(self, values: "Rows", importance: "Rows") -> BlockScales:
        """Search as `grid.fit`; see `Lattice.choose`."""
        import numpy as np

        missing = self.block_weights - values.shape[1]
        filled, weights = (
            (np.pad(values, ((0, 0), (0, missing))), np.pad(importance, (0, missing)))
            if missing
            else (values, importance)
        )
        found = grid.fit_weighted(filled, weights, self.grid)
        return BlockScales(
            scales=found.scales,
            offsets=-found.scales * found.zeros.astype(np.float32),
            stored=(found.scales, found.zeros),
        )

    def pack(self, codes: "Codes", blocks: Sequence[BlockScales]) -> "list[Stored]":
        """Write codes, scales and zero points; see `Lattice.pack`."""
        import numpy as np

        rows, columns = codes.shape
        missing = len(blocks) * self.block_weights - columns
        whole = np.pad(codes.astype(np.int16) + self.grid.bottom, ((0, 0), (0, missing)))
        return self.write(
            Fitted(
                codes=grid.whole(whole, self.grid).reshape(rows, len(blocks), self.block_weights),
                scales=np.concatenate([block.stored[0] for block in blocks], 1),
                zeros=np.concatenate([block.stored[1] for block in blocks], 1),
            ),
            columns,
        )
