"""Whose fit is led by the inputs of a calibration, how, and the keys that say so.

Source of the keys: ``llama_model_quantize`` in tools/quantize/quantize.cpp of llama.cpp 0c1e57098.
The choice of storages stays as it is without a calibration, where llama-quantize changes two rules.
"""

from typing import TYPE_CHECKING

from edgekit.formats.gguf import storage
from edgekit.quant.recipe import split_role


if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

    from edgekit.formats.gguf.conversion import Part
    from edgekit.formats.gguf.layout import Value
    from edgekit.model.checkpoint_protocol import Calibration


# Of the mean, added to every column, so that none is free to err. Mean KL of SmolLM2 as Q4_0,
# Q4_K_M and Q2_K on 14 texts: 0, 0.01 and 0.1 lie within 2 % of each other; 1 costs Q4_0 a tenth.
DAMPING = 0.01


def is_led(part: "Part") -> bool:
    """Tell whether inputs can lead the fit of a part: matrices of layers, on coarse grids.

    Not the head, as llama-imatrix does: it has fine grids, and a tied one is read as an embedding.
    """
    layer, _ = split_role(part.roles[-1])
    return layer is not None and part.entry.storage in storage.WEIGHTED


def text_sha256(calibration: "Calibration | None", found: "Sequence[Part]") -> str | None:
    """Return what text leads the fit; None where nothing is led."""
    return calibration.text_sha256 if calibration and any(map(is_led, found)) else None


def keys(calibration: "Calibration | None", found: "Sequence[Part]") -> "dict[str, Value]":
    """Return the keys that llama-quantize leaves of an importance matrix; their size is fixed."""
    sha256 = text_sha256(calibration, found)
    if sha256 is None:
        return {}
    return {
        "quantize.imatrix.file": ("string", "edgekit"),  # llama.cpp's is a path of the maker's
        "quantize.imatrix.dataset": ("string", f"sha256:{sha256}"),
        "quantize.imatrix.entries_count": ("uint32", sum(map(is_led, found))),
    }


def weights(
    calibration: "Calibration | None", found: "Sequence[Part]"
) -> "dict[str, npt.NDArray[np.float32]]":
    """Return how much an error counts, by tensor, column by column."""
    if calibration is None:
        return {}
    return {
        part.entry.name: _damped(calibration.of(part.roles[-1])) for part in found if is_led(part)
    }


def _damped(squares: "npt.NDArray[np.float32]") -> "npt.NDArray[np.float32]":
    import numpy as np

    mean = squares.mean(dtype=np.float64)
    if mean == 0:  # nothing ever passed here
        return np.ones_like(squares)
    damped: npt.NDArray[np.float32] = (squares / mean + DAMPING).astype(np.float32)
    return damped
