"""A thought and an answer, told apart token by token."""

import pytest

from edgekit.tests.witnesses.tiny_runner import (
    byte_level_tokenizer,
    sentencepiece_tokenizer,
    text_in,
)
from edgekit.text.answer import AnswerReader, Part, ThoughtSplitter
from edgekit.text.rules import ThoughtMarks


tokenizers = pytest.importorskip("tokenizers")

THINK = ThoughtMarks(opens="<think>", closes="</think>")
CHANNEL = ThoughtMarks(opens="<|channel>thought", closes="<channel|>")
ASKED, OPENED = "<user>Hi<model>\n", "<user>Hi<model>\n<think>\n"
# What a model says, whether its prompt has opened a thought, the thought, the answer.
SAID = {
    "a thought and an answer": ("<think>\nhm 🙂\n</think>\n\nYes.", False, "hm 🙂", "Yes."),
    "a thought that the prompt opened": ("hm\n</think>\n\nYes.", True, "hm", "Yes."),
    "the mark again, though the prompt has it": (
        "<think>hm</think>Yes.", True, "hm", "Yes.",
    ),
    "no thought": ("Yes.", False, "", "Yes."),
    "no thought after spaces": (" \n Yes. \n", False, "", " \n Yes. \n"),
    "an empty thought": ("<think>\n\n</think>\n\nYes.", False, "", "Yes."),
    "an empty thought that the prompt opened": ("\n</think>\n\nYes.", True, "", "Yes."),
    "spaces before the mark": ("\n <think> hm </think>Yes.", False, "hm", "Yes."),
    "a thought of several lines": (
        "<think>\n\na\n\n b < c\n\n</think>\nYes.", False, "a\n\n b < c", "Yes.",
    ),
    "a thought without end": ("<think>\nhm, so \n", False, "hm, so", ""),
    "a thought without end that the prompt opened": ("hm, so \n", True, "hm, so", ""),
    "half a mark at the end": ("<think>\nhm</thin", False, "hm</thin", ""),
    "half a mark and nothing else": ("<thin", False, "", "<thin"),
    "half a mark, then text": ("<thin air>", False, "", "<thin air>"),
    "the end of half a mark": ("<think>a </ b</think>c", False, "a </ b", "c"),
    "a thought without answer": ("<think>hm</think>\n", False, "hm", ""),
    "marks in the answer": (
        "<think>hm</think>\n<think> and </think>.", False, "hm", "<think> and </think>.",
    ),
    "half a mark that the prompt opened": ("<thin", True, "<thin", ""),
    "marks later in an answer": ("See <think>hm</think>.", False, "", "See <think>hm</think>."),
    "the closing mark alone": ("</think>Yes.", False, "", "</think>Yes."),
    "marks within the thought": ("<think>a <think> b</think>c", False, "a <think> b", "c"),
    "an indented answer": ("<think>hm</think>\n\n    x = 1\n", False, "hm", "    x = 1\n"),
    "nothing": ("", False, "", ""),
}  # fmt: skip


def parted(parts):
    """Return the thought and the answer in parts, none of which is empty."""
    parts = list(parts)
    assert all(part.text for part in parts)
    told = "".join(part.text for part in parts if part.is_thought)
    assert [part.is_thought for part in parts] == sorted(
        (part.is_thought for part in parts), reverse=True
    )
    return told, "".join(part.text for part in parts if not part.is_thought)


@pytest.mark.parametrize("piece", [1, 2, 3, 5, 8, 100])
@pytest.mark.parametrize("case", SAID)
def test_a_thought_is_told_from_the_answer_wherever_pieces_end(case, piece):
    said, is_open, thought, answer = SAID[case]
    splitter = ThoughtSplitter(opens="<think>", closes="</think>", is_open=is_open)
    pieces = [said[at : at + piece] for at in range(0, len(said), piece)]
    parts = [part for text in pieces for part in splitter.feed(text)]
    assert parted([*parts, *splitter.finish()]) == (thought, answer)


def test_text_is_given_as_soon_as_it_is_certain():
    splitter = ThoughtSplitter(opens="<think>", closes="</think>", is_open=False)
    given = [
        "".join(part.text for part in splitter.feed(text))
        for text in (
            "<thi",
            "nk>\n",
            "one",
            " two ",
            "\n",
            "three",
            "</",
            "i",
            "</think>",
            "\n",
            "x",
        )
    ]
    assert given == ["", "", "one", " two", "", " \nthree", "", "</i", "", "", "x"]


