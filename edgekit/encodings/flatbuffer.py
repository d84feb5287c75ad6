"""Flatbuffers, read with a look at every offset before it is followed.

Native readers follow offsets that a damaged file may bend; this one refuses to. A table's fields
are found through its vtable, all else through offsets.
Source: https://flatbuffers.dev/internals/.
"""

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn


def refuse(reason: str) -> NoReturn:
    """Say that the bytes are not what they must be.

    Raises:
        struct.error: Always.
    """
    raise struct.error(reason)


@dataclass(frozen=True)
class Buffer:
    """Bytes of which the first few are a flatbuffer."""

    data: bytes | mmap.mmap
    end: int  # of what may be read

    def bytes_at(self, first: int, size: int) -> bytes:
        """Return some bytes.

        Raises:
            struct.error: If they are not all within the flatbuffer; it names the place.
        """
        if first < 0 or first + size > self.end:
            refuse(f"what is at byte {first} leads out of it")
        return self.data[first : first + size]

    def number(self, position: int, kind: str) -> int:
        """Return a number, of a type as `struct` calls it.

        Raises:
            struct.error: As `bytes_at`.
        """
        size = struct.calcsize(f"<{kind}")
        return int(struct.unpack(f"<{kind}", self.bytes_at(position, size))[0])


@dataclass(frozen=True)
class Table:
    """A table; every method raises `struct.error` where an offset leads out of the flatbuffer."""

    buffer: Buffer
    position: int

    @classmethod
    def root(cls, data: bytes | mmap.mmap, *, end: int | None = None) -> "Table":
        """Return the outermost table of a flatbuffer that takes ``end`` bytes; None: all."""
        buffer = Buffer(data, len(data) if end is None else end)
        return cls.at(buffer, buffer.number(0, "I"))

    @classmethod
    def at(cls, buffer: Buffer, position: int) -> "Table":
        """Return the table at a place, once its vtable was looked at."""
        vtable = position - buffer.number(position, "i")
        if not 4 <= buffer.number(vtable, "H") <= buffer.end - vtable:
            refuse(f"what is at byte {position} leads out of it")
        return cls(buffer, position)

    def number(self, index: int, kind: str) -> int:
        """Return a field, as `struct` calls its type; 0 if it is absent."""
        at = self._field(index)
        return 0 if at is None else self.buffer.number(at, kind)

    def numbers(self, index: int, kind: str) -> tuple[int, ...]:
        """Return a vector of numbers, empty if it is absent."""
        size = struct.calcsize(f"<{kind}")
        first, count = self._vector(index, size=size)
        return struct.unpack(f"<{count}{kind}", self.buffer.bytes_at(first, size * count))

    def table(self, index: int) -> "Table":
        """Return a table that must be there."""
        at = self._field(index)
        if at is None:
            refuse("a table is missing")
        return self._followed(at)

    def tables(self, index: int) -> Iterator["Table"]:
        """Yield a vector of tables."""
        first, count = self._vector(index, size=4)
        for at in range(first, first + 4 * count, 4):
            yield self._followed(at)

    def text(self, index: int) -> str:
        """Return a string, empty if it is absent."""
        first, count = self._vector(index, size=1)
        try:
            return self.buffer.bytes_at(first, count).decode()
        except UnicodeDecodeError:
            refuse(f"what is at byte {first} is not UTF-8")

    def _followed(self, at: int) -> "Table":
        return Table.at(self.buffer, at + self.buffer.number(at, "I"))

    def _vector(self, index: int, *, size: int) -> tuple[int, int]:
        """Return where the elements of a vector begin, and their number."""
        at = self._field(index)
        if at is None:
            return 0, 0
        at += self.buffer.number(at, "I")
        count = self.buffer.number(at, "I")
        if count * size > self.buffer.end - at:
            refuse(f"what is at byte {at} leads out of it")
        return at + 4, count

    def _field(self, index: int) -> int | None:
        """Return where a field lies, None if it is absent."""
        vtable = self.position - self.buffer.number(self.position, "i")
        if 4 + 2 * index >= self.buffer.number(vtable, "H"):
            return None
        offset = self.buffer.number(vtable + 4 + 2 * index, "H")
        return self.position + offset if offset else None
