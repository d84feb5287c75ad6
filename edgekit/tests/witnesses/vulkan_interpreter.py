"""What the Vulkan delegate of a program computes, operator by operator, in torch, all in float32.

Read from the bytes of the program itself. Memory that tensors share is watched: an operator must
not read what another tensor has overwritten, nor may one grow past the size it was planned with.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253
from torch.nn import functional  # noqa: TID253

from edgekit.formats.executorch import program


_DTYPES = {1: torch.uint8, 2: torch.int8, 3: torch.int32, 4: torch.float16, 5: torch.float32}


class Interpreter(nn.Module):  # type: ignore[misc]  # it is Any here
    """The delegate of a program, as a module."""

    def __init__(self, path: Path) -> None:
        from executorch.backends.vulkan.serialization.vulkan_graph_serialize import (
            flatbuffer_to_vk_graph,
        )

        super().__init__()
        content, head = path.read_bytes(), program.read(path)
        self.segments = [content[first : first + size] for first, size in head.segments]
        self.named = {key: self.segments[index] for key, index in head.named_data}
        (payload,) = [data for data in self.segments if data[4:8] == b"VH00"]
        offset, size = (int.from_bytes(payload[at : at + 4], "little") for at in (10, 14))
        self.graph = flatbuffer_to_vk_graph(payload[offset : offset + size])
        self.owners: dict[int, int] = {}  # of memory: the tensor that wrote it last
        self.caches: dict[int, Tensor] = {}
        self.held: dict[int, Any] = {}

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        for id, given in zip(self.graph.input_ids, inputs, strict=True):
            self._set(id, given.to(torch.int32) if given.dtype == torch.int64 else given)
        for call in self.graph.chain:
            *arguments, made = call.args
            self._set(made, _OPERATORS[call.name](self, *arguments))
        return tuple(self.get(id) for id in self.graph.output_ids)

    def _set(self, id: int, value: Any) -> None:
        kind = self.graph.values[id].value
        if type(kind).__name__ == "ValueList":
            for member, each in zip(kind.items, value, strict=True):
                self._set(member, each)
            return
        if type(kind).__name__ == "VkTensor":
            assert value.dim() == len(kind.dims)
            assert all(length <= most for length, most in zip(value.shape, kind.dims, strict=True))
            if kind.mem_obj_id >= 0:
                self.owners[kind.mem_obj_id] = id
        self.held[id] = value

    def get(self, id: int) -> Any:
        """Return what an argument stands for."""
        kind = self.graph.values[id].value
        match type(kind).__name__:
            case "VkTensor":
                return self._tensor(id, kind)
            case "SymInt":
                return self.held[id]
            case "ValueList":
                return [self.get(member) for member in kind.items]
            case _:  # a number, a word, numbers, or nothing
                return next(iter(vars(kind).values()), None)

    def _tensor(self, id: int, kind: Any) -> Tensor:
        if kind.constant_id >= 0:
            return self._constant(kind)
        assert kind.mem_obj_id < 0 or self.owners[kind.mem_obj_id] == id
        return self.held[id]

    def _constant(self, tensor: Any) -> Tensor:
        data = self.named[self.graph.constants[tensor.constant_id].named_key]
        assert len(data) == self.graph.constants[tensor.constant_id].length
        held = torch.frombuffer(bytearray(data), dtype=_DTYPES[tensor.datatype]).view(tensor.dims)
        return held.float() if held.dtype == torch.float16 else held

    def cache(self, id: int) -> Tensor:
        """Return a cache of the operator, of the shape that it is shown."""
        if id not in self.caches:
            self.caches[id] = torch.full(self.graph.values[id].value.dims, torch.nan)
        return self.caches[id]


def _attend(delegate: Interpreter, *ids: int) -> Tensor:
    query, key, value = (delegate.get(id) for id in ids[:3])
    first, count, mask, dropout, is_causal, scale = (delegate.get(id) for id in ids[5:])
    assert (count, mask, dropout, is_causal, scale) == (1, None, 0.0, True, None)
    tokens = query.shape[1]
    for id, new in zip(ids[3:5], (key, value), strict=True):
        delegate.cache(id)[:, first : first + tokens] = new
    keys, values = (delegate.cache(id)[:, : first + tokens] for id in ids[3:5])
    rows, columns = torch.arange(first, first + tokens), torch.arange(first + tokens)
    seen = torch.where(rows[:, None] >= columns, 0.0, -torch.inf)
    return functional.scaled_dot_product_attention(
        query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), attn_mask=seen,
        enable_gqa=True,
    ).transpose(1, 2)  # fmt: skip


def _turn(
    query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor, first: int
) -> tuple[Tensor, ...]:
    assert first == 0
    return tuple(_turned(x, cosine[:, None], sine[:, None]) for x in (query, key))


def _turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    width = cosine.shape[-1]
    near, far = x[..., : width // 2], x[..., width // 2 : width]
    turned = x[..., :width] * cosine + torch.cat((-far, near), -1) * sine
    return torch.cat((turned, x[..., width:]), -1)


def _four_bits(x: Tensor, codes: Tensor, scales: Tensor, group: int, bias: Any) -> Tensor:
    weights = torch.stack((codes & 15, codes >> 4), -1).flatten(1).float() - 8
    return functional.linear(x, weights * scales.T.repeat_interleave(group, 1), bias)


def _plain(compute: Callable[..., Any]) -> Callable[..., Any]:
    return lambda delegate, *ids: compute(*map(delegate.get, ids))


_OPERATORS: dict[str, Callable[..., Any]] = {
    "sdpa_with_kv_cache.default": _attend,
    **{
        name: _plain(compute)
        for name, compute in {
            "aten._weight_int8pack_mm.default": lambda x, w, s: x @ (w.float() * s[:, None]).T,
            "aten.add.Tensor": lambda x, y, alpha: x + alpha * y,
            "aten.cat.default": torch.cat,
            "aten.clone.default": lambda x, _: x.clone(),
            "aten.exp.default": torch.exp,
            "aten.gelu.default": lambda x, kind: functional.gelu(x, approximate=kind),
            "aten.linear.default": functional.linear,
            "aten.mul.Tensor": torch.mul,
            "aten.native_layer_norm.default": torch.native_layer_norm,
            "aten.relu.default": torch.relu,
            "aten.select_copy.int": torch.select,
            "aten.sigmoid.default": torch.sigmoid,
            "aten.sub.Tensor": lambda x, y, alpha: x - alpha * y,
            "aten.view_copy.default": lambda x, shape: x.reshape(shape),
            "et_vk.apply_rotary_emb_hf.default": _turn,
            "et_vk.linear_q4gsw.default": _four_bits,
            "et_vk.rms_norm.default": lambda x, w, e: functional.rms_norm(x, w.shape, w, e),
            "et_vk.select_as_symint.default": lambda x, axis, at: int(x.select(axis, at)),
        }.items()
    },
}
