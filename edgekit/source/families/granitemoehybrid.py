"""Granite 4.0 without experts and Mamba (350M, 1B, Micro): a Granite that may have no positions."""

from dataclasses import replace
from typing import Any

from edgekit.errors import UsageError
from edgekit.model.spec import DecoderSpec, Source
from edgekit.source.config import Config
from edgekit.source.families import _common, granite, llama


SIZES = granite.SIZES
# What only layers of Mamba and experts read, and how weights began.
_OF_OTHER_LAYERS = (
    "init_method", "mamba_chunk_size", "mamba_conv_bias", "mamba_d_conv", "mamba_d_head",
    "mamba_d_state",
    "mamba_expand", "mamba_n_groups", "mamba_n_heads", "mamba_proj_bias", "normalization_function",
    "num_experts_per_tok", "output_router_logits", "router_aux_loss_coef", "time_step_limit",
)  # fmt: skip


def describe(config: Config) -> DecoderSpec:
    """Read a config of Granite 4.0.

    Raises:
        UsageError: If it has experts or layers of Mamba, or positions of an unknown kind.
    """
    config.accept(layer_types="layers_block_type")
    config.ignore(*_OF_OTHER_LAYERS)
    config.expect(mlp_bias=False)
    experts = config.get("num_local_experts", 8)
    if experts:
        raise UsageError(
            f"{config.origin}: num_local_experts = {experts}, and models of experts are not "
            "supported",
            hint="Granite 4.0 350M, 1B and Micro have none",
        )
    spec = granite.describe(config)
    _refuse_mamba(config, len(spec.layers))
    if config.get("position_embedding_type", "nope") == "nope":
        spec = replace(spec, layers=tuple(replace(layer, rope=None) for layer in spec.layers))
    else:
        config.expect(position_embedding_type="rope")
    return replace(spec, intermediate_size=config.integer("shared_intermediate_size"))


def _refuse_mamba(config: Config, layers: int) -> None:
    kinds = config.get("layer_types", list[Any]()) or ["mamba"] * layers
    if len(kinds) != layers:
        raise UsageError(
            f"{config.origin}: layer_types names {len(kinds)} layers, the model has {layers}"
        )
    others = [kind for kind in kinds if kind not in {"attention", "full_attention"}]
    if others:
        raise UsageError(
            f"{config.origin}: layer_types has {others[0]!r} in {len(others)} of {layers} layers, "
            "and only layers of attention are supported",
            hint="Granite 4.0 350M, 1B and Micro have no others; those named H have",
        )


def config(spec: DecoderSpec) -> dict[str, Any]:
    """Return the Granite 4.0 config of a decoder."""
    has_rope = any(layer.rope for layer in spec.layers)
    fields = granite.config(spec)
    del fields["mlp_bias"]
    return fields | {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "model_type": "granitemoehybrid",
        "shared_intermediate_size": spec.intermediate_size,
        "layer_types": ["full_attention"] * len(spec.layers),
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "position_embedding_type": "rope" if has_rope else "nope",
        "mamba_n_heads": 1,
        "mamba_d_head": 2 * spec.hidden_size,  # transformers checks the product
    }


TENSORS = llama.TENSORS | {"down": "shared_mlp.output_linear.weight"}


def source(role: str, spec: DecoderSpec) -> Source:
    """Return where a weight lives: the shared expert is the MLP, gate and up in one tensor."""
    fused = _common.fused_mlp(role, spec, tensor="shared_mlp.input_linear")
    return fused or llama.locate(role, TENSORS)
