"""Which of llama.cpp's graphs computes a decoder, and how its metadata say what it is."""

import json
import math
import struct
from dataclasses import replace
from typing import Any

import pytest

from edgekit.errors import UsageError
from edgekit.formats.gguf import architectures, conversion, facts, hyperparameters, memory, parts
from edgekit.formats.gguf.facts import Facts
from edgekit.model.norm import Norm
from edgekit.model.rope import LinearScaling, LongRopeScaling, Rope
from edgekit.model.spec import Multipliers, Pairs
from edgekit.source import families, published
from edgekit.source.config import Config
from edgekit.source.made_tensors import PairOrder
from edgekit.tests.tiny import checkpoints
from edgekit.tests.tiny.adapters import Given
from edgekit.tests.tiny.checkpoints import TINY, find_case


GRAPHS = {  # of each family
    "apertus": "apertus", "arcee": "arcee", "cohere": "command-r", "cohere2": "cohere2",
    "ernie4_5": "ernie4_5", "exaone": "exaone", "exaone4": "exaone4", "gemma": "gemma",
    "gemma2": "gemma2", "gemma3_text": "gemma3", "glm": "chatglm", "glm4": "glm4",
    "granite": "granite", "granitemoehybrid": "granite", "helium": "llama",
    "gemma4_text": "gemma4", "lfm2": "lfm2", "lfm2_moe": "lfm2moe", "qwen3_5_text": "qwen35",
    "hunyuan_v1_dense": "hunyuan-dense", "hyperclovax": "glm4", "internlm3": "llama",
    "jais2": "jais2", "llama": "llama", "ministral": "llama", "ministral3": "mistral3",
    "mistral": "llama", "nemotron": "nemotron", "olmo2": "olmo2", "olmo3": "olmo2", "phi": "phi2",
    "phi3": "phi3", "qwen2": "qwen2", "qwen3": "qwen3", "seed_oss": "llama", "smollm3": "smollm3",
    "stablelm": "stablelm", "starcoder2": "starcoder2", "vaultgemma": "gemma",
}  # fmt: skip
OTHER_GRAPHS = {
    "smollm3-pattern": "granite_swa", "hyperclovax-pre-norms": "llama", "ernie4.5-bias": "llama",
}  # fmt: skip
HAVE_NO_GRAPH = {
    "exaone4-windows": "layer 3 without positions in 5 layers, but only in 64",
    "glm": "4 heads of width 24 in 64 columns",
    "nemotron": "4 heads of width 24 in 64 columns",
    "cohere-norms": "norms on queries and keys in fewer than 64 layers",
    "vaultgemma": "no post norms",
    "lfm2-bias": "short convolutions with bias",
    "lfm3": "norms after attention and MLP; layers that are short convolutions",
    "qwen3.5-pattern": "norms with epsilon 1e-05",
    "gemma4-other-donors": "from layer 3 to the layers with a window and from 4 to the others",
}
LONG = {"original_max_position_embeddings": 4096, "max_position_embeddings": 131072}


def describe(name, **fields):
    """Return the spec of a tiny case, from its config alone."""
    case = find_case(name)
    config = checkpoints._SIZES | {"vocab_size": 96} | dict(case.fields) | fields
    return families.get(case.model_type).describe(
        Config(json.loads(json.dumps(config)), origin=name)
    )


def change_layers(spec, **changes):
    return replace(spec, layers=tuple(replace(layer, **changes) for layer in spec.layers))


def change_ropes(spec, change, *, only_local=False):
    return replace(
        spec,
        layers=tuple(
            replace(layer, rope=change(layer.rope))
            if layer.rope and (layer.window_tokens or not only_local)
            else layer
            for layer in spec.layers
        ),
    )


def scale(rope):
    return replace(rope, scaling=LinearScaling(factor=2.0))


# The choice


