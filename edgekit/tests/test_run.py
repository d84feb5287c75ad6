import dataclasses

import pytest

from edgekit import formats
from edgekit.errors import BundleError, UsageError
from edgekit.export import export
from edgekit.run import NO_TEMPLATE_NOTE, Chat, Runner, answer, run
from edgekit.runtime.generate import PromptTooLongError, Sampling
from edgekit.tests.formats.test_formats import needs_runtime
from edgekit.tests.tiny.checkpoints import write_tiny_checkpoint
from edgekit.tests.witnesses.tiny_runner import (
    CHATML,
    DIALOGUE,
    QUESTION,
    THINKING,
    THOUGHTS,
    NgramSession,
    bundle_in,
    byte_level_tokenizer,
    runner_in,
    sentencepiece_tokenizer,
    text_in,
    thinking_runner_in,
)
from edgekit.text.rules import ThoughtMarks


PARIS = DIALOGUE[1]["content"]
USER = "<|im_start|>user\n"


@pytest.fixture
def runner(tmp_path):
    return runner_in(tmp_path)


@pytest.fixture
def on_disk(tmp_path, monkeypatch):
    """A runner whose bundle is on disk, of a format that hands out the runner's session."""
    runner = runner_in(tmp_path)
    bundle_in(tmp_path, runner.text.rules).save()

    class InMemory:
        def load(self, path, *, context_tokens, **_):
            assert path.is_file()
            runner.session.context_tokens = context_tokens
            return runner.session

    monkeypatch.setattr(formats, "running", {"in_memory": InMemory()}.__getitem__)
    return runner


# One answer


def test_a_question_is_answered_in_pieces_of_whole_characters(runner):
    reply = answer(runner, QUESTION)
    pieces = list(reply)
    assert len(pieces) > 5
    assert "🙂" in "".join(pieces)
    assert all(pieces)
    assert "".join(pieces) == reply.answer.text == PARIS


def test_an_answer_says_how_it_came_about(runner):
    record = answer(runner, QUESTION).answer
    assert record.finish_reason == "stop"
    assert record.prompt_tokens == len(
        runner.text.encode_chat([{"role": "user", "content": QUESTION}])
    )
    assert runner.text.decode(record.token_ids) == PARIS
    assert record.answer_tokens == len(record.token_ids)
    assert record.time_to_first_token_s > 0
    assert record.decode_tokens_per_s is not None
    assert record.decode_tokens_per_s > 0
    assert record.notes == ()


def test_an_answer_of_one_token_has_no_decode_rate(runner):
    record = answer(runner, QUESTION, max_tokens=1).answer
    assert (record.answer_tokens, record.finish_reason) == (1, "length")
    assert record.decode_tokens_per_s is None


def test_a_stop_string_ends_the_answer_before_it(runner):
    record = answer(runner, QUESTION, stop=["of course"]).answer
    assert (record.text, record.finish_reason) == ("It is Paris, 파리 🙂 ", "stop")


def test_the_models_own_stop_strings_end_answers_and_texts(tmp_path):
    runner = runner_in(tmp_path, stop_strings=("course", "seven"))
    assert answer(runner, QUESTION).answer.text == "It is Paris, 파리 🙂 of "
    assert answer(runner, QUESTION, stop=["Paris"]).answer.text == "It is "
    record = answer(runner, "one two", raw=True, max_tokens=99).answer
    assert (record.text, record.finish_reason) == (" three four five six ", "stop")


def test_stop_strings_of_a_bundle_on_disk_end_an_answer(tmp_path, on_disk):
    rules = dataclasses.replace(on_disk.text.rules, stop_strings=("Paris",))
    dataclasses.replace(on_disk.bundle, text=rules).save()
    assert "".join(run(tmp_path, QUESTION)) == "It is "


SWITCH = "{{ 'Be brief. ' if brief else '' }}" + CHATML


