"""Mistral: a Llama whose layers may all look through one window."""

from dataclasses import replace
from typing import Any

from edgekit.model.spec import DecoderSpec
from edgekit.source.config import Config
from edgekit.source.families import _common, llama


DEFAULTS = _common.Defaults(num_kv_heads=8)
SIZES = _common.sizes(
    vocab_size=32_000, hidden_size=4096, intermediate_size=14_336, layers=32, heads=32,
    context_tokens=131_072,
)  # fmt: skip

source = llama.source


def describe(config: Config) -> DecoderSpec:
    """Read a Mistral config."""
    config.expect(attention_bias=False, mlp_bias=False)
    spec = llama.read(config, DEFAULTS)
    # A null window is none; an absent one is what transformers fills in.
    window = config.optional_integer("sliding_window", absent=4096)
    layers = tuple(replace(layer, window_tokens=window) for layer in spec.layers)
    return replace(spec, layers=layers)


def config(spec: DecoderSpec) -> dict[str, Any]:
    """Return the Mistral config of a decoder."""
    fields = llama.write(spec, model_type="mistral", architecture="MistralForCausalLM")
    return fields | {"sliding_window": spec.layers[0].window_tokens}
