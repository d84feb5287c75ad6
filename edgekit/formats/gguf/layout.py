"""The file format: exact headers, a writer that streams, a reader that trusts nothing.

A file is a header (metadata, then one entry per tensor), padding, and the tensors, each padded.
All integers are little-endian. Shapes here are slowest axis first, as in numpy; the file has them
the other way round. Source: docs/gguf.md of ggml, and ggml/src/gguf.cpp of llama.cpp 0c1e57098.
"""

import math
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self, cast

from edgekit.encodings.files import require_file
from edgekit.errors import MissingDependencyError, UsageError
from edgekit.model.shapes import Shape
from edgekit.quant.recipe import TensorType


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from _typeshed import ReadableBuffer


MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT_BYTES = 32  # general.alignment where a file does not say otherwise
ALIGNMENT_KEY = "general.alignment"
MAX_NAME_BYTES = 63  # GGML_MAX_NAME in ggml.h, less the terminating zero
MAX_KEY_BYTES = 65535  # docs/gguf.md
MAX_DIMENSIONS = 4  # GGML_MAX_DIMS in ggml.h
MAX_ITEMS = 2**63 - 1  # ggml counts in int64

Value = tuple[str, Any]  # ("uint32", 5), ("string", "x"), ("array[float32]", [0.5, 1.0])

_TYPE_NUMBERS = {
    "uint8": 0, "int8": 1, "uint16": 2, "int16": 3, "uint32": 4, "int32": 5, "float32": 6,
    "bool": 7, "string": 8, "array": 9, "uint64": 10, "int64": 11, "float64": 12,
}  # fmt: skip
_TYPE_WORDS = {number: word for word, number in _TYPE_NUMBERS.items()}
_CODES = {  # of the struct module
    "uint8": "B", "int8": "b", "uint16": "H", "int16": "h", "uint32": "I", "int32": "i",
    "float32": "f", "bool": "?", "uint64": "Q", "int64": "q", "float64": "d",
}  # fmt: skip

# Number in the file, weights per block, bytes per block: enum ggml_type in ggml.h and the structs
# in ggml-common.h. The numbers between were given to tensor types that are gone.
_TENSOR_TYPES = {
    "F32": (0, 1, 4), "F16": (1, 1, 2), "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22), "Q5_1": (7, 32, 24), "Q8_0": (8, 32, 34), "Q8_1": (9, 32, 36),
    "Q2_K": (10, 256, 84), "Q3_K": (11, 256, 110), "Q4_K": (12, 256, 144), "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210), "Q8_K": (15, 256, 292), "IQ2_XXS": (16, 256, 66),
    "IQ2_XS": (17, 256, 74), "IQ3_XXS": (18, 256, 98), "IQ1_S": (19, 256, 50),
    "IQ4_NL": (20, 32, 18), "IQ3_S": (21, 256, 110), "IQ2_S": (22, 256, 82),
    "IQ4_XS": (23, 256, 136), "I8": (24, 1, 1), "I16": (25, 1, 2), "I32": (26, 1, 4),
    "I64": (27, 1, 8), "F64": (28, 1, 8), "IQ1_M": (29, 256, 56), "BF16": (30, 1, 2),
    "TQ1_0": (34, 256, 54), "TQ2_0": (35, 256, 66), "MXFP4": (39, 32, 17), "NVFP4": (40, 64, 36),
    "Q1_0": (41, 128, 18), "Q2_0": (42, 64, 18),
}  # fmt: skip
ALL_TENSOR_TYPES: Mapping[str, TensorType] = {
    name: TensorType(name=name, block_weights=weights, block_bytes=size)
    for name, (_, weights, size) in _TENSOR_TYPES.items()
}
TENSOR_TYPE_NUMBERS: Mapping[str, int] = {
    name: number for name, (number, _, _) in _TENSOR_TYPES.items()
}
_STORAGE_WORDS = {number: name for name, number in TENSOR_TYPE_NUMBERS.items()}


