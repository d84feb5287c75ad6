"""Protocol buffers, as far as ONNX and Core ML need them: no schema compiler, no copy of weights.

Writing here keeps two exports equal byte for byte and a plan exact; reading here checks a file on
a device that has no ``onnx`` package, before native code sees it.
Source: https://protobuf.dev/programming-guides/encoding/
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from edgekit.errors import BundleError


_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED_BYTES = {_FIXED64: 8, _FIXED32: 4}
_MAX_VARINT_BYTES = 10  # of 64 bits


def integer(field: int, value: int) -> bytes:
    """Encode an integer; negative ones as 64 bits in two's complement.

    >>> integer(1, 300).hex()
    '08ac02'
    """
    return _varint(field << 3 | _VARINT) + _varint(value & 0xFFFF_FFFF_FFFF_FFFF)


def real(field: int, value: float) -> bytes:
    """Encode a float32."""
    return _varint(field << 3 | _FIXED32) + struct.pack("<f", value)


def nested(field: int, *parts: bytes) -> bytes:
    """Encode bytes, or a message made of parts."""
    content = b"".join(parts)
    return _varint(field << 3 | _BYTES) + _varint(len(content)) + content


def text(field: int, value: str) -> bytes:
    """Encode a string."""
    return nested(field, value.encode())


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


@dataclass(frozen=True, kw_only=True)
class ProtobufMessage:
    """A part of a file that holds fields."""

    data: bytes  # the whole file
    first: int
    end: int
    origin: str

    @classmethod
    def whole(cls, data: bytes, *, origin: str) -> "ProtobufMessage":
        """Return the outermost message of a file."""
        return cls(data=data, first=0, end=len(data), origin=origin)

    def fields(self) -> Iterator["tuple[int, int | ProtobufMessage]"]:
        """Yield the number and value of each field; fixed-width ones are passed over.

        Raises:
            BundleError: If the encoding is broken; the message names the offset.
        """
        at = self.first
        while at < self.end:
            start = at
            tag, at = self._read_varint(at)
            number, kind = tag >> 3, tag & 7
            if kind == _VARINT:
                value, at = self._read_varint(at)
                yield number, value
            elif kind == _BYTES:
                length, at = self._read_varint(at)
                end = self._end(at, length, start)
                yield number, ProtobufMessage(data=self.data, first=at, end=end, origin=self.origin)
                at = end
            elif kind in _FIXED_BYTES:
                at = self._end(at, _FIXED_BYTES[kind], start)
            else:
                raise self._damage(f"a field of unknown kind {kind}", start)

    def integers(self, field: int) -> list[int]:
        """Return the signed integers of a field, packed or not."""
        found: list[int] = []
        for number, value in self.fields():
            if number == field:
                found += [value] if isinstance(value, int) else value._packed()  # noqa: SLF001 - itself
        return [value - (value >> 63 << 64) for value in found]

    def integer(self, field: int) -> int:
        """Return the last value of a field, 0 if it is absent, as protocol buffers define it."""
        return (self.integers(field) or [0])[-1]

    def messages(self, field: int) -> "list[ProtobufMessage]":
        """Return the messages of a field."""
        return [
            value
            for number, value in self.fields()
            if number == field and isinstance(value, ProtobufMessage)
        ]

    def message(self, field: int) -> "ProtobufMessage | None":
        """Return the last message of a field."""
        found = self.messages(field)
        return found[-1] if found else None

    def text(self, field: int) -> str:
        """Return a string, empty if it is absent.

        Raises:
            BundleError: If it is not UTF-8.
        """
        found = self.message(field)
        if found is None:
            return ""
        try:
            return found.content.decode()
        except UnicodeDecodeError:
            raise self._damage("a name that is not UTF-8", found.first) from None

    @property
    def content(self) -> bytes:
        """Its bytes."""
        return self.data[self.first : self.end]

    def _packed(self) -> list[int]:
        found, at = [], self.first
        while at < self.end:
            value, at = self._read_varint(at)
            found.append(value)
        return found

    def _read_varint(self, at: int) -> tuple[int, int]:
        value, start = 0, at
        while at < self.end and at - start < _MAX_VARINT_BYTES:
            byte = self.data[at]
            value |= (byte & 0x7F) << 7 * (at - start)
            at += 1
            if byte < 0x80:
                return value & 0xFFFF_FFFF_FFFF_FFFF, at
        raise self._damage("a number without an end", start)

    def _end(self, at: int, length: int, start: int) -> int:
        if at + length > self.end:
            raise self._damage(f"a field of {length} bytes where {self.end - at} are left", start)
        return at + length

    def _damage(self, what: str, offset: int) -> BundleError:
        return BundleError(f"{self.origin} is damaged: {what} at offset {offset}")
