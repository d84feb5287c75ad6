"""The head of a ``.pte`` file, read without its runtime: what it needs, and whether it is whole.

Source: schema/program.fbs, ``file_identifier "ET12"``, and the extended header of
exir/_serialize/_program.py, executorch 1.5.1.
"""

import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from edgekit.encodings.files import readable, require_file
from edgekit.encodings.flatbuffer import Buffer, Table, refuse
from edgekit.errors import BundleError


IDENTIFIER = b"ET12"
_HEADER_MAGIC = b"eh00"
_HEAD_BYTES = 40  # root offset, identifier, then the extended header of 32 bytes
_MAX_PROGRAM_BYTES = 1 << 30  # the flatbuffer, without weights; 30 layers take 2 MB


@dataclass(frozen=True, kw_only=True)
class Method:
    """One entry point, and what a runtime must have to run it."""

    name: str
    operators: tuple[str, ...]  # ``aten::add.out``, in order of the file
    backends: tuple[str, ...]  # one for each delegated part: ``XnnpackBackend``
    planned_bytes: int  # what is set aside for activations and the cache when it is loaded


@dataclass(frozen=True, kw_only=True)
class Program:
    """What the head of a ``.pte`` file says."""

    methods: tuple[Method, ...]
    segments: tuple[tuple[int, int], ...]  # first byte in the file, and size
    named_data: tuple[tuple[str, int], ...]  # a key, and which of the segments it is

    def method(self, name: str) -> Method | None:
        """Return one entry point, None if there is none of that name."""
        return next((method for method in self.methods if method.name == name), None)


def read(path: Path) -> Program:
    """Return what a ``.pte`` file needs, after a look at every offset on the way.

    Raises:
        BundleError: If it cannot be read, is not a ``.pte`` file, is cut off, or is damaged.
    """
    require_file(path, refusal=BundleError)
    with (
        readable(path, refusal=BundleError),
        path.open("rb") as file,
        _mapped(file.fileno(), path) as buffer,
    ):
        return _Reader(path, buffer).program()


def _mapped(descriptor: int, path: Path) -> mmap.mmap:
    if os.fstat(descriptor).st_size < _HEAD_BYTES:
        raise BundleError(f"{path} is not a .pte file: it ends before its header does")
    return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)


class _Reader:
    """What is in a file, and where the flatbuffer in it ends."""

    def __init__(self, path: Path, buffer: mmap.mmap) -> None:
        self._path = path
        self._buffer = buffer
        self._segment_base = 0

    def program(self) -> Program:
        try:
            program = Table.root(self._buffer, end=self._read_header())
            return Program(
                methods=tuple(_method(plan) for plan in list(program.tables(1))),
                segments=tuple(self._segment(segment) for segment in program.tables(4)),
                named_data=tuple(
                    (named.text(0), named.number(1, "I")) for named in program.tables(7)
                ),
            )
        except struct.error as error:
            raise BundleError(
                f"{self._path} is damaged: {error}", hint="copy the bundle again"
            ) from error

    def _read_header(self) -> int:
        """Return where the flatbuffer ends.

        Refuse what is not a program, of another schema, or shorter than it says.
        """
        head = Buffer(self._buffer, _HEAD_BYTES)
        identifier, magic = head.bytes_at(4, 4), head.bytes_at(8, 4)
        if identifier != IDENTIFIER:
            kind = "of another release" if identifier[:2] == IDENTIFIER[:2] else "not a .pte file"
            raise BundleError(
                f"{self._path} is {kind}: it says {identifier!r}, expected {IDENTIFIER!r}",
                hint="export again, with the ExecuTorch that will run it",
            )
        header_bytes = head.number(12, "I")
        if magic != _HEADER_MAGIC or header_bytes < 24:
            raise BundleError(
                f"{self._path} is damaged: where its header begins is {magic!r}",
                hint="copy the bundle again",
            )
        program_bytes, base = head.number(16, "Q"), head.number(24, "Q")
        segment_bytes = head.number(32, "Q") if header_bytes >= 32 else 0
        found, said = len(self._buffer), max(program_bytes, base + segment_bytes)
        if said != found:
            fault = "cut off" if said > found else "longer than it says"
            raise BundleError(
                f"{self._path} is {fault}: it has {found} bytes, its header says {said}",
                hint="copy the bundle again",
            )
        if not _HEAD_BYTES < program_bytes <= _MAX_PROGRAM_BYTES or 0 < base < program_bytes:
            refuse("what is at byte 16 leads out of it")
        self._segment_base = base
        return program_bytes

    def _segment(self, table: Table) -> tuple[int, int]:
        offset, size = (table.number(index, "Q") for index in (0, 1))
        if self._segment_base + offset + size > len(self._buffer):
            refuse(f"what is at byte {table.position} leads out of it")
        return self._segment_base + offset, size


def _method(plan: Table) -> Method:
    return Method(
        name=plan.text(0),
        operators=tuple(_operator(table) for table in plan.tables(6)),
        backends=tuple(table.text(0) for table in plan.tables(7)),
        planned_bytes=_planned_bytes(plan),
    )


def _operator(table: Table) -> str:
    name, overload = table.text(0), table.text(1)
    return f"{name}.{overload}" if overload else name


def _planned_bytes(plan: Table) -> int:
    sizes = plan.numbers(8, "q")
    if any(size < 0 for size in sizes):
        refuse("what is set aside for activations is negative")
    return sum(sizes)