# What a header says


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One tensor of a file to be written.

    Raises:
        ValueError: If GGUF cannot hold such a tensor.
    """

    name: str
    shape: Shape  # slowest axis first
    tensor_type: str

    def __post_init__(self) -> None:
        tensor_type = ALL_TENSOR_TYPES[self.tensor_type]
        if not 0 < len(self.name.encode()) <= MAX_NAME_BYTES:
            raise ValueError(f"a tensor's name has 1 to {MAX_NAME_BYTES} bytes, not {self.name!r}")
        if not 0 < len(self.shape) <= MAX_DIMENSIONS or min(self.shape) < 1:
            raise ValueError(f"{self.name} cannot have the shape {list(self.shape)}")
        if self.shape[-1] % tensor_type.block_weights:
            raise ValueError(f"{self.name}: {self.shape[-1]} columns do not fill {tensor_type}")

    @property
    def size_bytes(self) -> int:
        """What its numbers take, without padding."""
        return _size_bytes(self.shape, ALL_TENSOR_TYPES[self.tensor_type])


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One tensor of a file that was read."""

    name: str
    shape: Shape  # slowest axis first
    tensor_type: str
    offset: int  # from the start of the file
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class GgufFile:
    """What the header of a file says, checked against the file's length."""

    path: Path
    version: int
    metadata: Mapping[str, Any]  # plain numbers, strings, booleans and lists of them
    tensors: tuple[TensorInfo, ...]


def _size_bytes(shape: Shape, tensor_type: TensorType) -> int:
    return math.prod(shape) // tensor_type.block_weights * tensor_type.block_bytes


def padded(size_bytes: int, alignment: int = ALIGNMENT_BYTES) -> int:
    """Round up to where the next tensor may begin."""
    return -(-size_bytes // alignment) * alignment


# Writing


def encode_header(metadata: Mapping[str, Value], tensors: Sequence[TensorEntry]) -> bytes:
    """Return everything before the first tensor, padding included.

    Raises:
        ValueError: If a value has no such type, or two tensors have one name.
    """
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise ValueError("two tensors have one name")
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    parts += [_encode_string(key) + _encode_value(value) for key, value in metadata.items()]
    offset = 0
    for tensor in tensors:
        parts.append(_encode_entry(tensor, offset))
        offset += padded(tensor.size_bytes)
    header = b"".join(parts)
    return header.ljust(padded(len(header)), b"\0")


def file_bytes(metadata: Mapping[str, Value], tensors: Sequence[TensorEntry]) -> int:
    """Return the size of the file that `Writer` would write."""
    payloads = sum(padded(tensor.size_bytes) for tensor in tensors)
    return _header_bytes(metadata, tensors) + payloads


def _header_bytes(metadata: Mapping[str, Value], tensors: Sequence[TensorEntry]) -> int:
    """Return the length of `encode_header` without encoding: a plan asks for every recipe."""
    keys = sum(8 + len(key.encode()) + 4 + _value_bytes(value) for key, value in metadata.items())
    entries = sum(8 + len(t.name.encode()) + 4 + 8 * len(t.shape) + 4 + 8 for t in tensors)
    return padded(len(MAGIC) + 4 + 8 + 8 + keys + entries)


def _value_bytes(value: Value) -> int:
    word, content = value
    item = word.removeprefix("array[").removesuffix("]")
    items, prefix = (content, 4 + 8) if item != word else ([content], 0)
    if item == "string":
        return prefix + 8 * len(items) + len("".join(items).encode())
    return prefix + len(items) * struct.calcsize(f"<{_CODES[item]}")


def _encode_entry(tensor: TensorEntry, offset: int) -> bytes:
    dimensions = len(tensor.shape)
    shape = struct.pack(f"<I{dimensions}Q", dimensions, *reversed(tensor.shape))
    place = struct.pack("<IQ", TENSOR_TYPE_NUMBERS[tensor.tensor_type], offset)
    return _encode_string(tensor.name) + shape + place


def _encode_value(value: Value) -> bytes:
    word, content = value
    item = word.removeprefix("array[").removesuffix("]")
    if item not in _TYPE_NUMBERS or item == "array":
        raise ValueError(f"GGUF has no type {word!r}")
    if item == word:
        return struct.pack("<I", _TYPE_NUMBERS[word]) + _encode_items(word, [content])
    prefix = struct.pack("<IIQ", _TYPE_NUMBERS["array"], _TYPE_NUMBERS[item], len(content))
    return prefix + _encode_items(item, content)


def _encode_items(word: str, items: Sequence[Any]) -> bytes:
    if word == "string":
        return _encode_strings(items)
    try:
        return struct.pack(f"<{len(items)}{_CODES[word]}", *items)
    except (struct.error, OverflowError) as error:
        raise ValueError(f"not every item is a {word}: {error}") from error


def _encode_strings(texts: Sequence[str]) -> bytes:
    """Return each text with its length before it; a vocabulary has hundreds of thousands."""
    encoded = [text.encode() for text in texts]
    lengths = struct.pack(f"<{len(encoded)}Q", *map(len, encoded))
    starts = range(0, len(lengths), 8)
    return b"".join(
        part
        for at, text in zip(starts, encoded, strict=True)
        for part in (lengths[at : at + 8], text)
    )


def _encode_string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


class Writer:
    """Writes a file, the tensors in the order of the header, in pieces of any size.

    A context manager: where the block fails, or ends before the last tensor, no file stays.
    """

    def __init__(
        self, path: Path, metadata: Mapping[str, Value], tensors: Sequence[TensorEntry]
    ) -> None:
        self._path = path
        self._header = encode_header(metadata, tensors)
        self._tensors = tensors
        self._current = 0  # index of the tensor that is being written
        self._written_bytes = 0  # of this tensor
        self._file: BinaryIO

    def __enter__(self) -> Self:
        with _explained(self._path):
            self._file = self._path.open("wb")
        try:
            with _explained(self._path):
                self._file.write(self._header)
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, name: str, payload: "ReadableBuffer | npt.NDArray[Any]") -> None:
        """Append to the tensor ``name``, which is the first one that is not complete.

        Raises:
            UsageError: If the file cannot be written; a full disk, for one.
            ValueError: If it is another tensor's turn, or the tensor would become too long.
        """
        if self._current == len(self._tensors) or self._tensors[self._current].name != name:
            raise ValueError(f"it is not the turn of {name}")
        tensor = self._tensors[self._current]
        piece = memoryview(cast("ReadableBuffer", payload))  # arrays are, since Python 3.12
        self._written_bytes += piece.nbytes
        if self._written_bytes > tensor.size_bytes:
            raise ValueError(f"{name} takes {tensor.size_bytes} bytes, got {self._written_bytes}")
        with _explained(self._path):
            self._file.write(piece)
            if self._written_bytes == tensor.size_bytes:
                self._finish(tensor)

    def _finish(self, tensor: TensorEntry) -> None:
        self._file.write(bytes(padded(tensor.size_bytes) - tensor.size_bytes))
        self._current += 1
        self._written_bytes = 0

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._discard()
            return
        try:
            with _explained(self._path):
                self._file.close()  # flushes, so the disk may be full only now
            self._refuse_incomplete()
        except BaseException:
            self._discard()
            raise

    def _refuse_incomplete(self) -> None:
        if self._current < len(self._tensors):
            raise ValueError(f"{self._path} lacks {self._tensors[self._current].name}")

    def _discard(self) -> None:
        with suppress(OSError):  # a full disk cannot take what is still in the buffer
            self._file.close()
        self._path.unlink(missing_ok=True)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


