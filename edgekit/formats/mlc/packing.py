"""How weights are stored: group quantization as MLC packs it, and which weight gets which.

A quantized matrix is two tensors: codes of 3 or 4 bits in 32-bit words, the first code in the
lowest bits, and a scale for each group of a row; weight = (code - zero) * scale. A last group that
a row does not fill is stored whole. A float32 tensor is stored as bfloat16, and scales of one too.
Source: mlc_llm/quantization/group_quantization.py of mlc-llm 79d603f085.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from edgekit.formats.mlc.names import Parameter
from edgekit.model.shapes import Shape
from edgekit.model.spec import DecoderSpec
from edgekit.quant import grid, rounding
from edgekit.quant.lattice import GridLattice, Lattice
from edgekit.quant.recipe import Recipe, Rule, TensorType, with_limits


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Rows: TypeAlias = npt.NDArray[np.float32]
    Words: TypeAlias = npt.NDArray[np.uint32]
    Stored: TypeAlias = npt.NDArray[np.generic]


Dtype = Literal["uint32", "float16", "float32"]

_CHUNK_WEIGHTS = 2**18  # what a thread holds of each array: 1 MiB
_WORD_BITS = 32

TENSOR_TYPES: Mapping[str, TensorType] = {
    tensor_type.name: tensor_type
    for tensor_type in (
        TensorType(name="BF16", block_weights=1, block_bytes=2),
        TensorType(name="F16", block_weights=1, block_bytes=2),
        TensorType(name="INT4_BF16", block_weights=32, block_bytes=16 + 2, pads_rows=True),
        TensorType(name="INT4_F16", block_weights=32, block_bytes=16 + 2, pads_rows=True),
        TensorType(name="INT3_F16", block_weights=40, block_bytes=16 + 2, pads_rows=True),
    )
}


@dataclass(frozen=True, kw_only=True)
class Groups:
    """How a quantized tensor type is read."""

    bits: int
    weights: int  # of a row, that share a scale

    @property
    def zero(self) -> int:
        """The code of a weight that is 0; the codes go up to twice that."""
        return (1 << (self.bits - 1)) - 1

    @property
    def codes_per_word(self) -> int:
        """How many fit 32 bits; three-bit ones leave two bits over."""
        return _WORD_BITS // self.bits

    def count(self, columns: int) -> int:
        """Return how many groups a row has."""
        return -(-columns // self.weights)

    def words(self, columns: int) -> int:
        """Return how many words hold the codes of a row."""
        return self.count(columns) * (self.weights // self.codes_per_word)


GROUPS: Mapping[str, Groups] = {
    "INT4_BF16": Groups(bits=4, weights=32),
    "INT4_F16": Groups(bits=4, weights=32),
    "INT3_F16": Groups(bits=3, weights=40),
}


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """What one of MLC's quantizations is beyond the tensor type of each weight."""

    dtype: Literal["float16", "float32"]  # what the model computes in
    tensor_types: tuple[str, ...]  # the one of vectors first
    is_transposed: bool = False  # matrices are stored columns first, the embedding is not


SCHEMES: Mapping[str, Scheme] = {
    "q0f32": Scheme(dtype="float32", tensor_types=("BF16",)),
    "q0f16": Scheme(dtype="float16", tensor_types=("F16",)),
    "q4f32_1": Scheme(dtype="float32", tensor_types=("BF16", "INT4_BF16")),
    "q4f16_1": Scheme(dtype="float16", tensor_types=("F16", "INT4_F16")),
    "q4f16_0": Scheme(dtype="float16", tensor_types=("F16", "INT4_F16"), is_transposed=True),
    "q4f16_2": Scheme(dtype="float16", tensor_types=("F16", "INT4_F16")),
    "q3f16_1": Scheme(dtype="float16", tensor_types=("F16", "INT3_F16")),
}

