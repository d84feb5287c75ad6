"""Flatbuffers inside a ``.pte`` file, read with a look at every offset on the way."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn


@dataclass(frozen=True)
class Table:
    """A table of a flatbuffer, whose offsets are looked at before they are followed."""

    data: bytes
    position: int

    @classmethod
    def root(cls, data: bytes) -> "Table":
        """Return the outermost table."""
        return cls(data, number_at(data, 0, "I"))

    def number(self, index: int, kind: str) -> int:
        """Return a field, as `struct` calls its type; 0 if it is absent."""
        at = self._field(index)
        return 0 if at is None else number_at(self.data, at, kind)

    def numbers(self, index: int, kind: str) -> tuple[int, ...]:
        """Return a vector of numbers, empty if it is absent."""
        first, count = self._vector(index)
        width = struct.calcsize(f"<{kind}")
        return tuple(number_at(self.data, first + width * i, kind) for i in range(count))

    def table(self, index: int) -> "Table":
        """Return a table that must be there."""
        at = self._field(index)
        if at is None:
            refuse("a table is missing")
        return Table(self.data, at + number_at(self.data, at, "I"))

    def tables(self, index: int) -> Iterator["Table"]:
        """Yield a vector of tables."""
        first, count = self._vector(index)
        for at in range(first, first + 4 * count, 4):
            yield Table(self.data, at + number_at(self.data, at, "I"))

    def text(self, index: int) -> str:
        """Return a string, empty if it is absent."""
        first, count = self._vector(index)
        return self.data[first : first + count].decode()

    def _vector(self, index: int) -> tuple[int, int]:
        at = self._field(index)
        if at is None:
            return 0, 0
        at += number_at(self.data, at, "I")
        count = number_at(self.data, at, "I")
        if count > len(self.data):
            refuse("a vector is longer than the file")
        return at + 4, count

    def _field(self, index: int) -> int | None:
        vtable = self.position - number_at(self.data, self.position, "i")
        if 4 + 2 * index >= number_at(self.data, vtable, "H"):
            return None
        offset = number_at(self.data, vtable + 4 + 2 * index, "H")
        return self.position + offset if offset else None


def number_at(data: bytes, at: int, kind: str) -> int:
    """Return a number at a place."""
    if at < 0:
        refuse("an offset leads before the file")
    return int(struct.unpack_from(f"<{kind}", data, at)[0])


def refuse(reason: str) -> NoReturn:
    """Say that the bytes are not what they must be.

    Raises:
        struct.error: Always.
    """
    raise struct.error(reason)