# Reading

# What any header may take, however small the file: llama.cpp's own vocabulary of Gemma 4, 262,144
# tokens and 514,906 merges in 15 MiB, takes 74 MiB.
_MEMORY_FLOOR_BYTES = 256 * 2**20
_NUMBER_BYTES = 56  # an int, its places in a tuple and then a list, the bytes it came from
_STRING_BYTES = 16  # a place in a list and what the allocator rounds up, besides the text itself
_LONG_STRING_BYTES = 256  # from here on the cost is weighed before the text is decoded
_KEY_BYTES = 256  # a dict entry with its objects, rounded up
_TENSOR_BYTES = 640  # a TensorInfo with its objects, rounded up
_MIN_KEY_BYTES = 8 + 1 + 4 + 1  # length, one letter, type, the smallest value
_MIN_ENTRY_BYTES = 8 + 1 + 4 + 8 + 4 + 8  # length, one letter, dimensions, one, tensor type, offset


def read(path: Path) -> GgufFile:
    """Read a header and check all of it; no tensor is loaded.

    It takes at most 256 MiB, or twice the size of the file if that is more, whatever the file says.

    Raises:
        UsageError: If it is not a GGUF file, or damaged; names the file, the field and the byte.
    """
    require_file(path)
    try:
        with path.open("rb", buffering=2**16) as file:
            return _read(_Cursor(path, file))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error


