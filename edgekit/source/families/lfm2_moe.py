"""LFM2 MoE: LFM2 whose later layers have many small MLPs, of which a token takes a few."""

from dataclasses import replace
from typing import Any

from edgekit.errors import UsageError
from edgekit.model.mixers import ShortConv
from edgekit.model.norm import Norm
from edgekit.model.spec import DecoderSpec, Experts, Layer, Mlp, Source
from edgekit.source.config import Config
from edgekit.source.families import _common, _rope, lfm2, llama


DEFAULTS = lfm2.DEFAULTS
SIZES = _common.sizes(
    vocab_size=65_536, hidden_size=2048, intermediate_size=7168, layers=32, heads=32,
    context_tokens=128_000,
)  # fmt: skip
# What transformers 5 takes where the config is silent: Lfm2MoeConfig.
DENSE_LAYERS, EXPERT_SIZE = 2, 1792
EXPERTS = Experts(count=32, used=4)


def describe(config: Config) -> DecoderSpec:
    """Read an LFM2 MoE config."""
    config.ignore("output_router_logits")  # the loss of training
    config.expect(hidden_act="silu")
    head_dim = _common.read_head_width(config, DEFAULTS)
    rope = _rope.read_rope(config, head_dim, theta=lfm2.THETA)
    spec = _common.read_decoder(config, DEFAULTS, rope=rope)
    norm = Norm(kind="rms", epsilon=config.number("norm_eps", DEFAULTS.norm_epsilon))
    conv = lfm2.read_conv(config, taps=3)
    mlp, dense = read_experts(config), config.get("num_dense_layers", DENSE_LAYERS)
    kinds = lfm2.read_kinds(config, len(spec.layers))
    return replace(
        spec,
        norm=norm,
        attention=replace(spec.attention, query_key_norm=norm),
        is_tied=config.get("tie_embedding", spec.is_tied),
        layers=tuple(
            Layer(
                mixer=conv if kind == "conv" else None,
                rope=None if kind == "conv" else rope,
                mlp=mlp if index >= dense else None,
            )
            for index, kind in enumerate(kinds)
        ),
    )


def read_experts(config: Config) -> Mlp:
    """Read what stands in the place of an MLP.

    Raises:
        UsageError: If there is nothing to choose, or a token would take more than there are.
    """
    experts = Experts(
        count=config.optional_integer("num_experts") or EXPERTS.count,
        used=config.optional_integer("num_experts_per_tok") or EXPERTS.used,
        has_bias=config.get("use_expert_bias", default=True),
        normalizes=config.get("norm_topk_prob", default=True),
        scale=config.number("routed_scaling_factor", EXPERTS.scale),
    )
    if experts.count < 2:
        raise UsageError(f"{config.origin}: num_experts = {experts.count}, expected 2 or more")
    if experts.used > experts.count:
        raise UsageError(
            f"{config.origin}: num_experts_per_tok = {experts.used}, expected 1 to num_experts = "
            f"{experts.count}"
        )
    width = config.optional_integer("moe_intermediate_size") or EXPERT_SIZE
    return Mlp(intermediate_size=width, experts=experts)


def config(spec: DecoderSpec) -> dict[str, Any]:
    """Return the LFM2 MoE config of a decoder."""
    mlps = [layer.mlp for layer in spec.layers]
    dense = sum(mlp is None for mlp in mlps)
    mlp = next((it for it in mlps if it), Mlp(intermediate_size=EXPERT_SIZE, experts=EXPERTS))
    experts = mlp.experts or EXPERTS
    fields = _common.write_decoder(
        spec, model_type="lfm2_moe", architecture="Lfm2MoeForCausalLM", epsilon="norm_eps"
    )
    return (
        fields
        | _rope.write_rope(spec)
        | lfm2.write_conv(spec)
        | {
            "layer_types": [
                "conv" if isinstance(layer.mixer, ShortConv) else "full_attention"
                for layer in spec.layers
            ],
            "moe_intermediate_size": mlp.intermediate_size,
            "norm_topk_prob": experts.normalizes,
            "num_dense_layers": dense,
            "num_experts": experts.count,
            "num_experts_per_tok": experts.used,
            "routed_scaling_factor": experts.scale,
            "use_expert_bias": experts.has_bias,
        }
    )


TENSORS = lfm2.TENSORS | {
    "router": "feed_forward.gate.weight",
    "expert_bias": "feed_forward.expert_bias",
}
# Files have a tensor for each matrix of each expert; transformers joins them when it loads them.
_OF_AN_EXPERT = {"expert_gate": "w1", "expert_up": "w3", "expert_down": "w2"}


def source(role: str, spec: DecoderSpec) -> Source:
    """Return where a weight lives."""
    prefix, _, part = role.rpartition(".")
    if part in _OF_AN_EXPERT:
        layer = int(prefix.removeprefix("layers."))
        experts = spec.mlp(layer).experts or EXPERTS
        first, *others = (
            f"model.{prefix}.feed_forward.experts.{index}.{_OF_AN_EXPERT[part]}.weight"
            for index in range(experts.count)
        )
        return Source(first, siblings=tuple(others))
    found = llama.locate(role, TENSORS, outer=lfm2.OUTER_TENSORS)
    return replace(found, is_depthwise=role.endswith(".conv_taps"))