def prompt_of(reply, runner):
    return runner.text.tokenizer.decode(reply.generation.prompt_ids, skip_special_tokens=False)


def test_a_variable_of_the_template_is_given_for_all_conversations_or_for_one(tmp_path):
    runner = runner_in(tmp_path, template=SWITCH)
    ask = DIALOGUE[:1]
    assert prompt_of(runner.ask(ask), runner).startswith("<|im_start|>")
    assert prompt_of(runner.ask(ask, template_variables={"brief": True}), runner).startswith("Be b")
    runner.template_variables = {"brief": True}
    assert prompt_of(answer(runner, QUESTION), runner).startswith("Be brief.")
    assert prompt_of(Chat(runner=runner).say("Hi"), runner).startswith("Be brief.")
    once = runner.ask(ask, template_variables={"brief": False})
    assert prompt_of(once, runner).startswith("<|im_start|>")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("breif", "reads no variable 'breif'"),
        ("add_generation_prompt", "sets the template's variable 'add_generation_prompt' itself"),
        ("messages", "sets the template's variable 'messages' itself"),
        ("tone", "'tone' is fixed to \"kind\" in this bundle"),
    ],
)
def test_a_variable_that_would_change_nothing_is_refused(tmp_path, name, words):
    runner = runner_in(tmp_path, template=SWITCH, template_variables={"tone": '"kind"'})
    with pytest.raises(UsageError, match=words):
        runner.ask(DIALOGUE[:1], template_variables={name: True})
    assert isinstance(runner.session, NgramSession)
    assert runner.session.reads == []


def test_a_misspelt_variable_is_refused_before_the_model_is_loaded(tmp_path, on_disk):
    with pytest.raises(UsageError, match="reads no variable 'enable_thinking'"):
        Runner.open(tmp_path, template_variables={"enable_thinking": False})


def test_a_variable_without_a_template_is_refused(tmp_path):
    text = text_in(tmp_path, byte_level_tokenizer(), template=None)
    with pytest.raises(UsageError, match="no chat template, so nothing reads the variable"):
        text.check_variables({"brief": True})


def test_a_template_that_wants_parts_gets_them_and_leaves_parts_alone(tmp_path):
    parts = "{% for m in messages %}<s>{{ m.content | map(attribute='text') | join }}{% endfor %}"
    text = text_in(tmp_path, byte_level_tokenizer(), template=parts, content_parts=("user",))
    given = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    first, second = {"role": "user", "content": "Hi"}, {"role": "user", "content": given}
    assert text.render([first, second]) == "<s>Hi<s>ab"


def test_a_raw_prompt_goes_on_as_it_is(runner):
    record = answer(runner, "one two three", raw=True, max_tokens=200).answer
    assert record.text.startswith(" four five six seven")
    assert record.notes == ()


@pytest.mark.parametrize("decoder", ["fuse", "metaspace"])
def test_a_raw_prompt_goes_on_with_its_space_in_sentencepiece_too(tmp_path, decoder):
    runner = runner_in(tmp_path, tokenizer=sentencepiece_tokenizer(decoder=decoder))
    assert answer(runner, "one two", raw=True, max_tokens=6).answer.text == " three f"


def test_a_model_without_template_says_so(tmp_path):
    runner = runner_in(tmp_path, template=None)
    record = answer(runner, "one two three", max_tokens=4).answer
    assert record.notes == (NO_TEMPLATE_NOTE,)
    assert record.text.startswith(" four")


def test_a_system_prompt_without_template_is_refused(tmp_path):
    with pytest.raises(UsageError, match="needs a chat template"):
        answer(runner_in(tmp_path, template=None), "hi", system="be kind")


def test_a_system_prompt_opens_the_conversation(runner):
    reply = answer(runner, QUESTION, system="be kind")
    prompt = runner.text.tokenizer.decode(reply.generation.prompt_ids, skip_special_tokens=False)
    assert prompt.startswith("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nWhat")


