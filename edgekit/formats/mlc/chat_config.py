"""``mlc-chat-config.json``: what MLC's programs read first, and what edgekit reads back.

Source: mlc_llm/protocol/mlc_chat_config.py, interface/gen_config.py and the config dataclass of
each model in mlc-llm 79d603f085; fields in their order.
"""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.encodings.json_files import read_object_if_there
from edgekit.errors import BundleError
from edgekit.formats.mlc import decoders, packing, shards, tokenizer_info
from edgekit.formats.mlc.memory import prefill_chunk_tokens
from edgekit.model.spec import (
    Attention,
    DecoderSpec,
    Layer,
    Llama3Scaling,
    LongRopeScaling,
    Norm,
    Rope,
)


if TYPE_CHECKING:
    from edgekit.model.checkpoint_protocol import CheckpointProtocol


NAME = "mlc-chat-config.json"
VERSION = "0.1.0"  # MLC_CHAT_CONFIG_VERSION
TOKENIZER_FILES = ("tokenizer.json",)  # all that WebLLM opens; the others are for older engines
MOST_LAYERS = 1024  # a damaged file must not fill the memory
_MISTRAL_SINK_TOKENS = 4  # MistralConfig.attention_sink_size; read only with a window
_DEFAULT_IDS = {"pad_token_id": 0, "bos_token_id": 1}  # MLC_CHAT_SYSTEM_DEFAULT


def build(
    checkpoint: "CheckpointProtocol",
    scheme: str,
    *,
    context_tokens: int,
    conv_template: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the settings of an artifact.

    Args:
        checkpoint: The model.
        scheme: How its weights are stored.
        context_tokens: How many tokens the cache must hold.
        conv_template: How a conversation becomes a prompt.
    """
    spec, text = checkpoint.spec, checkpoint.text
    chunk_tokens = prefill_chunk_tokens(context_tokens)
    is_mistral = checkpoint.architecture == "mistral"
    return {
        "version": VERSION,
        "model_type": checkpoint.architecture,
        "quantization": scheme,
        "model_config": model_config(
            checkpoint.architecture, spec, context_tokens=context_tokens, chunk_tokens=chunk_tokens
        ),
        "vocab_size": spec.vocab_size,
        "context_window_size": context_tokens,
        "sliding_window_size": -1,
        "prefill_chunk_size": chunk_tokens,
        "attention_sink_size": _MISTRAL_SINK_TOKENS if is_mistral else -1,
        "tensor_parallel_shards": 1,
        "pipeline_parallel_stages": 1,
        "active_vocab_size": min(
            tokenizer_info.active_vocab_size(text.tokenizer_json), spec.vocab_size
        ),
        **_sampling(checkpoint),
        "tokenizer_files": list(TOKENIZER_FILES),
        "tokenizer_info": tokenizer_info.read(text.tokenizer_json),
        "conv_template": dict(conv_template),
        **_token_ids(checkpoint),
        "model_task": "chat",
        "embedding_metadata": None,
    }


def _sampling(checkpoint: "CheckpointProtocol") -> dict[str, float]:
    said = checkpoint.sampling

    def or_else(value: float | None, default: float) -> float:
        return default if value is None else value

    return {
        "temperature": or_else(said.temperature, 1.0),
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": or_else(said.repetition_penalty, 1.0),
        "top_p": or_else(said.top_p, 1.0),
    }


def _token_ids(checkpoint: "CheckpointProtocol") -> dict[str, int | list[int]]:
    """Return special tokens as MLC looks for them: generation settings, config, its defaults."""
    rows = checkpoint.spec.vocab_size  # an id beyond them is no token of the model
    found: dict[str, int | list[int]] = dict(_DEFAULT_IDS)
    generation = checkpoint.text.beside("generation_config.json", otherwise=checkpoint.directory)
    for fields in (checkpoint.config, read_object_if_there(generation)):
        said = {key: fields.get(key) for key in _DEFAULT_IDS}
        found |= {key: id for key, id in said.items() if isinstance(id, int) and 0 <= id < rows}
    ends = checkpoint.text.eos_token_id
    return found | {"eos_token_id": [] if ends is None else ends}


def model_config(
    architecture: str, spec: DecoderSpec, *, context_tokens: int, chunk_tokens: int
) -> dict[str, Any]:
    """Return what MLC's model definition is told, from which a library is compiled."""
    sizes = {
        "context_window_size": context_tokens,
        "prefill_chunk_size": chunk_tokens,
        "tensor_parallel_shards": 1,
        "max_batch_size": 1,
    }
    return _MODEL_CONFIGS[architecture](spec, sizes)


def _rope(spec: DecoderSpec) -> Rope:
    rope = spec.layers[0].rope
    assert rope is not None  # noqa: S101 - `decoders.refuse` was asked
    return rope


def _widths(spec: DecoderSpec) -> dict[str, Any]:
    return {
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_attention_heads": spec.attention.heads,
        "num_hidden_layers": len(spec.layers),
    }


def _llama(spec: DecoderSpec, sizes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_widths(spec),
        "rms_norm_eps": spec.norm.epsilon,
        "vocab_size": spec.vocab_size,
        "tie_word_embeddings": spec.is_tied,
        "position_embedding_base": _rope(spec).theta,
        "rope_scaling": _llama3_scaling(_rope(spec)),
        "context_window_size": sizes["context_window_size"],
        "prefill_chunk_size": sizes["prefill_chunk_size"],
        "num_key_value_heads": spec.attention.num_kv_heads,
        "head_dim": spec.attention.head_dim,
        "tensor_parallel_shards": 1,
        "pipeline_parallel_stages": 1,
        "max_batch_size": 1,
        "disaggregation": False,
    }


def _llama3_scaling(rope: Rope) -> dict[str, Any] | None:
    scaling = rope.scaling
    if not isinstance(scaling, Llama3Scaling):
        return None
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_frequency_factor,
        "high_freq_factor": scaling.high_frequency_factor,
        "original_max_position_embeddings": scaling.original_context_tokens,
    }


