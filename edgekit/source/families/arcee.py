"""Arcee AFM: a Llama with a squared ReLU in place of gate and SiLU."""

from dataclasses import replace
from typing import Any

from edgekit.model.norm import Norm
from edgekit.model.spec import DecoderSpec
from edgekit.source.config import Config
from edgekit.source.families import _common, _rope, llama, nemotron


SIZES = _common.sizes(
    vocab_size=32_000, hidden_size=2560, intermediate_size=18_432, layers=32, heads=32,
    context_tokens=4096,
)  # fmt: skip

source = llama.source


def describe(config: Config) -> DecoderSpec:
    """Read an Arcee config."""
    rope = _rope.read_rope(config, _common.read_head_width(config, nemotron.DEFAULTS))
    spec = nemotron.read(config, rope=rope, has_bias=False)
    return replace(spec, norm=Norm(kind="rms", epsilon=config.number("rms_norm_eps", 1e-5)))


def config(spec: DecoderSpec) -> dict[str, Any]:
    """Return the Arcee config of a decoder."""
    fields = nemotron.write(
        spec, model_type="arcee", architecture="ArceeForCausalLM", epsilon="rms_norm_eps"
    )
    return fields | _rope.write_rope(spec)
