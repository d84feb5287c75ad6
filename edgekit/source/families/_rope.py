"""Rotary positions as configs say them, in both directions.

transformers 5 has one object, ``rope_parameters``; version 4 had ``rope_scaling``, which was null
without scaling, and ``rope_theta`` and ``partial_rotary_factor`` next to it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from edgekit.errors import UsageError
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
from edgekit.model.spec import DecoderSpec
from edgekit.source.config import Config


def read_rope(  # noqa: PLR0913 - what families differ in
    config: Config,
    head_dim: int,
    *,
    theta: float = 10_000.0,
    rotated: float | None = None,
    original_context_tokens: int | None = None,
    absent: Mapping[str, Any] | None = None,
    ignored: Sequence[str] = (),
) -> Rope:
    """Read the rope that all layers share.

    Args:
        config: The whole config.
        head_dim: Channels of a head.
        theta: What transformers takes where the config is silent.
        rotated: The fraction of a head that rotates where the config is silent; None where the
            family always rotates whole heads.
        original_context_tokens: What transformers takes where the config is silent.
        absent: The object that transformers takes where the config has none.
        ignored: Fields of the object that another part of the decoder reads, or none.
    """
    fields = section(config, absent=absent)
    fields.ignore(*ignored)
    fraction = 1.0
    if rotated is None:
        config.expect(partial_rotary_factor=1.0)
        fields.expect(partial_rotary_factor=1.0)
    else:
        outer = config.number("partial_rotary_factor", rotated)
        fraction = fields.number("partial_rotary_factor", outer, most=1.0)
    # The one next to the object wins, as in standardize_rope_params of transformers 5.
    original = config.optional_integer("original_max_position_embeddings")
    rope = read_fields(
        fields,
        width=int(head_dim * fraction),
        theta=config.number("rope_theta", theta),
        context_tokens=config.integer("max_position_embeddings"),
        original_context_tokens=original or original_context_tokens,
    )
    fields.refuse_unread()
    return rope


def section(config: Config, *, absent: Mapping[str, Any] | None = None) -> Config:
    """Return the rope's object; an older one counts where both are there, as in transformers 5."""
    newer = config.section("rope_parameters")
    if config.get("rope_scaling", dict[str, Any]()):
        return config.section("rope_scaling")
    if absent and not config.get("rope_parameters", dict[str, Any]()):
        config.expect(rope_theta=absent["rope_theta"])  # transformers 5 overlooks another
        return Config(dict(absent), origin=f"{config.origin}: rope_parameters")
    return newer


def read_ropes_of_kinds(  # noqa: PLR0913 - what families differ in
    config: Config,
    head_dim: int,
    *,
    full_theta: float,
    sliding_theta: float,
    full_head_dim: int | None = None,
    absent: Mapping[str, Any] | None = None,
) -> tuple[Rope, Rope]:
    """Read the rope of the layers that see everything, and of those with a window.

    The older layout has a scaling for the first alone.

    Args:
        config: The whole config.
        head_dim: Channels of a head, all of which rotate.
        full_theta: Of the first, where their object does not say.
        sliding_theta: Of the others.
        full_head_dim: Channels of a head of the first; None: as many as of the others.
        absent: The object that transformers takes where the config has none.
    """
    both = config.section("rope_parameters")
    if absent and not config.get("rope_parameters", dict[str, Any]()):
        both = Config(dict(absent), origin=both.origin)
    full, sliding = both.section("full_attention"), both.section("sliding_attention")
    if config.get("rope_scaling", dict[str, Any]()):
        full = config.section("rope_scaling")
    context = config.integer("max_position_embeddings")
    ropes = []
    kinds = (full, full_head_dim or head_dim, full_theta), (sliding, head_dim, sliding_theta)
    for fields, width, theta in kinds:
        # transformers 5 looks for it next to the kinds, where it is refused.
        fields.expect(truncate=True)
        ropes.append(read_fields(fields, width=width, theta=theta, context_tokens=context))
        fields.refuse_unread()
    both.refuse_unread()
    return ropes[0], ropes[1]


def write_ropes_of_kinds(spec: DecoderSpec) -> dict[str, Any]:
    """Return the fields that `read_ropes_of_kinds` reads."""
    kinds = {
        "sliding_attention" if layer.window_tokens else "full_attention": write_fields(rope)
        for layer in spec.layers
        if (rope := layer.rope)
    }
    for fields in kinds.values():
        fields.pop("truncate", None)
    return {"rope_parameters": kinds}


def read_fields(
    fields: Config,
    *,
    width: int,
    theta: float,
    context_tokens: int,
    original_context_tokens: int | None = None,
) -> Rope:
    """Read one rope object; ``theta`` where it does not say.

    Raises:
        UsageError: If it has a kind or a field that is not known, or rotates an odd width.
    """
    if width < 2 or width % 2:
        raise UsageError(
            f"{fields.origin} rotates {width} channels of a head, expected an even count"
        )
    rope = Rope(width=width, theta=fields.number("rope_theta", theta))
    inner = fields.optional_integer("original_max_position_embeddings") or context_tokens
    original = original_context_tokens or inner
    return replace(rope, scaling=_read_scaling(fields, rope, original, context_tokens))


