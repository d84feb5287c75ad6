"""Which weights a ``.pte`` file holds, and how, as back-ends and ExecuTorch will read them.

Weights are named data of the program. Their shapes and tensor types are what the delegates say
about them; those of the embedding, which no delegate need have, what the program says.
"""

import math
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from edgekit.encodings.flatbuffer import Table, refuse
from edgekit.errors import BundleError
from edgekit.formats.executorch import program, tensor_types


NamedWeight = tuple[
    str, tuple[tuple[int, ...], str]
]  # a role, the shape and the tensor type of its weight
Entry = tuple[str, tuple[int, ...], str]

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
    found = dict(_read(path, head, delegated))
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
        table = _embedding(plan)
        if table is not None:
            yield "token_embedding", table
        for delegate in plan.tables(7):
            first, size = head.segments[delegate.table(1).number(1, "I")]
            file.seek(first)
            yield from delegated(file.read(size))


def _embedding(plan: Table) -> tuple[tuple[int, ...], str] | None:
    """Return the shape and tensor type of the program's largest constant: the embedding."""
    found: dict[int, tuple[tuple[int, ...], str]] = {}
    scales: list[tuple[tuple[int, ...], int]] = []
    for shape, kind in _constants(plan):
        if kind in _TABLES or kind == _PAIRS:
            found[math.prod(shape)] = shape, _TABLES.get(kind, "")
        scales.append((shape, kind))
    if not found:
        return None
    (rows, columns), stored = found[max(found)]
    return ((rows, columns), stored) if stored else _paired(rows, columns, scales)


def _constants(plan: Table) -> Iterator[tuple[tuple[int, ...], int]]:
    """Yield shape and type of each matrix that is a constant."""
    for value in plan.tables(2):
        if value.number(0, "B") == _TENSOR:
            tensor = value.table(1)
            shape = tensor.numbers(2, "i")
            if tensor.number(5, "I") and len(shape) == 2:
                yield shape, tensor.number(0, "b")


def _paired(
    rows: int, pairs: int, scales: Iterable[tuple[tuple[int, ...], int]]
) -> tuple[tuple[int, ...], str]:
    """Return the shape and tensor type of an embedding of four bits, which its scales tell."""
    for shape, kind in scales:
        if kind == _BFLOAT16 and shape[0] == rows and shape[1]:
            return (rows, 2 * pairs), f"INT4_G{2 * pairs // shape[1]}"
        if kind == _FLOAT and shape[1] == rows and shape[0]:
            return (rows, 2 * pairs), f"Q4GSW_G{2 * pairs // shape[0]}"
    return refuse("the embedding has no scales")


def delegate_graph(payload: bytes, *, mark: bytes, of: str) -> Table:
    """Return the graph of a delegate behind the header that XNNPACK's and Vulkan's share.

    Raises:
        struct.error: If the header has another mark.
    """
    magic, _, offset, size = _DELEGATE_HEADER.unpack_from(payload, 4)
    if magic != mark:
        refuse(f"a delegate begins with {magic!r}, expected {of}'s {mark.decode()}")
    return Table.root(payload[offset : offset + size])
