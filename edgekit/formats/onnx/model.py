"""An ONNX model file: the graph as protocol buffers, the weights in data files next to it.

A hostile or damaged model must end here, not in native code. So places of weights are proven, and
the file ends with a seal, the SHA-256 of all before it, as an entry of its metadata: where a byte
has changed, it is no longer what was exported. The data files are sealed by a bundle's manifest.
Source: onnx/onnx.proto of ONNX 1.18 for the field numbers.
"""

import hashlib
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from edgekit.encodings.files import is_file, require_file
from edgekit.encodings.protobuf import ProtobufMessage, integer, nested, real, text
from edgekit.errors import BundleError
from edgekit.model.shapes import Shape


Dtype = Literal["float32", "float16", "uint8", "int32", "int64"]
Attribute = int | float | str | tuple[int, ...]

# TensorProto.DataType, and the bytes of one item.
_NUMBERS: Mapping[Dtype, int] = {"float32": 1, "uint8": 2, "int32": 6, "int64": 7, "float16": 10}
_DTYPES: Mapping[int, Dtype] = {number: dtype for dtype, number in _NUMBERS.items()}
_ITEM_BYTES: Mapping[Dtype, int] = {
    "float32": 4, "uint8": 1, "int32": 4, "int64": 8, "float16": 2,
}  # fmt: skip
_EXTERNAL = 1  # TensorProto.DataLocation

