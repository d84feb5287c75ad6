"""Gemma 4 text: wider heads in the layers that see everything, and embeddings for every layer.

The last layers may read the keys and values of an earlier one of their kind. Also the text model of
``gemma4``, which sees and hears.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from edgekit.errors import UsageError
from edgekit.model.mixers import Attention
from edgekit.model.norm import Norm
from edgekit.model.spec import DecoderSpec, Layer, LayerEmbedding, Mlp, Source
from edgekit.source.config import Config
from edgekit.source.families import _common, _rope, gemma2, llama


DEFAULTS = _common.Defaults(num_kv_heads=4, head_dim=256, is_tied=True)
SIZES = _common.sizes(
    vocab_size=262_144, hidden_size=2304, intermediate_size=9216, layers=30, heads=8,
    context_tokens=131_072,
)  # fmt: skip
# What transformers 5 takes where the config is silent: Gemma4TextConfig.
FULL_HEAD_DIM = 512
ROPES: dict[str, Any] = {
    "full_attention": {
        "rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0,
    },
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}  # fmt: skip


def describe(config: Config) -> DecoderSpec:
    """Read the text config of a Gemma 4."""
    config.expect(hidden_activation="gelu_pytorch_tanh", enable_moe_block=False, num_experts=None)
    config.ignore("top_k_experts", "moe_intermediate_size")  # of the experts
    _expect_causal(config)
    spec = _common.read_decoder(config, DEFAULTS, rope=None)
    has_bias = config.get("attention_bias", default=False)
    norm = Norm(kind="rms", epsilon=spec.norm.epsilon)
    spec = replace(
        spec,
        norm=norm,
        attention=replace(
            spec.attention,
            softmax_scale=1.0,
            query_key_norm=norm,
            value_norm_epsilon=norm.epsilon,
            has_qkv_bias=has_bias,
            has_output_bias=has_bias,
        ),
        activation="gelu_tanh",
        has_post_norms=True,
        embedding_scale=spec.hidden_size**0.5,
        final_logit_softcap=config.optional_number("final_logit_softcapping"),
        layer_embedding=_read_layer_embedding(config),
        has_layer_scales=True,
    )
    return replace(spec, layers=_read_layers(config, spec))


def _expect_causal(config: Config) -> None:
    if config.text("use_bidirectional_attention") == "vision":  # images alone are not
        config.ignore("use_bidirectional_attention")
    else:
        config.expect(use_bidirectional_attention=None)


def _read_layer_embedding(config: Config) -> LayerEmbedding | None:
    rows = config.optional_integer("vocab_size_per_layer_input") or 262_144
    if config.get("hidden_size_per_layer_input", 256) == 0:
        return None
    width = config.optional_integer("hidden_size_per_layer_input") or 256
    if rows < (words := config.integer("vocab_size")):
        raise UsageError(
            f"{config.origin}: vocab_size_per_layer_input = {rows}, expected {words} or more: "
            "tokens beyond it have no embedding in the layers"
        )
    return LayerEmbedding(
        width=width,
        vocab_size=rows,
        scale=width**0.5,
        projection_scale=config.integer("hidden_size") ** -0.5,
        sum_scale=0.5**0.5,
    )


def _read_layers(config: Config, spec: DecoderSpec) -> tuple[Layer, ...]:
    kinds = _common.read_layer_kinds(config, _common.every_nth_full(config, 6))
    kinds[-1] = "full_attention"  # whatever the config says, as in transformers 5
    sliding, full = spec.attention, _read_full_attention(config, spec.attention, kinds)
    slow, fast = _rope.read_ropes_of_kinds(
        config,
        sliding.head_dim,
        full_head_dim=full.head_dim,
        full_theta=1_000_000.0,
        sliding_theta=10_000.0,
        absent=ROPES,
    )
    window = config.optional_integer("sliding_window", absent=512)
    donors = _read_donors(config, kinds)
    wide = 2 if config.get("use_double_wide_mlp", default=False) else 1
    mlp = Mlp(intermediate_size=wide * spec.intermediate_size)
    layers = []
    for layer, kind, donor in zip(
        _common.with_windows(config, spec.layers, kinds, window), kinds, donors, strict=True
    ):
        attention = full if kind == "full_attention" else sliding
        attention = replace(attention, cache_of=donor)
        layers.append(
            replace(
                layer,
                rope=slow if kind == "full_attention" else fast,
                mixer=None if attention == sliding else attention,
                mlp=mlp if wide > 1 and donor is not None else None,
            )
        )
    return tuple(layers)


def _read_full_attention(config: Config, sliding: Attention, kinds: Sequence[str]) -> Attention:
    """Return the attention of layers without a window, in either spelling of a config."""
    are_alike = config.get("attention_k_eq_v", default=False)
    head_dim = config.optional_integer("global_head_dim", absent=FULL_HEAD_DIM)
    num_kv_heads = config.optional_integer("num_global_key_value_heads")
    if "per_layer_config" in config:  # as transformers 5 saves it; the others do not count then
        head_dim, num_kv_heads = _read_overrides(config, sliding, kinds)
    elif not are_alike:
        num_kv_heads = None
    num_kv_heads = num_kv_heads or sliding.num_kv_heads
    if sliding.heads % num_kv_heads:
        raise UsageError(
            f"{config.origin}: {sliding.heads} attention heads cannot share {num_kv_heads} "
            "key and value heads evenly"
        )
    return replace(
        sliding,
        head_dim=head_dim or sliding.head_dim,
        num_kv_heads=num_kv_heads,
        values_are_keys=are_alike,
    )


def _read_overrides(
    config: Config, sliding: Attention, kinds: Sequence[str]
) -> tuple[int | None, int | None]:
    """Return what ``per_layer_config`` has for the layers without a window: head_dim, kv heads.

    Raises:
        UsageError: If two layers of a kind differ.
    """
    by_layer = config.section("per_layer_config")
    found: dict[str, set[tuple[int | None, int | None]]] = {}
    for index, kind in enumerate(kinds):
        # transformers 5 writes all of them with as many digits as the last.
        spellings = (str(index).zfill(digits) for digits in range(1, len(str(len(kinds))) + 1))
        own = by_layer.section(next(filter(by_layer.__contains__, spellings), str(index)))
        shape = own.optional_integer("head_dim"), own.optional_integer("num_key_value_heads")
        own.refuse_unread()
        found.setdefault(kind, set()).add(shape)
    by_layer.refuse_unread()
    usual = {(None, None), (sliding.head_dim, None), (sliding.head_dim, sliding.num_kv_heads)}
    full = found["full_attention"]
    if len(full) > 1 or not found.get("sliding_attention", set()) <= usual:
        raise UsageError(
            f"{by_layer.origin}: layers of one kind have heads of different shapes, expected one "
            "shape for full_attention and that of the model for sliding_attention"
        )
    return full.pop()


def _read_donors(config: Config, kinds: Sequence[str]) -> list[int | None]:
    """Return for each layer the earlier one whose keys and values it reads, None for its own."""
    shared = config.get("num_kv_shared_layers", 0)
    first = len(kinds) - shared
    if not 0 <= shared < len(kinds):
        raise UsageError(
            f"{config.origin}: num_kv_shared_layers = {shared}, expected 0 to {len(kinds) - 1}"
        )
    last = {kind: index for index, kind in enumerate(kinds[:first])}
    if missing := set(kinds[first:]) - last.keys():
        raise UsageError(
            f"{config.origin}: the last {shared} layers read the keys and values of earlier ones, "
            f"but none of the first {first} is of type {missing.pop()}"
        )
    return [None if index < first else last[kind] for index, kind in enumerate(kinds)]


def config(spec: DecoderSpec) -> dict[str, Any]:
    """Return the text config of a Gemma 4."""
    fields = _common.write_decoder(spec, model_type="gemma4_text", architecture="Gemma4ForCausalLM")
    own = spec.layer_embedding
    attentions = [a for _, _, a in spec.attentions()]
    full = [(index, a) for index, layer, a in spec.attentions() if not layer.window_tokens]
    return (
        fields
        | _common.write_layer_kinds(spec)
        | _rope.write_ropes_of_kinds(spec)
        | {
            "attention_bias": spec.attention.has_output_bias,
            "attention_k_eq_v": any(a.values_are_keys for a in attentions),
            "final_logit_softcapping": spec.final_logit_softcap,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size_per_layer_input": own.width if own else 0,
            "num_kv_shared_layers": sum(not a.has_cache for a in attentions),
            "per_layer_config": {
                str(index): {"head_dim": a.head_dim, "num_key_value_heads": a.num_kv_heads}
                for index, a in full
            },
            "use_double_wide_mlp": any(layer.mlp for layer in spec.layers),
            "vocab_size_per_layer_input": own.vocab_size if own else spec.vocab_size,
        }
    )


TENSORS = gemma2.TENSORS | {
    "layer_gate": "per_layer_input_gate.weight",
    "layer_output": "per_layer_projection.weight",
    "layer_norm": "post_per_layer_input_norm.weight",
    "layer_scale": "layer_scalar",
}
OUTER_TENSORS = llama.OUTER_TENSORS | {
    "layer_embedding": "model.embed_tokens_per_layer.weight",
    "layer_embedding_projection": "model.per_layer_model_projection.weight",
    "layer_embedding_norm": "model.per_layer_projection_norm.weight",
}


def source(role: str, spec: DecoderSpec) -> Source:
    """Return where a weight lives."""
    del spec  # nothing is fused
    return llama.locate(role, TENSORS, outer=OUTER_TENSORS)


def leftovers(spec: DecoderSpec) -> frozenset[str]:
    """Return tensors that older files hold and nothing reads."""
    return frozenset(
        f"model.layers.{index}.{TENSORS[role]}"
        for index, _, attention in spec.attentions()
        if not attention.has_cache
        for role in ("key", "value", "key_norm")
    )