_LARGEST_BFLOAT16 = float.fromhex("0x1.fep127")
_SMALL = ".*(norm|bias)|delta_taps"
# How fast a delta net forgets: MLC's models take it in float32, whatever they compute in.
_FORGETTING = Rule(pattern="delta_decay|delta_decay_bias", tensor_type="BF16")
_EMBEDDING_AND_HEAD = "token_embedding|output_head"

# What an artifact may differ from its checkpoint: mean KL in nats, share of equal top tokens.
# Measured over 3152 positions of SmolLM2-135M, as MLC rounds (_DEMO_KL_NATS) and
# importance-weighted: q0f16 99.9 %; q0f32 99.2; q4f16_2 57.6, or weighted 0.28, 66.3; q4f32_1 51.0,
# or 0.52, 55.2; q4f16_1 51.2, or 0.52, 55.9; q3f16_1 12.3, or 2.7, 17.7. q4f16_0 holds the numbers
# of q4f16_1. Random models have more near ties: of four bits and less KL judges closely, and half
# of these top tokens are enough.
_LIMITS = {
    "q0f16": (1e-4, 0.97), "q0f32": (1e-3, 0.97), "q4f16_2": (0.6, 0.29), "q4f32_1": (0.8, 0.22),
    "q4f16_1": (0.8, 0.22), "q4f16_0": (0.8, 0.22), "q3f16_1": (4.0, 0.06),
}  # fmt: skip
# What libraries cost that have every matrix of a delta net packed, also the few rows that decide
# what it forgets: two tiny ones had 1.3 with four bits, and 1.1e-3 as q0f32.
_LIBRARY_KL_NATS = {"q0f16": 0.0, "q0f32": 1e-3}
_PACKED_LIBRARY_KL_NATS = 0.8
_DEMO_KL_NATS = {
    "q0f16": 4e-6, "q0f32": 9e-5, "q4f16_2": 0.49, "q4f32_1": 0.64, "q4f16_1": 0.64,
    "q4f16_0": 0.64, "q3f16_1": 3.2,
}  # fmt: skip
_recipe = with_limits(_LIMITS, _DEMO_KL_NATS, _FORGETTING)

RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _recipe("q0f16", "F16"),
        _recipe("q0f32", "BF16"),
        _recipe(
            "q4f16_2",
            "INT4_F16",
            Rule(pattern=_SMALL, tensor_type="F16"),
            Rule(pattern=_EMBEDDING_AND_HEAD, tensor_type="F16"),
        ),
        _recipe("q4f32_1", "INT4_BF16", Rule(pattern=_SMALL, tensor_type="BF16")),
        _recipe("q4f16_1", "INT4_F16", Rule(pattern=_SMALL, tensor_type="F16")),
        _recipe("q4f16_0", "INT4_F16", Rule(pattern=_SMALL, tensor_type="F16")),
        _recipe("q3f16_1", "INT3_F16", Rule(pattern=_SMALL, tensor_type="F16")),
    )
}


@dataclass(frozen=True, kw_only=True)
class PackedTensor:
    """One tensor of an artifact, as its runtime sees it."""

    name: str
    shape: Shape
    dtype: Dtype

    @property
    def items(self) -> int:
        """How many numbers it has."""
        count = 1
        for length in self.shape:
            count *= length
        return count

    @property
    def memory_bytes(self) -> int:
        """What it takes in memory."""
        return self.items * (2 if self.dtype == "float16" else 4)

    @property
    def size_bytes(self) -> int:
        """What it takes in a file, where a float32 is a bfloat16."""
        return self.items * (4 if self.dtype == "uint32" else 2)


def library_kl_nats(recipe: Recipe, spec: DecoderSpec) -> float:
    """Return what a prebuilt library's choice of types costs more, in mean KL."""
    if not spec.has_states:
        return 0.0
    return _LIBRARY_KL_NATS.get(recipe.name, _PACKED_LIBRARY_KL_NATS)


