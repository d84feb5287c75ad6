"""A `DecoderSpec` as a program of Core ML that reads one token.

Matrices multiply in float16, as do queries with the cache; all between, the residual stream and the
norms above all, is float32, so no activation is too large for it. The cache comes in, and what to
add to it goes out, since runtimes built with an Xcode before 16, as ExecuTorch's own were, know no
states of Core ML (its issues 7432 and 21855). Turns of queries and keys come from tables, since no
device promises an exact cosine of a large angle.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekit.formats.executorch import tensor_types
from edgekit.formats.executorch.arithmetic import (
    SQUARES,
    Arithmetic,
    bias_of,
    query_growth,
    ropes,
)
from edgekit.formats.executorch.backends.coreml.mil import Blob, FunctionWriter, Value
from edgekit.model.mixers import QueryGrowth
from edgekit.model.norm import Norm
from edgekit.model.shapes import Shape
from edgekit.model.spec import DecoderSpec


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


HIDDEN = -1e9  # added to the score of a key that is not to be seen
TOKENS, POSITION, LOGITS = "tokens", "input_pos", "logits"
STEP = 256  # tokens; a position is so many steps and a rest, each with a table of its rotations
ZEROS = "zeros."  # what the keys of tables without content begin with
GROWTH = "growth.steps"  # the key of a table, of what queries are multiplied with


@dataclass(frozen=True, kw_only=True)
class CoreMLProgram:
    """A decoder without its weights."""

    model: bytes  # what ``model.mlmodel`` holds
    inputs: tuple[str, ...]  # token, position, and keys and values of each layer
    outputs: tuple[str, ...]  # logits, and what to add to keys and values
    blobs: Mapping[str, Blob]  # of weights by the keys of their parts, and of tables
    weights_bytes: int  # how large the file of all these is
    operators: Mapping[str, int]  # how often each is applied


def write(spec: DecoderSpec, tensor_types: Mapping[str, str], context_tokens: int) -> CoreMLProgram:
    """Return the program of a decoder.

    Args:
        spec: The decoder.
        tensor_types: How each weight is stored, by role.
        context_tokens: How many tokens its caches hold.
    """
    return _Decoder(spec, tensor_types, context_tokens).program()


def caches(spec: DecoderSpec) -> tuple[str, ...]:
    """Return the names of keys and values, layer by layer."""
    return tuple(
        f"{name}_{index}" for index in range(len(spec.layers)) for name in ("keys", "values")
    )


def cache_shape(spec: DecoderSpec, context_tokens: int) -> Shape:
    """Return the shape of keys, and of values; new ones go to the second axis."""
    return spec.attention.num_kv_heads, context_tokens, spec.attention.head_dim


def tables(spec: DecoderSpec) -> "Iterator[tuple[str, npt.NDArray[np.float32]]]":
    """Yield the key and the content of each table that is not all zeros.

    The content is float32: cosines and sines of shape ``(rows, half the rope's width)``, how
    queries grow of shape ``(rows, 1)``. For all positions of the model, so that a plan need not
    know how many a program holds.
    """
    import numpy as np

    for index, rope in enumerate(ropes(spec)):
        exponents = np.arange(0, rope.width, 2, dtype=np.float32) / np.float32(rope.width)
        divisors = np.array(rope.divisors(1), np.float32)
        frequencies = 1 / (divisors * np.float32(rope.theta) ** exponents)
        for (name, rows, stride), factor in zip(
            _turn_tables(spec, index), (rope.attention_factor, 1.0), strict=True
        ):
            angles = np.arange(rows)[:, None] * stride * frequencies.astype(np.float64)
            yield f"cosine.{name}", (np.cos(angles) * factor).astype(np.float32)
            yield f"sine.{name}", (np.sin(angles) * factor).astype(np.float32)
    growth = query_growth(spec)
    if growth:
        steps = np.arange(_growth_steps(spec, growth))[:, None]
        yield GROWTH, (1 + growth.rate * np.log1p(steps)).astype(np.float32)


def _growth_steps(spec: DecoderSpec, growth: QueryGrowth) -> int:
    return -(-spec.context_tokens // growth.step_tokens)


def _turn_tables(spec: DecoderSpec, index: int) -> tuple[tuple[str, int, int], ...]:
    """Return name, rows and tokens between them of the two tables of a rope."""
    steps = -(-spec.context_tokens // STEP)
    return (f"steps.{index}", steps, STEP), (f"rest.{index}", STEP, 1)


@dataclass(frozen=True, kw_only=True)
class _Rotation:
    """How queries and keys of a token rotate: ``(1, width)``, half of the sine negative."""

    cosine: Value
    sine: Value


class _Decoder(Arithmetic[Value]):
    def __init__(
        self, spec: DecoderSpec, tensor_types: Mapping[str, str], context_tokens: int
    ) -> None:
        self.spec, self._tensor_types, self._context_tokens = spec, tensor_types, context_tokens
        self._shapes = dict(spec.weights())
        self._writer = FunctionWriter()
        self._token = Value(name=TOKENS, kind="int32", shape=(1, 1))
        self._position = Value(name=POSITION, kind="int32", shape=(1,))
        self._caches = {
            name: Value(name=name, kind="fp16", shape=cache_shape(spec, context_tokens))
            for name in caches(spec)
        }
        self._added: list[Value] = []  # to the caches, in their order
        self._growth: Value | None = None  # what queries are multiplied with: ``(1, 1)``

    def program(self) -> CoreMLProgram:
        x = self._embed()
        where = self._steps_and_rest()
        rotations = {
            rope: self._rotation(index, *where) for index, rope in enumerate(ropes(self.spec))
        }
        self._growth = self._grown()
        windows = dict.fromkeys(layer.window_tokens for layer in self.spec.layers)
        masks = {window: self._mask(window) for window in windows}
        for index, layer in enumerate(self.spec.layers):
            rotation = rotations[layer.rope] if layer.rope else None
            x = self._layer(index, x, rotation, masks[layer.window_tokens])
        inputs = (self._token, self._position, *self._caches.values())
        outputs = (self._head(x), *self._added)
        return CoreMLProgram(
            model=self._writer.model(inputs, outputs),
            inputs=tuple(value.name for value in inputs),
            outputs=tuple(value.name for value in outputs),
            blobs=self._writer.blobs,
            weights_bytes=self._writer.blobs_end,
            operators=self._writer.operators,
        )

    def _embed(self) -> Value:
        """Return the residual stream: ``(1, hidden width)``, float32."""
        token = self._reshape(self._token, (1,))
        x = self._float32(self._row(self._matrix("token_embedding"), token))
        return x if self.spec.embedding_scale == 1 else self._multiply(x, self.spec.embedding_scale)

    def _row(self, table: Value, index: Value) -> Value:
        return self._writer.apply(
            "gather", (1, table.shape[1]), x=table, indices=index, axis=0, batch_dims=0,
            validate_indices=False,
        )  # fmt: skip

    def _rotation(self, index: int, steps: Value, rest: Value) -> _Rotation:
        """Return the rotation by the sum of two angles."""
        (cosine, sine), (cosine_of_rest, sine_of_rest) = (
            self._waves(index, table, row) for table, row in enumerate((steps, rest))
        )
        both = self._multiply(cosine, cosine_of_rest), self._multiply(sine, sine_of_rest)
        mixed = self._multiply(sine, cosine_of_rest), self._multiply(cosine, sine_of_rest)
        cosine, sine = self._subtract(*both), self._add(*mixed)
        return _Rotation(
            cosine=self._join(cosine, cosine), sine=self._join(self._multiply(sine, -1.0), sine)
        )

    def _waves(self, index: int, table: int, row: Value) -> tuple[Value, Value]:
        name, rows, _ = _turn_tables(self.spec, index)[table]
        shape = (rows, ropes(self.spec)[index].width // 2)
        cosine, sine = (
            self._row(self._writer.stored(f"{wave}.{name}", "fp32", shape), row)
            for wave in ("cosine", "sine")
        )
        return cosine, sine

    def _steps_and_rest(self) -> tuple[Value, Value]:
        apply, position = self._writer.apply, self._position
        steps = apply("floor_div", (1,), x=position, y=STEP)
        return steps, self._subtract(position, apply("mul", (1,), x=steps, y=STEP))

    def _grown(self) -> Value | None:
        growth = query_growth(self.spec)
        if growth is None:
            return None
        step = self._writer.apply("floor_div", (1,), x=self._position, y=growth.step_tokens)
        table = self._writer.stored(GROWTH, "fp32", (_growth_steps(self.spec, growth), 1))
        return self._row(table, step)

    def _mask(self, window_tokens: int | None) -> Value:
        """Return what is added to the scores of the cache: ``(1, 1, context)``, float32."""
        apply, context = self._writer.apply, self._context_tokens
        row = apply("range_1d", (context,), kind="int32", start=0, end=context, step=1)
        shape = (1, 1, context)
        places, here = self._reshape(row, shape), self._reshape(self._position, (1, 1, 1))
        hidden = apply("greater_equal", shape, kind="bool", x=places, y=here)
        if window_tokens is not None:
            last = self._subtract(here, window_tokens)
            gone = apply("less_equal", shape, kind="bool", x=places, y=last)
            hidden = apply("logical_or", shape, x=hidden, y=gone)
        return self._multiply(self._float32(hidden), HIDDEN)

    def _layer(self, index: int, x: Value, rotation: _Rotation | None, mask: Value) -> Value:
        prefix = f"layers.{index}."
        read = self._float16(self._before(f"{prefix}attention_norm", x))
        attended = self._attend(index, read, rotation, mask)
        x = self._add(x, self._after(f"{prefix}attention_post_norm", attended))
        if self.spec.residual == "serial":
            read = self._float16(self._before(f"{prefix}mlp_norm", x))
        return self._add(x, self._after(f"{prefix}mlp_post_norm", self._mlp(prefix, read)))

    def _attend(self, index: int, read: Value, rotation: _Rotation | None, mask: Value) -> Value:
        a, prefix = self.spec.attention, f"layers.{index}."
        query = self._multiply(
            self._rotated_heads(prefix, "query", read, rotation), a.softmax_scale
        )
        query = query if self._growth is None else self._multiply(query, self._growth)
        grouped = (a.num_kv_heads, a.heads // a.num_kv_heads, a.head_dim)
        query = self._reshape(self._float16(query), grouped)
        key = self._remember(f"keys_{index}", self._rotated_heads(prefix, "key", read, rotation))
        value = self._linear(f"{prefix}value", read, has_bias=a.has_qkv_bias)
        value = self._remember(f"values_{index}", value)
        shares = self._shares(query, self._caches[f"keys_{index}"], key, mask)
        mixed = self._mix(shares, self._caches[f"values_{index}"], value)
        joined = self._reshape(mixed, (1, a.query_width))
        return self._linear(f"{prefix}attention_output", joined, has_bias=a.has_output_bias)

    def _shares(self, query: Value, keys: Value, key: Value, mask: Value) -> Value:
        """Return how much is taken of each value in the cache, and of the token's own."""
        seen, own = (self._scores(query, them) for them in (keys, key))
        scores = self._join(self._add(seen, mask), own)
        shares = self._writer.apply("softmax", scores.shape, x=scores, axis=-1)
        return self._float16(shares)

    def _scores(self, query: Value, keys: Value) -> Value:
        shape = (*query.shape[:2], keys.shape[1])
        scores = self._float32(self._matmul(query, keys, shape, transposes=True))
        cap = self.spec.attention.attn_logit_softcap
        return scores if cap is None else self._cap(scores, cap)

    def _mix(self, shares: Value, values: Value, value: Value) -> Value:
        heads, queries, places = shares.shape
        context = self._context_tokens
        shape = (heads, queries, value.shape[2])
        seen = self._matmul(self._slice(shares, 0, context), values, shape, transposes=False)
        own = self._matmul(self._slice(shares, context, places), value, shape, transposes=False)
        return self._float16(self._add(self._float32(seen), self._float32(own)))

    def _rotated_heads(
        self, prefix: str, name: str, read: Value, rotation: _Rotation | None
    ) -> Value:
        """Return queries or keys: ``(heads, head width)``, float32."""
        a = self.spec.attention
        heads = a.heads if name == "query" else a.num_kv_heads
        x = self._linear(f"{prefix}{name}", read, has_bias=a.has_qkv_bias)
        x = self._split_heads(x, heads, a.head_dim)
        for step in self._steps_of_heads(a, rotates=rotation is not None):
            if step == "rotate":
                assert rotation is not None  # noqa: S101 - else it is no step
                x = self._rotated(x, rotation)
            else:
                x = self._normalize_heads(a, f"{prefix}{name}_norm", x, heads)
        return x

    def _rotated(self, x: Value, rotation: _Rotation) -> Value:
        whole, width = x.shape[-1], rotation.cosine.shape[-1]
        halves = (self._slice(x, width // 2, width), self._slice(x, 0, width // 2))
        swapped = self._join(*halves)
        first = x if width == whole else self._slice(x, 0, width)
        rotated = self._add(
            self._multiply(first, rotation.cosine), self._multiply(swapped, rotation.sine)
        )
        return rotated if width == whole else self._join(rotated, self._slice(x, width, whole))

    def _remember(self, name: str, x: Value) -> Value:
        """Hand out what to add to a cache: ``(key heads, 1, head width)``."""
        a = self.spec.attention
        shape = (a.num_kv_heads, 1, a.head_dim)
        made = self._writer.apply(
            "reshape", shape, name=f"new_{name}", x=self._float16(x), shape=[*shape]
        )
        self._added.append(made)
        return made

    def _mlp(self, prefix: str, read: Value) -> Value:
        has_bias = self.spec.has_mlp_bias
        first = "gate" if self.spec.is_gated else "up"
        bent = self._activate(prefix, self._linear(f"{prefix}{first}", read, has_bias=has_bias))
        if self.spec.is_gated:
            bent = self._multiply(bent, self._linear(f"{prefix}up", read, has_bias=has_bias))
        if self.spec.activation not in SQUARES:
            return self._linear(f"{prefix}down", self._float16(bent), has_bias=has_bias)
        largest = self._largest(bent)
        bent = self._float16(self._writer.apply("real_div", bent.shape, x=bent, y=largest))
        return self._linear(f"{prefix}down", bent, has_bias=has_bias, times=largest)

    def _largest(self, x: Value) -> Value:
        """Return what a row is divided by so that squares fit into float16: its largest, or one."""
        apply, shape = self._writer.apply, (x.shape[0], 1)
        size = apply("abs", x.shape, x=x)
        largest = apply("reduce_max", shape, x=size, axes=[-1], keep_dims=True)
        return apply("maximum", shape, x=largest, y=1.0)

    def _head(self, x: Value) -> Value:
        role = "token_embedding" if self.spec.is_tied else "output_head"
        read = self._float16(self._normalize(self.spec.norm, "final_norm", x))
        logits = self._linear(role, read, has_bias=self.spec.has_head_bias)
        if self.spec.final_logit_softcap is not None:
            logits = self._cap(logits, self.spec.final_logit_softcap)
        return self._writer.apply("identity", logits.shape, name=LOGITS, x=logits)

    def _mean(self, x: Value) -> Value:
        return self._writer.apply("reduce_mean", (x.shape[0], 1), x=x, axes=[-1], keep_dims=True)

    def _cap(self, x: Value, cap: float) -> Value:
        share = self._writer.apply("real_div", x.shape, x=x, y=cap)
        return self._multiply(self._writer.apply("tanh", x.shape, x=share), cap)

    def _linear(self, role: str, x: Value, *, has_bias: bool, times: Value | None = None) -> Value:
        """Multiply in float16, and by ``times`` and add what is added in float32."""
        weight = self._matrix(role)
        rows = weight.shape[0]
        zeros = self._writer.stored(f"{ZEROS}{rows}", "fp16", (rows,))
        made = self._writer.apply("linear", (1, rows), x=x, weight=weight, bias=zeros)
        made = self._float32(made)
        made = made if times is None else self._multiply(made, times)
        return self._add(made, self._vector(bias_of(role))) if has_bias else made

    def _matrix(self, role: str) -> Value:
        shape, stored = self._shapes[role], self._tensor_types[role]
        if stored == "F16":
            return self._writer.stored(role, "fp16", shape)
        if stored == "INT8":
            scales = role + tensor_types.SCALE
            return self._writer.scaled(role, "int8", shape, scales=scales, groups=1)
        groups = shape[1] // tensor_types.TENSOR_TYPES[stored].block_weights
        return self._writer.scaled(
            role, "int4", shape, scales=role + tensor_types.SCALE, groups=groups
        )

    def _float16(self, x: Value) -> Value:
        return self._writer.apply("cast", x.shape, kind="fp16", x=x, dtype="fp16")

    def _float32(self, x: Value) -> Value:
        return self._writer.apply("cast", x.shape, kind="fp32", x=x, dtype="fp32")

    def _matmul(self, x: Value, y: Value, shape: Shape, *, transposes: bool) -> Value:
        """Multiply head by head, with ``y`` or with what it is transposed."""
        return self._writer.apply(
            "matmul", shape, x=x, y=y, transpose_x=False, transpose_y=transposes
        )

    def _reshape(self, x: Value, shape: Shape) -> Value:
        return self._writer.apply("reshape", shape, x=x, shape=[*shape])

    def _slice(self, x: Value, first: int, end: int) -> Value:
        """Return a part of the last axis."""
        *rows, _ = x.shape
        return self._writer.apply(
            "slice_by_index", (*rows, end - first), x=x, begin=[*([0] * len(rows)), first],
            end=[*rows, end],
        )  # fmt: skip

    def _join(self, *parts: Value) -> Value:
        *rows, _ = parts[0].shape
        length = sum(part.shape[-1] for part in parts)
        return self._writer.apply(
            "concat", (*rows, length), kind=parts[0].kind, values=parts, axis=-1, interleave=False
        )

    # The operators of `Arithmetic`

    def _normalize(self, norm: Norm, role: str, x: Value) -> Value:
        if norm.kind == "layer":
            x = self._subtract(x, self._mean(x))
        mean = self._mean(self._multiply(x, x))
        inverse = self._writer.apply("rsqrt", mean.shape, x=mean, epsilon=norm.epsilon)
        x = self._multiply(self._multiply(x, inverse), self._vector(role))
        return self._add(x, self._vector(f"{role}_bias")) if norm.has_bias else x

    def _split_heads(self, x: Value, heads: int, width: int) -> Value:
        return self._reshape(x, (heads, width))

    def _join_heads(self, x: Value, heads: int, width: int) -> Value:
        return self._reshape(x, (1, heads * width))

    def _vector(self, role: str) -> Value:
        return self._writer.stored(role, "fp32", self._shapes[role])

    def _add(self, x: Value, y: Value | float) -> Value:
        return self._writer.apply("add", x.shape, x=x, y=y)

    def _subtract(self, x: Value, y: Value | int) -> Value:
        return self._writer.apply("sub", x.shape, x=x, y=y)

    def _multiply(self, x: Value, y: Value | float) -> Value:
        return self._writer.apply("mul", x.shape, x=x, y=y)

    def _relu(self, x: Value) -> Value:
        return self._writer.apply("relu", x.shape, x=x)

    def _exponential(self, x: Value) -> Value:
        return self._writer.apply("exp", x.shape, x=x)

    def _silu(self, x: Value) -> Value:
        return self._writer.apply("silu", x.shape, x=x)

    def _gelu_tanh(self, x: Value) -> Value:
        return self._writer.apply("gelu", x.shape, x=x, mode="TANH_APPROXIMATION")
