"""Why a model is not supported, from what its config says rather than from a list of names."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from edgekit.errors import UsageError
from edgekit.source import families


_EXPERTS = re.compile(r"(moe_)?(num|n)_(local_|routed_)?experts")
_ATTENTION = ("attention", "full_attention", "sliding_attention")
_KINDS = ("layer_types", "layers_block_type", "block_types")
# Fields that only models with such layers have, by how they begin.
_RECURRENT = re.compile(
    r"mamba_|ssm_|state_size|conv_L_cache|conv1d_width|linear_conv|linear_head_dim|time_step_rank"
    r"|lru_width|linear_key_head_dim|short_conv"
)
_OF_NUMBERS = {
    "kv_lora_rank": "its keys and values are kept compressed",
    "altup_num_inputs": "it keeps several copies of its states",
    "hidden_size_per_layer_input": "its layers have embeddings of their own",
}
_OF_FLAGS = {
    "is_encoder_decoder": "it has an encoder",
    "alibi": "its positions are slopes of the scores",
}
_BY_NAME = {
    "bitnet": "its weights are of three values, which no format here keeps, and its activations "
    "are rounded while it computes",
}


def refusal(model_type: str, fields: Mapping[str, Any], *, origin: str) -> UsageError:
    """Return the error about a decoder of an unknown type.

    Args:
        model_type: Of its config.
        fields: Of its config.
        origin: The file, for the message.
    """
    reason = next(_reasons(model_type, fields), None)
    because = f": {reason}" if reason else ""
    return UsageError(
        f"{origin}: models of type {model_type!r} are not supported{because}",
        hint=f"supported: {', '.join(families.names())}",
    )


def _reasons(model_type: str, fields: Mapping[str, Any]) -> Iterator[str]:
    """Yield what nothing here computes, the most telling first."""
    if reason := _BY_NAME.get(model_type):
        yield reason
    numbers = list(_numbers(fields))
    if fields.get("is_moe", True):
        for name, value in numbers:
            if _EXPERTS.fullmatch(name) and value > 1:
                yield f"its layers choose among experts ({name} = {value})"
    for field, reason in _OF_NUMBERS.items():
        if count := dict(numbers).get(field):
            yield f"{reason} ({field} = {count})"
    yield from _other_layers(fields)
    for field, reason in _OF_FLAGS.items():
        if fields.get(field) is True:
            yield f"{reason} ({field} = True)"


def _other_layers(fields: Mapping[str, Any]) -> Iterator[str]:
    for name in _KINDS:
        kinds = fields.get(name)
        others = [it for it in kinds if it not in _ATTENTION] if isinstance(kinds, list) else []
        if others:
            yield f"not all of its layers are attention ({name} has {others[0]!r})"
    for name, value in fields.items():
        if _RECURRENT.match(name) and value is not None:
            yield f"not all of its layers are attention ({name} = {value!r})"


def _numbers(fields: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield whole numbers, those of lists and of sections too."""
    for name, value in fields.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, int) and not isinstance(item, bool):
                yield name, item
        if isinstance(value, dict):
            yield from _numbers(value)