def is_transposed(parameter: Parameter, tensor_type: str, scheme: Scheme) -> bool:
    """Tell whether a parameter's tensors have the columns first."""
    return scheme.is_transposed and tensor_type in GROUPS and not parameter.is_embedding


def tensors(parameter: Parameter, tensor_type: str, scheme: Scheme) -> list[PackedTensor]:
    """Return the tensors that hold a parameter, in the order of the file."""
    if tensor_type not in GROUPS:
        dtype: Dtype = "float32" if tensor_type == "BF16" else "float16"
        return [PackedTensor(name=parameter.name, shape=parameter.shape, dtype=dtype)]
    rows, columns = parameter.shape
    groups, stem = GROUPS[tensor_type], parameter.name.removesuffix("weight")
    shapes = ((rows, groups.words(columns)), (rows, groups.count(columns)))
    if is_transposed(parameter, tensor_type, scheme):
        shapes = (shapes[0][::-1], shapes[1][::-1])
    return [
        PackedTensor(name=f"{stem}q_weight", shape=shapes[0], dtype="uint32"),
        PackedTensor(name=f"{stem}q_scale", shape=shapes[1], dtype=scheme.dtype),
    ]


def encode(
    values: "Rows",
    tensor_type: str,
    *,
    is_calibrated: bool = False,
    importance: "Rows | None" = None,
) -> "list[Stored]":
    """Return what is stored of some rows of a parameter, or of a vector.

    Args:
        values: float32; the last axis holds the columns.
        tensor_type: One of `TENSOR_TYPES`.
        is_calibrated: Whether scales are sought whose error is small; else they are MLC's own.
        importance: How much an error then counts, column by column; None counts all alike.

    Returns:
        The arrays of `tensors`, rows first, as they are written.
    """
    if tensor_type == "F16":
        return [_to_f16(values)]
    if tensor_type == "BF16":
        return [to_bf16(values)]
    groups, is_half = GROUPS[tensor_type], tensor_type.endswith("_F16")
    if is_calibrated:
        codes, scales = _fitted(values, groups, importance, is_half=is_half)
    else:
        codes, scales = _rounded(values, groups, is_half=is_half)
    return _stored(codes, scales, groups, columns=values.shape[1], is_half=is_half)


def _stored(
    codes: "npt.NDArray[np.uint8]", scales: "Rows", groups: Groups, *, columns: int, is_half: bool
) -> "list[Stored]":
    codes[:, columns:] = 0  # what fills the last group up is not a weight of 0
    return [_packed(codes, groups), _to_f16(scales) if is_half else to_bf16(scales)]


def lattice(tensor_type: str) -> Lattice | None:
    """Return what a solver can round a weight to; None where rounding is fine as it is."""
    groups, is_half = GROUPS.get(tensor_type), tensor_type.endswith("_F16")
    if groups is None:
        return None

    def write(found: grid.Fitted, columns: int) -> "list[Stored]":
        codes = found.codes.astype(np.uint8).reshape(len(found.codes), -1)
        return _stored(codes, found.scales, groups, columns=columns, is_half=is_half)

    import numpy as np

    return GridLattice(grid=_grid(groups, is_half=is_half), write=write)


def _grid(groups: Groups, *, is_half: bool) -> grid.Grid:
    return grid.Grid(
        block_weights=groups.weights, bottom=0, top=2 * groups.zero, zero=groups.zero,
        scales="float16" if is_half else "bfloat16", has_negative_scales=False,
    )  # fmt: skip


def _to_f16(values: "Rows") -> "npt.NDArray[np.float16]":
    import numpy as np

    with np.errstate(over="ignore"):
        return values.astype("<f2")


def to_bf16(values: "Rows") -> "npt.NDArray[np.uint16]":
    """Round to the nearest bfloat16 as TVM: what is beyond the largest becomes that; uint16."""
    return rounding.bfloat16(values.clip(-_LARGEST_BFLOAT16, _LARGEST_BFLOAT16))


