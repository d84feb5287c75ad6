"""``mlc-chat-config.json``: what MLC's programs read first, and what edgekit reads back.

Source: mlc_llm/protocol/mlc_chat_config.py, interface/gen_config.py and the config dataclass of
each model in mlc-llm 79d603f085; fields in their order.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.encodings.json_files import read_object_if_there
from edgekit.errors import BundleError
from edgekit.formats.mlc import decoders, packing, shards, tokenizer_info
from edgekit.formats.mlc.memory import prefill_chunk_tokens
from edgekit.model.mixers import Attention, DeltaNet
from edgekit.model.norm import Norm
from edgekit.model.rope import Llama3Scaling, LongRopeScaling, Rope
from edgekit.model.spec import DecoderSpec, Layer


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
    name = decoders.model_type(checkpoint.architecture, spec)
    return {
        "version": VERSION,
        "model_type": name,
        "quantization": scheme,
        "model_config": model_config(
            name, spec, context_tokens=context_tokens, chunk_tokens=chunk_tokens
        ),
        "vocab_size": spec.vocab_size,
        "context_window_size": context_tokens,
        "sliding_window_size": -1,
        "prefill_chunk_size": chunk_tokens,
        "attention_sink_size": _MISTRAL_SINK_TOKENS if name == "mistral" else -1,
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
    name: str, spec: DecoderSpec, *, context_tokens: int, chunk_tokens: int
) -> dict[str, Any]:
    """Return what MLC's model definition is told, from which a library is compiled."""
    known = {
        **_shape(spec),
        **_positions(spec, context_tokens=context_tokens),
        **_CONSTANTS,
        "model_type": name,
        "context_window_size": context_tokens,
        "prefill_chunk_size": chunk_tokens,
    }
    return {field: known[field] for field in _FIELDS[name].split()}


def _shape(spec: DecoderSpec) -> dict[str, Any]:
    attention = spec.attention
    net = next((it.mixer for it in spec.layers if isinstance(it.mixer, DeltaNet)), None)
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": len(spec.layers),
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "query_pre_attn_scalar": attention.head_dim,
        "attn_logit_softcapping": attention.attn_logit_softcap,
        "final_logit_softcapping": spec.final_logit_softcap,
        "tie_word_embeddings": spec.is_tied,
        **dict.fromkeys(("attention_bias", "use_qkv_bias"), attention.has_qkv_bias),
        **dict.fromkeys(("mlp_bias", "use_bias"), spec.has_mlp_bias),
        **dict.fromkeys(
            ("rms_norm_eps", "layer_norm_eps", "norm_eps", "norm_epsilon"), spec.norm.epsilon
        ),
        **dict.fromkeys(("hidden_act", "hidden_activation"), _ACTIVATIONS.get(spec.activation)),
        "full_attention_interval": decoders.full_attention_interval(spec),
        **{name: getattr(net, field) for name, field in _DELTA_NET.items() if net},
    }


_DELTA_NET = {
    "linear_key_head_dim": "key_head_dim",
    "linear_value_head_dim": "value_head_dim",
    "linear_num_key_heads": "key_heads",
    "linear_num_value_heads": "value_heads",
    "linear_conv_kernel_dim": "taps",
}


_ACTIVATIONS: Mapping[str, str] = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}


def _positions(spec: DecoderSpec, *, context_tokens: int) -> dict[str, Any]:
    # Where layers have several, or none, a library of the model's own knows better.
    ropes = (layer.rope for _, layer, _ in spec.attentions() if layer.rope)
    rope = next(ropes, Rope(width=spec.attention.head_dim, theta=10_000.0))
    scaling = _scaling(rope, spec)
    original = scaling["original_max_position_embeddings"] if scaling else spec.context_tokens
    windows = [layer.window_tokens for layer in spec.layers if layer.window_tokens]
    return {
        **dict.fromkeys(("position_embedding_base", "rope_theta"), rope.theta),
        "rope_scaling": scaling,
        "original_max_position_embeddings": original,
        "max_position_embeddings": spec.context_tokens,
        "partial_rotary_factor": rope.width / spec.attention.head_dim,
        "sliding_window_size": -1,
        # Gemma 2 in MLC takes it for the context, whatever else is said.
        "sliding_window": min([context_tokens, *windows]),
    }


