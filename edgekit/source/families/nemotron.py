"""Nemotron 4 and Minitron: LayerNorms that add one, squared ReLUs, heads that rotate in part."""

from dataclasses import replace
from typing import Any

from edgekit.model.norm import Norm
from edgekit.model.rope import Rope
from edgekit.model.spec import DecoderSpec, Source
from edgekit.source.config import Config
from edgekit.source.families import _common, _rope, llama, stablelm


DEFAULTS = _common.Defaults()
SIZES = _common.sizes(
    vocab_size=256_000, hidden_size=6144, intermediate_size=24_576, layers=32, heads=48,
    context_tokens=4096,
)  # fmt: skip


def describe(config: Config) -> DecoderSpec:
    """Read a Nemotron config."""
    rope = _rope.read_rope(config, _common.read_head_width(config, DEFAULTS), rotated=0.5)
    spec = read(config, rope=rope, has_bias=False)
    norm = Norm(
        kind="layer", epsilon=config.number("norm_eps", 1e-5), has_bias=True, unit_offset=True
    )
    return replace(spec, norm=norm)


def read(config: Config, *, rope: Rope, has_bias: bool) -> DecoderSpec:
    """Read a decoder with a squared ReLU without a gate.

    Args:
        config: The whole config.
        rope: Of every layer.
        has_bias: Whether it has biases where the config is silent.
    """
    config.expect(hidden_act="relu2")
    of_attention = config.get("attention_bias", default=has_bias)
    spec = _common.read_decoder(config, DEFAULTS, rope=rope)
    return replace(
        spec,
        attention=replace(spec.attention, has_qkv_bias=of_attention, has_output_bias=of_attention),
        activation="relu2",
        is_gated=False,
        has_mlp_bias=config.get("mlp_bias", default=has_bias),
    )


def config(spec: DecoderSpec) -> dict[str, Any]:
    """Return the Nemotron config of a decoder."""
    fields = write(
        spec, model_type="nemotron", architecture="NemotronForCausalLM", epsilon="norm_eps"
    )
    return fields | _rope.write_rope(spec, rotated=True)


def write(spec: DecoderSpec, *, model_type: str, architecture: str, epsilon: str) -> dict[str, Any]:
    """Return the fields that `read` reads."""
    fields = _common.write_decoder(
        spec, model_type=model_type, architecture=architecture, epsilon=epsilon
    )
    return fields | {
        "hidden_act": "relu2",
        "attention_bias": spec.attention.has_output_bias,
        "mlp_bias": spec.has_mlp_bias,
    }


def source(role: str, spec: DecoderSpec) -> Source:
    """Return where a weight lives."""
    del spec  # nothing is fused
    return llama.locate(role, stablelm.TENSORS)
