"""The metadata keys that describe a decoder to llama.cpp, written from a spec and read into one.

Both directions stand here so that what is written is what is read: a GGUF file found in the wild
becomes a `DecoderSpec` again, and from that an ordinary checkpoint.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from edgekit.errors import UsageError
from edgekit.formats.gguf import architectures
from edgekit.formats.gguf.architectures import Architecture
from edgekit.formats.gguf.facts import Facts, shortest
from edgekit.model.mixers import Attention, DeltaNet, Mixer, QueryGrowth, ShortConv
from edgekit.model.norm import Norm
from edgekit.model.rope import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ProportionalScaling,
    Rope,
    RopeScaling,
    YarnScaling,
    yarn_attention_factor,
)
from edgekit.model.spec import (
    XIELU_BETA,
    XIELU_EPSILON,
    DecoderSpec,
    Experts,
    Layer,
    LayerEmbedding,
    Mlp,
    Multipliers,
)


if TYPE_CHECKING:
    from edgekit.formats.gguf.layout import Value


def write(spec: DecoderSpec, architecture: Architecture) -> dict[str, "Value"]:
    """Return the keys of a decoder, typed; without the weights that are `parts.KEYS`."""
    a, rope = _global_attention(spec), architectures.first_rope(spec)
    epsilon = "layer_norm_epsilon" if spec.norm.kind == "layer" else "layer_norm_rms_epsilon"
    keys: dict[str, Value] = {
        "vocab_size": ("uint32", spec.vocab_size),
        "context_length": ("uint32", architectures.context_limit(spec, architecture).tokens),
        "embedding_length": ("uint32", spec.hidden_size),
        "block_count": ("uint32", len(spec.layers)),
        "feed_forward_length": _by_layer(
            [
                spec.intermediate_size if mlp.experts else mlp.intermediate_size
                for mlp in map(spec.mlp, range(len(spec.layers)))
            ]
        ),
        "attention.head_count": ("uint32", a.heads),
        "attention.head_count_kv": _by_layer(_key_value_heads(spec, architecture)),
        "attention.key_length": ("uint32", a.head_dim),
        "attention.value_length": ("uint32", a.head_dim),
        f"attention.{epsilon}": ("float32", spec.norm.epsilon),
        "rope.dimension_count": ("uint32", rope.width if rope else a.head_dim),
    }
    keys |= _rope_keys(rope, architecture)
    keys |= _state_keys(spec)
    keys |= _graph_keys(spec, architecture)
    if architecture.has_windows_at(len(spec.layers)):
        keys |= _window_keys(spec, architecture)
    if a.query_growth:
        keys["attention.temperature_scale"] = ("float32", a.query_growth.rate)
        keys["rope.scaling.original_context_length"] = ("uint32", a.query_growth.step_tokens)
    if architecture.caps_scores:
        keys["attn_logit_softcapping"] = ("float32", a.attn_logit_softcap or NO_CAP)
    if spec.final_logit_softcap is not None or architecture.caps_logits == "always":
        keys["final_logit_softcapping"] = ("float32", spec.final_logit_softcap or NO_CAP)
    named = {f"{architecture.name}.{key}": value for key, value in keys.items()}
    if spec.activation == "xielu":
        for key, constant in _XIELU.items():
            named[key] = ("array[float32]", [constant] * len(spec.layers))
    return named


def _graph_keys(spec: DecoderSpec, architecture: Architecture) -> dict[str, "Value"]:
    """Return what one graph or another reads."""
    keys: dict[str, Value] = {}
    if architecture.positions == "by layer":
        pattern = [layer.rope is not None for layer in spec.layers]
        keys[_ROPE_PATTERN] = ("array[bool]", pattern)
    if architecture.multiplies != "never":  # it is in the weights, but the key must be there
        keys["logit_scale"] = ("float32", 1.0)
    if architecture.residual == "either":
        keys["use_parallel_residual"] = ("bool", spec.residual == "parallel")
    if architecture.has_rope_sections:
        sections = _rope_sections(architectures.first_rope(spec))
        keys["rope.dimension_sections"] = ("array[int32]", sections)
    if architecture.has_layer_embedding:
        own = spec.layer_embedding
        keys["embedding_length_per_layer_input"] = ("uint32", own.width if own else 0)
    if architecture.has_experts:
        keys |= _expert_keys(spec)
    if architecture.shares_caches:
        keys["attention.shared_kv_layers"] = ("uint32", len(spec.layers) - len([*spec.caches()]))
    if architecture.differs_by_window:
        keys |= _local_keys(spec)
    return keys


def _expert_keys(spec: DecoderSpec) -> dict[str, "Value"]:
    """Return what says which layers have experts, how many, and how tokens choose."""
    dense, mlp = architectures.dense_layers(spec), spec.mlp(len(spec.layers) - 1)
    if mlp.experts is None:
        return {}
    return {
        _DENSE_LAYERS: ("uint32", dense),
        "expert_count": ("uint32", mlp.experts.count),
        "expert_used_count": ("uint32", mlp.experts.used),
        "expert_feed_forward_length": ("uint32", mlp.intermediate_size),
        _GATING: ("uint32", _SIGMOID),
    }


_DENSE_LAYERS, _GATING = "leading_dense_block_count", "expert_gating_func"
_SIGMOID = 2  # LLAMA_EXPERT_GATING_FUNC_TYPE_SIGMOID in llama-hparams.h


def _global_attention(spec: DecoderSpec) -> Attention:
    """Return the attention of the layers without a window, or of all."""
    found = (a for _, layer, a in spec.attentions() if layer.window_tokens is None)
    return next(found, spec.attention)


def _by_layer(counts: Sequence[int]) -> "Value":
    """Return a count for each layer, or one for all."""
    is_alike = len(set(counts)) == 1
    return ("uint32", counts[0]) if is_alike else ("array[int32]", list(counts))


def _key_value_heads(spec: DecoderSpec, architecture: Architecture) -> list[int]:
    """Return how many each layer has; in LFM2 none is what makes it a convolution."""
    mixers = [spec.mixer(index) for index in range(len(spec.layers))]
    absent = 0 if architecture.state_mixer is ShortConv else spec.attention.num_kv_heads
    return [it.num_kv_heads if isinstance(it, Attention) else absent for it in mixers]


def _state_keys(spec: DecoderSpec) -> dict[str, "Value"]:
    """Return what says how layers that do not attend mix, and which they are."""
    mixers = [spec.mixer(index) for index in range(len(spec.layers))]
    match next((it for it in mixers if not isinstance(it, Attention)), None):
        case ShortConv(taps=taps):
            return {"shortconv.l_cache": ("uint32", taps)}
        case DeltaNet() as net:
            pattern = [isinstance(it, DeltaNet) for it in mixers]
            return {
                "ssm.conv_kernel": ("uint32", net.taps),
                "ssm.state_size": ("uint32", net.key_head_dim),
                "ssm.group_count": ("uint32", net.key_heads),
                "ssm.time_step_rank": ("uint32", net.value_heads),
                "ssm.inner_size": ("uint32", net.value_width),
                # Programs older than the second key read the first.
                _INTERVAL: ("uint32", pattern.index(False) + 1 if False in pattern else 4),
                _RECURRENT: ("array[bool]", pattern),
            }
        case _:
            return {}


_INTERVAL, _RECURRENT = "full_attention_interval", "attention.recurrent_layers"


def _rope_sections(rope: Rope | None) -> list[int]:
    """Return how many pairs turn by each position of what is seen; of text all are the same.

    They take turns, and a pair beyond its section would not turn at all.
    """
    pairs = rope.width // 2 if rope else 1
    return [-(-(pairs - section) // 3) for section in range(3)] + [0]


def _local_keys(spec: DecoderSpec) -> dict[str, "Value"]:
    """Return what the layers with a window have otherwise: their heads, and their rope."""
    local = [(layer, a) for _, layer, a in spec.attentions() if layer.window_tokens]
    layer, a = local[0] if local else (spec.layers[0], _global_attention(spec))
    rope = layer.rope
    return {
        "attention.key_length_swa": ("uint32", a.head_dim),
        "attention.value_length_swa": ("uint32", a.head_dim),
        "rope.dimension_count_swa": ("uint32", rope.width if rope else a.head_dim),
    }


_XIELU = {"xielu.beta": XIELU_BETA, "xielu.eps": XIELU_EPSILON}


NO_CAP = 2.0**20  # for graphs that always cap: below 1,000 it changes no bit that counts
_ROPE_PATTERN = "attention.rope_pattern"


def _rope_keys(rope: Rope | None, architecture: Architecture) -> dict[str, "Value"]:
    if rope is None:
        # What is true of every other file; Granite's graph takes it for "rotates". llama.cpp's
        # converter says true of a Granite 4 without positions too.
        return {"rope.scaling.finetuned": ("bool", False)}
    return {"rope.freq_base": ("float32", rope.theta)} | _scaling_keys(rope.scaling, architecture)


def _scaling_keys(scaling: RopeScaling | None, architecture: Architecture) -> dict[str, "Value"]:
    match scaling:
        case LinearScaling(factor=factor):
            return {
                "rope.scaling.type": ("string", "linear"),
                "rope.scaling.factor": ("float32", factor),
            }
        case YarnScaling() as yarn:
            return _yarn_keys(yarn, architecture)
        case LongRopeScaling() as longrope:
            return {
                "rope.scaling.type": ("string", "longrope"),
                "rope.scaling.original_context_length": (
                    "uint32",
                    longrope.original_context_tokens,
                ),
                "rope.scaling.attn_factor": ("float32", longrope.attention_factor),
            }
        case Llama3Scaling() | ProportionalScaling() | None:  # the first two are a tensor
            return {}


def _yarn_keys(yarn: YarnScaling, architecture: Architecture) -> dict[str, "Value"]:
    """Return what llama.cpp computes a YaRN from, or what one was that is written as divisors.

    What it computes for a factor itself, ``attn_factor`` multiplies.
    """
    is_divided = architecture.takes_divisors(yarn)
    computed = 1.0 if is_divided else yarn_attention_factor(yarn.factor)
    keys: dict[str, Value] = {
        "rope.scaling.type": ("string", "none" if is_divided else "yarn"),
        "rope.scaling.factor": ("float32", yarn.factor),
        "rope.scaling.original_context_length": ("uint32", yarn.original_context_tokens),
        "rope.scaling.attn_factor": ("float32", yarn.attention_factor / computed),
    }
    if is_divided or architecture.reads_yarn_ramp:
        keys[_FAST] = ("float32", yarn.fast_turns)
        keys[_SLOW] = ("float32", yarn.slow_turns)
    return keys


_FAST, _SLOW = "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"


def _window_keys(spec: DecoderSpec, architecture: Architecture) -> dict[str, "Value"]:
    local = [layer for layer in spec.layers if layer.window_tokens]
    pattern = [layer.window_tokens is not None for layer in spec.layers]
    window = local[0].window_tokens if local else None
    if not local:
        if not architecture.needs_window:
            return {}
        pattern, window = _one_window(len(spec.layers)), spec.context_tokens
    keys: dict[str, Value] = {
        "attention.sliding_window": ("uint32", window),
        "attention.sliding_window_pattern": ("array[bool]", pattern),
    }
    if local and local[0].rope and architecture.has_local_theta:
        keys["rope.freq_base_swa"] = ("float32", local[0].rope.theta)
    return keys


def _one_window(depth: int) -> list[bool]:
    """Return a pattern for a graph that needs a window: one as long as any text changes nothing."""
    return [True] + [False] * (depth - 1)


def made_tensors(spec: DecoderSpec, architecture: Architecture) -> dict[str, Sequence[float]]:
    """Return the tensors that llama.cpp reads and no checkpoint has, by name.

    They are the divisors of the rope's frequencies, and sinks that draw nothing from other scores.
    """
    rope = architectures.first_rope(spec)
    made: dict[str, Sequence[float]] = {}
    is_global = any(layer.window_tokens is None for _, layer, _ in spec.attentions())
    if rope and (
        architecture.takes_divisors(rope.scaling) or (architecture.has_divisors and is_global)
    ):
        divisors = rope.divisors(spec.context_tokens)
        made["rope_freqs.weight"] = [min(divisor, NO_TURN) for divisor in divisors]
    if rope and isinstance(rope.scaling, LongRopeScaling):
        made["rope_factors_long.weight"] = rope.scaling.long_factors
        made["rope_factors_short.weight"] = rope.scaling.short_factors
    if architecture.has_sinks:
        for index in range(len(spec.layers)):
            made[sinks_name(index)] = [NO_SINK] * spec.attention.heads
    for index, experts in enumerate(spec.mlp(index).experts for index in range(len(spec.layers))):
        if experts and not experts.has_bias:  # the graph cannot do without
            made[f"blk.{index}.exp_probs_b.bias"] = [0.0] * experts.count
    return made


NO_TURN = 1e30  # what divides a frequency of which no text sees anything
NO_SINK = -1e30  # the exponential of a score this low is 0


def sinks_name(layer: int) -> str:
    """Return the name of the tensor with a layer's sinks."""
    return f"blk.{layer}.attn_sinks.weight"


