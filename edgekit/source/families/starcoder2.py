"""StarCoder 2: LayerNorm, no gate, biases, and one window for all layers."""

from dataclasses import replace
from typing import Any

from edgekit.model.norm import Norm
from edgekit.model.spec import DecoderSpec, Source
from edgekit.source.config import Config
from edgekit.source.families import _common, _rope, llama, stablelm


DEFAULTS = _common.Defaults(num_kv_heads=2, is_tied=True)
SIZES = _common.sizes(
    vocab_size=49_152, hidden_size=3072, intermediate_size=12_288, layers=30, heads=24,
    context_tokens=4096,
)  # fmt: skip
TENSORS = stablelm.TENSORS | {
    "up": "mlp.c_fc.weight",
    "up_bias": "mlp.c_fc.bias",
    "down": "mlp.c_proj.weight",
    "down_bias": "mlp.c_proj.bias",
}


def describe(config: Config) -> DecoderSpec:
    """Read a StarCoder 2 config."""
    config.expect(
        hidden_act="gelu_pytorch_tanh", mlp_type="default", norm_type="layer_norm",
        scale_attn_weights=True,
    )  # fmt: skip
    # Said twice in the published files; transformers reads the other spelling. The rest are of
    # training, and of how scores were rounded then.
    config.ignore(
        "activation_function", "attention_softmax_in_fp32", "embedding_dropout",
        "layer_norm_epsilon", "residual_dropout", "scale_attention_softmax_in_fp32",
    )  # fmt: skip
    has_bias = config.get("use_bias", default=True)
    rope = _rope.read_rope(config, _common.read_head_width(config, DEFAULTS))
    spec = _common.read_decoder(config, DEFAULTS, rope=rope)
    window = config.optional_integer("sliding_window")
    return replace(
        spec,
        attention=replace(spec.attention, has_qkv_bias=has_bias, has_output_bias=has_bias),
        norm=Norm(kind="layer", epsilon=config.number("norm_epsilon", 1e-5), has_bias=True),
        activation="gelu_tanh",
        is_gated=False,
        has_mlp_bias=has_bias,
        layers=tuple(replace(layer, window_tokens=window) for layer in spec.layers),
    )


def config(spec: DecoderSpec) -> dict[str, Any]:
    """Return the StarCoder 2 config of a decoder."""
    fields = _common.write_decoder(
        spec, model_type="starcoder2", architecture="Starcoder2ForCausalLM", epsilon="norm_epsilon"
    )
    return (
        fields
        | _rope.write_rope(spec)
        | {
            "hidden_act": "gelu_pytorch_tanh",
            "sliding_window": spec.layers[0].window_tokens,
            "use_bias": spec.has_mlp_bias,
        }
    )


def source(role: str, spec: DecoderSpec) -> Source:
    """Return where a weight lives."""
    del spec  # nothing is fused
    return llama.locate(role, TENSORS)
