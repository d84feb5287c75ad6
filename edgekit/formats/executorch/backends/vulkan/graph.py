"""The graph that Vulkan's delegate reads: values, calls of operators, and constants by name.

As backends/vulkan/serialization/schema.fbs of executorch 1.5.1 has it. An operator's arguments are
those that it has in torch, and then what it makes.
"""

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NewType

from edgekit.formats.executorch.contents import CONSTANT
from edgekit.model.shapes import Shape


Value = NewType("Value", int)  # where it stands in the graph
Dtype = Literal["FLOAT32", "FLOAT16", "INT32", "INT8", "UINT8"]
ITEM_BYTES: Mapping[Dtype, int] = {
    "FLOAT32": 4, "FLOAT16": 2, "INT32": 4, "INT8": 1, "UINT8": 1,
}  # fmt: skip


@dataclass(kw_only=True)
class VulkanGraph:
    """A graph as it grows."""

    floats: Dtype  # what products are computed in
    calls: list[tuple[str, list[Value]]] = field(default_factory=list)
    numbers: dict[str, bytes] = field(default_factory=dict)  # named data that is not a weight
    _values: list[Any] = field(default_factory=list)
    _constants: list[tuple[str, int]] = field(default_factory=list)  # key and size
    _scalars: dict[tuple[type, Any], Value] = field(default_factory=dict)

    def tensor(
        self,
        shape: Shape,
        *,
        is_buffer: bool,
        dtype: Dtype | None = None,
        staging: Dtype | None = None,
    ) -> Value:
        """Add a tensor, of the largest size that it may have.

        Args:
            shape: That size.
            is_buffer: Whether it is a buffer, else a texture.
            dtype: None takes `floats`.
            staging: What it is outside of the GPU, where it comes from there or goes there.
        """
        return self._tensor(shape, dtype or self.floats, staging=staging, is_buffer=is_buffer)

    def constant(self, key: str, shape: Shape, dtype: Dtype) -> Value:
        """Add a tensor whose content is named data."""
        self._constants.append((key, math.prod(shape) * ITEM_BYTES[dtype]))
        return self._tensor(shape, dtype, constant=len(self._constants) - 1)

    def vector(self, numbers: Sequence[float]) -> Value:
        """Add numbers that are not weights."""
        kind = "f" if self.floats == "FLOAT32" else "e"
        content = struct.pack(f"<{len(numbers)}{kind}", *numbers)
        key = f"{CONSTANT}{content[:4].hex()}x{len(content)}"
        self.numbers[key] = content
        return self.constant(key, (len(numbers),), self.floats)

    def _tensor(
        self,
        shape: Shape,
        dtype: Dtype,
        *,
        staging: Dtype | None = None,
        is_buffer: bool = True,
        constant: int = -1,
    ) -> Value:
        from executorch.backends.vulkan.serialization import vulkan_graph_schema as schema

        tensor_types = schema.VkStorageType
        return self._add(
            schema.VkTensor(
                datatype=schema.VkDataType[dtype],
                dims=list(shape),
                constant_id=constant,
                mem_obj_id=-1,
                storage_type=tensor_types.BUFFER if is_buffer else tensor_types.TEXTURE_3D,
                memory_layout=schema.VkMemoryLayout.TENSOR_WIDTH_PACKED,
                staging_datatype=schema.VkDataType[staging or dtype],
            )
        )

    def scalar(self, value: float | str | None) -> Value:
        """Return a number, a word or nothing, which is there once."""
        from executorch.backends.vulkan.serialization import vulkan_graph_schema as schema

        key = (type(value), value)
        if key not in self._scalars:
            kinds = {bool: schema.Bool, int: schema.Int, float: schema.Double, str: schema.String}
            kind = kinds.get(type(value))
            self._scalars[key] = self._add(kind(value) if kind else schema.Null())
        return self._scalars[key]

    def size(self) -> Value:
        """Add a number that shapes may depend on, known when the graph runs."""
        from executorch.backends.vulkan.serialization import vulkan_graph_schema as schema

        return self._add(schema.SymInt(0))

    def integers(self, values: Sequence[int]) -> Value:
        """Add a list of whole numbers."""
        from executorch.backends.vulkan.serialization import vulkan_graph_schema as schema

        return self._add(schema.IntList(list(values)))

    def several(self, members: Sequence[Value]) -> Value:
        """Add a list of what is there already."""
        from executorch.backends.vulkan.serialization import vulkan_graph_schema as schema

        return self._add(schema.ValueList(list(members)))

    def shape(self, tensor: Value) -> Shape:
        """Return the largest size of a tensor."""
        return tuple(self._values[tensor].value.dims)

    def is_buffer(self, tensor: Value) -> bool:
        """Tell whether a tensor is not a texture."""
        return bool(self._values[tensor].value.storage_type == 0)

    def _add(self, value: Any) -> Value:
        from executorch.backends.vulkan.serialization import vulkan_graph_schema as schema

        self._values.append(schema.VkValue(value))
        return Value(len(self._values) - 1)

    def call(self, operator: str, *arguments: Value) -> Value:
        """Add a call, and return its last argument: what it makes."""
        self.calls.append((operator, list(arguments)))
        return arguments[-1]

    def share_memory(self, *, kept: Iterable[Value], alike: Iterable[Value]) -> None:
        """Let tensors of a size take the same memory one after the other.

        Args:
            kept: Those that have their own.
            alike: Those of which nothing but the shape is used.
        """
        _Plan(self._values, self.calls).share(set(kept), list(alike))

    def serialized(self, inputs: Sequence[Value], outputs: Sequence[Value]) -> bytes:
        """Return the delegate."""
        from executorch.backends.vulkan.serialization import vulkan_graph_schema as schema
        from executorch.backends.vulkan.serialization.vulkan_graph_serialize import (
            serialize_vulkan_graph,
        )

        graph = schema.VkGraph(
            version="0",
            chain=[
                schema.OperatorCall(index, name, list(map(int, arguments)))
                for index, (name, arguments) in enumerate(self.calls)
            ],
            values=self._values,
            input_ids=list(map(int, inputs)),
            output_ids=list(map(int, outputs)),
            constants=[],
            shaders=[],
        )
        made: bytes = serialize_vulkan_graph(graph, self._constants, [])
        return made


