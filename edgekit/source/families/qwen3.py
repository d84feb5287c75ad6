"""Qwen 3: a Qwen 2 with norms on queries and keys, and biases only where the config says so."""

from dataclasses import replace
from typing import Any

from edgekit.model.spec import DecoderSpec
from edgekit.source.config import Config
from edgekit.source.families import _common, llama, qwen2


DEFAULTS = _common.Defaults(num_kv_heads=32, head_dim=128)
SIZES = _common.sizes(
    vocab_size=151_936, hidden_size=4096, intermediate_size=22_016, layers=32, heads=32,
    context_tokens=32_768,
)  # fmt: skip

source = llama.source


def describe(config: Config) -> DecoderSpec:
    """Read a Qwen 3 config."""
    config.expect(mlp_bias=False)
    has_bias = config.get("attention_bias", default=False)
    spec = llama.read(config, DEFAULTS)
    attention = replace(
        spec.attention,
        query_key_norm=spec.norm,
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
    )
    layers = qwen2.read_windows(config, spec.layers)
    return replace(spec, attention=attention, layers=layers)


def config(spec: DecoderSpec) -> dict[str, Any]:
    """Return the Qwen 3 config of a decoder."""
    fields = llama.write(spec, model_type="qwen3", architecture="Qwen3ForCausalLM")
    has_bias = {"attention_bias": spec.attention.has_output_bias}
    return fields | has_bias | qwen2.write_windows(spec)
