"""How a calibration weights the rounding of GGUF's tensors, and the keys that say so.

Source of the keys: ``llama_model_quantize`` in tools/quantize/quantize.cpp of llama.cpp 0c1e57098.
The choice of tensor types stays as it is without a calibration; llama-quantize changes two rules.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from edgekit.formats.gguf.value_heads import value_heads
from edgekit.model.spec import DecoderSpec
from edgekit.quant.damping import damped
from edgekit.quant.planned import PlannedWeight, calibration_sha256, importance_of


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgekit.formats.gguf.layout import Value
    from edgekit.formats.gguf.parts import FileTensor
    from edgekit.model.checkpoint_protocol import Calibration


# See `damped`. Mean KL of SmolLM2 as Q4_0, Q4_K_M and Q2_K on 14 texts: 0, 0.01 and 0.1 lie within
# 2 % of each other; 1 costs Q4_0 a tenth.
DAMPING = 0.01


def keys(calibration: "Calibration | None", planned: Sequence[PlannedWeight]) -> "dict[str, Value]":
    """Return the keys that llama-quantize leaves of an importance matrix; their size is fixed."""
    sha256 = calibration_sha256(calibration, planned)
    if sha256 is None:
        return {}
    return {
        "quantize.imatrix.file": ("string", "edgekit"),  # llama.cpp's is a path of the maker's
        "quantize.imatrix.dataset": ("string", f"sha256:{sha256}"),
        "quantize.imatrix.entries_count": (
            "uint32",
            sum(weight.is_calibrated for weight in planned),
        ),
    }


def weights(
    calibration: "Calibration | None", parts: "Sequence[FileTensor]", spec: DecoderSpec
) -> "Iterator[tuple[str, npt.NDArray[np.float32]]]":
    """Yield the name of a tensor and how much an error counts: float32, shape ``(columns,)``."""
    import numpy as np

    for part in parts:
        importance = importance_of(calibration, part)
        if importance is not None:
            weighting = damped(importance.astype(np.float64), share=DAMPING)
            if weighting is None:  # ggml rounds differently without weights than with equal ones
                weighting = np.ones_like(importance)
            heads = value_heads(part.role, spec)
            is_moved = heads is not None and heads.axis == 1  # with the columns it weights
            yield part.name, heads.columns(weighting, "file") if heads and is_moved else weighting
