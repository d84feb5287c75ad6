"""Mistral: a Llama whose layers may all look through one window."""

from dataclasses import replace
from typing import Any

from edgekit.config import Config
from edgekit.decoder import DecoderSpec, Layer
from edgekit.families import llama


source = llama.source


def describe(config: Config) -> DecoderSpec:
    """Read a Mistral config."""
    spec = llama.describe(config)
    window = config.optional_integer("sliding_window")
    layers = tuple(Layer(rope=layer.rope, window_tokens=window) for layer in spec.layers)
    return replace(spec, layers=layers)


def config(spec: DecoderSpec) -> dict[str, Any]:
    """Return the Mistral config of a decoder."""
    fields = llama.config(spec) | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": spec.layers[0].window_tokens,
    }
    return {name: value for name, value in fields.items() if not name.endswith("_bias")}
