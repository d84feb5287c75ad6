"""Gemma 3 text: five windowed layers with a fast rope, then a whole one with a slow rope."""

from dataclasses import replace
from typing import Any

from edgekit.model.spec import DecoderSpec, Layer, Rope
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
    kinds: list[_common.LayerKind] = [
        "sliding_attention" if (index + 1) % pattern else "full_attention"
        for index in range(len(spec.layers))
    ]
    slow, fast = _read_ropes(config, spec.attention.head_dim)
    return tuple(
        replace(layer, rope=slow if layer.window_tokens is None else fast)
        for layer in gemma2.read_windows(config, spec, kinds)
    )


def _read_ropes(config: Config, head_dim: int) -> tuple[Rope, Rope]:
    """Return the rope of the layers without a window, and of those with one."""
    both = config.section("rope_parameters")
    slow, fast = both.section("full_attention"), both.section("sliding_attention")
    if config.get("rope_scaling", dict[str, Any]()):
        slow = config.section("rope_scaling")
    context = config.integer("max_position_embeddings")
    global_theta = config.number("rope_theta", GLOBAL_THETA)
    local_theta = config.number("rope_local_base_freq", LOCAL_THETA)
    ropes = (
        _rope.read_fields(slow, width=head_dim, theta=global_theta, context_tokens=context),
        _rope.read_fields(fast, width=head_dim, theta=local_theta, context_tokens=context),
    )
    for fields in (slow, fast, both):
        fields.refuse_unread()
    return ropes


def config(spec: DecoderSpec) -> dict[str, Any]:
    """Return the Gemma 3 text config of a decoder."""
    fields = gemma2.write(spec, model_type="gemma3_text", architecture="Gemma3ForCausalLM")
    ropes = {
        "sliding_attention" if layer.window_tokens else "full_attention": _rope.write_fields(rope)
        for layer in spec.layers
        if (rope := layer.rope)
    }
    return fields | {"rope_parameters": ropes, "final_logit_softcapping": spec.final_logit_softcap}
