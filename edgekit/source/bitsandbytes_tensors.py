"""Weights that bitsandbytes quantized to four bits, de-quantized when they are read.

A base as QLoRA trains on it. What `FourBitTensor.read` returns is bit by bit what
``dequantize_4bit`` of bitsandbytes returns: a float32 product of code and scale, rounded to the
type the weight had before. (Not on a CPU where a row holds no whole number of blocks: there
bitsandbytes 0.50 starts a block with every row, though its own quantization did not.)

Source: ``QuantState`` in functional.py and ``backends/default/ops.py`` of bitsandbytes 0.50.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from edgekit.encodings.json_files import parse_object
from edgekit.errors import UsageError
from edgekit.model.shapes import Shape
from edgekit.quant.rounding import bfloat16, from_bfloat16
from edgekit.source.config import Config


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Values = npt.NDArray[np.float32]
    Bytes = npt.NDArray[np.uint8]


FIELD = "quantization_config"
_SUPPORTED = "edgekit reads 16 and 32 bits, and the four bits (nf4, fp4) of bitsandbytes"
_HINT = "pass the model that was quantized; edgekit quantizes for the device itself"
_DAMAGED = "save the quantized model again, or pass the model that was quantized"
# The sixteen numbers a code of four bits means, before its block's scale.
_CODES = {
    # Source: QLoRA (https://arxiv.org/abs/2305.14314), appendix E.
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    # A sign, two bits of exponent, one of mantissa; scaled so that the largest is 1.
    "fp4": tuple(
        sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3)
    ),
}  # fmt: skip
_BLOCK_ITEMS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_STATE = ".quant_state.bitsandbytes__"
_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_CHUNK_ITEMS = 2**20  # decoded at once: looking codes up takes several times their size
_MAX_STATE_BYTES = 4096  # a real one has less than 200


class Stored(Protocol):
    """A tensor in a file, as `edgekit.source.checkpoint.StoredTensor` is."""

    @property
    def path(self) -> Path:
        """The file."""
        ...

    @property
    def dtype(self) -> str:
        """Its type there, such as ``U8`` or ``F32``."""
        ...

    @property
    def shape(self) -> Shape:
        """Its dimensions, slowest first."""
        ...

    @property
    def size_bytes(self) -> int:
        """How many bytes it takes in the file."""
        ...

    def read(self, first_row: int = 0, rows: int | None = None) -> "Values":
        """Return some rows, or all, in float32."""
        ...

    def read_bytes(self, first: int = 0, count: int | None = None) -> "Bytes":
        """Return some of its bytes, or all, as they are stored."""
        ...


AnyStored = TypeVar("AnyStored", bound=Stored)


@dataclass(frozen=True, kw_only=True)
class _State:
    """What the JSON next to a weight says about it."""

    quant_type: str  # nf4 or fp4
    block_items: int  # weights that share a scale
    dtype: str  # F32, F16 or BF16: what the weight was before
    shape: Shape
    nested_block_items: int  # scales that share a scale; 0 where scales are stored as they are
    nested_offset: float

    @property
    def items(self) -> int:
        return math.prod(self.shape)

    @property
    def blocks(self) -> int:
        return -(-self.items // self.block_items)


@dataclass(frozen=True, kw_only=True)
class FourBitTensor:
    """A matrix of four-bit codes, two in a byte, and a scale for every block of them.

    Blocks count through the whole matrix, so one may begin in a row and end in the next.
    """

    name: str
    packed: Stored
    scales: Stored
    nested_scales: Stored | None  # of the scales, where those are bytes
    nested_codes: Stored | None  # the 256 numbers such a byte means
    state: _State

    @property
    def shape(self) -> Shape:
        """Its dimensions, slowest first."""
        return self.state.shape

    @property
    def dtype(self) -> str:
        """The type its values are rounded to."""
        return self.state.dtype

    @property
    def size_bytes(self) -> int:
        """How much of the checkpoint it takes."""
        return self.packed.size_bytes + self.scales.size_bytes

    def read(self, first_row: int = 0, rows: int | None = None) -> "Values":
        """Return some rows, or all, in float32."""
        import numpy as np

        rows = self.shape[0] - first_row if rows is None else rows
        width = self.shape[1]
        values = np.empty((rows, width), dtype=np.float32)
        step = max(1, _CHUNK_ITEMS // width)
        for row in range(0, rows, step):
            part = values[row : row + step]
            first = (first_row + row) * width
            part[:] = self._items(first, first + part.size).reshape(part.shape)
        return values

    def _items(self, first: int, end: int) -> "Values":
        """Return the values from ``first`` up to ``end``, counted through the whole matrix."""
        import numpy as np

        block_items = self.state.block_items
        first_block, end_block = first // block_items, -(-end // block_items)
        values = np.zeros((end_block - first_block, block_items), dtype=np.float32)
        start = first - first_block * block_items
        inside = values.reshape(-1)[start : start + end - first]
        inside[:] = self._codes(first, end)
        values *= self._scales(first_block, end_block)[:, None]
        return _rounded(inside, self.dtype)

    def _codes(self, first: int, end: int) -> "Values":
        """Return what the codes mean; the upper half of a byte comes first."""
        import numpy as np

        codes = np.array(_CODES[self.state.quant_type], dtype=np.float32)
        byte = np.arange(256)
        pairs = np.stack((codes[byte >> 4], codes[byte & 15]), axis=1)
        first_byte, end_byte = first // 2, -(-end // 2)
        packed = self.packed.read_bytes(first_byte, end_byte - first_byte)
        return pairs[packed].reshape(-1)[first - 2 * first_byte : end - 2 * first_byte]

    def _scales(self, first: int, end: int) -> "Values":
        import numpy as np

        if self.nested_scales is None or self.nested_codes is None:
            scales = self.scales.read(first, end - first)
        else:
            block_items = self.state.nested_block_items
            block = np.arange(first, end) // block_items
            with np.errstate(all="ignore"):
                scales = self.nested_codes.read()[self.scales.read_bytes(first, end - first)]
                scales = scales * self.nested_scales.read()[block]
                scales += np.float32(self.state.nested_offset)
        if not np.isfinite(scales).all():
            raise UsageError(
                f"{self.name}.absmax in {self.scales.path} gives a scale that is NaN or infinite",
                hint=_DAMAGED,
            )
        return scales


def _rounded(values: "Values", dtype: str) -> "Values":
    """Round finite numbers to a type, ties to even, and return them as float32."""
    import numpy as np

    if dtype == "F32":
        return values
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    return from_bfloat16(bfloat16(values))


def is_four_bit(fields: Mapping[str, Any], *, origin: str) -> bool:
    """Tell whether a model's config says that bitsandbytes quantized it to four bits.

    Raises:
        UsageError: If it is quantized in another way; the message names that.
    """
    settings = fields.get(FIELD)
    if settings is None:
        return False
    if not isinstance(settings, dict):
        raise UsageError(f"{origin}: {FIELD} = {settings!r}, expected an object")
    method = settings.get("quant_method")
    # Before transformers 4.36 there was one method, and no name for it.
    if str(method or "bitsandbytes").startswith("bitsandbytes"):
        if settings.get("load_in_4bit") is True:
            return True
        method = "bitsandbytes in 8 bits (LLM.int8)" if settings.get("load_in_8bit") else method
    raise UsageError(
        f"{origin}: the weights are quantized by {method or 'an unnamed method'}, {_SUPPORTED}",
        hint=_HINT,
    )


def dequantized(
    tensors: Mapping[str, AnyStored], *, origin: Path
) -> tuple[dict[str, AnyStored | FourBitTensor], str]:
    """Put every quantized weight of a checkpoint and what belongs to it into one tensor.

    Only what is small is read: the JSON and the sixteen codes of each.

    Args:
        tensors: All of the checkpoint, by name.
        origin: The model directory, for messages.

    Returns:
        The tensors of the decoder, and how they were quantized: ``nf4``.

    Raises:
        UsageError: If something is missing, of another shape or type, or left over.
    """
    rest: dict[str, AnyStored | FourBitTensor] = dict(tensors)
    kinds = set()
    for key in [name for name in tensors if _STATE in name]:
        name, _, quant_type = key.partition(_STATE)
        if isinstance(rest.get(name), FourBitTensor):
            raise UsageError(f"{origin} says twice how {name} is quantized", hint=_DAMAGED)
        weight = _weight(name, quant_type, tensors)
        for used in (key, *(name + part for part in _PARTS)):
            rest.pop(used, None)
        rest[name] = weight
        kinds.add(quant_type)
    if not kinds:
        raise UsageError(
            f"{origin} says it is quantized by bitsandbytes and none of its tensors is",
            hint=f"remove {FIELD} from its config.json if the weights are ordinary ones",
        )
    for name, tensor in rest.items():
        if tensor.dtype == "U8" or name.endswith(_PARTS):
            raise UsageError(f"{origin} lacks what bitsandbytes says about {name}", hint=_DAMAGED)
    return rest, " and ".join(sorted(kinds))


def _weight(name: str, quant_type: str, tensors: Mapping[str, Stored]) -> FourBitTensor:
    state = _read_state(name, quant_type, tensors[f"{name}{_STATE}{quant_type}"])
    packed = _part(name, tensors)
    if len(packed.shape) != 2 or packed.shape[1] != 1 or packed.size_bytes != -(-state.items // 2):
        raise UsageError(
            f"{packed.path}: {name} has shape {list(packed.shape)} of {packed.dtype}, expected the "
            f"{-(-state.items // 2)} bytes of {list(state.shape)} in one column",
            hint=_DAMAGED,
        )
    _refuse_other_codes(name, quant_type, _part(f"{name}.quant_map", tensors, shape=(16,)))
    scales = _part(f"{name}.absmax", tensors, shape=(state.blocks,))
    is_nested = state.nested_block_items > 0
    if (scales.dtype == "U8") != is_nested:
        raise UsageError(
            f"{scales.path}: {name}.absmax is {scales.dtype}, its quant_state says that scales are "
            f"{'quantized' if is_nested else 'not quantized'}",
            hint=_DAMAGED,
        )
    nested_blocks = -(-state.blocks // state.nested_block_items) if is_nested else 0
    nested, codes = f"{name}.nested_absmax", f"{name}.nested_quant_map"
    return FourBitTensor(
        name=name,
        packed=packed,
        scales=scales,
        nested_scales=_part(nested, tensors, shape=(nested_blocks,)) if is_nested else None,
        nested_codes=_part(codes, tensors, shape=(256,)) if is_nested else None,
        state=state,
    )


def _part(name: str, tensors: Mapping[str, Stored], *, shape: Shape | None = None) -> Stored:
    tensor = tensors.get(name)
    if tensor is None:
        raise UsageError(f"the quantized checkpoint lacks the tensor {name}", hint=_DAMAGED)
    if shape is not None and tensor.shape != shape:
        raise UsageError(
            f"{tensor.path}: {name} has shape {list(tensor.shape)}, expected {list(shape)}",
            hint=_DAMAGED,
        )
    return tensor


def _refuse_other_codes(name: str, quant_type: str, stored: Stored) -> None:
    import numpy as np

    expected = np.array(_CODES[quant_type], dtype=np.float32)
    # bitsandbytes itself takes its own codes and compares with this tolerance.
    if stored.dtype != "F32" or not np.allclose(stored.read(), expected, rtol=0, atol=1e-6):
        raise UsageError(
            f"{stored.path}: {name}.quant_map does not hold the sixteen codes of {quant_type}",
            hint=_DAMAGED,
        )


def _read_state(name: str, quant_type: str, stored: Stored) -> _State:
    origin = f"{stored.path}: {name}{_STATE}{quant_type}"
    config = Config(_state_fields(stored, origin), origin=origin)
    if quant_type not in _CODES or config.get("quant_type", "") != quant_type:
        raise UsageError(
            f"{origin} says {config.get('quant_type', '')!r}, expected its own nf4 or fp4",
            hint=_DAMAGED,
        )
    dtype = config.get("dtype", "")
    if dtype not in _DTYPES:
        raise UsageError(
            f"{origin}: dtype = {dtype!r}, expected one of {', '.join(_DTYPES)}", hint=_DAMAGED
        )
    state = _State(
        quant_type=quant_type,
        block_items=_block_items(config, "blocksize"),
        dtype=_DTYPES[dtype],
        shape=_shape(config),
        nested_block_items=_block_items(config, "nested_blocksize")
        if "nested_blocksize" in config
        else 0,
        nested_offset=_offset(config),
    )
    config.expect(nested_dtype="float32")
    config.refuse_unread()
    return state


def _state_fields(stored: Stored, origin: str) -> dict[str, Any]:
    if stored.dtype != "U8" or len(stored.shape) != 1 or stored.size_bytes > _MAX_STATE_BYTES:
        raise UsageError(
            f"{origin} has shape {list(stored.shape)} of {stored.dtype}, expected at most "
            f"{_MAX_STATE_BYTES} bytes of JSON",
            hint=_DAMAGED,
        )
    return parse_object(stored.read_bytes().tobytes(), origin=origin, hint=_DAMAGED)


def _block_items(config: Config, field: str) -> int:
    items = config.integer(field)
    if items not in _BLOCK_ITEMS:
        raise UsageError(
            f"{config.origin}: {field} = {items}, expected one of "
            f"{', '.join(map(str, _BLOCK_ITEMS))}",
            hint=_DAMAGED,
        )
    return items


def _shape(config: Config) -> Shape:
    shape = config.get("shape", list[Any]())
    if len(shape) != 2 or not all(type(size) is int and 0 < size < 2**31 for size in shape):
        raise UsageError(
            f"{config.origin}: shape = {shape!r}, expected two positive integers", hint=_DAMAGED
        )
    return tuple(shape)


def _offset(config: Config) -> float:
    offset = config.get("nested_offset", 0.0)
    if not abs(offset) < 2.0**127:  # also what is not a number
        raise UsageError(f"{config.origin}: nested_offset = {offset!r}, expected a number")
    return offset
