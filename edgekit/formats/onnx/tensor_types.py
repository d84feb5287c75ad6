"""How weights are stored: the block formats of ``MatMulNBits``, and which weight gets which.

A quantized matrix is two or three tensors: codes, a scale for each block of a row, and, where the
codes are not symmetric, a zero point next to each scale. Weight = scale * (code - zero point).
Source: docs/ContribOperators.md of ONNX Runtime 1.32, ``MatMulNBits``.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from edgekit.errors import BundleError
from edgekit.formats.onnx import model
from edgekit.formats.onnx.model import External
from edgekit.model.shapes import Shape
from edgekit.model.spec import DecoderSpec
from edgekit.quant import grid, rounding
from edgekit.quant.grid import Grid
from edgekit.quant.lattice import GridLattice, Lattice
from edgekit.quant.planned import PlannedWeight
from edgekit.quant.recipe import Recipe, Rule, TensorType, split_role, with_limits


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Rows: TypeAlias = npt.NDArray[np.float32]
    Codes: TypeAlias = npt.NDArray[np.uint8]


Float = Literal["float32", "float16"]

SCALES, ZERO_POINTS = ".scales", ".zero_points"
FLOATS: Mapping[str, Float] = {"F32": "float32", "F16": "float16"}
_ITEM_BYTES: Mapping[Float, int] = {"float32": 4, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """How a quantized tensor type is laid out."""

    bits: int
    weights: int  # of a block
    is_symmetric: bool  # one zero point for all blocks; else each has its own
    scales: Float = "float32"  # as what is multiplied with it, or the operator refuses both

    @property
    def implied_zero(self) -> int | None:
        """The zero point of all blocks."""
        return 2 ** (self.bits - 1) if self.is_symmetric else None

    @property
    def grid(self) -> Grid:
        """What a block can become."""
        return Grid(
            block_weights=self.weights,
            bottom=0,
            top=2**self.bits - 1,
            zero=self.implied_zero,
            scales=self.scales,
        )

    @property
    def is_coarse(self) -> bool:
        """Whether importance weighting pays: the grid is coarse."""
        return self.bits <= 4

    def tensor_type(self, name: str) -> TensorType:
        """Return what it costs; of zero points, a byte holds those of two blocks."""
        block_bytes = self.weights * self.bits // 8 + _ITEM_BYTES[self.scales]
        if self.is_symmetric:
            return TensorType(name=name, block_weights=self.weights, block_bytes=block_bytes)
        return TensorType(
            name=name, block_weights=2 * self.weights, block_bytes=2 * block_bytes + 1
        )


# U: with zero points. 128: the weights of a block, if not 32. F16: for graphs that multiply in half
# precision, whose scales are float16 too.
BLOCKS: Mapping[str, Blocks] = {
    "INT8": Blocks(bits=8, weights=32, is_symmetric=True),
    "UINT4": Blocks(bits=4, weights=32, is_symmetric=False),
    "INT4": Blocks(bits=4, weights=32, is_symmetric=True),
    "UINT4_128": Blocks(bits=4, weights=128, is_symmetric=False),
    "INT4_128": Blocks(bits=4, weights=128, is_symmetric=True),
    "INT8_F16": Blocks(bits=8, weights=32, is_symmetric=True, scales="float16"),
    "UINT4_F16": Blocks(bits=4, weights=32, is_symmetric=False, scales="float16"),
    "INT4_F16": Blocks(bits=4, weights=32, is_symmetric=True, scales="float16"),
}

TENSOR_TYPES: Mapping[str, TensorType] = {
    "F32": TensorType(name="F32", block_weights=1, block_bytes=4),
    "F16": TensorType(name="F16", block_weights=1, block_bytes=2),
    **{name: blocks.tensor_type(name) for name, blocks in BLOCKS.items()},
}

# What takes the place of a tensor type whose blocks rows do not fill: the next finer one.
_FINER = {"UINT4_128": "INT4_128", "INT4_128": "UINT4", "UINT4": "INT4", "UINT4_F16": "INT4_F16"}


def stored_as(wanted: str, columns: int) -> str:
    """Return the tensor type that rows of ``columns`` weights really get.

    >>> stored_as("UINT4", 576), stored_as("UINT4", 96), stored_as("INT8", 100)
    ('UINT4', 'INT4', 'F16')
    """
    tensor_type: str | None = wanted
    while tensor_type:
        if columns % TENSOR_TYPES[tensor_type].block_weights == 0:
            return tensor_type
        tensor_type = _FINER.get(tensor_type)
    return "F16"


# Tables


# What every WebGPU binds at once: the maxStorageBufferBindingSize of a device that grants no more.
TABLE_BYTES = 2**27
_TABLE = re.compile(r"(?<=^layer_embedding)\.\d+$", re.ASCII)


def part_columns(role: str, shape: Shape, spec: DecoderSpec) -> int:
    """Return how many columns of a weight are never parted: those of a layer, or all."""
    own = spec.layer_embedding
    return own.width if own and role == "layer_embedding" else shape[-1]


def tables(role: str, shape: Shape, tensor_type: str, *, part_columns: int) -> dict[str, int]:
    """Return the tables that hold a weight side by side, by name, with the columns of each.

    The embeddings for all layers of Gemma 4 E2B take 2.6 GB with 8 bits, of which a token reads
    10 KB: no GPU binds that. So a table has as many parts as `TABLE_BYTES` hold, but one at least.
    """
    rows, columns = shape[0], shape[-1]
    if part_columns == columns:
        return {role: columns}
    part_bytes = max(t.size_bytes for t in tensors(role, (rows, part_columns), tensor_type))
    wide = max(1, TABLE_BYTES // part_bytes) * part_columns
    if wide >= columns:
        return {role: columns}
    return {f"{role}.{n}": min(wide, columns - n * wide) for n in range(-(-columns // wide))}


# Recipes


# How MatMulNBits may round activations, its accuracy_level; source: docs/ContribOperators.md. 1 is
# not at all, 4 to 8 bits in blocks, for whole-number instructions. In ONNX Runtime 1.32 for arm64
# those are SDOT (asimddp: a Raspberry Pi 5) and SMMLA (i8mm: newer phones), by MLAS and KleidiAI;
# in ONNX Runtime Web 1.31 dot4I8Packed (DP4A), where the GPU has it. On x86-64 with AVX-512 VNNI,
# one thread decodes SmolLM2-135M at 82 tokens/s with 4 and 3 with 1 as INT8, 106 and 6 as UINT4;
# prompts are read 1.3 to 1.9 times as fast. It costs a mean KL of 0.004 nats.
INT8_ACTIVATIONS = 4
ACTIVATIONS_NOTE = (
    "activations are rounded to 8 bits in blocks (accuracy_level 4) for the dot products of a "
    "Raspberry Pi 5, of phones with i8mm and of x86-64; the proof includes it. Browsers round none"
)


@dataclass(frozen=True, kw_only=True)
class GraphBuild:
    """What a recipe decides besides the tensor type of each weight."""

    dtype: str  # the word of transformers.js for such a model, which names the file
    arithmetic: Float = "float32"  # of products and attention, and the precision of the cache
    accuracy_level: int = INT8_ACTIVATIONS

    @property
    def is_half(self) -> bool:
        """Whether products and attention are computed in float16; all else is in float32."""
        return self.arithmetic == "float16"

    @property
    def file(self) -> str:
        """The name of the model file."""
        return f"model{_SUFFIXES[self.dtype]}.onnx"


# Small, and computed in float32 always. A few rows decide what a delta net forgets and learns, and
# what they err by adds up over the whole text; a few others which experts a token takes.
_FINE = Rule(
    pattern=".*norm(_bias)?|layer_scale|xielu_(positive|negative)|conv_taps(_bias)?"
    "|head_gate|delta_(taps|beta|alpha|decay|decay_bias)|router|expert_bias",
    tensor_type="F32",
)
_BIASES = Rule(pattern=".*bias", tensor_type="F32")
_HALF_BIASES = Rule(pattern=".*bias", tensor_type="F16")


def _eight_bit_embedding(tensor_type: str) -> Rule:
    """Keep the token embedding and the output head fine: rounding hurts most there.

    Four bits there cost as much as in all layers together.
    """
    return Rule(
        pattern="token_embedding|output_head|layer_embedding_projection", tensor_type=tensor_type
    )


# Looked up, not multiplied: more bits cost bytes on disk and no time. A GPU must hold all of them.
_EIGHT_BIT_TABLE = Rule(pattern="layer_embedding", tensor_type="INT8")


# Of a delta net, whose state adds up over a text what they err by. ONNX Runtime GenAI keeps eight
# bits there too; in the GGUF files that Unsloth measured, a coarse delta_output cost the most.
_EIGHT_BITS_IN_DELTA_NETS = "delta_(qkv|gate|output)"
DELTA_NOTE = (
    "delta_qkv, delta_gate and delta_output have 8 bits where other matrices have 4: what their "
    "rounding errs by adds up in the state; delta_alpha and delta_beta are float32"
)


def _eight_bits(tensor_type: str) -> tuple[Rule, ...]:
    """Keep fine what loses most by four bits."""
    return (
        _eight_bit_embedding(tensor_type),
        Rule(pattern=_EIGHT_BITS_IN_DELTA_NETS, tensor_type=tensor_type),
    )


def spares_delta_nets(weights: Sequence[PlannedWeight]) -> bool:
    """Tell whether delta nets have eight bits while other matrices have four."""
    coarse = {weight.role for weight in weights if weight.is_coarse}
    return bool(coarse) and any(
        re.fullmatch(_EIGHT_BITS_IN_DELTA_NETS, split_role(weight.role)[1])
        and weight.role not in coarse
        for weight in weights
    )


# What an artifact may differ from its checkpoint: mean KL in nats, share of equal top tokens.
# Measured over 3152 positions of SmolLM2-135M with weights that lie on no grid: _DEMO_KL_NATS, and
# F32 100 %; F16 99.7; F16_GPU 99.6; INT8 93.9; UINT4 and UINT4_GPU 59.6, or importance-weighted
# 0.24 to 0.28, 67; INT4 55.0, or 0.28, 67; UINT4_128 50.8, or 0.41, 59.8; INT4_128 43.9, or 0.44,
# 58.1; UINT4_ALL 50.4. Those of blocks of 128 are of the rounding alone: rows of 576 do not fill
# them, and get finer ones in an artifact. Random models have more near ties: of F16, F16_GPU and
# INT8 the limits hold all tiny ones with 20 seeds (benchmark false_alarms). Below 8 bits KL alone
# judges closely, and half of the demo's top tokens are enough: of 50 tiny models and random texts
# the worst kept 0.40 of UINT4's, 0.60 nats.
_LIMITS = {
    "F32": (1e-9, 0.999), "F16": (1e-4, 0.97), "F16_GPU": (1e-4, 0.97), "INT8": (0.02, 0.86),
    "UINT4": (0.75, 0.3), "INT4": (0.85, 0.27), "UINT4_GPU": (0.75, 0.3), "UINT4_128": (1.0, 0.25),
    "INT4_128": (1.3, 0.22), "UINT4_ALL": (0.9, 0.25),
}  # fmt: skip
_DEMO_KL_NATS = {
    "F32": 2e-11, "F16": 5e-6, "F16_GPU": 2e-5, "INT8": 0.007, "UINT4": 0.40, "UINT4_GPU": 0.44,
    "INT4": 0.54, "UINT4_128": 0.67, "INT4_128": 0.88, "UINT4_ALL": 0.58,
}  # fmt: skip
_recipe = with_limits(_LIMITS, _DEMO_KL_NATS, _FINE)


RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _recipe("F32", "F32"),
        _recipe("F16", "F16", _BIASES),
        _recipe("F16_GPU", "F16"),
        _recipe("INT8", "INT8", _BIASES),
        _recipe("UINT4", "UINT4", _BIASES, *_eight_bits("INT8"), _EIGHT_BIT_TABLE),
        _recipe("INT4", "INT4", _BIASES, *_eight_bits("INT8"), _EIGHT_BIT_TABLE),
        _recipe("UINT4_GPU", "UINT4_F16", _HALF_BIASES, *_eight_bits("INT8_F16")),
        _recipe("UINT4_128", "UINT4_128", _BIASES, *_eight_bits("INT8"), _EIGHT_BIT_TABLE),
        _recipe("INT4_128", "INT4_128", _BIASES, *_eight_bits("INT8"), _EIGHT_BIT_TABLE),
        _recipe("UINT4_ALL", "UINT4", _BIASES),
    )
}

# What transformers.js adds to ``model`` for a dtype; Optimum knows the first three as well.
# Source: DEFAULT_DTYPE_SUFFIX_MAPPING in src/utils/dtypes.js of transformers.js 4.3.1.
_SUFFIXES = {"fp32": "", "fp16": "_fp16", "q8": "_quantized", "q4": "_q4", "q4f16": "_q4f16"}

BUILDS: Mapping[str, GraphBuild] = {
    "F32": GraphBuild(dtype="fp32"),
    "F16": GraphBuild(dtype="fp16"),
    "F16_GPU": GraphBuild(dtype="fp16", arithmetic="float16"),
    "INT8": GraphBuild(dtype="q8"),
    "UINT4_GPU": GraphBuild(dtype="q4f16", arithmetic="float16"),
} | dict.fromkeys(("UINT4", "INT4", "UINT4_128", "INT4_128", "UINT4_ALL"), GraphBuild(dtype="q4"))


# Tensors


def tensors(role: str, shape: Shape, tensor_type: str) -> Iterator[External]:
    """Yield the tensors that hold a weight; the first has its name."""
    if tensor_type in FLOATS:
        yield External(name=role, dtype=FLOATS[tensor_type], shape=shape)
        return
    *rows, columns = shape
    blocks = BLOCKS[tensor_type]
    count = columns // blocks.weights
    block_bytes = blocks.weights * blocks.bits // 8
    of_experts = len(rows) > 1  # whose operator wants the bytes of a row in one axis
    codes = (*rows, count * block_bytes) if of_experts else (*rows, count, block_bytes)
    yield External(name=role, dtype="uint8", shape=codes)
    yield External(name=role + SCALES, dtype=blocks.scales, shape=(*rows, count))
    if not blocks.is_symmetric:
        yield External(name=role + ZERO_POINTS, dtype="uint8", shape=(*rows, count // 2))


def contents(path: Path) -> list[tuple[str, Shape, str]]:
    """Return name, shape and tensor type of every weight of a model file.

    Raises:
        BundleError: If the file is damaged, or holds a weight in an unknown tensor type.
    """
    found = {tensor.name: tensor for tensor in model.read(path)}
    held: dict[str, tuple[Shape, str]] = {}
    for tensor in found.values():
        if tensor.name.endswith((SCALES, ZERO_POINTS)):
            continue
        role, shape, tensor_type = _TABLE.sub("", tensor.name), *_describe(path, tensor, found)
        if role in held:  # another table of the same
            (*rows, columns), of_all = held[role]
            if (shape[:-1], tensor_type) != (tuple(rows), of_all):
                raise _never_written(path, tensor)
            shape = (*rows, columns + shape[-1])
        held[role] = shape, tensor_type
    return [(role, *described) for role, described in held.items()]


def _describe(path: Path, tensor: External, found: Mapping[str, External]) -> tuple[Shape, str]:
    """Return shape and tensor type of a weight, by the tensors that there are."""
    held = [found.get(tensor.name + part) for part in ("", SCALES, ZERO_POINTS)]
    for name, shape in _possible(tensor):
        expected = [*tensors(tensor.name, shape, name)]
        if [(t.dtype, t.shape) for t in held if t] == [(t.dtype, t.shape) for t in expected]:
            return shape, name
    raise _never_written(path, tensor)


def _never_written(path: Path, tensor: External) -> BundleError:
    return BundleError(f"{path}: {tensor.name} is stored in a way that edgekit never writes")


def _possible(tensor: External) -> Iterator[tuple[str, Shape]]:
    """Yield tensor types of which a tensor may be the first part, with the shape of the weight."""
    if tensor.dtype != "uint8" or len(tensor.shape) != 3:
        yield from ((name, tensor.shape) for name in FLOATS)
        return
    rows, count, block_bytes = tensor.shape
    for name, blocks in BLOCKS.items():
        if block_bytes * 8 == blocks.weights * blocks.bits:
            yield name, (rows, count * blocks.weights)
        yield name, (rows, count, block_bytes * 8 // blocks.bits)  # of experts


def encode(
    values: "Rows", tensor_type: str, *, importance: "Rows | None" = None
) -> "list[npt.NDArray[np.generic]]":
    """Encode some rows of a weight, each block by itself.

    Args:
        values: float32; the last axis holds the columns.
        tensor_type: One of `TENSOR_TYPES`, whose blocks the columns fill.
        importance: How much an error counts, column by column; None: all alike.

    Returns:
        The arrays of `tensors`, as many rows each.

    Raises:
        UsageError: If a value is beyond what the tensor type can hold.
    """
    if tensor_type == "F32":
        return [values.astype("<f4", copy=False)]
    if tensor_type == "F16":
        return [rounding.float16(values, hint="take F32 or INT8")]
    blocks, values = BLOCKS[tensor_type], values.reshape(-1, values.shape[-1])
    if blocks.is_coarse:
        found = grid.fit(values, importance, blocks.grid)
    else:
        found = grid.nearest(values, blocks.grid)
    return [*_parts(found, blocks)]


def lattice(tensor_type: str) -> Lattice | None:
    """Return what a solver can round a weight to; None where rounding is fine as it is."""
    blocks = BLOCKS.get(tensor_type)
    if blocks is None or not blocks.is_coarse:
        return None
    return GridLattice(grid=blocks.grid, write=lambda found, _: [*_parts(found, blocks)])


def _parts(found: grid.Fitted, blocks: Blocks) -> "Iterator[npt.NDArray[np.generic]]":
    yield rounding.packed_pairs(found.codes) if blocks.bits == 4 else found.codes
    yield found.scales.astype("<f4" if blocks.scales == "float32" else "<f2")
    if not blocks.is_symmetric:
        yield rounding.packed_pairs(found.zeros)
