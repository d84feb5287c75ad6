"""What a model says, token by token, as the parts of a reply: its thought, and its answer.

A thought stands before the answer, between the marks that the chat template has for it. A mark may
come in several tokens, and some of them may be special tokens, which are no text otherwise.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from edgekit.text.rules import ThoughtMarks
from edgekit.text.tokenizer import StopStrings, Text, overlap


# What stands in text for a special token: half a surrogate pair, which no decoded text has.
_FIRST_STAND_IN = 0xDC00
_STAND_INS = re.compile("[\udc00-\udfff]")


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some text of a reply, never empty."""

    text: str
    is_thought: bool = False


class AnswerReader:
    """Turns the tokens of a reply into its parts.

    Args:
        text: Of the model.
        prompt: The conversation that is answered, rendered; None: plain text goes on, in which
            nothing is a thought.
        stop: Strings that end the answer, besides the model's own, which end a thought too. One
            that holds the mark at a thought's end ends the reply there.
    """

    def __init__(self, text: Text, *, prompt: str | None, stop: Sequence[str] = ()) -> None:
        own = text.rules.stop_strings
        self._stops_of_thought, self._stops = StopStrings(own), StopStrings((*own, *stop))
        marks = None if prompt is None else text.rules.thoughts
        shown = {} if marks is None else _stand_ins(text, marks)
        self._detokenizer = text.detokenizer(continues=prompt is None, shown=shown)
        self._splitter = None
        self._ends_with_thought = False
        if marks is not None and prompt is not None:
            letters = {text.tokenizer.id_to_token(id): letter for id, letter in shown.items()}
            self._splitter = ThoughtSplitter(
                opens=_replaced(marks.opens, letters),
                closes=_replaced(marks.closes, letters),
                is_open=marks.opened_by(prompt),
            )
            self._ends_with_thought = any(marks.closes in string for string in stop)
        self.has_stopped = False  # at a stop string: there is no more to feed

    def feed(self, token: int) -> Iterator[Part]:
        """Yield what is certain after one token more; often its own text, sometimes nothing."""
        yield from self._read(self._split(self._detokenizer.feed(token)))

    def finish(self) -> Iterator[Part]:
        """Yield what was held back."""
        yield from self._read(self._split(self._detokenizer.finish()))
        if self._splitter is not None:
            yield from self._read(self._splitter.finish())
        yield from self._held(is_thought=True)
        yield from self._held(is_thought=False)

    def _split(self, text: str) -> Sequence[Part]:
        return [Part(text=text)] if self._splitter is None else self._splitter.feed(text)

    def _read(self, parts: Sequence[Part]) -> Iterator[Part]:
        """Yield parts up to a stop string."""
        for part in parts:
            if part.is_thought:
                yield from self._before_stop(part)
            if self.has_stopped:
                return
        if self._splitter is not None and self._splitter.has_closed:
            yield from self._held(is_thought=True)
            self.has_stopped = self._ends_with_thought
        for part in parts:
            if not part.is_thought and not self.has_stopped:
                yield from self._before_stop(part)

    def _before_stop(self, part: Part) -> Iterator[Part]:
        stops = self._stops_of_thought if part.is_thought else self._stops
        said = stops.feed(part.text)
        if said:
            yield Part(text=said, is_thought=part.is_thought)
        self.has_stopped = stops.found

    def _held(self, *, is_thought: bool) -> Iterator[Part]:
        """Yield what might have been the beginning of a stop string."""
        stops = self._stops_of_thought if is_thought else self._stops
        if not self.has_stopped and (said := stops.finish()):
            yield Part(text=said, is_thought=is_thought)


def _stand_ins(text: Text, marks: ThoughtMarks) -> dict[int, str]:
    """Return a letter for each special token in the marks, by its id."""
    in_marks = [
        id
        for id, token in text.special_tokens.items()
        if token in marks.opens or token in marks.closes
    ]
    return {id: chr(_FIRST_STAND_IN + number) for number, id in enumerate(in_marks)}


def _replaced(mark: str, letters: Mapping[str, str]) -> str:
    for token in sorted(letters, key=len, reverse=True):
        mark = mark.replace(token, letters[token])
    return mark


class ThoughtSplitter:
    """Separates a thought from the answer after it, across the borders of pieces.

    A reply that does not begin with a thought is all answer, and after a thought a mark is text as
    any other. Whitespace at both ends of a thought belongs to the marks, as do the line ends before
    the answer.

    Args:
        opens: The mark before a thought, with the stand-ins of special tokens.
        closes: The mark after it.
        is_open: Whether the prompt has opened it already; some models do so again.
    """

    def __init__(self, *, opens: str, closes: str, is_open: bool) -> None:
        self._opens, self._closes = opens, closes
        self._at: Literal["start", "thought", "break", "answer"] = "start"
        self._unless_marked: Literal["thought", "answer"] = "thought" if is_open else "answer"
        self._held = ""  # may be whitespace around a thought, or the beginning of a mark
        self._has_thought = False
        self.has_closed = False  # whether there was a thought that has ended

    def feed(self, text: str) -> Sequence[Part]:
        """Return what certainly belongs to the thought or to the answer."""
        self._held += text
        parts = []
        if self._at == "start":
            self._look_for_thought()
        if self._at == "thought":
            parts.append(self._part(self._next_of_thought(), is_thought=True))
        if self._at == "break":
            self._held = self._held.lstrip("\r\n")
            self._at = "answer" if self._held else "break"
        if self._at == "answer":
            parts.append(self._part(self._held))
            self._held = ""
        return [part for part in parts if part.text]

    def finish(self) -> Sequence[Part]:
        """Return what was held back, when the reply ends."""
        is_thought = (self._unless_marked if self._at == "start" else self._at) == "thought"
        rest = self._held.rstrip() if is_thought else self._held
        self._held = ""
        last = self._part(rest if self._has_thought else rest.lstrip(), is_thought=True)
        parts = [last if is_thought else self._part(rest)]
        return [part for part in parts if part.text]

    def _look_for_thought(self) -> None:
        begun = self._held.lstrip()
        if begun.startswith(self._opens):
            self._at, self._held = "thought", begun.removeprefix(self._opens)
        elif not self._opens.startswith(begun):
            self._at = self._unless_marked

    def _next_of_thought(self) -> str:
        said, mark, rest = self._held.partition(self._closes)
        if mark:
            self._at, self._held, self.has_closed = "break", rest, True
        else:
            said = said[: len(said) - overlap(said, self._closes)]
            self._held = self._held[len(said.rstrip()) :]
        said = said.rstrip() if self._has_thought else said.strip()
        self._has_thought = self._has_thought or bool(said)
        return said

    @staticmethod
    def _part(text: str, *, is_thought: bool = False) -> Part:
        return Part(text=_STAND_INS.sub("", text), is_thought=is_thought)
