"""Jais 2: LayerNorms, a squared ReLU without a gate, and biases everywhere."""

from dataclasses import replace
from typing import Any

from edgekit.model.norm import Norm
from edgekit.model.spec import DecoderSpec
from edgekit.source.config import Config
from edgekit.source.families import _common, _rope, nemotron


SIZES = _common.sizes(
    vocab_size=150_272, hidden_size=3328, intermediate_size=26_624, layers=32, heads=26,
    context_tokens=8192,
)  # fmt: skip

source = nemotron.source


def describe(config: Config) -> DecoderSpec:
    """Read a Jais 2 config."""
    rope = _rope.read_rope(config, _common.read_head_width(config, nemotron.DEFAULTS))
    spec = nemotron.read(config, rope=rope, has_bias=True)
    epsilon = config.number("layer_norm_eps", 1e-5)
    return replace(spec, norm=Norm(kind="layer", epsilon=epsilon, has_bias=True))


def config(spec: DecoderSpec) -> dict[str, Any]:
    """Return the Jais 2 config of a decoder."""
    fields = nemotron.write(
        spec, model_type="jais2", architecture="Jais2ForCausalLM", epsilon="layer_norm_eps"
    )
    return fields | _rope.write_rope(spec)
