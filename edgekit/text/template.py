"""Chat templates: Jinja source that came with a model, rendered by a child process with limits."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any, Self

from edgekit import installed
from edgekit.encodings.limits import (
    TEMPLATE_BYTES,
    TEMPLATE_CHARACTERS,
    TEMPLATE_CPU_S,
    too_large,
)
from edgekit.errors import UsageError
from edgekit.runtime.limited import OverLimitError
from edgekit.text import guarded


MAX_CHARACTERS = TEMPLATE_CHARACTERS
MAX_SECONDS: float = TEMPLATE_CPU_S
# Fields under which older libraries pass what a model thought (transformers 5, _REASONING_FIELDS).
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")

Message = Mapping[str, Any]  # {"role": "user", "content": "…"}
Clock = date | str  # what a template's `strftime_now` tells: a day, or always the same text


class EndlessTemplateError(UsageError):
    """A template takes more time or makes more text than any conversation needs."""


@dataclass(frozen=True, kw_only=True)
class TemplateCall:
    """What a template is given besides the conversation, the same by every runtime."""

    variables: Mapping[str, Any] = field(default_factory=dict)  # JSON values, fixed for good
    empty_lists: tuple[str, ...] = ()  # of "tools" and "documents": where None would make it fail
    content_parts: tuple[str, ...] = ()  # roles whose content is a list of parts, not text

    @property
    def preamble(self) -> str:
        """Jinja that says the same at the head of the template, and writes nothing.

        Each line ends after its block, where ``trim_blocks`` takes the line end away, so that what
        follows renders as it did.
        """
        lists = [f"{{%- set {name} = {name} or [] %}}\n" for name in self.empty_lists]
        fixed = [f"{{%- set {n} = {_literal(v)} %}}\n" for n, v in sorted(self.variables.items())]
        return "".join([*lists, *fixed])


AS_IT_IS = TemplateCall()


def as_parts(messages: Sequence[Message], roles: Sequence[str]) -> list[Message]:
    """Return messages whose text is a list of one part, as processors pass it, for these roles."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if message.get("role") in roles and isinstance(message.get("content"), str)
        else message
        for message in messages
    ]


def _literal(value: Any) -> str:
    """Return a JSON value as Jinja writes it."""
    match value:
        case None:
            return "none"
        case list():
            return f"[{', '.join(map(_literal, value))}]"
        case dict():
            items = (f"{_literal(key)}: {_literal(item)}" for key, item in value.items())
            return f"{{{', '.join(items)}}}"
        case _:
            return json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A chat template that is Jinja."""

    source: str
    variables: frozenset[str] = frozenset()  # what it reads and does not set itself
    origin: str = "the chat template"  # for messages

    @classmethod
    def compile(cls, source: str, *, origin: str = "the chat template") -> Self:
        """Check Jinja source, and return what renders it.

        Args:
            source: Of the template.
            origin: What it is called in messages: its file.

        Raises:
            UsageError: If it is not Jinja, with the line, is not Unicode, or is too long.
            EndlessTemplateError: If compiling it takes too much.
            MissingDependencyError: If jinja2 is not installed.
        """
        installed.require("jinja2", purpose="a chat template", extra="run-gguf")
        try:
            size = len(source.encode())
        except UnicodeEncodeError as error:  # escaped in JSON
            raise UsageError(f"{origin} is not Unicode at character {error.start}") from error
        if size > TEMPLATE_BYTES:
            raise too_large(origin, size, TEMPLATE_BYTES)
        found = _ask({"source": source}, origin)
        return cls(source=source, variables=frozenset(found["variables"]), origin=origin)

    def render(
        self,
        messages: Sequence[Message],
        variables: Mapping[str, Any],
        *,
        clock: Clock | None = None,
    ) -> str:
        """Return the conversation as text.

        Args:
            messages: The conversation, JSON values; a key whose value is None counts as absent.
            variables: What else the template may read: special tokens, ``add_generation_prompt``.
            clock: What it is told of the time; None: the machine's.

        Raises:
            UsageError: If the template refuses the conversation or fails, or JSON cannot hold the
                conversation.
            EndlessTemplateError: If it grows without end.
        """
        question = {"source": self.source, "messages": _plain(messages), "variables": variables}
        if isinstance(clock, date):
            question["day"] = clock.isoformat()
        elif clock is not None:
            question["clock"] = clock
        return str(_ask(question, self.origin)["text"])


def _ask(question: dict[str, Any], origin: str) -> dict[str, Any]:
    limits = {"seconds": MAX_SECONDS, "characters": MAX_CHARACTERS}
    try:
        found = guarded.ask("template", question | limits, guarded.TEMPLATE)
    except OverLimitError as error:
        raise EndlessTemplateError(f"{origin} {error}") from error
    except TypeError as error:
        raise UsageError(f"the conversation is more than JSON can hold: {error}") from error
    if "endless" in found:
        raise EndlessTemplateError(f"{origin} {found['endless']}")
    if "refusal" in found:
        raise UsageError(f"{origin} {found['refusal']}")
    return found


def _plain(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Copy the conversation as transformers 5 does: no None, reasoning under its usual name."""
    plain = []
    for message in messages:
        present = {key: value for key, value in message.items() if value is not None}
        thoughts = [present[field] for field in _REASONING_FIELDS if field in present]
        if thoughts:
            present = {"thinking": thoughts[0], **present, "reasoning_content": thoughts[0]}
        plain.append(present)
    return plain
