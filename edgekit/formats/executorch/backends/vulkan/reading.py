"""Programs for Vulkan, read back: which weights they hold, and the numbers those stand for."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.encodings.flatbuffer import refuse
from edgekit.errors import BundleError
from edgekit.formats.executorch import program, slopes, tensor_types
from edgekit.formats.executorch.contents import (
    CONSTANT,
    NamedWeight,
    delegate_graph,
    named_weights,
    whole,
)
from edgekit.model.shapes import Shape
from edgekit.model.spec import DecoderSpec


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Rows = npt.NDArray[np.float32]


_TENSOR = 5  # of GraphTypes in the delegate's schema.fbs
_STORED = {5: "F32", 4: "F16", 2: "INT8"}  # of VkDataType
_PAIRS = 1  # UINT8


def delegated(payload: bytes) -> Iterator[NamedWeight]:
    """Yield the weights of a delegate."""
    found = whole(_constants(payload))
    for key, (shape, kind) in found.items():
        if key.startswith(CONSTANT) or key.endswith(tensor_types.SCALE):
            continue
        if kind == _PAIRS:
            yield key, _grouped(key, shape, found)
        elif kind in _STORED:
            yield key, (shape, _STORED[kind])
        else:
            refuse(f"a delegate has weights of data type {kind}")


def _constants(payload: bytes) -> Iterator[tuple[str, tuple[Shape, int]]]:
    """Yield key, shape and type of every constant."""
    graph = delegate_graph(payload, mark=b"VH00", of="Vulkan")
    keys = [constant.text(2) for constant in graph.tables(5)]
    for value in graph.tables(2):
        if value.number(0, "B") != _TENSOR:
            continue
        tensor = value.table(1)
        index = tensor.number(2, "i")
        shape = tensor.numbers(1, "I")
        if index >= 0 and not shape:
            refuse(f"a delegate has a constant {keys[index]} without axes")
        if index >= 0:
            yield keys[index], (shape, tensor.number(0, "b"))


def _grouped(key: str, shape: Shape, found: Mapping[str, tuple[Shape, int]]) -> tuple[Shape, str]:
    """Return the shape and tensor type of four-bit weights, which their scales tell."""
    scales, _ = found.get(key + tensor_types.SCALE, ((), 0))
    if len(shape) != 2 or len(scales) != 2 or not scales[0]:
        refuse(f"{key} has no scales")
    rows, pairs = shape
    return (rows, 2 * pairs), f"Q4GSW_G{2 * pairs // scales[0]}"


@dataclass(frozen=True, kw_only=True)
class VulkanWeights:
    """The weights of a program, as numbers."""

    path: Path
    spec: DecoderSpec
    held: Mapping[str, tuple[Shape, str]]  # by role
    places: Mapping[str, int]  # where named data begins

    def weight(self, role: str, first_row: int = 0, rows: int | None = None) -> "Rows":
        """Return some rows of a weight, or all, in float32."""
        import numpy as np

        shape, stored = self.held[role]
        count = shape[0] - first_row if rows is None else rows
        read = []
        for part, kind in zip(
            tensor_types.parts(role, shape, stored), tensor_types.item_types(stored), strict=True
        ):
            whole = np.memmap(
                self.path, kind, mode="r", offset=self.places[part.key],
                shape=(part.size_bytes // np.dtype(kind).itemsize,),
            )  # fmt: skip
            by_row = (
                whole.reshape(-1, shape[0]).T if part.is_across else whole.reshape(shape[0], -1)
            )
            read.append(by_row[first_row : first_row + count])
        values = tensor_types.decode(read, stored).reshape(count, *shape[1:])
        return slopes.from_slopes(role, values)


def contents(path: Path, head: program.Program) -> list[tuple[str, Shape, str]]:
    """Return name, shape and tensor type of every weight."""
    return named_weights(path, head, delegated)


def read_back(path: Path, spec: DecoderSpec) -> VulkanWeights:
    """Return the weights of a program.

    Raises:
        BundleError: If they are not those of the decoder.
    """
    head = program.read(path)
    held = {role: (shape, stored) for role, shape, stored in contents(path, head)}
    for role, shape in spec.weights():
        if role not in held or held[role][0] != shape:
            raise BundleError(f"{path} holds no {role} of shape {list(shape)}")
    return VulkanWeights(
        path=path,
        spec=spec.without_unit_offsets(),
        held=held,
        places={key: head.segments[index][0] for key, index in head.named_data},
    )