class _Plan:
    """Which tensors share memory: one that an operator reads is free only after it has written."""

    def __init__(self, values: Sequence[Any], calls: Sequence[tuple[str, list[Value]]]) -> None:
        self._values, self._calls = values, calls
        self._free: dict[int, list[int]] = {}  # by size
        self._objects = 0

    def share(self, kept: set[Value], alike: Sequence[Value]) -> None:
        ends = {member: at for at in range(len(self._calls)) for member in self._tensors(at)}
        for value in alike:
            self._values[value].value.mem_obj_id = 0
        self._objects = 1 if alike else 0
        apart = kept | set(alike)
        for at in range(len(self._calls)):
            members = [value for value in self._tensors(at) if value not in apart]
            for value in members:
                self._place(value)
            for value in members:
                if ends[value] == at:
                    tensor = self._values[value].value
                    self._free[self._size(tensor)].append(tensor.mem_obj_id)

    def _place(self, value: Value) -> None:
        tensor = self._values[value].value
        if tensor.mem_obj_id < 0:
            free = self._free.setdefault(self._size(tensor), [])
            if not free:
                free.append(self._objects)
                self._objects += 1
            tensor.mem_obj_id = free.pop()

    def _size(self, tensor: Any) -> int:
        return 2 * math.prod(map(int, tensor.dims)) + int(tensor.storage_type == 0)

    def _tensors(self, at: int) -> list[Value]:
        """Return the tensors of a call that are not constants, those of its lists too."""
        from executorch.backends.vulkan.serialization import vulkan_graph_schema as schema

        found: dict[Value, None] = {}
        for argument in self._calls[at][1]:
            held = self._values[argument].value
            members = held.items if isinstance(held, schema.ValueList) else [argument]
            for member in members:
                tensor = self._values[member].value
                if isinstance(tensor, schema.VkTensor) and tensor.constant_id < 0:
                    found[Value(member)] = None
        return list(found)
