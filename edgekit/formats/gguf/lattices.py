"""The blocks of GGUF's tensor types for a solver: scales as ggml chooses them, and codes put in.

ggml quantizes a block with weights for its columns; of the bytes it makes, the scales stay and the
codes are written again. So the scales of K-quants, which are nested, need no search of their own.
Source of the layouts: ``dequantize_row_*`` in ggml/src/ggml-quants.c of llama.cpp 0c1e57098.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

from edgekit.formats.gguf import tensor_types
from edgekit.quant.lattice import BlockScales, Lattice


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Rows: TypeAlias = npt.NDArray[np.float32]
    Bytes: TypeAlias = npt.NDArray[np.uint8]
    Stored: TypeAlias = npt.NDArray[np.generic]


@dataclass(frozen=True, kw_only=True)
class Plane:
    """Some bits of every code of a block.

    A run of bytes holds, from its lowest bits up, as many runs of weights as fit into a byte.
    """

    first_byte: int  # of the block
    run_bytes: int
    bits: int
    of_bit: int = 0  # of the code

    def put(self, codes: "Bytes", blocks: "Bytes") -> None:
        """Write the bits of ``codes``, ``(rows, weights)``, into ``blocks``, ``(rows, bytes)``."""
        per_byte = 8 // self.bits
        runs = codes.reshape(len(codes), -1, per_byte, self.run_bytes)
        bits = (runs >> self.of_bit) & (2**self.bits - 1)
        held = bits[:, :, 0].copy()
        for place in range(1, per_byte):
            held |= bits[:, :, place] << (self.bits * place)
        flat = held.reshape(len(codes), -1)
        blocks[:, self.first_byte : self.first_byte + flat.shape[1]] = flat


@dataclass(frozen=True, kw_only=True)
class GgmlLattice:
    """The lattice of one tensor type."""

    tensor_type: str
    group_weights: int
    planes: tuple[Plane, ...]
    values: "Sequence[int]"  # of the codes
    read: "Callable[[Bytes], tuple[Rows, Rows]]"  # scales and offsets of the groups of blocks

    @property
    def block_weights(self) -> int:
        """As many as ggml quantizes together."""
        return tensor_types.TENSOR_TYPES[self.tensor_type].block_weights

    @cached_property
    def levels(self) -> "Rows":
        """The values of the codes: float32, shape ``(codes,)``."""
        import numpy as np

        return np.array(self.values, np.float32)

    def choose(self, values: "Rows", importance: "Rows") -> BlockScales:
        """Choose as ggml does with an importance matrix; see `Lattice.choose`."""
        stored = tensor_types.quantize(values, self.tensor_type, importance=importance)
        blocks = stored.reshape(len(values), -1)
        scales, offsets = self.read(blocks)
        return BlockScales(scales=scales, offsets=offsets, stored=blocks)

    def pack(self, codes: "Bytes", blocks: Sequence[BlockScales]) -> "list[Stored]":
        """Put codes into the bytes of the blocks; see `Lattice.pack`."""
        import numpy as np

        rows = len(codes)
        held = np.stack([block.stored for block in blocks], 1)
        flat = held.reshape(-1, held.shape[-1])
        for plane in self.planes:
            plane.put(codes.reshape(len(flat), self.block_weights), flat)
        return [held.reshape(rows, -1)]


def _half(blocks: "Bytes", first_byte: int) -> "Rows":
    import numpy as np

    pairs = np.ascontiguousarray(blocks[:, first_byte : first_byte + 2])
    return pairs.view("<f2").astype(np.float32)


def _one_scale(blocks: "Bytes") -> "tuple[Rows, Rows]":
    import numpy as np

    scales = _half(blocks, 0)
    return scales, np.zeros_like(scales)


def _scale_and_minimum(blocks: "Bytes") -> "tuple[Rows, Rows]":
    return _half(blocks, 0), _half(blocks, 2)


def _of_q2_k(blocks: "Bytes") -> "tuple[Rows, Rows]":
    import numpy as np

    nested = blocks[:, :16]
    scales, minima = (nested & 15).astype(np.float32), (nested >> 4).astype(np.float32)
    return _half(blocks, 80) * scales, -_half(blocks, 82) * minima


def _of_q3_k(blocks: "Bytes") -> "tuple[Rows, Rows]":
    import numpy as np

    packed = blocks[:, 96:108]
    low = np.concatenate((packed[:, :8] & 15, packed[:, :8] >> 4), 1)
    high = np.concatenate([(packed[:, 8:] >> (2 * part)) & 3 for part in range(4)], 1)
    scales = _half(blocks, 108) * ((low | high << 4).astype(np.float32) - 32)
    return scales, np.zeros_like(scales)


def _of_q4_k(blocks: "Bytes") -> "tuple[Rows, Rows]":
    import numpy as np

    first, second, third = (blocks[:, at : at + 4] for at in (4, 8, 12))
    scales = np.concatenate((first & 63, (third & 15) | (first >> 6) << 4), 1)
    minima = np.concatenate((second & 63, (third >> 4) | (second >> 6) << 4), 1)
    return (
        _half(blocks, 0) * scales.astype(np.float32),
        -_half(blocks, 2) * minima.astype(np.float32),
    )


def _of_q6_k(blocks: "Bytes") -> "tuple[Rows, Rows]":
    import numpy as np

    scales = _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return scales, np.zeros_like(scales)


def _lattice(
    tensor_type: str,
    group_weights: int,
    values: Sequence[int],
    read: "Callable[[Bytes], tuple[Rows, Rows]]",
    *planes: Plane,
) -> GgmlLattice:
    return GgmlLattice(
        tensor_type=tensor_type,
        group_weights=group_weights,
        planes=planes,
        values=values,
        read=read,
    )


def _plane(first_byte: int, run_bytes: int, bits: int, of_bit: int = 0) -> Plane:
    return Plane(first_byte=first_byte, run_bytes=run_bytes, bits=bits, of_bit=of_bit)


_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
LATTICES: Mapping[str, Lattice] = {
    lattice.tensor_type: lattice
    for lattice in (
        _lattice("Q4_0", 32, range(-8, 8), _one_scale, _plane(2, 16, 4)),
        _lattice("Q4_1", 32, range(16), _scale_and_minimum, _plane(4, 16, 4)),
        _lattice("Q5_0", 32, range(-16, 16), _one_scale, _plane(2, 1, 1, 4), _plane(6, 16, 4)),
        _lattice("Q5_1", 32, range(32), _scale_and_minimum, _plane(4, 1, 1, 4), _plane(8, 16, 4)),
        _lattice("IQ4_NL", 32, _IQ4_NL, _one_scale, _plane(2, 16, 4)),
        _lattice("Q2_K", 16, range(4), _of_q2_k, _plane(16, 32, 2)),
        _lattice("Q3_K", 16, range(-4, 4), _of_q3_k, _plane(0, 32, 1, 2), _plane(32, 32, 2)),
        _lattice("Q4_K", 32, range(16), _of_q4_k, _plane(16, 32, 4)),
        _lattice("Q5_K", 32, range(32), _of_q4_k, _plane(16, 32, 1, 4), _plane(48, 32, 4)),
        _lattice("Q6_K", 16, range(-32, 32), _of_q6_k, _plane(0, 64, 4), _plane(128, 32, 2, 4)),
    )
}
