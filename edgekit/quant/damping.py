"""What importance becomes before it weights an error."""

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Columns = npt.NDArray[np.float32]


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
