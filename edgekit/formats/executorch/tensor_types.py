"""How weights are stored, and which weight gets which tensor type.

An int8 matrix has one scale for each row, a four-bit one a bfloat16 scale for each group of a row:
the layouts of XNNPACK's ``qcint8`` and ``qbint4``, for the embedding too. ``Q4GSW`` is the layout
of Vulkan's ``linear_q4gsw``: float32 scales, whose rows are the groups. Where a recipe's name
begins with 8da, XNNPACK rounds what is multiplied with such a matrix to int8 too, token by token.
There is no bfloat16: XNNPACK, as ExecuTorch 1.5.1 has it, refuses such weights next to float32
inputs ("invalid parameter"), and would have inputs rounded to bfloat16 as well.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from edgekit.model.shapes import Shape
from edgekit.model.spec import DecoderSpec
from edgekit.quant import grid, rounding
from edgekit.quant.grid import Fitted, Grid
from edgekit.quant.lattice import GridLattice, Lattice
from edgekit.quant.recipe import Recipe, Rule, TensorType, with_limits


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Rows: TypeAlias = npt.NDArray[np.float32]


SCALE = ".scale"  # what follows a role, for its scales
INT8_SCALE_BYTES = 4  # of a row
_FLOAT_BYTES = {"F32": 4, "F16": 2}

ALIGNMENT = 128  # of data segments in a program, ExecuTorch's own choice
TENSOR_TYPES: Mapping[str, TensorType] = {
    tensor_type.name: tensor_type
    for tensor_type in (
        TensorType(name="F32", block_weights=1, block_bytes=4),
        TensorType(name="F16", block_weights=1, block_bytes=2),
        TensorType(name="INT8", block_weights=1, block_bytes=1),  # and a scale for each whole row
        TensorType(name="INT4_G32", block_weights=32, block_bytes=16 + 2),
        TensorType(name="INT4_G64", block_weights=64, block_bytes=32 + 2),
        TensorType(name="INT4_G128", block_weights=128, block_bytes=64 + 2),
        TensorType(name="Q4GSW_G32", block_weights=32, block_bytes=16 + 4),
        TensorType(name="Q4GSW_G64", block_weights=64, block_bytes=32 + 4),
        TensorType(name="Q4GSW_G128", block_weights=128, block_bytes=64 + 4),
    )
}

# Tensor types so coarse that importance weighting pays.
COARSE = frozenset(name for name in TENSOR_TYPES if name.startswith(("INT4", "Q4GSW")))
# Four bits as XNNPACK has them, and the same groups as Vulkan has them: scales across.
ACROSS = {f"INT4_G{group}": f"Q4GSW_G{group}" for group in (32, 64, 128)}
FOUR_BITS, VULKAN_FOUR_BITS = frozenset(ACROSS), frozenset(ACROSS.values())

# Small, and XNNPACK wants them so.
_EXACT = Rule(
    pattern=".*(norm|bias|taps)|xielu_.*|layer_scale|head_gate|delta_(decay|alpha|beta)",
    tensor_type="F32",
)
_EIGHT_BIT_EMBEDDING = Rule(
    pattern="token_embedding|output_head|layer_embedding", tensor_type="INT8"
)
# As llama.cpp, which keeps it whole: it is small, and what every layer reads.
_EIGHT_BIT_PROJECTION = Rule(pattern="layer_embedding_projection", tensor_type="INT8")
# What a state is written with is read for the rest of a text. Of random models with four bits
# elsewhere, these make a mean KL of 0.36 out of 1.7, and of 0.32 out of 1.1.
_EIGHT_BIT_NETS = Rule(pattern="delta_(qkv|gate|output)", tensor_type="INT8")
_EIGHT_BITS = (_EIGHT_BIT_PROJECTION, _EIGHT_BIT_NETS)

# What an artifact may differ from its checkpoint: mean KL in nats, share of equal top tokens.
# Measured over 3152 positions of SmolLM2-135M with weights that lie on no grid: _DEMO_KL_NATS, and
# F32 100 %; F16 99.7; 8da8w 86.0; 8da4w 51.3, or importance-weighted 0.38, 63.1; 8da4w_g64 47.7;
# 8da4w_g128 (64 where rows have 576 weights) 44.6; 8da4w_all 42.3, or with a calibration of the
# layers 0.62, 50.5. Random models have more near ties: of four bits KL judges closely, and half of
# these top tokens are enough.
_LIMITS = {
    "F32": (1e-9, 0.999), "F16": (1e-4, 0.97), "8da8w": (0.06, 0.83), "8da4w": (0.8, 0.25),
    "8da4w_g64": (0.9, 0.23), "8da4w_g128": (1.05, 0.22), "8da4w_all": (1.1, 0.21),
}  # fmt: skip
_DEMO_KL_NATS = {
    "F32": 6e-11, "F16": 5e-6, "8da8w": 0.040, "8da4w": 0.72, "8da4w_g64": 0.82, "8da4w_g128": 0.95,
    "8da4w_all": 0.97,
}  # fmt: skip
_recipe = with_limits(_LIMITS, _DEMO_KL_NATS)

RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _recipe("F32", "F32"),
        _recipe("F16", "F16", _EXACT),
        _recipe("8da8w", "INT8", _EXACT),
        _recipe("8da4w", "INT4_G32", _EXACT, _EIGHT_BIT_EMBEDDING, *_EIGHT_BITS),
        _recipe("8da4w_g64", "INT4_G64", _EXACT, _EIGHT_BIT_EMBEDDING, *_EIGHT_BITS),
        _recipe("8da4w_g128", "INT4_G128", _EXACT, _EIGHT_BIT_EMBEDDING, *_EIGHT_BITS),
        _recipe("8da4w_all", "INT4_G32", _EXACT, *_EIGHT_BITS),
    )
}


def stored_as(wanted: str, columns: int) -> str:
    """Return the tensor type that rows of ``columns`` weights really get.

    >>> stored_as("INT4_G128", 576), stored_as("INT4_G32", 100)
    ('INT4_G64', 'INT8')
    """
    if wanted not in COARSE:
        return wanted
    kind, _, _ = wanted.rpartition("_")
    for group in (128, 64, 32):
        if group <= TENSOR_TYPES[wanted].block_weights and columns % group == 0:
            return f"{kind}_G{group}"
    return "INT8"


def item_types(stored: str) -> tuple[str, ...]:
    """Return the item types of the parts of a weight, by numpy's names."""
    return {
        "F32": ("<f4",), "F16": ("<f2",), "INT8": ("i1", "<f4"),
        **dict.fromkeys(FOUR_BITS, ("u1", "<u2")), **dict.fromkeys(VULKAN_FOUR_BITS, ("u1", "<f4")),
    }[stored]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some bytes of an artifact that hold a weight or its scales."""

    key: str  # the role, or the role and `SCALE`
    size_bytes: int
    is_across: bool = False  # a row of the weight is a column of it


def parts(role: str, shape: Shape, tensor_type: str) -> Iterator[Part]:
    """Yield the parts that hold a weight."""
    rows, columns = shape[0], shape[1] if shape[1:] else 1
    if tensor_type in _FLOAT_BYTES:
        yield Part(key=role, size_bytes=_FLOAT_BYTES[tensor_type] * rows * columns)
    elif tensor_type == "INT8":
        yield Part(key=role, size_bytes=rows * columns)
        yield Part(key=role + SCALE, size_bytes=INT8_SCALE_BYTES * rows)
    else:
        yield Part(key=role, size_bytes=rows * columns // 2)
        scales, is_across = (
            columns // TENSOR_TYPES[tensor_type].block_weights,
            tensor_type in VULKAN_FOUR_BITS,
        )
        size_bytes = (4 if is_across else 2) * rows * scales
        yield Part(key=role + SCALE, size_bytes=size_bytes, is_across=is_across)


def has_pairs(role: str, spec: DecoderSpec, parts: Iterable[Part]) -> bool:
    """Tell whether a matrix of a decoder has two weights in a byte."""
    weights = math.prod(dict(spec.weights())[role])
    return next(part.size_bytes for part in parts if part.key == role) < weights


def encode(
    values: "Rows", tensor_type: str, *, importance: "Rows | None" = None
) -> "list[npt.NDArray[np.generic]]":
    """Encode some rows of a weight.

    Args:
        values: float32; the last axis holds the columns.
        tensor_type: One of `TENSOR_TYPES`, whose blocks the columns fill.
        importance: How much an error counts, column by column; None: all alike.

    Returns:
        An array for each of `parts`.

    Raises:
        UsageError: If a value is beyond what the tensor type can hold.
    """
    if tensor_type == "F32":
        return [values.astype("<f4", copy=False)]
    if tensor_type == "F16":
        return [rounding.float16(values, hint="take F32 or 8da8w")]
    if tensor_type == "INT8":
        return _to_int8(values)
    return _four_bits(grid.fit(values, importance, _grid(tensor_type)), tensor_type)


def lattice(tensor_type: str) -> Lattice | None:
    """Return what a solver can round a weight to; None where rounding is fine as it is."""
    if tensor_type not in COARSE:
        return None
    return GridLattice(
        grid=_grid(tensor_type), write=lambda found, _: _four_bits(found, tensor_type)
    )


def decode(parts: "list[npt.NDArray[Any]]", stored: str) -> "Rows":
    """Return the float32 ``(rows, columns)`` that the parts of a weight stand for, row by row."""
    import numpy as np

    codes, *scales = parts
    if not scales:
        return codes.astype(np.float32)
    if stored in FOUR_BITS | VULKAN_FOUR_BITS:
        pairs = np.stack((codes & 15, codes >> 4), -1)
        codes = pairs.reshape(len(codes), -1).astype(np.int8) - 8
    wide = scales[0]
    if stored in FOUR_BITS:  # bfloat16
        wide = rounding.from_bfloat16(wide)
    rows: Rows = codes.astype(np.float32) * wide.repeat(codes.shape[1] // wide.shape[1], axis=1)
    return rows


def _to_int8(values: "Rows") -> "list[npt.NDArray[np.generic]]":
    fitted = grid.nearest(
        values,
        Grid(
            block_weights=values.shape[1], bottom=-127, top=127, zero=0, has_negative_scales=False
        ),
    )
    codes, scales = _regular(fitted)
    return [codes[:, 0], scales[:, 0]]


def _grid(tensor_type: str) -> Grid:
    return Grid(
        block_weights=TENSOR_TYPES[tensor_type].block_weights, bottom=-8, top=7, zero=0,
        scales="float32" if tensor_type in VULKAN_FOUR_BITS else "bfloat16",
        has_negative_scales=False,
    )  # fmt: skip


def _four_bits(fitted: Fitted, tensor_type: str) -> "list[npt.NDArray[np.generic]]":
    """Return codes plus 8, the first of a pair in a byte's lower half, and scales."""
    import numpy as np

    codes, scales = _regular(fitted)
    packed = rounding.packed_pairs((codes.reshape(len(codes), -1) + 8).astype(np.uint8))
    if tensor_type in VULKAN_FOUR_BITS:
        return [packed, scales]
    return [packed, (scales.view("<u4") >> 16).astype("<u2")]


def _regular(fitted: Fitted) -> "tuple[npt.NDArray[np.int8], Rows]":
    """Return codes and scales; XNNPACK refuses scales that are zero or subnormal."""
    import numpy as np

    is_regular = fitted.scales >= np.finfo(np.float32).tiny
    scales = np.where(is_regular, fitted.scales, np.float32(1)).astype("<f4")
    codes = np.where(is_regular[..., None], fitted.codes, 0).astype(np.int8)
    return codes, scales
