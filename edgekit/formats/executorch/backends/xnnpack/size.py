"""How large a program for XNNPACK gets, before there is one.

Weights are known to the byte. What says how to use them grows with the operators of a segment and
the weights they name; how fast was measured with executorch 1.5.1 on tiny models of eight families
and on SmolLM2-135M. It is 0.4 % of that model's file, and known within a tenth.
"""

from collections.abc import Sequence
from typing import assert_never

from edgekit.formats.executorch.arithmetic import (
    RELU2_OPERATORS,
    XIELU_OPERATORS,
    query_growth,
    ropes,
)
from edgekit.formats.executorch.backends.xnnpack import limits
from edgekit.formats.executorch.backends.xnnpack.attention import mixed_here
from edgekit.formats.executorch.tensor_types import ALIGNMENT, SCALE, Part, has_pairs
from edgekit.model.mixers import Attention, DeltaNet, ShortConv
from edgekit.model.norm import Norm
from edgekit.model.rope import Rope
from edgekit.model.spec import DecoderSpec


_DELEGATE_BYTES, _OPERATOR_BYTES, _NAME_BYTES = 312, 107, 86
_SCALES_BYTES = 42  # what a delegate says of a weight's
_HEAD_BYTES, _LAYER_BYTES, _PART_BYTES = 6_808, 1_650, 44
_TURN_BYTES, _ROPE_BYTES = 1_012, 1_280  # of rotations: what they share, and each
_GROWTH_BYTES = 1_850  # of queries
_BORDER_BYTES = 2_100  # a choice between two rotations
_PAIRED_BYTES = 750  # what pairs of an embedding of four bits
_LLM_BYTES = -1_100  # fewer operators between the delegates, where they compute every layer
_CONV_BYTES, _NET_BYTES = 500, 2_100  # of a layer, for the state that it keeps
_LOG_DECAY_OPERATORS = 13
_LOOKUP_BYTES = 400  # of a layer's row of a table
_LAYER_PAIRED_BYTES = 350  # what its pairs take apart
_EMBEDDING_NAMES = 5  # in a delegate: a norm of all layers, a mean, three numbers
_SLICED = "layer_embedding_projection"
_ACTIVATIONS = {"silu": 2, "gelu_tanh": 6, "relu2": RELU2_OPERATORS, "xielu": XIELU_OPERATORS}
_VALUE_NORM = 5  # operators
_CONSTANTS_BYTES = 5 * ALIGNMENT + 256  # numbers, means and frequencies


