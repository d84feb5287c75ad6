"""Core ML's programs, written operator by operator: what ``MIL.proto`` and ``Model.proto`` hold.

A program is a list of operators on named values. Weights and tables are not in it: it names the
place of each in one file, and `Blob` says where that is. Inputs that have a default are written out
where coremltools writes them. Source: mlmodel/format of coremltools 9.0.
"""

import math
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from edgekit.encodings.protobuf import integer, nested, text
from edgekit.model.shapes import Shape


Kind = Literal["bool", "string", "fp16", "fp32", "int8", "int32", "int4"]
KINDS: Mapping[Kind, int] = {
    "bool": 1, "string": 2, "fp16": 10, "fp32": 11, "int8": 21, "int32": 23, "int4": 25,
}  # fmt: skip
_ARRAY_KINDS: Mapping[Kind, int] = {"fp16": 65552, "fp32": 65568, "int32": 131104}
_BITS: Mapping[Kind, int] = {"fp16": 16, "fp32": 32, "int8": 8, "int4": 4}
OPSET, SPECIFICATION = "CoreML8", 9  # of iOS 18 and macOS 15, the first with four-bit blocks
WEIGHTS = "@model_path/weights/weight.bin"
BLOB_ALIGNMENT = 64
_BLOB_HEADER = struct.Struct("<IIQQ40x")  # mark, kind, size, first byte
_FILE_HEADER = struct.Struct("<II56x")  # how many blobs, version
_MARK, _VERSION = 0xDEADBEEF, 2
BLOB_KINDS: Mapping[Kind, int] = {"fp16": 1, "fp32": 2, "int8": 4, "int4": 8}


@dataclass(frozen=True, kw_only=True)
class Value:
    """What an operator gives, or the program gets."""

    name: str
    kind: Kind
    shape: Shape


Plain = bool | int | float | str | list[int]
Operand = Value | tuple[Value, ...] | Plain


@dataclass(frozen=True, kw_only=True)
class Blob:
    """An array in the file of weights."""

    kind: Kind
    size_bytes: int
    offset: int  # of its header; the array follows

    @property
    def first(self) -> int:
        """Where the array begins."""
        return self.offset + _BLOB_HEADER.size

    @property
    def end(self) -> int:
        """Where it ends."""
        return self.first + self.size_bytes

    @property
    def header(self) -> bytes:
        """What stands before it."""
        return _BLOB_HEADER.pack(_MARK, BLOB_KINDS[self.kind], self.size_bytes, self.first)


def size_bytes(kind: Kind, shape: Shape) -> int:
    """Return what an array takes.

    >>> size_bytes("int4", (3, 32))
    48
    """
    return math.prod(shape) * _BITS[kind] // 8


def file_header(blobs: int) -> bytes:
    """Return what a file of weights begins with."""
    return _FILE_HEADER.pack(blobs, _VERSION)


