"""Tables that tokens are looked up in, a module of torch for each tensor type.

A program is made with tables of one row, and told how many rows there are when it is done: no
table need be in memory, and what looks up a row does not ask.
"""

from collections.abc import Sequence
from dataclasses import dataclass

# This is the workstation's half: nothing that runs on a device imports it.
import torch  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253
from torch.nn import functional  # noqa: TID253

from edgekit.formats.executorch.planned import TABLES
from edgekit.formats.executorch.tensor_types import SCALE, TENSOR_TYPES, VULKAN_FOUR_BITS
from edgekit.model.shapes import Shape


@dataclass(frozen=True, kw_only=True)
class StandIn:
    """What a program is made with where part of a table will be."""

    key: str  # of the part
    content: bytes  # which no other constant has
    shape: Shape  # of the part


@dataclass(frozen=True, kw_only=True)
class EmptyTable:
    """A table without content."""

    module: nn.Module
    stand_ins: Sequence[StandIn]


_MARK = 100  # what the first table is full of; the next of one more
_SCALE_MARK = 2.0**80  # its scales of so much times that


def empty(role: str, shape: Shape, stored: str) -> EmptyTable:
    """Return what makes rows of tokens.

    Args:
        role: One of `TABLES`.
        shape: Rows and columns.
        stored: The tensor type.
    """
    rows, columns = shape
    mark = _MARK + TABLES.index(role)
    if stored in {"F32", "F16"}:
        dtype = torch.float32 if stored == "F32" else torch.float16
        table = torch.full((1, columns), mark, dtype=dtype)
        return _of(role, FloatEmbedding(table), [(table, shape)])
    from executorch.exir.passes import _quant_patterns_and_replacements  # noqa: F401 - operators

    if stored == "INT8":
        table = torch.full((1, columns), mark, dtype=torch.int8)
        scales = torch.full((1,), mark * _SCALE_MARK)
        return _of(role, Int8Embedding(table, scales), [(table, shape), (scales, (rows,))])
    groups = columns // TENSOR_TYPES[stored].block_weights
    pairs = torch.full((1, columns // 2), mark, dtype=torch.uint8)
    parts = [(pairs, (rows, columns // 2))]
    if stored in VULKAN_FOUR_BITS:
        scales = torch.full((groups, 1), mark * _SCALE_MARK)
        across = AcrossInt4Embedding(pairs, scales)
        return _of(role, across, [*parts, (scales, (groups, rows))])
    scales = torch.full((1, groups), mark * _SCALE_MARK, dtype=torch.bfloat16)
    return _of(role, Int4Embedding(pairs, scales), [*parts, (scales, (rows, groups))])


def _of(role: str, module: nn.Module, parts: Sequence[tuple[Tensor, Shape]]) -> EmptyTable:
    keys = (role, role + SCALE)
    made = [
        StandIn(key=key, content=part.view(torch.uint8).numpy().tobytes(), shape=shape)
        for key, (part, shape) in zip(keys, parts, strict=False)
    ]
    return EmptyTable(module=module, stand_ins=made)


class LayerEmbedding(nn.Module):  # type: ignore[misc]  # it is Any here
    """A table with a row for each layer of each token, those of a token next to each other."""

    def __init__(self, table: nn.Module, layers: int) -> None:
        super().__init__()
        self.table, self.layers = table, layers

    def places(self, tokens: Tensor) -> Tensor:
        """Return the first row of each token."""
        return tokens * self.layers

    def forward(self, places: Tensor, layer: int) -> Tensor:
        """Return the row of a layer for each token, given the first of each."""
        rows: Tensor = self.table(places + layer)
        return rows


class Int8Embedding(nn.Module):  # type: ignore[misc]  # it is Any here
    """A table of int8, with a scale for each row."""

    def __init__(self, table: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)
        self.register_buffer("scales", scales)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return a row for each token."""
        return torch.ops.quantized_decomposed.embedding_byte(
            self.get_buffer("table"), self.get_buffer("scales"), None, -128, 127, tokens
        )


class Int4Embedding(nn.Module):  # type: ignore[misc]  # it is Any here
    """A table of four bits, with scales for groups of a row, as XNNPACK has it.

    ExecuTorch's kernel takes the first weight of a pair from the upper half of its byte, XNNPACK
    from the lower. So the pairs of a row are turned round, and a tied head reads the same bytes.
    """

    def __init__(self, table: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)
        self.register_buffer("scales", scales)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return a row for each token."""
        rows = torch.ops.quantized_decomposed.embedding_4bit.dtype(
            self.get_buffer("table"), self.get_buffer("scales"), None, -8, 7, tokens,
            dtype=torch.float32,
        )  # fmt: skip
        return rows.unflatten(-1, (-1, 2)).flip(-1).flatten(1)


class AcrossInt4Embedding(nn.Module):  # type: ignore[misc]  # it is Any here
    """A table of four bits as Vulkan's linear layers have it: a row of scales is for one group.

    No kernel reads that, so codes are taken apart by arithmetic, which is exact in float32.
    """

    def __init__(self, table: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)
        self.register_buffer("scales", scales)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return a row for each token."""
        pairs = functional.embedding(tokens, self.get_buffer("table")).to(torch.float32)
        upper = torch.floor(pairs / 16)
        codes = torch.stack((pairs - upper * 16, upper), -1).flatten(1) - 8
        scales = self.get_buffer("scales").index_select(1, tokens).permute(1, 0)
        grouped = codes.unflatten(1, (scales.shape[1], -1))
        return (grouped * scales[..., None]).flatten(1)


class FloatEmbedding(nn.Module):  # type: ignore[misc]  # it is Any here
    """A table of float32 or float16."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return a row for each token."""
        return functional.embedding(tokens, self.get_buffer("table")).to(torch.float32)
