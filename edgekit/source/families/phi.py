"""Phi 1, 1.5 and 2: parallel residual after one LayerNorm, no gate, and biases everywhere."""

from dataclasses import replace
from typing import Any

from edgekit.model.norm import Norm
from edgekit.model.spec import DecoderSpec, Source
from edgekit.source.config import Config
from edgekit.source.families import _common, _rope, llama


DEFAULTS = _common.Defaults()
SIZES = _common.sizes(
    vocab_size=51_200, hidden_size=2048, intermediate_size=8192, layers=24, heads=32,
    context_tokens=2048,
)  # fmt: skip
TENSORS = llama.TENSORS | {
    "attention_norm_bias": "input_layernorm.bias",
    "attention_output": "self_attn.dense.weight",
    "attention_output_bias": "self_attn.dense.bias",
    "up": "mlp.fc1.weight",
    "up_bias": "mlp.fc1.bias",
    "down": "mlp.fc2.weight",
    "down_bias": "mlp.fc2.bias",
}
OUTER_TENSORS = llama.OUTER_TENSORS | {
    "final_norm": "model.final_layernorm.weight",
    "final_norm_bias": "model.final_layernorm.bias",
}


def describe(config: Config) -> DecoderSpec:
    """Read a Phi config."""
    config.expect(hidden_act="gelu_new", qk_layernorm=False)
    rope = _rope.read_rope(config, _common.read_head_width(config, DEFAULTS), rotated=0.5)
    spec = _common.read_decoder(config, DEFAULTS, rope=rope)
    return replace(
        spec,
        attention=replace(spec.attention, has_qkv_bias=True, has_output_bias=True),
        norm=Norm(kind="layer", epsilon=config.number("layer_norm_eps", 1e-5), has_bias=True),
        activation="gelu_tanh",
        residual="parallel",
        is_gated=False,
        has_mlp_bias=True,
        has_head_bias=True,
    )


def config(spec: DecoderSpec) -> dict[str, Any]:
    """Return the Phi config of a decoder."""
    fields = _common.write_decoder(
        spec, model_type="phi", architecture="PhiForCausalLM", epsilon="layer_norm_eps"
    )
    return fields | _rope.write_rope(spec, rotated=True) | {"hidden_act": "gelu_new"}


def source(role: str, spec: DecoderSpec) -> Source:
    """Return where a weight lives."""
    del spec  # nothing is fused
    return llama.locate(role, TENSORS, outer=OUTER_TENSORS)
