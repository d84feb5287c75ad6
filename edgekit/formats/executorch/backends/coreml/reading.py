"""The weights of a program for Core ML, read back as Core ML will read them."""

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from edgekit.encodings.protobuf import ProtobufMessage
from edgekit.errors import BundleError
from edgekit.formats.executorch import program, slopes
from edgekit.formats.executorch.backends import coreml
from edgekit.formats.executorch.backends.coreml import mil, package
from edgekit.formats.executorch.backends.coreml.mil import Blob, Kind


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgekit.formats.executorch.program import Program
    from edgekit.model.shapes import Shape
    from edgekit.model.spec import DecoderSpec

    Rows = npt.NDArray[np.float32]


_MAX_MODEL_BYTES = 1 << 28  # 30 layers take 0.4 MB
_KINDS: Mapping[int, Kind] = {number: kind for kind, number in mil.KINDS.items()}
_TENSOR_TYPES: Mapping[Kind, str] = {"fp32": "F32", "fp16": "F16", "int8": "INT8"}
_TABLE = re.compile("(cosine|sine|zeros|growth)_.*")
_OF_LAYER = re.compile("layers_([0-9]+)_(.*)")


@dataclass(frozen=True, kw_only=True)
class Array:
    """An array in the file of weights."""

    kind: Kind
    shape: "Shape"
    first: int  # in the file

    @property
    def row_bytes(self) -> int:
        """What a row takes."""
        return mil.size_bytes(self.kind, self.shape) // self.shape[0]


@dataclass(frozen=True, kw_only=True)
class CoreMLWeight:
    """A weight."""

    values: Array  # or codes
    scales: Array | None

    @property
    def stored(self) -> str:
        """Its tensor type."""
        if self.values.kind != "int4" or self.scales is None:
            return _TENSOR_TYPES.get(self.values.kind, self.values.kind)
        return f"INT4_G{self.values.shape[1] // self.scales.shape[1]}"


