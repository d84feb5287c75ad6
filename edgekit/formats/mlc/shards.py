"""Files of weights: which tensor lies where, and ``tensor-cache.json``, which says it.

Source: tvm.contrib.tvmjs ``dump_tensor_cache`` of TVM 0.26, whose bytes these are.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgekit.encodings.files import is_file
from edgekit.encodings.json_files import read_object
from edgekit.errors import BundleError
from edgekit.formats.mlc.packing import Dtype, PackedTensor


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


SHARD_BYTES = 32 * 2**20
CACHE = "tensor-cache.json"
CACHE_B16 = "tensor-cache-b16.json"  # the same for a loader that does not widen float32
_NO_MD5 = "0" * 32
_FORMAT = "f32-to-bf16"
_MAX_CACHE_BYTES = 100_000_000
_ITEM_BYTES = {"uint32": 4, "float16": 2, "float32": 2}  # a float32 is stored as a bfloat16


@dataclass(frozen=True, kw_only=True)
class Record:
    """Where a tensor lies."""

    tensor: PackedTensor
    file: str
    offset: int


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file and what it holds."""

    file: str
    size_bytes: int
    records: tuple[Record, ...]
    md5: str = _NO_MD5


def place(tensors: Sequence[PackedTensor]) -> list[Shard]:
    """Return the files, in the order in which TVM writes them.

    Tensors are gathered until a file is full; one of half a file or more gets its own at once, so
    its number comes before that of the file still being gathered.
    """
    shards: list[Shard] = []
    gathered: list[PackedTensor] = []
    for tensor in tensors:
        held = sum(other.size_bytes for other in gathered)
        if held + tensor.size_bytes >= SHARD_BYTES:
            if 2 * tensor.size_bytes >= SHARD_BYTES:
                shards.append(_shard([tensor], number=len(shards)))
                continue
            if gathered:
                shards.append(_shard(gathered, number=len(shards)))
            gathered = []
        gathered.append(tensor)
    return [*shards, _shard(gathered, number=len(shards))] if gathered else shards


def _shard(tensors: Sequence[PackedTensor], *, number: int) -> Shard:
    file, offset, records = f"params_shard_{number}.bin", 0, list[Record]()
    for tensor in tensors:
        records.append(Record(tensor=tensor, file=file, offset=offset))
        offset += tensor.size_bytes
    return Shard(file=file, size_bytes=offset, records=tuple(records))


def caches(shards: Sequence[Shard], *, parameters: int) -> dict[str, str]:
    """Return the JSON files that describe the shards, by name.

    Args:
        shards: All files; without their hashes the texts have the same length.
        parameters: How many numbers the checkpoint has.
    """
    tensors = [record.tensor for shard in shards for record in shard.records]
    in_memory = float(sum(tensor.memory_bytes for tensor in tensors))
    metadata = {
        "ParamSize": len(tensors),
        "ParamBytes": in_memory,
        "BitsPerParam": in_memory * 8.0 / parameters,
    }
    found = {CACHE: _json(metadata, shards, is_b16=False)}
    if any(tensor.dtype == "float32" for tensor in tensors):
        found[CACHE_B16] = _json(metadata, shards, is_b16=True)
    return found


def _json(metadata: dict[str, Any], shards: Sequence[Shard], *, is_b16: bool) -> str:
    entries = [
        {
            "dataPath": shard.file,
            "format": "raw-shard",
            "nbytes": shard.size_bytes,
            "records": [_entry(record, is_b16=is_b16) for record in shard.records],
            "md5sum": shard.md5,
        }
        for shard in shards
    ]
    return json.dumps({"metadata": metadata, "records": entries}, indent=4)


def _entry(record: Record, *, is_b16: bool) -> dict[str, Any]:
    tensor = record.tensor
    is_cut = is_b16 and tensor.dtype == "float32"
    return {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "dtype": "bfloat16" if is_cut else tensor.dtype,
        "format": "raw" if is_cut else _FORMAT,
        "nbytes": tensor.size_bytes,
        "byteOffset": record.offset,
    }


