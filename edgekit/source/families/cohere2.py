"""Command R7B and Command A: a Command R with windows, and positions only where those are."""

from dataclasses import replace
from typing import Any

from edgekit.model.spec import DecoderSpec
from edgekit.source.config import Config
from edgekit.source.families import _common, cohere


SIZES = cohere.SIZES

source = cohere.source


def describe(config: Config) -> DecoderSpec:
    """Read a Command R7B config."""
    config.expect(use_qk_norm=False, order_of_interleaved_layers="local_attn_first")
    pattern = config.optional_integer("sliding_window_pattern", absent=4)
    config.expect(layer_switch=pattern)
    spec = cohere.read(config, rope_theta=10_000.0)
    config.expect(head_dim=spec.hidden_size // spec.attention.heads)  # what transformers takes
    layers = _common.with_windows(
        config,
        spec.layers,
        _common.read_layer_kinds(config, _common.every_nth_full(config, pattern)),
        config.optional_integer("sliding_window", absent=4096),
    )
    return replace(spec, layers=_common.without_full_ropes(layers))


def config(spec: DecoderSpec) -> dict[str, Any]:
    """Return the Command R7B config of a decoder."""
    fields = cohere.write(spec, model_type="cohere2", architecture="Cohere2ForCausalLM")
    return fields | _common.write_layer_kinds(spec)