@dataclass(kw_only=True)
class FunctionWriter:
    """Writes the one function of a model."""

    operators: Counter[str] = field(default_factory=Counter)  # how often each is applied
    blobs: dict[str, Blob] = field(default_factory=dict)  # in order of the file
    blobs_end: int = _FILE_HEADER.size
    _written: list[bytes] = field(default_factory=list)
    _constants: dict[str, Value] = field(default_factory=dict)

    def apply(
        self,
        operator: str,
        shape: Shape,
        /,
        *,
        name: str | None = None,
        kind: Kind | None = None,
        **inputs: Operand,
    ) -> Value:
        """Apply an operator; what it gives is of the kind of ``x`` if none is named."""
        operands = {key: self._operands(given) for key, given in inputs.items()}
        self.operators[operator] += 1
        made = Value(
            name=name or f"{operator}_{self.operators[operator]}",
            kind=kind or operands["x"][0].kind,
            shape=shape,
        )
        self._write(operator, made, _bindings(operands))
        return made

    def constant(self, given: Plain) -> Value:
        """Return a small constant, written once however often it is used."""
        looks = f"{type(given).__name__} {given}"
        if looks not in self._constants:
            kind, shape, content = _immediate(given)
            made = Value(name=f"constant_{len(self._constants)}", kind=kind, shape=shape)
            self._constants[looks] = made
            self._write("const", made, _attribute("val", content))
        return self._constants[looks]

    def stored(self, key: str, kind: Kind, shape: Shape) -> Value:
        """Return a constant whose content is in the file of weights."""
        if key not in self._constants:
            made = self._constants[key] = Value(name=identifier(key), kind=kind, shape=shape)
            content = self._place(key, kind, shape)
            self._write("const", made, _attribute("val", content))
        return self._constants[key]

    def scaled(self, key: str, kind: Kind, shape: Shape, *, scales: str, groups: int) -> Value:
        """Return a float16 matrix that is codes times scales, so many in a row."""
        if key not in self._constants:
            made = self._constants[key] = Value(name=identifier(key), kind="fp16", shape=shape)
            data = self._place(key, kind, shape)
            scale = self._place(scales, "fp16", (shape[0], groups))
            inputs = _input("data", nested(2, data)) + _input("scale", nested(2, scale))
            self._write("constexpr_blockwise_shift_scale", made, inputs)
        return self._constants[key]

    def model(self, inputs: Sequence[Value], outputs: Sequence[Value]) -> bytes:
        """Return what ``model.mlmodel`` holds."""
        function = b"".join((
            *(_named(1, value.name, _tensor_type(value.kind, value.shape)) for value in inputs),
            text(2, OPSET),
            _entry(3, OPSET, b"".join((*(text(2, it.name) for it in outputs), *self._written))),
        ))  # fmt: skip
        description = b"".join((
            *(_feature(1, value) for value in inputs),
            *(_feature(10, value) for value in outputs),
        ))  # fmt: skip
        program = integer(1, 1) + _entry(2, "main", function)
        return integer(1, SPECIFICATION) + nested(2, description) + nested(502, program)

    def _operands(self, given: Operand) -> list[Value]:
        if isinstance(given, Value):
            return [given]
        return [*given] if isinstance(given, tuple) else [self.constant(given)]

    def _place(self, key: str, kind: Kind, shape: Shape) -> bytes:
        """Make room in the file of weights, and say where."""
        offset = -(-self.blobs_end // BLOB_ALIGNMENT) * BLOB_ALIGNMENT
        self.blobs[key] = Blob(kind=kind, size_bytes=size_bytes(kind, shape), offset=offset)
        self.blobs_end = self.blobs[key].end
        place = nested(5, text(1, WEIGHTS) + integer(2, offset))
        return nested(2, _tensor_type(kind, shape)) + place

    def _write(self, operator: str, made: Value, content: bytes) -> None:
        outputs = _named(3, made.name, _tensor_type(made.kind, made.shape))
        label = _attribute("name", _immediate(made.name)[2])
        self._written.append(nested(3, text(1, operator), content, outputs, label))


def identifier(key: str) -> str:
    """Return a name as Core ML allows it.

    >>> identifier("layers.3.query")
    'layers_3_query'
    """
    return key.replace(".", "_")


def _bindings(operands: Mapping[str, Sequence[Value]]) -> bytes:
    return b"".join(
        _input(name, *(text(1, value.name) for value in values))
        for name, values in operands.items()
    )


def _input(name: str, *bindings: bytes) -> bytes:
    return _entry(2, name, b"".join(nested(1, binding) for binding in bindings))


def _attribute(name: str, value: bytes) -> bytes:
    return _entry(5, name, value)


def _entry(number: int, key: str, value: bytes) -> bytes:
    """Encode an entry of a map."""
    return nested(number, text(1, key), nested(2, value))


def _named(number: int, name: str, kind: bytes) -> bytes:
    return nested(number, text(1, name), nested(2, kind))


def _tensor_type(kind: Kind, shape: Shape) -> bytes:
    rank = integer(2, len(shape)) if shape else b""
    lengths = (nested(3, nested(1, integer(1, length))) for length in shape)
    return nested(1, integer(1, KINDS[kind]), rank, *lengths)


def _feature(number: int, value: Value) -> bytes:
    shape = b"".join(integer(1, length) for length in value.shape)
    array = nested(5, shape, integer(2, _ARRAY_KINDS[value.kind]))
    return nested(number, text(1, value.name), nested(3, array))


def _immediate(given: Plain) -> tuple[Kind, Shape, bytes]:
    """Return the kind, the shape and the encoding of a constant."""
    kind, shape, content = _content(given)
    tensor = nested(3, nested(1, content))
    return kind, shape, nested(2, _tensor_type(kind, shape)) + tensor


def _content(given: Plain) -> tuple[Kind, Shape, bytes]:
    if isinstance(given, bool):
        return "bool", (), nested(3, nested(1, bytes([given])))
    if isinstance(given, int):
        return "int32", (), nested(2, _packed([given]))
    if isinstance(given, float):
        return "fp32", (), nested(1, nested(1, struct.pack("<f", given)))
    if isinstance(given, str):
        return "string", (), nested(4, text(1, given))
    return "int32", (len(given),), nested(2, _packed(given))


def _packed(numbers: Sequence[int]) -> bytes:
    return nested(1, *(integer(0, number)[1:] for number in numbers))
