"""How a chat template wants to be called, found by asking it.

A template was written for one program, and some fail elsewhere: those for tool use want a list of
tools, those of vision models the content of a message as a list of parts.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from edgekit.errors import UsageError
from edgekit.text.template import (
    MAX_SECONDS,
    ChatTemplate,
    EndlessTemplateError,
    Message,
    TemplateCall,
    as_parts,
)


_LISTS: tuple[tuple[str, ...], ...] = ((), ("tools",), ("documents",), ("tools", "documents"))
_MARK = "edgekit-5c-mark"  # what no template says itself
_ROLES = ("user", "system", "assistant")


def fit(
    source: str,
    call: TemplateCall,
    special_tokens: Mapping[str, str],
    *,
    origin: str = "the chat template",
) -> TemplateCall:
    """Return how the template can be called, with as little help as it needs.

    Args:
        source: The template.
        call: What it gets in any case.
        special_tokens: What it may read: ``{"bos_token": "<s>"}``.
        origin: What it is called in messages.

    Raises:
        UsageError: If the template is not Jinja, or cannot say one question however it is called;
            the message is that of the usual call.
        EndlessTemplateError: If it grows without end.
        MissingDependencyError: If jinja2 is not installed.
    """
    refusals = []
    ends = time.monotonic() + MAX_SECONDS
    for empty_lists in _LISTS:
        asked = replace(call, empty_lists=empty_lists)
        template = ChatTemplate.compile(asked.preamble + source, origin=origin)
        speaker = _Speaker(template, special_tokens, ends=ends)
        try:
            return replace(asked, content_parts=speaker.content_parts())
        except EndlessTemplateError:
            raise
        except UsageError as error:
            refusals.append(error)
    raise refusals[0]


class _Speaker:
    """A template that says conversations, with the content of some roles as parts."""

    def __init__(
        self, template: ChatTemplate, special_tokens: Mapping[str, str], *, ends: float
    ) -> None:
        self._template = template
        self._ends = ends  # by time.monotonic()
        self._variables: dict[str, Any] = {
            "tools": None, "documents": None, "add_generation_prompt": True, **special_tokens,
        }  # fmt: skip

    def content_parts(self) -> tuple[str, ...]:
        """Return the roles whose content is written only if it is a list of parts.

        Raises:
            UsageError: If the template cannot say a question in either form.
        """
        parts: tuple[str, ...] = ()
        for role in _ROLES:
            messages = list(_conversation(role))
            if not self._writes(messages, parts) and self._writes(messages, (*parts, role)):
                parts = (*parts, role)
        self._render(list(_conversation("user")), parts)  # raises what it has to say
        return parts

    def _writes(self, messages: Sequence[Message], parts: Sequence[str]) -> bool:
        """Tell whether the marked message is in the text; letters may have changed their case."""
        try:
            return _MARK in self._render(messages, parts).lower()
        except EndlessTemplateError:
            raise  # as it would in any form
        except UsageError:
            return False

    def _render(self, messages: Sequence[Message], parts: Sequence[str]) -> str:
        if time.monotonic() > self._ends:  # each conversation alone may be within the limit
            raise EndlessTemplateError(
                f"{self._template.origin} takes more than {MAX_SECONDS:g} s for a few short "
                "conversations"
            )
        return self._template.render(as_parts(messages, parts), self._variables)


def _conversation(role: str) -> Iterator[Message]:
    """Yield the shortest conversation in which a role speaks before an answer; it says the mark."""
    match role:
        case "user":
            yield {"role": "user", "content": _MARK}
        case "system":
            yield {"role": "system", "content": _MARK}
            yield {"role": "user", "content": "Hi"}
        case _:
            yield {"role": "user", "content": "Hi"}
            yield {"role": role, "content": _MARK}
            yield {"role": "user", "content": "Go on"}
