"""Phi-3, Phi-3.5 and Phi-4-mini: fused projections, longrope, and heads that may rotate in part."""

from dataclasses import replace
from typing import Any

from edgekit.errors import UsageError
from edgekit.model.rope import YarnScaling
from edgekit.model.spec import DecoderSpec, Source
from edgekit.source.config import Config
from edgekit.source.families import _common, _rope, llama


DEFAULTS = _common.Defaults(norm_epsilon=1e-5)
SIZES = _common.sizes(
    vocab_size=32_064, hidden_size=3072, intermediate_size=8192, layers=32, heads=32,
    context_tokens=4096,
)  # fmt: skip


def describe(config: Config) -> DecoderSpec:
    """Read a Phi-3 config.

    Raises:
        UsageError: If its rope is a YaRN.
    """
    config.expect(hidden_act="silu", attention_bias=False, mlp_bias=False, lm_head_bias=False)
    config.expect(full_attn_mod=1, interpolate_factor=1)
    head_dim = _common.read_head_width(config, DEFAULTS)
    rope = _rope.read_rope(config, head_dim, rotated=1.0, original_context_tokens=4096)
    if isinstance(rope.scaling, YarnScaling):
        raise UsageError(
            f"{config.origin}: rope of type 'yarn' without long_factor; of a Phi-3, transformers "
            "takes it for longrope"
        )
    spec = _common.read_decoder(config, DEFAULTS, rope=rope)
    window = config.optional_integer("sliding_window")
    layers = tuple(replace(layer, window_tokens=window) for layer in spec.layers)
    return replace(spec, layers=layers)


def config(spec: DecoderSpec) -> dict[str, Any]:
    """Return the Phi-3 config of a decoder."""
    fields = _common.write_decoder(spec, model_type="phi3", architecture="Phi3ForCausalLM")
    fields |= _rope.write_rope(spec, rotated=True)
    fields |= {"hidden_act": "silu", "sliding_window": spec.layers[0].window_tokens}
    original = fields["rope_parameters"].get("original_max_position_embeddings")
    return fields if original is None else fields | {"original_max_position_embeddings": original}


def source(role: str, spec: DecoderSpec) -> Source:
    """Return where a weight lives: queries, keys and values share a tensor, gate and up another."""
    layer, _, part = role.rpartition(".")
    attention = f"model.{layer}.self_attn.qkv_proj.weight"
    wide, narrow = spec.attention.query_width, spec.attention.key_value_width
    match part:
        case "query":
            return Source(attention, 0, wide)
        case "key":
            return Source(attention, wide, narrow)
        case "value":
            return Source(attention, wide + narrow, narrow)
        case _:
            fused = _common.fused_mlp(role, spec, tensor="mlp.gate_up_proj")
            return fused or llama.source(role, spec)