def test_sampling_with_a_seed_repeats(runner):
    warm = Sampling(temperature=20, seed=3)
    first, second = (answer(runner, QUESTION, sampling=warm, max_tokens=9).answer for _ in "12")
    assert first.token_ids == second.token_ids
    assert first.text != PARIS[: len(first.text)]


def test_a_full_context_ends_an_answer_in_good_order(tmp_path):
    tokens = len(runner_in(tmp_path).text.encode_chat(DIALOGUE[:1]))
    runner = runner_in(tmp_path, context_tokens=tokens + 3)
    record = answer(runner, QUESTION).answer
    assert (record.answer_tokens, record.finish_reason) == (4, "context")
    with pytest.raises(PromptTooLongError, match=f"context holds {tokens + 3}"):
        answer(runner, QUESTION + " and so on")


def test_a_text_fits_that_is_made_of_the_longest_token_alone(tmp_path):
    runner = runner_in(tmp_path, tokenizer=sentencepiece_tokenizer(), context_tokens=40)
    tokenizer = runner.text.tokenizer
    longest = max(tokenizer.get_vocab(), key=lambda token: len(token.encode()))
    assert runner.text.encode(longest * 40) == [tokenizer.token_to_id(longest)] * 40
    assert runner.complete(longest * 40).answer.prompt_tokens == 40
    with pytest.raises(
        PromptTooLongError, match=r"has 481 bytes, the context holds 40 tokens, 480"
    ):
        runner.complete(longest * 40 + "x")


# A bundle on disk


def test_a_bundle_runs_from_its_directory(on_disk):
    assert "".join(run(on_disk.bundle.directory, QUESTION)) == PARIS


def test_a_run_that_is_cut_short_closes_the_session(on_disk):
    pieces = run(on_disk.bundle.directory, QUESTION)
    next(pieces)
    session = on_disk.session
    assert not session.is_closed
    pieces.close()
    assert session.is_closed


def test_the_context_is_the_bundles_unless_asked_otherwise(on_disk):
    with Runner.open(on_disk.bundle.directory) as runner:
        assert runner.session.context_tokens == runner.bundle.context_tokens
    with Runner.open(on_disk.bundle.directory, context_tokens=99) as runner:
        assert runner.session.context_tokens == 99


def test_a_changed_byte_is_refused_unless_hashes_are_waived(on_disk):
    model = on_disk.bundle.directory / "model.bin"
    model.write_bytes(model.read_bytes().replace(b"n-gram", b"N-gram"))
    with pytest.raises(BundleError, match="SHA-256"):
        Runner.open(on_disk.bundle.directory)
    Runner.open(on_disk.bundle.directory, check_hashes=False).close()


# A chat


def test_the_second_turn_reads_only_what_is_new(runner):
    chat = Chat(runner=runner)
    first = chat.say(QUESTION).answer
    runner.session.reads.clear()
    second = chat.say("Sure?").answer
    assert second.text == "Yes."
    # The stop token was chosen but never read, so it comes with the new turn.
    assert second.reused_tokens == first.prompt_tokens + first.answer_tokens
    assert runner.session.reads[0] == second.prompt_tokens - second.reused_tokens < 40
    assert chat.messages == list(DIALOGUE)


def test_a_chat_from_a_warm_cache_says_what_a_cold_one_says(tmp_path, runner):
    warm, cold = Chat(runner=runner), Chat(runner=runner_in(tmp_path))
    for chat in (warm, cold):
        chat.say(QUESTION).answer  # noqa: B018 - waits for the end
    cold.runner.session.reset()
    cold.runner._cached_ids.clear()
    assert warm.say("Sure?").answer.token_ids == cold.say("Sure?").answer.token_ids


