"""Wrapped checkpoints: a decoder inside a model that also sees or hears.

A fine-tune of Gemma 3 4B or of a LLaVA is saved as ``…ForConditionalGeneration``: its config.json
keeps the decoder's fields in a section, and its files the decoder's tensors among others. Given
text alone such a model computes its decoder and nothing else, so that is what is exported.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgekit.errors import UsageError
from edgekit.source import families, unsupported


# The section of each kind of config in transformers 5.24 that is a decoder of text.
_SECTIONS = ("text_config", "llm_config", "language_config")
# What transformers 5.24 takes where the section does not say what it is: ``text_config`` in
# configuration_<wrapper>.py.
_TEXT_TYPES = {
    "aya_vision": "cohere2",
    "cohere2_vision": "cohere2",
    "exaone4_5": "exaone4",
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "hyperclovax_vision_v2": "hyperclovax",
    "internvl": "qwen2",
    "llava": "llama",
    "llava_next": "llama",
    "llava_next_video": "llama",
    "llava_onevision": "qwen2",
    "mistral3": "mistral",
    "qwen3_5": "qwen3_5_text",
    "smolvlm": "llama",
    "video_llava": "llama",
    "vipllava": "llama",
}
# Wrappers that change what their decoder does with text alone.
_OTHER_ATTENTION = {"paligemma": "a prompt is read in both directions"}  # fmt: skip
# Fields that a wrapper may keep for its decoder; one in the section counts before.
_SHARED = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "dtype",
           "torch_dtype", "quantization_config", "transformers_version")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TextModel:
    """What a config.json says about its decoder."""

    fields: dict[str, Any]
    section: str | None = None  # where in config.json they stand; None: they are all of it
    wrapper: str | None = None  # the model_type around it


def text_model(config: dict[str, Any], *, origin: str) -> TextModel:
    """Return the decoder of a config: the whole of it, or the section of a wrapper.

    Raises:
        UsageError: If the wrapper does not say what its decoder is, or edgekit does not know that.
    """
    if config.get("model_type") in families.names():
        return TextModel(fields=config)
    section = next((name for name in _SECTIONS if isinstance(config.get(name), dict)), None)
    if section is None:
        return TextModel(fields=config)
    wrapper = str(config.get("model_type"))
    if reason := _OTHER_ATTENTION.get(wrapper):
        raise UsageError(f"{origin}: models of type {wrapper!r} are not supported: {reason}")
    own: Mapping[str, Any] = config[section]
    architecture = own.get("model_type") or _TEXT_TYPES.get(wrapper)
    if architecture not in families.names():
        if architecture is None:
            raise UsageError(
                f"{origin}: {section} does not say the model_type of its decoder, and nobody knows "
                f"it of {wrapper!r}"
            )
        raise unsupported.refusal(
            str(architecture), own, origin=f"{origin}: {section}, in a {wrapper!r}"
        )
    shared = {name: config[name] for name in _SHARED if config.get(name) is not None}
    said = {name: value for name, value in own.items() if value is not None or name not in shared}
    sizes = families.get(architecture).SIZES
    return TextModel(
        fields={**sizes, **shared, **said} | _tie(config, own) | {"model_type": architecture},
        section=section,
        wrapper=wrapper,
    )


def _tie(config: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, bool]:
    """Return whether the head is the embedding: the wrapper, which has the head, knows."""
    for fields in (config, own):
        if isinstance(said := fields.get("tie_word_embeddings"), bool):
            return {"tie_word_embeddings": said}
    return {}
