"""Where everything goes in a ``.pte`` file.

Weights are named data: a delegate asks for them by role. The embedding is a constant of the program
and named data too, so a head that is tied to it reads the same bytes of the file.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgekit.formats.executorch import storage
from edgekit.formats.executorch.size import ALIGNMENT


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Who does the work of a program."""

    delegated_operators: int  # in XNNPACK, all delegates together
    delegated_weights: frozenset[str]  # by role
    portable_operators: Mapping[str, int]  # how often ExecuTorch's own kernels are called


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """A program before its weights."""

    program: Any  # of executorch.exir.schema
    numbers: Mapping[str, bytes]  # named data that is no weight
    table: tuple[int, ...]  # which constants are the embedding and its scales
    coverage: Coverage


@dataclass(frozen=True, kw_only=True)
class File:
    """A ``.pte`` file before its weights."""

    pieces: tuple[tuple[int, bytes], ...]  # what is known, and where it goes
    places: Mapping[str, int]  # where each part of a weight goes
    size_bytes: int


def assemble(lowered: Lowered, parts: Sequence[storage.Part]) -> File:
    """Decide where everything goes."""
    return _Assembly(copy.deepcopy(lowered.program), lowered, parts).file()


_TENSOR_ALIGNMENT = 16


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


class _Assembly:
    def __init__(self, program: Any, lowered: Lowered, parts: Sequence[storage.Part]) -> None:
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
        keys = ("token_embedding", "token_embedding" + storage.SCALE)
        table = dict(zip(self._lowered.table, keys, strict=False))
        for index, buffer in enumerate(self._program.constant_buffer):
            end = _aligned(end, _TENSOR_ALIGNMENT)
            offsets.append(end)
            if index in table:
                self._places[table[index]] = end
            else:
                self._pieces.append((end, buffer.storage))
            end += len(buffer.storage)
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
        from executorch.exir._serialize._flatbuffer_program import _program_to_flatbuffer
        from executorch.exir._serialize._program import (
            _ExtendedHeader,
            _insert_flatbuffer_header,
        )

        made = _program_to_flatbuffer(
            self._program, constant_tensor_alignment=_TENSOR_ALIGNMENT, delegate_alignment=None
        )
        header_bytes = _aligned(_ExtendedHeader.EXPECTED_LENGTH, made.max_alignment)
        program_bytes = header_bytes + len(made.data)
        base = _aligned(program_bytes, ALIGNMENT)
        header = _ExtendedHeader(
            program_size=program_bytes, segment_base_offset=base, segment_data_size=self._end
        )
        head = _insert_flatbuffer_header(
            flatbuffer_data=made.data,
            magic_regex=r"ET[0-9a-zA-Z][0-9a-zA-Z]",
            header_data=header.to_bytes().ljust(header_bytes, b"\0"),
        )
        return File(
            pieces=((0, head), *((base + at, content) for at, content in self._pieces)),
            places={key: base + at for key, at in self._places.items()},
            size_bytes=base + self._end,
        )
