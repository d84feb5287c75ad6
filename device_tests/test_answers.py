"""Answers end where they should, stream as text, and do not depend on what was asked before."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import pytest

from edgekit.bundle.goldens import Goldens, LogitGolden
from edgekit.bundle.manifest import Bundle
from edgekit.measuring.measure import prompt_ids
from edgekit.run import Runner, answer


if TYPE_CHECKING:
    from edgekit.runtime.session import Logits

Record = Callable[[str, object], None]

QUESTION = "What is the capital of France?"
GENEROUS_TOKENS = 128  # a sentence is 10 to 30
ANSWER_TOKENS = 12
# For one position, where the limit of the goldens is for a mean: the 99th percentile of a proof is
# about six times its mean (Q8_0, SmolLM2-135M). The other limit is conftest's largest.
MEAN_TO_WORST = 10
LARGEST_KL_NATS = 0.2


def _fresh(runner: Runner) -> Runner:
    """Return a runner of the same session that takes nothing as read."""
    return Runner(session=runner.session, text=runner.text, bundle=runner.bundle)


def _prompts(runner: Runner) -> list[list[int]]:
    """Return prompts of which each is longer than the one before and its answer.

    The second begins as the first does: only so is what was read before ever tempting.
    """
    half = runner.session.context_tokens // 2
    ids = prompt_ids(runner.session.vocabulary_tokens, min(48, half))
    return [ids[:6], [*ids[:3], *ids[6:30]], ids[::-1]]


def test_every_stop_id_is_a_token(runner: Runner, bundle: Bundle):
    assert bundle.text.stop_ids, "found no stop id, expected at least one: no answer would end"
    for id in bundle.text.stop_ids:
        token = runner.text.tokenizer.id_to_token(id)
        assert token is not None, f"the tokenizer has no token {id}, expected one for a stop id"
        count = runner.session.vocabulary_tokens
        assert id < count, f"stop id {id}, expected one of the {count} that the model can say"


def test_what_the_template_puts_after_an_answer_is_a_stop_id(runner: Runner, bundle: Bundle):
    if runner.text.template is None:
        pytest.skip("the model has no chat template")
    id = runner.text.stop_id_of_template()
    if id is None:
        pytest.skip("the chat template puts no token of its own after an answer")
    stops = bundle.text.stop_ids
    assert id in stops, f"the template ends an answer with token {id}, the stop ids are {stops}"


def test_every_stop_id_ends_an_answer(
    runner: Runner, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
):
    prompt = _prompts(runner)[0]
    for id in bundle.text.stop_ids:
        with monkeypatch.context() as patch:
            _make_it_say(id, runner, patch, bundle.text.stop_ids)
            found = _fresh(runner).complete(prompt, max_tokens=4).answer
        assert found.finish_reason == "stop", (
            f"ended by {found.finish_reason!r} after {found.token_ids}, expected 'stop' at {id}"
        )
        assert found.answer_tokens == 1, (
            f"the answer is {found.token_ids}, expected one token and not {id}"
        )


def _make_it_say(
    id: int, runner: Runner, patch: pytest.MonkeyPatch, stop_ids: Sequence[int]
) -> None:
    """Let the model say one token of its own that ends nothing, and ``id`` from then on."""
    session = runner.session
    prefill, decode = session.prefill, session.decode

    def prefill_without_stops(ids: Sequence[int]) -> "Logits":
        logits = prefill(ids).copy()
        logits[list(stop_ids)] = logits.min() - 1
        return logits

    def decode_as_told(token: int) -> "Logits":
        logits = decode(token).copy()
        logits[id] = logits.max() + 1
        return logits

    patch.setattr(session, "prefill", prefill_without_stops)
    patch.setattr(session, "decode", decode_as_told)


def test_an_answer_to_a_simple_question_ends(runner: Runner, record_property: Record):
    """Reported, not asserted: whether it ends is up to the model that was exported."""
    if runner.text.template is None:
        pytest.skip("the model has no chat template: it goes on with any text")
    room = runner.session.context_tokens - len(_question(runner))
    if room < 1:
        pytest.skip("the context does not even hold the question")
    found = answer(_fresh(runner), QUESTION, max_tokens=min(GENEROUS_TOKENS, room)).answer
    if found.finish_reason != "stop":
        pytest.skip(f"not within {found.answer_tokens} tokens: {found.text!r}")
    record_property("answer", f"{QUESTION} {found.text!r}, {found.answer_tokens} tokens")


def _question(runner: Runner) -> list[int]:
    return runner.text.encode_chat([{"role": "user", "content": QUESTION}])


def test_the_pieces_of_an_answer_are_its_text(runner: Runner):
    reply = _fresh(runner).complete(_prompts(runner)[0], max_tokens=ANSWER_TOKENS)
    pieces = list(reply)
    assert "" not in pieces, f"an empty piece among {pieces}, expected text in each"
    for piece in pieces:
        piece.encode("utf-8")  # half a surrogate pair would fail
    streamed, said = "".join(pieces), reply.answer.text
    assert streamed == said, f"the pieces join to {streamed!r}, expected {said!r}"


def test_an_answer_is_the_same_alone_and_after_others(runner: Runner):
    prompts = _prompts(runner)
    alone = [_say(_fresh(runner), prompt) for prompt in prompts]
    one_runner = _fresh(runner)
    for number in (0, 1, 2, 0):
        found, expected = _say(one_runner, prompts[number]), alone[number]
        assert found == expected, f"prompt {number} after others: {found}, alone: {expected}"


def _say(runner: Runner, prompt: Sequence[int]) -> tuple[int, ...]:
    return runner.complete(prompt, max_tokens=ANSWER_TOKENS).answer.token_ids


def test_two_chats_in_a_row_say_what_each_says_alone(runner: Runner, goldens: Goldens):
    chats = [chat.messages for chat in goldens.chats if _fits(runner, chat.ids)]
    if len(chats) < 2:
        pytest.skip(f"{len(chats)} conversations of the goldens fit this model, two are needed")
    alone = [_chat(_fresh(runner), messages) for messages in chats]
    one_runner = _fresh(runner)
    in_a_row = [_chat(one_runner, messages) for messages in chats]
    assert in_a_row == alone, f"in a row {in_a_row}, alone {alone}"


def _fits(runner: Runner, ids: Sequence[int]) -> bool:
    return len(ids) + ANSWER_TOKENS <= runner.session.context_tokens


def _chat(runner: Runner, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
    return runner.ask(messages, max_tokens=ANSWER_TOKENS).answer.token_ids


def test_what_was_read_before_is_not_read_again_and_not_forgotten(
    runner: Runner,
    mean_kl_limit_nats: float,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Record,
):
    prompt = _prompts(runner)[1][: runner.session.context_tokens // 4]
    continued = _fresh(runner)
    said = continued.complete(prompt, max_tokens=4).answer.token_ids
    longer = [*prompt, *said, *prompt[:4]]
    in_parts = _listen(runner, monkeypatch)
    reused = continued.complete(longer, max_tokens=1).answer.reused_tokens
    assert reused >= len(prompt), f"{reused} tokens reused, expected at least {len(prompt)}"
    at_once = LogitGolden.of(longer[-1:], runner.session.all_logits(longer)[-1:])
    kl = at_once.mean_kl_nats(in_parts[-1][None])
    limit = min(MEAN_TO_WORST * mean_kl_limit_nats, LARGEST_KL_NATS)
    assert kl <= limit, f"read in parts and at once: KL {kl:.1e} nats, expected <= {limit:g}"
    record_property("read in parts and at once", f"KL {kl:.1e} nats (<= {limit:g})")


def _listen(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> list["Logits"]:
    """Return a list that receives a copy of what every prefill returns."""
    heard: list[Logits] = []
    prefill = runner.session.prefill

    def prefill_and_tell(ids: Sequence[int]) -> "Logits":
        heard.append(prefill(ids).copy())
        return heard[-1]

    monkeypatch.setattr(runner.session, "prefill", prefill_and_tell)
    return heard
