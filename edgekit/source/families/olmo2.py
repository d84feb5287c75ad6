"""OLMo 2: norms after attention and MLP and none before, and one norm over all heads."""

from dataclasses import replace
from typing import Any

from edgekit.model.rope import Rope
from edgekit.model.spec import DecoderSpec
from edgekit.source.config import Config
from edgekit.source.families import _common, _rope, gemma2


DEFAULTS = _common.Defaults(norm_epsilon=1e-5)
SIZES = _common.sizes(
    vocab_size=50_304, hidden_size=4096, intermediate_size=11_008, layers=32, heads=32,
    context_tokens=2048,
)  # fmt: skip

source = gemma2.source  # calls the norms after attention and MLP the same


def describe(config: Config) -> DecoderSpec:
    """Read an OLMo 2 config."""
    return read(config, _rope.read_rope(config, _common.read_head_width(config, DEFAULTS)))


def read(config: Config, rope: Rope | None) -> DecoderSpec:
    """Read what OLMo 2 and 3 share."""
    config.expect(hidden_act="silu", clip_qkv=None)
    has_bias = config.get("attention_bias", default=False)
    spec = _common.read_decoder(config, DEFAULTS, rope=rope)
    attention = replace(
        spec.attention,
        query_key_norm=spec.norm,
        head_norms="together",
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
    )
    return replace(spec, attention=attention, has_pre_norms=False, has_post_norms=True)


def config(spec: DecoderSpec) -> dict[str, Any]:
    """Return the OLMo 2 config of a decoder."""
    return write(spec, model_type="olmo2", architecture="Olmo2ForCausalLM") | _rope.write_rope(spec)


def write(spec: DecoderSpec, *, model_type: str, architecture: str) -> dict[str, Any]:
    """Return the fields that `read` reads."""
    fields = _common.write_decoder(spec, model_type=model_type, architecture=architecture)
    return fields | {"hidden_act": "silu", "attention_bias": spec.attention.has_output_bias}
