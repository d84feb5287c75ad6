"""The value heads of a delta net in ggml's order, where they take turns at the key heads.

ggml lets value head p read key head p % key_heads, a checkpoint p // values_per_key. So the heads
change places before anything is rounded: a block of a K-quant spans two heads of 128.
Source: ``_LinearAttentionVReorderBase`` in conversion/qwen.py, and ``ggml_gated_delta_net``, of
llama.cpp 0c1e57098.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from edgekit.model.mixers import DeltaNet
from edgekit.model.spec import DecoderSpec
from edgekit.quant.recipe import split_role


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True, kw_only=True)
class ValueHeads:
    """Where a weight has one or more rows, or columns, for each value head."""

    key_heads: int
    values_per_key: int
    width: int  # rows or columns of a head
    first: int = 0  # of the first head
    axis: Literal[0, 1] = 0

    def places(self, to: Literal["file", "checkpoint"]) -> list[int]:
        """Return for each head in one order where it stands in the other."""
        outer, inner = self.key_heads, self.values_per_key
        if to == "checkpoint":
            outer, inner = inner, outer
        return [key * inner + value for value in range(inner) for key in range(outer)]

    def runs(
        self, first: int, count: int, to: Literal["file", "checkpoint"]
    ) -> Iterator[tuple[int, int]]:
        """Yield where some rows, or columns, in one order stand in the other: first, count."""
        places, end = self.places(to), first + count
        if first < self.first:
            stop = min(end, self.first)
            yield first, stop - first
            first = stop
        while first < end:
            head, offset = divmod(first - self.first, self.width)
            taken = min(self.width - offset, end - first)
            yield self.first + places[head] * self.width + offset, taken
            first += taken

    def columns(
        self, rows: "npt.NDArray[np.float32]", to: Literal["file", "checkpoint"]
    ) -> "npt.NDArray[np.float32]":
        """Return a matrix, or a row of it, with its columns in the order of ``to``: as shaped."""
        import numpy as np

        order = [np.arange(at, at + count) for at, count in self.runs(0, rows.shape[-1], to)]
        moved: npt.NDArray[np.float32] = rows.take(np.concatenate(order), axis=-1)
        return moved


def value_heads(role: str, spec: DecoderSpec) -> ValueHeads | None:
    """Return where the value heads of a weight are; None where nothing changes places."""
    layer, part = split_role(role)
    net = None if layer is None else spec.mixer(layer)
    if not isinstance(net, DeltaNet) or 1 in {net.key_heads, net.values_per_key}:
        return None
    heads = ValueHeads(
        key_heads=net.key_heads, values_per_key=net.values_per_key, width=net.value_head_dim
    )
    match part:
        case "delta_qkv" | "delta_taps":
            return replace(heads, first=2 * net.key_width)
        case "delta_gate":
            return heads
        case "delta_beta" | "delta_alpha" | "delta_decay" | "delta_decay_bias":
            return replace(heads, width=1)
        case "delta_output":
            return replace(heads, axis=1)
        case _:
            return None
