"""Helium: a Llama that rotates neighbouring channels together, with fine norms."""

from dataclasses import replace
from typing import Any

from edgekit.errors import UsageError
from edgekit.model.spec import DecoderSpec
from edgekit.source.config import Config
from edgekit.source.families import _common, ernie4_5, llama


DEFAULTS = _common.Defaults(num_kv_heads=20, head_dim=128, norm_epsilon=1e-8)
SIZES = _common.sizes(
    vocab_size=48_000, hidden_size=2560, intermediate_size=7040, layers=24, heads=20,
    context_tokens=4096,
)  # fmt: skip
THETA = 100_000.0  # HeliumConfig.default_theta, transformers 5

source = ernie4_5.source


def describe(config: Config) -> DecoderSpec:
    """Read a Helium config.

    Raises:
        UsageError: If all heads together are not as wide as the hidden state.
    """
    has_bias = config.get("attention_bias", default=False)
    spec = llama.read(config, DEFAULTS, rope_theta=THETA)
    if spec.attention.query_width != spec.hidden_size:
        raise UsageError(
            f"{config.origin}: {spec.attention.heads} heads of head_dim = "
            f"{spec.attention.head_dim} are not hidden_size = {spec.hidden_size} wide"
        )
    return replace(
        spec,
        attention=replace(spec.attention, has_qkv_bias=has_bias),
        has_mlp_bias=config.get("mlp_bias", default=False),
    )


def config(spec: DecoderSpec) -> dict[str, Any]:
    """Return the Helium config of a decoder."""
    fields = llama.write(spec, model_type="helium", architecture="HeliumForCausalLM")
    biases = {"attention_bias": spec.attention.has_qkv_bias, "mlp_bias": spec.has_mlp_bias}
    return fields | biases
