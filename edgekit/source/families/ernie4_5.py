"""ERNIE 4.5: a Llama that rotates neighbouring channels together."""

from dataclasses import replace
from typing import Any

from edgekit.model.spec import DecoderSpec, Source
from edgekit.source.config import Config
from edgekit.source.families import _common, llama


DEFAULTS = _common.Defaults(num_kv_heads=2, head_dim=128, is_tied=True, norm_epsilon=1e-5)
SIZES = _common.sizes(
    vocab_size=103_424, hidden_size=1024, intermediate_size=3072, layers=18, heads=16,
    context_tokens=131_072,
)  # fmt: skip
THETA = 500_000.0  # Ernie4_5Config.default_theta, transformers 5


def describe(config: Config) -> DecoderSpec:
    """Read an ERNIE 4.5 config."""
    config.expect(compression_ratio=1.0)
    has_bias = config.get("use_bias", default=False)
    spec = llama.read(config, DEFAULTS, rope_theta=THETA)
    return replace(
        spec,
        attention=replace(spec.attention, has_qkv_bias=has_bias, has_output_bias=has_bias),
        has_mlp_bias=has_bias,
    )


def config(spec: DecoderSpec) -> dict[str, Any]:
    """Return the ERNIE 4.5 config of a decoder."""
    fields = llama.write(spec, model_type="ernie4_5", architecture="Ernie4_5ForCausalLM")
    return fields | {"use_bias": spec.has_mlp_bias}


def source(role: str, spec: DecoderSpec) -> Source:
    """Return where a weight lives."""
    return _common.side_by_side(llama.source(role, spec), role, spec)
