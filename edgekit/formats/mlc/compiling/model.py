"""The interpreter of `DecoderSpec` that writes a model in TVM's ``relax.frontend.nn``.

Its parameters have the names, shapes and tensor types of MLC's bundles. Positions are rotated here
and not in the cache, for every layer may have a rope of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, assert_never

from edgekit.errors import UsageError
from edgekit.formats.mlc.compiling import attention_kernels, delta_net
from edgekit.model.mixers import Attention, DeltaNet, ShortConv
from edgekit.model.norm import Norm
from edgekit.model.rope import Rope


if TYPE_CHECKING:
    from edgekit.formats.mlc.compiling.shape import LibraryShape, StoredWeight
    from edgekit.model.spec import DecoderSpec


class Kernels:
    """What a target computes in its own way."""

    def linear(self, x: Any, tensors: list[Any], weight: "StoredWeight", *, out_dtype: str) -> Any:
        """Return ``x`` times a stored matrix, transposed."""
        raise NotImplementedError

    def rows(self, ids: Any, tensors: list[Any], weight: "StoredWeight", *, dtype: str) -> Any:
        """Return the rows of a stored matrix that ``ids`` name."""
        raise NotImplementedError

    def recur(self, net: DeltaNet, tensors: list[Any]) -> tuple[Any, Any]:
        """Return what is read from the states of a delta net, and the states after the tokens.

        Args:
            net: What it is.
            tensors: Queries, keys, values, decay, strength, states; float32.
        """
        raise NotImplementedError


class Decoder:
    """A decoder over tensors of TVM: each method emits what computes it."""

    def __init__(
        self,
        shape: "LibraryShape",
        parameters: Mapping[str, Any],
        kernels: Kernels,
    ) -> None:
        """Take the stored tensors by name."""
        self.spec: DecoderSpec = shape.spec
        self.dtype = shape.dtype
        self._stored = shape.weights
        self._parameters = parameters
        self._kernels = kernels

    def embed(self, ids: Any) -> Any:
        """Return the embedding of int32 ``(tokens,)``: ``(tokens, hidden_size)``."""
        weight, tensors = self._weight("token_embedding")
        return self._kernels.rows(ids, tensors, weight, dtype=self.dtype)

    def hidden(self, x: Any, cache: Any, states: Sequence[Any]) -> tuple[Any, list[Any]]:
        """Return what the output head reads of ``(batch, tokens, hidden_size)``.

        The states are those of `DecoderSpec.states`; also return them as the tokens leave them.
        """
        spec, (batch, tokens, _) = self.spec, x.shape
        self._states = {
            (index, name): state
            for (index, name, _), state in zip(spec.states(), states, strict=True)
        }
        if spec.embedding_scale != 1.0:
            x = _scaled(x, spec.embedding_scale)
        positions = cache.get_query_positions(batch * tokens)
        for index in range(len(spec.layers)):
            x = self._layer(x, index, positions, cache)
        return self._norm(x, spec.norm, "final_norm"), list(self._states.values())

    def logits(self, x: Any) -> Any:
        """Return float32 logits of what `hidden` returned."""
        spec = self.spec
        weight, tensors = self._weight("token_embedding" if spec.is_tied else "output_head")
        said = self._kernels.linear(x, tensors, weight, out_dtype="float32")
        if spec.has_head_bias:
            said = said + self._vector("output_head_bias").astype("float32")
        cap = spec.final_logit_softcap
        if cap is not None:
            from tvm.relax.frontend.nn import op

            said = op.tanh(said / cap) * cap
        return said

    def _layer(self, x: Any, index: int, positions: Any, cache: Any) -> Any:
        spec, at = self.spec, f"layers.{index}."
        inner = self._norm(x, spec.norm, f"{at}attention_norm") if spec.has_pre_norms else x
        added = self._mix(inner, index, positions, cache)
        if spec.has_post_norms:
            added = self._norm(added, spec.norm, f"{at}attention_post_norm")
        if spec.residual == "parallel":
            return x + added + self._mlp(inner, at)
        x = x + added
        inner = self._norm(x, spec.norm, f"{at}mlp_norm") if spec.has_pre_norms else x
        added = self._mlp(inner, at)
        if spec.has_post_norms:
            added = self._norm(added, spec.norm, f"{at}mlp_post_norm")
        return x + added

    def _mix(self, x: Any, index: int, positions: Any, cache: Any) -> Any:
        match mixer := self.spec.mixer(index):
            case Attention():
                return self._attention(x, index, positions, cache)
            case DeltaNet():
                return self._delta_net(mixer, x, index)
            case ShortConv():
                raise UsageError("MLC has no names for the weights of a short convolution")
            case other:
                assert_never(other)

    def _delta_net(self, net: DeltaNet, x: Any, index: int) -> Any:
        from tvm.relax.frontend.nn import op

        at = f"layers.{index}."
        qkv, gate, alpha, beta = (
            self._linears(x, at, (role,), has_bias=False)
            for role in ("delta_qkv", "delta_gate", "delta_alpha", "delta_beta")
        )
        seen, self._states[index, "conv"] = op.tensor_expr_op(
            delta_net.convolved(net),
            "convolve",
            [qkv, self._vector(f"{at}delta_taps"), self._states[index, "conv"]],
        )
        query, key = op.tensor_expr_op(delta_net.queries_and_keys(net), "queries_and_keys", [seen])
        value = op.tensor_expr_op(delta_net.values(net), "values", [seen])
        rate, bias = (self._vector(f"{at}delta_{role}") for role in ("decay", "decay_bias"))
        decay = op.tensor_expr_op(delta_net.decay, "decay", [alpha, rate, bias])
        strength = op.tensor_expr_op(delta_net.strength, "strength", [beta])
        read, self._states[index, "recurrent"] = self._kernels.recur(
            net, [query, key, value, decay, strength, self._states[index, "recurrent"]]
        )
        said = op.tensor_expr_op(
            delta_net.gated(net, self.dtype), "gate", [read, gate, self._vector(f"{at}delta_norm")]
        )
        return self._linears(said, at, ("delta_output",), has_bias=False)

    def _attention(self, x: Any, index: int, positions: Any, cache: Any) -> Any:
        from tvm.relax.frontend.nn import op

        a, layer, at = self.spec.attention, self.spec.layers[index], f"layers.{index}."
        batch, tokens, _ = x.shape
        heads = a.heads + 2 * a.num_kv_heads
        qkv = self._linears(x, at, ("query", "key", "value"), has_bias=a.has_qkv_bias)
        gate = None
        if a.has_output_gate:
            query, rest = op.split(qkv, [a.query_rows], axis=-1)
            query = op.reshape(query, (batch, tokens, a.heads, 2 * a.head_dim))
            query, gate = op.split(query, 2, axis=-1)
            query, gate = (op.reshape(it, (batch, tokens, a.query_width)) for it in (query, gate))
            qkv = op.concat([query, rest], dim=-1)
        qkv = op.reshape(qkv, (batch, tokens, heads, a.head_dim))
        if a.query_key_norm and not a.normalizes_after_rope:
            qkv = self._head_norms(qkv, a.query_key_norm, at)
        if layer.rope:
            qkv = _rotated(qkv, positions, layer.rope, heads=a.heads + a.num_kv_heads)
        if a.query_key_norm and a.normalizes_after_rope:
            qkv = self._head_norms(qkv, a.query_key_norm, at)
        place = [at for at, _, _ in self.spec.caches()].index(index)
        said = cache.attention_with_fused_qkv(
            place, qkv, a.heads, attention_kernels.scale_of(a, layer)
        )
        said = op.reshape(said, (batch, tokens, a.query_width))
        if gate is not None:
            said = said * op.sigmoid(gate)
        return self._linears(said, at, ("attention_output",), has_bias=a.has_output_bias)

    def _head_norms(self, qkv: Any, norm: Norm, at: str) -> Any:
        from tvm.relax.frontend.nn import op

        a = self.spec.attention
        batch, tokens, _, width = qkv.shape
        q, k, v = op.split(qkv, [a.heads, a.heads + a.num_kv_heads], axis=2)
        normed = []
        for x, heads, role in ((q, a.heads, "query_norm"), (k, a.num_kv_heads, "key_norm")):
            if a.head_norms == "together":
                flat = self._norm(
                    op.reshape(x, (batch, tokens, heads * width)), norm, f"{at}{role}"
                )
                normed.append(op.reshape(flat, (batch, tokens, heads, width)))
            else:
                normed.append(self._norm(x, norm, f"{at}{role}"))
        return op.concat([*normed, v], dim=2)

    def _mlp(self, x: Any, at: str) -> Any:
        from tvm.relax.frontend.nn import op

        spec = self.spec
        roles = ("gate", "up") if spec.is_gated else ("up",)
        inner = self._linears(x, at, roles, has_bias=spec.has_mlp_bias)
        if spec.is_gated:
            gate, up = op.split(inner, 2, axis=-1)
            inner = self._activated(gate) * up
        else:
            inner = self._activated(inner)
        return self._linears(inner, at, ("down",), has_bias=spec.has_mlp_bias)

    def _activated(self, x: Any) -> Any:
        from tvm.relax.frontend.nn import op

        match self.spec.activation:
            case "silu":
                return op.silu(x)
            case "gelu_tanh":
                return op.gelu(x, "tanh")
            case "relu2":
                return op.square(op.relu(x))
            case "xielu":
                raise UsageError("MLC has no names for the weights of xIELU")
            case other:
                assert_never(other)

    def _linears(self, x: Any, at: str, roles: tuple[str, ...], *, has_bias: bool) -> Any:
        """Return what several matrices make of ``x``, side by side, however they are stored."""
        from tvm.relax.frontend.nn import op

        parts, named = [], []
        for role in roles:
            weight, tensors = self._weight(f"{at}{role}")
            if weight.name in named:  # a part of the one before
                continue
            named.append(weight.name)
            said = self._kernels.linear(x, tensors, weight, out_dtype=self.dtype)
            if has_bias:
                said = said + self._vector(f"{at}{role}_bias")
            parts.append(said)
        return parts[0] if len(parts) == 1 else op.concat(parts, dim=-1)

    def _norm(self, x: Any, norm: Norm, role: str) -> Any:
        """Normalize the last axis in float32, as transformers does."""
        from tvm.relax.frontend.nn import op

        scale = self._vector(role)
        bias = [self._vector(f"{role}_bias")] if norm.has_bias else []
        return op.tensor_expr_op(_norm_of(norm), "norm", [x, scale, *bias])

    def _vector(self, role: str) -> Any:
        _, tensors = self._weight(role)
        return tensors[0]

    def _weight(self, role: str) -> "tuple[StoredWeight, list[Any]]":
        weight = self._stored[role]
        return weight, [self._parameters[tensor.name] for tensor in weight.tensors]


def _scaled(x: Any, factor: float) -> Any:
    """Return ``x`` times a number, the product rounded once."""
    return (x.astype("float32") * factor).astype(x.dtype)


def _norm_of(norm: Norm) -> Callable[..., Any]:
    """Return what writes a norm as an expression of TVM."""

    def write(x: Any, scale: Any, bias: Any = None) -> Any:
        from tvm import te, topi

        axes, width = x.shape[:-1], x.shape[-1]
        wide = topi.cast(x, "float32")
        rows = scale.ndim == 2  # a row of weights for every head

        def mean_of(values: Any, name: str) -> Any:
            k = te.reduce_axis((0, width), name="k")
            return te.compute(axes, lambda *i: te.sum(values(*i, k), axis=k), name=name)

        mean = None
        if norm.kind == "layer":
            mean = mean_of(lambda *i: wide(*i) / width, "mean")

        def centred(*i: Any) -> Any:
            return wide(*i) if mean is None else wide(*i) - mean(*i[:-1])

        square = mean_of(lambda *i: centred(*i) * centred(*i), "square")

        def normed(*i: Any) -> Any:
            row = scale(i[-2], i[-1]) if rows else scale(i[-1])
            said = centred(*i) * te.rsqrt(square(*i[:-1]) / width + norm.epsilon)
            said = said * (row.astype("float32") + (1.0 if norm.unit_offset else 0.0))
            if bias is not None:
                said = said + bias(i[-1]).astype("float32")
            return said.astype(x.dtype)

        return te.compute(x.shape, normed, name="normed")

    return write


def _frequencies(rope: Rope) -> list[float]:
    """Return by how much each pair of channels turns from a token to the next, in radians.

    An artifact's context ends where longrope would take its other factors.
    """
    divisors = rope.divisors(text_tokens=1)
    return [rope.theta ** (-2 * i / rope.width) / by for i, by in enumerate(divisors)]


def _rotated(qkv: Any, positions: Any, rope: Rope, *, heads: int) -> Any:
    """Return ``(batch, tokens, heads, width)`` with the first ``heads`` rotated."""
    import numpy as np
    from tvm import te, tirx
    from tvm.relax.frontend.nn import Tensor, op

    half, factor = rope.width // 2, rope.attention_factor
    turns = Tensor.from_const(np.array(_frequencies(rope), np.float32))

    def write(x: Any, positions: Any, turns: Any) -> Any:
        def rotated(b: Any, t: Any, h: Any, d: Any) -> Any:
            angle = positions(b * x.shape[1] + t).astype("float32") * turns(d % half)
            own = x(b, t, h, d).astype("float32")
            at = tirx.if_then_else(d < half, d + half, d - half)
            other = x(b, t, h, at).astype("float32")
            turned = own * te.cos(angle) + tirx.if_then_else(d < half, -other, other) * te.sin(
                angle
            )
            is_rotated = tirx.And(h < heads, d < rope.width)
            return tirx.if_then_else(is_rotated, (turned * factor).astype(x.dtype), x(b, t, h, d))

        return te.compute(x.shape, rotated, name="rotated")

    return op.tensor_expr_op(write, "rotate", [qkv, positions, turns])