def read_tensor(
    file: GgufFile, info: TensorInfo, *, first_row: int = 0, rows: int | None = None
) -> "npt.NDArray[np.float32]":
    """Return some rows of a tensor, or all, as float32; a row is all that shares a first index.

    Raises:
        UsageError: If the tensor type has no decoder, or the file became shorter.
    """
    rows = info.shape[0] - first_row if rows is None else rows
    if not 0 <= first_row < first_row + rows <= info.shape[0]:
        raise ValueError(f"{info.name} has no rows {first_row} to {first_row + rows}")
    if len(info.shape) == 1:  # its rows are smaller than a block
        return _decode(file, info, info.offset, info.shape)[first_row : first_row + rows]
    row_bytes = info.size_bytes // info.shape[0]
    return _decode(file, info, info.offset + first_row * row_bytes, (rows, *info.shape[1:]))


def _decode(
    file: GgufFile, info: TensorInfo, offset: int, shape: Shape
) -> "npt.NDArray[np.float32]":
    import numpy as np

    size_bytes = _size_bytes(shape, ALL_TENSOR_TYPES[info.tensor_type])
    encoded = np.fromfile(file.path, dtype=np.uint8, count=size_bytes, offset=offset)
    if encoded.size != size_bytes:
        raise UsageError(f"{file.path}: {info.name} ends early, at byte {offset + encoded.size}")
    try:
        return _dequantize(encoded, info.tensor_type, shape)
    except (KeyError, NotImplementedError) as error:
        raise UsageError(
            f"{file.path}: {info.name} has the tensor type {info.tensor_type}, "
            "which edgekit cannot decode",
            hint="take the checkpoint, or a file stored as F16, BF16 or Q8_0",
        ) from error


def _dequantize(
    encoded: "npt.NDArray[np.uint8]", tensor_type: str, shape: Shape
) -> "npt.NDArray[np.float32]":
    import numpy as np

    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError as error:
        raise MissingDependencyError(
            "reading a tensor of a GGUF file needs the package gguf",
            hint="pip install 'edgekit[gguf]'",
        ) from error
    row_bytes = _size_bytes(shape[-1:], ALL_TENSOR_TYPES[tensor_type])
    with np.errstate(over="ignore", invalid="ignore"):  # a damaged scale is the caller's to see
        values = quants.dequantize(
            encoded.reshape(-1, row_bytes), GGMLQuantizationType[tensor_type]
        )
    return np.asarray(values, dtype=np.float32).reshape(shape)


