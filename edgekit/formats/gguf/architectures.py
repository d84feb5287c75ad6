"""What llama.cpp's decoder graphs compute, as data; a `DecoderSpec` is matched against them.

A decoder that a graph computes exactly can be stored under that graph's name, whatever its family,
and one that no graph computes is refused with the difference. Model types only say which of several
names is the usual one.

Source: src/models/*.cpp, src/llama-arch.cpp and src/llama-model.cpp of llama.cpp 0c1e57098, the
commit inside llama-cpp-python 0.3.36.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from edgekit.errors import UsageError
from edgekit.formats import ContextLimit
from edgekit.model.mixers import DELTA_EPSILON, Attention, DeltaNet, QueryGrowth, ShortConv
from edgekit.model.norm import Norm
from edgekit.model.rope import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ProportionalScaling,
    Rope,
    RopeScaling,
    YarnScaling,
)
from edgekit.model.spec import Activation, DecoderSpec, LayerEmbedding
from edgekit.quant.recipe import split_role


MAX_LAYERS = 512  # LLAMA_MAX_LAYERS in llama-hparams.h; more make it abort
MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS, likewise
YARN_TURNS = (32.0, 1.0)  # where YaRN's ramp ends: llama_hparams in llama-hparams.h
CONTEXT_PADDING_TOKENS = 256  # n_ctx is rounded up to this: llama_context in llama-context.cpp


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One graph of llama.cpp: what it computes, and what it cannot."""

    name: str
    model_types: tuple[str, ...] = ()  # stored under this name by custom, the usual one first
    rope_pairs: Literal["neighbours", "halves"] = "halves"
    scalings: tuple[type[RopeScaling], ...] = (LinearScaling, YarnScaling)
    reads_yarn_ramp: bool = False  # else its ends are constants
    has_partial_rope: bool = False
    positions: Literal["everywhere", "in windows", "everywhere or nowhere", "by layer"] = (
        "everywhere"
    )
    skips_rope_every: int | None = None  # every n-th layer has no positions
    has_query_growth: bool = False
    norm: Literal["rms", "layer"] = "rms"
    has_norm_bias: bool = False
    norm_adds_one: bool = False  # Gemma: stored with the 1 already added
    has_pre_norms: bool = True
    has_post_norms: bool = False
    head_norms: Literal["none", "alike", "together", "apart"] = "none"
    head_norms_are_optional: bool = False
    head_norms_from_depth: int = 0  # below, there are none
    normalizes_after_rope: bool = False
    needs_qkv_bias: bool = False  # by custom; the graph does without, but then llama is the name
    output_bias: Literal["never", "optional", "always"] = "never"
    mlp_bias: Literal["never", "optional", "always"] = "never"
    has_head_bias: bool = False
    has_windows: bool = False
    windows_at_depth: int | None = None  # and there only
    needs_window: bool = False  # in one layer at least
    window_tokens: int = 0  # where a file does not say
    window_period: int = 4  # and then every fourth layer is global
    has_local_theta: bool = False  # the layers with a window may have another
    local_theta: float | None = None  # where a file does not say; None: that of the others
    local_rope_scaling: Literal["none", "shared"] = "none"  # of the layers with a window
    multiplies: Literal["never", "logits", "everything"] = "never"
    caps_scores: bool = False
    caps_logits: Literal["never", "optional", "always"] = "never"
    scales_embedding: bool = False
    residual: Literal["serial", "parallel", "either"] = "serial"
    activation: Activation = "silu"
    is_gated: bool = True
    has_sinks: bool = False  # a score for each head that belongs to no token
    scales_scores_by_hidden_at: int | None = None  # at this depth, 27B, the scale is another
    head_width_is_free: bool = False  # else heads x head width must be the hidden width
    fuses_attention: bool = False  # queries, keys and values in one tensor
    fuses_mlp: bool = False  # gate and up in one tensor
    state_mixer: type[ShortConv | DeltaNet] | None = None  # of one layer at least
    gates_attention: bool = False
    differs_by_window: bool = False  # heads of layers with a window and of the others
    normalizes_values: bool = False
    values_may_be_keys: bool = False
    shares_caches: bool = False  # of the last two layers that have one, the second to last windowed
    softmax_scale: float | None = None  # whatever the width of the heads
    has_divisors: bool = False  # of the frequencies without a window, even if they change nothing
    has_rope_sections: bool = False  # for the positions of what is seen
    has_layer_embedding: bool = False
    has_layer_scales: bool = False
    mlp_widths_differ: bool = False
    has_experts: bool = False  # in all layers but some of the first
    tensor_names: Mapping[str, str] = field(default_factory=dict)  # by role, where they are others
    ties: Literal["optional", "always", "never"] = "optional"
    note: str | None = None  # what a user of the file should know

    def has_windows_at(self, depth: int) -> bool:
        """Whether layers of a decoder this deep may have a window."""
        return self.has_windows and self.windows_at_depth in {None, depth}

    def has_positions(self, layer: int, *, depth: int, has_window: bool) -> bool:
        """Whether a layer rotates queries and keys, as far as the graph and not a key decides."""
        if self.skips_rope_every is not None:
            return (layer + 1) % self.skips_rope_every != 0
        return has_window or self.positions != "in windows" or not self.has_windows_at(depth)

    def has_head_norms_at(self, depth: int) -> bool:
        """Whether queries and keys of a decoder this deep may have norms."""
        return self.head_norms != "none" and depth >= self.head_norms_from_depth

    def score_scale(self, *, depth: int, head_dim: int, hidden_size: int, heads: int) -> float:
        """Return what multiplies scores: graphs read no key for it."""
        if self.softmax_scale is not None:
            return self.softmax_scale
        is_by_hidden = depth == self.scales_scores_by_hidden_at
        return float((hidden_size // heads if is_by_hidden else head_dim) ** -0.5)

    def multiplier(self, role: str, spec: DecoderSpec) -> float:
        """Return what a weight is multiplied with in a file, for scores of another scale.

        It is in the last that queries are multiplied with: the weights of their norm, if any.
        """
        if not spec.scales_queries(role):
            return 1.0
        layer, _ = split_role(role)
        mixer = spec.attention if layer is None else spec.mixer(layer)
        a = mixer if isinstance(mixer, Attention) else spec.attention
        scale = self.score_scale(
            depth=len(spec.layers),
            head_dim=a.head_dim,
            hidden_size=spec.hidden_size,
            heads=a.heads,
        )
        return 1.0 if math.isclose(a.softmax_scale, scale) else a.softmax_scale / scale

    def refusals(self, spec: DecoderSpec) -> Iterator[str]:
        """Yield what this graph would compute otherwise than ``spec`` asks."""
        yield from self._refuse_norms(spec)
        yield from self._refuse_states(spec)
        kinds = attention_kinds(spec)
        yield from dict.fromkeys(
            refusal
            for a in kinds
            for refuse in (self._refuse_head_norms, self._refuse_attention)
            for refusal in refuse(spec, a)
        )
        yield from self._refuse_kinds(spec, kinds)
        yield from self._refuse_caches(spec)
        yield from self._refuse_windows(spec)
        yield from self._refuse_ropes(spec)
        yield from self._refuse_mlp(spec)
        yield from self._refuse_ends(spec)

    def _refuse_norms(self, spec: DecoderSpec) -> Iterator[str]:
        if spec.norm.kind != self.norm or spec.norm.unit_offset != self.norm_adds_one:
            yield f"normalization {_norm_name(spec.norm)}"
        if spec.norm.has_bias != self.has_norm_bias:
            yield f"{spec.norm.kind} normalization {_with(spec.norm.has_bias)} bias"
        if spec.has_pre_norms != self.has_pre_norms:
            yield f"{_no(spec.has_pre_norms)}norms before attention and MLP"
        if spec.has_post_norms != self.has_post_norms:
            yield "norms after attention and MLP" if spec.has_post_norms else "no post norms"

    def _refuse_states(self, spec: DecoderSpec) -> Iterator[str]:
        mixers = {spec.mixer(index) for index in range(len(spec.layers))}
        found = [mixer for mixer in mixers if not isinstance(mixer, Attention)]
        if len(found) == len(mixers):  # it aborts
            yield "no layer that attends"
        elif found and not all(isinstance(mixer, self.state_mixer or ()) for mixer in found):
            yield f"layers that are {_mixer_name(type(found[0]))}s"
        elif self.state_mixer and not found:
            yield f"no layer that is a {_mixer_name(self.state_mixer)}"
        elif len(found) > 1:
            yield f"{_mixer_name(type(found[0]))}s that differ between layers"
        else:
            for mixer in found:
                yield from self._refuse_mixer(spec, mixer)

    def _refuse_mixer(self, spec: DecoderSpec, mixer: ShortConv | DeltaNet) -> Iterator[str]:
        if isinstance(mixer, ShortConv):
            if mixer.has_bias:
                yield "short convolutions with bias"
            return
        if mixer.key_head_dim != mixer.value_head_dim:
            yield (
                f"delta nets whose keys are {mixer.key_head_dim} wide and whose values "
                f"{mixer.value_head_dim}"
            )
        if mixer.norm != Norm(kind="rms", epsilon=spec.norm.epsilon):
            yield "another norm in the delta nets than elsewhere"
        elif mixer.norm.epsilon != DELTA_EPSILON:
            # Small queries and keys show it: 1e-5 changed a random Qwen 3.5 by up to 2e-4 nats.
            yield (
                f"norms with epsilon {mixer.norm.epsilon:g} (it would add that to the squares of "
                f"delta nets' queries and keys too, to which this model adds {DELTA_EPSILON:g})"
            )

    def _refuse_kinds(self, spec: DecoderSpec, kinds: Sequence[Attention]) -> Iterator[str]:
        by_window = {
            (layer.window_tokens is not None, replace(a, cache_of=None))
            for _, layer, a in spec.attentions()
        }
        if len(kinds) > 1 and not (self.differs_by_window and len(by_window) == len(kinds) == 2):
            yield "attention that differs between layers"
        mlps = [spec.mlp(index) for index in range(len(spec.layers))]
        widths = {mlp.intermediate_size for mlp in mlps if not mlp.experts}
        if len(widths) > 1 and not self.mlp_widths_differ:
            yield "MLPs of several widths"

    def _refuse_caches(self, spec: DecoderSpec) -> Iterator[str]:
        own = [index for index, _, _ in spec.caches()]
        shared = [(layer, a.cache_of) for _, layer, a in spec.attentions() if not a.has_cache]
        if not self.shares_caches:
            if shared:
                yield "layers that read the keys and values of others"
            return
        first = len(own)
        if first < 2:  # it aborts
            yield "fewer than two layers with keys and values of their own"
        elif own != list(range(first)) or any(
            donor != first - (1 if layer.window_tokens is None else 2) for layer, donor in shared
        ):
            yield (
                f"keys and values shared otherwise than from layer {first - 2} to the layers with "
                f"a window and from {first - 1} to the others"
            )

    def _refuse_head_norms(self, spec: DecoderSpec, a: Attention) -> Iterator[str]:
        norm = a.query_key_norm
        if norm is None:
            if self.has_head_norms_at(len(spec.layers)) and not self.head_norms_are_optional:
                yield "no norms on queries and keys"
            return
        if norm.epsilon != spec.norm.epsilon:
            yield "another epsilon in the norms of queries and keys"
        yield from self._refuse_kind_of_head_norms(a, norm, len(spec.layers))

    def _refuse_kind_of_head_norms(self, a: Attention, norm: Norm, depth: int) -> Iterator[str]:
        if not self.has_head_norms_at(depth):
            deep = f" in fewer than {self.head_norms_from_depth} layers"
            yield f"norms on queries and keys{deep if self.head_norms != 'none' else ''}"
            return
        if a.head_norms != self.head_norms or norm.kind != self.norm or norm.has_bias:
            yield f"{norm.kind} norms {_HEAD_NORMS[a.head_norms]}"
        if a.normalizes_after_rope != self.normalizes_after_rope:
            yield f"these norms {'after' if a.normalizes_after_rope else 'before'} the rotation"

    def _refuse_attention(self, spec: DecoderSpec, a: Attention) -> Iterator[str]:
        if not self.head_width_is_free and a.query_width != spec.hidden_size:
            yield f"{a.heads} heads of width {a.head_dim} in {spec.hidden_size} columns"
        if self.needs_qkv_bias and not a.has_qkv_bias:
            yield "no bias on queries, keys and values"
        yield from _refuse_bias(
            self.output_bias, has_bias=a.has_output_bias, where="after attention"
        )
        if a.attn_logit_softcap is not None and not self.caps_scores:
            yield "a cap on the scores"
        if a.query_growth and not self._grows(spec, a.query_growth):
            yield "queries that grow with their position"
        if a.has_output_gate != self.gates_attention:
            yield f"attention {_with(a.has_output_gate)} a gate"
        if a.value_norm_epsilon != (spec.norm.epsilon if self.normalizes_values else None):
            yield (
                "no norm of the values"
                if a.value_norm_epsilon is None
                else f"a norm of the values with epsilon {a.value_norm_epsilon:g}"
            )
        if a.values_are_keys and not self.values_may_be_keys:
            yield "values that are keys"

    def _refuse_windows(self, spec: DecoderSpec) -> Iterator[str]:
        windows = {layer.window_tokens for layer in spec.layers} - {None}
        if len(windows) > 1:
            yield "windows of several lengths"
        rope = first_rope(spec)
        if not windows and self.needs_window and self.has_divisors and rope and rope.scaling:
            yield f"rope with {_scaling_name(rope.scaling)} scaling in every layer"

    def _grows(self, spec: DecoderSpec, growth: QueryGrowth) -> bool:
        """Whether queries grow as asked: in steps of YaRN's original context, if there is one."""
        rope = first_rope(spec)
        scaling = rope.scaling if rope else None
        is_other = (
            isinstance(scaling, YarnScaling)
            and scaling.original_context_tokens != growth.step_tokens
        )
        return self.has_query_growth and not is_other

    def _refuse_ropes(self, spec: DecoderSpec) -> Iterator[str]:
        yield from self._refuse_positions(spec)
        ropes = {layer.rope for layer in spec.layers if layer.rope}
        if len(ropes) > 1 and not self._has_two_ropes(spec):
            yield "ropes that differ between layers"
        if self.has_windows and not self._scales_windows_alike(spec):
            yield "other rope scaling in the layers with a window"
        for width, head_dim in self._partial_ropes(spec):
            yield f"rope on {width} of {head_dim} channels"
        for rope in ropes:
            if rope.scaling is not None and not isinstance(rope.scaling, self.scalings):
                yield f"rope with {_scaling_name(rope.scaling)} scaling"
            elif isinstance(rope.scaling, YarnScaling):
                yield from self._refuse_yarn(rope.scaling)

    def _partial_ropes(self, spec: DecoderSpec) -> Iterator[tuple[int, int]]:
        turned = {(it.rope.width, a.head_dim) for _, it, a in spec.attentions() if it.rope}
        if not self.has_partial_rope:
            yield from sorted(pair for pair in turned if pair[0] != pair[1])

    def _refuse_positions(self, spec: DecoderSpec) -> Iterator[str]:
        depth = len(spec.layers)
        layers = {index: layer for index, layer, _ in spec.attentions()}
        is_nowhere = bool(layers) and not any(layer.rope for layer in layers.values())
        if self.positions == "by layer" or (
            self.positions == "everywhere or nowhere" and is_nowhere
        ):
            return
        if is_nowhere:
            yield "no positions"
            return
        for index, layer in layers.items():
            has_window = layer.window_tokens is not None
            has_positions = self.has_positions(index, depth=depth, has_window=has_window)
            if (layer.rope is not None) != has_positions:
                only = f" in {depth} layers, but only in {self.windows_at_depth}"
                yield (
                    f"layer {index} {_with(layer.rope is not None)} positions"
                    f"{only if self.windows_at_depth else ''}"
                )
                return

    def _refuse_yarn(self, scaling: YarnScaling) -> Iterator[str]:
        if self.takes_divisors(scaling) and Llama3Scaling not in self.scalings:
            turns = f"{scaling.fast_turns:g} to {scaling.slow_turns:g} turns"
            yield f"YaRN's ramp from {turns}{'' if scaling.is_truncated else ' without truncation'}"

    def takes_divisors(self, scaling: RopeScaling | None) -> bool:
        """Whether a rope is written as the divisors of its frequencies, which some graphs read.

        They say what no keys say: Llama 3's scaling, and any ramp of YaRN.
        """
        if not isinstance(scaling, YarnScaling):
            return isinstance(scaling, Llama3Scaling | ProportionalScaling)
        is_usual = (scaling.fast_turns, scaling.slow_turns) == YARN_TURNS
        return not scaling.is_truncated or not (is_usual or self.reads_yarn_ramp)

    def _has_two_ropes(self, spec: DecoderSpec) -> bool:
        """Whether layers with a window may have one rope and the others another (Gemma 3)."""
        pairs = {(it.window_tokens is not None, it.rope) for _, it, _ in spec.attentions()}
        thetas = {rope.theta for _, rope in pairs if rope}
        return (
            self.has_windows_at(len(spec.layers))
            and len(pairs) == 2 == len({is_local for is_local, _ in pairs})
            and (len(thetas) == 1 or self.has_local_theta)
        )

    def _scales_windows_alike(self, spec: DecoderSpec) -> bool:
        """Whether layers with a window are scaled as the graph fixes it: it has one key for all."""
        ropes = [(layer.rope, layer.window_tokens) for layer in spec.layers]
        scalings = {rope.scaling for rope, _ in ropes if rope}
        local = {rope.scaling for rope, window in ropes if rope and window is not None}
        return len(scalings) <= 1 if self.local_rope_scaling == "shared" else local <= {None}

    def _refuse_mlp(self, spec: DecoderSpec) -> Iterator[str]:
        if (spec.activation, spec.is_gated) != (self.activation, self.is_gated):
            yield f"activation {spec.activation} {_with(spec.is_gated)} a gate"
        yield from _refuse_bias(self.mlp_bias, has_bias=spec.has_mlp_bias, where="in the MLP")
        if self.residual not in {spec.residual, "either"}:
            yield f"{spec.residual} residuals"
        if spec.has_experts != self.has_experts:
            yield f"{'' if spec.has_experts else 'no '}layers with experts"
        elif spec.has_experts:
            yield from _refuse_experts(spec)

    def _refuse_ends(self, spec: DecoderSpec) -> Iterator[str]:
        scale = math.sqrt(spec.hidden_size) if self.scales_embedding else 1.0
        if not math.isclose(spec.embedding_scale, scale, rel_tol=1e-6):
            yield f"an embedding scale of {spec.embedding_scale:g}"
        if spec.final_logit_softcap is not None and self.caps_logits == "never":
            yield "a cap on the logits"
        if self.ties == "always" and not spec.is_tied:
            yield "an output head of its own"
        if spec.has_head_bias != self.has_head_bias:
            yield f"an output head {_with(spec.has_head_bias)} bias"
        if (own := spec.layer_embedding) and not self.has_layer_embedding:
            yield "embeddings for every layer"
        elif own and not _has_usual_scales(own, spec.hidden_size):
            yield "embeddings for every layer with other scales"
        if spec.has_layer_scales and not self.has_layer_scales:
            yield "layers that are multiplied by a number"


_HEAD_NORMS = {
    "alike": "that the heads of queries and keys share",
    "apart": "for each head of queries and keys",
    "together": "over all heads of queries or keys",
}

ARCHITECTURES = (  # of several that fit, the first is taken
    Architecture(name="qwen2", model_types=("qwen2",), needs_qkv_bias=True),
    Architecture(
        name="llama",
        model_types=("llama", "mistral"),
        rope_pairs="neighbours",
        scalings=(LinearScaling, Llama3Scaling, YarnScaling),
        output_bias="optional",
        mlp_bias="optional",
        head_width_is_free=True,
    ),
    Architecture(name="qwen3", model_types=("qwen3",), head_norms="alike", head_width_is_free=True),
    Architecture(
        name="smollm3",
        model_types=("smollm3",),
        rope_pairs="neighbours",
        skips_rope_every=4,
        head_width_is_free=True,
    ),
    Architecture(
        name="phi3",
        model_types=("phi3",),
        scalings=(LinearScaling, LongRopeScaling),
        has_partial_rope=True,
        fuses_attention=True,
        fuses_mlp=True,
    ),
    Architecture(
        name="gemma",
        model_types=("gemma",),
        norm_adds_one=True,
        scales_embedding=True,
        activation="gelu_tanh",
        head_width_is_free=True,
        ties="always",
    ),
    Architecture(
        name="gemma2",
        model_types=("gemma2",),
        scalings=(LinearScaling,),
        norm_adds_one=True,
        has_windows=True,
        needs_window=True,
        window_tokens=4096,
        window_period=2,
        has_local_theta=True,
        local_rope_scaling="shared",
        caps_scores=True,
        caps_logits="always",
        has_post_norms=True,
        scales_embedding=True,
        activation="gelu_tanh",
        scales_scores_by_hidden_at=46,
        head_width_is_free=True,
        ties="always",
    ),
    Architecture(
        name="gemma3",
        model_types=("gemma3_text",),
        scalings=(LinearScaling,),
        norm_adds_one=True,
        head_norms="alike",
        has_windows=True,
        window_period=6,
        has_local_theta=True,
        local_theta=10_000.0,
        caps_logits="optional",
        has_post_norms=True,
        scales_embedding=True,
        activation="gelu_tanh",
        scales_scores_by_hidden_at=62,
        head_width_is_free=True,
    ),
    Architecture(
        name="stablelm",
        model_types=("stablelm",),
        norm="layer",
        has_norm_bias=True,
        has_partial_rope=True,
        head_norms="apart",
        head_norms_are_optional=True,
        residual="either",
        ties="never",
    ),
    Architecture(
        name="granite",
        model_types=("granite", "granitemoehybrid"),
        rope_pairs="neighbours",
        scalings=(LinearScaling, Llama3Scaling, YarnScaling),
        positions="everywhere or nowhere",
        output_bias="optional",
        mlp_bias="optional",
        multiplies="everything",
        head_width_is_free=True,
    ),
    Architecture(
        name="mistral3",
        model_types=("ministral3",),
        rope_pairs="neighbours",
        scalings=(LinearScaling, Llama3Scaling, YarnScaling),
        reads_yarn_ramp=True,
        has_query_growth=True,
        output_bias="optional",
        mlp_bias="optional",
        head_width_is_free=True,
    ),
    Architecture(
        name="exaone",
        model_types=("exaone",),
        scalings=(LinearScaling, Llama3Scaling, YarnScaling),
        head_width_is_free=True,
    ),
    Architecture(
        name="exaone4",
        model_types=("exaone4",),
        scalings=(LinearScaling, Llama3Scaling, YarnScaling),
        positions="in windows",
        has_pre_norms=False,
        has_post_norms=True,
        head_norms="alike",
        has_windows=True,
        windows_at_depth=64,
        window_tokens=4096,
        local_rope_scaling="shared",
    ),
    Architecture(
        name="olmo2",
        model_types=("olmo2", "olmo3"),
        has_pre_norms=False,
        has_post_norms=True,
        head_norms="together",
        has_windows=True,
        ties="never",
    ),
    Architecture(
        name="hunyuan-dense",
        model_types=("hunyuan_v1_dense",),
        head_norms="alike",
        normalizes_after_rope=True,
        head_width_is_free=True,
    ),
    Architecture(
        name="ernie4_5",
        model_types=("ernie4_5",),
        rope_pairs="neighbours",
        head_width_is_free=True,
    ),
    Architecture(
        name="chatglm",
        model_types=("glm",),
        rope_pairs="neighbours",
        has_partial_rope=True,
        fuses_mlp=True,
    ),
    Architecture(
        name="glm4",
        model_types=("glm4", "hyperclovax"),
        rope_pairs="neighbours",
        has_partial_rope=True,
        has_post_norms=True,
        fuses_mlp=True,
        head_width_is_free=True,
    ),
    Architecture(
        name="command-r",
        model_types=("cohere",),
        rope_pairs="neighbours",
        norm="layer",
        head_norms="apart",
        head_norms_from_depth=64,
        multiplies="logits",
        residual="parallel",
        ties="always",
    ),
    Architecture(
        name="cohere2",
        model_types=("cohere2",),
        rope_pairs="neighbours",
        positions="in windows",
        norm="layer",
        has_windows=True,
        local_rope_scaling="shared",
        multiplies="logits",
        residual="parallel",
        ties="always",
    ),
    Architecture(
        name="starcoder2",
        model_types=("starcoder2",),
        norm="layer",
        has_norm_bias=True,
        output_bias="always",
        mlp_bias="always",
        activation="gelu_tanh",
        is_gated=False,
    ),
    Architecture(
        name="phi2",
        model_types=("phi",),
        norm="layer",
        has_norm_bias=True,
        has_partial_rope=True,
        output_bias="always",
        mlp_bias="always",
        has_head_bias=True,
        residual="parallel",
        activation="gelu_tanh",
        is_gated=False,
        ties="never",
    ),
    Architecture(
        name="nemotron",
        model_types=("nemotron",),
        norm="layer",
        has_norm_bias=True,
        norm_adds_one=True,
        has_partial_rope=True,
        output_bias="optional",
        mlp_bias="optional",
        activation="relu2",
        is_gated=False,
        ties="never",
    ),
    Architecture(
        name="arcee",
        model_types=("arcee",),
        rope_pairs="neighbours",
        scalings=(LinearScaling, Llama3Scaling, YarnScaling),
        activation="relu2",
        is_gated=False,
        head_width_is_free=True,
    ),
    Architecture(
        name="apertus",
        model_types=("apertus",),
        scalings=(LinearScaling, Llama3Scaling, YarnScaling),
        head_norms="alike",
        output_bias="optional",
        activation="xielu",
        is_gated=False,
        head_width_is_free=True,
        ties="never",
    ),
    Architecture(
        name="jais2",
        model_types=("jais2",),
        norm="layer",
        has_norm_bias=True,
        output_bias="always",
        mlp_bias="always",
        activation="relu2",
        is_gated=False,
        head_width_is_free=True,
    ),
    Architecture(
        name="lfm2",
        model_types=("lfm2",),
        state_mixer=ShortConv,
        head_norms="alike",
        tensor_names={"final_norm": "token_embd_norm.weight"},
    ),
    Architecture(
        name="lfm2moe",
        model_types=("lfm2_moe",),
        state_mixer=ShortConv,
        head_norms="alike",
        has_experts=True,
        tensor_names={"final_norm": "token_embd_norm.weight"},
    ),
    Architecture(
        name="qwen35",
        model_types=("qwen3_5_text",),
        has_partial_rope=True,
        norm_adds_one=True,
        head_norms="alike",
        state_mixer=DeltaNet,
        gates_attention=True,
        has_rope_sections=True,
        head_width_is_free=True,
        tensor_names={"mlp_norm": "post_attention_norm.weight"},
    ),
    Architecture(
        name="gemma4",
        model_types=("gemma4_text",),
        scalings=(ProportionalScaling,),
        head_norms="alike",
        has_windows=True,
        needs_window=True,
        has_local_theta=True,
        caps_logits="always",
        has_post_norms=True,
        scales_embedding=True,
        activation="gelu_tanh",
        differs_by_window=True,
        normalizes_values=True,
        values_may_be_keys=True,
        shares_caches=True,
        softmax_scale=1.0,
        has_divisors=True,
        has_layer_embedding=True,
        has_layer_scales=True,
        mlp_widths_differ=True,
        head_width_is_free=True,
    ),
    Architecture(  # Granite's, with windows and positions as each layer has them
        name="granite_swa",
        note="the file's architecture is granite_swa, the only one of llama.cpp with these windows "
        "or layers without positions; programs with a llama.cpp older than it do not open it",
        rope_pairs="neighbours",
        scalings=(LinearScaling, Llama3Scaling, YarnScaling),
        positions="by layer",
        output_bias="optional",
        mlp_bias="optional",
        has_windows=True,
        needs_window=True,
        local_rope_scaling="shared",
        multiplies="everything",
        has_sinks=True,
        head_width_is_free=True,
    ),
)


def choose(spec: DecoderSpec, *, family: str = "") -> Architecture:
    """Return the graph that computes a decoder: its family's own, else the first of all.

    A Phi-3 without longrope is a Llama too, but then llama-quantize mixes it otherwise; and other
    programs show a model by the name of its graph.

    Args:
        spec: The decoder.
        family: The ``model_type`` of its config.

    Raises:
        UsageError: If none does; the message says what the nearest one lacks.
    """
    if len(spec.layers) > MAX_LAYERS:
        raise UsageError(f"{len(spec.layers)} layers are more than llama.cpp's {MAX_LAYERS}")
    found = []
    for architecture in sorted(ARCHITECTURES, key=lambda graph: family not in graph.model_types):
        refusals = list(architecture.refusals(spec))
        if not refusals:
            return architecture
        found.append(
            (family not in architecture.model_types, len(refusals), architecture, refusals)
        )
    *_, nearest, refusals = min(found, key=lambda it: it[:2])
    raise UsageError(
        f"llama.cpp has no decoder like this: its nearest, {nearest.name}, cannot compute "
        f"{'; '.join(refusals)}",
        hint="another --format may; see `edgekit formats`",
    )


def get(name: str) -> Architecture:
    """Return the graph of that name.

    Raises:
        UsageError: If edgekit does not know it.
    """
    for architecture in ARCHITECTURES:
        if architecture.name == name:
            return architecture
    known = ", ".join(architecture.name for architecture in ARCHITECTURES)
    raise UsageError(f"GGUF files of architecture {name!r} are not read", hint=f"read: {known}")


def context_limit(spec: DecoderSpec, graph: Architecture | None = None) -> ContextLimit:
    """Return the longest context in which a graph, or the first, says what the checkpoint says."""
    graph = graph or choose(spec)
    limit = ContextLimit(tokens=spec.context_tokens, reason="the model was made for no more")
    windows = [layer.window_tokens for layer in spec.layers if layer.window_tokens]
    has_windows = graph.has_windows_at(len(spec.layers))
    if windows and not has_windows and min(windows) < limit.tokens:
        limit = ContextLimit(
            tokens=min(windows),
            reason="llama.cpp ignores this model's attention window, which changes longer texts",
        )
    for scaling in (layer.rope.scaling for layer in spec.layers if layer.rope):
        if isinstance(scaling, LongRopeScaling):
            limit = _longrope_limit(scaling, limit)
    return limit


def attention_kinds(spec: DecoderSpec) -> list[Attention]:
    """Return each attention that a layer has, whoever keeps its keys and values."""
    return list(dict.fromkeys(replace(a, cache_of=None) for _, _, a in spec.attentions()))


def first_rope(spec: DecoderSpec) -> Rope | None:
    """Return the rope of the layers without a window, or of the first that has one, or None."""
    ropes = [layer.rope for layer in spec.layers if layer.rope and not layer.window_tokens]
    ropes += [layer.rope for layer in spec.layers if layer.rope]
    return ropes[0] if ropes else None


def _longrope_limit(scaling: LongRopeScaling, limit: ContextLimit) -> ContextLimit:
    """Return how far the short factors reach; a cache that is rounded up must not cross it."""
    original = scaling.original_context_tokens
    if original >= limit.tokens:
        return limit
    if original < CONTEXT_PADDING_TOKENS:
        raise UsageError(
            f"llama.cpp rounds a context up to {CONTEXT_PADDING_TOKENS} tokens, where it would "
            f"take the long rope factors of this model, made for {original}",
            hint="another --format may; see `edgekit formats`",
        )
    return ContextLimit(
        tokens=original // CONTEXT_PADDING_TOKENS * CONTEXT_PADDING_TOKENS,
        reason="llama.cpp chooses the long rope factors by the size of the cache, the checkpoint "
        "by the length of the text",
    )


def _refuse_bias(
    known: Literal["never", "optional", "always"], *, has_bias: bool, where: str
) -> Iterator[str]:
    if has_bias and known == "never":
        yield f"a bias {where}"
    if not has_bias and known == "always":
        yield f"no bias {where}"


def _refuse_experts(spec: DecoderSpec) -> Iterator[str]:
    mlps = [spec.mlp(index) for index in range(len(spec.layers))]
    dense = dense_layers(spec)
    if any(not mlp.experts for mlp in mlps[dense:]):
        yield "a layer without experts after one with some"
    if len(set(mlps[dense:])) > 1:
        yield "experts that differ between layers"
    experts = mlps[-1].experts
    if experts and not experts.normalizes:
        yield "experts whose shares of a token do not add up to one"
    if experts and experts.count > MAX_EXPERTS:
        yield f"{experts.count} experts, more than {MAX_EXPERTS}"


def dense_layers(spec: DecoderSpec) -> int:
    """Return how many layers come before the first with experts."""
    has = [bool(spec.mlp(index).experts) for index in range(len(spec.layers))]
    return has.index(True) if True in has else len(has)


def _norm_name(norm: Norm) -> str:
    return f"{norm.kind}{' with 1 added' if norm.unit_offset else ''}"


def _with(has_it: bool) -> str:
    return "with" if has_it else "without"


def _no(has_it: bool) -> str:
    return "" if has_it else "no "


def _mixer_name(kind: type[ShortConv | DeltaNet]) -> str:
    return {ShortConv: "short convolution", DeltaNet: "delta net"}[kind]


def _has_usual_scales(own: LayerEmbedding, hidden_size: int) -> bool:
    found = (own.scale, own.projection_scale, own.sum_scale)
    usual = (math.sqrt(own.width), hidden_size**-0.5, math.sqrt(0.5))
    return all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(found, usual, strict=True))


def _scaling_name(scaling: RopeScaling) -> str:
    return type(scaling).__name__.removesuffix("Scaling").lower()
