"""What `Session` promises, kept by the runtime of every format, on a tiny real model."""

from dataclasses import replace
from typing import TYPE_CHECKING, cast

import pytest

from edgekit import formats
from edgekit.doctor import _tiny_checkpoint
from edgekit.errors import UsageError
from edgekit.formats import BuildRequest
from edgekit.proof.interpreter import InterpreterSession
from edgekit.tests.formats.test_formats import needs_runtime
from edgekit.tests.tiny.random_checkpoints import GEMMA2, random_checkpoint


if TYPE_CHECKING:
    from edgekit.formats import ReadableRunning

pytestmark = pytest.mark.toolchain
np = pytest.importorskip("numpy")
pytest.importorskip("tokenizers")

CONTEXT_TOKENS = 276  # more than any runtime here reads at once
VOCABULARY_TOKENS = 257
IDS = [72, 101, 108, 108, 111, 220, 4, 9]
CLOSE = {"rtol": 0, "atol": 2e-3}  # llama.cpp's cache is float16


@pytest.fixture(scope="module", params=formats.names())
def opened(request, tmp_path_factory):
    """Return a function that opens the tiny model in the runtime of a format."""
    recipe = next(iter(formats.get(request.param).RECIPES.values()))
    writing, running = formats.writing(request.param), formats.running(request.param)
    needs_runtime(request.param)
    directory = tmp_path_factory.mktemp(request.param)
    tiny = _tiny_checkpoint(directory)
    tiny = replace(tiny, spec=replace(tiny.spec, context_tokens=CONTEXT_TOKENS))
    asked = BuildRequest(recipe=recipe, context_tokens=CONTEXT_TOKENS)
    entry = writing.convert(tiny, asked, directory, progress=lambda _: None)

    def open_(context_tokens=CONTEXT_TOKENS):
        if running.is_run_here(None):
            return running.load(directory / entry, context_tokens=context_tokens, threads=1)
        model = cast("ReadableRunning", running).read_back(directory / entry, tiny.spec)
        return InterpreterSession(model, context_tokens=context_tokens)

    return open_


@pytest.fixture
def session(opened):
    session = opened()
    yield session
    session.close()


def test_it_has_the_width_of_the_vocabulary_and_the_context_asked_for(session):
    assert session.vocabulary_tokens == VOCABULARY_TOKENS
    assert session.context_tokens == CONTEXT_TOKENS
    logits = session.prefill(IDS)
    assert logits.shape == (VOCABULARY_TOKENS,)
    assert logits.dtype == np.float32
    assert logits.std() > 0.01


def test_a_prompt_may_come_in_one_piece_in_several_or_token_by_token(session):
    whole = session.prefill(IDS).copy()
    session.reset()
    session.prefill(IDS[:3])
    pieces = session.prefill(IDS[3:]).copy()
    session.reset()
    single = [session.decode(token).copy() for token in IDS][-1]
    np.testing.assert_allclose(pieces, whole, **CLOSE)
    np.testing.assert_allclose(single, whole, **CLOSE)


def test_all_logits_are_those_of_each_token(session):
    rows = session.all_logits(IDS)
    assert rows.shape == (len(IDS), VOCABULARY_TOKENS)
    session.reset()
    for index, token in enumerate(IDS):
        np.testing.assert_allclose(session.decode(token), rows[index], **CLOSE)


def test_a_text_as_long_as_the_context_has_every_row(session):
    ids = [(7 * index) % 256 for index in range(CONTEXT_TOKENS)]
    rows = session.all_logits(ids)
    session.reset()
    np.testing.assert_allclose(session.prefill(ids), rows[-1], **CLOSE)
    session.reset()
    np.testing.assert_allclose(session.prefill(ids[:5]), rows[4], **CLOSE)
    assert np.abs(rows).max(axis=1).min() > 0.01


def test_all_logits_belong_to_the_caller(session):
    rows = session.all_logits(IDS)
    kept = rows.copy()
    session.all_logits(IDS[::-1])
    session.reset()
    session.prefill(IDS)
    np.testing.assert_array_equal(rows, kept)


def test_what_was_read_before_matters_and_reset_forgets_it(session):
    fresh = session.prefill(IDS).copy()
    after = session.prefill(IDS).copy()
    session.reset()
    again = session.prefill(IDS).copy()
    assert not np.allclose(after, fresh, **CLOSE)
    np.testing.assert_array_equal(again, fresh)


