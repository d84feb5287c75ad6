"""One artifact as several files: browsers take 2 GB at once, and asset packs have limits too.

The parts are named ``model-00001-of-00003.gguf``; each says which it is, the first one also carries
all metadata, and llama.cpp finds the others next to it. Source: ``llama_split_path`` in
src/llama.cpp and the constructor of ``llama_model_loader`` of llama.cpp 0c1e57098.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from edgekit.encodings.files import is_file
from edgekit.errors import BundleError, UsageError
from edgekit.formats.gguf import layout
from edgekit.formats.gguf.layout import TensorEntry, TensorInfo, Value, Writer
from edgekit.units import format_bytes


if TYPE_CHECKING:
    import numpy.typing as npt
    from _typeshed import ReadableBuffer


MAX_PARTS = 65535  # split.count is a uint16
_NUMBER, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"
_NAME = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True, kw_only=True)
class PlannedFile:
    """One file to be written."""

    name: str
    metadata: Mapping[str, Value]
    tensors: tuple[TensorEntry, ...]

    @property
    def size_bytes(self) -> int:
        """What it will take on disk, to the byte."""
        return layout.file_bytes(self.metadata, self.tensors)


def plan_files(
    stem: str,
    metadata: Mapping[str, Value],
    tensors: Sequence[TensorEntry],
    *,
    split_bytes: int | None = None,
) -> list[PlannedFile]:
    """Return the files that hold these tensors, in their order.

    Args:
        stem: What their names begin with.
        metadata: Of the whole.
        tensors: Of the whole.
        split_bytes: The most that one file may take; None makes one file. So does a limit that
            everything fits in.

    Raises:
        UsageError: If a tensor alone, or the metadata with the first one, is larger than that.
    """
    whole = PlannedFile(name=f"{stem}.gguf", metadata=metadata, tensors=tuple(tensors))
    if split_bytes is None or whole.size_bytes <= split_bytes:
        return [whole]
    groups = _groups(metadata, tensors, split_bytes)
    if len(groups) > MAX_PARTS:
        raise UsageError(
            f"{format_bytes(split_bytes)} a file makes {len(groups)} files, at most {MAX_PARTS} "
            "are possible",
            hint="pass a larger --split",
        )
    return [
        PlannedFile(
            name=part_name(stem, index, len(groups)),
            metadata=_metadata(metadata if index == 0 else {}, index, len(groups), len(tensors)),
            tensors=tuple(group),
        )
        for index, group in enumerate(groups)
    ]


def part_name(stem: str, index: int, count: int) -> str:
    """Return the name of a part, as llama.cpp looks for it.

    >>> part_name("model", 0, 3)
    'model-00001-of-00003.gguf'
    """
    return f"{stem}-{index + 1:05}-of-{count:05}.gguf"


def _metadata(
    first: Mapping[str, Value], index: int, count: int, tensors: int
) -> Mapping[str, Value]:
    return {
        **first,
        _NUMBER: ("uint16", index),
        _COUNT: ("uint16", count),
        _TENSORS: ("int32", tensors),
    }


def _groups(
    metadata: Mapping[str, Value], tensors: Sequence[TensorEntry], split_bytes: int
) -> list[list[TensorEntry]]:
    """Fill file after file; a file's header counts, since it is the file that has a limit."""
    empty = len(layout.encode_header(_metadata({}, 0, 0, 0), ()))
    taken = len(layout.encode_header(_metadata(metadata, 0, 0, 0), ()))
    groups: list[list[TensorEntry]] = [[]]
    for tensor in tensors:
        size = _entry_bytes(tensor) + layout.padded(tensor.size_bytes)
        if layout.padded(taken + size) > split_bytes and groups[-1]:
            groups.append([])
            taken = empty
        if layout.padded(taken + size) > split_bytes:
            raise _too_large(
                tensor, layout.padded(taken + size), split_bytes, is_first=len(groups) == 1
            )
        groups[-1].append(tensor)
        taken += size
    return groups


def _entry_bytes(tensor: TensorEntry) -> int:
    """Return what a tensor takes in a header: lengths, name, shape, tensor type and offset."""
    return 8 + len(tensor.name.encode()) + 4 + 8 * len(tensor.shape) + 4 + 8


