"""Llama: Llama 2 and 3.x, TinyLlama, SmolLM and SmolLM2."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgekit.model.spec import DecoderSpec, Source
from edgekit.source.config import Config
from edgekit.source.families import _common, _rope


DEFAULTS = _common.Defaults()
SIZES = _common.sizes(
    vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, layers=32, heads=32,
    context_tokens=2048,
)  # fmt: skip


def describe(config: Config) -> DecoderSpec:
    """Read a Llama config."""
    return read_biased(config, DEFAULTS)


def read_biased(
    config: Config, defaults: _common.Defaults, *, rope_theta: float = 10_000.0
) -> DecoderSpec:
    """Read a Llama with biases where the config says so."""
    has_bias = config.get("attention_bias", default=False)
    spec = read(config, defaults, rope_theta=rope_theta)
    return replace(
        spec,
        attention=replace(spec.attention, has_qkv_bias=has_bias, has_output_bias=has_bias),
        has_mlp_bias=config.get("mlp_bias", default=False),
    )


def read(
    config: Config, defaults: _common.Defaults, *, rope_theta: float = 10_000.0
) -> DecoderSpec:
    """Read a Llama without biases, which is what its descendants start from."""
    config.expect(hidden_act="silu")
    head_dim = _common.read_head_width(config, defaults)
    rope = _rope.read_rope(config, head_dim, theta=rope_theta)
    return _common.read_decoder(config, defaults, rope=rope)


def config(spec: DecoderSpec) -> dict[str, Any]:
    """Return the Llama config of a decoder."""
    return write(spec, model_type="llama", architecture="LlamaForCausalLM") | {
        "attention_bias": spec.attention.has_output_bias,
        "mlp_bias": spec.has_mlp_bias,
    }


def write(spec: DecoderSpec, *, model_type: str, architecture: str) -> dict[str, Any]:
    """Return the fields that `read` reads."""
    fields = _common.write_decoder(spec, model_type=model_type, architecture=architecture)
    return fields | {"hidden_act": "silu"} | _rope.write_rope(spec)


TENSORS = {
    "attention_norm": "input_layernorm.weight",
    "query": "self_attn.q_proj.weight",
    "key": "self_attn.k_proj.weight",
    "value": "self_attn.v_proj.weight",
    "attention_output": "self_attn.o_proj.weight",
    "query_bias": "self_attn.q_proj.bias",
    "key_bias": "self_attn.k_proj.bias",
    "value_bias": "self_attn.v_proj.bias",
    "attention_output_bias": "self_attn.o_proj.bias",
    "query_norm": "self_attn.q_norm.weight",
    "key_norm": "self_attn.k_norm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "gate_bias": "mlp.gate_proj.bias",
    "up_bias": "mlp.up_proj.bias",
    "down_bias": "mlp.down_proj.bias",
}
OUTER_TENSORS = {
    "token_embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "final_norm_bias": "model.norm.bias",
    "output_head": "lm_head.weight",
    "output_head_bias": "lm_head.bias",
}


def source(role: str, spec: DecoderSpec) -> Source:
    """Return where a weight lives."""
    del spec  # nothing is fused
    return locate(role, TENSORS)


def locate(
    role: str,
    tensors: Mapping[str, str],
    *,
    outer: Mapping[str, str] = OUTER_TENSORS,
    layers: str = "model.layers",
) -> Source:
    """Return the whole tensor of a role.

    Args:
        role: Of `DecoderSpec.weights`.
        tensors: The names of a layer's parts.
        outer: Those of what no layer has.
        layers: What holds the layers.
    """
    if role in outer:
        return Source(outer[role])
    _, layer, part = role.split(".")
    return Source(f"{layers}.{layer}.{tensors[part]}")
