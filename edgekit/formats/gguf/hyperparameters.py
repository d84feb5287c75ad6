"""The metadata keys that describe a decoder to llama.cpp, written from a spec and read into one.

Both directions stand here so that what is written is what is read: a GGUF file found in the wild
becomes a `DecoderSpec` again, and from that an ordinary checkpoint.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from edgekit.errors import UsageError
from edgekit.formats.gguf import architectures
from edgekit.formats.gguf.architectures import Architecture
from edgekit.model.mixers import Attention, QueryGrowth
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
from edgekit.model.spec import XIELU_BETA, XIELU_EPSILON, DecoderSpec, Layer, Multipliers


if TYPE_CHECKING:
    from edgekit.formats.gguf.layout import Value


def write(spec: DecoderSpec, architecture: Architecture) -> dict[str, "Value"]:
    """Return the keys of a decoder, typed; without the weights that are `parts.KEYS`."""
    a, rope = spec.attention, architectures.first_rope(spec)
    epsilon = "layer_norm_epsilon" if spec.norm.kind == "layer" else "layer_norm_rms_epsilon"
    keys: dict[str, Value] = {
        "vocab_size": ("uint32", spec.vocab_size),
        "context_length": ("uint32", architectures.context_limit(spec, architecture).tokens),
        "embedding_length": ("uint32", spec.hidden_size),
        "block_count": ("uint32", len(spec.layers)),
        "feed_forward_length": ("uint32", spec.intermediate_size),
        "attention.head_count": ("uint32", a.heads),
        "attention.head_count_kv": ("uint32", a.num_kv_heads),
        "attention.key_length": ("uint32", a.head_dim),
        "attention.value_length": ("uint32", a.head_dim),
        f"attention.{epsilon}": ("float32", spec.norm.epsilon),
        "rope.dimension_count": ("uint32", rope.width if rope else a.head_dim),
    }
    keys |= _rope_keys(rope, architecture)
    if architecture.has_windows_at(len(spec.layers)):
        keys |= _window_keys(spec, architecture)
    if architecture.positions == "by layer":
        pattern = [layer.rope is not None for layer in spec.layers]
        keys[_ROPE_PATTERN] = ("array[bool]", pattern)
    if a.query_growth:
        keys["attention.temperature_scale"] = ("float32", a.query_growth.rate)
        keys["rope.scaling.original_context_length"] = ("uint32", a.query_growth.step_tokens)
    if architecture.caps_scores:
        keys["attn_logit_softcapping"] = ("float32", a.attn_logit_softcap or NO_CAP)
    if spec.final_logit_softcap is not None or architecture.caps_logits == "always":
        keys["final_logit_softcapping"] = ("float32", spec.final_logit_softcap or NO_CAP)
    if architecture.multiplies != "never":  # it is in the weights, but the key must be there
        keys["logit_scale"] = ("float32", 1.0)
    if architecture.residual == "either":
        keys["use_parallel_residual"] = ("bool", spec.residual == "parallel")
    named = {f"{architecture.name}.{key}": value for key, value in keys.items()}
    if spec.activation == "xielu":
        for key, constant in _XIELU.items():
            named[key] = ("array[float32]", [constant] * len(spec.layers))
    return named


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
    if rope and architecture.takes_divisors(rope.scaling):
        made["rope_freqs.weight"] = rope.divisors(spec.context_tokens)
    if rope and isinstance(rope.scaling, LongRopeScaling):
        made["rope_factors_long.weight"] = rope.scaling.long_factors
        made["rope_factors_short.weight"] = rope.scaling.short_factors
    if architecture.has_sinks:
        for index in range(len(spec.layers)):
            made[sinks_name(index)] = [NO_SINK] * spec.attention.heads
    return made


NO_SINK = -1e30  # the exponential of a score this low is 0


def sinks_name(layer: int) -> str:
    """Return the name of the tensor with a layer's sinks."""
    return f"blk.{layer}.attn_sinks.weight"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a GGUF file says about its decoder, without the weights themselves."""

    metadata: Mapping[str, Any]
    tensors: Collection[str]
    vocab_size: int
    rope_factors: Mapping[str, Sequence[float]]  # the small tensors named by `made_tensors`

    @property
    def architecture(self) -> Architecture:
        """The graph it was written for."""
        return architectures.get(str(self.metadata.get("general.architecture")))

    def value(self, key: str, default: Any) -> Any:
        """Return a key of the architecture."""
        return self.metadata.get(f"{self.architecture.name}.{key}", default)

    def number(self, key: str, default: float | None = None) -> Any:
        """Return a number; a float32 as the shortest decimal that rounds to it.

        Raises:
            UsageError: If it is missing, or not one number.
        """
        value = self.value(key, default)
        if value is None:
            raise UsageError(f"the GGUF file lacks {self.architecture.name}.{key}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UsageError(
                f"{self.architecture.name}.{key} = {value!r} in the GGUF file, expected one number"
            )
        return shortest(value) if isinstance(value, float) else value

    def count(self, key: str, default: int | None = None, *, most: int = 2**31 - 1) -> int:
        """Return how many there are of something: at least one, in every layer alike.

        Raises:
            UsageError: If it is missing, not an integer, or not between 1 and ``most``.
        """
        each = self.value(key, default)
        is_alike = isinstance(each, list) and len(set(each)) == 1
        value = each[0] if is_alike else self.number(key, default)
        if not isinstance(value, int) or not 0 < value <= most:
            raise UsageError(
                f"{self.architecture.name}.{key} = {value!r} in the GGUF file, "
                f"expected a count up to {most}"
            )
        return value

    def each_layer(self, key: str) -> list[float]:
        """Return a number for each layer, of a key of no architecture; a file may give one for all.

        Raises:
            UsageError: If it is missing, or not as many numbers.
        """
        depth = self.count("block_count", most=len(self.tensors))
        value = self.metadata.get(key)
        values: list[Any] = value if isinstance(value, list) else [value] * depth
        if len(values) < depth or not all(isinstance(each, int | float) for each in values):
            raise UsageError(f"{key} = {value!r} in the GGUF file, expected {depth} numbers")
        return values[:depth]

    def has_tensor(self, part: str) -> bool:
        """Whether the first layer has such a tensor."""
        return f"blk.0.{part}" in self.tensors


def shortest(value: float) -> float:
    """Return the shortest decimal that rounds to the same float32: 9.99999975e-06 is 1e-05."""
    import numpy as np

    return float(str(np.float32(value)))


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
    return DecoderSpec(
        vocab_size=facts.vocab_size,
        hidden_size=hidden,
        intermediate_size=facts.count("feed_forward_length"),
        context_tokens=facts.count("context_length"),
        layers=_read_layers(facts, head_dim),
        attention=_read_attention(facts, head_dim=head_dim, epsilon=epsilon),
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
    depth = facts.count("block_count")
    has_norms = facts.has_tensor("attn_q_norm.weight") and architecture.has_head_norms_at(depth)
    cap = _read_cap(facts, "attn_logit_softcapping", 50.0) if architecture.caps_scores else None
    scale = architecture.score_scale(
        depth=depth,
        head_dim=head_dim,
        hidden_size=facts.count("embedding_length"),
        heads=heads,
    )
    return Attention(
        heads=heads,
        num_kv_heads=facts.count("attention.head_count_kv", heads),
        head_dim=head_dim,
        softmax_scale=scale,
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


def _read_layers(facts: Facts, head_dim: int) -> tuple[Layer, ...]:
    # Every layer has tensors of its own.
    architecture = facts.architecture
    depth = facts.count("block_count", most=len(facts.tensors))
    rope = Rope(
        width=facts.count("rope.dimension_count", head_dim),
        theta=float(facts.number("rope.freq_base", 10_000.0)),
        scaling=None,
    )
    rope = replace(rope, scaling=_read_scaling(facts, rope))
    rotates = _read_positions(facts, depth)
    local_rope = replace(
        rope,
        theta=_read_local_theta(facts, rope),
        scaling=rope.scaling if architecture.local_rope_scaling == "shared" else None,
    )

    def layer(index: int, window: int | None) -> Layer:
        has_window = window is not None
        has_positions = rotates[index] and architecture.has_positions(
            index, depth=depth, has_window=has_window
        )
        own = local_rope if has_window else rope
        return Layer(rope=own if has_positions else None, window_tokens=window)

    return tuple(layer(*each) for each in enumerate(_read_windows(facts, depth)))


def _read_positions(facts: Facts, depth: int) -> list[bool]:
    """Return where keys allow positions."""
    match facts.architecture.positions:
        case "everywhere or nowhere":
            return [facts.value("rope.scaling.finetuned", True) is not False] * depth
        case "by layer":
            pattern = facts.value(_ROPE_PATTERN, [True] * depth)
            if not isinstance(pattern, list) or len(pattern) < depth:
                raise UsageError(
                    f"the GGUF file's {_ROPE_PATTERN} = {pattern!r}, expected {depth} layers"
                )
            return [bool(rotates) for rotates in pattern]
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
        divisors = facts.rope_factors["rope_freqs.weight"]
        if kind == "none" and facts.value(_FAST, None) is not None:
            return _read_divided_yarn(facts, rope, divisors)
        return _read_llama3(rope, divisors)
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
