"""A decoder as data: everything in which small language models differ.

A family reads a ``config.json`` into a `DecoderSpec`; a format turns a `DecoderSpec` into its own
keys, graph or module. Neither knows the other.

Weights carry format-neutral role names: ``token_embedding``, ``layers.3.query``, ``final_norm``.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, Self

from edgekit.model.mixers import Attention, DeltaNet, Mixer
from edgekit.model.norm import Norm, norm_weights
from edgekit.model.rope import Rope
from edgekit.model.shapes import Shape, linear_weights


Activation = Literal["silu", "gelu_tanh", "relu2", "xielu"]

# xIELU (Huang and Schlag 2024) has two learned slopes a layer, stored before their softplus:
# x > 0: softplus(xielu_positive) x^2 + beta x
# else: (beta + softplus(xielu_negative)) (expm1(min(x, epsilon)) - x) + beta x
XIELU_BETA = 0.5
XIELU_EPSILON = -1e-6


@dataclass(frozen=True, kw_only=True)
class Multipliers:
    """What muP multiplies with, folded into weights when a checkpoint reads them.

    No format sees them: `Checkpoint.weight` returns the products. What multiplies scores is in the
    queries (their norm, if they have one), on top of ``softmax_scale``.
    """

    embedding: float = 1.0
    query: float = 1.0
    residual: float = 1.0  # what attention and the MLP add
    logits: float = 1.0


# The weights that hold a matrix of each expert.
EXPERT_MATRICES = ("expert_gate", "expert_up", "expert_down")
# Added to the sum of the scores that a token's experts are weighted by: a constant of LFM2.
EXPERT_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Many small MLPs, of which every token takes a few (LFM2 MoE).

    With ``s = sigmoid(router x)``, a token takes the ``used`` experts with the largest
    ``s + expert_bias``, which only chooses. What each computes is multiplied by its own s, divided
    by the sum of all that are taken (`EXPERT_EPSILON` added), times ``scale``, which is folded into
    ``expert_down`` when a checkpoint is read. Source: ``Lfm2MoeTopKRouter``, transformers 5.
    """

    count: int
    used: int  # by each token
    has_bias: bool = True
    normalizes: bool = True  # else each s is taken as it is
    scale: float = 1.0  # already in the weights

    def weights(self, hidden_size: int, intermediate_size: int) -> Iterator[tuple[str, Shape]]:
        """Yield the weights by role, in the order of use.

        Those of all experts are one weight, ``(experts, rows out, columns in)``.
        """
        yield "router", (self.count, hidden_size)
        if self.has_bias:
            yield "expert_bias", (self.count,)
        *first, last = EXPERT_MATRICES
        for role in first:
            yield role, (self.count, intermediate_size, hidden_size)
        yield last, (self.count, hidden_size, intermediate_size)


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """The second half of a layer, as far as it may change from one to the next."""

    intermediate_size: int  # of each expert, where there are some
    experts: Experts | None = None  # which are gated and have no biases


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What may change from one layer to the next."""

    rope: Rope | None = None  # SmolLM3 leaves it out of every fourth layer
    window_tokens: int | None = None  # attends to this many last tokens, itself included
    mixer: Mixer | None = None  # None: the attention of the decoder
    mlp: Mlp | None = None  # None: that of the decoder


@dataclass(frozen=True, kw_only=True)
class LayerEmbedding:
    """An embedding for every layer, added to the end of it through a gate (Gemma 4).

    With e the row of ``layer_embedding`` (all layers side by side) times ``scale``, and c the RMS
    norm (``layer_embedding_norm``) of ``layer_embedding_projection`` times the scaled token
    embedding times ``projection_scale``, a layer gets ``p = (c + e) * sum_scale``. It ends with
    ``x += norm(layer_output(activation(layer_gate x) * p))``, the norm being ``layer_norm``.
    """

    width: int  # of one layer
    vocab_size: int
    scale: float
    projection_scale: float
    sum_scale: float


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """A decoder-only transformer.

    ``serial`` residuals add attention before the MLP reads; ``parallel`` ones let both read the
    same normalized input. The MLP is ``down(activation(gate(x)) * up(x))``, or without a gate
    ``down(activation(up(x)))``.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    context_tokens: int
    layers: tuple[Layer, ...]
    attention: Attention
    norm: Norm
    activation: Activation = "silu"
    residual: Literal["serial", "parallel"] = "serial"
    has_pre_norms: bool = True  # OLMo 2 has none before attention and before the MLP
    has_post_norms: bool = False  # Gemma 2: also after attention and after the MLP
    is_gated: bool = True
    has_mlp_bias: bool = False
    has_head_bias: bool = False
    multipliers: Multipliers = Multipliers()  # already in the weights
    embedding_scale: float = 1.0
    final_logit_softcap: float | None = None
    is_tied: bool = False  # the output head is the token embedding
    layer_embedding: LayerEmbedding | None = None  # Gemma 4
    has_layer_scales: bool = False  # Gemma 4: what leaves a layer is multiplied by one number

    def mixer(self, index: int) -> Mixer:
        """Return what mixes the tokens in a layer."""
        return self.layers[index].mixer or self.attention

    def mlp(self, index: int) -> Mlp:
        """Return the MLP of a layer."""
        return self.layers[index].mlp or Mlp(intermediate_size=self.intermediate_size)

    @property
    def looked_up(self) -> frozenset[str]:
        """The weights of which a token reads one row: they are held, but not streamed."""
        tables = {"layer_embedding"} if self.layer_embedding else set[str]()
        return frozenset(tables if self.is_tied else tables | {"token_embedding"})

    def share_read(self, role: str) -> float:
        """Return how much of a weight a token reads: all, nothing to speak of, or some experts."""
        if role in self.looked_up:
            return 0.0
        experts = self._experts_of(role)
        return experts.used / experts.count if experts else 1.0

    def _experts_of(self, role: str) -> Experts | None:
        """Return the experts that a weight holds matrices of."""
        prefix, _, part = role.rpartition(".")
        if part not in EXPERT_MATRICES:
            return None
        return self.mlp(int(prefix.removeprefix("layers."))).experts

    @property
    def has_experts(self) -> bool:
        """Whether tokens choose what computes them."""
        return any(layer.mlp and layer.mlp.experts for layer in self.layers)

    def attentions(self) -> Iterator[tuple[int, Layer, Attention]]:
        """Yield every layer that attends: its index, itself, and how."""
        for index, layer in enumerate(self.layers):
            if isinstance(mixer := self.mixer(index), Attention):
                yield index, layer, mixer

    def caches(self) -> Iterator[tuple[int, Layer, Attention]]:
        """Yield every layer that keeps keys and values of its own."""
        return (it for it in self.attentions() if it[2].has_cache)

    def states(self) -> Iterator[tuple[int, str, Shape]]:
        """Yield what layers keep instead: the layer's index, a name, the shape; all float32."""
        for index in range(len(self.layers)):
            for name, shape in self.mixer(index).states(self.hidden_size).items():
                yield index, name, shape

    @property
    def states_bytes(self) -> int:
        """The size of all states."""
        return sum(4 * math.prod(shape) for _, _, shape in self.states())

    @property
    def has_states(self) -> bool:
        """Whether a text, once read, cannot be taken back by a token."""
        return any(True for _ in self.states())

    @property
    def has_delta_nets(self) -> bool:
        """Whether a layer keeps a state in which rounding errors add up."""
        return any(isinstance(layer.mixer, DeltaNet) for layer in self.layers)

    @property
    def is_uniform(self) -> bool:
        """Whether all layers have the same attention and the same MLP, and nothing else."""
        return (
            not any(layer.mixer or layer.mlp for layer in self.layers)
            and self.layer_embedding is None
            and not self.has_layer_scales
        )

    def weights(self) -> Iterator[tuple[str, Shape]]:
        """Yield every weight the decoder needs, by role, with its shape, in the order of use.

        Matrices are ``(rows out, columns in)``, as a checkpoint stores them.
        """
        yield "token_embedding", (self.vocab_size, self.hidden_size)
        if own := self.layer_embedding:
            of_all = len(self.layers) * own.width
            yield "layer_embedding", (own.vocab_size, of_all)
            yield "layer_embedding_projection", (of_all, self.hidden_size)
            yield from norm_weights("layer_embedding_norm", self.norm, (own.width,))
        for index in range(len(self.layers)):
            for role, shape in self._layer_weights(index):
                yield f"layers.{index}.{role}", shape
        yield from norm_weights("final_norm", self.norm, (self.hidden_size,))
        if not self.is_tied:
            yield "output_head", (self.vocab_size, self.hidden_size)
        if self.has_head_bias:
            yield "output_head_bias", (self.vocab_size,)

    def within(self, context_tokens: int) -> Self:
        """Return the decoder of texts this long at most: what none of them reaches is left out."""
        growth = self.attention.query_growth
        if growth and growth.step_tokens >= context_tokens:
            growth = None
        return replace(
            self,
            attention=replace(self.attention, query_growth=growth),
            layers=tuple(
                replace(layer, window_tokens=None)
                if layer.window_tokens is not None and layer.window_tokens >= context_tokens
                else layer
                for layer in self.layers
            ),
        )

    def unit_offset(self, role: str) -> bool:
        """Tell whether a weight is of a norm that multiplies by one more than it stores."""
        part = role.rpartition(".")[2]
        if part in {"query_norm", "key_norm"}:
            norm = self.attention.query_key_norm
        elif part == "delta_norm":  # whatever the others do
            norm = None
        else:
            norm = self.norm
        return part.endswith("norm") and norm is not None and norm.unit_offset

    def multiplier(self, role: str) -> float:
        """Return what a stored weight is multiplied with, so that nothing else need be.

        What the layers add is scaled in the norms after attention and MLP where there are any;
        scores in the norm of the queries; and logits in the last norm, which also takes back what
        an embedding that is the head brings.
        """
        part, by = role.rpartition(".")[2].removesuffix("_bias"), self.multipliers
        last = {"attention_post_norm", "mlp_post_norm"}
        experts = self._experts_of(role) if part == "expert_down" else None
        scale = experts.scale if experts else 1.0
        if part in (last if self.has_post_norms else {"attention_output", "down", "expert_down"}):
            return scale * by.residual
        if experts:
            return scale
        if self.scales_queries(role):
            return by.query
        if part == "token_embedding":
            return by.embedding
        if part == "final_norm":
            return by.logits / by.embedding if self.is_tied else by.logits
        return by.logits if role == "output_head_bias" else 1.0

    def scales_queries(self, role: str) -> bool:
        """Tell whether a weight is the last that queries are multiplied with: their norm or own."""
        part = role.rpartition(".")[2].removesuffix("_bias")
        return part == ("query_norm" if self.attention.query_key_norm else "query")

    def rotated_pairs(self, role: str) -> "Pairs | None":
        """Return which of a weight's rows are rotated channels, None if none are."""
        rope = next((layer.rope for layer in self.layers if layer.rope), None)
        part = role.rpartition(".")[2].removesuffix("_bias")
        if rope is None or part not in {"query", "key", "query_norm", "key_norm"}:
            return None
        a = self.attention
        if part == "query" and a.has_output_gate:  # the gate of a head follows its query
            return Pairs(2 * a.head_dim, rope.width)
        is_apart = part.endswith("norm") and a.head_norms == "apart"
        return Pairs(a.head_dim, rope.width, axis=1 if is_apart else 0)

    @property
    def original_max_position_embeddings(self) -> int | None:
        """The smallest border of its ropes."""
        borders = (
            layer.rope.original_max_position_embeddings for layer in self.layers if layer.rope
        )
        return min((border for border in borders if border is not None), default=None)

    def without_unit_offsets(self) -> Self:
        """Return the decoder whose norms multiply by what they store, ones included."""
        layers = tuple(
            replace(layer, mixer=_plain(layer.mixer))
            if isinstance(layer.mixer, Attention)
            else layer
            for layer in self.layers
        )
        norm = replace(self.norm, unit_offset=False)
        return replace(self, attention=_plain(self.attention), norm=norm, layers=layers)

    def _layer_weights(self, index: int) -> Iterator[tuple[str, Shape]]:
        hidden = (self.hidden_size,)
        if self.has_pre_norms:
            yield from norm_weights("attention_norm", self.norm, hidden)
        yield from self.mixer(index).weights(self.hidden_size)
        if self.has_post_norms:
            yield from norm_weights("attention_post_norm", self.norm, hidden)
        if self.has_pre_norms and self.residual == "serial":
            yield from norm_weights("mlp_norm", self.norm, hidden)
        yield from self._mlp_weights(self.mlp(index))
        if self.has_post_norms:
            yield from norm_weights("mlp_post_norm", self.norm, hidden)
        if own := self.layer_embedding:
            yield "layer_gate", (own.width, self.hidden_size)
            yield "layer_output", (self.hidden_size, own.width)
            yield from norm_weights("layer_norm", self.norm, hidden)
        if self.has_layer_scales:
            yield "layer_scale", (1,)

    def _mlp_weights(self, mlp: Mlp) -> Iterator[tuple[str, Shape]]:
        hidden, wide = self.hidden_size, mlp.intermediate_size
        if mlp.experts:
            yield from mlp.experts.weights(hidden, wide)
            return
        for role in ("gate", "up") if self.is_gated else ("up",):
            yield from linear_weights(role, wide, hidden, self.has_mlp_bias)
        if self.activation == "xielu":
            yield from (("xielu_positive", (1,)), ("xielu_negative", (1,)))
        yield from linear_weights("down", hidden, wide, self.has_mlp_bias)