def test_all_logits_empty_the_cache_first(session):
    session.prefill([5] * CONTEXT_TOKENS)
    assert session.all_logits(IDS).shape == (len(IDS), VOCABULARY_TOKENS)


def test_two_sessions_do_not_disturb_each_other(opened, session):
    fresh = session.prefill(IDS).copy()
    other = opened(16)
    other.prefill([1, 2, 3])
    session.reset()
    np.testing.assert_array_equal(session.prefill(IDS), fresh)
    other.close()
    session.decode(5)


def test_a_smaller_context_than_the_artifact_could_hold_is_kept_to(opened):
    small = opened(16)
    assert small.context_tokens == 16
    small.prefill([1] * 16)
    with pytest.raises(UsageError):
        small.decode(1)
    small.close()
    small.close()  # twice does no harm


def test_what_exceeds_the_context_is_refused_and_exactly_full_is_full(session):
    session.prefill(IDS)
    left = CONTEXT_TOKENS - len(IDS)
    with pytest.raises(UsageError, match=f"exceed the context of {CONTEXT_TOKENS}"):
        session.prefill([1] * (left + 1))
    session.prefill([1] * left)
    with pytest.raises(UsageError, match="exceed the context"):
        session.decode(1)
    with pytest.raises(UsageError, match="exceed the context"):
        session.all_logits([1] * (CONTEXT_TOKENS + 1))
    session.reset()
    session.prefill([1] * CONTEXT_TOKENS)


def test_no_tokens_have_no_next_token(session):
    with pytest.raises(UsageError, match="empty prompt"):
        session.prefill([])


@pytest.mark.parametrize("token", [VOCABULARY_TOKENS, -1])
def test_a_token_that_is_none_is_refused_and_the_session_goes_on(session, token):
    fresh = session.prefill(IDS).copy()
    for read in (lambda: session.decode(token), lambda: session.prefill([1, token]),
                 lambda: session.all_logits([token, 1])):  # fmt: skip
        session.reset()
        with pytest.raises(UsageError, match=f"no token id {token}, the vocabulary has 257"):
            read()
    session.reset()
    np.testing.assert_array_equal(session.prefill(IDS), fresh)


def test_it_goes_back_to_a_shorter_text_or_says_that_it_cannot(opened, session):
    others = [200, 3, 50]
    fresh = session.prefill([*IDS[:5], *others]).copy()
    session.reset()
    session.prefill(IDS)
    if session.rewind(5):
        np.testing.assert_allclose(session.prefill(others), fresh, **CLOSE)
        session.prefill([1] * (CONTEXT_TOKENS - 8))  # and has the room of what it forgot
        assert session.rewind(5)
        np.testing.assert_allclose(session.prefill(others), fresh, **CLOSE)
    session.reset()
    np.testing.assert_array_equal(session.prefill([*IDS[:5], *others]), fresh)


@pytest.mark.parametrize("name", ["gguf", "onnx"])
def test_going_back_is_possible_where_layers_attend_to_a_window(name, tmp_path):
    needs_runtime(name)
    plain = random_checkpoint(
        tmp_path, "gemma2", layers=4, context_tokens=CONTEXT_TOKENS, activation="gelu_tanh",
        embedding_scale=_tiny_checkpoint(tmp_path).spec.hidden_size**0.5, is_tied=True, **GEMMA2,
    )  # fmt: skip
    layers = [
        replace(layer, window_tokens=None if index % 2 else 8)
        for index, layer in enumerate(plain.spec.layers)
    ]
    model = replace(plain, spec=replace(plain.spec, layers=tuple(layers)))
    recipe = next(iter(formats.get(name).RECIPES.values()))
    asked = BuildRequest(recipe=recipe, context_tokens=CONTEXT_TOKENS)
    entry = formats.writing(name).convert(model, asked, tmp_path, progress=lambda _: None)
    session = formats.running(name).load(tmp_path / entry, context_tokens=CONTEXT_TOKENS, threads=1)
    ids = [(7 * index) % 256 for index in range(200)]
    fresh = session.prefill(ids[:60]).copy()
    session.prefill(ids[60:])
    assert session.rewind(50)
    np.testing.assert_allclose(session.prefill(ids[50:60]), fresh, **CLOSE)
    session.close()
