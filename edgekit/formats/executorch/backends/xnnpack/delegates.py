"""The segments of a decoder as delegates: what XNNPACK must compute, with a layer's weights.

A segment of each shape is exported once, with weights that have no content. XNNPACK's own
serializer writes down the operators; then each layer gets a copy with its own names and
tensor types.
"""

import copy
import functools
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias, assert_never

# This is the workstation's half: nothing that runs on a device imports it.
import torch  # noqa: TID253
from torch import Tensor, fx, nn  # noqa: TID253

from edgekit.formats.executorch import lowering, tensor_types
from edgekit.formats.executorch.assembly import Slice
from edgekit.formats.executorch.backends import xnnpack
from edgekit.formats.executorch.backends.xnnpack import decoder, limits
from edgekit.formats.executorch.backends.xnnpack.decoder import (
    FirstHalf,
    SecondHalf,
    Segment,
    SegmentShape,
)
from edgekit.formats.executorch.contents import SLICE
from edgekit.formats.executorch.lowering import TRACED_TOKENS
from edgekit.model.mixers import DeltaNet, ShortConv
from edgekit.model.shapes import Shape
from edgekit.model.spec import DecoderSpec


Example: TypeAlias = tuple[Shape, dict[int, Any]]  # and which axes have any length

aten = torch.ops.aten
# What XNNPACK's serializer calls an operator of the exported graph.
_NAMES = {
    aten.add.Tensor: "aten.add.Tensor",
    aten.bmm.default: "aten.bmm.default",
    aten.cat.default: "aten.cat.default",
    aten.exp.default: "aten.exp.default",
    aten.linear.default: "aten.linear.default",
    aten.log.default: "aten.log.default",
    aten.minimum.default: "aten.minimum.default",
    aten.mul.Tensor: "aten.mul.Tensor",
    aten.permute.default: "aten.permute_copy.default",
    aten.relu.default: "aten.relu.default",
    aten.reshape.default: "aten.view_copy.default",
    aten.rsqrt.default: "aten.rsqrt.default",
    aten.sigmoid.default: "aten.sigmoid.default",
    aten.slice.Tensor: "aten.slice_copy.Tensor",
    aten.softmax.int: "aten._softmax.default",
    aten.sub.Tensor: "aten.sub.Tensor",
    aten.view.default: "aten.view_copy.default",
}
_TRACED_FILLED = 5  # as lowering.TRACED_TOKENS, and another


class Segments:
    """The segments of a decoder as delegates, each shape exported once."""

    def __init__(
        self,
        spec: DecoderSpec,
        tensor_types: Mapping[str, str],
        context_tokens: int,
        *,
        uses_llm_operators: bool,
    ) -> None:
        self._spec, self._tensor_types = spec, tensor_types
        self._context_tokens, self._shapes = context_tokens, dict(spec.weights())
        self.numbers: dict[str, bytes] = {}
        self.operators = 0
        self.weights: set[str] = set()  # by role
        self.slices: dict[str, Slice] = {}
        self.modules = [
            self._delegate(shape, decoder.segment_roles(spec, index))
            for index, shape in enumerate(
                decoder.segment_shapes(spec, uses_llm_operators=uses_llm_operators)
            )
        ]

    def _delegate(self, shape: SegmentShape, roles: Mapping[str, str]) -> nn.Module:
        from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import (
            serialize_xnnpack_binary,
        )

        template = _template(self._spec, shape, self._context_tokens)
        graph = template.instance(roles, self._tensor_types)
        self.numbers |= template.numbers
        self.operators += len(graph.xnodes)
        used = template.weights(roles)
        self.weights.update(key.partition(SLICE)[0] for key in used)
        for key in used:
            if SLICE in key:
                self.slices.update(self._slices(key))
        return lowering.delegate(
            xnnpack.BACKEND.id,
            serialize_xnnpack_binary(graph, bytearray()),
            functools.partial(_outputs, self._spec, shape),
        )

    def _slices(self, key: str) -> Iterator[tuple[str, Slice]]:
        """Yield the parts of some rows of a weight: one layer's of what makes embeddings of all."""
        role, _, first = key.partition(SLICE)
        own, shape = self._spec.layer_embedding, self._shapes[role]
        assert own is not None  # noqa: S101 - nothing else is there in slices
        for part in tensor_types.parts(role, shape, self._tensor_types[role]):
            row_bytes = part.size_bytes // shape[0]
            yield (
                key + part.key.removeprefix(role),
                Slice(
                    of=part.key,
                    first_byte=int(first) * row_bytes,
                    size_bytes=own.width * row_bytes,
                ),
            )


