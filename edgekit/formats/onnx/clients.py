"""What other programs want beside the model: ONNX Runtime GenAI opens the directory as it is."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.formats.onnx.graph import cache_name, cache_width
from edgekit.tokenizer_files import added_tokens


if TYPE_CHECKING:
    from edgekit.checkpoint import Checkpoint


GENAI_CONFIG = "genai_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
NOTE = (
    f"{GENAI_CONFIG} is for ONNX Runtime GenAI, which reads text with a tokenizer of its own: "
    "the proof does not cover that one"
)


def write(checkpoint: "Checkpoint", directory: Path, entry: str, *, context_tokens: int) -> None:
    """Write ``genai_config.json`` and what GenAI's tokenizer reads beside ``tokenizer.json``."""
    config = genai_config(checkpoint, entry, context_tokens=context_tokens)
    text = json.dumps(config, indent=2) + "\n"
    (directory / GENAI_CONFIG).write_text(text, encoding="utf-8")
    settings = checkpoint.text.tokenizer_json.with_name(TOKENIZER_CONFIG)
    if settings.is_file():
        shutil.copyfile(settings, directory / TOKENIZER_CONFIG)


def genai_config(checkpoint: "Checkpoint", entry: str, *, context_tokens: int) -> dict[str, Any]:
    """Return the settings of ONNX Runtime GenAI 0.18: greedy, as many tokens as were planned."""
    return {
        "model": {
            **_token_ids(checkpoint),
            "type": "llama",  # any decoder of one graph
            "vocab_size": checkpoint.spec.vocabulary,
            "context_length": checkpoint.spec.context_tokens,
            "decoder": _decoder(checkpoint, entry),
        },
        "search": {
            "do_sample": False,
            "max_length": context_tokens,
            "num_beams": 1,
            "past_present_share_buffer": True,
        },
    }


def _token_ids(checkpoint: "Checkpoint") -> dict[str, Any]:
    stops = list(checkpoint.text.declared_stop_ids)
    ids = added_tokens(checkpoint.text.tokenizer_json)
    special = checkpoint.text.special_tokens
    found = {
        f"{kind}_token_id": ids[token]
        for kind in ("bos", "pad")
        if (token := special.get(f"{kind}_token")) in ids
    }
    return {"pad_token_id": stops[0], **found, "eos_token_id": stops} if stops else found


def _decoder(checkpoint: "Checkpoint", entry: str) -> dict[str, Any]:
    spec = checkpoint.spec
    inputs = {name: name for name in ("input_ids", "attention_mask", "position_ids")}
    outputs = {"logits": "logits"}
    for part in ("key", "value"):
        inputs[f"past_{part}_names"] = _pattern(part)
        outputs[f"present_{part}_names"] = _pattern(part, of="present")
    return {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": entry,
        "head_size": cache_width(spec),
        "hidden_size": spec.hidden_width,
        "num_attention_heads": spec.attention.heads,
        "num_hidden_layers": len(spec.layers),
        "num_key_value_heads": spec.attention.key_value_heads,
        "inputs": inputs,
        "outputs": outputs,
    }


def _pattern(part: str, *, of: str = "past_key_values") -> str:
    return cache_name("%d", part, of=of)