def file_bytes(spec: DecoderSpec, parts: Sequence[Part], *, uses_llm_operators: bool) -> int:
    """Return about how many bytes a program takes with all its weights."""
    scaled = sum(part.key.endswith(SCALE) for part in parts)
    weights_bytes = sum(-(-part.size_bytes // ALIGNMENT) * ALIGNMENT for part in parts)
    depth = len(spec.layers)
    count = operators(spec, uses_llm_operators=uses_llm_operators, is_rounded=scaled > 0)
    delegates_bytes = (
        (_DELEGATE_BYTES + ALIGNMENT // 2) * (depth + 1)
        + _OPERATOR_BYTES * count
        # A weight's name is in a delegate; so are those of two means and two numbers.
        + _NAME_BYTES * (len(parts) + 5 * (depth + 1))
        + _SCALES_BYTES * scaled
    )
    head_bytes = _HEAD_BYTES + _LAYER_BYTES * depth + _PART_BYTES * len(parts)
    if spec.layer_embedding:
        slices = sum(part.key.startswith(_SLICED) for part in parts) * depth
        delegates_bytes += _NAME_BYTES * (slices + _EMBEDDING_NAMES * depth)
        delegates_bytes += _SCALES_BYTES * (slices - depth)
        head_bytes += _PART_BYTES * slices + _LOOKUP_BYTES * depth
        head_bytes += (
            _LAYER_PAIRED_BYTES * depth if has_pairs("layer_embedding", spec, parts) else 0
        )
    turns = len(ropes(spec))
    head_bytes += (_TURN_BYTES if turns else 0) + _ROPE_BYTES * turns
    head_bytes += _GROWTH_BYTES if query_growth(spec) else 0
    head_bytes += _BORDER_BYTES if spec.original_max_position_embeddings is not None else 0
    head_bytes += _PAIRED_BYTES if has_pairs("token_embedding", spec, parts) else 0
    mixers = [spec.mixer(index) for index in range(depth)]
    head_bytes += _CONV_BYTES * sum(isinstance(mixer, ShortConv) for mixer in mixers)
    head_bytes += _NET_BYTES * sum(isinstance(mixer, DeltaNet) for mixer in mixers)
    head_bytes += limits.masks_bytes(spec)
    # Fewer where some layers go without the operator, and none of them where all do.
    by_operator = mixed_here(spec, uses_llm_operators=uses_llm_operators).count(False)
    head_bytes += _LLM_BYTES * by_operator // depth
    return weights_bytes + delegates_bytes + head_bytes + _CONSTANTS_BYTES


def operators(spec: DecoderSpec, *, uses_llm_operators: bool, is_rounded: bool) -> int:
    """Return how many operators XNNPACK gets, as `decoder` has them."""
    mixes = mixed_here(spec, uses_llm_operators=uses_llm_operators)
    return sum(
        _segment_operators(spec, index, mixes, is_rounded=is_rounded)
        for index in range(len(spec.layers) + 1)
    )


def _segment_operators(
    spec: DecoderSpec, index: int, mixes: Sequence[bool | None], *, is_rounded: bool
) -> int:
    """Count those of a segment; what meets rounded weights is rounded by one operator more."""
    count = 0
    if index > 0:  # the output matrix, gate and up together, down
        count += _second_half(spec, index - 1, mixes=bool(mixes[index - 1]))
        count += (3 if spec.residual == "serial" else 1) if is_rounded else 0
        count += 3 if spec.layer_embedding and is_rounded else 0
    if index == len(spec.layers):
        return (
            count
            + _norm(spec.norm)
            + 1
            + (4 if spec.final_logit_softcap is not None else 0)
            + is_rounded
        )
    count += _first_half(spec, index, mixes=bool(mixes[index]))
    return count + ((1 if spec.residual == "serial" else 2) if is_rounded else 0)


def _first_half(spec: DecoderSpec, index: int, *, mixes: bool) -> int:
    count = _norm(spec.norm) if spec.has_pre_norms else 0
    match spec.mixer(index):
        case Attention() as a:
            count += _queries_keys_and_values(a, spec.layers[index].rope, mixes=mixes)
        case ShortConv():
            count += 5  # a product, its three parts, two of them multiplied
        case DeltaNet():
            count += 1 + 3 + 2 + 2 + _LOG_DECAY_OPERATORS  # what is mixed, gate, beta
        case other:
            assert_never(other)
    return count + (_mlp(spec) if spec.residual == "parallel" else 0)


def _queries_keys_and_values(a: Attention, rope: Rope | None, *, mixes: bool) -> int:
    turned = 2 if a.has_cache else 1  # queries and keys
    made = turned + (a.has_cache and not a.values_are_keys)
    count = 2 * made + 1 + (1 if a.query_growth else 0)  # matrices, heads apart, a scale
    count += 4 if a.has_output_gate else 0
    if mixes:
        count += 5 if a.has_cache else 3
    if a.query_key_norm:
        count += turned * (_norm(a.query_key_norm) + (2 if a.head_norms == "together" else 0))
    if rope:
        count += turned * (6 if rope.width == a.head_dim else 9)
    if a.has_cache and a.value_norm_epsilon is not None:
        count += _VALUE_NORM
    return count


def _second_half(spec: DecoderSpec, index: int, *, mixes: bool) -> int:
    count = 2  # the output matrix, the residual
    match spec.mixer(index):
        case Attention() as a:
            count += _mix(a, spec.layers[index].window_tokens) if mixes else 0
            count += a.has_output_gate
        case ShortConv() as conv:
            count += _convolution(conv.taps) + conv.has_bias + 1
        case DeltaNet() as net:
            is_last = index == len(spec.layers) - 1
            count += _convolution(net.taps) + 2 + _delta_rule(net)
            count += (3 if is_last else 0) + _norm(net.norm) + 2
        case other:
            assert_never(other)
    count += _norm(spec.norm) if spec.has_post_norms else 0
    if spec.residual == "serial":
        count += _mlp(spec) + (_norm(spec.norm) if spec.has_pre_norms else 0)
    if spec.layer_embedding:  # three matrices, what they are multiplied with, sums and norms
        count += 3 + 4 + 2 + _ACTIVATIONS[spec.activation] + 2 * _norm(spec.norm)
    return count + spec.has_layer_scales


def _mix(a: Attention, window_tokens: int | None) -> int:
    count = 9 + (4 if a.attn_logit_softcap is not None else 0)
    return count + (0 if window_tokens is None else 4)


def _convolution(taps: int) -> int:
    return 1 + taps + taps + taps - 1  # taps as rows, each row, its product, and their sum


def _delta_rule(net: DeltaNet) -> int:
    return 69 + (6 if net.values_per_key > 1 else 0) + 5 * (limits.MASKS - 4)


def _norm(norm: Norm) -> int:
    return 6 + (2 if norm.kind == "layer" else 0) + norm.has_bias


def _mlp(spec: DecoderSpec) -> int:
    """Count the operators of the MLP, the norm after it and the residual."""
    count = _ACTIVATIONS[spec.activation] + (4 if spec.is_gated else 2) + 1
    return count + (_norm(spec.norm) if spec.has_post_norms else 0)
