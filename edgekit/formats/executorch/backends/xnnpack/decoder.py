"""One decoder for every family: a `DecoderSpec`, as modules of torch that XNNPACK takes whole.

The decoder is cut where a layer's keys and values enter its cache. What lies between two cuts is a
`Segment`: the rest of one layer after its cache was read, and the next layer up to its queries,
keys and values. All of a segment is arithmetic that XNNPACK has, so each becomes one delegate;
segments of the same `SegmentShape` are the same program with other weights. Layers with a
convolution or a delta net are cut where they read the state that they keep of a text.

The operator of ExecuTorch's LLM runners may compute attention between two segments, in the layers
whose attention it has (`mixed_here`); the others compute their own.

Some formulas are not the textbook's because XNNPACK lacks an operator, or has it less exact: a mean
is a product with a vector of 1 / n, and tanh(x) is 2 sigmoid(2 x) - 1.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import assert_never

# This is the workstation's half: nothing that runs on a device imports it.
import torch  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253
from torch.nn import functional  # noqa: TID253

from edgekit.formats.executorch.arithmetic import Arithmetic
from edgekit.formats.executorch.assembly import slice_key
from edgekit.formats.executorch.backends.xnnpack import delta_net, short_conv
from edgekit.formats.executorch.backends.xnnpack.attention import attention, mixed_here
from edgekit.formats.executorch.backends.xnnpack.delta_net import DeltaRule
from edgekit.formats.executorch.backends.xnnpack.states import Start, States
from edgekit.formats.executorch.contents import SLICE
from edgekit.formats.executorch.embeddings import LayerEmbedding
from edgekit.formats.executorch.positions import Positions
from edgekit.model.mixers import Attention, DeltaNet, ShortConv
from edgekit.model.norm import Norm
from edgekit.model.rope import Rope
from edgekit.model.shapes import Shape
from edgekit.model.spec import XIELU_BETA, DecoderSpec
from edgekit.model.spec import LayerEmbedding as LayerEmbeddingShape


_GELU = 2 * math.sqrt(2 / math.pi)  # GELU's tanh is of half of _GELU x + _GELU_CUBE x^3
_GELU_CUBE = 0.044715 * _GELU
# What positions are multiplied with, for masks: exp(-2 ** 30) is 0, and whole numbers stay exact.
HIDDEN = 2.0**30
_ANY = 0  # a layer: which one it is makes no other program of the half of a layer
Attend = Callable[[int, Tensor, Tensor, Sequence[Tensor]], tuple[Tensor, ...]]
LayerTensors = Mapping[
    str, Tensor
]  # by role within a layer; the last segment has those without a layer


@dataclass(frozen=True, kw_only=True)
class FirstHalf:
    """What makes the first halves of two layers the same program, up to the cache."""

    attention: Attention
    rope_width: int | None  # None: it has none
    feeds_mix: bool  # the next segment computes attention; else a custom operator


@dataclass(frozen=True, kw_only=True)
class SecondHalf:
    """What makes the second halves of two layers the same program, from the cache on."""

    attention: Attention
    mixes: bool  # it computes attention; else a custom operator did
    window_tokens: int | None  # of that attention


@dataclass(frozen=True, kw_only=True)
class SegmentShape:
    """What makes two segments the same program."""

    ends: SecondHalf | ShortConv | DeltaNet | None  # of a layer; None: nothing is before
    begins: FirstHalf | ShortConv | DeltaNet | None  # of the next; None: the output head
    changes_x: bool
    weights: tuple[tuple[str, Shape], ...]  # by their name within the segment


def segment_shapes(spec: DecoderSpec, *, uses_llm_operators: bool) -> Iterator[SegmentShape]:
    """Yield the segments of a decoder, one more than it has layers."""
    depth = len(spec.layers)
    mixes = mixed_here(spec, uses_llm_operators=uses_llm_operators)
    for index in range(depth + 1):
        yield SegmentShape(
            ends=_second_half(spec, index - 1, mixes=bool(mixes[index - 1])) if index else None,
            begins=_first_half(spec, index, mixes=bool(mixes[index])) if index < depth else None,
            changes_x=index > 0 or spec.residual == "parallel",
            weights=tuple(_weight_shapes(spec, index)),
        )


def _first_half(spec: DecoderSpec, index: int, *, mixes: bool) -> FirstHalf | ShortConv | DeltaNet:
    mixer, rope = spec.mixer(index), spec.layers[index].rope
    if not isinstance(mixer, Attention):
        return mixer
    return FirstHalf(
        attention=mixer if mixer.has_cache else replace(mixer, cache_of=_ANY),
        rope_width=rope.width if rope else None,
        feeds_mix=mixes,
    )


def _second_half(
    spec: DecoderSpec, index: int, *, mixes: bool
) -> SecondHalf | ShortConv | DeltaNet:
    mixer = spec.mixer(index)
    if not isinstance(mixer, Attention):
        return mixer
    return SecondHalf(
        attention=replace(mixer, cache_of=None),  # it is given all it reads
        mixes=mixes,
        window_tokens=spec.layers[index].window_tokens,
    )


def segment_roles(spec: DecoderSpec, index: int) -> dict[str, str]:
    """Return the weights of a segment by their name within it: roles, or keys of slices."""
    roles: dict[str, str] = {}
    for role, _ in spec.weights():
        layer, _, part = role.removeprefix("layers.").partition(".")
        if not role.startswith("layers."):
            roles.update(_of_no_layer(spec, index, role))
        elif int(layer) == (index if _is_first_half(spec, part) else index - 1):
            roles[part] = role
    return roles


def _of_no_layer(spec: DecoderSpec, index: int, role: str) -> Iterator[tuple[str, str]]:
    """Yield the name in a segment and the key of a weight that belongs to no layer, if it is there.

    What makes the embeddings of all layers is there in slices, each with the layer it is for.
    """
    own = spec.layer_embedding
    if role in {"layer_embedding_projection", "layer_embedding_norm"}:
        assert own is not None  # noqa: S101 - they are its
        if index > 0:
            is_whole = role == "layer_embedding_norm"
            yield role, role if is_whole else slice_key(role, (index - 1) * own.width)
    elif index == len(spec.layers) and role != "layer_embedding":
        if role == "token_embedding":
            yield from [("output_head", role)] if spec.is_tied else []
        else:
            yield role, role


def _weight_shapes(spec: DecoderSpec, index: int) -> Iterator[tuple[str, Shape]]:
    shapes, own = dict(spec.weights()), spec.layer_embedding
    for name, key in segment_roles(spec, index).items():
        role, _, first = key.partition(SLICE)
        yield name, (own.width, *shapes[role][1:]) if first and own else shapes[role]


def _is_first_half(spec: DecoderSpec, part: str) -> bool:
    """Tell whether a weight of a layer is used before its cache or state is."""
    name = part.removesuffix("_bias")
    if name in {"gate", "up", "down", "xielu_positive", "xielu_negative", "mlp_post_norm"}:
        return spec.residual == "parallel"
    return name in {
        "attention_norm", "query", "key", "value", "query_norm", "key_norm", "conv_in",
        "delta_qkv", "delta_beta", "delta_alpha", "delta_decay", "delta_gate",
    }  # fmt: skip


class Segment(nn.Module, Arithmetic[Tensor]):  # type: ignore[misc]  # it is Any here
    """What is computed between two caches; every tensor has a row for each token."""

    def __init__(self, spec: DecoderSpec, shape: SegmentShape, weights: LayerTensors) -> None:
        super().__init__()
        self.spec = spec
        self.shape = shape
        for name, weight in weights.items():
            self.register_parameter(name, nn.Parameter(weight, requires_grad=False))
        for width in _normalized_widths(spec, shape):
            mean = torch.full((1, width), 1 / width)
            self.register_buffer(f"mean_{width}", mean, persistent=False)
        if isinstance(shape.ends, DeltaNet):
            ones = torch.ones(1, shape.ends.values_per_key, 1, 1)
            self.register_buffer("ones", ones, persistent=False)
        self._numbers: dict[float, str] = {}
        for value in dict.fromkeys(_numbers(spec, shape)):
            self._numbers[value] = f"number_{len(self._numbers)}"
            self.register_buffer(self._numbers[value], torch.tensor([value]), persistent=False)

    def _number(self, value: float) -> Tensor:
        """Return a number as a tensor: XNNPACK has no other operands."""
        return self.get_buffer(self._numbers[value])

    def forward(self, x: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the logits, or what the next cache or state and the next segment need.

        The new state of a delta net comes before all else.

        Args:
            x: ``(tokens, hidden width)``.
            inputs: What `XnnpackDecoder` gives the second half of a layer, if there is one; tokens
                as embedded, and as the layer that ends embeds them, where one does; cosine and sine
                where queries and keys are rotated; the factor of queries where it grows.
        """
        left = list(inputs)
        mixed, kept = self._mixed(left)
        if mixed is not None:
            x = self._finish_layer(x, mixed)
            if own := self.spec.layer_embedding:
                x = self._add_embedding(own, x, left.pop(0), left.pop(0))
            if self.spec.has_layer_scales:
                x = x * self._vector("layer_scale")
        if self.shape.begins is None:
            return (*kept, self._head(x))
        return (*kept, *self._begin_layer(x, *left))

    def _begin_layer(self, x: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        """Return x, and what the cache or state and the second half want."""
        read = self._before("attention_norm", x)
        made: tuple[Tensor, ...]
        match self.shape.begins:
            case FirstHalf() as half:
                made = self._begin_attention(half, read, *given)
            case ShortConv() as conv:
                made = self._begin_conv(conv, read)
            case _:
                made = self._begin_delta(read)
        if self.spec.residual == "parallel":
            x = x + self._after("mlp_post_norm", self._mlp(read))
        # A delegate may not hand back what it was given.
        return (x, *made) if self.shape.changes_x else made

    def _begin_attention(self, half: FirstHalf, read: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values, as the cache or attention wants them, and the gate."""
        a = half.attention
        query = self._project_heads(a, "query", read, a.heads)
        gates: list[Tensor] = []
        if a.has_output_gate:
            asked = query[..., a.head_dim :].reshape(-1, a.query_width)
            query, gates = query[..., : a.head_dim], [torch.sigmoid(asked)]
        value = None
        heads = {"query_norm": query}  # by the norm that they get
        if a.has_cache:
            heads["key_norm"] = self._project_heads(a, "key", read, a.num_kv_heads)
            value = self._values(a, read, heads["key_norm"])
        for step in self._steps_of_heads(a, rotates=half.rope_width is not None):
            for role, them in heads.items():
                if step == "rotate":
                    heads[role] = _rotation(them, *given[:2])
                else:
                    heads[role] = self._normalize_heads(a, role, them, them.shape[1])
        query = heads["query_norm"] * self._number(a.softmax_scale)
        if a.query_growth:
            query = query * given[-1]
        made = [_grouped(a, query) if half.feeds_mix else query]
        if value is not None:
            key = heads["key_norm"]
            made += (
                [key.permute(1, 2, 0), value.permute(1, 0, 2)] if half.feeds_mix else [key, value]
            )
        return (*made, *gates)

    def _values(self, a: Attention, read: Tensor, key: Tensor) -> Tensor:
        """Return the values of each head; ``key`` is not normalized or rotated yet."""
        value = key
        if not a.values_are_keys:
            value = self._project_heads(a, "value", read, a.num_kv_heads)
        if a.value_norm_epsilon is None:
            return value
        return self._over_its_root(value, a.value_norm_epsilon)

    def _begin_conv(self, conv: ShortConv, read: Tensor) -> tuple[Tensor, ...]:
        """Return what multiplies the result, and what the convolution sees."""
        made, width = self._linear("conv_in", read, has_bias=conv.has_bias), self.spec.hidden_size
        before, after, x = (made[:, part * width : (part + 1) * width] for part in range(3))
        return after, before * x

    def _begin_delta(self, read: Tensor) -> tuple[Tensor, ...]:
        """Return the gate, beta, the logarithm of the decay, and what the convolution sees."""
        gate = self._silu(self._linear("delta_gate", read, has_bias=False))
        beta = torch.sigmoid(self._linear("delta_beta", read, has_bias=False))
        step = self._linear("delta_alpha", read, has_bias=False)
        step = step + self._vector("delta_decay_bias")
        decay = delta_net.log_decay(step, self._vector("delta_decay"), self._number)
        return gate, beta, decay, self._linear("delta_qkv", read, has_bias=False)

    def _mixed(self, left: list[Tensor]) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """Return what the first of ``left``, taken out, gives in a layer; and its new state."""

        def take(count: int) -> list[Tensor]:
            return [left.pop(0) for _ in range(count)]

        match self.shape.ends:
            case None:
                return None, ()
            case SecondHalf(attention=a) as half:
                mixed = self._mix(half, take(5)) if half.mixes else left.pop(0)
                mixed = mixed * left.pop(0) if a.has_output_gate else mixed
                return self._linear("attention_output", mixed, has_bias=a.has_output_bias), ()
            case ShortConv() as conv:
                return self._mix_conv(conv, take(1 + conv.taps)), ()
            case DeltaNet() as net:
                count = 5 + net.taps + (self.shape.begins is None)
                mixed, state = self._mix_delta(net, take(count))
                return mixed, (state,)
            case other:
                assert_never(other)

    def _mix_conv(self, conv: ShortConv, given: Sequence[Tensor]) -> Tensor:
        after, *slices = given
        mixed = short_conv.convolve(self.get_parameter("conv_taps"), slices)
        if conv.has_bias:
            mixed = mixed + self._vector("conv_taps_bias")
        return self._linear("conv_output", after * mixed, has_bias=conv.has_bias)

    def _mix_delta(self, net: DeltaNet, given: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return what is read from the state, and the state after it.

        Where only the last token is wanted, the last of ``given`` says which that is.
        """
        gate, beta, log_decay, masks, state, *slices = given
        taps = self.get_parameter("delta_taps")
        mixed = self._silu(short_conv.convolve(taps, slices[: net.taps]))
        mean = self.get_buffer(f"mean_{net.key_head_dim}")
        rule = DeltaRule(net=net, number=self._number, mean=mean, ones=self.get_buffer("ones"))
        found, state = rule.read(mixed, log_decay, beta, masks, state)
        if self.shape.begins is None:
            joined = found.reshape(1, -1, net.value_width)
            found = torch.bmm(slices[-1], joined).view(-1, net.value_heads, net.value_head_dim)
        found = self._normalize(net.norm, "delta_norm", found).reshape(-1, net.value_width)
        return self._linear("delta_output", found * gate, has_bias=False), state

    def _mix(self, half: SecondHalf, given: Sequence[Tensor]) -> Tensor:
        """Return what attention gathers, of shape ``(tokens, query width)``.

        A mask for all layers would be planned for the longest prompt, and take the square of the
        context; here it is as long as it must.
        """
        query, keys, values, rows, columns = given
        a = half.attention
        scores = torch.bmm(query, keys)
        if a.attn_logit_softcap is not None:
            scores = self._cap(scores, a.attn_logit_softcap)
        shares = functional.softmax(scores + self._mask(half, rows, columns), -1)
        mixed = torch.bmm(shares, values)  # (key heads, tokens * shared, head width)
        shared = _queries_of_a_key(a)
        mixed = mixed.view(a.num_kv_heads, -1, shared * a.head_dim)
        return mixed.permute(1, 0, 2).reshape(-1, a.query_width)

    def _mask(self, half: SecondHalf, rows: Tensor, columns: Tensor) -> Tensor:
        """Return zero where a query sees a key, else minus `HIDDEN` for each token too far."""
        mask = torch.minimum(rows - columns, self._number(0.0))
        if half.window_tokens is None:
            return mask
        reach = self._number((half.window_tokens - 1) * HIDDEN)
        return mask + torch.minimum(columns + reach - rows, self._number(0.0))

    def _finish_layer(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + self._after("attention_post_norm", mixed)
        if self.spec.residual == "parallel":
            return x
        return x + self._after("mlp_post_norm", self._mlp(self._before("mlp_norm", x)))

    def _add_embedding(
        self, own: LayerEmbeddingShape, x: Tensor, embedded: Tensor, row: Tensor
    ) -> Tensor:
        """Return x and what a layer makes of its own embedding of the tokens.

        Args:
            own: What multiplies what.
            x: What the layer has made.
            embedded: The tokens, as the first layer read them.
            row: The layer's row for each of them.
        """
        seen = self._linear("layer_embedding_projection", embedded, has_bias=False)
        seen = seen * self._number(own.projection_scale)
        seen = self._normalize(self.spec.norm, "layer_embedding_norm", seen)
        read = (seen + row * self._number(own.scale)) * self._number(own.sum_scale)
        gate = self._activate("", self._linear("layer_gate", x, has_bias=False))
        added = self._linear("layer_output", gate * read, has_bias=False)
        return x + self._normalize(self.spec.norm, "layer_norm", added)

    def _mlp(self, x: Tensor) -> Tensor:
        has_bias = self.spec.has_mlp_bias
        if not self.spec.is_gated:
            bent = self._activate("", self._linear("up", x, has_bias=has_bias))
            return self._linear("down", bent, has_bias=has_bias)
        gate = self._linear("gate", x, has_bias=has_bias)
        up = self._linear("up", x, has_bias=has_bias)
        return self._linear("down", self._activate("", gate) * up, has_bias=has_bias)

    def _head(self, x: Tensor) -> Tensor:
        read = self._normalize(self.spec.norm, "final_norm", x)
        logits = self._linear("output_head", read, has_bias=self.spec.has_head_bias)
        return (
            logits
            if self.spec.final_logit_softcap is None
            else self._cap(logits, self.spec.final_logit_softcap)
        )

    def _cap(self, x: Tensor, cap: float) -> Tensor:
        shares = torch.sigmoid(x * self._number(2 / cap))
        return shares * self._number(2 * cap) - self._number(cap)

    def _linear(self, name: str, x: Tensor, *, has_bias: bool) -> Tensor:
        bias = self.get_parameter(f"{name}_bias") if has_bias else None
        return functional.linear(x, self.get_parameter(name), bias)

    def _project_heads(self, a: Attention, name: str, x: Tensor, heads: int) -> Tensor:
        made = self._linear(name, x, has_bias=a.has_qkv_bias)
        rows = a.query_rows if name == "query" else a.key_value_width
        return self._split_heads(made, heads, rows // heads)

    # The operators of `Arithmetic`

    def _normalize(self, norm: Norm, role: str, x: Tensor) -> Tensor:
        if norm.kind == "layer":
            x = x - functional.linear(x, self.get_buffer(f"mean_{x.shape[-1]}"))
        x = self._over_its_root(x, norm.epsilon) * self._vector(role)
        return x + self._vector(f"{role}_bias") if norm.has_bias else x

    def _over_its_root(self, x: Tensor, epsilon: float) -> Tensor:
        """Return x over the root of the mean of its squares: an RMS norm without weights."""
        mean = self.get_buffer(f"mean_{x.shape[-1]}")
        return x * torch.rsqrt(functional.linear(x * x, mean) + self._number(epsilon))

    def _split_heads(self, x: Tensor, heads: int, width: int) -> Tensor:
        return x.view(-1, heads, width)

    def _join_heads(self, x: Tensor, heads: int, width: int) -> Tensor:
        return x.view(-1, heads * width)

    def _vector(self, role: str) -> Tensor:
        return self.get_parameter(role)

    def _add(self, x: Tensor, y: Tensor | float) -> Tensor:
        return x + self._operand(y)

    def _subtract(self, x: Tensor, y: Tensor) -> Tensor:
        return x - y

    def _multiply(self, x: Tensor, y: Tensor | float) -> Tensor:
        return x * self._operand(y)

    def _operand(self, y: Tensor | float) -> Tensor:
        return y if isinstance(y, Tensor) else self._number(y)

    def _relu(self, x: Tensor) -> Tensor:
        return torch.relu(x)

    def _exponential(self, x: Tensor) -> Tensor:
        return torch.exp(x)

    def _silu(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    def _gelu_tanh(self, x: Tensor) -> Tensor:  # x (1 + tanh z) / 2 = x sigmoid(2 z)
        scaled = self._number(_GELU) + self._number(_GELU_CUBE) * (x * x)
        return x * torch.sigmoid(x * scaled)


def _attentions(shape: SegmentShape) -> Iterator[Attention]:
    """Yield those of the layer that a segment ends, and of the one it begins."""
    for half in (shape.ends, shape.begins):
        if isinstance(half, FirstHalf | SecondHalf):
            yield half.attention


def _nets(shape: SegmentShape) -> Iterator[DeltaNet]:
    """Yield the delta nets likewise."""
    yield from (half for half in (shape.ends, shape.begins) if isinstance(half, DeltaNet))


def _normalized_widths(spec: DecoderSpec, shape: SegmentShape) -> Iterator[int]:
    """Yield how many channels are normalized at once, here and there."""
    yield spec.hidden_size
    if own := spec.layer_embedding:
        yield own.width
    for a in _attentions(shape):
        if a.query_key_norm and a.head_norms == "together":
            yield from (a.query_width, a.key_value_width)
        else:
            yield a.head_dim
    for net in _nets(shape):
        yield from (net.key_head_dim, net.value_head_dim)


def _numbers(spec: DecoderSpec, shape: SegmentShape) -> Iterator[float]:
    """Yield every number that a segment may want, in an order that only these two decide."""
    yield 0.0
    if isinstance(shape.ends, SecondHalf) and shape.ends.window_tokens is not None:
        yield (shape.ends.window_tokens - 1) * HIDDEN
    yield spec.norm.epsilon
    caps = [spec.final_logit_softcap]
    for a in _attentions(shape):
        yield a.softmax_scale
        yield from (norm.epsilon for norm in (a.query_key_norm,) if norm)
        yield from (epsilon for epsilon in (a.value_norm_epsilon,) if epsilon is not None)
        caps.append(a.attn_logit_softcap)
    for net in _nets(shape):
        yield from (*delta_net.numbers(net), net.norm.epsilon)
    for cap in caps:
        if cap is not None:
            yield from (2 / cap, 2 * cap, cap)
    if own := spec.layer_embedding:
        yield from (own.projection_scale, own.scale, own.sum_scale)
    if spec.activation == "gelu_tanh":
        yield from (_GELU, _GELU_CUBE)
    if spec.activation == "xielu":
        yield from (1.0, XIELU_BETA)


def _rotation(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn the first channels of every head; the first half of ``sine`` is negative."""
    width = cosine.shape[-1]
    swapped = torch.cat((x[..., width // 2 : width], x[..., : width // 2]), -1)
    if x.shape[-1] == width:
        return x * cosine + swapped * sine
    return torch.cat((x[..., :width] * cosine + swapped * sine, x[..., width:]), -1)


def _grouped(a: Attention, query: Tensor) -> Tensor:
    """Return ``(key heads, tokens * queries of a key, head width)``: no key is copied."""
    rows = query.view(-1, a.num_kv_heads, _queries_of_a_key(a) * a.head_dim)
    return rows.permute(1, 0, 2).reshape(a.num_kv_heads, -1, a.head_dim)


class XnnpackDecoder(nn.Module):  # type: ignore[misc]  # it is Any here
    """The whole: tokens and their positions in, the logits of the last token out."""

    def __init__(
        self,
        spec: DecoderSpec,
        *,
        tables: Mapping[str, nn.Module],
        segments: Sequence[nn.Module],
        context_tokens: int,
        uses_llm_operators: bool = False,
    ) -> None:
        super().__init__()
        self.spec, self.context_tokens = spec, context_tokens
        self.mixed_here = mixed_here(spec, uses_llm_operators=uses_llm_operators)
        self.embedding = tables["token_embedding"]
        self.layer_embedding = None
        if spec.layer_embedding:
            self.layer_embedding = LayerEmbedding(tables["layer_embedding"], len(spec.layers))
        self.positions = Positions(spec)
        self.segments = nn.ModuleList(segments)
        self.states = States(spec)
        for name in ("keys", "values"):
            for index, _, _ in spec.caches():
                shape = self._cache_shape(name, index)
                self.register_buffer(f"{name}_{index}", torch.zeros(shape), persistent=False)

    def _cache_shape(self, name: str, index: int) -> tuple[int, ...]:
        a = attention(self.spec, index)
        if not self.mixed_here[index]:
            return (1, self.context_tokens, a.num_kv_heads, a.head_dim)
        if name == "keys":  # as the products of attention want them
            return (a.num_kv_heads, a.head_dim, self.context_tokens)
        return (a.num_kv_heads, self.context_tokens, a.head_dim)

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        """Return ``(1, vocabulary)``.

        Args:
            tokens: ``(1, tokens)``, int64.
            input_pos: ``(tokens,)``, int64, without gaps: what was read before is in the cache.
        """
        rotations = self.positions.rotations(input_pos)
        growth = self.positions.growth(input_pos)
        x = embedded = self._embed(tokens)
        places = None
        if self.layer_embedding is not None:
            places = self.layer_embedding.places(tokens.reshape(-1))
        made = self.segments[0](x, *self._where(0, rotations, growth))
        if self.spec.residual == "serial":  # nothing was added to x
            made = (x, *made)
        read = self._reading(input_pos)
        for index in range(len(self.spec.layers)):
            given = () if places is None else self._layer_rows(index, embedded, places)
            where = self._where(index + 1, rotations, growth)
            made = self.segments[index + 1](*read(index, *made), *given, *where)
            made = self.states.keep(index, *made)
        logits: Tensor = made[0]  # the last segment has the head
        return logits

    def _reading(self, input_pos: Tensor) -> Callable[..., tuple[Tensor, ...]]:
        """Return what makes of the outputs of a segment the first inputs of the next."""
        here = self._attend_here(input_pos) if True in self.mixed_here else None
        there = self._attend_there(input_pos) if False in self.mixed_here else None
        start = Start(input_pos)
        last = len(self.spec.layers) - 1

        def read(index: int, x: Tensor, *made: Tensor) -> tuple[Tensor, ...]:
            is_here = self.mixed_here[index]
            if is_here is None:
                return self.states.read(index, start, x, *made)
            attend = here if is_here else there
            assert attend is not None  # noqa: S101 - see above
            gates = []
            query, *own = made
            if attention(self.spec, index).has_output_gate:
                *own, gate = own
                gates = [gate[-1:] if index == last else gate]
            return (*attend(index, x, query, own), *gates)

        return read

    def _attend_here(self, input_pos: Tensor) -> Attend:
        """Return what keeps keys and values, and gives a segment all that attention needs."""
        filled = self._filled(input_pos)
        scaled = input_pos.to(torch.float32)[:, None] * HIDDEN
        rows = {count: _repeated(scaled, count) for count in self._queries_of_a_key()}
        columns = torch.arange(filled, dtype=torch.float32)[None] * HIDDEN
        last = len(self.spec.layers) - 1

        caches: dict[int, tuple[Tensor, Tensor]] = {}

        def attend(
            index: int, x: Tensor, query: Tensor, own: Sequence[Tensor]
        ) -> tuple[Tensor, ...]:
            a = attention(self.spec, index)
            if own:
                caches[index] = self._cache(index, own, input_pos, filled)
            keys, values = caches[_holder(a, index)]
            shared = _queries_of_a_key(a)
            if index == last:  # only the last token's logits are wanted
                return x[-1:], query[:, -shared:], keys, values, rows[shared][-shared:], columns
            return x, query, keys, values, rows[shared], columns

        return attend

    def _queries_of_a_key(self) -> Iterator[int]:
        """Yield how many queries share a key, each number once."""
        here = (a for index, _, a in self.spec.attentions() if self.mixed_here[index])
        yield from dict.fromkeys(_queries_of_a_key(a) for a in here)

    def _attend_there(self, input_pos: Tensor) -> Attend:
        """Return what leaves cache and attention to the operators of ExecuTorch's LLM runners."""
        first = input_pos[0].item()
        _promise(first >= 0)
        _promise(first < self.context_tokens)
        last = len(self.spec.layers) - 1

        def attend(
            index: int, x: Tensor, query: Tensor, own: Sequence[Tensor]
        ) -> tuple[Tensor, ...]:
            a = attention(self.spec, index)
            holder = _holder(a, index)
            caches = self.get_buffer(f"keys_{holder}"), self.get_buffer(f"values_{holder}")
            for made, cache in zip(own, caches, strict=False):
                torch.ops.llama.update_cache(made[None], cache, first)
            mixed = torch.ops.llama.custom_sdpa(
                query[None], *caches, first, None, 0.0, True, 1.0
            ).reshape(-1, a.query_width)
            return (x[-1:], mixed[-1:]) if index == last else (x, mixed)

        return attend

    def _filled(self, input_pos: Tensor) -> int:
        """Return how many rows of the caches hold tokens."""
        filled: int = input_pos[-1].item() + 1
        _promise(filled >= 1)
        _promise(filled <= self.context_tokens)
        return filled

    def _embed(self, tokens: Tensor) -> Tensor:
        rows = self.embedding(tokens.reshape(-1))
        scale = self.spec.embedding_scale
        return rows if scale == 1 else rows * scale

    def _layer_rows(self, index: int, embedded: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return what a layer's own embedding of the tokens is made of."""
        assert self.layer_embedding is not None  # noqa: S101 - else there are no places
        if index == len(self.spec.layers) - 1:  # only the last token's logits are wanted
            embedded, places = embedded[-1:], places[-1:]
        return embedded, self.layer_embedding(places, index)

    def _where(
        self, index: int, rotations: Mapping[Rope, tuple[Tensor, Tensor]], growth: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Return what a layer is told of positions; the head, nothing."""
        if index == len(self.spec.layers):
            return ()
        rope = self.spec.layers[index].rope
        mixer = self.spec.mixer(index)
        grown = growth if isinstance(mixer, Attention) and mixer.query_growth else None
        return (*(rotations[rope] if rope else ()), *(() if grown is None else (grown,)))

    def _cache(
        self, index: int, made: Sequence[Tensor], input_pos: Tensor, filled: int
    ) -> tuple[Tensor, Tensor]:
        keys, values = made
        all_keys, all_values = self.get_buffer(f"keys_{index}"), self.get_buffer(f"values_{index}")
        # Not as an assignment: that drops leading axes of length 1, which ExecuTorch wants.
        aten = torch.ops.aten
        aten.index_put_(all_keys, [None, None, input_pos], keys)
        aten.index_put_(all_values, [None, input_pos], values)
        return all_keys[:, :, :filled], all_values[:, :filled]


def _holder(a: Attention, index: int) -> int:
    """Return which layer holds the keys and values that a layer reads."""
    return index if a.cache_of is None else a.cache_of


def _queries_of_a_key(a: Attention) -> int:
    return a.heads // a.num_kv_heads


def _repeated(rows: Tensor, count: int) -> Tensor:
    """Return every row so many times."""
    return rows.expand(-1, count).reshape(-1, 1)


def _promise(is_true: bool) -> None:
    """Tell a trace what holds of a number that only running can know."""
    torch._check(is_true)  # noqa: SLF001 - documented for torch.export under this name
