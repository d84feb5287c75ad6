"""Qwen 2 and 2.5: a Llama with biases on queries, keys and values."""

from dataclasses import replace
from typing import Any

from edgekit.config import Config
from edgekit.decoder import DecoderSpec, Layer
from edgekit.families import llama


source = llama.source


def describe(config: Config) -> DecoderSpec:
    """Read a Qwen 2 config; windows apply only from layer ``max_window_layers`` on, if at all."""
    spec = llama.describe(config)
    attention = replace(spec.attention, has_qkv_bias=True, has_output_bias=False)
    return replace(spec, attention=attention, layers=read_windows(config, spec.layers))


def read_windows(config: Config, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """Return ``layers`` with the windows of a Qwen config."""
    window = config.optional_integer("sliding_window")
    first = config.get("max_window_layers", len(layers))
    is_used = config.get("use_sliding_window", default=False)
    kinds = config.get("layer_types", list[str]()) or [
        "sliding_attention" if index >= first else "full_attention" for index in range(len(layers))
    ]
    return tuple(
        replace(layer, window_tokens=window if is_used and kind == "sliding_attention" else None)
        for layer, kind in zip(layers, kinds, strict=True)
    )


def config(spec: DecoderSpec) -> dict[str, Any]:
    """Return the Qwen 2 config of a decoder."""
    fields = llama.config(spec) | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": False,
    }
    return {name: value for name, value in fields.items() if not name.endswith("_bias")}
