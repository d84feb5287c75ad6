"""Qwen 3.5: gated delta nets, with gated attention in every fourth layer.

Also the text model of ``qwen3_5``, which sees. Of text alone, all three positions that it rotates
by are the same, so its rope is the plain one.
"""

from dataclasses import replace
from typing import Any

from edgekit.errors import UsageError
from edgekit.model.mixers import DeltaNet
from edgekit.model.norm import Norm
from edgekit.model.spec import DecoderSpec, Layer, Source
from edgekit.source.config import Config
from edgekit.source.families import _common, _rope, llama


DEFAULTS = _common.Defaults(num_kv_heads=4, head_dim=256)
SIZES = _common.sizes(
    vocab_size=248_320, hidden_size=4096, intermediate_size=12_288, layers=32, heads=16,
    context_tokens=32_768,
)  # fmt: skip
ROTATED = 0.25  # of each head; Qwen3_5TextConfig.__post_init__, transformers 5
_OF_SIGHT = ("mrope_section", "mrope_interleaved")


def describe(config: Config) -> DecoderSpec:
    """Read the text config of a Qwen 3.5."""
    # About drafting heads, and how other programs keep the state; transformers 5 reads none here.
    config.ignore("mamba_ssm_dtype", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings",
                  "language_model_only")  # fmt: skip
    config.expect(
        hidden_act="silu", attn_output_gate=True, output_gate_type="swish", mlp_only_layers=[]
    )
    head_dim = _common.read_head_width(config, DEFAULTS)
    rope = _rope.read_rope(config, head_dim, rotated=ROTATED, ignored=_OF_SIGHT)
    spec = _common.read_decoder(config, DEFAULTS, rope=rope)
    has_bias = config.get("attention_bias", default=False)
    norm = replace(spec.norm, unit_offset=True)
    attention = replace(
        spec.attention,
        query_key_norm=norm,
        has_output_gate=True,
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
    )
    net = _read_delta_net(config, epsilon=norm.epsilon)
    layers = tuple(
        Layer(mixer=net) if kind == "linear_attention" else Layer(rope=rope)
        for kind in _read_kinds(config, len(spec.layers))
    )
    return replace(spec, norm=norm, attention=attention, layers=layers)


def _read_kinds(config: Config, layers: int) -> list[str]:
    interval = config.optional_integer("full_attention_interval") or 4
    usual = [
        "linear_attention" if (index + 1) % interval else "full_attention"
        for index in range(layers)
    ]
    return _common.read_kinds(config, usual, known=("full_attention", "linear_attention"))


def _read_delta_net(config: Config, *, epsilon: float) -> DeltaNet:
    net = DeltaNet(
        key_heads=config.optional_integer("linear_num_key_heads") or 16,
        value_heads=config.optional_integer("linear_num_value_heads") or 32,
        key_head_dim=config.optional_integer("linear_key_head_dim") or 128,
        value_head_dim=config.optional_integer("linear_value_head_dim") or 128,
        taps=config.optional_integer("linear_conv_kernel_dim") or 4,
        norm=Norm(kind="rms", epsilon=epsilon),
    )
    if net.value_heads % net.key_heads:
        raise UsageError(
            f"{config.origin}: {net.value_heads} value heads (linear_num_value_heads) cannot share "
            f"{net.key_heads} key heads (linear_num_key_heads) evenly"
        )
    if net.taps < 2:
        raise UsageError(
            f"{config.origin}: linear_conv_kernel_dim = {net.taps}, expected 2 or more"
        )
    return net


def config(spec: DecoderSpec) -> dict[str, Any]:
    """Return the text config of a Qwen 3.5."""
    net = next((it.mixer for it in spec.layers if isinstance(it.mixer, DeltaNet)), None)
    fields = llama.write(spec, model_type="qwen3_5_text", architecture="Qwen3_5ForCausalLM")
    own: dict[str, Any] = {}
    if net:
        own = {
            "linear_conv_kernel_dim": net.taps,
            "linear_key_head_dim": net.key_head_dim,
            "linear_num_key_heads": net.key_heads,
            "linear_num_value_heads": net.value_heads,
            "linear_value_head_dim": net.value_head_dim,
        }
    return (
        fields
        | _rope.write_rope(spec, rotated=True)
        | own
        | {
            "attention_bias": spec.attention.has_output_bias,
            "layer_types": [
                "linear_attention" if it.mixer else "full_attention" for it in spec.layers
            ],
        }
    )


TENSORS = llama.TENSORS | {
    "delta_qkv": "linear_attn.in_proj_qkv.weight",
    "delta_gate": "linear_attn.in_proj_z.weight",
    "delta_beta": "linear_attn.in_proj_b.weight",
    "delta_alpha": "linear_attn.in_proj_a.weight",
    "delta_taps": "linear_attn.conv1d.weight",
    "delta_decay": "linear_attn.A_log",
    "delta_decay_bias": "linear_attn.dt_bias",
    "delta_norm": "linear_attn.norm.weight",
    "delta_output": "linear_attn.out_proj.weight",
}


def source(role: str, spec: DecoderSpec) -> Source:
    """Return where a weight lives."""
    del spec  # nothing is fused
    found = llama.locate(role, TENSORS)
    return replace(found, is_depthwise=role.endswith(".delta_taps"))
