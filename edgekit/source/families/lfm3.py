"""LFM3: LFM2 with windows, norms on both sides, and a gate for every head."""

from dataclasses import replace
from typing import Any

from edgekit.model.mixers import ShortConv
from edgekit.model.norm import Norm
from edgekit.model.spec import DecoderSpec, Layer, Source
from edgekit.source.config import Config
from edgekit.source.families import _common, _rope, lfm2, llama


DEFAULTS = _common.Defaults(num_kv_heads=4, head_dim=128, is_tied=True, norm_epsilon=1e-5)
SIZES = _common.sizes(
    vocab_size=128_000, hidden_size=2048, intermediate_size=7680, layers=24, heads=16,
    context_tokens=128_000,
)  # fmt: skip
# What transformers 5 takes where the config is silent: Lfm3Config.
ROPES: dict[str, Any] = {
    "full_attention": {
        "rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1_000_000.0,
    },
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}  # fmt: skip
WINDOW_TOKENS = 256
KINDS = ("full_attention", "sliding_attention", "conv")
# In memory, and in files: the gate of the heads.
STORED_NAMES = {".self_attn.g_proj.": ".self_attn.gate_proj."}


def describe(config: Config) -> DecoderSpec:
    """Read an LFM3 config."""
    config.expect(hidden_act="silu")
    spec = _common.read_decoder(config, DEFAULTS, rope=None)
    norm = Norm(kind="rms", epsilon=config.number("norm_eps", DEFAULTS.norm_epsilon))
    has_bias = config.get("attention_bias", default=False)
    attention = replace(
        spec.attention,
        query_key_norm=norm,
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
        has_head_gate=config.get("use_attention_gate", default=True),
    )
    return replace(
        spec,
        norm=norm,
        attention=attention,
        has_post_norms=config.get("use_sandwich_norm", default=True),
        layers=_read_layers(config, spec),
    )


def _read_layers(config: Config, spec: DecoderSpec) -> tuple[Layer, ...]:
    conv = lfm2.read_conv(config, taps=7)
    slow, fast = _rope.read_ropes_of_kinds(
        config,
        spec.attention.head_dim,
        full_theta=1_000_000.0,
        sliding_theta=1_000_000.0,
        absent=ROPES,
    )
    window = config.optional_integer("sliding_window", absent=WINDOW_TOKENS)
    by_kind = {
        "conv": Layer(mixer=conv),
        "full_attention": Layer(rope=slow),
        "sliding_attention": Layer(rope=fast, window_tokens=window),
    }
    usual = [_usual_kind(index) for index in range(len(spec.layers))]
    return tuple(by_kind[kind] for kind in _common.read_kinds(config, usual, known=KINDS))


def _usual_kind(index: int) -> str:
    if index % 4 == 2:
        return "full_attention"
    return "sliding_attention" if index % 4 == 0 and index else "conv"


def config(spec: DecoderSpec) -> dict[str, Any]:
    """Return the LFM3 config of a decoder."""
    fields = _common.write_decoder(
        spec, model_type="lfm3", architecture="Lfm3ForCausalLM", epsilon="norm_eps"
    )
    return (
        fields
        | _rope.write_ropes_of_kinds(spec)
        | lfm2.write_conv(spec)
        | {
            "attention_bias": spec.attention.has_output_bias,
            "layer_types": [
                "conv" if isinstance(layer.mixer, ShortConv)
                else "sliding_attention" if layer.window_tokens else "full_attention"
                for layer in spec.layers
            ],
            "sliding_window": next(
                (layer.window_tokens for layer in spec.layers if layer.window_tokens), None
            ),
            "use_attention_gate": spec.attention.has_head_gate,
            "use_sandwich_norm": spec.has_post_norms,
        }
    )  # fmt: skip


TENSORS = lfm2.TENSORS | {
    "query_norm": "self_attn.q_norm.weight",
    "key_norm": "self_attn.k_norm.weight",
    "query_bias": "self_attn.q_proj.bias",
    "key_bias": "self_attn.k_proj.bias",
    "value_bias": "self_attn.v_proj.bias",
    "head_gate": "self_attn.g_proj.weight",
    "attention_output": "self_attn.o_proj.weight",
    "attention_output_bias": "self_attn.o_proj.bias",
    "attention_post_norm": "post_operator_norm.weight",
    "mlp_post_norm": "post_ffn_norm.weight",
}


def source(role: str, spec: DecoderSpec) -> Source:
    """Return where a weight lives."""
    del spec  # nothing is fused
    found = llama.locate(role, TENSORS, outer=lfm2.OUTER_TENSORS)
    return replace(found, is_depthwise=role.endswith(".conv_taps"))
