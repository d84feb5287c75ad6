"""Seed-OSS: a Llama with biases on queries, keys and values."""

from dataclasses import replace
from typing import Any

from edgekit.model.spec import DecoderSpec
from edgekit.source.config import Config
from edgekit.source.families import _common, llama


DEFAULTS = _common.Defaults(num_kv_heads=8, head_dim=128)
SIZES = _common.sizes(
    vocab_size=155_136, hidden_size=4096, intermediate_size=27_648, layers=64, heads=80,
    context_tokens=524_288,
)  # fmt: skip

source = llama.source


def describe(config: Config) -> DecoderSpec:
    """Read a Seed-OSS config."""
    config.ignore("residual_dropout")
    spec = llama.read(config, DEFAULTS)
    attention = replace(
        spec.attention,
        has_qkv_bias=config.get("attention_bias", default=True),
        has_output_bias=config.get("attention_out_bias", default=False),
    )
    return replace(spec, attention=attention, has_mlp_bias=config.get("mlp_bias", default=False))


def config(spec: DecoderSpec) -> dict[str, Any]:
    """Return the Seed-OSS config of a decoder."""
    fields = llama.write(spec, model_type="seed_oss", architecture="SeedOssForCausalLM")
    return fields | {
        "attention_bias": spec.attention.has_qkv_bias,
        "attention_out_bias": spec.attention.has_output_bias,
        "mlp_bias": spec.has_mlp_bias,
    }
