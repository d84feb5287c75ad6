"""StableLM 2: layer norms and heads that rotate in part; 12B: head norms, parallel residual."""

from dataclasses import replace
from typing import Any

from edgekit.model.norm import Norm
from edgekit.model.spec import DecoderSpec, Source
from edgekit.source.config import Config
from edgekit.source.families import _common, _rope, llama


DEFAULTS = _common.Defaults(num_kv_heads=32)
SIZES = _common.sizes(
    vocab_size=50_304, hidden_size=2560, intermediate_size=6912, layers=32, heads=32,
    context_tokens=4096,
)  # fmt: skip
TENSORS = llama.TENSORS | {
    "attention_norm_bias": "input_layernorm.bias",
    "mlp_norm_bias": "post_attention_layernorm.bias",
}


def describe(config: Config) -> DecoderSpec:
    """Read a StableLM config."""
    config.expect(hidden_act="silu")
    head_dim = _common.read_head_width(config, DEFAULTS)
    rope = _rope.read_rope(config, head_dim, rotated=0.25)
    spec = _common.read_decoder(config, DEFAULTS, rope=rope)
    epsilon = config.number("layer_norm_eps", 1e-5)
    has_head_norms = config.get("qk_layernorm", default=False)
    attention = replace(
        spec.attention,
        has_qkv_bias=config.get("use_qkv_bias", default=False),
        query_key_norm=Norm(kind="layer", epsilon=epsilon) if has_head_norms else None,
        head_norms="apart" if has_head_norms else "alike",
    )
    return replace(
        spec,
        attention=attention,
        norm=Norm(kind="layer", epsilon=epsilon, has_bias=True),
        residual="parallel" if config.get("use_parallel_residual", default=False) else "serial",
    )


def config(spec: DecoderSpec) -> dict[str, Any]:
    """Return the StableLM config of a decoder."""
    fields = _common.write_decoder(spec, model_type="stablelm", architecture="StableLmForCausalLM")
    del fields["head_dim"], fields["rms_norm_eps"]
    return (
        fields
        | _rope.write_rope(spec, rotated=True)
        | {
            "hidden_act": "silu",
            "layer_norm_eps": spec.norm.epsilon,
            "qk_layernorm": spec.attention.query_key_norm is not None,
            "use_qkv_bias": spec.attention.has_qkv_bias,
            "use_parallel_residual": spec.residual == "parallel",
        }
    )


def source(role: str, spec: DecoderSpec) -> Source:
    """Return where a weight lives; the norms of heads are a tensor for each head."""
    layer, _, part = role.rpartition(".")
    heads = {"query_norm": spec.attention.heads, "key_norm": spec.attention.num_kv_heads}
    if part not in heads:
        return llama.locate(role, TENSORS)
    norm = f"model.{layer}.self_attn.{part[0]}_layernorm"
    first, *others = (f"{norm}.norms.{head}.weight" for head in range(heads[part]))
    return Source(first, siblings=tuple(others))
