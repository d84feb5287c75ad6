"""GLM-4 0414: a GLM with norms also after attention and after the MLP."""

from dataclasses import replace
from typing import Any

from edgekit.model.spec import DecoderSpec, Source
from edgekit.source.config import Config
from edgekit.source.families import glm, llama


SIZES = glm.SIZES
TENSORS = llama.TENSORS | {
    "attention_post_norm": "post_self_attn_layernorm.weight",
    "mlp_post_norm": "post_mlp_layernorm.weight",
}


def describe(config: Config) -> DecoderSpec:
    """Read a GLM-4 config."""
    return replace(glm.describe(config), has_post_norms=True)


def config(spec: DecoderSpec) -> dict[str, Any]:
    """Return the GLM-4 config of a decoder."""
    return glm.config(spec) | {"model_type": "glm4", "architectures": ["Glm4ForCausalLM"]}


def source(role: str, spec: DecoderSpec) -> Source:
    """Return where a weight lives."""
    return glm.locate(role, spec, TENSORS)