IR_VERSION = 10  # with opset 21: read since ONNX Runtime 1.18
OPSET = 21
CONTRIB = "com.microsoft"  # operators of ONNX Runtime; version 1 is the only one
# A layer takes 5 KB. Protocol buffers end at 2 GiB; so large a file is not a graph of edgekit's.
MAX_BYTES = 2**26
SEAL = "edgekit.sha256"
_DATA_FILE = re.compile(r"model\w*\.onnx_data(_[1-9]\d{0,3})?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Node:
    """One operator."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    domain: str = ""
    attributes: Mapping[str, Attribute] = field(default_factory=dict)

    def encode(self) -> bytes:
        """Return a NodeProto."""
        return b"".join(
            (
                *(text(1, name) for name in self.inputs),
                *(text(2, name) for name in self.outputs),
                text(3, self.outputs[0]),
                text(4, self.op),
                *(nested(5, _attribute(*item)) for item in self.attributes.items()),
                text(7, self.domain) if self.domain else b"",
            )
        )


def _attribute(name: str, value: Attribute) -> bytes:
    match value:
        case int():
            return text(1, name) + integer(3, value) + integer(20, 2)
        case float():
            return text(1, name) + real(2, value) + integer(20, 1)
        case str():
            return text(1, name) + text(4, value) + integer(20, 3)
        case tuple():
            return text(1, name) + b"".join(integer(8, item) for item in value) + integer(20, 7)


@dataclass(frozen=True, kw_only=True)
class Constant:
    """A small tensor inside the model file."""

    name: str
    dtype: Dtype
    shape: Shape
    values: tuple[int | float, ...]

    def encode(self) -> bytes:
        """Return a TensorProto."""
        letter = {"float32": "f", "int64": "q", "int32": "i", "uint8": "B", "float16": "e"}
        raw = struct.pack(f"<{len(self.values)}{letter[self.dtype]}", *self.values)
        return _tensor(self.name, self.dtype, self.shape) + nested(9, raw)


@dataclass(frozen=True, kw_only=True)
class External:
    """A tensor in a data file."""

    name: str
    dtype: Dtype
    shape: Shape
    file: str = ""
    offset: int = 0

    @property
    def size_bytes(self) -> int:
        """How much of the file it takes."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]

    def encode(self) -> bytes:
        """Return a TensorProto."""
        place = {"location": self.file, "offset": self.offset, "length": self.size_bytes}
        entries = (nested(13, text(1, key), text(2, str(at))) for key, at in place.items())
        return b"".join((_tensor(self.name, self.dtype, self.shape), *entries)) + integer(
            14, _EXTERNAL
        )


def _tensor(name: str, dtype: Dtype, shape: Shape) -> bytes:
    dims = b"".join(integer(1, size) for size in shape)
    return dims + integer(2, _NUMBERS[dtype]) + text(8, name)


@dataclass(frozen=True, kw_only=True)
class Port:
    """An input or output; a name as a dimension means any size."""

    name: str
    dtype: Dtype
    shape: tuple[int | str, ...]

    def encode(self) -> bytes:
        """Return a ValueInfoProto."""
        dims = (
            nested(1, text(2, size) if isinstance(size, str) else integer(1, size))
            for size in self.shape
        )
        tensor = nested(1, integer(1, _NUMBERS[self.dtype]), nested(2, *dims))
        return text(1, self.name) + nested(2, tensor)


@dataclass(frozen=True, kw_only=True)
class OnnxGraph:
    """What a decoder computes, in ONNX's operators."""

    nodes: tuple[Node, ...]
    constants: tuple[Constant, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    metadata: Mapping[str, str]


def encode(graph: OnnxGraph, weights: Sequence[External]) -> bytes:
    """Return a ModelProto."""
    content = (
        *(nested(1, node.encode()) for node in graph.nodes),
        text(2, "decoder"),
        *(nested(5, constant.encode()) for constant in graph.constants),
        *(nested(5, weight.encode()) for weight in weights),
        *(nested(11, port.encode()) for port in graph.inputs),
        *(nested(12, port.encode()) for port in graph.outputs),
    )
    return sealed(
        b"".join(
            (
                integer(1, IR_VERSION),
                text(2, "edgekit"),
                nested(7, *content),
                nested(8, text(1, ""), integer(2, OPSET)),
                nested(8, text(1, CONTRIB), integer(2, 1)),
                *(_metadata(key, value) for key, value in graph.metadata.items()),
            )
        )
    )


def _metadata(key: str, value: str) -> bytes:
    return nested(14, text(1, key), text(2, value))


def sealed(data: bytes) -> bytes:
    """Return a model with its seal."""
    return data + _metadata(SEAL, hashlib.sha256(data).hexdigest())


SEAL_BYTES = len(sealed(b""))


def read(path: Path) -> list[External]:
    """Return the weights of a model file, each proven to lie in a file next to it.

    Raises:
        BundleError: If the file is damaged or a weight would be read from elsewhere; the message
            names the tensor or the offset.
    """
    data = _read_bytes(path)
    whole = ProtobufMessage.whole(data, origin=str(path))
    graph = whole.message(7)
    if graph is None or not graph.messages(1):
        raise BundleError(f"{path} is not an ONNX model: it has no graph")
    _refuse_versions(path, whole)
    found = [_external(path, tensor) for tensor in graph.messages(5) if tensor.integer(14)]
    for tensor in found:
        _refuse_misplaced(path, tensor)
    if data != sealed(data[:-SEAL_BYTES]):
        raise BundleError(
            f"{path} is not as edgekit wrote it: it does not end with its own SHA-256",
            hint="copy it again; edgekit opens no model that another program made or changed",
        )
    return found


def metadata(path: Path) -> dict[str, str]:
    """Return the entries of a model file's metadata.

    Raises:
        BundleError: If the file is damaged.
    """
    whole = ProtobufMessage.whole(_read_bytes(path), origin=str(path))
    return {entry.text(1): entry.text(2) for entry in whole.messages(14)}


def _read_bytes(path: Path) -> bytes:
    require_file(path, refusal=BundleError)
    try:
        size_bytes = path.stat().st_size
        if size_bytes > MAX_BYTES:
            raise BundleError(
                f"{path} has {size_bytes} bytes, a graph without its weights at most {MAX_BYTES}; "
                "ONNX itself ends at 2 GiB"
            )
        return path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error}") from error


def _refuse_versions(path: Path, whole: ProtobufMessage) -> None:
    """Check that operators mean what they meant when edgekit wrote them."""
    version = whole.integer(1)
    if version != IR_VERSION:
        raise BundleError(f"{path} has IR version {version}, this edgekit writes {IR_VERSION}")
    opsets = {entry.text(1): entry.integer(2) for entry in whole.messages(8)}
    if opsets != {"": OPSET, CONTRIB: 1}:
        raise BundleError(f"{path} asks for operators {opsets}, this edgekit writes opset {OPSET}")


def _external(path: Path, tensor: ProtobufMessage) -> External:
    name = tensor.text(8)
    number = tensor.integer(2)
    if number not in _DTYPES:
        raise BundleError(f"{path}: {name} has the data type {number}, which edgekit never writes")
    place = {entry.text(1): entry.text(2) for entry in tensor.messages(13)}
    found = External(
        name=name,
        dtype=_DTYPES[number],
        shape=tuple(tensor.integers(1)),
        file=place.get("location", ""),
        offset=_count(path, name, place, "offset"),
    )
    length = _count(path, name, place, "length")
    if min(found.shape, default=0) < 0 or length != found.size_bytes:
        raise BundleError(f"{path}: {name} of shape {list(found.shape)} claims {length} bytes")
    return found


def _count(path: Path, name: str, place: Mapping[str, str], key: str) -> int:
    value = place.get(key, "")
    if not (value.isascii() and value.isdigit() and len(value) < 19):
        raise BundleError(f"{path}: {name} has the {key} {value!r}, expected a number of bytes")
    return int(value)


def _refuse_misplaced(path: Path, tensor: External) -> None:
    """Check that a tensor lies inside a regular file of this directory.

    A hard link is one: nothing tells it from a copy, and backups and package stores make them. What
    it holds is judged by the manifest, whose SHA-256 another file does not have.
    """
    data_file = path.parent / tensor.file
    if not _DATA_FILE.fullmatch(tensor.file):
        raise BundleError(
            f"{path}: {tensor.name} is in {tensor.file!r}, which is not a data file next to it"
        )
    if data_file.is_symlink():
        raise BundleError(f"{data_file} is a link; weights are read from regular files only")
    if not is_file(data_file, refusal=BundleError):
        raise BundleError(f"{data_file} is missing", hint="copy every file of the bundle")
    size_bytes = data_file.stat().st_size
    if tensor.offset + tensor.size_bytes > size_bytes:
        raise BundleError(
            f"{data_file} has {size_bytes} bytes, {tensor.name} is at {tensor.offset} to "
            f"{tensor.offset + tensor.size_bytes}",
            hint="the file was cut off; copy it again",
        )


def files(path: Path) -> list[Path]:
    """Return a model file and its data files, in order of use."""
    names = dict.fromkeys(tensor.file for tensor in read(path))
    return [path, *(path.parent / name for name in names)]


_PAGE_BYTES = 4096
_ALIGNED_BYTES = 2**20  # from this size on; SaveOptions' default in ONNX Runtime
_SMALL_ALIGNMENT = 64  # a cache line, and the widest vector register


def place(
    tensors: Sequence[External], *, stem: str, split_bytes: int | None = None
) -> Iterator[External]:
    """Yield tensors with their place in the data files, which begin with ``stem``.

    Large ones begin at a page, so that a runtime can map them. The names of more than one file are
    those that transformers.js asks for: ``model.onnx_data``, ``model.onnx_data_1``, …
    """
    number = end = 0
    for tensor in tensors:
        alignment = _PAGE_BYTES if tensor.size_bytes >= _ALIGNED_BYTES else _SMALL_ALIGNMENT
        start = -(-end // alignment) * alignment
        if split_bytes is not None and start and start + tensor.size_bytes > split_bytes:
            number, start = number + 1, 0
        file = f"{stem}_{number}" if number else stem
        yield replace(tensor, file=file, offset=start)
        end = start + tensor.size_bytes


def file_sizes(tensors: Sequence[External]) -> dict[str, int]:
    """Return how large each data file becomes."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        end = tensor.offset + tensor.size_bytes
        sizes[tensor.file] = max(sizes.get(tensor.file, 0), end)
    return sizes


def outputs(path: Path) -> list[str]:
    """Return the names of what a model keeps for the next token.

    Raises:
        BundleError: If the file is damaged.
    """
    graph = ProtobufMessage.whole(_read_bytes(path), origin=str(path)).message(7)
    ports = graph.messages(12) if graph is not None else []
    return [name for port in ports if (name := port.text(1)).startswith("present")]
