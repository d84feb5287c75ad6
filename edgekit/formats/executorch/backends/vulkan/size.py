"""How large a program for Vulkan gets."""

from collections.abc import Iterator, Sequence

from edgekit.formats.executorch.arithmetic import (
    RELU2_OPERATORS,
    XIELU_OPERATORS,
    query_growth,
    ropes,
)
from edgekit.formats.executorch.backends.vulkan.decoder import query_factor
from edgekit.formats.executorch.tensor_types import ALIGNMENT, Part, has_pairs
from edgekit.model.norm import Norm
from edgekit.model.spec import DecoderSpec


_HEAD_BYTES, _OPERATOR_BYTES, _PART_BYTES = 4_614, 132, 189
_LAYER_NORM_BYTES, _ZEROS_BYTES = 175, 170  # beyond an RMS norm's, and for zeros as its bias
# Kernels around its delegate; what rotations share, each adds and a border adds to them; those of
# growing queries, and those that take pairs apart.
_KERNELS, _KERNEL_BYTES = 10, 177
_TURN_KERNELS, _ROPE_KERNELS, _BORDER_KERNELS, _GROWTH_KERNELS, _PAIR_KERNELS = 3, 9, 3, 11, 20


def file_bytes(spec: DecoderSpec, parts: Sequence[Part]) -> int:
    """Return about how many bytes a program for Vulkan takes with all its weights.

    Measured as that of XNNPACK's: within 0.2 % of files of tiny models, 0.1 % of SmolLM2-135M's.
    """
    weights_bytes = sum(-(-part.size_bytes // ALIGNMENT) * ALIGNMENT for part in parts)
    turns = len(ropes(spec))
    kernels = _KERNELS + (_TURN_KERNELS if turns else 0) + _ROPE_KERNELS * turns
    kernels += 0 if spec.original_max_position_embeddings is None else _BORDER_KERNELS
    kernels += _GROWTH_KERNELS if query_growth(spec) else 0
    kernels += _PAIR_KERNELS if has_pairs("token_embedding", spec, parts) else 0
    norms_bytes = sum(
        _LAYER_NORM_BYTES + (0 if norm.has_bias else _ZEROS_BYTES)
        for norm in _norms(spec)
        if norm.kind == "layer"
    )
    return (
        weights_bytes
        + _HEAD_BYTES
        + norms_bytes
        + _OPERATOR_BYTES * operators(spec)
        + _PART_BYTES * len(parts)
        + _KERNEL_BYTES * kernels
    )


def operators(spec: DecoderSpec) -> int:
    """Return how many operators Vulkan gets, as `decoder` has them, the head's once."""
    a = spec.attention
    views = 8 if a.query_key_norm and a.head_norms == "together" else 4  # joined, split again
    bent = {"silu": 2, "gelu_tanh": 1, "relu2": RELU2_OPERATORS, "xielu": XIELU_OPERATORS}
    scales = sum(it is not None for it in (a.query_growth, query_factor(a)))
    layer = 4 + scales + views + 1  # attention's matrices, and itself
    layer += 2 + bent[spec.activation] + (4 if spec.is_gated else 2)  # residuals, the MLP
    turned = sum(layer.rope is not None for layer in spec.layers)
    norms = sum(1 for _ in _norms(spec))
    if a.query_key_norm and a.head_norms == "apart":  # the weights of each head by themselves
        layer += 2 * (1 + a.query_key_norm.has_bias)
    return len(spec.layers) * layer + norms + turned + 3  # positions, the last token, the head


def _norms(spec: DecoderSpec) -> Iterator[Norm]:
    """Yield the norm of each place that has one."""
    depth, of_heads = len(spec.layers), spec.attention.query_key_norm
    before = {"serial": 2, "parallel": 1}[spec.residual] if spec.has_pre_norms else 0
    yield from (spec.norm,) * (depth * (before + 2 * spec.has_post_norms) + 1)
    yield from (of_heads,) * 2 * depth if of_heads else ()
