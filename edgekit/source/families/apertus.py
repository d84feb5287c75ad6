"""Apertus: a Llama with norms on queries and keys, and xIELU without a gate."""

from dataclasses import replace
from typing import Any

from edgekit.model.spec import XIELU_BETA, XIELU_EPSILON, DecoderSpec, Source
from edgekit.source.config import Config
from edgekit.source.families import _common, _rope, llama


DEFAULTS = _common.Defaults(norm_epsilon=1e-5)
SIZES = _common.sizes(
    vocab_size=131_072, hidden_size=4096, intermediate_size=14_336, layers=32, heads=32,
    context_tokens=65_536,
)  # fmt: skip
TENSORS = llama.TENSORS | {
    "attention_norm": "attention_layernorm.weight",
    "mlp_norm": "feedforward_layernorm.weight",
    "xielu_positive": "mlp.act_fn.alpha_p",
    "xielu_negative": "mlp.act_fn.alpha_n",
}
THETA = 12_000_000.0
# What ApertusConfig of transformers 5 takes where the config has no rope.
_ROPE = {
    "rope_type": "llama3", "rope_theta": THETA, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip


def describe(config: Config) -> DecoderSpec:
    """Read an Apertus config."""
    config.expect(hidden_act="xielu", mlp_bias=False, qk_norm=True, post_norm=False)
    has_bias = config.get("attention_bias", default=False)
    head_dim = _common.read_head_width(config, DEFAULTS)
    rope = _rope.read_rope(config, head_dim, theta=THETA, absent=_ROPE)
    spec = _common.read_decoder(config, DEFAULTS, rope=rope)
    attention = replace(
        spec.attention,
        query_key_norm=spec.norm,
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
    )
    return replace(spec, attention=attention, activation="xielu", is_gated=False)


def config(spec: DecoderSpec) -> dict[str, Any]:
    """Return the Apertus config of a decoder."""
    fields = _common.write_decoder(spec, model_type="apertus", architecture="ApertusForCausalLM")
    fields |= {"hidden_act": "xielu", "attention_bias": spec.attention.has_output_bias}
    return fields | _rope.write_rope(spec)


def source(role: str, spec: DecoderSpec) -> Source:
    """Return where a weight lives."""
    del spec  # nothing is fused
    return llama.locate(role, TENSORS)


def constants(spec: DecoderSpec) -> dict[str, float]:
    """Return the tensors of one number that are the same in every layer."""
    numbers = {"beta": XIELU_BETA, "eps": XIELU_EPSILON}
    return {
        f"model.layers.{layer}.mlp.act_fn.{name}": value
        for layer in range(len(spec.layers))
        for name, value in numbers.items()
    }
