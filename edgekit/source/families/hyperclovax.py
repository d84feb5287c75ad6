"""HyperCLOVA X SEED Think: a Granite whose logits are multiplied, with norms after each part."""

from dataclasses import replace
from typing import Any

from edgekit.model.spec import DecoderSpec, Multipliers, Source
from edgekit.source.config import Config
from edgekit.source.families import granite, llama


SIZES = granite.SIZES
TENSORS = llama.TENSORS | {
    "attention_post_norm": "post_norm1.weight",
    "mlp_post_norm": "post_norm2.weight",
}


def describe(config: Config) -> DecoderSpec:
    """Read a HyperCLOVA X config."""
    spec = llama.describe(config)
    scale = spec.attention.softmax_scale
    multipliers = Multipliers(
        embedding=config.number("embedding_multiplier", 1.0),
        query=config.number("attention_multiplier", scale) / scale,
        residual=config.number("residual_multiplier", 1.0),
        logits=config.number("logits_scaling", 1.0),
    )
    has_post_norms = config.get("use_post_norm", default=True)
    return replace(spec, multipliers=multipliers, has_post_norms=has_post_norms)


def config(spec: DecoderSpec) -> dict[str, Any]:
    """Return the HyperCLOVA X config of a decoder."""
    return granite.config(spec) | {
        "architectures": ["HyperCLOVAXForCausalLM"],
        "model_type": "hyperclovax",
        "logits_scaling": spec.multipliers.logits,
        "use_post_norm": spec.has_post_norms,
    }


def source(role: str, spec: DecoderSpec) -> Source:
    """Return where a weight lives."""
    del spec  # nothing is fused
    return llama.locate(role, TENSORS)