def _mistral(spec: DecoderSpec, sizes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_widths(spec),
        "rms_norm_eps": spec.norm.epsilon,
        "vocab_size": spec.vocab_size,
        "position_embedding_base": _rope(spec).theta,
        "num_key_value_heads": spec.attention.num_kv_heads,
        "head_dim": spec.attention.head_dim,
        "context_window_size": sizes["context_window_size"],
        "sliding_window_size": -1,
        "prefill_chunk_size": sizes["prefill_chunk_size"],
        "attention_sink_size": _MISTRAL_SINK_TOKENS,
        "tensor_parallel_shards": 1,
        "max_batch_size": 1,
    }


def _qwen2(spec: DecoderSpec, sizes: Mapping[str, Any]) -> dict[str, Any]:
    return {"hidden_act": "silu", **_widths(spec), **_qwen_rest(spec, sizes)}


def _qwen3(spec: DecoderSpec, sizes: Mapping[str, Any]) -> dict[str, Any]:
    widths = _widths(spec)
    return {
        "hidden_act": "silu",
        "hidden_size": widths.pop("hidden_size"),
        "intermediate_size": widths.pop("intermediate_size"),
        "attention_bias": spec.attention.has_qkv_bias,
        **widths,
        **_qwen_rest(spec, sizes),
        "weight_block_size": None,
    }


def _qwen_rest(spec: DecoderSpec, sizes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_key_value_heads": spec.attention.num_kv_heads,
        "rms_norm_eps": spec.norm.epsilon,
        "rope_theta": _rope(spec).theta,
        "vocab_size": spec.vocab_size,
        "tie_word_embeddings": spec.is_tied,
        "context_window_size": sizes["context_window_size"],
        "prefill_chunk_size": sizes["prefill_chunk_size"],
        "tensor_parallel_shards": 1,
        "head_dim": spec.attention.head_dim,
        "dtype": "float32",  # replaced by what the scheme computes in
        "max_batch_size": 1,
    }


def _phi3(spec: DecoderSpec, sizes: Mapping[str, Any]) -> dict[str, Any]:
    rope, scaling = _rope(spec), _longrope_scaling(spec)
    original = scaling["original_max_position_embeddings"] if scaling else spec.context_tokens
    return {
        "model_type": "phi3",
        "hidden_size": spec.hidden_size,
        "vocab_size": spec.vocab_size,
        "num_hidden_layers": len(spec.layers),
        "num_attention_heads": spec.attention.heads,
        "intermediate_size": spec.intermediate_size,
        "rms_norm_eps": spec.norm.epsilon,
        "num_key_value_heads": spec.attention.num_kv_heads,
        "max_position_embeddings": spec.context_tokens,
        "position_embedding_base": rope.theta,
        "rope_scaling": scaling,
        "original_max_position_embeddings": original,
        "context_window_size": sizes["context_window_size"],
        "prefill_chunk_size": sizes["prefill_chunk_size"],
        "head_dim": spec.attention.head_dim,
        "tensor_parallel_shards": 1,
        "max_batch_size": 1,
        "tie_word_embeddings": spec.is_tied,
        "partial_rotary_factor": rope.width / spec.attention.head_dim,
    }


def _longrope_scaling(spec: DecoderSpec) -> dict[str, Any] | None:
    scaling = _rope(spec).scaling
    if not isinstance(scaling, LongRopeScaling):
        return None
    return {
        "type": "longrope",
        "rope_type": "longrope",
        "short_factor": list(scaling.short_factors),
        "long_factor": list(scaling.long_factors),
        "max_position_embeddings": spec.context_tokens,
        "original_max_position_embeddings": scaling.original_context_tokens,
    }


