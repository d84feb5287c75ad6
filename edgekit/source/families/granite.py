"""Granite 3 and 4.1: a Llama with the four multipliers of muP."""

from dataclasses import replace
from typing import Any

from edgekit.model.spec import DecoderSpec, Multipliers
from edgekit.source.config import Config
from edgekit.source.families import _common, llama


SIZES = _common.sizes(
    vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, layers=32, heads=32,
    context_tokens=2048,
)  # fmt: skip

source = llama.source


def describe(config: Config) -> DecoderSpec:
    """Read a Granite config."""
    spec = llama.describe(config)
    return replace(spec, multipliers=read_multipliers(config, spec.attention.softmax_scale))


def read_multipliers(config: Config, softmax_scale: float) -> Multipliers:
    """Read the multipliers of a Granite, which divides its logits.

    Scores are multiplied with ``attention_multiplier`` in place of ``softmax_scale``.
    """
    return Multipliers(
        embedding=config.number("embedding_multiplier", 1.0),
        query=config.number("attention_multiplier", 1.0) / softmax_scale,
        residual=config.number("residual_multiplier", 1.0),
        logits=1 / config.number("logits_scaling", 1.0),
    )


def config(spec: DecoderSpec) -> dict[str, Any]:
    """Return the Granite config of a decoder."""
    fields = llama.config(spec) | {"model_type": "granite", "architectures": ["GraniteForCausalLM"]}
    return fields | write_multipliers(spec)


def write_multipliers(spec: DecoderSpec) -> dict[str, Any]:
    """Return the fields that `read_multipliers` reads."""
    by, scale = spec.multipliers, spec.attention.softmax_scale
    return {
        "embedding_multiplier": by.embedding,
        "attention_multiplier": _common.shortest(
            by.query * scale, lambda said: said / scale == by.query
        ),
        "residual_multiplier": by.residual,
        "logits_scaling": _common.shortest(1 / by.logits, lambda said: 1 / said == by.logits),
    }
