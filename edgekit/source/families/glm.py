"""GLM-4 9B and GLM-Edge: neighbouring channels rotate in half of each head; gate and up are one."""

from dataclasses import replace
from typing import Any

from edgekit.model.spec import DecoderSpec, Source
from edgekit.source.config import Config
from edgekit.source.families import _common, _rope, llama


DEFAULTS = _common.Defaults(num_kv_heads=2, head_dim=128, norm_epsilon=1.5625e-7)
SIZES = _common.sizes(
    vocab_size=151_552, hidden_size=4096, intermediate_size=13_696, layers=40, heads=32,
    context_tokens=131_072,
)  # fmt: skip


def describe(config: Config) -> DecoderSpec:
    """Read a GLM config."""
    config.expect(hidden_act="silu", mlp_bias=False)
    has_bias = config.get("attention_bias", default=True)
    rope = _rope.read_rope(config, _common.read_head_width(config, DEFAULTS), rotated=0.5)
    spec = _common.read_decoder(config, DEFAULTS, rope=rope)
    return replace(spec, attention=replace(spec.attention, has_qkv_bias=has_bias))


def config(spec: DecoderSpec) -> dict[str, Any]:
    """Return the GLM config of a decoder."""
    fields = _common.write_decoder(spec, model_type="glm", architecture="GlmForCausalLM")
    fields |= {"hidden_act": "silu", "attention_bias": spec.attention.has_qkv_bias}
    return fields | _rope.write_rope(spec, rotated=True)


def source(role: str, spec: DecoderSpec) -> Source:
    """Return where a weight lives."""
    return locate(role, spec, llama.TENSORS)


def locate(role: str, spec: DecoderSpec, tensors: dict[str, str]) -> Source:
    """Return where a weight lives, by the names that ``tensors`` gives a layer's parts."""
    fused = _common.fused_mlp(role, spec, tensor="mlp.gate_up_proj")
    return fused or _common.side_by_side(llama.locate(role, tensors), role, spec)
