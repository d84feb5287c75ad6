"""The head of a ``.pte`` file, read without its runtime: what it needs, and whether it is whole.

Native code follows offsets that a damaged file may bend; this reader looks at each before it goes
there. Source: schema/program.fbs, ``file_identifier "ET12"``, and the extended header of
exir/_serialize/_program.py, executorch 1.5.1.
"""

import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgekit.errors import BundleError


IDENTIFIER = b"ET12"
_HEADER_MAGIC = b"eh00"
_HEAD_BYTES = 40  # root offset, identifier, then the extended header of 32 bytes
_MAX_PROGRAM_BYTES = 1 << 30  # the flatbuffer, without weights; 30 layers take 2 MB


@dataclass(frozen=True, kw_only=True)
class Method:
    """One entry point, and what a runtime must have to run it."""

    name: str
    operators: tuple[str, ...]  # ``aten::add.out``, in order of the file
    backends: tuple[str, ...]  # one for each delegated part: ``XnnpackBackend``
    planned_bytes: int  # what is set aside for activations and the cache when it is loaded


@dataclass(frozen=True, kw_only=True)
class Program:
    """What the head of a ``.pte`` file says."""

    methods: tuple[Method, ...]
    segments: tuple[tuple[int, int], ...]  # first byte in the file, and size
    named_data: tuple[tuple[str, int], ...]  # a key, and which of the segments it is

    def method(self, name: str) -> Method | None:
        """Return one entry point, None if there is none of that name."""
        return next((method for method in self.methods if method.name == name), None)


def read(path: Path) -> Program:
    """Return what a ``.pte`` file needs, after a look at every offset on the way.

    Raises:
        BundleError: If it cannot be read, is not a ``.pte`` file, is cut off, or is bent.
    """
    try:
        with path.open("rb") as file, _mapped(file.fileno(), path) as buffer:
            return _Reader(path, buffer).program()
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error


def _mapped(descriptor: int, path: Path) -> mmap.mmap:
    if os.fstat(descriptor).st_size < _HEAD_BYTES:
        raise BundleError(f"{path} is no .pte file: it ends before its header does")
    return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)


class _Reader:
    """A flatbuffer whose every offset is looked at before it is followed."""

    def __init__(self, path: Path, buffer: mmap.mmap) -> None:
        self._path = path
        self._buffer = buffer
        self._end = _HEAD_BYTES  # of what may be read
        self._segment_base = 0

    def program(self) -> Program:
        self._read_header()
        root = self._unsigned(0, "I")
        program = self._table(root)
        plans = list(self._tables(program, 1))
        return Program(
            methods=tuple(self._method(plan) for plan in plans),
            segments=tuple(self._segment(segment) for segment in self._tables(program, 4)),
            named_data=tuple(
                (self._text(named, 0), self._field_value(named, 1, "I"))
                for named in self._tables(program, 7)
            ),
        )

    def _read_header(self) -> None:
        """Refuse what is not a program, of another schema, or shorter than it says."""
        identifier, magic = self._buffer[4:8], self._buffer[8:12]
        if identifier != IDENTIFIER:
            kind = "of another release" if identifier[:2] == IDENTIFIER[:2] else "no .pte file"
            raise BundleError(
                f"{self._path} is {kind}: it says {identifier!r}, expected {IDENTIFIER!r}",
                hint="export again, with the ExecuTorch that will run it",
            )
        if magic != _HEADER_MAGIC or self._unsigned(12, "I") < 24:
            raise BundleError(
                f"{self._path} is damaged: where its header begins is {magic!r}",
                hint="copy the bundle again",
            )
        program_bytes, base = self._unsigned(16, "Q"), self._unsigned(24, "Q")
        segment_bytes = self._unsigned(32, "Q") if self._unsigned(12, "I") >= 32 else 0
        found, said = len(self._buffer), max(program_bytes, base + segment_bytes)
        if said != found:
            fault = "cut off" if said > found else "longer than it says"
            raise BundleError(
                f"{self._path} is {fault}: it has {found} bytes, its header says {said}",
                hint="copy the bundle again",
            )
        if not _HEAD_BYTES < program_bytes <= _MAX_PROGRAM_BYTES or 0 < base < program_bytes:
            raise self._damage(16)
        self._end, self._segment_base = program_bytes, base

    def _method(self, plan: int) -> Method:
        return Method(
            name=self._text(plan, 0),
            operators=tuple(self._operator(table) for table in self._tables(plan, 6)),
            backends=tuple(self._text(table, 0) for table in self._tables(plan, 7)),
            planned_bytes=self._planned_bytes(plan),
        )

    def _operator(self, table: int) -> str:
        name, overload = self._text(table, 0), self._text(table, 1)
        return f"{name}.{overload}" if overload else name

    def _planned_bytes(self, plan: int) -> int:
        first, count = self._vector(plan, 8, size=8)
        sizes = struct.unpack(f"<{count}q", self._bytes(first, 8 * count))
        if any(size < 0 for size in sizes):
            raise self._damage(first)
        return sum(sizes)

    def _segment(self, table: int) -> tuple[int, int]:
        offset, size = (self._field_value(table, index, "Q") for index in (0, 1))
        if self._segment_base + offset + size > len(self._buffer):
            raise self._damage(table)
        return self._segment_base + offset, size

    # The encoding: a table's fields are found through its vtable, all else through offsets.

    def _table(self, position: int) -> int:
        vtable = position - self._signed(position)
        if not 4 <= self._unsigned(vtable, "H") <= self._end - vtable:
            raise self._damage(position)
        return position

    def _field(self, table: int, index: int) -> int | None:
        """Return where a field lies, None if it is absent."""
        vtable = table - self._signed(table)
        if 4 + 2 * index >= self._unsigned(vtable, "H"):
            return None
        offset = self._unsigned(vtable + 4 + 2 * index, "H")
        return table + offset if offset else None

    def _field_value(self, table: int, index: int, kind: str) -> int:
        position = self._field(table, index)
        return 0 if position is None else self._unsigned(position, kind)

    def _vector(self, table: int, index: int, *, size: int) -> tuple[int, int]:
        """Return where the elements of a vector begin, and their number."""
        position = self._field(table, index)
        if position is None:
            return 0, 0
        position += self._unsigned(position, "I")
        count = self._unsigned(position, "I")
        if count * size > self._end - position:
            raise self._damage(position)
        return position + 4, count

    def _tables(self, table: int, index: int) -> Iterator[int]:
        first, count = self._vector(table, index, size=4)
        for position in range(first, first + 4 * count, 4):
            yield self._table(position + self._unsigned(position, "I"))

    def _text(self, table: int, index: int) -> str:
        first, count = self._vector(table, index, size=1)
        try:
            return self._bytes(first, count).decode()
        except UnicodeDecodeError:
            raise self._damage(first) from None

    def _unsigned(self, position: int, kind: str) -> int:
        size = struct.calcsize(f"<{kind}")
        return int(struct.unpack(f"<{kind}", self._bytes(position, size))[0])

    def _signed(self, position: int) -> int:
        return int(struct.unpack("<i", self._bytes(position, 4))[0])

    def _bytes(self, first: int, size: int) -> bytes:
        if first < 0 or first + size > self._end:
            raise self._damage(first)
        return self._buffer[first : first + size]

    def _damage(self, position: int) -> BundleError:
        return BundleError(
            f"{self._path} is damaged: what is at byte {position} leads out of it",
            hint="copy the bundle again",
        )
