"""How a chat template has a model think, found by asking it: the marks of a thought, the switch."""

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from edgekit.errors import UsageError
from edgekit.text.rules import ThoughtMarks
from edgekit.text.template import MAX_SECONDS, EndlessTemplateError, Message
from edgekit.text.tokenizer import Text


# What no template says itself.
_ASK, _ANSWER, _AGAIN = (f"edgekit-7d-{name}" for name in ("ask", "answer", "again"))
_THOUGHT = "edgekit-7d-thought"
_QUESTION: Message = {"role": "user", "content": _ASK}
_AGREED: Message = {"role": "assistant", "content": _ANSWER}
_CALL = {"type": "function", "id": "edgekit7d", "function": {"name": "f", "arguments": {"x": 1}}}
_TAG = re.compile(r"<[^<>\s'\"{}]{1,99}>|\[[^\[\]\s'\"{}]{1,99}\]|◁[^◁▷\s]{1,99}▷")
_IS_DUMPED = re.compile(r"""(['"])thinking\1""")  # a list of parts, written as a list
_BRACKETS = ("<", "[", "◁")
_OF_THOUGHTS = re.compile("think|thought|reason", re.IGNORECASE)
_TURNS_OFF = re.compile("(no|disable|skip|without)_", re.IGNORECASE)
_LONGEST_MARK = 200  # characters
_MOST_TAGS = 100
_MOST_TRIED = 32  # variables, and pairs of tags; real templates have fewer

# Where a prompt leaves the model: within a thought, after one, or before it could begin one.
_State = Literal["open", "closed", "none"]


@dataclass(frozen=True, kw_only=True)
class Switch:
    """A variable of a template, true or false, by which the model thinks first or does not."""

    name: str
    default: bool | None  # None: neither, and the model decides
    thinks_if: bool  # the value with which it thinks

    @property
    def note(self) -> str:
        """It in a sentence."""
        effects = {self.thinks_if: "think first", not self.thinks_if: "answer without thinking"}
        given = f"--template-var {self.name}"
        if self.default is None:
            return (
                f"the chat template's {self.name} is not set by default, so the model decides: "
                f"{given}=true has it {effects[True]}, {given}=false {effects[False]}"
            )
        other = not self.default
        return (
            f"the chat template's {self.name} is {'on' if self.default else 'off'} by default: "
            f"{given}={'true' if other else 'false'} has the model {effects[other]}"
        )


