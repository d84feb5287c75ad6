"""What other programs want besides the model, so that they open the directory as it is.

ONNX Runtime GenAI reads ``genai_config.json``; transformers.js and Optimum read ``config.json``,
``generation_config.json`` and ``tokenizer_config.json``, and look for models in ``onnx``.
"""

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.encodings.files import is_file
from edgekit.encodings.json_files import read_object_if_there
from edgekit.formats.onnx import genai_text, tensor_types
from edgekit.formats.onnx.graph import cache_name, cache_width, text_inputs
from edgekit.formats.onnx.recurrence import state_name
from edgekit.model.card import generation_settings
from edgekit.model.mixers import Attention, DeltaNet, Mixer, ShortConv
from edgekit.model.tokenizer_files import ANY_TOKENIZER, added_tokens, common_settings
from edgekit.quant.recipe import Recipe
from edgekit.text.tokenizer_json import read as read_tokenizer


if TYPE_CHECKING:
    from edgekit.model.checkpoint_protocol import CheckpointProtocol
    from edgekit.model.spec import DecoderSpec
    from edgekit.model.tokenizer_files import TokenizerFiles


NOTE = (
    "ONNX Runtime GenAI and transformers.js open the files too, but read text with tokenizers of "
    "their own, which the proof does not cover"
)
STATES_NOTE = (
    "layers keep states, by operators of ONNX Runtime 1.25.1 and later; ONNX Runtime GenAI cannot "
    "rewind them, and Optimum, which gives a model keys and values only, does not run it"
)
# The one border of longrope that ONNX Runtime GenAI 0.18 knows, for models of type phi3: there it
# reads the text again with the other frequencies, as transformers does.
_KNOWN_BORDER_TOKENS = 4096


_ID_FIELDS = ("bos_token_id", "pad_token_id")
# Whose config.json all clients read for what it is. transformers.js 4.3 and Optimum lack some of
# the other types, and others are more than a decoder to them (granitemoehybrid has states of
# Mamba). What they run is the graph, whose inputs and outputs are a Llama's: so that is what they
# are told.
_KNOWN_TYPES = frozenset(
    {"gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3", "stablelm"}
)
_TYPES_WITH_STATES = frozenset({"lfm2", "qwen3_5_text"})  # where a layer has one; else a Llama too
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "lfm2": "Lfm2ForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
}  # fmt: skip
# What transformers and transformers.js call layers, which the latter gives states accordingly.
_LAYER_TYPES: Mapping[type[Mixer], str] = {
    Attention: "full_attention", ShortConv: "conv", DeltaNet: "linear_attention"
}  # fmt: skip
_IN_COMMON_WORDS: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "tokenizer_config.json": common_settings,
    "generation_config.json": generation_settings,
}


def notes(checkpoint: "CheckpointProtocol") -> Iterator[str]:
    """Yield what a user should know of other programs that open the files."""
    yield NOTE
    yield from _genai_notes(checkpoint.text)
    if strings := checkpoint.text.stop_strings:
        yield (
            f"other programs that open the files must be told that an answer ends before "
            f"{' or '.join(map(repr, strings))}: no setting of theirs holds stop strings"
        )
    spec = checkpoint.spec
    if len({(a.num_kv_heads, cache_width(a)) for _, _, a in spec.caches()}) > 1:
        yield (
            "Optimum gives the caches of all layers one shape, and cannot run this model, whose "
            "layers differ in it"
        )
    if spec.has_states:
        yield STATES_NOTE
    border = spec.original_max_position_embeddings
    if border not in {None, _KNOWN_BORDER_TOKENS}:
        yield (
            f"ONNX Runtime GenAI does not read a text again that outgrows {border} tokens while it "
            "is written, where this model takes other frequencies"
        )


@functools.lru_cache(maxsize=1)  # every recipe has the same
def _genai_notes(text: "TokenizerFiles") -> tuple[str, ...]:
    return genai_text.notes(text.tokenizer_json)