def _scaling(rope: Rope, spec: DecoderSpec) -> dict[str, Any] | None:
    match rope.scaling:
        case Llama3Scaling() as scaling:
            return {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_frequency_factor,
                "high_freq_factor": scaling.high_frequency_factor,
                "original_max_position_embeddings": scaling.original_context_tokens,
            }
        case LongRopeScaling() as scaling:
            return {
                "type": "longrope",
                "rope_type": "longrope",
                "short_factor": list(scaling.short_factors),
                "long_factor": list(scaling.long_factors),
                "max_position_embeddings": spec.context_tokens,
                "original_max_position_embeddings": scaling.original_context_tokens,
            }
        case _:
            return None


_CONSTANTS: Mapping[str, Any] = {
    "attention_sink_size": _MISTRAL_SINK_TOKENS,
    "tensor_parallel_shards": 1,
    "pipeline_parallel_stages": 1,
    "max_batch_size": 1,
    "disaggregation": False,
    "dtype": "float32",  # replaced by what the scheme computes in
    "weight_block_size": None,
    "use_cache": True,
    # Asked for and never used; those outside are.
    "bos_token_id": 0,
    "eos_token_id": 0,
}

# The fields of each definition's dataclass, in their order. That StarCoder 2 is tied is for
# edgekit, which reads it back; MLC's has a head in any case.
_FIELDS: Mapping[str, str] = {
    "llama": """hidden_size intermediate_size num_attention_heads num_hidden_layers rms_norm_eps
        vocab_size tie_word_embeddings position_embedding_base rope_scaling context_window_size
        prefill_chunk_size num_key_value_heads head_dim tensor_parallel_shards
        pipeline_parallel_stages max_batch_size disaggregation""",
    "mistral": """hidden_size intermediate_size num_attention_heads num_hidden_layers rms_norm_eps
        vocab_size position_embedding_base num_key_value_heads head_dim context_window_size
        sliding_window_size prefill_chunk_size attention_sink_size tensor_parallel_shards
        max_batch_size""",
    "qwen2": """hidden_act hidden_size intermediate_size num_attention_heads num_hidden_layers
        num_key_value_heads rms_norm_eps rope_theta vocab_size tie_word_embeddings
        context_window_size prefill_chunk_size tensor_parallel_shards head_dim dtype
        max_batch_size""",
    "qwen3": """hidden_act hidden_size intermediate_size attention_bias num_attention_heads
        num_hidden_layers num_key_value_heads rms_norm_eps rope_theta vocab_size
        tie_word_embeddings context_window_size prefill_chunk_size tensor_parallel_shards head_dim
        dtype max_batch_size weight_block_size""",
    "qwen3_5_text": """hidden_size intermediate_size num_attention_heads num_hidden_layers
        num_key_value_heads rms_norm_eps vocab_size rope_theta head_dim hidden_act attention_bias
        tie_word_embeddings linear_key_head_dim linear_value_head_dim linear_num_key_heads
        linear_num_value_heads linear_conv_kernel_dim full_attention_interval
        partial_rotary_factor context_window_size prefill_chunk_size tensor_parallel_shards dtype
        max_batch_size""",
    "phi3": """model_type hidden_size vocab_size num_hidden_layers num_attention_heads
        intermediate_size rms_norm_eps num_key_value_heads max_position_embeddings
        position_embedding_base rope_scaling original_max_position_embeddings context_window_size
        prefill_chunk_size head_dim tensor_parallel_shards max_batch_size tie_word_embeddings
        partial_rotary_factor""",
    "gemma": (
        _GEMMA := """hidden_size intermediate_size attention_bias num_attention_heads
        num_key_value_heads head_dim num_hidden_layers rms_norm_eps vocab_size hidden_activation
        position_embedding_base context_window_size prefill_chunk_size tensor_parallel_shards
        max_batch_size"""
    ),
    "gemma2": f"""{_GEMMA} attn_logit_softcapping final_logit_softcapping query_pre_attn_scalar
        sliding_window""",
    # MLC's own has them below "text_config"; what runs it here is a library of the model's own.
    "gemma3_text": f"{_GEMMA} query_pre_attn_scalar sliding_window",
    "olmo2": """vocab_size hidden_size num_attention_heads num_key_value_heads head_dim
        position_embedding_base rope_scaling intermediate_size hidden_act num_hidden_layers
        rms_norm_eps tie_word_embeddings context_window_size prefill_chunk_size
        tensor_parallel_shards pipeline_parallel_stages max_batch_size""",
    "stablelm": """vocab_size hidden_size num_hidden_layers num_attention_heads
        num_key_value_heads layer_norm_eps partial_rotary_factor rope_theta intermediate_size
        use_qkv_bias head_dim context_window_size prefill_chunk_size tensor_parallel_shards
        max_batch_size""",
    "phi": """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
        layer_norm_eps position_embedding_base partial_rotary_factor num_key_value_heads
        context_window_size prefill_chunk_size head_dim tensor_parallel_shards max_batch_size""",
    "nemotron": """vocab_size max_position_embeddings hidden_size intermediate_size
        num_hidden_layers num_attention_heads num_key_value_heads rope_theta partial_rotary_factor
        rope_scaling norm_eps head_dim tie_word_embeddings mlp_bias context_window_size
        prefill_chunk_size tensor_parallel_shards pipeline_parallel_stages max_batch_size
        disaggregation""",
    "cohere": """model_type hidden_size vocab_size num_hidden_layers num_attention_heads
        num_key_value_heads intermediate_size layer_norm_eps position_embedding_base
        context_window_size prefill_chunk_size head_dim tensor_parallel_shards max_batch_size""",
    "starcoder2": """vocab_size hidden_size num_hidden_layers num_attention_heads
        num_key_value_heads hidden_act norm_epsilon intermediate_size rope_theta use_bias use_cache
        bos_token_id eos_token_id context_window_size prefill_chunk_size tensor_parallel_shards
        max_batch_size head_dim tie_word_embeddings""",
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
        ("model_type", tuple(_FIELDS)),
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

    model = decoders.MODELS[config["model_type"]]
    norm = Norm(kind=model.norm, epsilon=1.0, has_bias=model.has_norm_bias)
    is_tied = not has("lm_head.weight", "lm_head.q_weight") if model.can_be_tied else False
    layers = (Layer(),) * size("num_hidden_layers", most=MOST_LAYERS)
    if model.has_delta_nets:
        interval = size("full_attention_interval", most=len(layers))
        sizes = {field: size(name) for name, field in _DELTA_NET.items()}
        net = Layer(mixer=DeltaNet(**sizes, norm=norm))
        layers = tuple(
            net if (index + 1) % interval else layer for index, layer in enumerate(layers)
        )
    return DecoderSpec(
        vocab_size=size("vocab_size"),
        hidden_size=size("hidden_size"),
        intermediate_size=size("intermediate_size"),
        context_tokens=config["context_window_size"],
        layers=layers,
        attention=Attention(
            heads=size("num_attention_heads"),
            num_kv_heads=size("num_key_value_heads"),
            head_dim=size("head_dim"),
            softmax_scale=1.0,
            query_key_norm=norm if model.query_key_norm else None,
            head_norms=model.query_key_norm or "alike",
            has_qkv_bias=has("qkv_proj.bias", "c_attn.bias", "Wqkv.bias", "wqkv_pack.bias"),
            has_output_bias=has("o_proj.bias", "out_proj.bias"),
            has_output_gate=model.has_delta_nets,
        ),
        norm=norm,
        residual=model.residual,
        has_pre_norms=model.has_pre_norms,
        has_post_norms=model.has_post_norms,
        is_gated=model.is_gated,
        has_mlp_bias=has("fc1.bias", "c_fc.bias"),
        has_head_bias=model.has_head_bias,
        is_tied=config["model_config"].get("tie_word_embeddings") is True
        if model.copies_head
        else is_tied,
    )
