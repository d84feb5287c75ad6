"""A decoder as Vulkan's delegate computes it: one graph for all layers, caches on the GPU.

Written straight into the graph: passes of the toolchain cost Python time for every node and want
every weight in memory, and what they would find is known here. All but the embedding and the
cosines and sines of positions is inside. Operators are those of ExecuTorch's own exports of Llama
for Vulkan, as backends/vulkan/runtime/graph/ops/impl of executorch 1.5 has them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from edgekit.formats.executorch import tensor_types
from edgekit.formats.executorch.arithmetic import Arithmetic, bias_of, query_growth, ropes
from edgekit.formats.executorch.assembly import Slice, slice_key
from edgekit.formats.executorch.backends.vulkan import limits
from edgekit.formats.executorch.backends.vulkan.graph import ITEM_BYTES, Dtype, Value, VulkanGraph
from edgekit.model.mixers import Attention
from edgekit.model.norm import Norm
from edgekit.model.rope import Rope
from edgekit.model.shapes import Shape
from edgekit.model.spec import DecoderSpec


_FLOATS: Mapping[str, Dtype] = {"F32": "FLOAT32", "F16": "FLOAT16"}
_LAST = -1


@dataclass(frozen=True, kw_only=True)
class Delegate:
    """What the runtime makes its graph of."""

    content: bytes
    numbers: Mapping[str, bytes]  # named data that is not a weight
    weights: frozenset[str]  # the roles of those it multiplies with
    slices: Mapping[str, Slice]  # named data that is a part of a weight's
    operators: int


def query_factor(a: Attention) -> float | None:
    """Return what the scale of scores asks for beyond attention's own, None if nothing."""
    factor = a.softmax_scale * math.sqrt(a.head_dim)
    return None if math.isclose(factor, 1) else factor


def delegate(
    spec: DecoderSpec, tensor_types: Mapping[str, str], *, context_tokens: int, batch_tokens: int
) -> Delegate:
    """Return the graph of a decoder: embedded tokens, waves and positions in, logits out.

    Args:
        spec: The decoder.
        tensor_types: How each weight is stored, by role.
        context_tokens: How many tokens its caches hold.
        batch_tokens: How many are read at once, at most.
    """
    return _Decoder(spec, tensor_types, context_tokens, batch_tokens).delegate()


