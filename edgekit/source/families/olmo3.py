"""OLMo 3: an OLMo 2 with windows, and a YaRN in the layers without."""

from dataclasses import replace
from typing import Any

from edgekit.model.spec import DecoderSpec
from edgekit.source.config import Config
from edgekit.source.families import _common, _rope, olmo2


SIZES = olmo2.SIZES
THETA = 500_000.0  # Olmo3Config.default_theta, transformers 5

source = olmo2.source


def describe(config: Config) -> DecoderSpec:
    """Read an OLMo 3 config."""
    spec = olmo2.read(config, None)
    full, sliding = _rope.read_ropes_of_kinds(
        config,
        spec.attention.head_dim,
        full_theta=config.number("rope_theta", THETA),
        sliding_theta=THETA,  # the field beside the object is taken once, for the other kind
    )
    layers = _common.with_windows(
        config,
        spec.layers,
        _common.read_layer_kinds(config, _common.every_nth_full(config, 4)),
        config.optional_integer("sliding_window", absent=4096),
    )
    return replace(
        spec,
        layers=tuple(
            replace(layer, rope=full if layer.window_tokens is None else sliding)
            for layer in layers
        ),
    )


def config(spec: DecoderSpec) -> dict[str, Any]:
    """Return the OLMo 3 config of a decoder."""
    fields = olmo2.write(spec, model_type="olmo3", architecture="Olmo3ForCausalLM")
    return fields | _common.write_layer_kinds(spec) | _rope.write_ropes_of_kinds(spec)
