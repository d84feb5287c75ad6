"""Llama: Llama 2 and 3.x, TinyLlama, SmolLM and SmolLM2."""

from collections.abc import Mapping
from typing import Any

from edgekit.config import Config
from edgekit.decoder import (
    Attention,
    DecoderSpec,
    Layer,
    LinearScaling,
    Llama3Scaling,
    Norm,
    Rope,
    RopeScaling,
    Source,
)
from edgekit.errors import UsageError


def describe(config: Config) -> DecoderSpec:
    """Read a Llama config."""
    config.expect(hidden_act="silu")
    heads, hidden = config.integer("num_attention_heads"), config.integer("hidden_size")
    head_width = config.optional_integer("head_dim") or hidden // heads
    has_bias = config.get("attention_bias", default=False)
    return DecoderSpec(
        vocabulary=config.integer("vocab_size"),
        hidden_width=hidden,
        mlp_width=config.integer("intermediate_size"),
        context_tokens=config.integer("max_position_embeddings"),
        layers=(Layer(rope=read_rope(config, head_width)),) * config.integer("num_hidden_layers"),
        attention=Attention(
            heads=heads,
            key_value_heads=config.optional_integer("num_key_value_heads") or heads,
            head_width=head_width,
            score_scale=head_width**-0.5,
            has_qkv_bias=has_bias,
            has_output_bias=has_bias,
        ),
        norm=Norm(kind="rms", epsilon=config.get("rms_norm_eps", 1e-6)),
        has_mlp_bias=config.get("mlp_bias", default=False),
        is_tied=config.get("tie_word_embeddings", default=False),
    )


def read_rope(config: Config, width: int, *, default_theta: float = 10_000.0) -> Rope:
    """Read the rope of a config of transformers 5 (one object) or 4 (two fields)."""
    older = config.get("rope_scaling", dict[str, Any]())
    fields = config.get("rope_parameters", dict[str, Any]()) or older
    theta = float(fields.get("rope_theta", config.get("rope_theta", default_theta)))
    try:
        return Rope(width=width, theta=theta, scaling=_read_scaling(fields))
    except KeyError as error:
        raise UsageError(f"{config.origin}: the rope parameters lack {error}") from error


def _read_scaling(fields: Mapping[str, Any]) -> RopeScaling | None:
    match fields.get("rope_type", fields.get("type", "default")):
        case "default":
            return None
        case "linear":
            return LinearScaling(factor=float(fields["factor"]))
        case "llama3":
            return Llama3Scaling(
                factor=float(fields["factor"]),
                low_frequency_factor=float(fields["low_freq_factor"]),
                high_frequency_factor=float(fields["high_freq_factor"]),
                original_context_tokens=int(fields["original_max_position_embeddings"]),
            )
        case unknown:
            raise UsageError(
                f"rope of type {unknown!r} is not supported", hint="default, linear, llama3"
            )


def config(spec: DecoderSpec) -> dict[str, Any]:
    """Return the Llama config of a decoder."""
    rope = spec.layers[0].rope
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": spec.vocabulary,
        "hidden_size": spec.hidden_width,
        "intermediate_size": spec.mlp_width,
        "num_hidden_layers": len(spec.layers),
        "num_attention_heads": spec.attention.heads,
        "num_key_value_heads": spec.attention.key_value_heads,
        "head_dim": spec.attention.head_width,
        "max_position_embeddings": spec.context_tokens,
        "rms_norm_eps": spec.norm.epsilon,
        "rope_parameters": write_rope(rope) if rope else None,
        "attention_bias": spec.attention.has_output_bias,
        "mlp_bias": spec.has_mlp_bias,
        "tie_word_embeddings": spec.is_tied,
    }


def write_rope(rope: Rope) -> dict[str, Any]:
    """Return what `read_rope` reads, as transformers 5 writes it."""
    match rope.scaling:
        case None:
            return {"rope_type": "default", "rope_theta": rope.theta}
        case LinearScaling(factor=factor):
            return {"rope_type": "linear", "rope_theta": rope.theta, "factor": factor}
        case Llama3Scaling() as scaling:
            return {
                "rope_type": "llama3",
                "rope_theta": rope.theta,
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_frequency_factor,
                "high_freq_factor": scaling.high_frequency_factor,
                "original_max_position_embeddings": scaling.original_context_tokens,
            }
        case _:
            raise UsageError("a Llama config cannot say this kind of rope scaling")


_TENSORS = {
    "attention_norm": "input_layernorm.weight",
    "query": "self_attn.q_proj.weight",
    "key": "self_attn.k_proj.weight",
    "value": "self_attn.v_proj.weight",
    "attention_output": "self_attn.o_proj.weight",
    "query_bias": "self_attn.q_proj.bias",
    "key_bias": "self_attn.k_proj.bias",
    "value_bias": "self_attn.v_proj.bias",
    "attention_output_bias": "self_attn.o_proj.bias",
    "query_norm": "self_attn.q_norm.weight",
    "key_norm": "self_attn.k_norm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "gate_bias": "mlp.gate_proj.bias",
    "up_bias": "mlp.up_proj.bias",
    "down_bias": "mlp.down_proj.bias",
}
_OUTER_TENSORS = {
    "token_embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "output_head": "lm_head.weight",
}


def source(role: str, spec: DecoderSpec) -> Source:
    """Return where a weight lives."""
    del spec  # nothing is fused
    if role in _OUTER_TENSORS:
        return Source(_OUTER_TENSORS[role])
    _, layer, part = role.split(".")
    return Source(f"model.layers.{layer}.{_TENSORS[part]}")