def not_on_webgpu(spec: "DecoderSpec") -> str | None:
    """Return what ONNX Runtime Web 1.31 computes otherwise on a GPU; on the processor it is right.

    Shown by test_onnx_javascript.py.
    """
    if spec.has_experts:
        return "experts were tried in ONNX Runtime on processors only, not on WebGPU"
    if all(a.attn_logit_softcap is None for _, _, a in spec.attentions()):
        return None
    return "ONNX Runtime Web computes attention on WebGPU without the cap on scores of this model"


def write(
    checkpoint: "CheckpointProtocol",
    recipe: Recipe,
    directory: Path,
    entry: str,
    *,
    context_tokens: int,
) -> None:
    """Write the settings of every client next to the model."""
    data_files = len([*directory.glob(f"{entry}_data*")])
    genai = genai_config(checkpoint, entry, context_tokens=context_tokens)
    _write_json(directory / "genai_config.json", genai)
    files = transformers_files(checkpoint, recipe, data_files=data_files)
    files[genai_text.MODULE] = genai_text.tokenizer_module(checkpoint.text.chat_template)
    for name, fields in files.items():
        if fields:
            _write_json(directory / name, fields)
    _spell_out(directory / "tokenizer.json")


def _spell_out(tokenizer_json: Path) -> None:
    """Rewrite a tokenizer in words that all clients know, if it is there and they do not."""
    if not is_file(tokenizer_json):
        return
    fields = read_tokenizer(tokenizer_json)
    spelt = genai_text.without_digits(fields)
    if spelt is not fields:
        text = json.dumps(spelt, ensure_ascii=False)  # an indent takes half a second
        tokenizer_json.write_text(text + "\n", encoding="utf-8")


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def transformers_files(
    checkpoint: "CheckpointProtocol", recipe: Recipe, *, data_files: int
) -> dict[str, dict[str, Any]]:
    """Return the checkpoint's own settings by file, as far as it has them, true for this artifact.

    Weights are no longer quantized as they were, every stop id ends an answer, and transformers.js
    4.3 looks for the chat template among the tokenizer's settings only.
    """
    stops = list(checkpoint.text.declared_stop_ids)
    changes: dict[str, dict[str, Any]] = {
        "config.json": {
            "quantization_config": None,
            "eos_token_id": stops,
            "vocab_size": checkpoint.spec.vocab_size,
            "num_hidden_layers": _layers(checkpoint.spec),
            "transformers.js_config": _transformers_js(recipe, data_files=data_files),
            **({"layer_types": layer_types(checkpoint.spec)} if checkpoint.spec.has_states else {}),
        },
        "generation_config.json": {"eos_token_id": stops},
        "tokenizer_config.json": {
            "chat_template": checkpoint.text.chat_template,
            # One that reads tokenizer.json as it is: transformers 5 rebuilds Llama's.
            "tokenizer_class": ANY_TOKENIZER,
        },
    }
    found = {}
    for name, changed in changes.items():
        path = checkpoint.text.beside(name, otherwise=checkpoint.directory)
        said = _config(checkpoint) if name == "config.json" else read_object_if_there(path)
        if said:
            fields = {**said, **changed}
            fields = _IN_COMMON_WORDS.get(name, dict)(fields)
            found[name] = {
                key: value
                for key, value in fields.items()
                if value is not None and not (key in _ID_FIELDS and _is_beyond(value, checkpoint))
            }
    return found


def _config(checkpoint: "CheckpointProtocol") -> Mapping[str, Any]:
    """Return a config.json that all clients know, or none where the checkpoint has none."""
    said, spec = checkpoint.config, checkpoint.spec
    known = _TYPES_WITH_STATES if spec.has_states else _KNOWN_TYPES
    kind = _genai_type(spec) if spec.has_states else "llama"
    if not said or checkpoint.architecture in known:
        return said
    attention = next((it for _, _, it in spec.caches()), spec.attention)
    width = cache_width(attention)
    return {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        **{field: said[field] for field in _ID_FIELDS if field in said},
        "head_dim": width,
        # Of all heads together: Optimum divides it to know the cache.
        "hidden_size": attention.heads * width,
        "intermediate_size": spec.mlp(0).intermediate_size,
        "max_position_embeddings": spec.context_tokens,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.num_kv_heads,
        "tie_word_embeddings": spec.is_tied,
    }


