"""What a decoder says of itself."""

from dataclasses import replace

import pytest

from edgekit.model.mixers import Attention
from edgekit.model.norm import Norm
from edgekit.model.rope import LongRopeScaling, Rope
from edgekit.model.spec import DecoderSpec, Experts, Layer, Mlp, Multipliers


def long_rope(border):
    scaling = LongRopeScaling(
        short_factors=(1.0,) * 4, long_factors=(2.0,) * 4, original_context_tokens=border,
        attention_factor=1.5,
    )  # fmt: skip
    return Rope(width=8, theta=10_000.0, scaling=scaling)


SPEC = DecoderSpec(
    vocab_size=96, hidden_size=64, intermediate_size=64, context_tokens=64,
    layers=(Layer(rope=Rope(width=8, theta=10_000.0)),), norm=Norm(kind="rms", epsilon=1e-5),
    attention=Attention(heads=8, num_kv_heads=2, head_dim=8, softmax_scale=1.0),
)  # fmt: skip


def test_its_border_is_the_smallest_of_those_that_its_ropes_have():
    assert SPEC.original_max_position_embeddings is None
    layers = [Layer(rope=None), Layer(rope=long_rope(64)), Layer(rope=long_rope(32))]
    assert replace(SPEC, layers=(*SPEC.layers, *layers)).original_max_position_embeddings == 32


def test_a_long_rope_turns_otherwise_once_the_text_outgrows_its_border():
    rope = long_rope(32)
    assert rope.divisors(32) == (1.0,) * 4
    assert rope.divisors(33) == (2.0,) * 4
    assert rope.attention_factor == 1.5


@pytest.mark.parametrize(("role", "unit_offset"), [
    ("layers.0.attention_norm", True), ("final_norm", True), ("layers.0.query_norm", False),
    ("layers.0.query", False),
])  # fmt: skip
def test_a_norm_that_adds_one_is_known_by_its_role(role, unit_offset):
    attention = replace(SPEC.attention, query_key_norm=Norm(kind="rms", epsilon=1e-6))
    spec = replace(SPEC, attention=attention, norm=replace(SPEC.norm, unit_offset=True))
    assert spec.unit_offset(role) is unit_offset
    assert not spec.without_unit_offsets().unit_offset(role)


def test_a_token_reads_the_experts_it_takes_and_all_of_the_rest():
    mlp = Mlp(intermediate_size=32, experts=Experts(count=8, used=2, scale=2.5))
    spec = replace(SPEC, layers=(*SPEC.layers, Layer(mlp=mlp)))
    shapes = dict(spec.weights())
    assert shapes["layers.1.expert_up"] == (8, 32, 64)
    assert shapes["layers.1.expert_down"] == (8, 64, 32)
    shares = {role: spec.share_read(role) for role in shapes}
    assert {role for role, share in shares.items() if share == 0.25} == {
        f"layers.1.{part}" for part in ("expert_gate", "expert_up", "expert_down")
    }
    assert shares["token_embedding"] == 0
    assert shares["layers.1.router"] == shares["layers.0.up"] == 1
    assert {role for role in shapes if spec.multiplier(role) == 2.5} == {"layers.1.expert_down"}


MUP = Multipliers(embedding=12.0, query=0.5, residual=0.25, logits=0.125)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"token_embedding": 12.0, "query": 0.5, "attention_output": 0.25, "down": 0.25,
              "final_norm": 0.125}),
        ({"is_tied": True}, {"token_embedding": 12.0, "query": 0.5, "attention_output": 0.25,
                             "down": 0.25, "final_norm": 0.125 / 12}),
        ({"has_post_norms": True}, {"token_embedding": 12.0, "query": 0.5,
                                    "attention_post_norm": 0.25, "mlp_post_norm": 0.25,
                                    "final_norm": 0.125}),
        ({"query_key_norm": SPEC.norm}, {"token_embedding": 12.0, "query_norm": 0.5,
                                   "attention_output": 0.25, "down": 0.25, "final_norm": 0.125}),
        ({"has_qkv_bias": True, "has_output_bias": True, "has_mlp_bias": True,
          "has_head_bias": True},
         {"token_embedding": 12.0, "query": 0.5, "query_bias": 0.5, "attention_output": 0.25,
          "attention_output_bias": 0.25, "down": 0.25, "down_bias": 0.25, "final_norm": 0.125,
          "output_head_bias": 0.125}),
    ],
)  # fmt: skip
def test_each_multiplier_is_in_one_weight_of_its_path(changes, expected):
    """Scores, what a layer adds, and logits are each multiplied once, whatever stands there."""
    names = {"query_key_norm", "has_qkv_bias", "has_output_bias"} & changes.keys()
    attention = replace(SPEC.attention, **{name: changes[name] for name in names})
    rest = {name: value for name, value in changes.items() if name not in names}
    spec = replace(SPEC, attention=attention, multipliers=MUP, **rest)
    found = {role.rpartition(".")[2]: spec.multiplier(role) for role, _ in spec.weights()}
    assert {role: by for role, by in found.items() if by != 1} == expected
