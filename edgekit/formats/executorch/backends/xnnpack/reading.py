"""Which weights a delegate for XNNPACK says it multiplies with."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.encodings.flatbuffer import Table, refuse
from edgekit.formats.executorch.contents import CONSTANT, NamedWeight, delegate_graph, named_weights


if TYPE_CHECKING:
    from edgekit.formats.executorch.program import Program
    from edgekit.model.shapes import Shape


_QUANTIZED = 2  # of XNNPACK's XValueUnion
_GROUPED = 4  # of XNNPACK's XNNQuantParams
_FLOATS = {1: "F32", 2: "F16"}  # of XNNDatatype
_QCINT8, _QBINT4 = 6, 10


def contents(path: Path, head: "Program") -> list[tuple[str, "Shape", str]]:
    """Return name, shape and tensor type of every weight."""
    return named_weights(path, head, delegated)


def delegated(payload: bytes) -> Iterator[NamedWeight]:
    """Yield the weights of a delegate."""
    graph = delegate_graph(payload, mark=b"XH00", of="XNNPACK")
    keys = [data.text(2) for data in graph.tables(8)]
    for value in graph.tables(2):
        is_quantized = value.number(0, "B") == _QUANTIZED
        outer = value.table(1)
        tensor = outer.table(0) if is_quantized else outer
        index = tensor.number(3, "I")
        if index >= len(keys):
            refuse(f"a delegate has no data {index}")
        if index and not keys[index].startswith(CONSTANT):
            yield keys[index], (tensor.numbers(2, "I"), _tensor_type(tensor, outer))


def _tensor_type(tensor: Table, outer: Table) -> str:
    kind = tensor.number(0, "h")
    if kind in _FLOATS:
        return _FLOATS[kind]
    if kind == _QCINT8:
        return "INT8"
    if kind == _QBINT4 and outer.number(1, "B") == _GROUPED:
        return f"INT4_G{outer.table(2).number(2, 'i')}"
    return refuse(f"a delegate has weights of data type {kind}")