def _layers(spec: "DecoderSpec") -> int:
    """Return how many layers clients ask for what they keep; the last of Gemma 4 keep nothing."""
    return 1 + max(index for index, *_ in (*spec.caches(), *spec.states()))


def layer_types(spec: "DecoderSpec") -> list[str]:
    """Return what mixes the tokens in each layer, in the words of transformers."""
    return [_LAYER_TYPES[type(spec.mixer(index))] for index in range(len(spec.layers))]


def _is_beyond(id: Any, checkpoint: "CheckpointProtocol") -> bool:
    """Tell whether an id is no token of the model: -1 for none, or one that has no row."""
    return isinstance(id, int) and not 0 <= id < checkpoint.spec.vocab_size


def _transformers_js(recipe: Recipe, *, data_files: int) -> dict[str, Any]:
    """Return what transformers.js opens by default; since 4.0 it sees the cache's type itself."""
    how = tensor_types.BUILDS[recipe.name]
    cache = {"kv_cache_dtype": how.arithmetic} if how.is_half else {}
    return {"dtype": how.dtype, "use_external_data_format": data_files, **cache}


def genai_config(
    checkpoint: "CheckpointProtocol", entry: str, *, context_tokens: int
) -> dict[str, Any]:
    """Return the settings of ONNX Runtime GenAI 0.18: greedy, as many tokens as were planned."""
    spec = checkpoint.spec
    return {
        "model": {
            **_token_ids(checkpoint),
            "type": _genai_type(spec),
            "vocab_size": spec.vocab_size,
            "context_length": spec.context_tokens,
            "decoder": _decoder(checkpoint, entry),
        },
        "search": {
            "do_sample": False,
            "max_length": context_tokens,
            "num_beams": 1,
            "past_present_share_buffer": True,
        },
    }


def _genai_type(spec: "DecoderSpec") -> str:
    """Return any decoder of one graph, or one that knows of longrope or of states."""
    if spec.original_max_position_embeddings == _KNOWN_BORDER_TOKENS:
        return "phi3"
    states = {state for _, state, _ in spec.states()}
    if "recurrent" in states:
        return "qwen3_5_text"
    return "lfm2" if states else "llama"


def _token_ids(checkpoint: "CheckpointProtocol") -> dict[str, Any]:
    stops = list(checkpoint.text.declared_stop_ids)
    ids = added_tokens(checkpoint.text.tokenizer_json)
    special = checkpoint.text.special_tokens
    found = {
        f"{kind}_token_id": ids[token]
        for kind in ("bos", "pad")
        if (token := special.get(f"{kind}_token")) in ids
    }
    return {"pad_token_id": stops[0], **found, "eos_token_id": stops} if stops else found


def _decoder(checkpoint: "CheckpointProtocol", entry: str) -> dict[str, Any]:
    spec = checkpoint.spec
    attention = next((it for _, _, it in spec.caches()), spec.attention)
    inputs = {name: name for name in text_inputs(spec)}
    outputs = {"logits": "logits"}
    for part in ("key", "value"):
        inputs[f"past_{part}_names"] = _pattern(part)
        outputs[f"present_{part}_names"] = _pattern(part, of="present")
    for state in dict.fromkeys(state for _, state, _ in spec.states()):
        inputs[f"past_{state}_names"] = state_name("%d", state)
        outputs[f"present_{state}_names"] = state_name("%d", state, of="present")
    return {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": entry,
        "head_size": cache_width(attention),
        "hidden_size": spec.hidden_size,
        "num_attention_heads": attention.heads,
        "num_hidden_layers": _layers(spec),
        "num_key_value_heads": attention.num_kv_heads,
        "inputs": inputs,
        "outputs": outputs,
        **_states(spec),
    }


def _states(spec: "DecoderSpec") -> dict[str, Any]:
    """Return which layers have a state, and how many columns a convolution keeps."""
    columns = {shape[-1] for _, state, shape in spec.states() if state == "conv"}
    return {"layer_types": layer_types(spec), "conv_cache_size": max(columns)} if columns else {}


def _pattern(part: str, *, of: str = "past_key_values") -> str:
    return cache_name("%d", part, of=of)