def test_another_conversation_inherits_no_more_than_how_every_one_begins(runner):
    Chat(runner=runner).say("one two").answer  # noqa: B018
    record = Chat(runner=runner).say(QUESTION).answer
    assert (record.text, record.reused_tokens) == (PARIS, len(runner.text.encode(USER)))


def test_an_answer_cut_short_is_remembered_as_far_as_it_went(runner):
    chat = Chat(runner=runner)
    reply = chat.say(QUESTION)
    said = next(reply) + next(reply)
    reply.close()
    assert reply.answer.finish_reason is None
    assert chat.messages[-1] == {"role": "assistant", "content": said}
    assert chat.say("Sure?").answer.reused_tokens > 0


def test_a_reply_nobody_read_is_not_remembered(runner):
    chat = Chat(runner=runner)
    chat.say(QUESTION).close()
    assert chat.messages == []


def test_a_turn_too_long_leaves_the_chat_as_it_was(tmp_path):
    chat = Chat(runner=runner_in(tmp_path, context_tokens=120), system="be kind")
    with pytest.raises(PromptTooLongError):
        chat.say("long " * 200)
    assert chat.messages == [{"role": "system", "content": "be kind"}]


def test_a_cleared_chat_keeps_its_system_prompt(runner):
    chat = Chat(runner=runner, system="be kind")
    chat.say(QUESTION).answer  # noqa: B018
    assert len(chat.messages) == 3
    chat.clear()
    assert chat.messages == [{"role": "system", "content": "be kind"}]


def test_a_template_that_refuses_a_role_says_so(tmp_path):
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    runner = runner_in(tmp_path, template=refuse + CHATML)
    with pytest.raises(UsageError, match="no system"):
        answer(runner, QUESTION, system="be kind")
    assert answer(runner, QUESTION).answer.text == PARIS


# Thoughts


def test_what_a_model_thinks_is_not_part_of_its_answer(tmp_path):
    reply = answer(thinking_runner_in(tmp_path), QUESTION)
    assert "".join(reply) == PARIS
    assert reply.answer.text == reply.said == PARIS
    assert reply.answer.reasoning == reply.reasoning == THOUGHTS[0]
    assert reply.answer.finish_reason == "stop"


def test_the_parts_of_a_reply_are_its_thought_and_then_its_answer(tmp_path):
    reply = answer(thinking_runner_in(tmp_path), QUESTION)
    parts = list(iter(reply.next_part, None))
    thought = [part.text for part in parts if part.is_thought]
    assert len(thought) > 5
    assert "".join(thought) == THOUGHTS[0]
    assert [part.is_thought for part in parts[: len(thought)]] == [True] * len(thought)
    assert "".join(part.text for part in parts[len(thought) :]) == PARIS


def test_a_model_told_not_to_think_answers_at_once(tmp_path):
    runner = thinking_runner_in(tmp_path)
    runner.template_variables = {"enable_thinking": False}
    record = answer(runner, QUESTION).answer
    assert (record.text, record.reasoning) == (PARIS, "")


def test_a_thought_cut_short_is_no_answer(tmp_path):
    record = answer(thinking_runner_in(tmp_path), QUESTION, max_tokens=4).answer
    assert (record.text, record.finish_reason, record.answer_tokens) == ("", "length", 4)
    assert record.reasoning == THOUGHTS[0][: len(record.reasoning)] != ""


def test_a_stop_string_ends_the_answer_and_no_thought(tmp_path):
    record = answer(thinking_runner_in(tmp_path), QUESTION, stop=["파리"]).answer
    assert (record.text, record.reasoning) == ("It is Paris, ", THOUGHTS[0])
    assert record.finish_reason == "stop"


def test_a_raw_prompt_goes_on_with_the_marks_in_it(tmp_path):
    runner = thinking_runner_in(tmp_path)
    prompt = runner.text.render([{"role": "user", "content": QUESTION}])
    record = answer(runner, prompt, raw=True).answer
    assert (record.text, record.reasoning) == (f"{THOUGHTS[0]}\n</think>\n\n{PARIS}", "")