def _plain(attention: Attention) -> Attention:
    """Return attention whose norms multiply by what they store."""
    norm = attention.query_key_norm
    return replace(attention, query_key_norm=norm and replace(norm, unit_offset=False))


@dataclass(frozen=True)
class Pairs:
    """Channels of heads that are rotated two by two: the first ``rotated`` of each ``head_dim``."""

    head_dim: int
    rotated: int
    axis: Literal[0, 1] = 0  # of the weight: the one that counts channels

    def order(self, to: Literal["halves", "neighbours"]) -> tuple[int, ...]:
        """Return where each channel of a head stands in the other of the two orders."""
        half, turned = self.rotated // 2, range(self.rotated)
        if to == "neighbours":
            places = (channel // 2 + channel % 2 * half for channel in turned)
        else:
            places = (channel % half * 2 + channel // half for channel in turned)
        return (*places, *range(self.rotated, self.head_dim))


@dataclass(frozen=True)
class Source:
    """Where a weight lives in the checkpoint: a tensor, or some rows of a fused one.

    Or in several: StableLM 2 12B stores the norm of each head by itself. Then ``siblings`` are the
    rows after the first, one tensor each.
    """

    tensor: str
    first_row: int = 0
    rows: int | None = None  # None: all of them
    siblings: tuple[str, ...] = ()
    neighbours: Pairs | None = None  # stored with the two channels of each pair side by side
    is_depthwise: bool = False  # taps by channel, with an axis of one input channel between

    @property
    def tensors(self) -> tuple[str, ...]:
        """Every tensor it reads."""
        return (self.tensor, *self.siblings)
