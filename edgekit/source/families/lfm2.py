"""LFM2 and LFM2.5: short convolutions, with attention in some of the layers."""

from dataclasses import replace
from typing import Any

from edgekit.errors import UsageError
from edgekit.model.mixers import ShortConv
from edgekit.model.norm import Norm
from edgekit.model.spec import DecoderSpec, Layer, Source
from edgekit.source.config import Config
from edgekit.source.families import _common, _rope, llama


DEFAULTS = _common.Defaults(num_kv_heads=8, is_tied=True, norm_epsilon=1e-5)
SIZES = _common.sizes(
    vocab_size=65_536, hidden_size=2560, intermediate_size=12_288, layers=32, heads=32,
    context_tokens=128_000,
)  # fmt: skip
THETA = 1_000_000.0  # Lfm2Config.default_theta, transformers 5
# Written by the tool that trains them; transformers 5 reads none.
_LEFT_BEHIND = (
    "block_dim", "block_mlp_init_scale", "block_norm_eps", "block_out_init_scale",
    "block_use_xavier_init", "conv_dim", "conv_dim_out", "conv_use_xavier_init", "num_heads",
    "theta",
)  # fmt: skip


def describe(config: Config) -> DecoderSpec:
    """Read an LFM2 config."""
    config.ignore(*_LEFT_BEHIND)
    config.expect(hidden_act="silu", block_use_swiglu=True, use_pos_enc=True)
    if "intermediate_size" not in config:
        config.accept(intermediate_size="block_ff_dim")
    head_dim = _common.read_head_width(config, DEFAULTS)
    rope = _rope.read_rope(config, head_dim, theta=THETA)
    spec = _common.read_decoder(config, DEFAULTS, rope=rope)
    norm = Norm(kind="rms", epsilon=config.number("norm_eps", DEFAULTS.norm_epsilon))
    conv = read_conv(config, taps=3)
    kinds = read_kinds(config, len(spec.layers))
    return replace(
        spec,
        norm=norm,
        attention=replace(spec.attention, query_key_norm=norm),
        intermediate_size=_read_intermediate_size(config),
        is_tied=config.get("tie_embedding", spec.is_tied),
        layers=tuple(Layer(mixer=conv) if kind == "conv" else Layer(rope=rope) for kind in kinds),
    )


def read_conv(config: Config, *, taps: int) -> ShortConv:
    """Read the convolutions; ``taps`` where the config does not say.

    Raises:
        UsageError: If they would see one token only.
    """
    conv = ShortConv(
        taps=config.optional_integer("conv_L_cache") or taps,
        has_bias=config.get("conv_bias", default=False),
    )
    if conv.taps < 2:
        raise UsageError(f"{config.origin}: conv_L_cache = {conv.taps}, expected 2 or more")
    return conv


def write_conv(spec: DecoderSpec) -> dict[str, Any]:
    """Return the fields that `read_conv` reads."""
    conv = next((it.mixer for it in spec.layers if isinstance(it.mixer, ShortConv)), None)
    return {"conv_L_cache": conv.taps, "conv_bias": conv.has_bias} if conv else {}


def read_kinds(config: Config, layers: int) -> list[str]:
    """Return each layer's kind; the first configs said which layers attend, or none: all do."""
    attends = config.get("full_attn_idxs", list(range(layers)))
    usual = ["full_attention" if index in attends else "conv" for index in range(layers)]
    return _common.read_kinds(config, usual, known=("full_attention", "conv"))


def _read_intermediate_size(config: Config) -> int:
    """Return how wide the MLP is, which is two thirds of what the config calls so."""
    size = config.optional_integer("block_ff_dim") or config.integer("intermediate_size")
    multiple = config.optional_integer("block_multiple_of") or 256
    multiplier = config.optional_number("block_ffn_dim_multiplier", absent=1.0)
    if not config.get("block_auto_adjust_ff_dim", default=True):
        return size
    size = int(2 * size / 3)
    if multiplier is None:
        return size
    return -(-int(multiplier * size) // multiple) * multiple


def config(spec: DecoderSpec) -> dict[str, Any]:
    """Return the LFM2 config of a decoder."""
    fields = _common.write_decoder(
        spec, model_type="lfm2", architecture="Lfm2ForCausalLM", epsilon="norm_eps"
    )
    kinds = ["conv" if isinstance(it.mixer, ShortConv) else "full_attention" for it in spec.layers]
    return (
        fields
        | _rope.write_rope(spec)
        | {
            "block_auto_adjust_ff_dim": False,
            "layer_types": kinds,
        }
        | write_conv(spec)
    )


TENSORS = {
    "attention_norm": "operator_norm.weight",
    "conv_in": "conv.in_proj.weight",
    "conv_in_bias": "conv.in_proj.bias",
    "conv_taps": "conv.conv.weight",
    "conv_taps_bias": "conv.conv.bias",
    "conv_output": "conv.out_proj.weight",
    "conv_output_bias": "conv.out_proj.bias",
    "query": "self_attn.q_proj.weight",
    "key": "self_attn.k_proj.weight",
    "value": "self_attn.v_proj.weight",
    "query_norm": "self_attn.q_layernorm.weight",
    "key_norm": "self_attn.k_layernorm.weight",
    "attention_output": "self_attn.out_proj.weight",
    "mlp_norm": "ffn_norm.weight",
    "gate": "feed_forward.w1.weight",
    "up": "feed_forward.w3.weight",
    "down": "feed_forward.w2.weight",
}
# Applied last, whatever its name says.
OUTER_TENSORS = llama.OUTER_TENSORS | {"final_norm": "model.embedding_norm.weight"}


def source(role: str, spec: DecoderSpec) -> Source:
    """Return where a weight lives."""
    del spec  # nothing is fused
    found = llama.locate(role, TENSORS, outer=OUTER_TENSORS)
    return replace(found, is_depthwise=role.endswith(".conv_taps"))
