"""Ministral 8B of 2024: a Mistral whose window is on the layers that say so."""

from dataclasses import replace
from typing import Any

from edgekit.model.spec import DecoderSpec
from edgekit.source.config import Config
from edgekit.source.families import _common, llama, mistral


SIZES = mistral.SIZES

source = llama.source


def describe(config: Config) -> DecoderSpec:
    """Read a Ministral config."""
    config.expect(attention_bias=False, mlp_bias=False)
    spec = llama.read(config, mistral.DEFAULTS)
    window = config.optional_integer("sliding_window", absent=4096)
    usual: list[_common.LayerKind] = [
        "full_attention" if window is None else "sliding_attention"
    ] * len(spec.layers)
    kinds = _common.read_layer_kinds(config, usual)
    return replace(spec, layers=_common.with_windows(config, spec.layers, kinds, window))


def config(spec: DecoderSpec) -> dict[str, Any]:
    """Return the Ministral config of a decoder."""
    fields = llama.write(spec, model_type="ministral", architecture="MinistralForCausalLM")
    return fields | _common.write_layer_kinds(spec)
