"""A model of Core ML as ExecuTorch keeps it: the files of a package, one after the other.

A list of them follows, as JSON and back to front, so that a reader begins at the end. Source:
backends/apple/coreml/runtime/inmemoryfs of executorch 1.5.1, and what its wheel makes of a package.
"""

import json
import struct
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from edgekit.formats.executorch.backends.coreml.decoder import CoreMLProgram


METADATA, MANIFEST = "metadata.json", "model.mlpackage/Manifest.json"
_CONTENT = "model.mlpackage/Data/com.apple.CoreML"
MODEL, WEIGHTS = f"{_CONTENT}/model.mlmodel", f"{_CONTENT}/weights/weight.bin"
_DIRECTORIES = ("com.apple.CoreML/model.mlmodel", "com.apple.CoreML/weights")
_FILE, _DIRECTORY = 0, 1
Place = tuple[int, int]  # first byte and size
IDENTIFIER_LETTERS = 64  # of a SHA-256
MAX_LIST_BYTES = 4096  # nine entries take 0.9 KB


@dataclass(frozen=True, kw_only=True)
class Package:
    """Where everything goes."""

    pieces: tuple[tuple[int, bytes], ...]  # what is known
    places: Mapping[str, Place]  # first byte and size of each file
    identifier_at: int  # `IDENTIFIER_LETTERS` there must say what the content is
    size_bytes: int


def pack(made: CoreMLProgram) -> Package:
    """Decide where everything goes."""
    metadata = _metadata(made)
    contents = {METADATA: metadata, WEIGHTS: None, MODEL: made.model, MANIFEST: _manifest()}
    places: dict[str, Place] = {}
    end = 0
    for path, content in contents.items():
        places[path] = end, made.weights_bytes if content is None else len(content)
        end += places[path][1]
    listed = json.dumps({"nodes": _nodes(places)}, separators=(",", ":")).encode()[::-1]
    known = ((places[path][0], content) for path, content in contents.items() if content)
    return Package(
        pieces=(*known, (end, listed)),
        places=places,
        identifier_at=metadata.index(_NO_IDENTIFIER),
        size_bytes=end + len(listed),
    )


_NO_IDENTIFIER = b"0" * IDENTIFIER_LETTERS


def _metadata(made: CoreMLProgram) -> bytes:
    """Return what the runtime reads first; it keeps compiled models by their identifier."""
    fields = {"inputNames": made.inputs, "outputNames": made.outputs}
    return json.dumps({**fields, "identifier": f"edgekit_{_NO_IDENTIFIER.decode()}"}).encode()


def _manifest() -> bytes:
    """Return the list of a package's items, each under a UUID that is the same everywhere."""
    names = {path: str(uuid.uuid5(uuid.NAMESPACE_URL, path)) for path in _DIRECTORIES}
    items = {
        names[path]: {
            "author": "com.apple.CoreML",
            "description": f"CoreML Model {description}",
            "name": path.rpartition("/")[2],
            "path": path,
        }
        for path, description in zip(_DIRECTORIES, ("Specification", "Weights"), strict=True)
    }
    fields = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": items,
        "rootModelIdentifier": names[_DIRECTORIES[0]],
    }
    return json.dumps(fields, indent=4).encode()


def _nodes(places: Mapping[str, Place]) -> list[dict[str, Any]]:
    """Return files and directories, each directory after what it holds, the root last."""
    root: dict[str, Any] = {}
    for path, place in places.items():
        *directories, name = path.split("/")
        directory = root
        for part in directories:
            directory = directory.setdefault(part, {})
        directory[name] = place
    nodes: list[dict[str, Any]] = []
    _add_node(nodes, "model", root)
    return nodes


def _add_node(nodes: list[dict[str, Any]], name: str, entry: dict[str, Any] | Place) -> int:
    """Add a file or a directory, and return its number."""
    children: dict[str, int] = {}
    kind, (offset, size) = _DIRECTORY, (0, 0)
    if isinstance(entry, dict):
        children = {child: _add_node(nodes, child, below) for child, below in entry.items()}
    else:
        kind, (offset, size) = _FILE, entry
    region = {"offset": offset, "size": size}
    nodes.append({"children": children, "dataRegion": region, "kind": kind, "name": name})
    return len(nodes) - 1


def unpack(tail: bytes, size_bytes: int) -> dict[str, Place]:
    """Return first byte and size of each file.

    Args:
        tail: The end of what `pack` makes, `MAX_LIST_BYTES` or all of it.
        size_bytes: How much there is in all.

    Raises:
        struct.error: If the list is damaged, or a file would lie outside.
    """
    try:
        listed, _ = json.JSONDecoder().raw_decode(
            tail[: -MAX_LIST_BYTES - 1 : -1].decode("latin-1")
        )
        found = dict(_paths(listed["nodes"], len(listed["nodes"]) - 1, ""))
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise struct.error(f"the list of a package's files is not a list ({error})") from error
    for path, (first, size) in found.items():
        if min(first, size) < 0 or first + size > size_bytes:
            raise struct.error(f"{path} lies outside of its package")
    return found


def _paths(nodes: list[Any], index: int, prefix: str) -> Iterator[tuple[str, Place]]:
    region = nodes[index]["dataRegion"]
    if nodes[index]["kind"] == _FILE:
        yield prefix.removesuffix("/"), (int(region["offset"]), int(region["size"]))
    for name, child in nodes[index]["children"].items():
        yield from _paths(nodes, child, f"{prefix}{name}/")
