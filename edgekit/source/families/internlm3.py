"""InternLM 3: a Llama with its own names of two settings."""

from typing import Any

from edgekit.errors import UsageError
from edgekit.model.spec import DecoderSpec
from edgekit.source.config import Config
from edgekit.source.families import _common, llama


DEFAULTS = _common.Defaults(num_kv_heads=2, head_dim=128, norm_epsilon=1e-5)
SIZES = _common.sizes(
    vocab_size=128_512, hidden_size=4096, intermediate_size=10_240, layers=48, heads=32,
    context_tokens=32_768,
)  # fmt: skip

source = llama.source


def describe(config: Config) -> DecoderSpec:
    """Read an InternLM 3 config.

    Raises:
        UsageError: If biases are on some projections only: transformers refuses it, too.
    """
    config.accept(attention_bias="qkv_bias", mlp_bias="bias")
    spec = llama.read_biased(config, DEFAULTS)
    if spec.attention.has_qkv_bias != spec.has_mlp_bias:
        raise UsageError(
            f"{config.origin}: qkv_bias = {spec.attention.has_qkv_bias} and bias = "
            f"{spec.has_mlp_bias}; InternLM 3 is read with both or with neither"
        )
    return spec


def config(spec: DecoderSpec) -> dict[str, Any]:
    """Return the InternLM 3 config of a decoder, as transformers 5 saves it."""
    return llama.config(spec) | {"model_type": "internlm3"}