def _rounded(
    values: "Rows", groups: Groups, *, is_half: bool
) -> "tuple[npt.NDArray[np.uint8], Rows]":
    """Return codes and scales to the bit as mlc_llm computes them, on all processors."""
    import numpy as np

    step = max(1, _CHUNK_WEIGHTS // values.shape[1])
    parts = [values[first : first + step] for first in range(0, len(values), step)]
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda part: _round_part(part, groups, is_half=is_half), parts))
    return np.concatenate([codes for codes, _ in found]), np.concatenate([s for _, s in found])


def _round_part(
    values: "Rows", groups: Groups, *, is_half: bool
) -> "tuple[npt.NDArray[np.uint8], Rows]":
    """Round every step of the computation to what the model computes in, as mlc_llm does."""
    import numpy as np

    def stepped(numbers: "Rows") -> "Rows":
        return numbers.astype(np.float16).astype(np.float32) if is_half else numbers

    with np.errstate(all="ignore"):  # a group of zeros is 0 / 0
        blocks = stepped(_padded(values, groups)).reshape(len(values), -1, groups.weights)
        scales = stepped(np.abs(blocks).max(-1) / np.float32(groups.zero))
        found = stepped(stepped(blocks / scales[..., None]) + np.float32(groups.zero))
        found = np.rint(found)
        found = np.where(found > 0, np.minimum(found, 2 * groups.zero), 0)  # and NaN to 0
    return found.astype(np.uint8).reshape(len(values), -1), scales


def _fitted(
    values: "Rows", groups: Groups, importance: "Rows | None", *, is_half: bool
) -> "tuple[npt.NDArray[np.uint8], Rows]":
    import numpy as np

    ours = _grid(groups, is_half=is_half)
    counted = None if importance is None else _padded(importance[None], groups)[0]
    found = grid.fit(_padded(values, groups), counted, ours)
    return found.codes.astype(np.uint8).reshape(len(values), -1), found.scales


def _padded(values: "Rows", groups: Groups) -> "Rows":
    import numpy as np

    columns = values.shape[1]
    missing = groups.count(columns) * groups.weights - columns
    return np.pad(values, ((0, 0), (0, missing))) if missing else values


def _packed(codes: "npt.NDArray[np.uint8]", groups: Groups) -> "Words":
    import numpy as np

    codes = codes.reshape(len(codes), -1, groups.codes_per_word)
    words = np.zeros(codes.shape[:2], "<u4")
    for place in range(groups.codes_per_word):
        words |= codes[..., place].astype(np.uint32) << np.uint32(groups.bits * place)
    return words


def decode(stored: "list[Stored]", tensor_type: str, *, columns: int | None) -> "Rows":
    """Return what the runtime makes of stored rows, before it multiplies with them.

    Args:
        stored: The arrays of `encode`.
        tensor_type: One of `TENSOR_TYPES`.
        columns: How many weights a row has; None for a vector.

    Returns:
        float32, shape ``(rows, columns)`` or ``(rows,)``.
    """
    import numpy as np

    if tensor_type not in GROUPS:
        return _floats(stored[0])
    groups = GROUPS[tensor_type]
    words, scales = stored[0].astype(np.uint32), _floats(stored[1])
    places = np.arange(groups.codes_per_word, dtype=np.uint32) * np.uint32(groups.bits)
    codes = (words[..., None] >> places) & np.uint32(2**groups.bits - 1)
    centred = codes.reshape(*scales.shape, groups.weights).astype(np.float32)
    centred -= np.float32(groups.zero)
    centred *= scales[..., None]
    values = centred.reshape(len(scales), -1)[:, :columns]
    is_half = tensor_type.endswith("_F16")
    return values.astype(np.float16).astype(np.float32) if is_half else np.ascontiguousarray(values)


def _floats(stored: "Stored") -> "Rows":
    import numpy as np

    if stored.dtype == np.uint16:
        return rounding.from_bfloat16(stored.astype(np.uint16))
    return stored.astype(np.float32)
