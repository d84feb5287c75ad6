"""Ministral 3: a Mistral with a YaRN, and queries that grow with their position."""

from dataclasses import replace
from typing import Any

from edgekit.model.mixers import QueryGrowth
from edgekit.model.spec import DecoderSpec
from edgekit.source.config import Config
from edgekit.source.families import _common, _rope, llama


DEFAULTS = _common.Defaults(num_kv_heads=8, head_dim=128, norm_epsilon=1e-5)
SIZES = _common.sizes(
    vocab_size=131_072, hidden_size=4096, intermediate_size=14_336, layers=34, heads=32,
    context_tokens=262_144,
)  # fmt: skip
# What Ministral3Config of transformers 5 takes where the config has no rope.
_ROPE = {
    "rope_type": "yarn", "rope_theta": 1_000_000.0, "factor": 16.0,
    "original_max_position_embeddings": 16_384, "beta_fast": 32.0, "beta_slow": 1.0,
    "mscale_all_dim": 1.0, "mscale": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
_RATE = "llama_4_scaling_beta"

source = llama.source


def describe(config: Config) -> DecoderSpec:
    """Read a Ministral 3 config."""
    config.expect(hidden_act="silu", attention_bias=False, mlp_bias=False)
    head_dim = _common.read_head_width(config, DEFAULTS)
    rope = _rope.read_rope(
        config, head_dim, absent=_ROPE, ignored=(_RATE, "max_position_embeddings")
    )
    spec = _common.read_decoder(config, DEFAULTS, rope=rope)
    window = config.optional_integer("sliding_window")
    return replace(
        spec,
        attention=replace(spec.attention, query_growth=_read_growth(config)),
        layers=tuple(replace(layer, window_tokens=window) for layer in spec.layers),
    )


def _read_growth(config: Config) -> QueryGrowth | None:
    fields = _rope.section(config, absent=_ROPE)
    rate = fields.optional_number(_RATE)
    if rate is None:
        return None
    steps = fields.integer("original_max_position_embeddings")
    return QueryGrowth(rate=rate, step_tokens=steps)


def config(spec: DecoderSpec) -> dict[str, Any]:
    """Return the Ministral 3 config of a decoder."""
    fields = llama.write(spec, model_type="ministral3", architecture="Ministral3ForCausalLM")
    fields["sliding_window"] = spec.layers[0].window_tokens
    if growth := spec.attention.query_growth:
        fields["rope_parameters"] |= {
            _RATE: growth.rate,
            "original_max_position_embeddings": growth.step_tokens,
        }
    return fields