@dataclass(frozen=True, kw_only=True)
class CoreMLWeights:
    """The weights of a program, and what Core ML computes with them."""

    path: Path
    spec: "DecoderSpec"
    held: Mapping[str, CoreMLWeight]  # by role

    def weight(self, role: str, first_row: int = 0, rows: int | None = None) -> "Rows":
        """Return some rows of a weight, or all, in float32."""
        held = self.held[role]
        rows = held.values.shape[0] - first_row if rows is None else rows
        with self.path.open("rb") as file:
            values = _read_rows(file, held.values, first_row, rows)
            if held.scales is None:
                return slopes.from_slopes(role, values)
            scales = _read_rows(file, held.scales, first_row, rows)
        found: Rows = values * scales.repeat(values.shape[1] // scales.shape[1], axis=1)
        return found


def contents(path: Path, head: "Program") -> "list[tuple[str, Shape, str]]":
    """Return role, shape and tensor type of every weight.

    Raises:
        struct.error, BundleError: If the file is damaged.
    """
    return [(role, held.values.shape, held.stored) for role, held in _find(path, head)]


def read_back(path: Path, spec: "DecoderSpec") -> CoreMLWeights:
    """Return the weights of the program at ``path``.

    Args:
        path: A ``.pte`` file.
        spec: What the checkpoint computes.

    Raises:
        struct.error, BundleError: If the file is damaged, or holds another model.
    """
    held = dict(_find(path, program.read(path)))
    found = {role: weight.values.shape for role, weight in held.items()}
    if found != dict(spec.weights()):
        raise BundleError(f"{path} holds another model than this one")
    return CoreMLWeights(path=path, spec=spec.without_unit_offsets(), held=held)


def _find(path: Path, head: "Program") -> Iterator[tuple[str, CoreMLWeight]]:
    method = head.method("forward")
    if method is None or method.backends != (coreml.BACKEND.id,) or len(head.segments) != 2:
        raise struct.error("the program is not one delegate for Core ML")
    _, (first, size) = head.segments  # the first is for constants, and empty
    with path.open("rb") as file:
        tail = _read(file, first + max(0, size - package.MAX_LIST_BYTES), first + size)
        places = package.unpack(tail, size)
        model_at, model_bytes = places.get(package.MODEL, (0, 0))
        if model_bytes > _MAX_MODEL_BYTES:
            raise struct.error(f"the model takes {model_bytes} bytes")
        model = _read(file, first + model_at, first + model_at + model_bytes)
        weights_at, weights_bytes = places.get(package.WEIGHTS, (0, 0))
        finder = _Finder(file, first + weights_at, weights_bytes)
        for operator in _operators(ProtobufMessage.whole(model, origin=str(path))):
            name = _text_of_output(operator)
            if not _TABLE.fullmatch(name):
                held = finder.held(operator)
                if held is not None:
                    yield _OF_LAYER.sub(r"layers.\1.\2", name), held


def _operators(model: ProtobufMessage) -> Iterator[ProtobufMessage]:
    for made in model.messages(502):  # the program
        for function in _entries(made, 2).values():
            for block in _entries(function, 3).values():
                yield from block.messages(3)


def _entries(message: ProtobufMessage, field: int) -> dict[str, ProtobufMessage]:
    """Return a map."""
    return {
        entry.text(1): value
        for entry in message.messages(field)
        if (value := entry.message(2)) is not None
    }


def _text_of_output(operator: ProtobufMessage) -> str:
    outputs = operator.messages(3)
    return outputs[0].text(1) if outputs else ""


class _Finder:
    """Finds the arrays of operators that are constants."""

    def __init__(self, file: BinaryIO, first: int, size_bytes: int) -> None:
        self._file, self._first, self._size_bytes = file, first, size_bytes

    def held(self, operator: ProtobufMessage) -> CoreMLWeight | None:
        """Return what a constant is, None if it is none or stands in the program itself."""
        match operator.text(1):
            case "const":
                value = _entries(operator, 5).get("val")
                array = self._array(value) if value else None
                return CoreMLWeight(values=array, scales=None) if array else None
            case "constexpr_blockwise_shift_scale":
                given = _entries(operator, 2)
                values, scales = (self._bound(given.get(name)) for name in ("data", "scale"))
                return CoreMLWeight(values=values, scales=scales)
            case _:
                return None

    def _bound(self, argument: ProtobufMessage | None) -> Array:
        for binding in argument.messages(1) if argument else ():
            value = binding.message(2)
            array = self._array(value) if value else None
            if array:
                return array
        raise struct.error("a matrix has no codes or no scales")

    def _array(self, value: ProtobufMessage) -> Array | None:
        """Return an array that is in the file of weights, after a look at what it says there."""
        place = value.message(5)
        if place is None:
            return None
        kind, shape = _type(value)
        blob = Blob(
            kind=kind,
            size_bytes=mil.size_bytes(kind, shape),
            offset=place.integer(2),
        )
        if not 0 <= blob.offset <= blob.end <= self._size_bytes:
            raise struct.error(f"an array ends at byte {blob.end} of {self._size_bytes}")
        at = self._first + blob.offset
        if _read(self._file, at, self._first + blob.first) != blob.header:
            raise struct.error(
                f"what is at byte {blob.offset} of the weights is not a {kind} array"
            )
        return Array(kind=kind, shape=shape, first=self._first + blob.first)


def _type(value: ProtobufMessage) -> "tuple[Kind, Shape]":
    outer = value.message(2)
    tensor = outer.message(1) if outer else None
    if tensor is None:
        raise struct.error("an array has no type")
    kind = _KINDS.get(tensor.integer(1))
    shape = tuple(
        constant.integer(1) for length in tensor.messages(3) for constant in length.messages(1)
    )
    if kind is None or kind not in mil.BLOB_KINDS or not shape or min(shape) < 1:
        raise struct.error(f"an array has kind {tensor.integer(1)} and shape {shape}")
    return kind, shape


def _read(file: BinaryIO, first: int, end: int) -> bytes:
    file.seek(first)
    return file.read(end - first)


def _read_rows(file: BinaryIO, array: Array, first_row: int, rows: int) -> "Rows":
    """Return some rows of an array, in float32."""
    import numpy as np

    first = array.first + first_row * array.row_bytes
    content = _read(file, first, first + rows * array.row_bytes)
    shape = (rows, *array.shape[1:])
    if array.kind == "int4":
        pairs = np.frombuffer(content, np.uint8)
        codes = np.stack((pairs & 15, pairs >> 4), -1).astype(np.int8)
        return ((codes ^ 8) - 8).astype(np.float32).reshape(shape)
    dtype = {"fp16": "<f2", "fp32": "<f4", "int8": "<i1"}[array.kind]
    return np.frombuffer(content, dtype).astype(np.float32).reshape(shape)
