"""Rounding to the short floating-point types, and codes put together: once for all formats."""

from typing import TYPE_CHECKING

from edgekit.errors import UsageError


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]
    Halves = npt.NDArray[np.uint16]  # bfloat16, which numpy has no type for


FLOAT16_OVERFLOW = 65520  # from here on float16 rounds to infinity


def bfloat16(values: "Floats", *, out: "Halves | None" = None) -> "Halves":
    """Round finite numbers to the nearest bfloat16, ties to even.

    Args:
        values: float32 of any shape.
        out: Where the result goes, of the same shape; None makes a new array.

    Returns:
        uint16 of the same shape: the upper halves of the rounded float32.
    """
    import numpy as np

    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)  # what a tie needs to become even
    rounded += bits
    rounded += np.uint32(0x7FFF)
    rounded >>= np.uint32(16)
    if out is None:
        return rounded.astype("<u2")
    out[...] = rounded
    return out


def from_bfloat16(stored: "Halves") -> "Floats":
    """Return bfloat16 numbers as float32 of the same shape: each is the upper half of one."""
    import numpy as np

    wide = stored.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)


def float16(values: "Floats", *, hint: str) -> "npt.NDArray[np.float16]":
    """Round to the nearest float16, of the same shape.

    Raises:
        UsageError: If that would be infinity; ``hint`` is the way out.
    """
    import numpy as np

    largest = float(np.abs(values).max(initial=0))
    if largest >= FLOAT16_OVERFLOW:
        raise UsageError(f"a weight is {largest:g}, too large for F16", hint=hint)
    return values.astype("<f2")


def packed_pairs(codes: "npt.NDArray[np.uint8] | npt.NDArray[np.int8]") -> "npt.NDArray[np.uint8]":
    """Put two codes of four bits into a byte, the first in the lower half: uint8 ``(rows, …)``."""
    import numpy as np

    packed: npt.NDArray[np.uint8] = np.bitwise_or(
        codes[..., 0::2], np.left_shift(codes[..., 1::2], 4)
    )
    return packed
