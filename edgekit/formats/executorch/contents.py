"""Which weights a ``.pte`` file holds, and how, as XNNPACK and ExecuTorch will read them.

Weights are named data of the program. Their shapes and storages are what the delegates say about
them; those of the embedding, which no delegate need have, what the program says.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from edgekit.errors import BundleError
from edgekit.formats.executorch import program, storage


Entry = tuple[str, tuple[int, ...], str]

_CONSTANT = "constant."  # what the keys of named data that is no weight begin with
_TENSOR = 5  # of the program's KernelTypes
_QUANTISED = 2  # of XNNPACK's XValueUnion
_GROUPED = 4  # of XNNPACK's XNNQuantParams
_XNNPACK_HEADER = struct.Struct("<4sHII")  # after four bytes: magic, length, offset, size
_FLOATS = {1: "F32", 2: "F16"}  # of XNNDatatype
_QCINT8, _QBINT4 = 6, 10
_TABLES = {1: "INT8", 5: "F16", 6: "F32"}  # of the program's ScalarType
_PAIRS, _BFLOAT16 = 0, 15  # a byte of two codes; their scales


@dataclass(frozen=True)
class _Table:
    """A table of a flatbuffer, whose offsets are looked at before they are followed."""

    data: bytes
    position: int

    @classmethod
    def root(cls, data: bytes) -> "_Table":
        return cls(data, _number(data, 0, "I"))

    def number(self, index: int, kind: str) -> int:
        at = self._field(index)
        return 0 if at is None else _number(self.data, at, kind)

    def numbers(self, index: int, kind: str) -> tuple[int, ...]:
        first, count = self._vector(index)
        width = struct.calcsize(f"<{kind}")
        return tuple(_number(self.data, first + width * i, kind) for i in range(count))

    def table(self, index: int) -> "_Table":
        at = self._field(index)
        if at is None:
            _refuse("a table is missing")
        return _Table(self.data, at + _number(self.data, at, "I"))

    def tables(self, index: int) -> Iterator["_Table"]:
        first, count = self._vector(index)
        for at in range(first, first + 4 * count, 4):
            yield _Table(self.data, at + _number(self.data, at, "I"))

    def text(self, index: int) -> str:
        first, count = self._vector(index)
        return self.data[first : first + count].decode()

    def _vector(self, index: int) -> tuple[int, int]:
        at = self._field(index)
        if at is None:
            return 0, 0
        at += _number(self.data, at, "I")
        count = _number(self.data, at, "I")
        if count > len(self.data):
            _refuse("a vector is longer than the file")
        return at + 4, count

    def _field(self, index: int) -> int | None:
        vtable = self.position - _number(self.data, self.position, "i")
        if 4 + 2 * index >= _number(self.data, vtable, "H"):
            return None
        offset = _number(self.data, vtable + 4 + 2 * index, "H")
        return self.position + offset if offset else None


def _number(data: bytes, at: int, kind: str) -> int:
    if at < 0:
        _refuse("an offset leads before the file")
    return int(struct.unpack_from(f"<{kind}", data, at)[0])


def _refuse(reason: str) -> NoReturn:
    raise struct.error(reason)


def contents(path: Path) -> list[Entry]:
    """Return name, shape and storage of every weight of a program.

    Raises:
        BundleError: If the file is damaged, or holds a weight in a way that edgekit never writes.
    """
    head = program.read(path)
    try:
        found = dict(_read(path, head))
        sizes = {key: head.segments[index][1] for key, index in head.named_data}
    except (struct.error, UnicodeDecodeError, IndexError) as error:
        raise BundleError(
            f"{path} is damaged: {error}", hint="copy the bundle again, or export it again"
        ) from error
    for name, (shape, stored) in found.items():
        if stored not in storage.STORAGES or len(shape) not in {1, 2}:
            raise BundleError(f"{path}: {name} is stored in a way that edgekit never writes")
        for part in storage.parts(name, shape, stored):
            if sizes.get(part.key) != part.size_bytes:
                raise BundleError(
                    f"{path}: {part.key} takes {sizes.get(part.key)} bytes, "
                    f"its shape and storage ask for {part.size_bytes}"
                )
    return [(name, shape, stored) for name, (shape, stored) in found.items()]


def _read(path: Path, head: program.Program) -> Iterator[tuple[str, tuple[tuple[int, ...], str]]]:
    with path.open("rb") as file:
        root = _Table.root(file.read(min(first for first, _ in head.segments)))
        (plan, *_) = [*root.tables(1)] or _refuse("the program has no method")
        table = _embedding(plan)
        if table is not None:
            yield "token_embedding", table
        for delegate in plan.tables(7):
            first, size = head.segments[delegate.table(1).number(1, "I")]
            file.seek(first)
            yield from _delegated(file.read(size))


def _embedding(plan: _Table) -> tuple[tuple[int, ...], str] | None:
    """Return the shape and storage of the program's largest constant: the embedding."""
    found: dict[int, tuple[tuple[int, ...], str]] = {}
    scales: dict[int, int] = {}  # how many a row has, by the number of rows
    for shape, kind in _constants(plan):
        if kind in _TABLES or kind == _PAIRS:
            found[math.prod(shape)] = shape, _TABLES.get(kind, "")
        elif kind == _BFLOAT16:
            scales[shape[0]] = shape[1]
    if not found:
        return None
    (rows, columns), stored = found[max(found)]
    return ((rows, columns), stored) if stored else _paired(rows, columns, scales.get(rows, 0))


def _constants(plan: _Table) -> Iterator[tuple[tuple[int, ...], int]]:
    """Yield shape and type of each matrix that is a constant."""
    for value in plan.tables(2):
        if value.number(0, "B") == _TENSOR:
            tensor = value.table(1)
            shape = tensor.numbers(2, "i")
            if tensor.number(5, "I") and len(shape) == 2:
                yield shape, tensor.number(0, "b")


def _paired(rows: int, pairs: int, groups: int) -> tuple[tuple[int, ...], str]:
    if groups < 1:
        _refuse("the embedding has no scales")
    return (rows, 2 * pairs), f"INT4_G{2 * pairs // groups}"


def _delegated(payload: bytes) -> Iterator[tuple[str, tuple[tuple[int, ...], str]]]:
    magic, _, offset, size = _XNNPACK_HEADER.unpack_from(payload, 4)
    if magic != b"XH00":
        _refuse(f"a delegate begins with {magic!r}, expected XNNPACK's XH00")
    graph = _Table.root(payload[offset : offset + size])
    keys = [data.text(2) for data in graph.tables(8)]
    for value in graph.tables(2):
        is_quantised = value.number(0, "B") == _QUANTISED
        outer = value.table(1)
        tensor = outer.table(0) if is_quantised else outer
        index = tensor.number(3, "I")
        if index >= len(keys):
            _refuse(f"a delegate has no data {index}")
        if index and not keys[index].startswith(_CONSTANT):
            yield keys[index], (tensor.numbers(2, "I"), _storage(tensor, outer))


def _storage(tensor: _Table, outer: _Table) -> str:
    kind = tensor.number(0, "h")
    if kind in _FLOATS:
        return _FLOATS[kind]
    if kind == _QCINT8:
        return "INT8"
    if kind == _QBINT4 and outer.number(1, "B") == _GROUPED:
        return f"INT4_G{outer.table(2).number(2, 'i')}"
    return _refuse(f"a delegate has weights of data type {kind}")
