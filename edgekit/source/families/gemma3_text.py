"""Gemma 3 text: five windowed layers with a fast rope, then a whole one with a slow rope."""

from dataclasses import replace
from typing import Any

from edgekit.model.spec import DecoderSpec, Layer
from edgekit.source.config import Config
from edgekit.source.families import _common, _rope, gemma2


GLOBAL_THETA, LOCAL_THETA = 1_000_000.0, 10_000.0  # Gemma3TextConfig.default_theta, transformers 5
SIZES = _common.sizes(
    vocab_size=262_208, hidden_size=2304, intermediate_size=9216, layers=26, heads=8,
    context_tokens=131_072,
)  # fmt: skip

source = gemma2.source


def describe(config: Config) -> DecoderSpec:
    """Read a Gemma 3 text config."""
    # transformers 5 stores this cap and never applies it; no model sets it.
    config.expect(attn_logit_softcapping=None)
    spec = gemma2.read(config, None)
    return replace(
        spec,
        attention=replace(spec.attention, query_key_norm=spec.norm),
        final_logit_softcap=config.optional_number("final_logit_softcapping"),
        layers=_read_layers(config, spec),
    )


def _read_layers(config: Config, spec: DecoderSpec) -> tuple[Layer, ...]:
    private = config.optional_integer("_sliding_window_pattern")
    pattern = config.optional_integer("sliding_window_pattern") or private or 6
    kinds = _common.every_nth_full(config, pattern)
    slow, fast = _rope.read_ropes_of_kinds(
        config,
        spec.attention.head_dim,
        full_theta=config.number("rope_theta", GLOBAL_THETA),
        sliding_theta=config.number("rope_local_base_freq", LOCAL_THETA),
    )
    return tuple(
        replace(layer, rope=slow if layer.window_tokens is None else fast)
        for layer in gemma2.read_windows(config, spec, kinds)
    )


def config(spec: DecoderSpec) -> dict[str, Any]:
    """Return the Gemma 3 text config of a decoder."""
    fields = gemma2.write(spec, model_type="gemma3_text", architecture="Gemma3ForCausalLM")
    cap = {"final_logit_softcapping": spec.final_logit_softcap}
    return fields | _rope.write_ropes_of_kinds(spec) | cap
