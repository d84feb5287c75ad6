"""The decoder beside an artifact: whatever a spec says comes back, and damage is named."""

import json
from dataclasses import replace

import pytest

from edgekit.errors import BundleError
from edgekit.formats.mlc import decoder_file
from edgekit.model.mixers import Attention, DeltaNet, QueryGrowth, ShortConv
from edgekit.model.norm import Norm
from edgekit.model.rope import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ProportionalScaling,
    Rope,
    YarnScaling,
)
from edgekit.model.spec import DecoderSpec, Layer, LayerEmbedding, Mlp


PLAIN = DecoderSpec(
    vocab_size=257,
    hidden_size=64,
    intermediate_size=96,
    context_tokens=64,
    layers=(Layer(rope=Rope(width=16, theta=10_000.0)),) * 3,
    attention=Attention(heads=4, num_kv_heads=2, head_dim=16, softmax_scale=0.25),
    norm=Norm(kind="rms", epsilon=1e-5),
)
SCALINGS = [
    LinearScaling(factor=4.0),
    Llama3Scaling(
        factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0,
        original_context_tokens=32,
    ),
    LongRopeScaling(
        short_factors=(1.0,) * 8, long_factors=(2.5,) * 8, original_context_tokens=32,
        attention_factor=1.19,
    ),
    YarnScaling(
        factor=4.0, fast_turns=32.0, slow_turns=1.0, original_context_tokens=32,
        attention_factor=1.1, is_truncated=True,
    ),
]  # fmt: skip


def written(directory, spec):
    decoder_file.write(directory, spec)
    return directory / decoder_file.NAME


def layered(*layers):
    return replace(PLAIN, layers=layers)


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda it: type(it).__name__)
def test_every_kind_of_rope_comes_back(tmp_path, scaling):
    rope = Rope(width=16, theta=500_000.0, scaling=scaling)
    spec = layered(Layer(rope=rope), Layer(rope=rope))
    assert decoder_file.read(written(tmp_path, spec)) == spec


def test_layers_keep_their_order_and_their_differences(tmp_path):
    local = Layer(rope=Rope(width=16, theta=10_000.0), window_tokens=16)
    whole, silent = Layer(rope=Rope(width=16, theta=1e6)), Layer(rope=None)
    spec = layered(local, whole, local, silent, local)
    path = written(tmp_path, spec)
    assert decoder_file.read(path) == spec
    assert json.loads(path.read_text())["layers"]["kind_of_each"] == [0, 1, 0, 2, 0]


def test_what_attention_and_norms_are_comes_back(tmp_path):
    attention = replace(
        PLAIN.attention,
        attn_logit_softcap=50.0,
        query_key_norm=Norm(kind="layer", epsilon=1e-6, has_bias=True),
        head_norms="together",
        query_growth=QueryGrowth(rate=0.1, step_tokens=32),
    )
    spec = replace(
        PLAIN, attention=attention, activation="relu2", residual="parallel", is_gated=False,
        norm=Norm(kind="layer", epsilon=1e-5, unit_offset=True), final_logit_softcap=30.0,
    )  # fmt: skip
    assert decoder_file.read(written(tmp_path, spec)) == spec


MIXERS = [
    DeltaNet(
        key_heads=2, value_heads=4, key_head_dim=8, value_head_dim=12, taps=4,
        norm=Norm(kind="rms", epsilon=1e-6),
    ),
    ShortConv(taps=3, has_bias=True),
    replace(PLAIN.attention, head_dim=32, cache_of=0, values_are_keys=True),
]  # fmt: skip


@pytest.mark.parametrize("mixer", MIXERS, ids=lambda it: type(it).__name__)
def test_what_mixes_the_tokens_of_a_layer_comes_back(tmp_path, mixer):
    rope = Rope(width=16, theta=1e6, scaling=ProportionalScaling(factor=1.0, rotated_pairs=4))
    spec = replace(
        layered(Layer(rope=rope), Layer(mixer=mixer, mlp=Mlp(intermediate_size=192))),
        attention=replace(PLAIN.attention, has_output_gate=True, value_norm_epsilon=1e-6),
        layer_embedding=LayerEmbedding(
            width=8, vocab_size=257, scale=1.0, projection_scale=0.5, sum_scale=0.25
        ),
        has_layer_scales=True,
    )
    assert decoder_file.read(written(tmp_path, spec)) == spec


def test_a_decoder_without_what_younger_ones_have_is_written_as_before(tmp_path):
    found = json.loads(written(tmp_path, PLAIN).read_text())
    assert not {"layer_embedding", "has_layer_scales"} & found.keys()
    assert not {"has_output_gate", "cache_of", "values_are_keys"} & found["attention"].keys()
    assert found["layers"]["kinds"] == [
        {"rope": {"width": 16, "theta": 10_000.0, "scaling": None}, "window_tokens": None}
    ]


def damaged(path, change):
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda it: it.pop("hidden_size"), "has no field 'hidden_size'"),
        (lambda it: it.update(colour="red"), "unknown field 'colour'"),
        (lambda it: it.update(activation="tanh"), "activation = 'tanh', expected 'silu' or"),
        (lambda it: it.update(schema=2), "has schema 2, this edgekit reads 1"),
        (lambda it: it.update(layers=None), "expected an object"),
        (lambda it: it["layers"].update(kind_of_each=[0, 7]), "a kind that is not there"),
        (lambda it: it["layers"]["kinds"][0]["rope"].update(theta="big"), "theta = 'big'"),
        (
            lambda it: it["layers"]["kinds"][0]["rope"].update(scaling={"kind": "spiral"}),
            "no rope is scaled as 'spiral'",
        ),
        (lambda it: it["layers"]["kinds"][0].update(rope=3), "rope = 3, expected an object"),
        (
            lambda it: it["layers"]["kinds"][0].update(mixer={"kind": "stirring"}),
            "no layer mixes tokens as 'stirring'",
        ),
        (
            lambda it: it["layers"]["kinds"][0].update(mixer={"kind": "shortconv"}),
            "has no field 'taps'",
        ),
        (
            lambda it: it["layers"]["kinds"][0]["rope"].update(scaling=[1]),
            r"scaling = \[1\], expected an object",
        ),
    ],
)
def test_damage_is_named(tmp_path, change, words):
    path = damaged(written(tmp_path, PLAIN), change)
    with pytest.raises(BundleError, match=words):
        decoder_file.read(path)


def test_a_bundle_without_it_says_how_to_get_it(tmp_path):
    with pytest.raises(BundleError, match=decoder_file.NAME) as refusal:
        decoder_file.read(tmp_path / decoder_file.NAME)
    assert "export it again" in refusal.value.hint
