"""Codes and scales as XNNPACK reads them."""

from dataclasses import replace

import pytest

from edgekit.errors import UsageError
from edgekit.formats import BuildRequest
from edgekit.formats.executorch import backends, conversion, tensor_types
from edgekit.formats.executorch.backends import xnnpack
from edgekit.model.mixers import Attention
from edgekit.model.norm import Norm
from edgekit.model.rope import Rope
from edgekit.model.spec import DecoderSpec, Layer
from edgekit.tests.tiny.executorch_artifacts import decoded


np = pytest.importorskip("numpy")


def matrix(rows=6, columns=256):
    return np.random.default_rng(3).normal(size=(rows, columns)).astype(np.float32)


@pytest.mark.parametrize(
    ("stored", "error"),
    [
        ("F32", 0),
        ("F16", 5e-4),
        ("INT8", 0.008),
        ("INT4_G32", 0.09),
        ("INT4_G64", 0.11),
        ("INT4_G128", 0.13),
    ],
)
def test_what_is_decoded_is_near_what_was_encoded(stored, error):
    values = matrix()
    found = decoded(tensor_types.encode(values, stored), stored)
    assert np.sqrt(np.mean((found - values) ** 2)) <= error


@pytest.mark.parametrize("stored", tensor_types.TENSOR_TYPES)
def test_parts_have_the_announced_sizes(stored):
    values = matrix()
    parts = list(tensor_types.parts("layers.0.up", values.shape, stored))
    assert [part.size_bytes for part in parts] == [
        array.nbytes for array in tensor_types.encode(values, stored)
    ]
    assert [part.key for part in parts] == ["layers.0.up", "layers.0.up.scale"][: len(parts)]


@pytest.mark.parametrize("stored", ["INT8", "INT4_G32"])
def test_scales_are_positive_even_where_all_weights_are_zero(stored):
    values = matrix(rows=2, columns=64)
    values[0] = 0
    parts = tensor_types.encode(values, stored)
    assert parts[1].astype(np.float32).min() > 0
    assert (decoded(parts, stored)[0] == 0).all()
    assert abs(decoded(parts, stored)[1] - values[1]).max() < 0.3


@pytest.mark.parametrize("stored", ["INT4_G32", "INT4_G128"])
def test_importance_leads_the_fit(stored):
    values, importance = matrix(), np.full(256, 1e-3, np.float32)
    importance[::16] = 1
    led = decoded(tensor_types.encode(values, stored, importance=importance), stored)
    plain = decoded(tensor_types.encode(values, stored), stored)

    def error(found):
        return float((((found - values) ** 2) * importance).sum())

    assert error(led) < 0.95 * error(plain)


def test_four_bit_codes_fill_a_byte_from_its_lower_half():
    values = np.tile(np.array([[-8, 7]], np.float32), (1, 16))
    codes, scales = tensor_types.encode(values, "INT4_G32")
    assert codes.tolist() == [[0xF0] * 16]
    assert (scales.astype(np.uint32) << 16).view(np.float32).tolist() == [[1.0]]


@pytest.mark.parametrize(("recipe", "words"), [("8da4w", "INT8"), ("8da4w_all", "INT4_G32")])
def test_the_token_embedding_takes_four_bits_only_where_all_do(recipe, words):
    planned = conversion.weights(spec(), tensor_types.RECIPES[recipe], xnnpack.BACKEND)
    found = {weight.role: weight.tensor_type for weight in planned}
    assert (found["token_embedding"], found["layers.0.up"]) == (words, "INT4_G32")
    assert found["final_norm"] == "F32"


@pytest.mark.parametrize(
    ("wanted", "columns", "stored"),
    [
        ("INT4_G128", 1024, "INT4_G128"), ("INT4_G128", 576, "INT4_G64"),
        ("INT4_G64", 96, "INT4_G32"), ("INT4_G32", 100, "INT8"), ("INT8", 100, "INT8"),
        ("F32", 1, "F32"),
    ],
)  # fmt: skip
def test_rows_that_fill_no_group_take_a_finer_storage(wanted, columns, stored):
    assert tensor_types.stored_as(wanted, columns) == stored


def test_a_weight_too_large_for_float16_is_refused():
    values = matrix()
    values[2, 3] = -70_000
    with pytest.raises(UsageError, match="a weight is 70000, too large for F16"):
        tensor_types.encode(values, "F16")


# Variants


def spec(window=None, **attention):
    return DecoderSpec(
        vocab_size=64, hidden_size=32, intermediate_size=64, context_tokens=64,
        layers=(Layer(rope=Rope(width=16, theta=1e4), window_tokens=window),),
        attention=Attention(
            heads=2, num_kv_heads=1, head_dim=16, softmax_scale=0.25, **attention
        ),
        norm=Norm(kind="rms", epsilon=1e-5),
    )  # fmt: skip


def asked(variant):
    return BuildRequest(recipe=tensor_types.RECIPES["F32"], variant=variant)


def test_the_first_variant_is_the_usual_one():
    assert conversion.variant_of(spec(), asked(None)) == backends.variants()[0] == "portable"
    assert conversion.variant_of(spec(), asked("llm-ops")) == "llm-ops"


def test_a_window_that_texts_outgrow_is_left_to_plain_operators_and_noted():
    decoder = spec(window=16).within(17)
    (note,) = backends.of("llm-ops").writing.notes(decoder, "llm-ops")
    assert note.endswith("plain operators: ExecuTorch's custom_sdpa has none with a window")
    assert list(backends.of("portable").writing.notes(decoder, "portable")) == []


@pytest.mark.parametrize(("context_tokens", "window"), [(64, None), (16, 16)])
def test_a_window_that_no_text_outgrows_is_none(context_tokens, window):
    decoder = spec(window).within(context_tokens)
    assert list(backends.of("llm-ops").writing.notes(decoder, "llm-ops")) == []


def test_an_unknown_variant_is_refused_with_those_that_are_known():
    with pytest.raises(UsageError, match="no variant 'metal'") as refusal:
        conversion.variant_of(spec(), asked("metal"))
    assert "portable, llm-ops" in refusal.value.hint


def test_a_program_is_never_split():
    with pytest.raises(UsageError, match="one file"):
        conversion.variant_of(spec(), replace(asked(None), split_bytes=2**20))
