"""The weight of a plan: how it is stored, and whether a calibration weights its rounding."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekit.model.shapes import Shape
from edgekit.quant.recipe import split_role


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgekit.model.checkpoint_protocol import Calibration

    Columns = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class PlannedWeight:
    """One weight in an artifact: how it is stored, and how the recipe wanted it."""

    role: str
    shape: Shape
    wanted: str  # the tensor type that the recipe asks for
    tensor_type: str  # the one it gets
    size_bytes: int
    is_coarse: bool  # whether its grid is coarse enough for a calibration to matter

    @property
    def parameters(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def is_calibrated(self) -> bool:
        """Whether a calibration weights its rounding: matrices of layers, on coarse grids.

        Not the head, as in llama-imatrix: a tied one is read as an embedding, too.
        """
        return self.is_coarse and split_role(self.role)[0] is not None


def calibration_sha256(
    calibration: "Calibration | None", weights: Iterable[PlannedWeight]
) -> str | None:
    """Return the SHA-256 of the text that weights the rounding; None where it weights nothing."""
    is_used = calibration is not None and any(weight.is_calibrated for weight in weights)
    return calibration.text_sha256 if calibration is not None and is_used else None


def importance_of(calibration: "Calibration | None", weight: PlannedWeight) -> "Columns | None":
    """Return how much an error counts in each column: float32, shape ``(columns,)``.

    None where all count alike.
    """
    is_used = calibration is not None and weight.is_calibrated
    return calibration.of(weight.role) if calibration is not None and is_used else None


def damped(importance: "npt.NDArray[np.floating]", *, share: float) -> "Columns | None":
    """Return importance over its mean, plus a share of that, so that no column is free to err.

    Args:
        importance: The mean of the squared inputs, shape ``(columns,)``; its precision is that of
            the division.
        share: Of the mean, that is added.

    Returns:
        float32 of the same shape; None if nothing ever passed here: all columns count alike.
    """
    import numpy as np

    mean = float(importance.mean(dtype=np.float64))
    if mean == 0:
        return None
    return (importance / mean + share).astype(np.float32, copy=False)
