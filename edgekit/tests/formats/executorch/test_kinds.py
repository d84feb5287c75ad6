"""Layers that not every back-end computes: a plan refuses them, and names the kind."""

from dataclasses import replace

import pytest

from edgekit.errors import UsageError
from edgekit.formats import BuildRequest
from edgekit.formats.executorch import conversion, kinds, tensor_types
from edgekit.model.mixers import Attention, DeltaNet, ShortConv
from edgekit.model.norm import Norm
from edgekit.model.spec import DecoderSpec, Experts, Layer, LayerEmbedding, Mlp


NORM = Norm(kind="rms", epsilon=1e-6)
ATTENTION = Attention(heads=2, num_kv_heads=1, head_dim=8, softmax_scale=1.0)
DELTA_NET = DeltaNet(
    key_heads=1, value_heads=1, key_head_dim=8, value_head_dim=8, taps=3, norm=NORM
)
LAYER_EMBEDDING = LayerEmbedding(
    width=4, vocab_size=8, scale=1.0, projection_scale=1.0, sum_scale=1.0
)
PLAIN = DecoderSpec(
    vocab_size=8, hidden_size=16, intermediate_size=32, context_tokens=64,
    layers=(Layer(),) * 3, attention=ATTENTION, norm=NORM,
)  # fmt: skip


def with_mixer(mixer):
    return replace(PLAIN, layers=(Layer(), Layer(), Layer(mixer=mixer)))


SPECIAL = {
    kinds.SHORT_CONVOLUTIONS: with_mixer(ShortConv(taps=3)),
    kinds.DELTA_NETS: with_mixer(DELTA_NET),
    kinds.OUTPUT_GATES: with_mixer(replace(ATTENTION, has_output_gate=True)),
    kinds.HEAD_GATES: with_mixer(replace(ATTENTION, has_head_gate=True)),
    kinds.OWN_ATTENTION: with_mixer(replace(ATTENTION, head_dim=16)),
    kinds.SHARED_CACHES: with_mixer(replace(ATTENTION, cache_of=0)),
    kinds.VALUE_NORMS: with_mixer(replace(ATTENTION, value_norm_epsilon=1e-6)),
    kinds.KEYS_AS_VALUES: with_mixer(replace(ATTENTION, values_are_keys=True)),
    kinds.OWN_MLPS: replace(
        PLAIN, layers=(Layer(), Layer(), Layer(mlp=Mlp(intermediate_size=64)))
    ),
    kinds.LAYER_EMBEDDINGS: replace(PLAIN, layer_embedding=LAYER_EMBEDDING),
    kinds.LAYER_SCALES: replace(PLAIN, has_layer_scales=True),
}  # fmt: skip


def plan(spec, variant):
    request = BuildRequest(recipe=tensor_types.RECIPES["F16"], context_tokens=64, variant=variant)
    return conversion.variant_of(spec, request)


@pytest.mark.parametrize("variant", ["portable", "llm-ops", "vulkan", "coreml"])
def test_layers_that_are_alike_are_computed_everywhere(variant):
    assert plan(PLAIN, variant) == variant


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("variant", ["vulkan", "coreml"])
def test_a_kind_of_layer_that_a_back_end_lacks_is_named(kind, variant):
    with pytest.raises(UsageError, match=f"writes no {kind} for .* in ExecuTorch") as refusal:
        plan(SPECIAL[kind], variant)
    assert "--variant portable" in refusal.value.hint


@pytest.mark.parametrize("variant", ["portable", "llm-ops", "vulkan", "coreml"])
def test_experts_are_refused_for_every_back_end_with_the_reason(variant):
    mlp = Mlp(intermediate_size=8, experts=Experts(count=4, used=2))
    spec = replace(PLAIN, layers=(Layer(), Layer(mlp=mlp), Layer(mlp=mlp)))
    with pytest.raises(
        UsageError, match=r"no layers with experts \(the first is layer 1"
    ) as refusal:
        plan(spec, variant)
    assert "other matrices for each token" in str(refusal.value)
    assert "--format gguf" in refusal.value.hint


def test_the_first_such_layer_is_named():
    with pytest.raises(UsageError, match=r"\(the first is layer 2\)"):
        plan(SPECIAL[kinds.DELTA_NETS], "vulkan")