class _Decoder(Arithmetic[Value]):
    def __init__(
        self,
        spec: DecoderSpec,
        tensor_types: Mapping[str, str],
        context_tokens: int,
        batch_tokens: int,
    ) -> None:
        self.spec, self._tensor_types = spec, tensor_types
        self._shapes = dict(spec.weights())
        self._context_tokens, self._tokens = context_tokens, batch_tokens
        self._graph = VulkanGraph(floats=_FLOATS[tensor_types["final_norm"]])
        self._used: set[str] = set()
        self._slices: dict[str, Slice] = {}
        # A cache is as deep as its context, and all that meets it must be of its kind.
        self._is_buffer = context_tokens > limits.TEXTURE_DEPTH
        self._caches: list[Value] = []
        self._growth: Value | None = None  # what queries are multiplied with, token by token

    def delegate(self) -> Delegate:
        spec, graph = self.spec, self._graph
        x = self._input((1, self._tokens, spec.hidden_size))
        waves = {rope: (self._wave(rope), self._wave(rope)) for rope in ropes(spec)}
        if query_growth(spec):
            self._growth = self._input((1, self._tokens, 1, 1))
        positions = graph.tensor((self._tokens,), is_buffer=True, dtype="INT32")
        inputs = [x, *(wave for pair in waves.values() for wave in pair)]
        inputs += [*([] if self._growth is None else [self._growth]), positions]
        first = graph.call(
            "et_vk.select_as_symint.default",
            positions, graph.scalar(0), graph.scalar(0), graph.size(),
        )  # fmt: skip
        for index, layer in enumerate(spec.layers):
            x = self._layer(index, x, waves[layer.rope] if layer.rope else None, first)
        logits = self._head(x)
        graph.share_memory(kept=[*inputs, logits], alike=self._caches)
        return Delegate(
            content=graph.serialized(inputs, [logits]),
            numbers=graph.numbers,
            weights=frozenset(self._used),
            slices=self._slices,
            operators=len(graph.calls),
        )

    def _input(self, shape: Shape) -> Value:
        return self._graph.tensor(shape, is_buffer=self._is_buffer, staging="FLOAT32")

    def _wave(self, rope: Rope) -> Value:
        return self._input((self._tokens, rope.width))

    def _layer(
        self, index: int, x: Value, waves: tuple[Value, Value] | None, first: Value
    ) -> Value:
        prefix = f"layers.{index}."
        read = self._before(prefix + "attention_norm", x)
        attended = self._attend(index, read, waves, first)
        x = self._add(x, self._after(prefix + "attention_post_norm", attended))
        if self.spec.residual == "serial":
            read = self._before(prefix + "mlp_norm", x)
        return self._add(x, self._after(prefix + "mlp_post_norm", self._mlp(prefix, read)))

    def _attend(
        self, index: int, read: Value, waves: tuple[Value, Value] | None, first: Value
    ) -> Value:
        a, prefix = self.spec.attention, f"layers.{index}."
        query = self._split_heads(self._linear(prefix + "query", read), a.heads, a.head_dim)
        key = self._split_heads(self._linear(prefix + "key", read), a.num_kv_heads, a.head_dim)
        value = self._split_heads(self._linear(prefix + "value", read), a.num_kv_heads, a.head_dim)
        for step in self._steps_of_heads(a, rotates=waves is not None):
            if step == "rotate":
                assert waves is not None  # noqa: S101 - else it is no step
                query, key = self._rotation(query, key, waves)
            else:
                query = self._normalize_heads(a, prefix + "query_norm", query, a.heads)
                key = self._normalize_heads(a, prefix + "key_norm", key, a.num_kv_heads)
        mixed = self._mix(a, self._scaled(a, query), key, value, first)
        joined = self._join_heads(mixed, a.heads, a.head_dim)
        return self._linear(prefix + "attention_output", joined)

    def _rotation(
        self, query: Value, key: Value, waves: tuple[Value, Value]
    ) -> tuple[Value, Value]:
        graph = self._graph
        rotated = self._like(query), self._like(key)
        graph.call(
            "et_vk.apply_rotary_emb_hf.default",
            query, key, *waves, graph.scalar(0), graph.several(rotated),
        )  # fmt: skip
        return rotated

    def _scaled(self, a: Attention, query: Value) -> Value:
        """Return queries times what makes attention's own scale the decoder's, and as grown."""
        factor = query_factor(a)
        if factor is not None:
            query = self._multiply(query, factor)
        return query if self._growth is None else self._multiply(query, self._growth)

    def _mix(self, a: Attention, query: Value, key: Value, value: Value, first: Value) -> Value:
        """Return what attention gathers; the operator has caches of its own, of the shape given."""
        graph = self._graph
        shape = (1, self._context_tokens, a.num_kv_heads, a.head_dim)
        caches = [graph.tensor(shape, is_buffer=self._is_buffer) for _ in range(2)]
        self._caches += caches
        nothing = graph.scalar(None)
        return graph.call(
            "sdpa_with_kv_cache.default",
            query, key, value, *caches, first, graph.scalar(1), nothing, graph.scalar(0.0),
            graph.scalar(True), nothing, self._like(query),
        )  # fmt: skip

    def _mlp(self, prefix: str, read: Value) -> Value:
        first = "gate" if self.spec.is_gated else "up"
        bent = self._activate(prefix, self._linear(prefix + first, read))
        if self.spec.is_gated:
            bent = self._multiply(bent, self._linear(prefix + "up", read))
        return self._linear(prefix + "down", bent)

    def _head(self, x: Value) -> Value:
        """Return the logits of the last token, ``(1, vocabulary)``."""
        spec, graph = self.spec, self._graph
        last = graph.call(
            "aten.select_copy.int", x, graph.scalar(1), graph.scalar(_LAST),
            graph.tensor((1, spec.hidden_size), is_buffer=self._is_buffer),
        )  # fmt: skip
        last = self._normalize(spec.norm, "final_norm", last)
        if spec.vocab_size > limits.TEXTURE_WIDTH and not self._is_buffer:
            there = graph.tensor((1, spec.hidden_size), is_buffer=True)
            last = graph.call("aten.clone.default", last, graph.scalar(None), there)
        role = "token_embedding" if spec.is_tied else "output_head"
        return self._linear(role, last, staging="FLOAT32")

    def _linear(self, role: str, x: Value, *, staging: Dtype | None = None) -> Value:
        graph, (rows, columns) = self._graph, self._shapes[role]
        self._used.add(role)
        stored = self._tensor_types[role]
        if stored == "INT8" and bias_of(role) in self._shapes:  # its operator adds none
            product = self._products(role, x, self._rows_of(x, rows))
            made = self._rows_of(x, rows, staging=staging)
            bias = self._bias(role)
            return graph.call("aten.add.Tensor", product, bias, graph.scalar(1), made)
        made = self._rows_of(x, rows, staging=staging)
        if stored in tensor_types.VULKAN_FOUR_BITS:
            group = tensor_types.TENSOR_TYPES[stored].block_weights
            codes = graph.constant(role, (rows, columns // 2), "UINT8")
            scales = graph.constant(role + tensor_types.SCALE, (columns // group, rows), "FLOAT32")
            return graph.call(
                "et_vk.linear_q4gsw.default",
                x, codes, scales, graph.scalar(group), self._bias(role), made,
            )  # fmt: skip
        return self._products(role, x, made)

    def _products(self, role: str, x: Value, made: Value) -> Value:
        """Return x times a matrix, some rows of it at a time where they are too many."""
        graph, (rows, columns) = self._graph, self._shapes[role]
        most = self._most_rows(self._tensor_types[role], columns)
        if rows <= most:
            return self._product(role, x, made, first=0, count=rows)
        pieces = []
        for first in range(0, rows, most):
            count = min(most, rows - first)
            pieces.append(self._product(role, x, self._rows_of(x, count), first=first, count=count))
        return graph.call("aten.cat.default", graph.several(pieces), graph.scalar(_LAST), made)

    def _product(self, role: str, x: Value, made: Value, *, first: int, count: int) -> Value:
        """Return x times some rows of a matrix, or all."""
        graph, (_, columns) = self._graph, self._shapes[role]
        stored = self._tensor_types[role]
        if stored == "INT8":
            codes = self._rows(role, first, (count, columns), "INT8")
            scales = self._rows(role + tensor_types.SCALE, first, (count,), "FLOAT32")
            return graph.call("aten._weight_int8pack_mm.default", x, codes, scales, made)
        weight = self._rows(role, first, (count, columns), _FLOATS[stored])
        bias = self._bias(role, first, count)
        return graph.call("aten.linear.default", x, weight, bias, made)

    def _bias(self, role: str, first: int = 0, count: int | None = None) -> Value:
        name = bias_of(role)
        if name not in self._shapes:
            return self._graph.scalar(None)
        self._used.add(name)
        shape = self._shapes[name] if count is None else (count,)
        return self._rows(name, first, shape, _FLOATS[self._tensor_types[name]])

    def _rows(self, key: str, first: int, shape: Shape, dtype: Dtype) -> Value:
        """Add some rows of named data, which are named data too if they are not all."""
        if shape[0] == self._shapes[key.removesuffix(tensor_types.SCALE)][0]:
            return self._graph.constant(key, shape, dtype)
        part, row_bytes = slice_key(key, first), ITEM_BYTES[dtype] * math.prod(shape[1:])
        self._slices[part] = Slice(
            of=key, first_byte=first * row_bytes, size_bytes=shape[0] * row_bytes
        )
        return self._graph.constant(part, shape, dtype)

    def _most_rows(self, stored: str, columns: int) -> int:
        """Return how many rows of a matrix the delegate takes at once."""
        if stored == "INT8":
            return limits.INT8_ROWS
        return limits.BUFFER_BYTES // (tensor_types.TENSOR_TYPES[stored].block_bytes * columns)

    def _rows_of(self, x: Value, width: int, *, staging: Dtype | None = None) -> Value:
        graph = self._graph
        shape = (*graph.shape(x)[:-1], width)
        return graph.tensor(shape, is_buffer=graph.is_buffer(x), staging=staging)

    def _view(self, x: Value, shape: Shape) -> Value:
        """Return it in another shape, whose second axis is as long as a call has tokens."""
        graph = self._graph
        made = graph.tensor(shape, is_buffer=self._is_buffer)
        return graph.call("aten.view_copy.default", x, graph.integers([1, -1, *shape[2:]]), made)

    def _like(self, x: Value) -> Value:
        return self._graph.tensor(self._graph.shape(x), is_buffer=self._graph.is_buffer(x))

    # The operators of `Arithmetic`

    def _normalize(self, norm: Norm, role: str, x: Value) -> Value:
        *apart, width = self._shapes[role]
        if apart:  # the operators have one row for all heads
            alike = self._normalize_by(norm, self._graph.vector([1.0] * width), None, x)
            made = self._multiply(alike, self._vector(role))
            return self._add(made, self._vector(f"{role}_bias")) if norm.has_bias else made
        bias = f"{role}_bias" if norm.has_bias else None
        return self._normalize_by(norm, self._vector(role), bias, x)

    def _normalize_by(self, norm: Norm, weight: Value, bias_role: str | None, x: Value) -> Value:
        graph, (width,) = self._graph, self._graph.shape(weight)
        epsilon = graph.scalar(norm.epsilon)
        if norm.kind == "rms":
            return graph.call("et_vk.rms_norm.default", x, weight, epsilon, self._like(x))
        bias = self._vector(bias_role) if bias_role else graph.vector([0.0] * width)
        made, (*rows, _) = self._like(x), graph.shape(x)
        beside = [graph.tensor((*rows, 1), is_buffer=graph.is_buffer(x)) for _ in range(2)]
        graph.call(
            "aten.native_layer_norm.default",
            x, graph.integers([width]), weight, bias, epsilon, graph.several([made, *beside]),
        )  # fmt: skip
        return made

    def _split_heads(self, x: Value, heads: int, width: int) -> Value:
        return self._view(x, (1, self._tokens, heads, width))

    def _join_heads(self, x: Value, heads: int, width: int) -> Value:
        return self._view(x, (1, self._tokens, heads * width))

    def _vector(self, role: str) -> Value:
        self._used.add(role)
        return self._graph.constant(role, self._shapes[role], _FLOATS[self._tensor_types[role]])

    def _add(self, x: Value, y: Value | float) -> Value:
        return self._like_first("aten.add.Tensor", x, self._operand(y), self._graph.scalar(1))

    def _subtract(self, x: Value, y: Value) -> Value:
        return self._like_first("aten.sub.Tensor", x, y, self._graph.scalar(1))

    def _multiply(self, x: Value, y: Value | float) -> Value:
        return self._like_first("aten.mul.Tensor", x, self._operand(y))

    def _operand(self, y: Value | float) -> Value:
        return self._graph.vector([y]) if isinstance(y, float) else y

    def _like_first(self, operator: str, *arguments: Value) -> Value:
        """Call an operator whose result is like its first argument."""
        return self._graph.call(operator, *arguments, self._like(arguments[0]))

    def _relu(self, x: Value) -> Value:
        return self._like_first("aten.relu.default", x)

    def _exponential(self, x: Value) -> Value:
        return self._like_first("aten.exp.default", x)

    def _silu(self, x: Value) -> Value:
        return self._multiply(x, self._like_first("aten.sigmoid.default", x))

    def _gelu_tanh(self, x: Value) -> Value:
        return self._like_first("aten.gelu.default", x, self._graph.scalar("tanh"))