def read(facts: Facts) -> DecoderSpec:
    """Return the decoder that a GGUF file describes.

    Raises:
        UsageError: If a key is missing, or says what edgekit cannot express.
    """
    architecture = facts.architecture
    heads, hidden = facts.count("attention.head_count"), facts.count("embedding_length")
    head_dim = facts.count("attention.key_length", hidden // heads)
    is_layer_norm = architecture.norm == "layer"
    epsilon = facts.number(
        f"attention.{'layer_norm_epsilon' if is_layer_norm else 'layer_norm_rms_epsilon'}"
    )
    if architecture.activation == "xielu":
        _refuse_other_xielu(facts)
    mixers = _read_mixers(facts, head_dim=head_dim, epsilon=epsilon)
    attention = mixers.local if any(mixers.windows) else mixers.everywhere
    attention = replace(attention, values_are_keys=False)  # some layers may have it
    return DecoderSpec(
        vocab_size=facts.vocab_size,
        hidden_size=hidden,
        intermediate_size=mixers.mlp_widths[0],
        context_tokens=facts.count("context_length"),
        layers=_read_layers(facts, mixers, attention),
        attention=attention,
        norm=Norm(
            kind=architecture.norm,
            epsilon=epsilon,
            has_bias=architecture.has_norm_bias,
            unit_offset=architecture.norm_adds_one,
        ),
        activation=architecture.activation,
        residual=_read_residual(facts),
        has_pre_norms=architecture.has_pre_norms,
        has_post_norms=architecture.has_post_norms,
        is_gated=architecture.is_gated,
        has_mlp_bias=facts.has_tensor("ffn_down.bias"),
        has_head_bias=architecture.has_head_bias,
        multipliers=_read_multipliers(facts, head_dim),
        embedding_scale=math.sqrt(hidden) if architecture.scales_embedding else 1.0,
        final_logit_softcap=_read_cap(
            facts,
            "final_logit_softcapping",
            30.0 if architecture.caps_logits == "always" else 0.0,
        ),
        is_tied="output.weight" not in facts.tensors,
        layer_embedding=_read_layer_embedding(facts, hidden),
        has_layer_scales=architecture.has_layer_scales,
    )


def _read_layer_embedding(facts: Facts, hidden: int) -> LayerEmbedding | None:
    if not facts.architecture.has_layer_embedding:
        return None
    width = facts.number("embedding_length_per_layer_input")
    if width == 0:
        return None
    return LayerEmbedding(
        width=facts.count("embedding_length_per_layer_input"),
        vocab_size=facts.vocab_size,
        scale=width**0.5,
        projection_scale=hidden**-0.5,
        sum_scale=0.5**0.5,
    )


def _read_residual(facts: Facts) -> Literal["serial", "parallel"]:
    known = facts.architecture.residual
    if known != "either":
        return known
    return "serial" if facts.has_tensor("ffn_norm.weight") else "parallel"


def _read_multipliers(facts: Facts, head_dim: int) -> Multipliers:
    """Return what the graph multiplies with; 0 means that it does not."""
    match facts.architecture.multiplies:
        case "never":
            return Multipliers()
        case "logits":
            return Multipliers(logits=facts.number("logit_scale", 0.0) or 1.0)
        case "everything":
            scores = facts.number("attention.scale", 0.0)
            return Multipliers(
                embedding=facts.number("embedding_scale", 0.0) or 1.0,
                query=scores / head_dim**-0.5 if scores else 1.0,
                residual=facts.number("residual_scale", 0.0) or 1.0,
                logits=1 / (facts.number("logit_scale") or 1.0),
            )


def _refuse_other_xielu(facts: Facts) -> None:
    """Check that the constants are those of every model; 16 bits round the second."""
    for key, constant in _XIELU.items():
        for value in facts.each_layer(key):
            if not math.isclose(value, constant, rel_tol=0.01):
                raise UsageError(f"{key} = {value:g} in the GGUF file, expected {constant:g}")


def _read_attention(facts: Facts, *, head_dim: int, epsilon: float) -> Attention:
    architecture, heads = facts.architecture, facts.count("attention.head_count")
    depth = facts.depth
    has_norms = facts.has_tensor("attn_q_norm.weight") and architecture.has_head_norms_at(depth)
    cap = _read_cap(facts, "attn_logit_softcapping", 50.0) if architecture.caps_scores else None
    return Attention(
        heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        softmax_scale=1.0,
        attn_logit_softcap=cap,
        query_key_norm=Norm(
            kind=architecture.norm, epsilon=epsilon, unit_offset=architecture.norm_adds_one
        )
        if has_norms
        else None,
        head_norms=architecture.head_norms
        if has_norms and architecture.head_norms != "none"
        else "alike",
        normalizes_after_rope=has_norms and architecture.normalizes_after_rope,
        query_growth=_read_growth(facts),
        value_norm_epsilon=epsilon if architecture.normalizes_values else None,
        has_output_gate=architecture.gates_attention,
        has_qkv_bias=facts.has_tensor("attn_q.bias") or facts.has_tensor("attn_qkv.bias"),
        has_output_bias=facts.has_tensor("attn_output.bias"),
    )


def _read_cap(facts: Facts, key: str, default: float) -> float | None:
    cap: float = facts.number(key, default)
    return cap if 0 < cap < NO_CAP else None


def _read_growth(facts: Facts) -> QueryGrowth | None:
    rate = facts.number("attention.temperature_scale", 0.0)
    if not facts.architecture.has_query_growth or rate == 0.0:
        return None
    steps = facts.count("rope.scaling.original_context_length", facts.count("context_length"))
    return QueryGrowth(rate=rate, step_tokens=steps)


@dataclass(frozen=True, kw_only=True)
class _Mixers:
    """What each layer has that not all have."""

    everywhere: Attention  # of the layers without a window
    local: Attention  # of the others
    windows: list[int | None]
    states: list[Mixer | None]  # where a layer does not attend
    donors: list[int | None]  # whose keys and values are read
    mlp_widths: list[int]
    experts: list[Mlp | None]  # where there are some


def _read_mixers(facts: Facts, *, head_dim: int, epsilon: float) -> _Mixers:
    architecture, depth = facts.architecture, facts.depth
    attention = _read_attention(facts, head_dim=head_dim, epsilon=epsilon)
    windows, states = _read_windows(facts, depth), _read_states(facts, epsilon)
    heads = facts.count("attention.head_count")
    if architecture.differs_by_window or architecture.state_mixer is ShortConv:
        kv_heads = facts.counts("attention.head_count_kv", heads, least=0)
    else:
        kv_heads = [facts.count("attention.head_count_kv", heads)] * depth
    donors = _read_donors(facts, windows)
    kinds: dict[bool, set[Attention]] = {False: set(), True: set()}
    for index, (window, donor) in enumerate(zip(windows, donors, strict=True)):
        if states[index] is not None:
            continue
        is_local = window is not None and architecture.differs_by_window
        width = facts.count("attention.key_length_swa", head_dim) if is_local else head_dim
        has_values = f"blk.{index if donor is None else donor}.attn_v.weight" in facts.tensors
        kinds[window is not None].add(
            replace(
                attention,
                num_kv_heads=kv_heads[index],
                head_dim=width,
                softmax_scale=_read_scale(facts, width),
                values_are_keys=architecture.values_may_be_keys and not has_values,
            )
        )
    if max(map(len, kinds.values())) > 1 or not any(kinds.values()):
        raise UsageError(
            "the GGUF file has no layer that attends, or layers of one kind that attend otherwise"
        )
    everywhere, local = (next(iter(kinds[it] or kinds[not it])) for it in (False, True))
    return _Mixers(
        everywhere=everywhere,
        local=local,
        windows=windows,
        states=states,
        donors=donors,
        mlp_widths=facts.counts("feed_forward_length")
        if architecture.mlp_widths_differ
        else [facts.count("feed_forward_length")] * depth,
        experts=_read_experts(facts),
    )


def _read_experts(facts: Facts) -> list[Mlp | None]:
    """Return what each layer has in the place of its MLP; llama.cpp reads no scale of it.

    Raises:
        UsageError: If tokens choose by another function, or take more experts than there are.
    """
    if not facts.architecture.has_experts:
        return [None] * facts.depth
    if (gating := facts.number(_GATING)) != _SIGMOID:
        raise UsageError(
            f"the GGUF file's {_GATING} = {gating}, expected {_SIGMOID}, a sigmoid of each score"
        )
    count = facts.count("expert_count")
    experts = Experts(count=count, used=facts.count("expert_used_count", most=count))
    mlp = Mlp(intermediate_size=facts.count("expert_feed_forward_length"), experts=experts)
    dense = facts.number(_DENSE_LAYERS, 0)
    return [mlp if index >= dense else None for index in range(facts.depth)]


def _read_scale(facts: Facts, head_dim: int) -> float:
    return facts.architecture.score_scale(
        depth=facts.depth,
        head_dim=head_dim,
        hidden_size=facts.count("embedding_length"),
        heads=facts.count("attention.head_count"),
    )


def _read_states(facts: Facts, epsilon: float) -> list[Mixer | None]:
    """Return what the layers have that do not attend."""
    kind, depth = facts.architecture.state_mixer, facts.depth
    if kind is None:
        return [None] * depth
    if kind is ShortConv:
        conv = ShortConv(taps=facts.count("shortconv.l_cache"))
        heads = facts.counts("attention.head_count_kv", least=0)
        return [None if count else conv for count in heads]
    net = DeltaNet(
        key_heads=facts.count("ssm.group_count"),
        value_heads=facts.count("ssm.time_step_rank"),
        key_head_dim=facts.count("ssm.state_size"),
        value_head_dim=facts.count("ssm.state_size"),
        taps=facts.count("ssm.conv_kernel"),
        norm=Norm(kind="rms", epsilon=epsilon),
    )
    interval = facts.count(_INTERVAL, 4)
    pattern = facts.flags(_RECURRENT) or [(index + 1) % interval != 0 for index in range(depth)]
    return [net if is_recurrent else None for is_recurrent in pattern]


def _read_donors(facts: Facts, windows: Sequence[int | None]) -> list[int | None]:
    """Return whose keys and values each layer reads, None for its own."""
    if not facts.architecture.shares_caches:
        return [None] * facts.depth
    shared = facts.number("attention.shared_kv_layers", 0)
    first = facts.depth - shared
    if not isinstance(shared, int) or not 2 <= first <= facts.depth:
        raise UsageError(f"the GGUF file's attention.shared_kv_layers = {shared!r}")
    return [
        None if index < first else first - (1 if window is None else 2)
        for index, window in enumerate(windows)
    ]


def _read_layers(facts: Facts, mixers: _Mixers, attention: Attention) -> tuple[Layer, ...]:
    """Return the layers, with what they have otherwise than the decoder."""
    architecture, depth = facts.architecture, facts.depth
    everywhere, local = mixers.everywhere, mixers.local
    rope = Rope(
        width=facts.count("rope.dimension_count", everywhere.head_dim),
        theta=float(facts.number("rope.freq_base", 10_000.0)),
        scaling=None,
    )
    rope = replace(rope, scaling=_read_scaling(facts, rope))
    rotates = _read_positions(facts, depth)
    width = (
        facts.count("rope.dimension_count_swa", local.head_dim)
        if architecture.differs_by_window
        else rope.width
    )
    local_rope = replace(
        rope,
        width=width,
        theta=_read_local_theta(facts, rope),
        scaling=rope.scaling if architecture.local_rope_scaling == "shared" else None,
    )

    def layer(index: int) -> Layer:
        window, mixer = mixers.windows[index], mixers.states[index]
        mlp = Mlp(intermediate_size=mixers.mlp_widths[index])
        own_mlp = mlp if mlp.intermediate_size != mixers.mlp_widths[0] else mixers.experts[index]
        if mixer is not None:
            return Layer(mixer=mixer, mlp=own_mlp)
        has_window = window is not None
        has_positions = rotates[index] and architecture.has_positions(
            index, depth=depth, has_window=has_window
        )
        own = replace(local if has_window else everywhere, cache_of=mixers.donors[index])
        return Layer(
            rope=(local_rope if has_window else rope) if has_positions else None,
            window_tokens=window,
            mixer=None if own == attention else own,
            mlp=own_mlp,
        )

    return tuple(layer(index) for index in range(depth))


def _read_positions(facts: Facts, depth: int) -> list[bool]:
    """Return where keys allow positions."""
    match facts.architecture.positions:
        case "everywhere or nowhere":
            return [facts.value("rope.scaling.finetuned", True) is not False] * depth
        case "by layer":
            return facts.flags(_ROPE_PATTERN) or [True] * depth
        case _:
            return [True] * depth


def _read_local_theta(facts: Facts, rope: Rope) -> float:
    if not facts.architecture.has_local_theta:
        return rope.theta
    default = facts.architecture.local_theta or rope.theta
    return float(facts.number("rope.freq_base_swa", default))


def _read_windows(facts: Facts, depth: int) -> list[int | None]:
    """Return each layer's window; without a pattern the graph's own default applies.

    Source: ``load_swa_pattern`` and the calls to it.
    """
    architecture = facts.architecture
    if not architecture.has_windows_at(depth):
        return [None] * depth
    window = facts.number("attention.sliding_window", architecture.window_tokens)
    key = "attention.sliding_window_pattern"
    pattern = facts.value(key, None)
    if not isinstance(pattern, list):
        period = facts.count(key, architecture.window_period)
        pattern = [(index + 1) % period != 0 for index in range(depth)]
    if len(pattern) < depth:
        raise UsageError(f"the GGUF file's {key} has {len(pattern)} layers, expected {depth}")
    if pattern[:depth] == _one_window(depth) and window == facts.count("context_length"):
        return [None] * depth
    return [window if window and is_local else None for is_local in pattern[:depth]]


def _read_scaling(facts: Facts, rope: Rope) -> RopeScaling | None:
    # Absent means linear to llama.cpp, and a factor of 0 means none.
    kind = facts.value("rope.scaling.type", "linear")
    if "rope_factors_long.weight" in facts.rope_factors:
        return LongRopeScaling(
            short_factors=tuple(map(shortest, facts.rope_factors["rope_factors_short.weight"])),
            long_factors=tuple(map(shortest, facts.rope_factors["rope_factors_long.weight"])),
            original_context_tokens=facts.count("rope.scaling.original_context_length"),
            attention_factor=facts.number("rope.scaling.attn_factor", 1.0),
        )
    if "rope_freqs.weight" in facts.rope_factors:
        return _read_divisors(facts, rope, facts.rope_factors["rope_freqs.weight"])
    factor = facts.number("rope.scaling.factor", facts.number("rope.scale_linear", 0.0))
    if kind == "yarn" and factor != 0.0:
        return _read_yarn(facts, factor)
    if kind == "linear" and factor not in {0.0, 1.0}:
        return LinearScaling(factor=factor)
    if kind not in {"none", "linear"}:
        raise UsageError(f"GGUF files with {kind} rope scaling are not read")
    return None


def _read_yarn(facts: Facts, factor: float) -> YarnScaling:
    """Return what llama.cpp computes: most graphs read no keys of the ramp.

    Source: ``llama_context`` in llama-context.cpp, where ``yarn_log_multiplier`` divides.
    """
    fast, slow, weight = *architectures.YARN_TURNS, 0.0
    if facts.architecture.reads_yarn_ramp:
        fast, slow = facts.number(_FAST, fast), facts.number(_SLOW, slow)
        weight = facts.number("rope.scaling.yarn_log_multiplier", weight)
    share = facts.number("rope.scaling.attn_factor", 1.0) / yarn_attention_factor(factor, weight)
    usual = yarn_attention_factor(factor)
    return YarnScaling(
        factor=factor,
        fast_turns=fast,
        slow_turns=slow,
        original_context_tokens=facts.count(
            "rope.scaling.original_context_length", facts.count("context_length")
        ),
        # As many digits as the float32 of the file has
        attention_factor=usual if share == 1.0 else float(f"{share * usual:.7g}"),
        is_truncated=True,
    )


def _read_divided_yarn(facts: Facts, rope: Rope, divisors: Sequence[float]) -> YarnScaling:
    """Return the YaRN that edgekit wrote as divisors.

    Raises:
        UsageError: If it has others.
    """
    truncated = YarnScaling(
        factor=facts.number("rope.scaling.factor"),
        fast_turns=facts.number(_FAST),
        slow_turns=facts.number(_SLOW),
        original_context_tokens=facts.count("rope.scaling.original_context_length"),
        attention_factor=facts.number("rope.scaling.attn_factor", 1.0),
        is_truncated=True,
    )
    for scaling in (truncated, replace(truncated, is_truncated=False)):
        if _are_close(scaling.divisors(rope.width, rope.theta), divisors):
            return scaling
    raise UsageError("the GGUF file's rope_freqs are not those of its YaRN")


def _are_close(expected: Sequence[float], found: Sequence[float]) -> bool:
    return len(expected) == len(found) and all(
        math.isclose(a, b, rel_tol=1e-5) for a, b in zip(expected, found, strict=True)
    )


def _read_divisors(facts: Facts, rope: Rope, divisors: Sequence[float]) -> RopeScaling | None:
    if ProportionalScaling in facts.architecture.scalings:
        return _read_proportional(divisors)
    is_yarn = facts.value("rope.scaling.type", "linear") == "none"
    if is_yarn and facts.value(_FAST, None) is not None:
        return _read_divided_yarn(facts, rope, divisors)
    return _read_llama3(rope, divisors)


def _read_proportional(divisors: Sequence[float]) -> ProportionalScaling | None:
    """Return the scaling that leaves out the pairs that do not turn.

    Raises:
        UsageError: If the others are not divided alike.
    """
    turned = [shortest(divisor) for divisor in divisors if divisor < NO_TURN / 2]
    if set(turned) <= {1.0} and len(turned) == len(divisors):
        return None
    if len(set(turned)) != 1 or any(divisor < NO_TURN / 2 for divisor in divisors[len(turned) :]):
        raise UsageError("the GGUF file's rope_freqs are not those of a Gemma 4 model")
    return ProportionalScaling(factor=turned[0], rotated_pairs=len(turned))


def _read_llama3(rope: Rope, factors: Sequence[float]) -> Llama3Scaling | None:
    """Recover Llama 3's parameters; the file has only the divisors they gave.

    Every published model has a ramp from 1 to 4 turns, and most have it over 8192 tokens; else a
    frequency on the ramp tells.

    Raises:
        UsageError: If no such parameters give these divisors.
    """
    if all(factor == 1.0 for factor in factors):
        return None
    factor = shortest(max(factors))
    plain = Llama3Scaling(
        factor=factor,
        low_frequency_factor=1.0,
        high_frequency_factor=4.0,
        original_context_tokens=8192,
    )
    for tokens in (8192, *_original_contexts(rope, factors, factor)):
        scaling = replace(plain, original_context_tokens=tokens)
        if _are_close(replace(rope, scaling=scaling).divisors(0), factors):
            return scaling
    raise UsageError("the GGUF file's rope_freqs are not those of a Llama 3 model")


def _original_contexts(rope: Rope, factors: Sequence[float], factor: float) -> Iterator[int]:
    """Yield in what context each divisor of the ramp, from 1 to 4 turns, would have come about."""
    for index, divisor in enumerate(factors):
        if 1 < divisor < factor:
            kept = (1 / divisor - 1 / factor) / (1 - 1 / factor)
            wave_tokens = 2 * math.pi * rope.theta ** (2 * index / rope.width)
            yield round((1 + 3 * kept) * wave_tokens)