def _outputs(spec: DecoderSpec, shape: SegmentShape, x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
    """Return tensors of the shapes that a segment gives."""
    net, tokens = shape.ends, x.shape[0]
    made: list[Shape] = []
    if isinstance(net, DeltaNet):
        made.append(net.states(spec.hidden_size)["recurrent"])
    if shape.begins is None:
        made.append((1, spec.vocab_size))
    else:
        made += [(tokens, spec.hidden_size)] if shape.changes_x else []
        made += _begun(spec, shape.begins, tokens)
    return tuple(x.new_empty(size) for size in made)


def _begun(
    spec: DecoderSpec, begins: FirstHalf | ShortConv | DeltaNet, tokens: int
) -> Iterator[Shape]:
    """Yield the shapes of what the first half of a layer gives."""
    match begins:
        case ShortConv():
            yield from [(tokens, spec.hidden_size)] * 2
        case DeltaNet():
            yield (tokens, begins.value_width)
            yield from [(tokens, begins.value_heads)] * 2
            yield (tokens, begins.channels)
        case FirstHalf(attention=a):
            made: list[Shape]
            if begins.feeds_mix:
                made = [
                    (a.num_kv_heads, tokens * (a.heads // a.num_kv_heads), a.head_dim),
                    (a.num_kv_heads, a.head_dim, tokens),
                    (a.num_kv_heads, tokens, a.head_dim),
                ]
            else:
                all_heads = (a.heads, a.num_kv_heads, a.num_kv_heads)
                made = [(tokens, heads, a.head_dim) for heads in all_heads]
            yield from made if a.has_cache else made[:1]
            if a.has_output_gate:
                yield (tokens, a.query_width)
        case _:
            assert_never(begins)


@functools.lru_cache(maxsize=32)  # a decoder with two kinds of layers has a dozen
def _template(spec: DecoderSpec, shape: SegmentShape, context_tokens: int) -> "_Template":
    return _Template(spec, shape, context_tokens)


class _Template:
    """What XNNPACK must compute for a shape of segment, with float32 weights without content."""

    def __init__(self, spec: DecoderSpec, shape: SegmentShape, context_tokens: int) -> None:
        self.numbers: dict[str, bytes] = {}
        self._weights: dict[str, Any] = {}  # the values that are weights, by name in the segment
        self._graph = self._translate(_export_segment(spec, shape, context_tokens))

    def _translate(self, exported: Any) -> Any:
        from executorch.backends.xnnpack.operators.node_visitor import get_node_visitors
        from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as schema
        from executorch.exir._serialize._named_data_store import NamedDataStore

        constants = _constants(exported)
        externals = _externals(exported, constants)
        graph = schema.XNNGraph(
            version="0", xnodes=[], xvalues=[], num_externs=len(externals), input_ids=[],
            output_ids=[], constant_data=[schema.ConstantDataOffset(0, 0)],
        )  # fmt: skip
        for name in exported.graph_signature.parameters:
            exported.state_dict[name] = torch.empty(1)  # a visitor copies what a weight holds
        visitors = get_node_visitors(exported, externals, NamedDataStore())
        ids: dict[fx.Node, int] = {}
        for node in exported.graph.nodes:
            if node.target in _NAMES:
                _prepare(node)
                visitors[_NAMES[node.target]].define_node(node, graph, ids, 0)
                _mend(node, graph.xnodes[-1].xnode_union)
            else:
                _refuse_arithmetic(node)
        _start_small(graph, ids)
        self._name_constants(graph, {n: ids[n] for n in ids if n.name in constants}, exported)
        return graph

    def _name_constants(self, graph: Any, ids: Mapping[fx.Node, int], exported: Any) -> None:
        constants = _constants(exported)
        for node, id in ids.items():
            value, name = graph.xvalues[id].xvalue_union, constants[node.name]
            if name in exported.graph_signature.parameters:
                self._weights[name] = id
                continue
            held = exported.constants.get(name, exported.state_dict.get(name))
            content = held.contiguous().numpy().tobytes()
            key = f"constant.{content[:4].hex()}x{len(content) // 4}"
            graph.constant_data[value.constant_buffer_idx].named_key = key
            self.numbers[key] = content

    def weights(self, roles: Mapping[str, str]) -> set[str]:
        """Return the roles of the weights that are operands of the graph, or keys of slices."""
        return {roles[name] for name in self._weights}

    def instance(self, roles: Mapping[str, str], stored: Mapping[str, str]) -> Any:
        """Return the graph with the weights of one layer, stored as told."""
        graph = copy.deepcopy(self._graph)
        for name, id in self._weights.items():
            key = roles[name]
            kind = stored[key.partition(SLICE)[0]]
            data = graph.constant_data[graph.xvalues[id].xvalue_union.constant_buffer_idx]
            tensor = graph.xvalues[id].xvalue_union
            sizes = [part.size_bytes for part in tensor_types.parts(key, tuple(tensor.dims), kind)]
            data.named_key, data.size = key, sizes[0]
            if kind == "F16":
                tensor.datatype = _half()
            elif sizes[1:]:
                _quantize(graph, id, kind, key + tensor_types.SCALE, sizes[1])
        return _with_rounded_inputs(graph)


def _half() -> Any:
    from executorch.backends.xnnpack.serialization.xnnpack_graph_schema import XNNDatatype

    return XNNDatatype.xnn_datatype_fp16


def _export_segment(spec: DecoderSpec, shape: SegmentShape, context_tokens: int) -> Any:
    weights = {name: torch.empty(size) for name, size in shape.weights}
    inputs, (first, *others) = _example(spec, shape, context_tokens)
    return torch.export.export(
        Segment(spec, shape, weights),
        tuple(inputs),
        dynamic_shapes=(first, tuple(others)) if others else (first,),
        strict=False,
    )


def _example(
    spec: DecoderSpec, shape: SegmentShape, context_tokens: int
) -> tuple[list[Tensor], list[dict[int, Any]]]:
    """Return inputs of a segment, and which of their axes have any length."""
    longest = limits.call_tokens(spec, context_tokens=context_tokens)
    tokens = torch.export.Dim("tokens", min=1, max=longest)
    filled = torch.export.Dim("filled", min=1, max=context_tokens)
    begins = shape.begins
    rows, count = ({0: tokens}, TRACED_TOKENS) if begins else ({}, 1)
    given: list[Example] = [((count, spec.hidden_size), rows)]
    match shape.ends:
        case None:
            pass
        case ShortConv(taps=taps):
            given += given * (1 + taps)
        case DeltaNet() as net:
            given.append(((count, net.value_width), rows))
            given += _example_of_rule(spec, net, tokens)
            given += [] if begins else [((1, 1, TRACED_TOKENS), {2: tokens})]
        case SecondHalf() as half:
            given += _example_of_attention(half, tokens if begins else None, filled)
        case other:
            assert_never(other)
    if shape.ends and (own := spec.layer_embedding):
        given += [((count, width), rows) for width in (spec.hidden_size, own.width)]
    if isinstance(begins, FirstHalf):
        if begins.rope_width is not None:
            given += [((count, 1, begins.rope_width), rows)] * 2
        if begins.attention.query_growth:
            given.append(((count, 1, 1), rows))
    return [torch.zeros(size) for size, _ in given], [axes for _, axes in given]


def _example_of_attention(half: SecondHalf, tokens: Any, filled: Any) -> Iterator[Example]:
    """Yield what the second half of attention reads, of one token if ``tokens`` is None."""
    a, count = half.attention, TRACED_TOKENS if tokens else 1
    heads, width, shared = a.num_kv_heads, a.head_dim, a.heads // a.num_kv_heads
    if half.mixes:
        yield (heads, shared * count, width), {1: shared * tokens} if tokens else {}
        yield (heads, width, _TRACED_FILLED), {2: filled}
        yield (heads, _TRACED_FILLED, width), {1: filled}
        yield (shared * count, 1), {0: shared * tokens} if tokens else {}
        yield (1, _TRACED_FILLED), {1: filled}
    else:
        yield (count, a.query_width), {0: tokens} if tokens else {}
    if a.has_output_gate:
        yield (count, a.query_width), {0: tokens} if tokens else {}


def _example_of_rule(spec: DecoderSpec, net: DeltaNet, tokens: Any) -> Iterator[Example]:
    """Yield what the gated delta rule reads: of all tokens, whichever are wanted."""
    rows, count = {0: tokens}, TRACED_TOKENS
    yield from [((count, net.value_heads), rows)] * 2
    yield (limits.MASKS, count, count), {1: tokens, 2: tokens}
    yield net.states(spec.hidden_size)["recurrent"], {}
    yield from [((count, net.channels), rows)] * net.taps


def _constants(exported: Any) -> dict[str, str]:
    """Return the placeholders that are not inputs, with the names of what they hold."""
    signature = exported.graph_signature
    return {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }


def _externals(exported: Any, constants: Mapping[str, str]) -> dict[fx.Node, Any]:
    from executorch.backends.xnnpack.utils import xnnpack_constants as flags
    from executorch.backends.xnnpack.xnnpack_preprocess import ExternalMeta

    found: dict[fx.Node, Any] = {}
    for node in exported.graph.nodes:
        if node.op == "placeholder" and node.name not in constants:
            found[node] = ExternalMeta(len(found), flags.XNN_VALUE_FLAG_EXTERNAL_INPUT)
        if node.op == "output":
            for given in node.args[0]:
                found[given] = ExternalMeta(len(found), flags.XNN_VALUE_FLAG_EXTERNAL_OUTPUT)
    return found


def _prepare(node: fx.Node) -> None:
    """Write the one length of a view that depends on the number of tokens as -1."""
    if _NAMES[node.target] == "aten.view_copy.default":
        lengths = [length if isinstance(length, int) else -1 for length in node.args[1]]
        node.args = (node.args[0], lengths)


def _mend(node: fx.Node, made: Any) -> None:
    """Let a slice keep axes of any length whole, which XNNPACK writes as 0."""
    from executorch.backends.xnnpack.serialization.xnnpack_graph_schema import XNNStaticSlice

    if isinstance(made, XNNStaticSlice):
        lengths = node.meta["val"].shape
        made.sizes = [
            size if isinstance(length, int) else 0
            for size, length in zip(made.sizes, lengths, strict=True)
        ]


def _start_small(graph: Any, ids: Mapping[fx.Node, int]) -> None:
    """Let axes of any length begin with 1: XNNPACK sets memory aside for what it reads first."""
    for node, id in ids.items():
        graph.xvalues[id].xvalue_union.dims = [
            length if isinstance(length, int) else 1 for length in node.meta["val"].shape
        ] or [1]


def _refuse_arithmetic(node: fx.Node) -> None:
    """Check that a node without a translation computes lengths only."""
    if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor):
        raise AssertionError(f"XNNPACK gets no {node.target}")


def _quantize(graph: Any, id: int, stored: str, key: str, scale_bytes: int) -> None:
    """Turn a float32 weight of a graph into one of codes and scales."""
    from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as schema
    from executorch.backends.xnnpack.utils.xnnpack_constants import UINT64_MAX

    buffer = len(graph.constant_data)
    graph.constant_data.append(
        schema.ConstantDataOffset(offset=UINT64_MAX, size=scale_bytes, named_key=key)
    )
    tensor = graph.xvalues[id].xvalue_union
    params: Any
    if stored == "INT8":
        tensor.datatype = schema.XNNDatatype.xnn_datatype_qcint8
        params = schema.PerChannelQuant(
            scale=[], channel_dim=0, scale_buffer_idx=buffer, num_scales=scale_bytes // 4
        )
    else:
        tensor.datatype = schema.XNNDatatype.xnn_datatype_qbint4
        params = schema.PerChannelGroupQuant(
            scale=[], channel_dim=0, group_size=tensor_types.TENSOR_TYPES[stored].block_weights,
            scale_buffer_idx=buffer, num_scales=scale_bytes // 2,
        )  # fmt: skip
    graph.xvalues[id].xvalue_union = schema.XNNQuantizedTensorValue(
        tensor_value=tensor, quant_params=params
    )


def _with_rounded_inputs(graph: Any) -> Any:
    """Let what meets quantized weights be rounded to int8, token by token, once for all of them."""
    from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as schema

    rounded: dict[int, int] = {}
    nodes = []
    for node in graph.xnodes:
        made = node.xnode_union
        if isinstance(made, schema.XNNFullyConnected) and isinstance(
            graph.xvalues[made.filter_id].xvalue_union, schema.XNNQuantizedTensorValue
        ):
            if made.input1_id not in rounded:
                nodes.append(_rounding(graph, made.input1_id, node.debug_handle))
                rounded[made.input1_id] = len(graph.xvalues) - 1
            made.input1_id = rounded[made.input1_id]
        nodes.append(node)
    graph.xnodes = nodes
    return graph


def _rounding(graph: Any, id: int, debug_handle: int) -> Any:
    from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as schema
    from executorch.backends.xnnpack.utils.xnnpack_constants import XNN_INVALID_VALUE_ID

    made = len(graph.xvalues)
    tensor = schema.XNNTensorValue(
        datatype=schema.XNNDatatype.xnn_datatype_qdint8,
        num_dims=2,
        dims=list(graph.xvalues[id].xvalue_union.dims),
        external_id=XNN_INVALID_VALUE_ID,
        constant_buffer_idx=0,
        flags=0,
        id_out=made,
    )
    value = schema.XNNQuantizedTensorValue(
        tensor_value=tensor, quant_params=schema.PerTokenDynamicQuant(num_nonbatch_dims=1)
    )
    graph.xvalues.append(schema.XValue(xvalue_union=value))
    convert = schema.XNNConvert(input_id=id, output_id=made, flags=0)
    return schema.XNode(xnode_union=convert, debug_handle=debug_handle)
