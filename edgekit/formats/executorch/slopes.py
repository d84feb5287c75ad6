"""The two slopes of xIELU: learned before their softplus, multiplied with after it.

No GPU should take a softplus of a number that never changes for every token of every layer. So
programs hold what comes of it, and reading them back undoes it.
"""

from typing import TYPE_CHECKING

from edgekit.model.spec import XIELU_BETA


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Values = npt.NDArray[np.float32]


def to_slopes(role: str, values: "Values") -> "Values":
    """Return what a program holds of a weight, float32 of the same shape; others as they are."""
    import numpy as np

    offset = _offset(role)
    if offset is None:
        return values
    made: Values = (np.logaddexp(0, values.astype(np.float64)) + offset).astype(np.float32)
    return made


def from_slopes(role: str, values: "Values") -> "Values":
    """Return what was learned, float32 of the same shape, as far as that tells."""
    import numpy as np

    offset = _offset(role)
    if offset is None:
        return values
    # No softplus is zero, but a float32 may be.
    soft = np.maximum(values.astype(np.float64) - offset, np.finfo(np.float32).tiny)
    made: Values = (soft + np.log(-np.expm1(-soft))).astype(np.float32)
    return made


def _offset(role: str) -> float | None:
    """Return what is added to the softplus of a weight, None if it is no slope."""
    part = role.rpartition(".")[2]
    return {"xielu_positive": 0.0, "xielu_negative": XIELU_BETA}.get(part)