def md5_of(path: Path) -> str:
    """Return the hash that TVM writes next to a shard; it guards against accidents only."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def read(path: Path) -> list[Shard]:
    """Return the files that a ``tensor-cache.json`` describes.

    Raises:
        BundleError: If it is missing or damaged; the message names the tensor and the field.
    """
    fields = read_json(path)
    entries = fields.get("records")
    if not isinstance(entries, list) or not entries:
        raise BundleError(f"{path} lists no records: it is not a tensor cache")
    shards = [_read_shard(path, entry) for entry in entries]
    names = [record.tensor.name for shard in shards for record in shard.records]
    files = [shard.file for shard in shards]
    for kind, found in (("tensor", names), ("file", files)):
        twice = next((name for name in found if found.count(name) > 1), None) if (
            len(set(found)) < len(found)
        ) else None  # fmt: skip
        if twice is not None:
            raise BundleError(f"{path} names the {kind} {twice} twice")
    return shards


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of an artifact.

    Raises:
        BundleError: If the file is missing, or is something else.
    """
    if is_file(path, refusal=BundleError) and path.stat().st_size > _MAX_CACHE_BYTES:
        raise BundleError(f"{path} has {path.stat().st_size} bytes: it is none of MLC's")
    return read_object(path, refusal=BundleError, hint="copy the bundle again")


def _read_shard(path: Path, entry: Any) -> Shard:
    file = _field(path, entry, "dataPath", str, "a shard")
    if Path(file).name != file or not file.endswith(".bin"):
        raise BundleError(f"{path} names {file!r}, which is not a shard next to it")
    size_bytes = _field(path, entry, "nbytes", int, file)
    records = [
        _read_record(path, file, record) for record in _field(path, entry, "records", list, file)
    ]
    end = 0
    for record in records:
        if record.offset != end:
            raise BundleError(
                f"{path}: {record.tensor.name} claims to start at byte {record.offset} of {file}, "
                f"expected {end}"
            )
        end += record.tensor.size_bytes
    if end != size_bytes:
        raise BundleError(f"{path}: the tensors of {file} take {end} bytes, not {size_bytes}")
    md5 = _field(path, entry, "md5sum", str, file)
    return Shard(file=file, size_bytes=size_bytes, records=tuple(records), md5=md5)


def _read_record(path: Path, file: str, entry: Any) -> Record:
    name = _field(path, entry, "name", str, file)
    dtype = _field(path, entry, "dtype", str, name)
    shape = _field(path, entry, "shape", list, name)
    if dtype not in _ITEM_BYTES or _field(path, entry, "format", str, name) != _FORMAT:
        raise BundleError(
            f"{path}: {name} is {dtype} as {entry['format']}, expected "
            f"{', '.join(_ITEM_BYTES)} as {_FORMAT}"
        )
    if not all(isinstance(length, int) and 0 < length < 2**31 for length in shape):
        raise BundleError(f"{path}: {name} has shape {shape!r}")
    tensor = PackedTensor(name=name, shape=tuple(shape), dtype=cast("Dtype", dtype))
    if _field(path, entry, "nbytes", int, name) != tensor.size_bytes:
        raise BundleError(
            f"{path}: {name} claims {entry['nbytes']} bytes, its shape takes {tensor.size_bytes}"
        )
    return Record(tensor=tensor, file=file, offset=_field(path, entry, "byteOffset", int, name))


def _field(path: Path, entry: Any, key: str, kind: type, of: str) -> Any:
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise BundleError(f"{path}: {key} of {of} is {value!r}, expected {kind.__name__}")
    return value


def check_files(directory: Path, shards: Sequence[Shard], *, hashes: bool) -> None:
    """Compare the shards on disk with what the tensor cache says.

    Raises:
        BundleError: If one is missing, short, long, or, with ``hashes``, altered.
    """
    for shard in shards:
        path = directory / shard.file
        if not is_file(path, refusal=BundleError):
            raise BundleError(f"{path} is missing", hint="copy the bundle again")
        size = path.stat().st_size
        if size != shard.size_bytes:
            raise BundleError(
                f"{path} has {size} bytes, {CACHE} says {shard.size_bytes}",
                hint="copy the bundle again",
            )
        if hashes and md5_of(path) != shard.md5:
            raise BundleError(
                f"{path} is not what was exported: its MD5 differs", hint="copy the bundle again"
            )


def load(directory: Path, record: Record) -> "npt.NDArray[np.generic]":
    """Return a tensor as it is stored, mapped rather than read; a float32 as the bits of bfloat16.

    Raises:
        BundleError: If the file became shorter.
    """
    import numpy as np

    dtype = {"uint32": "<u4", "float16": "<f2", "float32": "<u2"}[record.tensor.dtype]
    path = directory / record.file
    try:
        return np.memmap(path, dtype, "r", offset=record.offset, shape=record.tensor.shape)
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read: {error}") from error


def files(path: Path) -> Iterator[Path]:
    """Yield the tensor cache, its twin, and the shards."""
    shards = read(path)
    yield path
    if any(record.tensor.dtype == "float32" for shard in shards for record in shard.records):
        yield path.with_name(CACHE_B16)
    yield from (path.with_name(shard.file) for shard in shards)