@pytest.mark.parametrize("name", TINY.keys() - HAVE_NO_GRAPH)
def test_a_family_goes_to_its_own_graph(name):
    spec, model_type = describe(name), TINY[name].model_type
    graph = architectures.choose(spec, family=model_type)
    assert graph.name == OTHER_GRAPHS.get(name, GRAPHS[model_type])
    assert list(graph.refusals(spec)) == []
    assert list(architectures.choose(spec).refusals(spec)) == []
    assert architectures.get(graph.name) is graph


def test_a_phi_that_is_a_llama_too_takes_the_graph_of_its_name():
    spec = describe("phi3")
    assert architectures.choose(spec).name == "llama"
    assert architectures.choose(spec, family="phi3").name == "phi3"


def test_every_family_has_a_graph():
    assert GRAPHS.keys() == set(families.names()) - {"lfm3"}  # which llama.cpp does not know


@pytest.mark.parametrize("name", HAVE_NO_GRAPH)
def test_a_decoder_that_no_graph_computes_is_refused(name):
    with pytest.raises(UsageError, match=HAVE_NO_GRAPH[name]) as refusal:
        architectures.choose(describe(name), family=TINY[name].model_type)
    assert "--format" in refusal.value.hint


def test_every_published_model_but_one_has_a_graph_and_its_whole_context():
    refused, limits = [], {}
    for name, model in published.models().items():
        config = Config(dict(model.config), origin=name)
        spec = families.get(model.model_type).describe(config)
        try:
            graph = architectures.choose(spec, family=model.model_type)
        except UsageError:
            refused.append(name)
            continue
        tokens = architectures.context_limit(spec, graph).tokens
        if tokens != spec.context_tokens:
            limits[name] = tokens
    assert refused == ["google/vaultgemma-1b"]
    assert limits == {
        "mistralai/Mistral-7B-v0.1": 4096,
        "microsoft/Phi-3-mini-4k-instruct": 2047,
        "microsoft/Phi-3.5-mini-instruct": 4096,
        "bigcode/starcoder2-3b": 4096,
        "bigcode/starcoder2-7b": 4096,
    }