def _read_scaling(  # noqa: PLR0911 - one for each type
    fields: Config, rope: Rope, original_context_tokens: int, context_tokens: int
) -> RopeScaling | None:
    original = original_context_tokens
    match kind(fields):
        case "default":
            return None
        case "dynamic":  # other angles begin where the context ends
            fields.number("factor")
            return None
        case "linear":
            return LinearScaling(factor=fields.number("factor"))
        case "llama3":
            return _read_llama3(fields, original)
        case "proportional":
            return _read_proportional(fields, rope.width)
        # "su" and "yarn" are what the first Phi-3 called longrope; others have no such factors.
        case "longrope" | "su" | "yarn" if "long_factor" in fields:
            return _read_longrope(fields, original, context_tokens, rope.width)
        case "yarn":
            return _read_yarn(fields, original, context_tokens, rope.theta)
        case unknown:
            raise UsageError(
                f"{fields.origin}: rope of type {unknown!r} is not supported",
                hint="default, linear, dynamic, llama3, yarn, longrope, proportional",
            )


def kind(fields: Config) -> str:
    """Return the type of a rope object, under its newer or its older name."""
    older = fields.get("type", "default")
    return fields.get("rope_type", older)


def _read_llama3(fields: Config, original_context_tokens: int) -> Llama3Scaling:
    low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
    if high <= low:
        raise UsageError(f"{fields.origin}: high_freq_factor = {high} is not above {low}")
    return Llama3Scaling(
        factor=fields.number("factor"),
        low_frequency_factor=low,
        high_frequency_factor=high,
        original_context_tokens=original_context_tokens,
    )


def _read_longrope(
    fields: Config, original_context_tokens: int, context_tokens: int, width: int
) -> LongRopeScaling:
    if original_context_tokens < 2:
        raise UsageError(f"{fields.origin}: an original context of 1 token cannot be stretched")
    factor = fields.number("factor", context_tokens / original_context_tokens)
    stretch = max(factor, 1.0)
    # Both contexts logarithmic, as _compute_longrope_parameters of transformers 5 has it
    usual = math.sqrt(1 + math.log(stretch) / math.log(original_context_tokens))
    return LongRopeScaling(
        short_factors=_read_factors(fields, "short_factor", width),
        long_factors=_read_factors(fields, "long_factor", width),
        original_context_tokens=original_context_tokens,
        attention_factor=fields.number("attention_factor", usual),
    )


def _read_yarn(
    fields: Config, original_context_tokens: int, context_tokens: int, theta: float
) -> YarnScaling:
    if theta <= 1:
        raise UsageError(f"{fields.origin}: a theta of {theta:g} leaves YaRN no frequencies")
    factor = fields.number("factor", context_tokens / original_context_tokens, most=1e6)
    fast, slow = fields.number("beta_fast", 32.0), fields.number("beta_slow", 1.0)
    fields.get("finetuned", False)  # of the first YaRN models; it says how they were made
    over, under = fields.optional_number("mscale"), fields.optional_number("mscale_all_dim")
    if over is None or under is None:  # both count, or neither
        over, under = 1.0, 0.0
    usual = yarn_attention_factor(factor, over) / yarn_attention_factor(factor, under)
    return YarnScaling(
        factor=factor,
        fast_turns=fast,
        slow_turns=slow,
        original_context_tokens=original_context_tokens,
        attention_factor=fields.number("attention_factor", usual),
        is_truncated=fields.get("truncate", True),
    )


def _read_proportional(fields: Config, width: int) -> ProportionalScaling:
    share = fields.number("partial_rotary_factor", 1.0, most=1.0)
    return ProportionalScaling(
        factor=fields.number("factor", 1.0), rotated_pairs=int(share * width // 2)
    )


def _read_factors(fields: Config, name: str, width: int) -> tuple[float, ...]:
    values = fields.get(name, list[Any]())
    if len(values) != width // 2:
        raise UsageError(
            f"{fields.origin}: {name} has {len(values)} numbers, expected {width // 2}"
        )
    for value in values:
        if not isinstance(value, int | float) or not 0 < value < 1e9:
            raise UsageError(f"{fields.origin}: {name} holds {value!r}, expected positive numbers")
    return tuple(float(value) for value in values)


def write_rope(spec: DecoderSpec, *, rotated: bool = False) -> dict[str, Any]:
    """Return the fields that `read_rope` reads, as transformers 5 writes them.

    Args:
        spec: The first of its layers that has a rope speaks for all.
        rotated: Whether the family may rotate a part of each head.
    """
    rope = next((layer.rope for layer in spec.layers if layer.rope), None)
    if rope is None:
        return {}
    fields = write_fields(rope)
    if rotated:
        fields["partial_rotary_factor"] = rope.width / spec.attention.head_dim
    return {"rope_parameters": fields}


def write_fields(rope: Rope) -> dict[str, Any]:
    """Return what `read_fields` reads."""
    fields: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.theta}
    match rope.scaling:
        case None:
            return fields
        case LinearScaling(factor=factor):
            return fields | {"rope_type": "linear", "factor": factor}
        case Llama3Scaling() as scaling:
            return fields | {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_frequency_factor,
                "high_freq_factor": scaling.high_frequency_factor,
                "original_max_position_embeddings": scaling.original_context_tokens,
            }
        case ProportionalScaling() as scaling:
            return fields | {
                "rope_type": "proportional",
                "factor": scaling.factor,
                "partial_rotary_factor": 2 * scaling.rotated_pairs / rope.width,
            }
        case YarnScaling() as scaling:
            return fields | {
                "rope_type": "yarn",
                "factor": scaling.factor,
                "beta_fast": scaling.fast_turns,
                "beta_slow": scaling.slow_turns,
                "attention_factor": scaling.attention_factor,
                "truncate": scaling.is_truncated,
                "original_max_position_embeddings": scaling.original_context_tokens,
            }
        case LongRopeScaling() as scaling:
            return fields | {
                "rope_type": "longrope",
                "short_factor": list(scaling.short_factors),
                "long_factor": list(scaling.long_factors),
                "attention_factor": scaling.attention_factor,
                "original_max_position_embeddings": scaling.original_context_tokens,
            }
