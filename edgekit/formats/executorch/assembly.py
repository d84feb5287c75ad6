"""Where everything goes in a ``.pte`` file.

Weights are named data: a delegate asks for them by role. The embedding is a constant of the program
and named data too, so a head that is tied to it reads the same bytes of the file.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from edgekit.formats.executorch import tensor_types
from edgekit.formats.executorch.contents import SLICE
from edgekit.formats.executorch.coverage import Coverage
from edgekit.formats.executorch.tensor_types import ALIGNMENT


if TYPE_CHECKING:
    from edgekit.formats.executorch.planned import Job


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Named data that is a part of a weight's; `slice_key` makes its key."""

    of: str  # the key of the whole
    first_byte: int
    size_bytes: int


def slice_key(key: str, first_row: int) -> str:
    """Return the key of the rows of a weight, or of its scales, that begin with this one."""
    return f"{key}{SLICE}{first_row}"


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """A program before its weights."""

    program: Any  # of executorch.exir.schema
    numbers: Mapping[str, bytes]  # named data that is not a weight
    tables: Mapping[int, str]  # which constants are parts of tables, and the keys of those
    coverage: Coverage
    slices: Mapping[str, Slice] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class File:
    """A ``.pte`` file before its weights."""

    pieces: tuple[tuple[int, bytes], ...]  # what is known, and where it goes
    places: Mapping[str, int]  # where each part of a weight goes
    size_bytes: int

    def write(self, job: "Job", path: Path) -> None:
        """Write it, with one block of a weight's rows in memory at a time."""
        with path.open("wb") as stream:
            stream.truncate(self.size_bytes)
            for offset, content in self.pieces:
                stream.seek(offset)
                stream.write(content)
            self._write_weights(job, stream)

    def _write_weights(self, job: "Job", stream: BinaryIO) -> None:
        for weight in job.weights:
            for first, encoded in job.encoded(weight):
                for part, values in zip(weight.parts, encoded, strict=True):
                    self._write_rows(stream, part, first, values, rows=weight.shape[0])

    def _write_rows(
        self, stream: BinaryIO, part: tensor_types.Part, first: int, values: Any, *, rows: int
    ) -> None:
        place = self.places[part.key]
        if not part.is_across:
            stream.seek(place + first * (part.size_bytes // rows))
            stream.write(values.tobytes())
            return
        for group, column in enumerate(values.T):
            stream.seek(place + (group * rows + first) * values.itemsize)
            stream.write(column.tobytes())


def assemble(lowered: Lowered, parts: Sequence[tensor_types.Part]) -> File:
    """Decide where everything goes."""
    return _Assembly(copy.deepcopy(lowered.program), lowered, parts).file()


_TENSOR_ALIGNMENT = 16


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


class _Assembly:
    def __init__(self, program: Any, lowered: Lowered, parts: Sequence[tensor_types.Part]) -> None:
        self._program, self._lowered = program, lowered
        self._sizes = {part.key: part.size_bytes for part in parts}
        self._end = 0  # of the segments so far
        self._pieces: list[tuple[int, bytes]] = []
        self._places: dict[str, int] = {}

    def file(self) -> File:
        from executorch.exir.schema import NamedData

        self._add_constants()
        self._add_delegates()
        named = [NamedData(key=key, segment_index=at) for key, at in self._add_table()]
        for key, content in sorted(self._lowered.numbers.items()):
            named.append(NamedData(key=key, segment_index=self._segment(len(content))))
            self._pieces.append((self._program.segments[-1].offset, content))
        for key, size in self._sizes.items():
            if key not in self._places:
                named.append(NamedData(key=key, segment_index=self._segment(size)))
                self._places[key] = self._program.segments[-1].offset
        for key, part in self._lowered.slices.items():
            offset = self._places[part.of] + part.first_byte
            index = self._segment(part.size_bytes, offset)
            named.append(NamedData(key=key, segment_index=index))
        self._program.named_data = named
        return self._with_head()

    def _segment(self, size: int, offset: int | None = None) -> int:
        """Add a segment at the end, or where something is already, and return its number."""
        from executorch.exir.schema import DataSegment

        if offset is None:
            offset = _aligned(self._end, ALIGNMENT)
            self._end = offset + size
        self._program.segments.append(DataSegment(offset=offset, size=size))
        return len(self._program.segments) - 1

    def _add_constants(self) -> None:
        from executorch.exir.schema import SubsegmentOffsets

        offsets, end = [], 0
        for index, buffer in enumerate(self._program.constant_buffer):
            end = _aligned(end, _TENSOR_ALIGNMENT)
            offsets.append(end)
            key = self._lowered.tables.get(index)
            if key is None:
                self._pieces.append((end, buffer.storage))
                end += len(buffer.storage)
            else:
                self._places[key] = end
                end += self._sizes[key]
        index = self._segment(end)
        self._program.constant_segment = SubsegmentOffsets(segment_index=index, offsets=offsets)
        self._program.constant_buffer = []

    def _add_delegates(self) -> None:
        from executorch.exir.schema import BackendDelegateDataReference, DataLocation

        for delegate in self._program.execution_plan[0].delegates:
            content = self._program.backend_delegate_data[delegate.processed.index].data
            index = self._segment(len(content))
            self._pieces.append((self._program.segments[index].offset, content))
            delegate.processed = BackendDelegateDataReference(
                location=DataLocation.SEGMENT, index=index
            )
        self._program.backend_delegate_data = []

    def _add_table(self) -> Iterator[tuple[str, int]]:
        for key in [*self._places]:
            yield key, self._segment(self._sizes[key], self._places[key])

    def _with_head(self) -> File:
        head, base = head_of(self._program, self._end)
        return File(
            pieces=((0, head), *((base + at, content) for at, content in self._pieces)),
            places={key: base + at for key, at in self._places.items()},
            size_bytes=base + self._end,
        )


def head_of(program: Any, segment_bytes: int) -> tuple[bytes, int]:
    """Return what a file begins with, and where its segments do."""
    from executorch.exir._serialize._flatbuffer_program import _program_to_flatbuffer
    from executorch.exir._serialize._program import _ExtendedHeader, _insert_flatbuffer_header

    made = _program_to_flatbuffer(
        program, constant_tensor_alignment=_TENSOR_ALIGNMENT, delegate_alignment=None
    )
    header_bytes = _aligned(_ExtendedHeader.EXPECTED_LENGTH, made.max_alignment)
    program_bytes = header_bytes + len(made.data)
    base = _aligned(program_bytes, ALIGNMENT)
    header = _ExtendedHeader(
        program_size=program_bytes, segment_base_offset=base, segment_data_size=segment_bytes
    )
    head = _insert_flatbuffer_header(
        flatbuffer_data=made.data,
        magic_regex=r"ET[0-9a-zA-Z][0-9a-zA-Z]",
        header_data=header.to_bytes().ljust(header_bytes, b"\0"),
    )
    return head, base


def head_of_delegate(program: Any, delegate_bytes: int) -> tuple[bytes, int]:
    """Return the same for a program without constants, and with one delegate."""
    from executorch.exir.schema import BackendDelegateDataReference, DataLocation, DataSegment

    program.segments = [DataSegment(offset=0, size=size) for size in (0, delegate_bytes)]
    program.backend_delegate_data = []
    program.execution_plan[0].delegates[0].processed = BackendDelegateDataReference(
        location=DataLocation.SEGMENT, index=1
    )
    return head_of(program, delegate_bytes)
