"""MLC's settings, and which decoders its models compute."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgekit.errors import UsageError
from edgekit.formats import BuildRequest, GpuBuffer
from edgekit.formats.mlc import chat_config, decoders, packing, writing
from edgekit.model.mixers import Attention, DeltaNet, QueryGrowth, ShortConv
from edgekit.model.norm import Norm
from edgekit.model.rope import LinearScaling, Llama3Scaling, LongRopeScaling, Rope, YarnScaling
from edgekit.model.spec import DecoderSpec, Layer, LayerEmbedding, Mlp


pytest.importorskip("numpy")
pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

GOLDEN = Path(__file__).parent / "data"


def tiny_spec(**changes):
    return replace(
        DecoderSpec(
            vocab_size=96,
            hidden_size=64,
            intermediate_size=96,
            context_tokens=512,
            layers=(Layer(rope=Rope(width=16, theta=10_000.0)),) * 2,
            attention=Attention(heads=4, num_kv_heads=2, head_dim=16, softmax_scale=0.25),
            norm=Norm(kind="rms", epsilon=1e-6),
        ),
        **changes,
    )


def with_attention(**changes):
    return tiny_spec(attention=replace(tiny_spec().attention, **changes))


def with_rope(**changes):
    return tiny_spec(layers=(Layer(rope=replace(Rope(width=16, theta=1e4), **changes)),) * 2)


# Settings


@pytest.mark.parametrize(
    ("name", "scheme", "spec"),
    [
        ("llama_odd_f32", "q3f16_1", tiny_spec(
            vocab_size=101, hidden_size=60, intermediate_size=70,
            attention=Attention(heads=6, num_kv_heads=3, head_dim=12, softmax_scale=12**-0.5),
        )),
        ("llama_untied_f32", "q4f16_0", tiny_spec()),
        ("qwen2_tied_f32", "q4f16_1", tiny_spec(is_tied=True)),
    ],
)  # fmt: skip
def test_settings_are_in_the_words_and_the_order_of_mlc_llm(name, scheme, spec):
    expected = json.loads((GOLDEN / name / "mlc-chat-config.json").read_text())
    found = chat_config.model_config(
        expected["model_type"], spec, context_tokens=512, chunk_tokens=512
    )
    assert expected["quantization"] == scheme
    assert json.dumps(found) == json.dumps(expected["model_config"])


def test_the_outer_fields_are_those_of_mlc_llm_in_its_order(tmp_path):
    from edgekit.doctor import _tiny_checkpoint

    expected = json.loads((GOLDEN / "llama_untied_f32" / "mlc-chat-config.json").read_text())
    checkpoint = _tiny_checkpoint(tmp_path)
    found = chat_config.build(
        checkpoint, "q4f16_1", context_tokens=48, conv_template={"seps": [""]}
    )
    assert list(found) == list(expected)
    assert found["context_window_size"] == found["prefill_chunk_size"] == 48
    assert found["vocab_size"] == 257
    assert found["eos_token_id"] == 256
    assert found["conv_template"] == {"seps": [""]}
    kinds = {key: type(value) for key, value in expected.items()}
    assert {key: type(value) for key, value in found.items()} == kinds


def test_a_prompt_is_read_in_chunks_as_large_as_a_prebuilt_library_takes(tmp_path):
    from edgekit.doctor import _tiny_checkpoint

    checkpoint = _tiny_checkpoint(tmp_path)
    found = chat_config.build(checkpoint, "q4f16_1", context_tokens=8192, conv_template={})
    assert (found["context_window_size"], found["prefill_chunk_size"]) == (8192, 1024)


def test_special_tokens_and_sampling_come_from_the_checkpoint(tmp_path):
    from edgekit.doctor import _tiny_checkpoint

    checkpoint = _tiny_checkpoint(tmp_path)
    checkpoint.directory.mkdir()
    said = {"bos_token_id": 7, "pad_token_id": 9, "temperature": 0.6, "top_p": 0.95}
    (checkpoint.directory / "generation_config.json").write_text(json.dumps(said))
    found = chat_config.build(checkpoint, "q4f16_1", context_tokens=64, conv_template={})
    assert {key: found[key] for key in said} == said
    assert (found["repetition_penalty"], found["presence_penalty"]) == (1.0, 0.0)


LONG = LongRopeScaling(
    short_factors=(1.0,) * 8, long_factors=(2.0,) * 8, original_context_tokens=128,
    attention_factor=decoders._attention_factor(512, 128),
)  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "spec", "fields"),
    [
        ("llama", with_rope(scaling=Llama3Scaling(
            factor=32.0, low_frequency_factor=1.0, high_frequency_factor=4.0,
            original_context_tokens=64)),
         {"rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
                           "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
        ("mistral", tiny_spec(), {"sliding_window_size": -1, "position_embedding_base": 10_000.0}),
        ("qwen3", with_attention(has_qkv_bias=True, has_output_bias=True),
         {"attention_bias": True, "rope_theta": 10_000.0, "head_dim": 16}),
        ("phi3", with_rope(scaling=LONG),
         {"max_position_embeddings": 512, "original_max_position_embeddings": 128,
          "partial_rotary_factor": 1.0}),
        ("phi3", with_rope(width=12), {"rope_scaling": None, "partial_rotary_factor": 0.75}),
        ("gemma2", with_attention(attn_logit_softcap=50.0),
         {"attn_logit_softcapping": 50.0, "query_pre_attn_scalar": 16, "sliding_window": 64}),
        ("stablelm", with_rope(width=4), {"partial_rotary_factor": 0.25, "layer_norm_eps": 1e-6}),
    ],
)  # fmt: skip
def test_a_model_definition_is_told_what_the_decoder_is(architecture, spec, fields):
    found = chat_config.model_config(architecture, spec, context_tokens=64, chunk_tokens=64)
    assert {key: found[key] for key in fields} == fields
    assert (found["hidden_size"], found["num_hidden_layers"]) == (64, 2)
    assert (found["context_window_size"], found["prefill_chunk_size"]) == (64, 64)


# What MLC computes


RMS = Norm(kind="rms", epsilon=1e-6)
LAYER = Norm(kind="layer", epsilon=1e-6, has_bias=True)
PLUS_ONE = replace(RMS, unit_offset=True)
GEMMA: dict[str, Any] = {
    "norm": PLUS_ONE, "activation": "gelu_tanh", "embedding_scale": 8.0, "is_tied": True,
}  # fmt: skip
UNGATED: dict[str, Any] = {"is_gated": False, "activation": "gelu_tanh", "norm": LAYER}
PART = with_rope(width=8).layers
NET = DeltaNet(
    key_heads=2, value_heads=4, key_head_dim=8, value_head_dim=8, taps=4, norm=RMS
)  # fmt: skip
ATTENDING, FORGETTING = Layer(rope=Rope(width=4, theta=1e7)), Layer(mixer=NET)
# A decoder that each of MLC's models computes.
COMPUTED = {
    "llama": tiny_spec(),
    "mistral": tiny_spec(layers=(Layer(rope=Rope(width=16, theta=1e4), window_tokens=8),)),
    "qwen2": with_attention(has_qkv_bias=True),
    "qwen3": with_attention(query_key_norm=RMS),
    "phi3": with_rope(scaling=LONG),
    "gemma": tiny_spec(**GEMMA),
    "gemma2": replace(
        with_attention(attn_logit_softcap=50.0), has_post_norms=True, final_logit_softcap=30.0,
        **GEMMA,
    ),
    "olmo2": replace(
        with_attention(query_key_norm=RMS, head_norms="together"), has_pre_norms=False,
        has_post_norms=True,
    ),
    "stablelm": replace(with_rope(width=4), norm=LAYER),
    "phi": replace(
        with_attention(has_qkv_bias=True, has_output_bias=True), layers=PART, residual="parallel",
        has_mlp_bias=True, has_head_bias=True, **UNGATED,
    ),
    "nemotron": tiny_spec(
        layers=PART, is_gated=False, activation="relu2", norm=replace(LAYER, unit_offset=True)
    ),
    "cohere": tiny_spec(residual="parallel", norm=replace(LAYER, has_bias=False), is_tied=True),
    "qwen3_5_text": replace(
        with_attention(query_key_norm=PLUS_ONE, has_output_gate=True), norm=PLUS_ONE,
        layers=(FORGETTING, FORGETTING, ATTENDING) * 2,
    ),
    "starcoder2": replace(
        with_attention(has_qkv_bias=True, has_output_bias=True), has_mlp_bias=True, is_tied=True,
        **UNGATED,
    ),
}  # fmt: skip


def test_every_model_is_told_of():
    assert COMPUTED.keys() == decoders.MODELS.keys() - {"gemma3_text"}  # which is never taken


@pytest.mark.parametrize("name", COMPUTED)
def test_what_mlc_computes_is_taken_under_its_own_name(name):
    decoders.refuse(name, COMPUTED[name])
    assert decoders.model_type(name, COMPUTED[name]) == name


@pytest.mark.parametrize("name", COMPUTED)
def test_what_mlc_computes_is_taken_under_any_other_name(name):
    decoders.refuse("acme", COMPUTED[name])
    assert decoders.model_type("acme", COMPUTED[name]) == {"mistral": "llama"}.get(name, name)


@pytest.mark.parametrize(
    ("architecture", "spec", "name"),
    [
        ("llama", with_attention(has_qkv_bias=True), "qwen2"),
        ("qwen2", tiny_spec(), "llama"),
        ("mistral", tiny_spec(is_tied=True), "llama"),
        ("glm", with_rope(width=8), "phi3"),
        ("llama", with_attention(head_dim=24, softmax_scale=24**-0.5), "llama"),
        ("olmo2", tiny_spec(), "llama"),
    ],
)  # fmt: skip
def test_a_decoder_becomes_the_model_that_computes_it(architecture, spec, name):
    if spec.attention.head_dim == 24:
        spec = replace(spec, layers=(Layer(rope=Rope(width=24, theta=1e4)),) * 2)
    decoders.refuse(architecture, spec)
    assert decoders.model_type(architecture, spec) == name


YARN = YarnScaling(
    factor=4.0, fast_turns=32.0, slow_turns=1.0, original_context_tokens=64, attention_factor=1.1,
    is_truncated=True,
)  # fmt: skip
LINEAR = LinearScaling(factor=4.0)
LLAMA3 = Llama3Scaling(
    factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_context_tokens=64
)
TWO_ROPES = (Layer(rope=Rope(width=16, theta=1e4)), Layer(rope=Rope(width=16, theta=1e6)))


def changed(name, **changes):
    """Return a decoder that a model computes but for what changes, of its attention too."""
    spec = COMPUTED[name]
    fields = {key: value for key, value in changes.items() if hasattr(spec.attention, key)}
    rest = {key: value for key, value in changes.items() if key not in fields}
    return replace(spec, attention=replace(spec.attention, **fields), **rest)


@pytest.mark.parametrize(
    ("architecture", "spec", "words"),
    [
        ("smollm3", tiny_spec(layers=(Layer(rope=Rope(width=16, theta=1e4)), Layer(rope=None))),
         "MLC has no model with layers that have no positions"),
        ("gemma3_text", changed("gemma", layers=TWO_ROPES), "one rope for all layers in a browser"),
        ("gemma3_text", changed("gemma2", query_key_norm=PLUS_ONE), "gemma3_text model has one r"),
        ("ministral3", with_rope(scaling=YARN), "two halves of a head by different angles"),
        ("apertus", changed("nemotron", activation="xielu"), "no model whose MLP computes xIELU"),
        ("hunyuan_v1_dense", changed("qwen3", normalizes_after_rope=True), "after their rotation"),
        ("lfm3", with_attention(has_head_gate=True), "one gate for all channels of a head"),
        ("gpt2", changed("phi", residual="serial"), "MLC's phi model, the nearest to gpt2, runs"),
        ("llama", with_rope(scaling=LINEAR), "MLC's llama model has no linear rope"),
        ("qwen2", changed("qwen2", layers=with_rope(scaling=LLAMA3).layers), "has no llama3 rope"),
        ("qwen2", changed("qwen2", layers=with_rope(scaling=LONG).layers), "has no longrope rope"),
        ("qwen2", changed("qwen2", layers=PART), "rotates whole heads, the checkpoint 8 channels"),
        ("phi3", with_rope(scaling=replace(LONG, attention_factor=1.5)),
         "attention factor of 1.1339, the checkpoint 1.5000"),
        ("llama", with_attention(has_output_bias=True), "no biases on the output of attention"),
        ("qwen3", changed("qwen3", has_qkv_bias=True), "all of its biases or none"),
        ("starcoder2", changed("starcoder2", has_mlp_bias=False), "all of its biases or none"),
        ("llama", tiny_spec(has_mlp_bias=True), "no biases in the MLP"),
        ("phi", changed("phi", has_head_bias=False), "has biases on logits"),
        ("stablelm", changed("stablelm", residual="parallel"), "runs both in parallel"),
        ("stablelm", changed("stablelm", query_key_norm=LAYER), "norms on queries and keys"),
        ("olmo2", changed("olmo2", head_norms="alike"), "norms on queries and keys"),
        ("qwen3", changed("qwen3", query_key_norm=replace(RMS, epsilon=1e-5)), "has two"),
        ("phi", changed("phi", is_tied=True), "an output head of its own"),
        ("gemma2", changed("gemma2", is_tied=False), "the embedding as output head"),
        ("gemma2", changed("gemma2", softmax_scale=1 / 12),
         "multiplies scores by 0.2500, the checkpoint by 0.0833"),
        ("phi3", changed("phi3", layers=PART, heads=2),
         "splits a hidden width of 64 among 2"),
        ("hyperclovax", tiny_spec(has_post_norms=True), "does not normalize what attention"),
        ("exaone4", changed("olmo2", query_key_norm=None), "norms on queries and keys"),
        ("llama", tiny_spec(norm=LAYER, activation="relu2"), "has RMS norms without biases, the"),
        ("llama", tiny_spec(activation="gelu_tanh"), "computes silu with a gate in the MLP"),
        ("arcee", tiny_spec(activation="relu2", is_gated=False), "relu2 without a gate"),
        ("nemotron", changed("nemotron", norm=LAYER), "adds 1 to the weights of its norms"),
        ("gemma", changed("gemma", embedding_scale=1.0), "multiplies embeddings by 8.0000"),
        ("vaultgemma", changed("gemma", attn_logit_softcap=50.0), "caps neither scores nor logits"),
        ("lfm2", tiny_spec(layers=(Layer(mixer=ShortConv(taps=3)), *tiny_spec().layers)),
         "MLC has no model of lfm2: none has short convolutions"),
        ("gemma4_text", changed("gemma", has_layer_scales=True), "no model of gemma4_text whose"),
        ("gemma4_text", changed("gemma", layer_embedding=LayerEmbedding(
            width=8, vocab_size=96, scale=1.0, projection_scale=1.0, sum_scale=1.0)),
         "WebLLM's Gemma 4 takes tensors that only its library names"),
        ("gemma4_text", changed("gemma", layers=(
            Layer(rope=Rope(width=16, theta=1e4), mlp=Mlp(intermediate_size=192)),)),
         "none has layers of different shapes"),
        ("gemma4_text", changed("gemma", layers=(
            Layer(rope=Rope(width=16, theta=1e4), mixer=COMPUTED["gemma"].attention),)),
         "none has layers of different shapes"),
        ("qwen3_5_text", changed("qwen3_5_text", layers=(ATTENDING, FORGETTING, FORGETTING)),
         "attends in every n-th layer, the checkpoint in 0 of 0 to 2"),
        ("qwen3_5_text", changed("qwen3_5_text", layers=(FORGETTING, ATTENDING, ATTENDING)),
         "attends in every n-th layer, the checkpoint in 1, 2 of 0 to 2"),
        ("qwen3_5_text", changed("qwen3_5_text", layers=(FORGETTING,)), "no model without attenti"),
        ("qwen3_5_text", changed("qwen3_5_text", layers=(
            Layer(mixer=replace(NET, taps=3)), FORGETTING, ATTENDING)), "of one shape"),
        ("qwen3_5_text", changed("qwen3_5_text", has_output_gate=False), "has a gate on what atte"),
        ("qwen3_5_text", changed("qwen3_5_text", layers=(ATTENDING,)), "has delta nets, the chec"),
        ("qwen3_5_text", changed("qwen3_5_text", layers=(FORGETTING, replace(
            ATTENDING, rope=Rope(width=4, theta=1e7, scaling=LINEAR)))), "has no linear rope"),
        ("qwen3_5_text", changed("qwen3_5_text", layers=(Layer(
            mixer=replace(NET, norm=replace(RMS, epsilon=1e-5))), ATTENDING)), "has two"),
    ],
)  # fmt: skip
def test_what_mlc_computes_otherwise_is_refused_in_one_sentence(architecture, spec, words):
    with pytest.raises(UsageError, match=words) as refusal:
        decoders.refuse(architecture, spec)
    assert "\n" not in str(refusal.value)
    assert "--format gguf" in refusal.value.hint


def test_a_layout_refuses_too_before_anything_is_written(tmp_path):
    from edgekit.doctor import _tiny_checkpoint

    tiny = _tiny_checkpoint(tmp_path)
    biased = replace(tiny, spec=replace(tiny.spec, has_mlp_bias=True))
    with pytest.raises(UsageError, match="no biases in the MLP"):
        writing.lay_out(biased, BuildRequest(recipe=packing.RECIPES["q0f16"]))
    with pytest.raises(UsageError, match="32 MiB each"):
        writing.lay_out(tiny, BuildRequest(recipe=packing.RECIPES["q0f16"], split_bytes=10**8))


def test_a_cap_on_scores_is_left_out_told_and_counted():
    spec = with_attention(attn_logit_softcap=50.0)
    assert decoders.computed("gemma2", spec).attention.attn_logit_softcap is None
    (note,) = decoders.notes(spec)
    assert "leaves out the cap of 50 on attention scores" in note
    assert list(decoders.notes(tiny_spec())) == []


# Context


def test_the_context_is_the_models_own_where_mlc_computes_all_of_it():
    limit = decoders.context_limit("llama", tiny_spec())
    assert (limit.tokens, limit.reason) == (512, "the model was made for no more")


def test_a_window_ends_the_context_since_mlc_leaves_it_out():
    rope = Rope(width=16, theta=1e4)
    spec = tiny_spec(layers=(Layer(rope=rope), Layer(rope=rope, window_tokens=100)))
    limit = decoders.context_limit("llama", spec)
    assert limit.tokens == 100
    assert "leaves the window out" in limit.reason
    wide = tiny_spec(layers=(Layer(rope=rope, window_tokens=4096),))
    assert decoders.context_limit("phi3", wide).tokens == 512


def test_queries_that_grow_end_the_context_where_they_begin_to():
    spec = with_attention(query_growth=QueryGrowth(rate=0.1, step_tokens=128))
    limit = decoders.context_limit("ministral3", spec)
    assert (limit.tokens, limit.reason) == (128, "MLC's llama model lets no queries grow")
    assert decoders.computed("llama", spec) == tiny_spec()


def test_longrope_ends_where_the_long_factors_would_begin():
    limit = decoders.context_limit("phi3", with_rope(scaling=LONG))
    assert limit.tokens == 128
    assert "short factors" in limit.reason


def test_a_browser_must_bind_the_largest_tensor_and_compute_in_float16_only_where_asked(tmp_path):
    from edgekit.doctor import _tiny_checkpoint

    tiny = _tiny_checkpoint(tmp_path)
    half = writing.lay_out(tiny, BuildRequest(recipe=packing.RECIPES["q0f16"]))
    assert half.largest_buffer == GpuBuffer(
        name="model.embed_tokens.weight", size_bytes=257 * 64 * 2
    )
    assert half.needs_shader_f16
    full = writing.lay_out(tiny, BuildRequest(recipe=packing.RECIPES["q0f32"]))
    assert full.largest_buffer == GpuBuffer(  # as in memory, not as stored
        name="model.embed_tokens.weight", size_bytes=257 * 64 * 4
    )
    assert not full.needs_shader_f16
