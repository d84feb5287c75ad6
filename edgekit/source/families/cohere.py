"""Command R and Aya: parallel residual, LayerNorm without bias, logits scaled."""

from dataclasses import replace
from typing import Any

from edgekit.model.norm import Norm
from edgekit.model.spec import DecoderSpec, Multipliers, Source
from edgekit.source.config import Config
from edgekit.source.families import _common, llama


DEFAULTS = _common.Defaults(is_tied=True)
SIZES = _common.sizes(
    vocab_size=256_000, hidden_size=8192, intermediate_size=22_528, layers=40, heads=64,
    context_tokens=8192,
)  # fmt: skip
THETA = 500_000.0  # CohereConfig.default_theta, transformers 5


def describe(config: Config) -> DecoderSpec:
    """Read a Command R config."""
    spec = read(config, rope_theta=THETA)
    norms = spec.norm if config.get("use_qk_norm", default=False) else None
    attention = replace(
        spec.attention, query_key_norm=norms, head_norms="apart" if norms else "alike"
    )
    return replace(spec, attention=attention)


def read(config: Config, *, rope_theta: float) -> DecoderSpec:
    """Read what Command R and R7B share."""
    # Of the code they were trained with; transformers reads none of them.
    config.expect(
        use_gated_activation=True,
        use_parallel_block=True,
        use_parallel_embedding=False,
        use_embedding_sharing=True,
        position_embedding_type="rope_gptj",
        rotary_pct=1.0,
    )
    has_bias = config.get("attention_bias", default=False)
    spec = llama.read(config, DEFAULTS, rope_theta=rope_theta)
    return replace(
        spec,
        attention=replace(spec.attention, has_qkv_bias=has_bias, has_output_bias=has_bias),
        norm=Norm(kind="layer", epsilon=config.number("layer_norm_eps", 1e-5)),
        residual="parallel",
        multipliers=Multipliers(logits=config.number("logit_scale", 0.0625)),
    )


def config(spec: DecoderSpec) -> dict[str, Any]:
    """Return the Command R config of a decoder."""
    fields = write(spec, model_type="cohere", architecture="CohereForCausalLM")
    return fields | {"use_qk_norm": spec.attention.query_key_norm is not None}


def write(spec: DecoderSpec, *, model_type: str, architecture: str) -> dict[str, Any]:
    """Return the fields that `read` reads."""
    fields = llama.write(spec, model_type=model_type, architecture=architecture)
    del fields["rms_norm_eps"]
    return fields | {
        "layer_norm_eps": spec.norm.epsilon,
        "attention_bias": spec.attention.has_output_bias,
        "logit_scale": spec.multipliers.logits,
    }


def source(role: str, spec: DecoderSpec) -> Source:
    """Return where a weight lives."""
    return _common.side_by_side(llama.source(role, spec), role, spec)
