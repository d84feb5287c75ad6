"""VaultGemma: a Gemma 2 without norms after attention and MLP."""

from dataclasses import replace
from typing import Any

from edgekit.model.spec import DecoderSpec, Source
from edgekit.source.config import Config
from edgekit.source.families import gemma2, llama


SIZES = gemma2.SIZES
TENSORS = llama.TENSORS | {"mlp_norm": gemma2.TENSORS["mlp_norm"]}


def describe(config: Config) -> DecoderSpec:
    """Read a VaultGemma config."""
    return replace(gemma2.describe(config), has_post_norms=False)


def config(spec: DecoderSpec) -> dict[str, Any]:
    """Return the VaultGemma config of a decoder."""
    names = {"model_type": "vaultgemma", "architectures": ["VaultGemmaForCausalLM"]}
    return gemma2.config(spec) | names


def source(role: str, spec: DecoderSpec) -> Source:
    """Return where a weight lives."""
    del spec  # nothing is fused
    return llama.locate(role, TENSORS)
