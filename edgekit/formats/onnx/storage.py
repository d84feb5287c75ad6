"""How weights are stored: the block formats of ``MatMulNBits``, and which weight gets which.

A quantised matrix is two or three tensors: codes, a scale for each 32 weights of a row, and, where
the codes are not symmetric, a zero point beside each scale. Weight = scale * (code - zero point).
Source: docs/ContribOperators.md of ONNX Runtime 1.32, ``MatMulNBits``.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from edgekit.decoder import Shape
from edgekit.errors import BundleError, UsageError
from edgekit.formats.onnx import fit, model
from edgekit.formats.onnx.model import Dtype, External
from edgekit.recipe import Recipe, Rule, Storage


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Rows: TypeAlias = npt.NDArray[np.float32]
    Codes: TypeAlias = npt.NDArray[np.uint8]


BLOCK_WEIGHTS = 32
SCALES, ZERO_POINTS = ".scales", ".zero_points"

STORAGES: Mapping[str, Storage] = {
    storage.name: storage
    for storage in (
        Storage(name="F32", block_weights=1, block_bytes=4),
        Storage(name="F16", block_weights=1, block_bytes=2),
        Storage(name="INT8", block_weights=32, block_bytes=32 + 4),
        # Two blocks, since a byte holds the zero points of both.
        Storage(name="UINT4", block_weights=64, block_bytes=2 * (16 + 4) + 1),
        Storage(name="INT4", block_weights=32, block_bytes=16 + 4),
    )
}


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """How the codes of a quantised storage are read."""

    bits: int
    implied_zero: int | None  # the zero point of all blocks; None: each has its own


BLOCKS: Mapping[str, Blocks] = {
    "INT8": Blocks(bits=8, implied_zero=128),
    "UINT4": Blocks(bits=4, implied_zero=None),
    "INT4": Blocks(bits=4, implied_zero=8),
}

LED = frozenset(
    {"UINT4", "INT4"}
)  # storages so coarse that the inputs of a weight shall lead its fit

# Norms and biases are small, and the runtime adds and multiplies them in float32.
_EXACT = Rule(pattern=".*(norm|bias)", storage="F32")
# Where rounding hurts most, and what has as many rows as words: 4 bits there cost as much as in
# all layers together.
_WORDS = Rule(pattern="token_embedding|output_head", storage="INT8")

# What an artifact may differ from its checkpoint: mean KL in nats, share of equal top tokens.
# Measured over 3152 positions of SmolLM2-135M with weights that lie on no grid: F32 3e-11, 100 %;
# F16 6e-6, 99.7; INT8 0.008, 93.3; UINT4 0.44, 59.6, or where a calibration leads the fit 0.28,
# 67.9; INT4 0.53, 56.9, or 0.31, 66.7; UINT4_ALL 0.58, 50.4.
_LIMITS = {
    "F32": (1e-9, 0.999), "F16": (1e-4, 0.99), "INT8": (0.02, 0.92), "UINT4": (0.5, 0.57),
    "INT4": (0.6, 0.54), "UINT4_ALL": (0.7, 0.48),
}  # fmt: skip


def _recipe(name: str, default: str, *rules: Rule) -> Recipe:
    mean_kl, same_top = _LIMITS[name]
    return Recipe(
        name=name,
        default=default,
        rules=rules,
        max_mean_kl_nats=mean_kl,
        min_same_top_token=same_top,
    )


RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _recipe("F32", "F32"),
        _recipe("F16", "F16", _EXACT),
        _recipe("INT8", "INT8", _EXACT),
        _recipe("UINT4", "UINT4", _EXACT, _WORDS),
        _recipe("INT4", "INT4", _EXACT, _WORDS),
        _recipe("UINT4_ALL", "UINT4", _EXACT),
    )
}

_SUBSTITUTES = {"UINT4": "INT4"}  # where rows fill an odd number of blocks


def stored_as(wanted: str, columns: int) -> str:
    """Return the storage that rows of ``columns`` weights really get.

    >>> stored_as("UINT4", 576), stored_as("UINT4", 96), stored_as("INT8", 100)
    ('UINT4', 'INT4', 'F16')
    """
    for storage in (wanted, _SUBSTITUTES.get(wanted, wanted)):
        if columns % STORAGES[storage].block_weights == 0:
            return storage
    return "F16"


def tensors(role: str, shape: Shape, storage: str) -> Iterator[External]:
    """Yield the tensors that hold a weight; the first has its name."""
    dtypes: dict[str, Dtype] = {"F32": "float32", "F16": "float16"}
    if storage in dtypes:
        yield External(name=role, dtype=dtypes[storage], shape=shape)
        return
    rows, columns = shape
    blocks, bits = columns // BLOCK_WEIGHTS, BLOCKS[storage].bits
    yield External(name=role, dtype="uint8", shape=(rows, blocks, BLOCK_WEIGHTS * bits // 8))
    yield External(name=role + SCALES, dtype="float32", shape=(rows, blocks))
    if BLOCKS[storage].implied_zero is None:
        yield External(name=role + ZERO_POINTS, dtype="uint8", shape=(rows, blocks // 2))


def contents(path: Path) -> list[tuple[str, Shape, str]]:
    """Return name, shape and storage of every weight of a model file.

    Raises:
        BundleError: If the file is damaged, or holds a weight in an unknown storage.
    """
    found = {tensor.name: tensor for tensor in model.read(path)}
    return [
        (tensor.name, *_describe(path, tensor, found))
        for tensor in found.values()
        if not tensor.name.endswith((SCALES, ZERO_POINTS))
    ]


def _describe(path: Path, tensor: External, found: Mapping[str, External]) -> tuple[Shape, str]:
    """Return shape and storage of a weight, by the tensors that there are."""
    shape, names = tensor.shape, ["F32", "F16"]
    if tensor.dtype == "uint8" and len(shape) == 3:
        shape, names = (shape[0], shape[1] * BLOCK_WEIGHTS), [*BLOCKS]
    held = [found.get(tensor.name + part) for part in ("", SCALES, ZERO_POINTS)]
    for name in names:
        expected = [*tensors(tensor.name, shape, name)]
        if [(t.dtype, t.shape) for t in held if t] == [(t.dtype, t.shape) for t in expected]:
            return shape, name
    raise BundleError(f"{path}: {tensor.name} is stored in a way that edgekit never writes")


def encode(
    values: "Rows", storage: str, *, importance: "Rows | None" = None
) -> "list[npt.NDArray[np.generic]]":
    """Encode some rows of a weight, each block by itself.

    Args:
        values: float32; the last axis holds the columns.
        storage: One of `STORAGES`, whose blocks the columns fill.
        importance: How much an error counts, column by column, where it leads the fit.

    Returns:
        The arrays of `tensors`, as many rows each.

    Raises:
        UsageError: If a value is beyond what the storage can hold.
    """
    if storage == "F32":
        return [values.astype("<f4", copy=False)]
    if storage == "F16":
        return [_to_f16(values)]
    blocks = values.reshape(values.shape[0], -1, BLOCK_WEIGHTS)
    if storage == "INT8":
        return _to_int8(blocks)
    found = fit.fit(blocks, importance, is_symmetric=storage == "INT4")
    zeros = [] if storage == "INT4" else [_packed(found.zeros)]
    return [_packed(found.codes), found.scales, *zeros]


_MAX_F16 = 65520  # from here on float16 rounds to infinity


def _to_f16(values: "Rows") -> "npt.NDArray[np.float16]":
    import numpy as np

    largest = float(np.abs(values).max(initial=0))
    if largest >= _MAX_F16:
        raise UsageError(f"a weight is {largest:g}, too large for F16", hint="take F32 or INT8")
    return values.astype("<f2")


def _to_int8(blocks: "Rows") -> "list[npt.NDArray[np.generic]]":
    import numpy as np

    scales = np.abs(blocks).max(axis=-1) / np.float32(127)
    codes = np.rint(blocks * fit.inverse(scales)[..., None]) + 128
    return [codes.astype(np.uint8), scales]


def _packed(codes: "Codes") -> "Codes":
    """Put two codes into a byte, the first into its lower half."""
    import numpy as np

    packed: Codes = np.bitwise_or(codes[..., 0::2], np.left_shift(codes[..., 1::2], 4))
    return packed
