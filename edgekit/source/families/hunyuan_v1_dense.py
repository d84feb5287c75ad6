"""HunYuan dense: a Llama that normalizes queries and keys once they are rotated."""

from dataclasses import replace
from typing import Any

from edgekit.model.rope import Rope
from edgekit.model.spec import DecoderSpec, Source
from edgekit.source.config import Config
from edgekit.source.families import _common, _rope, llama


DEFAULTS = _common.Defaults(norm_epsilon=1e-5)
SIZES = _common.sizes(
    vocab_size=290_943, hidden_size=4096, intermediate_size=11_008, layers=32, heads=32,
    context_tokens=2048,
)  # fmt: skip
TENSORS = llama.TENSORS | {
    "query_norm": "self_attn.query_layernorm.weight",
    "key_norm": "self_attn.key_layernorm.weight",
}

# Of the larger models that this one is cut from; transformers reads none of them. Layers share keys
# by ``cla_share_factor`` only with ``use_cla``.
_NEUTRAL = (
    "cla_share_factor", "class_num", "dense_list", "eod_token_id", "im_end_id", "im_newline_id",
    "im_start_id", "mask_init_id", "num_media_embeds", "org_vocab_size", "pad_id", "pool_type",
    "skip_cls_token", "text_end_id", "text_start_id", "video_end_id", "video_start_id",
)  # fmt: skip


def describe(config: Config) -> DecoderSpec:
    """Read a HunYuan config."""
    config.ignore(*_NEUTRAL)
    config.expect(
        add_classification_head=False, hidden_act="silu", mlp_bias=False, norm_type="rms",
        use_cla=False, use_qk_norm=True, use_rotary_pos_emb=True,
    )  # fmt: skip
    has_bias = config.get("attention_bias", default=False)
    head_dim = _common.read_head_width(config, DEFAULTS)
    config.expect(attention_head_dim=head_dim)
    spec = _common.read_decoder(config, DEFAULTS, rope=_read_rope(config, head_dim))
    attention = replace(
        spec.attention,
        query_key_norm=spec.norm,
        normalizes_after_rope=True,
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
    )
    return replace(spec, attention=attention)


def _read_rope(config: Config, head_dim: int) -> Rope:
    """Read a rope whose ``alpha`` stretches theta once and for all.

    Source: ``compute_ntk_alpha_rope_parameters`` in modeling_hunyuan_v1_dense.py of transformers
    5.24.
    """
    fields = _rope.section(config)
    alpha = fields.optional_number("alpha")
    if alpha is None or _rope.kind(fields) != "dynamic" or head_dim <= 2:
        return _rope.read_rope(config, head_dim, ignored=("alpha",) if alpha is None else ())
    fields.ignore("beta_fast", "beta_slow", "factor", "mscale", "mscale_all_dim")
    theta = fields.number("rope_theta", config.number("rope_theta", 10_000.0))
    fields.refuse_unread()
    return Rope(width=head_dim, theta=theta * alpha ** (head_dim / (head_dim - 2)))


def config(spec: DecoderSpec) -> dict[str, Any]:
    """Return the HunYuan config of a decoder."""
    fields = llama.write(
        spec, model_type="hunyuan_v1_dense", architecture="HunYuanDenseV1ForCausalLM"
    )
    return fields | {"attention_bias": spec.attention.has_output_bias}


def source(role: str, spec: DecoderSpec) -> Source:
    """Return where a weight lives."""
    del spec  # nothing is fused
    return llama.locate(role, TENSORS)
