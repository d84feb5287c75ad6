"""Qwen 2 and 2.5: a Llama with biases on queries, keys and values."""

from dataclasses import replace
from typing import Any

from edgekit.model.spec import DecoderSpec, Layer
from edgekit.source.config import Config
from edgekit.source.families import _common, llama


DEFAULTS = _common.Defaults(num_kv_heads=32)
SIZES = _common.sizes(
    vocab_size=151_936, hidden_size=4096, intermediate_size=22_016, layers=32, heads=32,
    context_tokens=32_768,
)  # fmt: skip

source = llama.source


def describe(config: Config) -> DecoderSpec:
    """Read a Qwen 2 config."""
    config.ignore("attention_bias")  # transformers always has these three and never a fourth
    config.expect(mlp_bias=False, use_mrope=False)
    spec = llama.read(config, DEFAULTS)
    return replace(
        spec,
        attention=replace(spec.attention, has_qkv_bias=True),
        layers=read_windows(config, spec.layers),
    )


def read_windows(config: Config, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """Return ``layers`` with the windows of a Qwen config.

    Windows are off unless ``use_sliding_window``, whatever ``sliding_window`` says; then layers
    from ``max_window_layers`` on have them.
    """
    window = config.optional_integer("sliding_window", absent=4096)
    if not config.get("use_sliding_window", default=False):
        window = None
    first = config.get("max_window_layers", 28)
    kinds: list[_common.LayerKind] = [
        "sliding_attention" if window and index >= first else "full_attention"
        for index in range(len(layers))
    ]
    return _common.with_windows(config, layers, _common.read_layer_kinds(config, kinds), window)


def config(spec: DecoderSpec) -> dict[str, Any]:
    """Return the Qwen 2 config of a decoder."""
    fields = llama.write(spec, model_type="qwen2", architecture="Qwen2ForCausalLM")
    return fields | write_windows(spec)


def write_windows(spec: DecoderSpec) -> dict[str, Any]:
    """Return the fields that `read_windows` reads."""
    fields = _common.write_layer_kinds(spec)
    return fields | {"use_sliding_window": fields["sliding_window"] is not None}
