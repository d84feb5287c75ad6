"""The weight of a plan: how it is stored, and whether a calibration weights its rounding."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekit.model.shapes import Shape
from edgekit.quant.lattice import Lattice
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
    # What a solver can round it to; None: only its format can, as columns change places, say.
    lattice: Lattice | None = None
    roles: tuple[str, ...] = ()  # of several weights that fill it one after another; else `role`

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


def lattices(weights: Iterable[PlannedWeight]) -> dict[str, Lattice]:
    """Return what a solver can round weights of layers to, by role."""
    return {
        role: weight.lattice
        for weight in weights
        if weight.is_calibrated and weight.lattice is not None
        for role in weight.roles or (weight.role,)
    }


def solved_of(
    calibration: "Calibration | None", role: str
) -> "Sequence[npt.NDArray[np.generic]] | None":
    """Return what is stored of a weight that is solved already; None: it is not.

    The arrays of its format's own encoding, shapes ``(rows, …)``.
    """
    return None if calibration is None else calibration.solved.get(role)


def calibration_sha256(
    calibration: "Calibration | None", weights: Iterable[PlannedWeight]
) -> str | None:
    """Return the SHA-256 of the text that weights the rounding; None where it weights nothing."""
    is_used = calibration is not None and any(weight.is_calibrated for weight in weights)
    return calibration.text_sha256 if calibration is not None and is_used else None


def importance_of(calibration: "Calibration | None", weight: PlannedWeight) -> "Columns | None":
    """Return how much an error counts in each column: float32, shape ``(columns,)``.

    None where all count alike, or where its codes are known.
    """
    if calibration is None or not weight.is_calibrated:
        return None
    return None if weight.role in calibration.solved else calibration.of(weight.role)