def added(*, special):
    """Return a tokenizer that has the marks as tokens."""
    tokenizer = byte_level_tokenizer()
    marks = [THINK.opens, THINK.closes, "<|channel>", CHANNEL.closes]
    tokenizer.add_tokens([tokenizers.AddedToken(mark, special=special) for mark in marks])
    return tokenizer


TOKENIZERS = {
    "marks in letters": byte_level_tokenizer,
    "marks in letters, SentencePiece": sentencepiece_tokenizer,
    "marks are tokens": lambda: added(special=False),
    "marks are special tokens": lambda: added(special=True),
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return request.param


@pytest.fixture
def read(tokenizer, tmp_path):
    """Return a function that reads a reply as the tokens it has, and says where it stopped."""

    def read_reply(said, *, marks=THINK, prompt=ASKED, stop=(), **rules):
        text = text_in(tmp_path, TOKENIZERS[tokenizer](), thoughts=marks, **rules)
        reader = AnswerReader(text, prompt=prompt, stop=stop)
        parts: list[Part] = []
        for token in text.tokenizer.encode(said, add_special_tokens=False).ids:
            parts += reader.feed(token)
            if reader.has_stopped:
                return parted(parts), True
        return parted([*parts, *reader.finish()]), False

    return read_reply


@pytest.mark.parametrize(
    "case", [case for case in SAID if "mark" not in case and "half" not in case]
)
def test_marks_are_found_however_they_are_tokens(read, case):
    said, is_open, thought, answer = SAID[case]
    assert read(said, prompt=OPENED if is_open else ASKED) == ((thought, answer), False)


def test_special_tokens_in_an_answer_are_no_text_even_if_they_are_marks(read, tokenizer):
    (_, answer), _ = read("<think>hm</think>It is <think> and </think>.<end>")
    is_special = "special" in tokenizer
    assert answer == ("It is  and ." if is_special else "It is <think> and </think>.")


def test_a_mark_of_a_special_token_and_letters_is_found(read):
    said = "<|channel>thought\nhm\n<channel|>Yes."
    assert read(said, marks=CHANNEL) == (("hm", "Yes."), False)
    assert read("Yes.", marks=CHANNEL, prompt=f"{ASKED}<|channel>thought\n<channel|>") == (
        ("", "Yes."),
        False,
    )


def test_a_special_token_that_begins_another_mark_is_no_text(read, tokenizer):
    (thought, answer), _ = read("<|channel>final\nYes.", marks=CHANNEL)
    is_special = "special" in tokenizer
    assert (thought, answer) == ("", "final\nYes." if is_special else "<|channel>final\nYes.")


def test_without_marks_or_a_conversation_nothing_is_a_thought(read, tokenizer):
    said = "<think>hm</think>Yes."
    shown = "hmYes." if "special" in tokenizer else said
    assert read(said, marks=None) == (("", shown), False)
    (thought, answer), _ = read(said, prompt=None)
    assert (thought, answer.lstrip(" ")) == ("", shown)  # the space that opens a first word is kept


def test_stop_strings_of_a_request_end_the_answer_and_no_thought(read):
    said = "<think>\none END two\n</think>\n\nthree END four"
    assert read(said, stop=["END"]) == (("one END two", "three "), True)


def test_the_models_own_stop_strings_end_a_thought_too(read):
    said = "<think>\none END two\n</think>\n\nthree"
    assert read(said, stop_strings=("END",)) == (("one ", ""), True)
    assert read("<think>EN</think>D", stop_strings=("END",)) == (("EN", "D"), False)


def test_what_might_begin_a_stop_string_comes_before_the_answer(read):
    said = "<think>one EN</think>two EN"
    assert read(said, stop_strings=("END",), stop=["ENDE"]) == (("one EN", "two EN"), False)


@pytest.mark.parametrize("stop", ["</think>", "</think>\n\n"])
def test_a_stop_string_that_is_the_mark_ends_the_reply_after_the_thought(read, stop):
    said = "<think>one</think>\n\ntwo"
    assert read(said, stop=[stop, "x"]) == (("one", ""), True)