@dataclass(frozen=True, kw_only=True)
class Thinking:
    """What a template does about thoughts."""

    marks: ThoughtMarks | None = None  # None: it knows of none
    switch: Switch | None = None
    opens: bool = False  # a prompt for an answer ends within a thought, unless switched otherwise
    strips: bool = False  # an answer that is followed by another turn loses its thought

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know, in one sentence or none."""
        said = self.switch.note if self.switch is not None else ""
        if self.opens and not said:
            said = "the chat template opens a thought before every answer"
        if said and self.strips:
            said += "; earlier answers are read without their thoughts"
        return (said,) if said else ()


def find(text: Text) -> Thinking:
    """Return how the template of a model has it think.

    Nothing is refused: a template that fails over thoughts says nothing about them.
    """
    if text.template is None:
        return Thinking()
    return _Questions(text, ends=time.monotonic() + MAX_SECONDS).thinking()


class _Questions:
    """What a template is asked, and what follows from its answers."""

    def __init__(self, text: Text, *, ends: float) -> None:
        self._text = text
        self._ends = ends  # by time.monotonic()
        template = text.template
        self._source = "" if template is None else template.source
        known = {"messages", "add_generation_prompt", "tools", "documents"}
        free = frozenset() if template is None else template.variables
        names = sorted(free - known - text.rules.special_tokens.keys(), key=_likelihood)
        self._prompts: dict[str, tuple[str, str]] = {}  # with a variable false, and true
        self._asked = self._render([_QUESTION]) or ""
        for name in names[:_MOST_TRIED]:
            off, on = (self._render([_QUESTION], **{name: value}) for value in (False, True))
            if off != on and off is not None and on is not None:
                self._prompts[name] = (off, on)

    def thinking(self) -> Thinking:
        """Return what was found."""
        heading = self._heading()
        found = (marks for marks in self._marks() if not marks.opened_by(heading))
        marks = next(found, None)
        return Thinking(
            marks=marks,
            switch=self._switch(marks),
            opens=marks is not None and marks.opened_by(self._asked),
            strips=marks is not None and self._strips(marks),
        )

    def _marks(self) -> Iterator[ThoughtMarks]:
        """Yield what was found in each way, the most certain first."""
        for message in _answers():
            if (marks := self._around_thought(message)) is not None:
                yield marks
        for marks in self._pairs():
            if self._strips_inline(marks):
                yield marks
        for marks in self._pairs():
            if _OF_THOUGHTS.search(marks.opens) and self._speaks_of(marks):
                yield marks

    def _around_thought(self, answer: Message) -> ThoughtMarks | None:
        """Return what the template writes around the thought of an answer."""
        thoughtful = self._render([_QUESTION, answer], add_generation_prompt=False)
        if thoughtful is None or thoughtful.count(_THOUGHT) != 1 or _IS_DUMPED.search(thoughtful):
            return None
        plain = self._render([_QUESTION, _without_thought(answer)], add_generation_prompt=False)
        opens, closes = _difference(thoughtful, plain or "")
        if not opens.strip():  # it writes an empty thought where there is none
            before, _, after = thoughtful.partition(_THOUGHT)
            opens = _after(before, [self._heading(), *self._replies()])
            closes = after.partition(_ANSWER)[0] if _ANSWER in after else closes
        opens, closes = opens.strip(), closes.strip()
        if not (0 < len(opens) <= _LONGEST_MARK and 0 < len(closes) <= _LONGEST_MARK):
            return None
        return ThoughtMarks(opens=opens, closes=closes)

    def _heading(self) -> str:
        """Return a conversation up to an earlier answer without a thought."""
        again = {"role": "user", "content": _AGAIN}
        rendered = self._render([_QUESTION, _AGREED, again]) or ""
        return rendered.partition(_ANSWER)[0] if _ANSWER in rendered else ""

    def _replies(self) -> list[str]:
        """Return the prompts for an answer, with each variable set each way."""
        return [self._asked, *(prompt for pair in self._prompts.values() for prompt in pair)]

    def _pairs(self) -> list[ThoughtMarks]:
        """Return the tags in the template that differ in their brackets only."""
        tags = list(dict.fromkeys(_TAG.findall(self._source)))[:_MOST_TAGS]
        ends = {tag: _name(tag) for tag in tags if _is_end(tag)}
        pairs = [
            ThoughtMarks(opens=opens, closes=closes)
            for opens in tags
            for closes, name in ends.items()
            if opens not in ends and _name(opens) == name != ""
        ]
        return pairs[:_MOST_TRIED]

    def _strips_inline(self, marks: ThoughtMarks) -> bool:
        return self._loses_thought(f"{marks.opens}\n{_THOUGHT}\n{marks.closes}\n\n{_ANSWER}")

    def _strips(self, marks: ThoughtMarks) -> bool:
        return self._strips_inline(marks) or self._loses_thought(
            _ANSWER, reasoning_content=_THOUGHT
        )

    def _loses_thought(self, content: str, **fields: str) -> bool:
        said = {"role": "assistant", "content": content, **fields}
        rendered = self._render([_QUESTION, said, {"role": "user", "content": _AGAIN}]) or ""
        return _ANSWER in rendered and _THOUGHT not in rendered

    def _speaks_of(self, marks: ThoughtMarks) -> bool:
        """Tell whether a prompt opens such a thought, or says how to."""
        return any(
            marks.opened_by(prompt) or (marks.opens in before and marks.closes in prompt)
            for prompt in self._replies()
            for before in [prompt.partition(marks.closes)[0]]
        )

    def _switch(self, marks: ThoughtMarks | None) -> Switch | None:
        found = (self._switch_by(name, marks) for name in self._prompts)
        return next((switch for switch in found if switch is not None), None)

    def _switch_by(self, name: str, marks: ThoughtMarks | None) -> Switch | None:
        """Return the switch that a variable is, None if it does something else."""
        off, on = self._prompts[name]
        before, after = _state(off, marks), _state(on, marks)
        default = {off: False, on: True}.get(self._asked)
        thinks_if = not _TURNS_OFF.match(name)
        if before != after:
            thinks_if = after == "open" or before == "closed"
        elif default is None or "True" in on or not _OF_THOUGHTS.search(name):
            return None
        return Switch(name=name, default=default, thinks_if=thinks_if)

    def _render(self, messages: Sequence[Message], **variables: Any) -> str | None:
        """Return a conversation, None if the template does not say it, or not in time."""
        if time.monotonic() > self._ends:
            return None
        try:
            return self._text.render(messages, **variables)
        except EndlessTemplateError:
            self._ends = 0.0  # it is not asked again
            return None
        except UsageError:
            return None


def _answers() -> Iterator[Message]:
    """Yield answers with a thought, in the forms in which templates take one."""
    yield {**_AGREED, "reasoning_content": _THOUGHT}
    # Some write thoughts only where a tool is called.
    yield {**_AGREED, "reasoning_content": _THOUGHT, "tool_calls": [_CALL]}
    parts = [{"type": "thinking", "thinking": _THOUGHT}, {"type": "text", "text": _ANSWER}]
    yield {"role": "assistant", "content": parts}


def _without_thought(answer: Message) -> Message:
    content = answer["content"]
    if not isinstance(content, str):
        content = content[1:]
    kept = {name: value for name, value in answer.items() if name != "reasoning_content"}
    return {**kept, "content": content}


def _likelihood(name: str) -> tuple[bool, str]:
    return not _OF_THOUGHTS.search(name), name


def _difference(thoughtful: str, plain: str) -> tuple[str, str]:
    """Return what was added to a conversation before the thought in it, and after it."""
    at = thoughtful.index(_THOUGHT)
    start = _shared(thoughtful[:at], plain)
    rest = thoughtful[at + len(_THOUGHT) :]
    end = _shared(rest[::-1], plain[start:][::-1])
    opens, closes = thoughtful[start:at], rest[: len(rest) - end]
    # `<|` may belong to what was added or to what follows, if both begin so.
    for shift in range(min(start, len(closes), _LONGEST_MARK) + 1):
        moved = closes[len(closes) - shift :]
        if not thoughtful.endswith(moved, 0, start):
            break
        if (moved + opens).lstrip().startswith(_BRACKETS):
            return moved + opens, closes[: len(closes) - shift]
    return opens, closes


def _shared(one: str, other: str) -> int:
    """Return how many characters two texts share at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _after(text: str, others: Sequence[str]) -> str:
    """Return the end of a text, from where the first of the others goes on without its tags."""
    ends = sorted((text[_shared(text, other) :] for other in others), key=len)
    tagged = (end for end in ends if end.lstrip().startswith(_BRACKETS))
    last = re.search(rf"({_TAG.pattern})\s*$", text[-_LONGEST_MARK:])
    return next(tagged, last[0] if last else "")


def _state(prompt: str, marks: ThoughtMarks | None) -> _State:
    if marks is None:
        return "none"
    if marks.opened_by(prompt):
        return "open"
    return "closed" if prompt.rstrip().endswith(marks.closes) else "none"


def _name(tag: str) -> str:
    letters = re.sub(r"[^a-z]+", "_", tag.lower()).strip("_")
    return re.sub(r"^(start|begin|end)_|_(start|begin|end)$", "", letters)


def _is_end(tag: str) -> bool:
    """Tell whether a tag closes something: ``</x>``, ``<x|>``, ``[/X]``, ``<|END_X|>``."""
    return bool(
        "/" in tag
        or re.search(r"\bend_|_end\b", tag.lower())
        or (tag.endswith("|>") and not tag.startswith("<|"))
    )
