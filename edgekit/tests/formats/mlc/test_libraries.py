"""Which prebuilt library runs a model, and what is said where none does."""

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from edgekit.formats.mlc import decoders, libraries
from edgekit.formats.mlc.packing import SCHEMES
from edgekit.model.mixers import Attention, DeltaNet
from edgekit.model.norm import Norm
from edgekit.model.rope import Llama3Scaling, Rope
from edgekit.model.spec import DecoderSpec, Layer
from edgekit.model.tokenizer_files import TokenizerFiles
from edgekit.source.checkpoint import Checkpoint


NO_TEXT = TokenizerFiles(
    tokenizer_json=Path("absent"), special_tokens={}, chat_template=None, declared_stop_ids=(),
    stop_ids_by_file={},
)  # fmt: skip
QWEN = DecoderSpec(  # Qwen2.5-0.5B
    vocab_size=151936,
    hidden_size=896,
    intermediate_size=4864,
    context_tokens=32768,
    layers=(Layer(rope=Rope(width=64, theta=1_000_000.0)),) * 24,
    attention=Attention(
        heads=14, num_kv_heads=2, head_dim=64, softmax_scale=0.125, has_qkv_bias=True
    ),
    norm=Norm(kind="rms", epsilon=1e-6),
    is_tied=True,
)
LLAMA = DecoderSpec(  # Llama-3.2-1B
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    context_tokens=131072,
    layers=(
        Layer(
            rope=Rope(
                width=64,
                theta=500_000.0,
                scaling=Llama3Scaling(
                    factor=32.0,
                    low_frequency_factor=1.0,
                    high_frequency_factor=4.0,
                    original_context_tokens=8192,
                ),
            )
        ),
    )
    * 16,
    attention=Attention(heads=32, num_kv_heads=8, head_dim=64, softmax_scale=0.125),
    norm=Norm(kind="rms", epsilon=1e-5),
    is_tied=True,
)
SMOLLM = replace(  # SmolLM2-360M
    LLAMA,
    vocab_size=49152,
    hidden_size=960,
    intermediate_size=2560,
    layers=(Layer(rope=Rope(width=64, theta=100_000.0)),) * 32,
    attention=Attention(heads=15, num_kv_heads=5, head_dim=64, softmax_scale=0.125),
)

GEMMA = DecoderSpec(  # Gemma 2B
    vocab_size=256000,
    hidden_size=2048,
    intermediate_size=16384,
    context_tokens=8192,
    layers=(Layer(rope=Rope(width=256, theta=10_000.0)),) * 18,
    attention=Attention(heads=8, num_kv_heads=1, head_dim=256, softmax_scale=1 / 16),
    norm=Norm(kind="rms", epsilon=1e-6, unit_offset=True),
    activation="gelu_tanh",
    embedding_scale=2048**0.5,
    is_tied=True,
)
OLMO = DecoderSpec(  # OLMo-2-0425-1B
    vocab_size=100352,
    hidden_size=2048,
    intermediate_size=8192,
    context_tokens=4096,
    layers=(Layer(rope=Rope(width=128, theta=500_000.0)),) * 16,
    attention=Attention(
        heads=16, num_kv_heads=16, head_dim=128, softmax_scale=128**-0.5,
        query_key_norm=Norm(kind="rms", epsilon=1e-6), head_norms="together",
    ),
    norm=Norm(kind="rms", epsilon=1e-6),
    has_pre_norms=False,
    has_post_norms=True,
)  # fmt: skip
PHI = DecoderSpec(  # Phi-2
    vocab_size=51200,
    hidden_size=2560,
    intermediate_size=10240,
    context_tokens=2048,
    layers=(Layer(rope=Rope(width=32, theta=10_000.0)),) * 32,
    attention=Attention(
        heads=32, num_kv_heads=32, head_dim=80, softmax_scale=80**-0.5, has_qkv_bias=True,
        has_output_bias=True,
    ),
    norm=Norm(kind="layer", epsilon=1e-5, has_bias=True),
    activation="gelu_tanh",
    residual="parallel",
    is_gated=False,
    has_mlp_bias=True,
    has_head_bias=True,
)  # fmt: skip


