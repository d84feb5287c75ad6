"""Gemma 2: norms before and after, soft-capped scores and logits, a window on every other layer."""

from dataclasses import replace
from typing import Any

from edgekit.model.norm import Norm
from edgekit.model.rope import Rope
from edgekit.model.spec import DecoderSpec, Layer, Source
from edgekit.source.config import Config
from edgekit.source.families import _common, _rope, llama


DEFAULTS = _common.Defaults(num_kv_heads=4, head_dim=256, is_tied=True)
SIZES = _common.sizes(
    vocab_size=256_000, hidden_size=2304, intermediate_size=9216, layers=26, heads=8,
    context_tokens=8192,
)  # fmt: skip
TENSORS = llama.TENSORS | {
    "attention_post_norm": "post_attention_layernorm.weight",
    "mlp_norm": "pre_feedforward_layernorm.weight",
    "mlp_post_norm": "post_feedforward_layernorm.weight",
}


def describe(config: Config) -> DecoderSpec:
    """Read a Gemma 2 config."""
    head_dim = _common.read_head_width(config, DEFAULTS)
    spec = read(config, _rope.read_rope(config, head_dim))
    kinds: list[_common.LayerKind] = [
        "full_attention" if index % 2 else "sliding_attention" for index in range(len(spec.layers))
    ]
    cap = config.optional_number("attn_logit_softcapping", absent=50.0)
    return replace(
        spec,
        attention=replace(spec.attention, attn_logit_softcap=cap),
        final_logit_softcap=config.optional_number("final_logit_softcapping", absent=30.0),
        layers=read_windows(config, spec, kinds),
    )


def read(config: Config, rope: Rope | None) -> DecoderSpec:
    """Read what Gemma 2 and 3 share."""
    # Google's first configs say some things twice; transformers reads the other spelling.
    config.ignore("hidden_act", "sliding_window_size")
    config.expect(hidden_activation="gelu_pytorch_tanh", use_bidirectional_attention=False)
    spec = _common.read_decoder(config, DEFAULTS, rope=rope)
    has_bias = config.get("attention_bias", default=False)
    attention = replace(
        spec.attention,
        softmax_scale=config.number("query_pre_attn_scalar", 256) ** -0.5,
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
    )
    return replace(
        spec,
        attention=attention,
        norm=Norm(kind="rms", epsilon=spec.norm.epsilon, unit_offset=True),
        activation="gelu_tanh",
        has_post_norms=True,
        embedding_scale=spec.hidden_size**0.5,
    )


def read_windows(
    config: Config, spec: DecoderSpec, kinds: list[_common.LayerKind]
) -> tuple[Layer, ...]:
    """Return the layers with the windows of a Gemma config; ``kinds`` where it names none."""
    window = config.optional_integer("sliding_window", absent=4096)
    found = _common.read_layer_kinds(config, kinds)
    return _common.with_windows(config, spec.layers, found, window)


def config(spec: DecoderSpec) -> dict[str, Any]:
    """Return the Gemma 2 config of a decoder."""
    fields = write(spec, model_type="gemma2", architecture="Gemma2ForCausalLM")
    return (
        fields
        | _rope.write_rope(spec)
        | {
            "attn_logit_softcapping": spec.attention.attn_logit_softcap,
            "final_logit_softcapping": spec.final_logit_softcap,
        }
    )


def write(spec: DecoderSpec, *, model_type: str, architecture: str) -> dict[str, Any]:
    """Return the fields that `read` and `read_windows` read."""
    fields = _common.write_decoder(spec, model_type=model_type, architecture=architecture)
    return (
        fields
        | _common.write_layer_kinds(spec)
        | {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": _scalar(spec.attention.softmax_scale),
            "attention_bias": spec.attention.has_output_bias,
        }
    )


def _scalar(softmax_scale: float) -> float | int:
    """Return what has this inverse square root: a whole number where one has."""
    scalar = softmax_scale**-2
    whole = round(scalar)
    return whole if whole**-0.5 == softmax_scale else scalar


def source(role: str, spec: DecoderSpec) -> Source:
    """Return where a weight lives."""
    del spec  # nothing is fused
    return llama.locate(role, TENSORS)