class _Cursor:
    """Takes a header piece by piece, and knows where it is when something is wrong."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.size_bytes = path.stat().st_size
        self.position = 0
        self._file = file
        self._memory_bytes = max(_MEMORY_FLOOR_BYTES, 2 * self.size_bytes)

    @property
    def remaining_bytes(self) -> int:
        return self.size_bytes - self.position

    def refuse(self, field: str, problem: str, *, at: int | None = None) -> UsageError:
        position = self.position if at is None else at
        return UsageError(f"{self.path}: {field} at byte {position} {problem}")

    def take(self, count: int, field: str) -> bytes:
        if count > self.remaining_bytes:
            raise self.refuse(field, f"needs {count} bytes, the file has {self.remaining_bytes}")
        piece = self._file.read(count)
        if len(piece) != count:
            raise self.refuse(field, "is gone: the file became shorter while it was read")
        self.position += count
        return piece

    def number(self, word: str, field: str) -> Any:
        code = f"<{_CODES[word]}"
        return struct.unpack(code, self.take(struct.calcsize(code), field))[0]

    def string(self, field: str) -> str:
        length = self.number("uint64", f"the length of {field}")
        start = self.position
        if length > _LONG_STRING_BYTES:  # up to four bytes a letter, besides the encoded ones
            self.spend(5 * length, field)
        try:
            text = self.take(length, field).decode()
        except UnicodeDecodeError as error:
            raise self.refuse(field, "is not UTF-8", at=start + error.start) from error
        if length <= _LONG_STRING_BYTES:
            self.spend(_STRING_BYTES + sys.getsizeof(text), field)
        return text

    def spend(self, memory_bytes: int, field: str) -> None:
        self._memory_bytes -= memory_bytes
        if self._memory_bytes < 0:
            raise self.refuse(field, f"is too large for a file of {self.size_bytes} bytes")


def _read(cursor: _Cursor) -> GgufFile:
    version, tensor_count, key_count = _read_counts(cursor)
    metadata = _read_metadata(cursor, key_count)
    alignment = metadata.get(ALIGNMENT_KEY, ALIGNMENT_BYTES)
    entries = [_read_entry(cursor, index) for index in range(tensor_count)]
    tensors = _place(cursor, entries, alignment)
    return GgufFile(path=cursor.path, version=version, metadata=metadata, tensors=tensors)


def _read_counts(cursor: _Cursor) -> tuple[int, int, int]:
    magic = cursor.take(4, "the magic")
    if magic != MAGIC:
        raise cursor.refuse("the magic", f"is {magic!r}, expected {MAGIC!r}", at=0)
    version = cursor.number("uint32", "the version")
    if version and version & 0xFFFF == 0:
        raise cursor.refuse("the version", "is big-endian; edgekit reads little-endian", at=4)
    if version not in {2, VERSION}:
        raise cursor.refuse("the version", f"is {version}, edgekit reads 2 and {VERSION}", at=4)
    tensors = cursor.number("uint64", "the number of tensors")
    keys = cursor.number("uint64", "the number of keys")
    if tensors > cursor.remaining_bytes // _MIN_ENTRY_BYTES:
        raise cursor.refuse("the number of tensors", f"is {tensors}: more than can follow", at=8)
    if keys > cursor.remaining_bytes // _MIN_KEY_BYTES:
        raise cursor.refuse("the number of keys", f"is {keys}: more than can follow", at=16)
    return version, tensors, keys


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for index in range(count):
        start = cursor.position
        cursor.spend(_KEY_BYTES, f"key {index}")
        key = cursor.string(f"key {index}")
        if not 0 < len(key.encode()) <= MAX_KEY_BYTES:
            raise cursor.refuse(f"key {index}", "is empty or too long", at=start)
        if key in metadata:
            raise cursor.refuse(f"key {index}", f"repeats {key!r}", at=start)
        metadata[key] = _read_value(cursor, key)
    return metadata


def _read_value(cursor: _Cursor, key: str) -> Any:
    start = cursor.position
    word = _read_type(cursor, f"the type of {key!r}")
    if key == ALIGNMENT_KEY and word != "uint32":
        raise cursor.refuse(f"the type of {key!r}", f"is {word}, expected uint32", at=start)
    if word == "array":
        return _read_array(cursor, key)
    start = cursor.position
    value = _read_items(cursor, word, 1, key)[0]
    if key == ALIGNMENT_KEY and (value < 1 or value & (value - 1)):
        raise cursor.refuse(key, f"is {value}, no power of two", at=start)
    return value


def _read_type(cursor: _Cursor, field: str) -> str:
    start = cursor.position
    number = cursor.number("uint32", field)
    if number not in _TYPE_WORDS:
        raise cursor.refuse(field, f"is {number}, which GGUF does not define", at=start)
    return _TYPE_WORDS[number]


def _read_array(cursor: _Cursor, key: str) -> list[Any]:
    start = cursor.position
    word = _read_type(cursor, f"the item type of {key!r}")
    if word == "array":  # the format allows it, llama.cpp refuses it
        raise cursor.refuse(key, "is an array of arrays", at=start)
    start = cursor.position
    count = cursor.number("uint64", f"the length of {key!r}")
    item_bytes = 8 if word == "string" else struct.calcsize(f"<{_CODES[word]}")
    if count > cursor.remaining_bytes // item_bytes:
        raise cursor.refuse(f"the length of {key!r}", f"is {count}: too long", at=start)
    return _read_items(cursor, word, count, key)


def _read_items(cursor: _Cursor, word: str, count: int, key: str) -> list[Any]:
    if word == "string":
        return [cursor.string(key) for _ in range(count)]
    cursor.spend(count * _NUMBER_BYTES, key)
    start = cursor.position
    code = f"<{count}{_CODES[word]}"
    encoded = cursor.take(struct.calcsize(code), key)
    if word == "bool" and encoded.strip(b"\0\1"):
        raise cursor.refuse(key, "holds a boolean that is neither 0 nor 1", at=start)
    return list(struct.unpack(code, encoded))


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A tensor's place as the header has it, and where in the header."""

    name: str
    shape: Shape
    tensor_type: str
    offset: int  # from the first tensor
    offset_position: int


