"""EXAONE 3.0 and 3.5: a Llama under other names."""

from typing import Any

from edgekit.model.spec import DecoderSpec
from edgekit.source.config import Config
from edgekit.source.families import _common, llama


DEFAULTS = _common.Defaults(num_kv_heads=8, norm_epsilon=1e-5)
SIZES = _common.sizes(
    vocab_size=102_400, hidden_size=4096, intermediate_size=14_336, layers=32, heads=32,
    context_tokens=4096,
)  # fmt: skip
THETA = 500_000.0  # ExaoneConfig.default_theta, transformers 5
# transformers 5 saves these names, those of the code next to the first checkpoints, and has a
# Llama's in memory, which adapters that were trained there have.
STORED_NAMES = {
    "model.embed_tokens.": "transformer.wte.",
    "model.layers.": "transformer.h.",
    "model.norm.": "transformer.ln_f.",
    ".self_attn.o_proj.": ".attn.attention.out_proj.",
    ".self_attn.": ".attn.attention.",
    ".input_layernorm.": ".ln_1.",
    ".post_attention_layernorm.": ".ln_2.",
    ".mlp.gate_proj.": ".mlp.c_fc_0.",
    ".mlp.up_proj.": ".mlp.c_fc_1.",
    ".mlp.down_proj.": ".mlp.c_proj.",
}

source = llama.source


def describe(config: Config) -> DecoderSpec:
    """Read an EXAONE config, of transformers 5 or of the code next to the first checkpoints."""
    config.accept(
        num_hidden_layers="num_layers",
        rms_norm_eps="layer_norm_epsilon",
        hidden_act="activation_function",
    )
    config.ignore("embed_dropout")
    return llama.read_biased(config, DEFAULTS, rope_theta=THETA)


def config(spec: DecoderSpec) -> dict[str, Any]:
    """Return the EXAONE config of a decoder, as transformers 5 saves it: its class is Llama's."""
    return llama.config(spec) | {"model_type": "exaone"}
