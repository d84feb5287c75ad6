"""Which weights a ``.pte`` file holds, and how, as back-ends and ExecuTorch will read them.

Weights are named data of the program. Their shapes and tensor types are what the delegates say
about them; those of the embedding, which no delegate need have, what the program says.
"""

import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from edgekit.encodings.flatbuffer import Table, refuse
from edgekit.errors import BundleError
from edgekit.formats.executorch import program, tensor_types
from edgekit.model.shapes import Shape


T = TypeVar("T")
NamedWeight = tuple[str, tuple[Shape, str]]  # a role, the shape and the tensor type of its weight
Entry = tuple[str, Shape, str]

SLICE = "@"  # between the key of a weight and the first row of a part of it
CONSTANT = "constant."  # what the keys of named data that is not a weight begin with
_TENSOR = 5  # of the program's KernelTypes
_DELEGATE_HEADER = struct.Struct("<4sHII")  # after four bytes: magic, length, offset, size
_TABLES = {1: "INT8", 5: "F16", 6: "F32"}  # of the program's ScalarType
_PAIRS, _BFLOAT16, _FLOAT = 0, 15, 6  # a byte of two codes; their scales


def named_weights(
    path: Path, head: program.Program, delegated: Callable[[bytes], Iterable[NamedWeight]]
) -> list[Entry]:
    """Return role, shape and tensor type of every weight of a program that holds them by name.

    Args:
        path: The program.
        head: What its head says.
        delegated: Reads the weights off what a delegate says.

    Raises:
        BundleError: If it holds a weight in a way that edgekit never writes.
        struct.error, IndexError, UnicodeDecodeError: If it is damaged.
    """
    found = whole(_read(path, head, delegated))
    sizes = {key: head.segments[index][1] for key, index in head.named_data}
    for name, (shape, stored) in found.items():
        if stored not in tensor_types.TENSOR_TYPES or len(shape) not in {1, 2}:
            raise BundleError(f"{path}: {name} is stored in a way that edgekit never writes")
        for part in tensor_types.parts(name, shape, stored):
            if sizes.get(part.key) != part.size_bytes:
                raise BundleError(
                    f"{path}: {part.key} takes {sizes.get(part.key)} bytes, "
                    f"its shape and tensor type ask for {part.size_bytes}"
                )
    return [(name, shape, stored) for name, (shape, stored) in found.items()]


def _read(
    path: Path, head: program.Program, delegated: Callable[[bytes], Iterable[NamedWeight]]
) -> Iterator[NamedWeight]:
    with path.open("rb") as file:
        if not head.segments:
            refuse("the program has no segments")
        root = Table.root(file.read(min(first for first, _ in head.segments)))
        (plan, *_) = [*root.tables(1)] or refuse("the program has no method")
        yield from _tables(root, plan, head)
        for delegate in plan.tables(7):
            first, size = head.segments[delegate.table(1).number(1, "I")]
            file.seek(first)
            yield from delegated(file.read(size))


def whole(weights: Iterable[tuple[str, tuple[Shape, T]]]) -> dict[str, tuple[Shape, T]]:
    """Return weights by role, those together of which there are slices."""
    found: dict[str, tuple[Shape, T]] = {}
    for key, (shape, stored) in dict(weights).items():
        role, _, first = key.partition(SLICE)
        before = found[role][0][0] if first and role in found else 0
        found[role] = (before + shape[0], *shape[1:]), stored
    return found


def _tables(root: Table, plan: Table, head: program.Program) -> Iterator[NamedWeight]:
    """Yield the weights that are constants of the program: what tokens are looked up in."""
    held = root.table(5)
    first, _ = head.segments[held.number(0, "I")]
    places = {first + offset: index for index, offset in enumerate(held.numbers(1, "Q"))}
    constants = dict(_constants(plan))
    found = {
        key: constants[index]
        for key, segment in head.named_data
        # A slice that a delegate reads may begin where the whole table does.
        if SLICE not in key and (index := places.get(head.segments[segment][0])) in constants
    }
    for key, (shape, kind) in found.items():
        if kind == _PAIRS:
            scales = found.get(key + tensor_types.SCALE) or refuse(f"{key} has no scales")
            yield key, _paired(shape, *scales)
        elif not key.endswith(tensor_types.SCALE) and kind in _TABLES:
            yield key, (shape, _TABLES[kind])


def _constants(plan: Table) -> Iterator[tuple[int, tuple[Shape, int]]]:
    """Yield the number of each constant, its shape and its type."""
    for value in plan.tables(2):
        if value.number(0, "B") == _TENSOR:
            tensor = value.table(1)
            if index := tensor.number(5, "I"):
                yield index, (tensor.numbers(2, "i"), tensor.number(0, "b"))


def _paired(shape: Shape, scales: Shape, kind: int) -> tuple[Shape, str]:
    """Return the shape and tensor type of a table of four bits, which its scales tell."""
    if len(shape) != 2 or len(scales) != 2:
        refuse("a table or its scales are no matrix")
    rows, pairs = shape
    if kind == _BFLOAT16 and scales[0] == rows and scales[1]:
        return (rows, 2 * pairs), f"INT4_G{2 * pairs // scales[1]}"
    if kind == _FLOAT and scales[1] == rows and scales[0]:
        return (rows, 2 * pairs), f"Q4GSW_G{2 * pairs // scales[0]}"
    return refuse("a table has scales of another shape")


def delegate_graph(payload: bytes, *, mark: bytes, of: str) -> Table:
    """Return the graph of a delegate behind the header that XNNPACK's and Vulkan's share.

    Raises:
        struct.error: If the header has another mark.
    """
    magic, _, offset, size = _DELEGATE_HEADER.unpack_from(payload, 4)
    if magic != mark:
        refuse(f"a delegate begins with {magic!r}, expected {of}'s {mark.decode()}")
    return Table.root(payload[offset : offset + size])