def _read_entry(cursor: _Cursor, index: int) -> _Entry:
    cursor.spend(_TENSOR_BYTES, f"tensor {index}")
    start = cursor.position
    name = cursor.string(f"the name of tensor {index}")
    if not 0 < len(name.encode()) <= MAX_NAME_BYTES:
        raise cursor.refuse(f"the name of tensor {index}", "is empty or too long", at=start)
    shape = _read_shape(cursor, name)
    tensor_type = _read_tensor_type(cursor, name, shape)
    position = cursor.position
    offset = cursor.number("uint64", f"the offset of {name!r}")
    return _Entry(
        name=name, shape=shape, tensor_type=tensor_type, offset=offset, offset_position=position
    )


def _read_shape(cursor: _Cursor, name: str) -> Shape:
    field = f"the shape of {name!r}"
    start = cursor.position
    dimensions = cursor.number("uint32", field)
    if not 0 < dimensions <= MAX_DIMENSIONS:
        problem = f"has {dimensions} dimensions, expected 1 to {MAX_DIMENSIONS}"
        raise cursor.refuse(field, problem, at=start)
    shape = tuple(cursor.number("uint64", field) for _ in range(dimensions))[::-1]
    if min(shape) == 0:
        raise cursor.refuse(field, f"is {list(shape)}: it holds nothing", at=start)
    if math.prod(shape) > MAX_ITEMS:
        raise cursor.refuse(field, f"is {list(shape)}: more than ggml can count", at=start)
    return shape


def _read_tensor_type(cursor: _Cursor, name: str, shape: Shape) -> str:
    field = f"the tensor type of {name!r}"
    start = cursor.position
    number = cursor.number("uint32", field)
    if number not in _STORAGE_WORDS:
        raise cursor.refuse(field, f"is {number}, which edgekit does not know", at=start)
    word = _STORAGE_WORDS[number]
    block = ALL_TENSOR_TYPES[word].block_weights
    if shape[-1] % block:
        problem = f"is {word}, whose blocks of {block} do not fill {shape[-1]} columns"
        raise cursor.refuse(field, problem, at=start)
    return word


def _place(cursor: _Cursor, entries: Sequence[_Entry], alignment: int) -> tuple[TensorInfo, ...]:
    """Check that the tensors follow each other without a gap and end with the file."""
    names: set[str] = set()
    header_bytes = padded(cursor.position, alignment)
    end, expected, tensors = cursor.position, 0, []
    for entry in entries:
        _check_offset(cursor, entry, expected, alignment)
        if entry.name in names:
            raise cursor.refuse(f"the tensor {entry.name!r}", "is there twice")
        names.add(entry.name)
        size_bytes = _size_bytes(entry.shape, ALL_TENSOR_TYPES[entry.tensor_type])
        start, end = header_bytes + expected, header_bytes + expected + size_bytes
        if end > cursor.size_bytes:
            problem = f"ends at byte {end}, the file at {cursor.size_bytes}"
            raise cursor.refuse(f"the tensor {entry.name!r}", problem, at=start)
        expected += padded(size_bytes, alignment)
        tensors.append(_info(entry, start, size_bytes))
    if cursor.size_bytes > padded(end, alignment):  # the last padding may be missing
        raise cursor.refuse("the data", "is not part of any tensor", at=padded(end, alignment))
    return tuple(tensors)


def _info(entry: _Entry, offset: int, size_bytes: int) -> TensorInfo:
    return TensorInfo(
        name=entry.name,
        shape=entry.shape,
        tensor_type=entry.tensor_type,
        offset=offset,
        size_bytes=size_bytes,
    )


def _check_offset(cursor: _Cursor, entry: _Entry, expected: int, alignment: int) -> None:
    if entry.offset == expected:
        return
    if entry.offset % alignment:
        problem = f"is {entry.offset}, no multiple of {alignment}"
    elif entry.offset < expected:
        problem = f"is {entry.offset}, inside the tensor before; expected {expected}"
    else:
        problem = f"is {entry.offset}, which leaves a gap; expected {expected}"
    raise cursor.refuse(f"the offset of {entry.name!r}", problem, at=entry.offset_position)
