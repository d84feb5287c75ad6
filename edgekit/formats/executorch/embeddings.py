"""Token embeddings, a module of torch for each tensor type."""

# This is the workstation's half: nothing that runs on a device imports it.
import torch  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253
from torch.nn import functional  # noqa: TID253

from edgekit.formats.executorch.tensor_types import TENSOR_TYPES, VULKAN_FOUR_BITS
from edgekit.model.spec import DecoderSpec


def empty(spec: DecoderSpec, stored: str) -> nn.Module:
    """Return what makes rows of tokens, with a table that has no content yet."""
    shape = (spec.vocab_size, spec.hidden_size)
    rows, columns = shape
    if stored in {"F32", "F16"}:
        dtype = torch.float32 if stored == "F32" else torch.float16
        return FloatEmbedding(torch.zeros(shape, dtype=dtype))
    from executorch.exir.passes import _quant_patterns_and_replacements  # noqa: F401 - operators

    if stored == "INT8":
        table = torch.zeros(shape, dtype=torch.int8)
        return Int8Embedding(table, torch.ones(rows))
    groups = columns // TENSOR_TYPES[stored].block_weights
    if stored in VULKAN_FOUR_BITS:
        return AcrossInt4Embedding(
            torch.zeros(rows, columns // 2, dtype=torch.uint8), torch.ones(groups, rows)
        )
    return Int4Embedding(
        torch.zeros(rows, columns // 2, dtype=torch.uint8),
        torch.ones(rows, groups, dtype=torch.bfloat16),
    )


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