def _gemma2(spec: DecoderSpec, sizes: Mapping[str, Any]) -> dict[str, Any]:
    attention = spec.attention
    windows = [layer.window_tokens for layer in spec.layers if layer.window_tokens]
    return {
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "attention_bias": False,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "num_hidden_layers": len(spec.layers),
        "rms_norm_eps": spec.norm.epsilon,
        "vocab_size": spec.vocab_size,
        "hidden_activation": "gelu_pytorch_tanh",
        "position_embedding_base": _rope(spec).theta,
        **sizes,
        "attn_logit_softcapping": attention.attn_logit_softcap,
        "final_logit_softcapping": spec.final_logit_softcap,
        "query_pre_attn_scalar": attention.head_dim,
        # MLC takes it for the context, whatever else is said.
        "sliding_window": min([sizes["context_window_size"], *windows]),
    }


def _stablelm(spec: DecoderSpec, sizes: Mapping[str, Any]) -> dict[str, Any]:
    rope = _rope(spec)
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": len(spec.layers),
        "num_attention_heads": spec.attention.heads,
        "num_key_value_heads": spec.attention.num_kv_heads,
        "layer_norm_eps": spec.norm.epsilon,
        "partial_rotary_factor": rope.width / spec.attention.head_dim,
        "rope_theta": rope.theta,
        "intermediate_size": spec.intermediate_size,
        "use_qkv_bias": spec.attention.has_qkv_bias,
        "head_dim": spec.attention.head_dim,
        **sizes,
    }


_MODEL_CONFIGS: Mapping[str, Callable[[DecoderSpec, Mapping[str, Any]], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "phi3": _phi3,
    "gemma2": _gemma2,
    "stablelm": _stablelm,
}

_KINDS: Mapping[str, tuple[type, ...]] = {
    "version": (str,),
    "model_type": (str,),
    "quantization": (str,),
    "model_config": (dict,),
    "vocab_size": (int,),
    "context_window_size": (int,),
    "sliding_window_size": (int,),
    "prefill_chunk_size": (int,),
    "attention_sink_size": (int,),
    "tensor_parallel_shards": (int,),
    "pipeline_parallel_stages": (int,),
    "active_vocab_size": (int,),
    "temperature": (int, float),
    "presence_penalty": (int, float),
    "frequency_penalty": (int, float),
    "repetition_penalty": (int, float),
    "top_p": (int, float),
    "tokenizer_files": (list,),
    "tokenizer_info": (dict,),
    "conv_template": (dict,),
    "pad_token_id": (int,),
    "bos_token_id": (int,),
    "eos_token_id": (int, list),
    "model_task": (str,),
    "embedding_metadata": (dict, type(None)),
}


def read(path: Path) -> dict[str, Any]:
    """Return the settings in a file.

    Raises:
        BundleError: If it is missing or damaged, has fields that MLC does not know or lacks some,
            or names a model or scheme that edgekit never writes; the message names the field.
    """
    fields = shards.read_json(path)
    unknown = sorted(fields.keys() - _KINDS.keys())
    if unknown:
        raise BundleError(f"{path} has fields that MLC does not know: {', '.join(unknown)}")
    for name, kinds in _KINDS.items():
        value = fields.get(name)
        if name not in fields or not isinstance(value, kinds) or isinstance(value, bool):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise BundleError(f"{path}: {name} is {value!r}, expected {expected}")
    for name, known in (
        ("version", (VERSION,)),
        ("model_type", tuple(decoders.MODELS)),
        ("quantization", tuple(packing.SCHEMES)),
    ):
        if fields[name] not in known:
            raise BundleError(
                f"{path}: {name} is {fields[name]!r}, this edgekit reads {', '.join(known)}"
            )
    return fields


def shapes(path: Path, config: Mapping[str, Any], tensors: Collection[str]) -> DecoderSpec:
    """Return a decoder that has the weights of an artifact; only their shapes are meant.

    Args:
        path: The settings, for messages.
        config: What `read` returned.
        tensors: What the artifact holds, which says where there are biases and norms.

    Raises:
        BundleError: If a size is missing, or is none.
    """

    def size(name: str, *, most: int = 2**31 - 1) -> int:
        value = config["model_config"].get(name)
        if not isinstance(value, int) or not 0 < value <= most:
            raise BundleError(f"{path}: {name} of model_config is {value!r}, expected a size")
        return value

    def has(*endings: str) -> bool:
        return any(name.endswith(endings) for name in tensors)

    norm = Norm(kind="rms", epsilon=1.0, has_bias=has("norm.bias"))
    return DecoderSpec(
        vocab_size=size("vocab_size"),
        hidden_size=size("hidden_size"),
        intermediate_size=size("intermediate_size"),
        context_tokens=config["context_window_size"],
        layers=(Layer(rope=None),) * size("num_hidden_layers", most=MOST_LAYERS),
        attention=Attention(
            heads=size("num_attention_heads"),
            num_kv_heads=size("num_key_value_heads"),
            head_dim=size("head_dim"),
            softmax_scale=1.0,
            query_key_norm=norm if has("q_norm.weight") else None,
            has_qkv_bias=has("qkv_proj.bias", "c_attn.bias"),
            has_output_bias=has("o_proj.bias"),
        ),
        norm=norm,
        has_post_norms=has("post_feedforward_layernorm.weight"),
        is_tied=not has("lm_head.weight", "lm_head.q_weight"),
    )
