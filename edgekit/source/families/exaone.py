"""EXAONE 3.0 and 3.5: a Llama under other names."""

from typing import Any

from edgekit.model.spec import DecoderSpec, Source
from edgekit.source.config import Config
from edgekit.source.families import _common, llama


DEFAULTS = _common.Defaults(num_kv_heads=8, norm_epsilon=1e-5)
SIZES = _common.sizes(
    vocab_size=102_400, hidden_size=4096, intermediate_size=14_336, layers=32, heads=32,
    context_tokens=4096,
)  # fmt: skip
THETA = 500_000.0  # ExaoneConfig.default_theta, transformers 5
TENSORS = {
    "attention_norm": "ln_1.weight",
    "query": "attn.attention.q_proj.weight",
    "key": "attn.attention.k_proj.weight",
    "value": "attn.attention.v_proj.weight",
    "attention_output": "attn.attention.out_proj.weight",
    "query_bias": "attn.attention.q_proj.bias",
    "key_bias": "attn.attention.k_proj.bias",
    "value_bias": "attn.attention.v_proj.bias",
    "attention_output_bias": "attn.attention.out_proj.bias",
    "mlp_norm": "ln_2.weight",
    "gate": "mlp.c_fc_0.weight",
    "up": "mlp.c_fc_1.weight",
    "down": "mlp.c_proj.weight",
    "gate_bias": "mlp.c_fc_0.bias",
    "up_bias": "mlp.c_fc_1.bias",
    "down_bias": "mlp.c_proj.bias",
}
OUTER_TENSORS = {
    "token_embedding": "transformer.wte.weight",
    "final_norm": "transformer.ln_f.weight",
    "output_head": "lm_head.weight",
}


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


def source(role: str, spec: DecoderSpec) -> Source:
    """Return where a weight lives."""
    del spec  # nothing is fused
    return llama.locate(role, TENSORS, outer=OUTER_TENSORS, layers="transformer.h")