def qwen3_5(*, value_heads=16, layers=24, **changes):
    """Return Qwen3.5-0.8B, or another size of it."""
    norm = Norm(kind="rms", epsilon=1e-6)
    net = DeltaNet(
        key_heads=16, value_heads=value_heads, key_head_dim=128, value_head_dim=128, taps=4,
        norm=norm,
    )  # fmt: skip
    attention = Attention(
        heads=8, num_kv_heads=2, head_dim=256, softmax_scale=1 / 16,
        query_key_norm=replace(norm, unit_offset=True), has_output_gate=True,
    )  # fmt: skip
    attends = Layer(rope=Rope(width=64, theta=1e7))
    spec = DecoderSpec(
        vocab_size=248_320,
        hidden_size=1024,
        intermediate_size=3584,
        context_tokens=262_144,
        layers=(*[Layer(mixer=net)] * 3, attends) * (layers // 4),
        attention=attention,
        norm=replace(norm, unit_offset=True),
        is_tied=True,
    )
    return replace(spec, **changes)


QWEN3_5_9B = replace(
    qwen3_5(value_heads=32, layers=32), hidden_size=4096, intermediate_size=12_288, is_tied=False,
    attention=replace(qwen3_5().attention, heads=16, num_kv_heads=4),
)  # fmt: skip


def found_for(checkpoint, scheme):
    """Return the library for a model, which there must be."""
    found = libraries.find(checkpoint, scheme)
    assert found is not None
    return found


@pytest.fixture
def checkpoint(tmp_path):
    def make(architecture, spec):
        return Checkpoint(
            directory=tmp_path / "mine", architecture=architecture, spec=spec, tensors={},
            text=NO_TEXT,
        )  # fmt: skip

    return make


@pytest.mark.parametrize(
    ("architecture", "spec", "scheme", "name"),
    [
        ("qwen2", QWEN, "q4f16_1", "Qwen2-0.5B-Instruct-q4f16_1_cs1k-webgpu.wasm"),
        ("qwen2", QWEN, "q0f32", "Qwen2-0.5B-Instruct-q0f32_cs1k-webgpu.wasm"),
        ("llama", LLAMA, "q4f32_1", "Llama-3.2-1B-Instruct-q4f32_1_cs1k-webgpu.wasm"),
        ("llama", SMOLLM, "q4f16_1", "SmolLM2-360M-Instruct-q4f16_1_cs1k-webgpu.wasm"),
        ("gemma", GEMMA, "q4f16_1", "gemma-2b-it-q4f16_1_cs1k-webgpu.wasm"),
        ("olmo2", OLMO, "q4f32_1", "OLMo-2-0425-1B-Instruct-q4f32_1_cs1k-webgpu.wasm"),
        ("phi", PHI, "q4f16_1", "phi-2-q4f16_1_cs1k-webgpu.wasm"),
        ("qwen3_5_text", qwen3_5(), "q0f16", "Qwen3.5-0.8B-q0f16_cs1k-webgpu.wasm"),
        ("qwen3_5_text", QWEN3_5_9B, "q4f32_1", "Qwen3.5-9B-q4f32_1_cs1k-webgpu.wasm"),
        ("exaone", LLAMA, "q4f16_1", "Llama-3.2-1B-Instruct-q4f16_1_cs1k-webgpu.wasm"),
    ],
)
def test_a_fine_tune_takes_the_library_of_its_base(checkpoint, architecture, spec, scheme, name):
    found = found_for(checkpoint(architecture, spec), scheme)
    assert found.name == name
    assert found.webllm_version == "0.2.86"
    assert found.url.startswith("https://")
    assert found.url.endswith(f"/v0_2_86/base/{name}")


def test_added_tokens_leave_a_library_that_is_bound_to_the_vocabulary(checkpoint):
    grown = checkpoint("qwen2", replace(QWEN, vocab_size=151968))
    assert libraries.find(grown, "q4f16_1") is None
    assert libraries.missing(grown, "q4f16_1") == (
        "no WebGPU library is prebuilt for this shape: Qwen2-0.5B-Instruct-q4f16_1_cs1k-webgpu.wasm"
        " has vocab size 151936, not 151968"
    )


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (qwen3_5(vocab_size=248_384), "has vocab size 248320, not 248384"),
        (
            qwen3_5(value_heads=32),
            "16 values of 128, 4 taps, 1 of 4 attends, not 16 keys of 128, 32",
        ),
    ],
)
def test_delta_nets_and_their_vocabulary_are_compiled_in(checkpoint, spec, words):
    model = checkpoint("qwen3_5_text", spec)
    assert libraries.find(model, "q4f16_1") is None
    assert words in libraries.missing(model, "q4f16_1")


def test_added_tokens_keep_one_whose_embedding_may_have_any_size(checkpoint):
    grown = checkpoint("llama", replace(LLAMA, vocab_size=128264))
    assert found_for(grown, "q4f16_1").stem == "Llama-3.2-1B-Instruct"


def test_another_rope_is_another_shape(checkpoint):
    layers = (Layer(rope=Rope(width=64, theta=10_000.0)),) * 24
    turned = checkpoint("qwen2", replace(QWEN, layers=layers))
    assert libraries.find(turned, "q4f16_1") is None
    assert "rope 64 channels, theta 1000000, not 64 channels, theta 10000" in libraries.missing(
        turned, "q4f16_1"
    )


def test_another_scheme_of_the_same_shape_is_named(checkpoint):
    assert libraries.missing(checkpoint("llama", SMOLLM), "q4f16_2") == (
        "no WebGPU library is prebuilt for q4f16_2: SmolLM2-360M-Instruct has q0f16, q0f32, "
        "q4f16_1, q4f32_1"
    )


def test_a_shape_like_no_other_has_no_near_miss(checkpoint):
    small = checkpoint(
        "llama", replace(LLAMA, hidden_size=320, intermediate_size=640, is_tied=False)
    )
    assert libraries.missing(small, "q4f16_1") == (
        "no WebGPU library is prebuilt for a model of this shape as q4f16_1"
    )


def test_the_table_says_where_it_comes_from_and_has_no_two_for_one_model():
    table = tomllib.loads(libraries.TABLE.read_text(encoding="utf-8"))
    assert str(table["date"]) == "2026-11-28"
    assert all(entry["shape_source"] for entry in table["library"])
    known = [(library.shape, library.scheme) for library in libraries.prebuilt()]
    assert len(known) == len(set(known))
    assert len(known) > 40
    assert {scheme for _, scheme in known} <= SCHEMES.keys()


def test_a_library_names_its_vocabulary_exactly_where_it_is_bound_to_one():
    prebuilt = libraries.prebuilt()
    assert len({library.shape.vocab_size is None for library in prebuilt}) == 2
    for library in prebuilt:
        model = decoders.MODELS[library.shape.architecture]
        assert (library.shape.vocab_size is not None) == model.is_bound_to_vocabulary