def _too_large(
    tensor: TensorEntry, size_bytes: int, split_bytes: int, *, is_first: bool
) -> UsageError:
    what = f"the metadata and {tensor.name}" if is_first else tensor.name
    return UsageError(
        f"{what} take {size_bytes} bytes, more than the {split_bytes} of one file"
        if is_first
        else f"{what} takes {size_bytes} bytes, more than the {split_bytes} of one file",
        hint="a tensor cannot be cut: pass a larger --split",
    )


class FilesWriter:
    """Writes planned files one after another, the tensors in their order, in pieces of any size.

    A context manager: where the block fails, none of the files stays.
    """

    def __init__(self, directory: Path, files: Sequence[PlannedFile]) -> None:
        self._paths = [directory / file.name for file in files]
        self._writers = [
            Writer(path, file.metadata, file.tensors)
            for path, file in zip(self._paths, files, strict=True)
        ]
        self._file_of = {
            tensor.name: index for index, file in enumerate(files) for tensor in file.tensors
        }
        self._current = 0

    def __enter__(self) -> Self:
        self._writers[0].__enter__()
        return self

    def write(self, name: str, payload: "ReadableBuffer | npt.NDArray[Any]") -> None:
        """Append to the tensor ``name``; the errors are those of `Writer.write`."""
        if self._file_of.get(name) == self._current + 1:
            self._writers[self._current].__exit__(None, None, None)
            self._current += 1
            self._writers[self._current].__enter__()
        self._writers[self._current].write(name, payload)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._writers[self._current].__exit__(kind, error, traceback)
            if kind is None:
                self._refuse_incomplete()
        except BaseException:
            self._discard()
            raise
        if kind is not None:
            self._discard()

    def _refuse_incomplete(self) -> None:
        if self._current + 1 < len(self._writers):
            raise ValueError(f"{self._paths[self._current + 1]} was not written")

    def _discard(self) -> None:
        for path in self._paths:
            with suppress(OSError):
                path.unlink(missing_ok=True)


# Reading


def paths(first: Path) -> list[Path]:
    """Return all files of an artifact, by their names alone; most have one.

    Raises:
        BundleError: If this is another part than the first, or one of the others is missing.
    """
    match = _NAME.fullmatch(first.name)
    if match is None or not 0 < int(match["part"]) <= int(match["count"]):
        return [first]
    count = int(match["count"])
    found = [first.with_name(part_name(match["stem"], index, count)) for index in range(count)]
    if found[0] != first:
        raise BundleError(
            f"{first} is part {int(match['part'])} of {count}", hint=f"open {found[0].name}"
        )
    for index, path in enumerate(found):
        if not is_file(path, refusal=BundleError):
            raise BundleError(
                f"{path} is missing, part {index + 1} of {count}", hint="copy all parts again"
            )
    return found


def read_tensors(first: Path) -> Iterator[TensorInfo]:
    """Yield every tensor of an artifact, part after part.

    Raises:
        BundleError: If a part is missing, damaged, or of another artifact.
    """
    files = paths(first)
    seen: set[str] = set()
    total = None
    for index, path in enumerate(files):
        file = read(path)
        stated = tuple(file.metadata.get(key) for key in (_NUMBER, _COUNT, _TENSORS))
        total = stated[2] if index == 0 else total
        _check_part(path, stated, index=index, count=len(files), tensors=total)
        for info in file.tensors:
            if info.name in seen:
                raise BundleError(f"{path} holds {info.name}, which another part has too")
            seen.add(info.name)
            yield info
    if total is not None and total != len(seen):
        raise BundleError(f"{first} is one of {len(files)} files with {total} tensors, not "
                          f"{len(seen)}")  # fmt: skip


def read(path: Path) -> layout.GgufFile:
    """Return the contents of one file.

    Raises:
        BundleError: If it is damaged.
    """
    try:
        return layout.read(path)
    except UsageError as error:
        raise BundleError(str(error), hint=error.hint) from error


def _check_part(
    path: Path, stated: tuple[Any, ...], *, index: int, count: int, tensors: Any
) -> None:
    if count == 1 and stated[1] in {None, 0, 1}:
        return
    if stated != (index, count, tensors):
        number, parts, _ = stated
        position = number + 1 if isinstance(number, int) else number
        raise BundleError(
            f"{path} says it is part {position} of {parts}, its name says part {index + 1} of "
            f"{count}",
            hint="the parts of two artifacts were mixed, or one was renamed",
        )
