"""What a chat template writes around messages, found by asking it about messages of known text."""

from dataclasses import dataclass
from typing import Literal

from edgekit.errors import UsageError
from edgekit.text.tokenizer import Text


Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")
# What no template says itself, so that it is found again.
_SYSTEM, _ASK, _ANSWER, _AGAIN = (f"edgekit-5c-{n}" for n in ("system", "ask", "answer", "again"))
_THOUGHT = "edgekit-5c-thought"


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """The texts between the messages of a conversation."""

    before_system: str | None  # None: asked without a system message
    head: str  # before the first user message, after the system message if there is one
    after_ask: str  # between a user message and its answer
    after_answer: str  # between an answer and the next user message
    reply: str  # after the last user message

    def headers(self) -> tuple[str, str, str]:
        """Return what precedes every answer, one that is there, and one that is to come."""
        pairs = enumerate(zip(self.after_ask, self.reply, strict=False))
        shortest = min(len(self.after_ask), len(self.reply))
        shared = next((at for at, (old, new) in pairs if old != new), shortest)
        return self.reply[:shared], self.after_ask[shared:], self.reply[shared:]


def find(text: Text, *, has_system: bool) -> Surroundings:
    """Return what the template writes around the messages of a conversation of two turns.

    Raises:
        UsageError: If the template refuses the conversation, or changes its messages.
    """
    messages = _conversation(_ASK, _ANSWER, _AGAIN, system=_SYSTEM if has_system else None)
    rest, between = text.render(messages), []
    for message in messages:
        before, found, rest = rest.partition(message["content"])
        if not found or message["content"] in rest:
            raise UsageError(f"it does not write each {message['role']} message once, in order")
        between.append(before)
    *before_system, head, after_ask, after_answer = between
    return Surroundings(
        before_system=before_system[0] if has_system else None,
        head=head,
        after_ask=after_ask,
        after_answer=after_answer,
        reply=rest,
    )


def default_system(text: Text, *, without: Surroundings, around: Surroundings) -> str | None:
    """Return the system message that the template puts in by itself, None if it has no place.

    Args:
        text: Renders the template.
        without: What it writes where there is no system message.
        around: What it writes where there is one.
    """
    before, after, head = around.before_system or "", around.head, without.head
    is_around = len(head) >= len(before + after) and head.startswith(before)
    if not (is_around and head.endswith(after)):
        return None
    default = head[len(before) : len(head) - len(after)]
    asked = text.render(_conversation(_ASK))
    is_default = text.render(_conversation(_ASK, system=default)) == asked
    return default if is_default else None


def trimmed_roles(text: Text) -> tuple[Role, ...]:
    """Return whose messages lose the whitespace around them."""
    return tuple(role for role in ROLES if _trims(text, role))


def _trims(text: Text, role: Role) -> bool:
    def render(content: str) -> str:
        system = content if role == "system" else None
        ask = content if role == "user" else _ASK
        answer = content if role == "assistant" else _ANSWER
        return text.render(_conversation(ask, answer, _AGAIN, system=system))

    try:
        return render(" \nx\n ") == render("x")
    except UsageError:  # no such role
        return False


def writes_today(text: Text) -> bool:
    """Tell whether the prompt is another one every day."""
    asked = (_conversation(_ASK, system=system) for system in (None, _SYSTEM))
    return any(text.writes_today(messages) for messages in asked)


def drops_thoughts(text: Text) -> bool:
    """Tell whether the template leaves out what the model thought before an earlier answer."""
    answer = f"<think>\n{_THOUGHT}\n</think>\n\n{_ANSWER}"
    try:
        rendered = text.render(_conversation(_ASK, answer, _AGAIN))
    except UsageError:
        return False
    return _ANSWER in rendered and _THOUGHT not in rendered


def keeps_breaks(text: Text) -> bool:
    """Tell whether the line breaks after such a thought stay."""
    thought, plain, broken = (
        text.render(_conversation(_ASK, start + _ANSWER, _AGAIN))
        for start in (f"<think>\n{_THOUGHT}\n</think>\n\n", "", "\n\n")
    )
    return thought == broken != plain


def _conversation(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """Return messages of user and assistant in turns, after those of the system if any."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    return messages + [
        {"role": ROLES[1 + index % 2], "content": content} for index, content in enumerate(contents)
    ]
