"""Gemma 1 and CodeGemma: a Llama with GELU, wide heads, and norms that add one."""

from dataclasses import replace
from typing import Any

from edgekit.model.norm import Norm
from edgekit.model.spec import DecoderSpec
from edgekit.source.config import Config
from edgekit.source.families import _common, _rope, llama


DEFAULTS = _common.Defaults(num_kv_heads=16, head_dim=256, is_tied=True)
SIZES = _common.sizes(
    vocab_size=256_000, hidden_size=3072, intermediate_size=24_576, layers=28, heads=16,
    context_tokens=8192,
)  # fmt: skip

source = llama.source


def describe(config: Config) -> DecoderSpec:
    """Read a Gemma 1 config."""
    # The first files say "gelu" and mean its approximation, as GemmaConfig of transformers does.
    if config.get("hidden_act", "gelu") != "gelu":
        config.expect(hidden_act="gelu_pytorch_tanh")
    config.expect(hidden_activation="gelu_pytorch_tanh", use_bidirectional_attention=False)
    rope = _rope.read_rope(config, _common.read_head_width(config, DEFAULTS))
    spec = _common.read_decoder(config, DEFAULTS, rope=rope)
    has_bias = config.get("attention_bias", default=False)
    return replace(
        spec,
        attention=replace(spec.attention, has_qkv_bias=has_bias, has_output_bias=has_bias),
        norm=Norm(kind="rms", epsilon=spec.norm.epsilon, unit_offset=True),
        activation="gelu_tanh",
        embedding_scale=spec.hidden_size**0.5,
    )


def config(spec: DecoderSpec) -> dict[str, Any]:
    """Return the Gemma 1 config of a decoder."""
    fields = _common.write_decoder(spec, model_type="gemma", architecture="GemmaForCausalLM")
    fields |= {"hidden_act": "gelu_pytorch_tanh", "attention_bias": spec.attention.has_output_bias}
    return fields | _rope.write_rope(spec)
