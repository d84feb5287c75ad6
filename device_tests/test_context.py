"""The context holds what the manifest says and not a token more; past its end nothing crashes."""

import pytest

from edgekit.bundle.manifest import Bundle
from edgekit.errors import UsageError
from edgekit.measuring.measure import prompt_ids
from edgekit.run import GREEDY, Runner
from edgekit.runtime.generate import generate


pytestmark = pytest.mark.usefixtures("on_this_machine")

SMALL_TOKENS = 64  # the rule is the same at any length, and a small context is soon full
LEFT_TOKENS = 3


def _open(bundle: Bundle, context_tokens: int, threads: int | None) -> Runner:
    return Runner.open(
        bundle.directory, context_tokens=context_tokens, threads=threads, check_hashes=False
    )


def _small(bundle: Bundle) -> int:
    return min(SMALL_TOKENS, bundle.context_tokens)


def _assert_it_still_answers(runner: Runner) -> None:
    ids = prompt_ids(runner.session.vocabulary_tokens, 4)
    count = len(list(generate(runner.session, ids, max_tokens=2, stop_ids=(), sampling=GREEDY)))
    assert count == 2, f"{count} tokens afterwards, expected 2"


def test_a_prompt_longer_than_the_context_is_refused_in_one_sentence(
    bundle: Bundle, threads: int | None
):
    with _open(bundle, _small(bundle), threads) as runner:
        context = runner.session.context_tokens
        ids = prompt_ids(runner.session.vocabulary_tokens, context + 1)
        try:
            said = runner.complete(ids, max_tokens=1).answer.token_ids
        except UsageError as error:
            message = str(error)
        else:
            pytest.fail(f"{len(ids)} tokens in a context of {context} gave {said}, not a refusal")
        is_clear = str(len(ids)) in message and str(context) in message and "\n" not in message
        assert is_clear, f"refused with {message!r}, expected one line with both lengths"
        _assert_it_still_answers(runner)


def test_an_answer_that_fills_the_context_ends_there(bundle: Bundle, threads: int | None):
    _fill(bundle, _small(bundle), threads)


@pytest.mark.slow
def test_the_whole_context_of_the_manifest_can_be_filled(bundle: Bundle, threads: int | None):
    _fill(bundle, bundle.context_tokens, threads)


def _fill(bundle: Bundle, context_tokens: int, threads: int | None) -> None:
    with _open(bundle, context_tokens, threads) as runner:
        session = runner.session  # a format with a fixed cache may hold more than was asked
        prompt = prompt_ids(session.vocabulary_tokens, session.context_tokens - LEFT_TOKENS)
        generation = generate(session, prompt, max_tokens=None, stop_ids=(), sampling=GREEDY)
        count = len(list(generation))
        reason = generation.finish_reason
        assert reason == "context", f"ended by {reason!r} after {count} tokens, expected 'context'"
        # The last token is said and need not be read.
        expected = LEFT_TOKENS + 1
        assert count == expected, f"{count} tokens after {len(prompt)}, expected {expected}"
        _assert_it_still_answers(runner)
