"""How MLC's programs turn a conversation into token ids: the rules a template is proven under.

WebLLM, in the browser, tokenizes the system part, each message and the reply's header on their own.
MLC's engine, on phones, joins them and tokenizes once. Neither adds a BOS token.

Source: ``getPromptArrayInternal`` and ``getInputData`` of @mlc-ai/web-llm 0.2.86, and
``CreatePrompt`` in cpp/json_ffi/conv_template.cc of mlc-llm.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edgekit.text.template import Message


Encode = Callable[[str], list[int]]  # special tokens parsed, none added

SYSTEM = "{system_message}"
ANSWER = "{assistant_message}"  # in role_templates["assistant"]
STRIPS = "strip_reasoning_in_history"
_FUNCTIONS = "{function_string}"  # WebLLM takes the first one out of what a role template holds
_THOUGHT_END = "</think>"
_PATTERNS = re.compile(r"\$[$&`']")  # what JavaScript's String.replace expands


def webllm_ids(
    template: Mapping[str, Any], messages: Sequence[Message], encode: Encode
) -> list[int]:
    """Return the ids WebLLM reads when it starts with these messages, up to where it answers."""
    parts = webllm_parts(template, messages)
    return [*_prefix(template), *(id for part in parts for id in encode(part))]


def webllm_parts(template: Mapping[str, Any], messages: Sequence[Message]) -> list[str]:
    """Return the texts that WebLLM tokenizes one by one."""
    system, turns = _split(template, messages)
    head = replace_in_javascript(template["system_template"], SYSTEM, system)
    around = _around_answer(template)
    if around is not None:
        turns = [
            _with_answer(
                turn,
                replace_in_javascript(around, ANSWER, turn["content"]).replace(_FUNCTIONS, "", 1),
            )
            for turn in turns
        ]
    parts = _message_parts(template, turns, has_head=head != "")
    return [*([head] if head else []), *parts]


def sent_to_webllm(template: Mapping[str, Any], messages: Sequence[Message]) -> list[Message]:
    """Return messages as an app has to pass them, so that WebLLM reads them as they are.

    It puts an answer into a role template with String.replace, which reads ``$&`` and the like.
    """
    if _around_answer(template) is None:
        return list(messages)
    return [
        _with_answer(m, m["content"].replace("$", "$$").replace(_FUNCTIONS, _FUNCTIONS * 2, 1))
        for m in messages
    ]


def without_thoughts(answer: str) -> str:
    r"""Return an answer without what the model thought, as MLC strips it from earlier ones.

    >>> without_thoughts("<think>\nhm\n</think>\n\nYes "), without_thoughts("\nNo")
    ('Yes ', '\nNo')
    """
    _, end, said = answer.rpartition(_THOUGHT_END)
    return said.lstrip("\n") if end else answer


def _with_answer(message: Message, content: str) -> Message:
    """Return an answer with another content, any other message as it is."""
    return {**message, "content": content} if message["role"] == "assistant" else message


def _around_answer(template: Mapping[str, Any]) -> str | None:
    """Return what stands in the place of an earlier answer, None if it is the answer alone."""
    around: str | None = template.get("role_templates", {}).get("assistant")
    return around


def mlc_ids(template: Mapping[str, Any], messages: Sequence[Message], encode: Encode) -> list[int]:
    """Return the ids MLC's own engine reads."""
    return [*_prefix(template), *encode(mlc_text(template, messages))]


def mlc_text(template: Mapping[str, Any], messages: Sequence[Message]) -> str:
    """Return the text that MLC's own engine tokenizes at once, after the prefix of ids."""
    system, turns = _split(template, messages)
    head = template["system_template"].replace(SYSTEM, system, 1)
    around = _around_answer(template) or ANSWER
    last_ask = max((at for at, turn in enumerate(turns) if turn["role"] == "user"), default=-1)
    turns = [
        _with_answer(
            turn,
            around.replace(
                ANSWER,
                without_thoughts(turn["content"])
                if template.get(STRIPS) and at < last_ask
                else turn["content"],
                1,
            ),
        )
        for at, turn in enumerate(turns)
    ]
    return "".join([head, *_message_parts(template, turns, has_head=head != "")])


def replace_in_javascript(text: str, old: str, new: str) -> str:
    r"""Return what ``text.replace(old, new)`` gives in JavaScript, which reads ``$`` in ``new``.

    >>> replace_in_javascript("<{x}>", "{x}", "$$5, $1, $&, $`, $'")
    '<$5, $1, {x}, <, >>'
    """
    before, found, after = text.partition(old)
    if not found:
        return text
    meaning = {"$$": "$", "$&": old, "$`": before, "$'": after}
    return before + _PATTERNS.sub(lambda match: meaning[match[0]], new) + after


def _prefix(template: Mapping[str, Any]) -> list[int]:
    return list(template.get("system_prefix_token_ids") or ())


def _split(
    template: Mapping[str, Any], messages: Sequence[Message]
) -> tuple[str, Sequence[Message]]:
    """Return the system message, the template's own if there is none, and the others."""
    if messages and messages[0]["role"] == "system":
        return messages[0]["content"], messages[1:]
    return template["system_message"], messages


def _message_parts(
    template: Mapping[str, Any], turns: Sequence[Message], *, has_head: bool
) -> list[str]:
    """Return the text of each message, then the header of the reply."""
    roles, seps = template["roles"], template["seps"]
    parts = []
    for index, turn in enumerate(turns):
        is_bare = index == 0 and has_head and not template["add_role_after_system_message"]
        header = "" if is_bare else roles[turn["role"]] + template["role_content_sep"]
        # WebLLM counts messages, MLC asks who speaks: the same where user and assistant take turns.
        parts.append(header + turn["content"] + seps[index % len(seps)])
    return [*parts, roles["assistant"] + template["role_empty_sep"]]
