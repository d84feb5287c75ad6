"""SmolLM3: a Llama without positions in every fourth layer."""

from dataclasses import replace
from typing import Any

from edgekit.errors import UsageError
from edgekit.model.spec import DecoderSpec, Layer
from edgekit.source.config import Config
from edgekit.source.families import _common, llama


DEFAULTS = _common.Defaults(num_kv_heads=4, is_tied=True)
SIZES = _common.sizes(
    vocab_size=128_256, hidden_size=2048, intermediate_size=11_008, layers=36, heads=16,
    context_tokens=32_768,
)  # fmt: skip

source = llama.source


def describe(config: Config) -> DecoderSpec:
    """Read a SmolLM3 config."""
    config.ignore("max_window_layers")  # left over from Qwen; transformers does not read it here
    has_bias = config.get("attention_bias", default=False)
    spec = llama.read(config, DEFAULTS, rope_theta=2_000_000.0)
    return replace(
        spec,
        attention=replace(spec.attention, has_qkv_bias=has_bias, has_output_bias=has_bias),
        has_mlp_bias=config.get("mlp_bias", default=False),
        layers=_read_layers(config, spec.layers),
    )


def _read_layers(config: Config, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """Return the layers with their positions taken away, and windows, where the config says so."""
    rotates = _read_rotates(config, len(layers))
    window = config.optional_integer("sliding_window")
    if not config.get("use_sliding_window", default=False):
        window = None
    usual: list[_common.LayerKind] = [
        "sliding_attention" if window and not rotated else "full_attention" for rotated in rotates
    ]
    kinds = _common.read_layer_kinds(config, usual)
    return tuple(
        layer if rotated else replace(layer, rope=None)
        for layer, rotated in zip(
            _common.with_windows(config, layers, kinds, window), rotates, strict=True
        )
    )


def _read_rotates(config: Config, layers: int) -> list[bool]:
    """Return which layers have positions: ``no_rope_layers`` is 1 for those, despite its name."""
    interval = config.optional_integer("no_rope_layer_interval") or 4
    rotates = config.get("no_rope_layers", list[int]())
    if not rotates:
        return [bool((index + 1) % interval) for index in range(layers)]
    if len(rotates) < layers or any(rotated not in (0, 1) for rotated in rotates):
        raise UsageError(
            f"{config.origin}: no_rope_layers = {rotates!r}, expected a 0 or 1 for each of "
            f"{layers} layers"
        )
    return [bool(rotated) for rotated in rotates[:layers]]


def config(spec: DecoderSpec) -> dict[str, Any]:
    """Return the SmolLM3 config of a decoder."""
    kinds = _common.write_layer_kinds(spec)
    fields = llama.write(spec, model_type="smollm3", architecture="SmolLM3ForCausalLM")
    return (
        fields
        | kinds
        | {
            "attention_bias": spec.attention.has_output_bias,
            "mlp_bias": spec.has_mlp_bias,
            "no_rope_layers": [int(layer.rope is not None) for layer in spec.layers],
            "use_sliding_window": kinds["sliding_window"] is not None,
        }
    )
