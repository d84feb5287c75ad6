"""What a decoder says of itself."""

from dataclasses import replace

import pytest

from edgekit.model.spec import Attention, DecoderSpec, Layer, LongRopeScaling, Norm, Rope


def long_rope(border):
    scaling = LongRopeScaling(
        short_factors=(1.0,) * 4, long_factors=(2.0,) * 4, original_context_tokens=border,
        attention_factor=1.5,
    )  # fmt: skip
    return Rope(width=8, theta=10_000.0, scaling=scaling)


SPEC = DecoderSpec(
    vocabulary=96, hidden_width=64, mlp_width=64, context_tokens=64,
    layers=(Layer(rope=Rope(width=8, theta=10_000.0)),), norm=Norm(kind="rms", epsilon=1e-5),
    attention=Attention(heads=8, key_value_heads=2, head_width=8, score_scale=1.0),
)  # fmt: skip


def test_its_border_is_the_smallest_of_those_that_its_ropes_have():
    assert SPEC.border_tokens is None
    layers = [Layer(rope=None), Layer(rope=long_rope(64)), Layer(rope=long_rope(32))]
    assert replace(SPEC, layers=(*SPEC.layers, *layers)).border_tokens == 32


def test_a_long_rope_turns_otherwise_once_the_text_outgrows_its_border():
    rope = long_rope(32)
    assert rope.divisors(32) == (1.0,) * 4
    assert rope.divisors(33) == (2.0,) * 4
    assert rope.attention_factor == 1.5


@pytest.mark.parametrize(("role", "adds_one"), [
    ("layers.0.attention_norm", True), ("final_norm", True), ("layers.0.query_norm", False),
    ("layers.0.query", False),
])  # fmt: skip
def test_a_norm_that_adds_one_is_known_by_its_role(role, adds_one):
    attention = replace(SPEC.attention, query_key_norm=Norm(kind="rms", epsilon=1e-6))
    spec = replace(SPEC, attention=attention, norm=replace(SPEC.norm, adds_one=True))
    assert spec.adds_one(role) is adds_one
    assert not spec.without_added_ones().adds_one(role)
