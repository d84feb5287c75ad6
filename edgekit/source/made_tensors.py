"""Tensors made from others, a base and an adapter mostly, computed when they are read.

Every class satisfies `edgekit.model.checkpoint_protocol.Tensor`. The arithmetic is float32,
whatever the files hold; whoever stores the result rounds it, once.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from edgekit.errors import UsageError
from edgekit.model.checkpoint_protocol import Tensor, row_chunks
from edgekit.model.shapes import Shape
from edgekit.model.spec import Pairs


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Values = npt.NDArray[np.float32]


def stored_dtype(tensor: Tensor) -> str:
    """Return the type a tensor has on disk: F32, F16 or BF16; F32 where it cannot say."""
    return str(getattr(tensor, "dtype", "F32"))


@dataclass(frozen=True, kw_only=True)
class MergedTensor(ABC):
    """A change to a tensor; if nothing else is said the result has the shape of its base."""

    base: Tensor

    @property
    def shape(self) -> Shape:
        """Its dimensions, slowest first."""
        return self.base.shape

    @property
    def size_bytes(self) -> int:
        """How much of the checkpoint it takes: as much as its base."""
        return self.base.size_bytes

    @property
    def dtype(self) -> str:
        """The type its base is stored in."""
        return stored_dtype(self.base)

    def read(self, first_row: int = 0, rows: int | None = None) -> "Values":
        """Return some rows, or all, in float32.

        Numbers that overflow become infinite without a warning: whoever reads refuses those.
        """
        import numpy as np

        rows = self.shape[0] - first_row if rows is None else rows
        with np.errstate(all="ignore"):
            return self._merged(first_row, rows)

    @abstractmethod
    def _merged(self, first_row: int, rows: int) -> "Values": ...


@dataclass(frozen=True, kw_only=True)
class Narrowed(MergedTensor):
    """``base``, which is stored in float64, as float32."""

    @property
    def size_bytes(self) -> int:
        """Half of what it takes in the file."""
        return self.base.size_bytes // 2

    @property
    def dtype(self) -> str:
        """What it is from now on."""
        return "F32"

    def _merged(self, first_row: int, rows: int) -> "Values":
        return self.base.read(first_row, rows)


def narrow(tensor: Tensor) -> Tensor:
    """Return a tensor as it is read: float64, which no format has, as float32."""
    return Narrowed(base=tensor) if stored_dtype(tensor) == "F64" else tensor


@dataclass(frozen=True, kw_only=True)
class PairOrder(MergedTensor):
    """``base`` with the channels of each head in another order.

    Some models rotate neighbouring channels together, others the two halves of a head. Which of
    the two makes no difference but to where a channel stands.
    """

    pairs: Pairs
    to: Literal["halves", "neighbours"]

    def _merged(self, first_row: int, rows: int) -> "Values":
        import numpy as np

        whole = self.pairs.head_dim if self.pairs.axis == 0 else 1  # rows that change places
        start, end = first_row // whole * whole, first_row + rows
        values = self.base.read(start, -(-end // whole) * whole - start)
        channels = np.moveaxis(values, self.pairs.axis, -1)
        by_head = channels.reshape(*channels.shape[:-1], -1, self.pairs.head_dim)[..., self._order]
        ordered = np.moveaxis(by_head.reshape(channels.shape), -1, self.pairs.axis)
        return np.ascontiguousarray(ordered[first_row - start : end - start])

    @cached_property
    def _order(self) -> "npt.NDArray[np.intp]":
        """Where each channel of a head stands in the base."""
        import numpy as np

        return np.array(self.pairs.order(self.to))


@dataclass(frozen=True, kw_only=True)
class Taps(MergedTensor):
    """The taps of a convolution that sees each channel by itself, without the axis that says so."""

    base: Tensor  # (channels, 1, taps)

    @property
    def shape(self) -> Shape:
        """Channels and taps."""
        return self.base.shape[0], self.base.shape[2]

    def _merged(self, first_row: int, rows: int) -> "Values":
        return self.base.read(first_row, rows)[:, 0]


@dataclass(frozen=True)
class Transposed:
    """A small matrix whose file has columns as rows."""

    other: Tensor

    @property
    def shape(self) -> Shape:
        """Its dimensions, slowest first."""
        return self.other.shape[::-1]

    @property
    def size_bytes(self) -> int:
        """How much of the file it takes."""
        return self.other.size_bytes

    @property
    def dtype(self) -> str:
        """The type it is stored in."""
        return stored_dtype(self.other)

    def read(self, first_row: int = 0, rows: int | None = None) -> "Values":
        """Return some rows, or all, in float32."""
        last_row = None if rows is None else first_row + rows
        return self.other.read().T[first_row:last_row]


@dataclass(frozen=True, kw_only=True)
class LowRankUpdate(MergedTensor):
    """``base + scale * up @ down`` (LoRA on a linear layer)."""

    down: Tensor  # lora_A: (rank, columns)
    up: Tensor  # lora_B: (rows, rank)
    scale: float

    def _merged(self, first_row: int, rows: int) -> "Values":
        values: Values = self.up.read(first_row, rows) @ self.down.read()
        values *= self.scale
        values += self.base.read(first_row, rows)
        return values


@dataclass(frozen=True, kw_only=True)
class EmbeddingUpdate(MergedTensor):
    """``base + scale * (up @ down).T`` (LoRA on an embedding)."""

    down: Tensor  # lora_embedding_A: (rank, rows)
    up: Tensor  # lora_embedding_B: (columns, rank)
    scale: float

    def _merged(self, first_row: int, rows: int) -> "Values":
        down = self.down.read()[:, first_row : first_row + rows]
        values: Values = down.T @ self.up.read().T
        values *= self.scale
        values += self.base.read(first_row, rows)
        return values


@dataclass(frozen=True, kw_only=True)
class RowMagnitudes(MergedTensor):
    """``base`` with every row scaled to a length of its own (DoRA on a linear layer)."""

    magnitudes: Tensor  # (rows,)

    def _merged(self, first_row: int, rows: int) -> "Values":
        import numpy as np

        values = self.base.read(first_row, rows)
        squares = np.einsum("ij,ij->i", values, values, dtype=np.float64)
        scales = self.magnitudes.read(first_row, rows) / np.sqrt(squares)
        scaled: Values = values * scales.astype(np.float32)[:, None]
        return scaled


@dataclass(frozen=True, kw_only=True)
class ColumnMagnitudes(MergedTensor):
    """``base`` with every column scaled to a length of its own (DoRA on an embedding)."""

    magnitudes: Tensor  # (columns,)

    @cached_property
    def _scales(self) -> "Values":
        import numpy as np

        squares = np.zeros(self.shape[1], dtype=np.float64)
        for first_row, rows in row_chunks(self.base.shape):
            values = self.base.read(first_row, rows)
            squares += np.einsum("ij,ij->j", values, values, dtype=np.float64)
        return (self.magnitudes.read() / np.sqrt(squares)).astype(np.float32)

    def _merged(self, first_row: int, rows: int) -> "Values":
        return self.base.read(first_row, rows) * self._scales


@dataclass(frozen=True, kw_only=True)
class WithoutStart(MergedTensor, ABC):
    """``base`` without the product that PEFT starts training with, which it takes off the base."""

    rank: int

    @cached_property
    def _factors(self) -> "tuple[Values, Values]":
        """The left factor, orthonormal, and the right one: (rows, rank) and (rank, columns)."""
        import numpy as np

        whole = self.base.read().astype(np.float64)
        left = self._left(whole)
        return left.astype(np.float32), (left.T @ whole).astype(np.float32)

    @abstractmethod
    def _left(self, whole: "npt.NDArray[np.float64]") -> "npt.NDArray[np.float64]": ...

    def _merged(self, first_row: int, rows: int) -> "Values":
        left, right = self._factors
        return self.base.read(first_row, rows) - left[first_row : first_row + rows] @ right


@dataclass(frozen=True, kw_only=True)
class WithoutPrincipal(WithoutStart):
    """``base`` without its largest singular values (PiSSA).

    Source: ``pissa_init`` in tuners/lora/layer.py of peft 0.21, where the scale cancels out.
    """

    def _left(self, whole: "npt.NDArray[np.float64]") -> "npt.NDArray[np.float64]":
        import numpy as np

        rows, columns = whole.shape
        if rows <= columns:
            return np.linalg.eigh(whole @ whole.T)[1][:, -self.rank :]
        right = np.linalg.eigh(whole.T @ whole)[1][:, -self.rank :]
        return np.linalg.qr(whole @ right)[0]


@dataclass(frozen=True, kw_only=True)
class WithoutFirstColumns(WithoutStart):
    """``base`` without ``scale`` times what its first columns span (OLoRA).

    Source: ``olora_init`` in tuners/lora/layer.py of peft 0.21: the first columns of Q and rows of
    R of a QR decomposition.
    """

    scale: float

    def _left(self, whole: "npt.NDArray[np.float64]") -> "npt.NDArray[np.float64]":
        import numpy as np

        return np.linalg.qr(whole[:, : self.rank])[0]

    def _merged(self, first_row: int, rows: int) -> "Values":
        left, right = self._factors
        taken = self.scale * (left[first_row : first_row + rows] @ right)
        return self.base.read(first_row, rows) - taken


@dataclass(frozen=True, kw_only=True)
class ReplacedRows(MergedTensor):
    """``base`` with some rows taken from elsewhere (trained tokens)."""

    replaced: tuple[int, ...]
    values: Tensor  # one row for each of ``replaced``

    def _merged(self, first_row: int, rows: int) -> "Values":
        result = self.base.read(first_row, rows).copy()
        values = self.values.read()
        for index, row in enumerate(self.replaced):
            if 0 <= row - first_row < result.shape[0]:
                result[row - first_row] = values[index]
        return result


@dataclass(frozen=True, kw_only=True)
class Sum(MergedTensor):
    """``base + scale * addend``."""

    addend: Tensor
    scale: float

    def _merged(self, first_row: int, rows: int) -> "Values":
        values = self.addend.read(first_row, rows) * self.scale
        values += self.base.read(first_row, rows)
        return values


@dataclass(frozen=True, kw_only=True)
class Twin(MergedTensor):
    """A tensor that is stored twice; reading it refuses two that differ."""

    other: Tensor
    complaint: str

    def _merged(self, first_row: int, rows: int) -> "Values":
        import numpy as np

        values = self.base.read(first_row, rows)
        if not np.array_equal(values, self.other.read(first_row, rows), equal_nan=True):
            raise UsageError(self.complaint)
        return values


@dataclass(frozen=True, kw_only=True)
class Zeros:
    """A tensor the decoder asks for and no file holds."""

    shape: Shape
    dtype: str

    @property
    def size_bytes(self) -> int:
        """Nothing: it comes from no file."""
        return 0

    def read(self, first_row: int = 0, rows: int | None = None) -> "Values":
        """Return some rows, or all, in float32."""
        import numpy as np

        rows = self.shape[0] - first_row if rows is None else rows
        return np.zeros((rows, *self.shape[1:]), dtype=np.float32)


@dataclass(frozen=True)
class Number:
    """One number, as a tensor without dimensions; reading gives one row."""

    value: float

    @property
    def shape(self) -> Shape:
        """None."""
        return ()

    @property
    def size_bytes(self) -> int:
        """Nothing: it comes from no file."""
        return 0

    def read(self, first_row: int = 0, rows: int | None = None) -> "Values":
        """Return it in float32, shape ``(1,)``."""
        import numpy as np

        return np.full(1, self.value, dtype=np.float32)[first_row:rows]