@pytest.mark.parametrize("rewinds", [True, False])
def test_a_chat_reads_again_what_its_template_strips_of_a_thought(tmp_path, rewinds):
    runner = thinking_runner_in(tmp_path, rewinds=rewinds)
    chat = Chat(runner=runner)
    first = chat.say(QUESTION).answer
    assert chat.messages[-1]["reasoning_content"] == THOUGHTS[0]
    assert isinstance(runner.session, NgramSession)
    runner.session.reads.clear()
    second = chat.say("Sure?").answer
    assert (second.text, second.reasoning) == ("Yes.", THOUGHTS[1])
    # Both turns begin with the question and with whose turn it is; the thought is gone.
    asked = runner.text.encode(runner.text.render(DIALOGUE[:1]).removesuffix("<think>\n"))
    assert len(asked) < first.prompt_tokens
    assert second.reused_tokens == (len(asked) if rewinds else 0)
    assert runner.session.reads[0] == second.prompt_tokens - second.reused_tokens
    prompt = runner.text.encode_chat(DIALOGUE[:3])
    assert runner.session.cached == [*prompt, *second.token_ids]


@pytest.mark.parametrize("rewinds", [True, False])
def test_a_chat_whose_cache_went_back_says_what_a_cold_one_says(tmp_path, rewinds):
    chats = [Chat(runner=thinking_runner_in(tmp_path, rewinds=rewinds)) for _ in "12"]
    for chat in chats:
        chat.say(QUESTION).answer  # noqa: B018 - waits for the end
    chats[1].runner.session.reset()
    chats[1].runner._cached_ids.clear()
    warm, cold = (chat.say("Sure?").answer for chat in chats)
    assert warm.token_ids == cold.token_ids


def test_a_thought_cut_short_is_remembered_as_far_as_it_went(tmp_path):
    chat = Chat(runner=thinking_runner_in(tmp_path))
    reply = chat.say(QUESTION)
    thought = reply.next_part()
    assert thought is not None
    assert thought.is_thought
    reply.close()
    assert chat.messages[1:] == [
        {"role": "assistant", "content": "", "reasoning_content": thought.text}
    ]


@pytest.mark.toolchain
@pytest.mark.parametrize("kind", ["llama", "lfm2", "qwen3.5"])
@pytest.mark.parametrize("name", ["gguf", "onnx"])
def test_a_real_runtime_says_the_same_from_a_cache_that_went_back(name, kind, tmp_path):
    """Or was emptied, where layers keep a state: that cannot be taken back."""
    needs_runtime(name)
    tiny_checkpoint = write_tiny_checkpoint(tmp_path / "model", kind)
    (tmp_path / "thinking.jinja").write_text(THINKING, encoding="utf-8")
    bundle = export(
        tiny_checkpoint, "raspberry-pi-5-8gb", format=name, context_tokens=256, verify=False,
        chat_template=tmp_path / "thinking.jinja", out=tmp_path / "out",
    )  # fmt: skip
    assert bundle.text.thoughts == ThoughtMarks(opens="<think>", closes="</think>")
    with Runner.open(bundle.directory) as runner:
        chat = Chat(runner=runner, max_tokens=20)
        first = chat.say("Hello").answer
        assert first.text == ""  # it has not thought to the end
        assert first.reasoning
        warm = chat.say("And now?").answer
        assert warm.reused_tokens < first.prompt_tokens
        assert (warm.reused_tokens > 0) == (kind == "llama")
        runner.session.reset()
        runner._cached_ids.clear()
        cold = runner.ask(chat.messages[:-1], max_tokens=20).answer
        assert cold.reused_tokens == 0
        assert warm.token_ids == cold.token_ids


def test_records_are_plain_data(runner):
    assert dataclasses.asdict(answer(runner, QUESTION).answer)["text"] == PARIS
