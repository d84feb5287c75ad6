"""Which weights a rule is about."""

from dataclasses import replace

import pytest

from edgekit.model.mixers import Attention
from edgekit.model.norm import Norm
from edgekit.model.spec import DecoderSpec, Layer
from edgekit.quant.recipe import Recipe, Rule, is_sensitive


SPEC = DecoderSpec(
    vocab_size=96, hidden_size=64, intermediate_size=64, context_tokens=64,
    layers=(Layer(rope=None),) * 32, norm=Norm(kind="rms", epsilon=1e-5),
    attention=Attention(heads=8, num_kv_heads=2, head_dim=8, softmax_scale=1.0),
)  # fmt: skip


def chosen(layers, *, depth=32):
    """Return the layers that a rule is about, of a decoder this deep."""
    rule = Rule(pattern="down", tensor_type="Q6_K", layers=layers)
    spec = replace(SPEC, layers=SPEC.layers[:1] * depth)
    return [layer for layer in range(depth) if rule.applies_to(f"layers.{layer}.down", spec)]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", [*range(32)]),
        ("first_two", [0, 1]),
        ("first_four", [0, 1, 2, 3]),
        ("first_eighth", [0, 1, 2, 3]),
        ("first_sixteenth", [0, 1]),
        ("sensitive", [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]),
    ],
)
def test_a_rule_is_about_the_layers_it_names(layers, expected):
    assert chosen(layers) == expected


def test_shares_of_a_depth_are_rounded_down():
    assert chosen("first_eighth", depth=30) == [0, 1, 2]
    assert chosen("first_sixteenth", depth=30) == [0]
    assert chosen("first_eighth", depth=7) == []


def test_the_last_eighth_begins_at_seven_eighths():
    assert [layer for layer in range(8) if is_sensitive(layer, depth=8)] == [0, 3, 6, 7]


@pytest.mark.parametrize(("num_kv_heads", "is_grouped"), [(8, False), (4, False), (2, True)])
def test_heads_are_grouped_from_four_queries_a_key(num_kv_heads, is_grouped):
    spec = replace(SPEC, attention=replace(SPEC.attention, num_kv_heads=num_kv_heads))
    rule = Rule(pattern="value", tensor_type="Q5_K", decoders="grouped")
    assert rule.applies_to("layers.0.value", spec) is is_grouped


def test_a_rule_for_tied_decoders_is_about_no_other():
    rule = Rule(pattern="token_embedding", tensor_type="Q6_K", decoders="tied")
    assert not rule.applies_to("token_embedding", SPEC)
    assert rule.applies_to("token_embedding", replace(SPEC, is_tied=True))


def test_what_is_in_no_layer_is_in_no_share_of_them():
    assert not Rule(pattern="final_norm", tensor_type="F32", layers="first_two").applies_to(
        "final_norm", SPEC
    )


def test_the_first_rule_wins_and_a_pattern_is_the_whole_role():
    recipe = Recipe(
        name="R", default="Q4", max_mean_kl_nats=1, min_same_top_token=0,
        rules=(Rule(pattern="down", tensor_type="Q8"), Rule(pattern="d.*", tensor_type="Q2")),
    )  # fmt: skip
    assert recipe.tensor_type_for("layers.3.down", SPEC) == "Q8"
    assert recipe.tensor_type_for("layers.3.down_bias", SPEC) == "Q2"
    assert recipe.tensor_type_for("layers.3.up", SPEC) == "Q4"