LLAMA = describe("llama")
QWEN3 = describe("qwen3")
GEMMA2, GEMMA3 = describe("gemma2"), describe("gemma3")
STABLELM = describe("stablelm-12b")
MADE_UP = {
    "a logit cap on a Llama": (replace(LLAMA, final_logit_softcap=30.0), "a cap on the logits"),
    "a score cap on a Llama": (
        replace(LLAMA, attention=replace(LLAMA.attention, attn_logit_softcap=50.0)),
        "a cap on the scores",
    ),
    "a scaled embedding": (replace(LLAMA, embedding_scale=12.0), "an embedding scale of 12"),
    "another activation": (replace(LLAMA, activation="gelu_tanh"), "activation gelu_tanh"),
    "parallel residuals": (replace(LLAMA, residual="parallel"), "parallel residuals"),
    "post norms": (replace(STABLELM, has_post_norms=True), "norms after attention and MLP"),
    "a norm with one added": (
        replace(LLAMA, norm=replace(LLAMA.norm, unit_offset=True)),
        "normalization rms with 1 added",
    ),
    "a norm without bias": (
        replace(STABLELM, norm=replace(STABLELM.norm, has_bias=False)),
        "layer normalization without bias",
    ),
    "norms of queries with another epsilon": (
        replace(QWEN3, attention=replace(
            QWEN3.attention, query_key_norm=Norm(kind="rms", epsilon=0.5))),
        "another epsilon",
    ),
    "no positions at all": (change_layers(QWEN3, rope=None), "no positions"),
    "half a rope": (
        change_ropes(QWEN3, lambda rope: replace(rope, width=rope.width // 2)), "rope on 12 of 24",
    ),
    "a longrope on Qwen 3": (
        change_ropes(QWEN3, lambda rope: replace(rope, scaling=LongRopeScaling(
            short_factors=(1.0,) * 12, long_factors=(2.0,) * 12, original_context_tokens=8,
            attention_factor=1.0))),
        "rope with longrope scaling",
    ),
    "ropes that differ": (
        replace(LLAMA, layers=(*LLAMA.layers[:-1], replace(
            LLAMA.layers[-1], rope=replace(LLAMA.layers[-1].rope, theta=9.0)))),
        "ropes that differ between layers",
    ),
    "windows of several lengths": (
        replace(LLAMA, layers=tuple(
            replace(layer, window_tokens=8 + index) for index, layer in enumerate(LLAMA.layers))),
        "windows of several lengths",
    ),
    # Gemma 3's graph never scales the layers with a window, Gemma 2's scales all of them.
    "Gemma 3 scaled everywhere": (
        change_ropes(replace(GEMMA3, is_tied=False), scale), "other rope scaling in the layers",
    ),
    "Gemma 2 scaled in some layers": (
        change_ropes(GEMMA2, scale, only_local=True), "other rope scaling in the layers",
    ),
    "Gemma 2 with a head of its own": (replace(GEMMA2, is_tied=False), "an output head of its own"),
}  # fmt: skip


@pytest.mark.parametrize("name", MADE_UP)
def test_the_refusal_says_what_the_nearest_graph_cannot_do(name):
    spec, difference = MADE_UP[name]
    with pytest.raises(UsageError) as refusal:
        architectures.choose(spec)
    assert difference in str(refusal.value)
    assert "its nearest, " in str(refusal.value)


def test_gemma_2_may_scale_all_its_ropes_alike():
    assert architectures.choose(change_ropes(GEMMA2, scale)).name == "gemma2"


def test_the_deepest_gemma_scales_its_scores_by_another_width():
    layer = replace(GEMMA2.layers[0], rope=Rope(width=32, theta=10_000.0))
    spec = replace(GEMMA2, layers=(layer,) * 46)
    wide = replace(spec.attention, head_dim=32, softmax_scale=16**-0.5)  # hidden 64 / 4 heads
    deep = replace(spec, attention=wide)
    graph = architectures.choose(deep)
    assert graph.multiplier("layers.0.query", deep) == 1
    shallow = replace(deep, layers=(layer,) * 4)
    assert graph.multiplier("layers.0.query", shallow) == pytest.approx(2**0.5)
    assert graph.multiplier("layers.0.key", shallow) == 1


def test_a_bias_decides_between_qwen_2_and_llama():
    qwen = describe("qwen2")
    assert architectures.choose(qwen).name == "qwen2"
    bare = replace(qwen, attention=replace(qwen.attention, has_qkv_bias=False))
    assert architectures.choose(bare).name == "llama"


def test_an_unknown_graph_is_refused_with_those_that_are_read():
    with pytest.raises(UsageError, match="architecture 'mamba' are not read") as refusal:
        architectures.get("mamba")
    assert "gemma3" in refusal.value.hint


# How far a graph agrees


def test_a_model_without_windows_goes_as_far_as_it_was_made_for():
    limit = architectures.context_limit(LLAMA)
    assert limit.tokens == LLAMA.context_tokens
    assert "made for no more" in limit.reason


@pytest.mark.parametrize(
    ("name", "tokens"), [("mistral-window", 16), ("qwen2-window", 16), ("phi3", 15)]
)
def test_a_window_that_the_graph_ignores_ends_the_agreement(name, tokens):
    limit = architectures.context_limit(describe(name))
    assert limit.tokens == tokens
    assert "attention window" in limit.reason


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_a_window_that_the_graph_knows_limits_nothing(name):
    spec = describe(name)
    assert any(layer.window_tokens for layer in spec.layers)
    assert architectures.context_limit(spec).tokens == spec.context_tokens


def test_a_window_as_long_as_the_model_limits_nothing():
    spec = describe("mistral-window", sliding_window=256)
    assert architectures.context_limit(spec).tokens == 256


@pytest.mark.parametrize(("original", "tokens"), [(4096, 4096), (4095, 3840), (256, 256)])
def test_a_longrope_ends_before_a_rounded_cache_would_take_the_long_factors(original, tokens):
    fields = LONG | {"original_max_position_embeddings": original}
    limit = architectures.context_limit(describe("phi3-longrope", **fields))
    assert limit.tokens == tokens
    assert "long rope factors" in limit.reason


def test_a_longrope_that_was_never_stretched_limits_nothing():
    fields = {"original_max_position_embeddings": 512, "max_position_embeddings": 512}
    assert architectures.context_limit(describe("phi3-longrope", **fields)).tokens == 512


def test_a_longrope_shorter_than_the_smallest_cache_is_refused():
    with pytest.raises(UsageError, match="rounds a context up to 256"):
        architectures.context_limit(describe("phi3-longrope"))


# What is written is what is read


def to_float32(value):
    return struct.unpack("<f", struct.pack("<f", value))[0]


def facts_of(spec):
    """Return what a file of this decoder says, floats rounded as the file rounds them."""
    graph = architectures.choose(spec)
    keys = hyperparameters.write(spec, graph)
    tensors = {parts.tensor_name(roles[-1], graph) for roles, _ in parts._stacked(spec, graph)}
    factors = {
        name: [to_float32(value) for value in values]
        for name, values in hyperparameters.made_tensors(spec, graph).items()
    }
    return Facts(
        metadata={"general.architecture": graph.name} | {
            key: to_float32(value) if kind == "float32" else value
            for key, (kind, value) in keys.items()
        },
        tensors=frozenset(tensors | factors.keys()),
        vocab_size=spec.vocab_size,
        rope_factors=factors,
    )  # fmt: skip


def as_the_graph_sees_it(spec, graph=None):
    """Return a decoder without what is lost on purpose: ignored windows, and what lies beyond.

    Multipliers and another scale of scores are in the weights. A longrope's factors are computed,
    and come back as the shortest decimals of their float32.
    """

    shortest = facts.shortest

    def change(rope):
        rope, scaling = replace(rope, theta=shortest(rope.theta)), rope.scaling
        if not isinstance(scaling, LongRopeScaling):
            return rope
        return replace(
            rope,
            scaling=replace(
                scaling,
                short_factors=tuple(map(shortest, scaling.short_factors)),
                long_factors=tuple(map(shortest, scaling.long_factors)),
                attention_factor=shortest(scaling.attention_factor),
            ),
        )

    graph = graph or architectures.choose(spec)
    limit = architectures.context_limit(spec, graph).tokens
    scale = spec.attention.softmax_scale / graph.multiplier("query", spec)
    if spec.attention.query_key_norm:
        scale = spec.attention.softmax_scale / graph.multiplier("query_norm", spec)
    spec = replace(spec, attention=replace(spec.attention, softmax_scale=scale))
    if not graph.has_windows:
        spec = change_layers(spec, window_tokens=None)
    if spec.has_experts:  # without a bias it is written as zeros
        spec = replace(spec, layers=tuple(_with_plain_experts(layer) for layer in spec.layers))
    if own := spec.layer_embedding:  # what no token reads is left out
        spec = replace(spec, layer_embedding=replace(own, vocab_size=spec.vocab_size))
    plain = replace(spec, context_tokens=limit, multipliers=Multipliers())
    return change_ropes(plain, change)


def _with_plain_experts(layer):
    experts = layer.mlp.experts if layer.mlp else None
    if experts is None:
        return layer
    return replace(
        layer, mlp=replace(layer.mlp, experts=replace(experts, scale=1.0, has_bias=True))
    )


@pytest.mark.parametrize("name", TINY.keys() - HAVE_NO_GRAPH)
def test_what_is_written_is_read_as_the_same_decoder(name):
    pytest.importorskip("numpy")
    has_longrope = "original_max_position_embeddings" in TINY[name].fields
    spec = describe(name, **(LONG if has_longrope else {}))
    assert hyperparameters.read(facts_of(spec)) == as_the_graph_sees_it(spec)


@pytest.mark.parametrize(
    "spec",
    [
        replace(LLAMA, is_tied=False),
        replace(GEMMA3, is_tied=False, final_logit_softcap=30.0),
        change_ropes(GEMMA2, scale),
        replace(
            GEMMA2,
            attention=replace(GEMMA2.attention, attn_logit_softcap=12.5),
            final_logit_softcap=7.5,
        ),
        change_layers(GEMMA3, window_tokens=None, rope=Rope(width=16, theta=5e5)),
        change_layers(GEMMA3, window_tokens=8, rope=Rope(width=16, theta=1e4)),
        replace(STABLELM, residual="serial"),
        replace(
            GEMMA2,
            attention=replace(GEMMA2.attention, attn_logit_softcap=None),
            final_logit_softcap=None,
        ),
        change_layers(GEMMA2, window_tokens=None),
    ],
)
def test_so_are_its_variants(spec):
    pytest.importorskip("numpy")
    assert hyperparameters.read(facts_of(spec)) == spec


# What llama.cpp's converter, at the commit above, wrote for these kinds, beside the sizes.
CONVERTED: dict[str, tuple[str, dict[str, Any]]] = {
    "granite": ("granite", {
        "attention.layer_norm_rms_epsilon": 1e-6, "rope.dimension_count": 16,
        "attention.scale": 0.4, "embedding_scale": 3.0, "residual_scale": 0.6, "logit_scale": 6.0,
    }),
    "granite4": ("granite", {
        "attention.head_count_kv": [2, 2, 2], "attention.layer_norm_rms_epsilon": 1e-6,
        "expert_count": 0, "expert_used_count": 0, "rope.dimension_count": 16,
        "attention.scale": 0.4, "embedding_scale": 3.0, "residual_scale": 0.6, "logit_scale": 6.0,
        "expert_shared_feed_forward_length": 112, "ssm.conv_kernel": 4, "ssm.state_size": 256,
        "ssm.group_count": 1, "ssm.inner_size": 128, "ssm.time_step_rank": 4,
        "rope.scaling.finetuned": True,
    }),
    "cohere": ("command-r", {
        "rope.freq_base": 500000.0, "attention.layer_norm_epsilon": 1e-5, "logit_scale": 0.3,
        "rope.scaling.type": "none",
    }),
    "cohere2": ("cohere2", {
        "block_count": 5, "attention.layer_norm_epsilon": 1e-5, "attention.key_length": 16,
        "attention.value_length": 16, "logit_scale": 0.3, "attention.sliding_window": 16,
        "rope.dimension_count": 16, "rope.scaling.type": "none",
    }),
    "ministral3": ("mistral3", {
        "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 64, "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.key_length": 24, "attention.value_length": 24, "rope.dimension_count": 24,
        "rope.scaling.yarn_log_multiplier": 1.0, "attention.temperature_scale": 0.3,
    }),
    "olmo3-yarn": ("olmo2", {
        "block_count": 5, "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 64, "rope.freq_base": 500000.0,
        "rope.freq_base_swa": 500000.0, "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.sliding_window": 16,
        "attention.sliding_window_pattern": [True, True, True, False, True],
    }),
    "glm4": ("glm4", {
        "attention.layer_norm_rms_epsilon": 1.5625e-7, "attention.key_length": 16,
        "attention.value_length": 16, "rope.dimension_count": 8,
    }),
    "starcoder2": ("starcoder2", {"attention.layer_norm_epsilon": 1e-5}),
    "lfm2": ("lfm2", {
        "block_count": 4, "attention.head_count_kv": [0, 0, 2, 0], "rope.freq_base": 1e6,
        "attention.layer_norm_rms_epsilon": 1e-5, "shortconv.l_cache": 3,
    }),
    "lfm2-moe": ("lfm2moe", {
        "block_count": 5, "attention.head_count_kv": [0, 0, 2, 0, 2], "rope.freq_base": 1e6,
        "attention.layer_norm_rms_epsilon": 1e-5, "shortconv.l_cache": 3,
        "leading_dense_block_count": 2, "expert_count": 7, "expert_used_count": 3,
        "expert_feed_forward_length": 48, "expert_gating_func": 2,
    }),
    "qwen3.5": ("qwen35", {
        "block_count": 4, "rope.dimension_sections": [2, 1, 1, 0], "rope.freq_base": 1e7,
        "attention.layer_norm_rms_epsilon": 1e-6, "attention.key_length": 32,
        "attention.value_length": 32, "ssm.conv_kernel": 4, "ssm.state_size": 16,
        "ssm.group_count": 2, "ssm.time_step_rank": 4, "ssm.inner_size": 64,
        "attention.recurrent_layers": [True, True, True, False], "full_attention_interval": 4,
        "rope.dimension_count": 8,
    }),
    "gemma4-31b": ("gemma4", {
        "block_count": 7, "attention.head_count_kv": [2, 2, 2, 2, 2, 1, 1],
        "rope.freq_base": 1e6, "rope.freq_base_swa": 1e4, "attention.shared_kv_layers": 0,
        "attention.layer_norm_rms_epsilon": 1e-6, "attention.key_length": 32,
        "attention.value_length": 32, "attention.key_length_swa": 16,
        "attention.value_length_swa": 16, "attention.sliding_window": 16,
        "attention.sliding_window_pattern": [True] * 5 + [False] * 2,
        "embedding_length_per_layer_input": 0, "rope.dimension_count": 32,
        "rope.dimension_count_swa": 16, "final_logit_softcapping": 0.0,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERTED)
def test_the_keys_of_llama_cpps_converter_say_what_the_config_said(name):
    pytest.importorskip("numpy")
    graph_name, own = CONVERTED[name]
    spec, graph = describe(name), architectures.get(graph_name)
    sizes = {
        "block_count": 3, "context_length": 256, "embedding_length": 64, "feed_forward_length": 112,
        "attention.head_count": 4, "attention.head_count_kv": 2, "rope.freq_base": 10000.0,
    }  # fmt: skip
    keys = {
        f"{graph_name}.{key}": to_float32(value) if isinstance(value, float) else value
        for key, value in (sizes | own).items()
    }
    converted = Facts(
        metadata={"general.architecture": graph_name} | keys,
        tensors=frozenset(
            parts.tensor_name(roles[-1], graph) for roles, _ in parts._stacked(spec, graph)
        ),
        vocab_size=spec.vocab_size,
        rope_factors=hyperparameters.made_tensors(spec, graph),
    )
    assert hyperparameters.read(converted) == spec


@pytest.mark.parametrize("value", [1e-5, 1e-6, 1 / 3, 500_000.0, 0.1])
def test_a_float_is_read_as_the_decimal_it_was_written_from(value):
    pytest.importorskip("numpy")
    read = facts.shortest(to_float32(value))
    assert to_float32(read) == to_float32(value)
    assert len(repr(read)) < len(repr(to_float32(value))) or to_float32(value) == value
    assert read == pytest.approx(value, rel=1e-7)


def damaged(spec=LLAMA, **changes):
    """Return a file's facts with some keys changed, or removed if None."""
    found = facts_of(spec)
    graph = found.architecture.name
    changed = {f"{graph}.{key.replace('__', '.')}": value for key, value in changes.items()}
    metadata = {k: v for k, v in (found.metadata | changed).items() if v is not None}
    return replace(found, metadata=metadata)


DAMAGES = {
    "no depth": (damaged(block_count=None), "lacks llama.block_count"),
    "no layers": (damaged(block_count=0), "block_count = 0"),
    "more layers than tensors": (damaged(block_count=4_000_000_000), "expected a count up to"),
    "no heads": (damaged(attention__head_count=0), "head_count = 0"),
    "heads by layer": (damaged(attention__head_count_kv=[2, 1, 2]), "expected one number"),
    "half a head": (damaged(attention__head_count=2.5), "expected a count"),
    "a width in words": (damaged(embedding_length="wide"), "expected one number"),
    "heads narrower than a column": (
        damaged(attention__head_count=999, attention__key_length=None), "key_length = 0",
    ),
    "a yarn rope": (damaged(rope__scaling__type="yarn"), "yarn rope scaling"),
    "a pattern of no layer": (
        damaged(GEMMA2, attention__sliding_window_pattern=0), "sliding_window_pattern = 0",
    ),
    "a pattern that is too short": (
        damaged(GEMMA2, attention__sliding_window_pattern=[True]), "has 1 layers, expected 4",
    ),
    "another model": (
        replace(facts_of(LLAMA), metadata={"general.architecture": "mamba"}),
        "'mamba' are not read",
    ),
    "rope factors of nobody": (
        replace(facts_of(LLAMA), rope_factors={"rope_freqs.weight": [1.0, 3.0] * 4}),
        "not those of a Llama 3 model",
    ),
    "too few rope factors": (
        replace(facts_of(LLAMA), rope_factors={"rope_freqs.weight": [1.0, 8.0]}),
        "not those of a Llama 3 model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_metadata_that_make_no_sense_are_refused(name):
    pytest.importorskip("numpy")
    damaged_facts, message = DAMAGES[name]
    with pytest.raises(UsageError) as refusal:
        hyperparameters.read(damaged_facts)
    assert message in str(refusal.value)


def test_what_a_file_does_not_say_is_what_llama_cpp_takes():
    pytest.importorskip("numpy")

    def rope_of(**changes):
        return hyperparameters.read(damaged(**changes)).layers[0].rope

    assert rope_of(rope__freq_base=None).theta == 10_000
    assert rope_of(rope__dimension_count=None).width == 16
    assert rope_of(rope__scaling__factor=4.0).scaling == LinearScaling(factor=4.0)
    assert rope_of(rope__scale_linear=4.0).scaling == LinearScaling(factor=4.0)
    assert rope_of(rope__scaling__factor=0.0).scaling is None
    assert rope_of(rope__scaling__type="none", rope__scaling__factor=4.0).scaling is None
    capped = damaged(GEMMA2, final_logit_softcapping=None, attn_logit_softcapping=None)
    assert hyperparameters.read(capped).final_logit_softcap == 30
    assert hyperparameters.read(capped).attention.attn_logit_softcap == 50
    heads = hyperparameters.read(damaged(attention__head_count_kv=None)).attention
    assert heads.num_kv_heads == heads.heads


@pytest.mark.parametrize(
    ("spec", "is_local"),
    [(GEMMA2, [True, False, True, False]), (GEMMA3, [True] * 5 + [False, True])],
)
def test_without_a_pattern_the_graphs_own_holds(spec, is_local):
    pytest.importorskip("numpy")
    read = hyperparameters.read(damaged(spec, attention__sliding_window_pattern=None))
    assert [layer.window_tokens is not None for layer in read.layers] == is_local


QWEN35, LFM2, GEMMA4 = describe("qwen3.5"), describe("lfm2"), describe("gemma4")


@pytest.mark.parametrize(("pairs", "sections"), [
    (32, [11, 11, 10, 0]), (4, [2, 1, 1, 0]), (3, [1, 1, 1, 0]), (1, [1, 0, 0, 0]),
])  # fmt: skip
def test_every_pair_that_turns_is_in_a_section(pairs, sections):
    """The first two are what is published, and what the tiny config says."""
    spec = change_ropes(QWEN35, lambda rope: replace(rope, width=2 * pairs))
    keys = hyperparameters.write(spec, architectures.get("qwen35"))
    assert keys["qwen35.rope.dimension_sections"] == ("array[int32]", sections)


def test_layers_that_draft_tokens_are_no_layers_of_the_decoder():
    pytest.importorskip("numpy")
    drafting = damaged(
        QWEN35, block_count=5, nextn_predict_layers=1,
        attention__recurrent_layers=[True, True, True, False, False],
    )  # fmt: skip
    assert hyperparameters.read(drafting) == QWEN35


def test_without_a_pattern_every_fourth_layer_of_a_qwen_attends_and_without_a_cap_gemma_has_one():
    pytest.importorskip("numpy")
    silent = damaged(QWEN35, attention__recurrent_layers=None, full_attention_interval=None)
    assert hyperparameters.read(silent) == QWEN35
    uncapped = damaged(GEMMA4, final_logit_softcapping=None)
    assert hyperparameters.read(uncapped).final_logit_softcap == 30


def test_a_graph_of_states_needs_a_layer_that_attends_and_one_that_does_not():
    (conv,) = {layer.mixer for layer in LFM2.layers} - {None}
    states = change_layers(LFM2, mixer=conv, rope=None)
    with pytest.raises(UsageError, match="no layer that attends"):
        architectures.choose(states, family="lfm2")
    rope = LFM2.layers[2].rope
    assert architectures.choose(change_layers(LFM2, mixer=None, rope=rope)).name == "qwen3"
    gated = change_layers(QWEN35, mixer=None, rope=QWEN35.layers[3].rope)
    with pytest.raises(UsageError, match="no layer that is a delta net"):
        architectures.choose(gated, family="qwen3_5_text")


# What it holds in memory


def test_states_are_float32_and_only_layers_with_keys_of_their_own_have_a_cache():
    cells = 2 * 2 * 2  # keys and values, float16
    state = 4 * (128 * 3 + 4 * 16 * 16)  # what three taps before saw, and a matrix for each head
    assert memory.cache_bytes(QWEN35, context_tokens=256) == 256 * 32 * cells + 3 * state
    assert memory.cache_bytes(LFM2, context_tokens=256) == 256 * 16 * cells + 3 * 4 * 64 * 2
    # Four layers of 16 channels a head and a wider one; the last three read theirs.
    assert memory.cache_bytes(GEMMA4, context_tokens=256) == 256 * (4 * 16 + 32) * cells


def test_the_cache_has_two_bytes_for_every_key_and_value():
    width = LLAMA.attention.key_value_width
    assert memory.cache_bytes(LLAMA, context_tokens=512) == 3 * 512 * 2 * width * 2
    # Cells come in steps of 256.
    assert memory.cache_bytes(LLAMA, context_tokens=257) == 3 * 512 * 2 * width * 2


def test_a_layer_with_a_window_keeps_no_more_than_it_sees():
    token_bytes = 2 * GEMMA2.attention.key_value_width * 2
    is_local = [layer.window_tokens is not None for layer in GEMMA2.layers]
    assert sorted(is_local) == [False, False, True, True]
    # 16 tokens and a batch of 256, rounded up
    assert memory.cache_bytes(GEMMA2, context_tokens=8192) == 2 * (8192 + 512) * token_bytes
    assert memory.cache_bytes(GEMMA2, context_tokens=256) == 4 * 256 * token_bytes


# Channels that change places


@pytest.mark.parametrize(
    ("pairs", "shape"),
    [(Pairs(8, 8), (8, 3)), (Pairs(8, 4), (24,)), (Pairs(8, 8, axis=1), (3, 16))],
)
def test_halves_become_the_neighbours_that_a_checkpoint_may_store(pairs, shape):
    np = pytest.importorskip("numpy")
    rows = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    neighbours = conversion.interleave_halves(rows, pairs)
    assert not np.array_equal(neighbours, rows)
    stored = PairOrder(base=Given(neighbours), pairs=pairs, to="halves")
    assert np.array_equal(stored.read(), rows)


def test_a_pair_is_a_channel_and_the_one_half_of_what_is_rotated_on():
    np = pytest.importorskip("numpy")
    rows = np.arange(12, dtype=np.float32)  # two heads of six
    found = conversion.interleave_halves(rows, Pairs(6, 6)).tolist()
    assert found == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    found = conversion.interleave_halves(rows, Pairs(6, 4)).tolist()
    assert found == [0, 2, 1, 3, 4, 5, 6, 8, 7, 9, 10, 11]


@pytest.mark.parametrize(
    ("parameters", "label"),
    [(134_515_008, "135M"), (999_600, "1M"), (999_499_999, "999M"), (999_500_000, "1B"),
     (1_235_814_400, "1.2B"), (41_234, "41K")],
)  # fmt: skip
def test_a_size_is_written_as_model_names_carry_it(parameters, label):
    assert conversion.size_label(parameters) == label
