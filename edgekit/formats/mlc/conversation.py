"""A chat template in MLC's language: a head, a header for each role, and what stands between.

MLC does not run Jinja. What the checkpoint's template writes around messages becomes a
``conv_template``, and that is proven: for many conversations MLC's rules must give the same text
and the same ids. What cannot be expressed is refused, with the first difference.
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import TYPE_CHECKING, Any

from edgekit.errors import UsageError
from edgekit.formats.mlc import clients, template_affixes
from edgekit.formats.mlc.template_affixes import Role, Surroundings
from edgekit.model.tokenizer_files import added_tokens
from edgekit.text.template import Message
from edgekit.text.tokenizer import Text


if TYPE_CHECKING:
    from edgekit.model.checkpoint_protocol import CheckpointProtocol
    from edgekit.model.tokenizer_files import TokenizerFiles


RAW_HINT = (
    "`--variant raw-prompt` makes an artifact that takes prompts as they are: the app renders the "
    "chat template itself"
)
WAYS_OUT = (
    f"{RAW_HINT}; or take a template without it: --chat-template NAME|FILE, or --template-var "
    "enable_thinking=false where that is what it writes"
)
WITH_SYSTEM = "-with-system"  # the end of the second model's name in webllm.json
NO_THOUGHTS = "<think>\n\n</think>\n\n"  # what WebLLM starts an answer with if told not to think
CONTENTS = (
    "Hi",
    "What is 2 + 2?",
    " spaces around ",
    "\n\nnew lines around\n",
    "\tx = 1;\n    y = 2;",
    "$& costs $$5, $1 or $'",
    "{user_message}, {system_message} and {function_string}",
    "1234's",
    "Gr\u00fc\u00dfe \U0001f642 \u65e5\u672c\u8a9e",
    "<b>_</b>",
)
SYSTEMS = ("You are terse.", " Answer in French,\nalways. ", "{user_message}")
BOTH: tuple[str | None, ...] = (None, *SYSTEMS)
LONGEST_TURNS = 3

Conversations = Iterator[list[dict[str, str]]]


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A proven ``conv_template``, and what an app must do besides it."""

    template: Mapping[str, Any]
    # What replaces fields of it where there is a system message; None: nothing has to.
    with_system: Mapping[str, Any] | None = None
    takes_system: bool = True  # False: MLC would drop a system message
    needs_system: bool = False  # True: every conversation must have one
    trimmed_roles: tuple[Role, ...] = ()  # the app must strip their messages
    drops_thoughts: bool = False  # the app must cut <think>…</think> out of earlier answers
    keeps_breaks: bool = False  # but not the line breaks after it
    is_raw: bool = False  # one message is the whole prompt, as the chat template renders it
    notes: tuple[str, ...] = ()  # what a user should know, one sentence each

    @property
    def keeps_cache(self) -> bool:
        """Whether WebLLM may go on from what it has read when the next turn comes."""
        return self.is_raw or keeps_cache(self.template)

    @property
    def fills_answers(self) -> bool:
        """Whether WebLLM puts earlier answers into a text, and reads ``$&`` in them."""
        forms = (self.template, self.with_system or {})
        return any(form.get("role_templates") for form in forms)

    @property
    def systems(self) -> tuple[str | None, ...]:
        """The system messages with which it was proven; None: without one."""
        if self.needs_system:
            return SYSTEMS
        return BOTH if self.takes_system else (None,)

    @property
    def proven(self) -> int:
        """How many conversations were compared, text and ids."""
        return 0 if self.is_raw else LONGEST_TURNS * len(CONTENTS) * len(self.systems)


def keeps_cache(template: Mapping[str, Any]) -> bool:
    """Tell whether WebLLM may go on from its cache: it never reads ``seps[1]`` then.

    With a stop string, the cache holds that too, though it is not part of the answer; what a role
    template puts before an earlier answer is not in it.
    """
    return not (template["seps"][-1] or template["stop_str"] or template.get("role_templates"))


def derive(checkpoint: "CheckpointProtocol", *, raw_prompt: bool = False) -> Conversation:
    """Return the checkpoint's chat template in MLC's language, proven.

    Args:
        checkpoint: The model; without a chat template, it gets what ``raw_prompt`` gives.
        raw_prompt: Return what passes one message through as it is.

    Raises:
        UsageError: If MLC cannot express the template; the message shows the first difference.
    """
    return _derive(checkpoint.text, raw_prompt=raw_prompt)


@functools.lru_cache(maxsize=4)  # a plan and an export ask several times
def _derive(files: "TokenizerFiles", *, raw_prompt: bool) -> Conversation:
    source, text = files.chat_template, files.loaded()
    day = date.today() if source and template_affixes.writes_today(text) else None  # noqa: DTZ011
    text = text.on(day) if day else text
    stops = {"stop_str": list(files.stop_strings), "stop_token_ids": list(text.rules.stop_ids)}
    if raw_prompt or source is None:
        return _raw(text, stops)
    derivation = _Derivation(text=text, stops=stops, tokens=added_tokens(files.tokenizer_json))
    return _with_notes(derivation.run(), text=text, source=source, day=day)


def _raw(text: Text, stops: Mapping[str, Any]) -> Conversation:
    """Return what passes one message through."""
    template = _conv_template(
        "raw-prompt", stops, system=clients.SYSTEM, user="", assistant="", seps=[""]
    )
    if text.template is not None:
        notes = ["the app renders the prompt, and passes it to `completions` or as a user message"]
    else:
        notes = ["the model has no chat template: it continues what a single user message says"]
        if text.rules.adds_bos:
            bos = text.rules.special_tokens["bos_token"]
            notes.append(f"start every prompt with {bos}, which neither WebLLM nor MLC adds")
    return Conversation(template=template, is_raw=True, notes=tuple(notes))


def _conv_template(  # noqa: PLR0913 - the fields of MLC's own record
    name: str,
    stops: Mapping[str, Any],
    *,
    system: str,
    user: str,
    assistant: str,
    seps: Sequence[str],
    default_system: str = "",
    prefix_ids: Sequence[int] = (),
    adds_first_role: bool = True,
    content_sep: str = "",
    empty_sep: str = "",
    around_answer: str = "",
) -> dict[str, Any]:
    """Return a ``conv_template``, in the order MLC writes it.

    There are no ``role_templates`` where they can be done without: with them WebLLM reads ``$&``
    and ``{function_string}`` in a message as instructions.
    """
    around = {"role_templates": {"assistant": around_answer}} if around_answer else {}
    return {
        "name": name,
        "system_template": system,
        "system_message": default_system,
        "system_prefix_token_ids": list(prefix_ids),
        "add_role_after_system_message": adds_first_role,
        "roles": {"user": user, "assistant": assistant},
        **around,
        "messages": [],
        "seps": list(seps),
        "role_content_sep": content_sep,
        "role_empty_sep": empty_sep,
        **stops,
        "function_string": "",
        "use_function_calling": False,
    }


@dataclass(frozen=True, kw_only=True)
class _Derivation:
    """The way from one chat template to a proven `Conversation`."""

    text: Text
    stops: Mapping[str, Any]
    tokens: Mapping[str, int]  # where texts may be cut and tokenized apart

    def run(self) -> Conversation:
        """Return the conversation.

        Raises:
            UsageError: If there is none.
        """
        plain, refusal = self._try_find(has_system=False)
        around, _ = self._try_find(has_system=True)
        if plain is None and around is None:
            raise _inexpressible(refusal)
        template = self._for_both(plain, around)
        if template is not None:
            return self._conversation(template)
        return self._one_of_two(plain, around)

    def _for_both(
        self, plain: Surroundings | None, around: Surroundings | None
    ) -> dict[str, Any] | None:
        """Return what serves conversations with and without a system message, if anything does."""
        if plain is None or around is None:
            return None
        default = template_affixes.default_system(self.text, without=plain, around=around)
        if default is None:
            return None
        template, _ = self._try_prove(around, BOTH, default)
        return template

    def _one_of_two(self, plain: Surroundings | None, around: Surroundings | None) -> Conversation:
        """Return what serves conversations without a system message, and besides, what changes.

        MLC always writes its head, so a template that writes a system block only where there is a
        system message takes two.
        """
        alone, difference = self._try_prove(plain, (None,))
        with_system, system_difference = self._try_prove(around, SYSTEMS)
        if alone is None and with_system is None:
            raise _inexpressible(difference or system_difference)
        if alone is None or with_system is None:
            template = alone or with_system or {}
            return self._conversation(
                template, takes_system=alone is None, needs_system=alone is None
            )
        changed = {
            key: with_system.get(key, {})  # of what only one of them has: no role templates
            for key in alone | with_system
            if with_system.get(key, {}) != alone.get(key, {})
        }
        return self._conversation(alone, with_system=changed)

    def _conversation(self, template: Mapping[str, Any], **fields: Any) -> Conversation:
        return Conversation(
            template={**template, **({clients.STRIPS: True} if self._drops_thoughts else {})},
            trimmed_roles=self._trimmed_roles,
            drops_thoughts=self._drops_thoughts,
            keeps_breaks=self._drops_thoughts and template_affixes.keeps_breaks(self.text),
            **fields,
        )

    @functools.cached_property
    def _drops_thoughts(self) -> bool:
        return template_affixes.drops_thoughts(self.text)

    @functools.cached_property
    def _trimmed_roles(self) -> tuple[Role, ...]:
        return template_affixes.trimmed_roles(self.text)

    def _try_find(self, *, has_system: bool) -> tuple[Surroundings | None, str]:
        """Return what the template writes around messages, or why that cannot be known."""
        try:
            return template_affixes.find(self.text, has_system=has_system), ""
        except UsageError as error:
            return None, str(error)

    def _try_prove(
        self, around: Surroundings | None, systems: Sequence[str | None], default: str = ""
    ) -> tuple[dict[str, Any] | None, str]:
        """Return a template that passes every conversation, or how the best one fails."""
        if around is None:
            return None, ""
        passed_most, finding = -1, self._uncuttable(around)
        for template in self._candidates(around, default):
            passed, difference = self._prove(template, systems)
            if difference is None:
                return template, ""
            if passed > passed_most:
                passed_most, finding = passed, difference
        return None, finding

    # How the template_affixes may be cut

    def _candidates(self, around: Surroundings, default: str) -> Iterator[dict[str, Any]]:
        """Yield the ways to cut, the ones that let WebLLM keep its cache first."""
        before_answer, content_sep, empty_sep = around.headers()
        ask_cuts = self._cuts(before_answer)
        for cut in self._cuts(around.after_answer):
            user = around.after_answer[cut:]
            # MLC has one separator for both roles; else it stands in a template for answers.
            is_shared = user.endswith(content_sep)
            for system, adds_first_role in self._heads(around, user):
                for ask_cut in sorted(ask_cuts, key=lambda cut: cut == 0):  # a stable sort
                    yield self._candidate(
                        system=system,
                        default_system=default,
                        adds_first_role=adds_first_role,
                        user=user.removesuffix(content_sep) if is_shared else user,
                        assistant=before_answer[ask_cut:],
                        seps=[before_answer[:ask_cut], around.after_answer[:cut]],
                        content_sep=content_sep if is_shared else "",
                        around_answer="" if is_shared else content_sep + clients.ANSWER,
                        empty_sep=empty_sep,
                    )

    def _heads(self, around: Surroundings, user: str) -> Iterator[tuple[str, bool]]:
        """Yield system templates, and whether the header of the first user message follows."""
        before = "" if around.before_system is None else around.before_system + clients.SYSTEM
        if around.head.endswith(user):
            yield before + around.head.removesuffix(user), True
        if any(around.head.endswith(token) for token in self.tokens):
            yield before + around.head, False

    def _cuts(self, text: str) -> list[int]:
        """Return where a special token starts, then where one ends.

        There, and only there, what is left and right of it can be tokenized apart.
        """
        longest_first = sorted(self.tokens, key=len, reverse=True)
        found = list(re.finditer("|".join(map(re.escape, longest_first)) or "$^", text))
        starts, ends = [match.start() for match in found], [match.end() for match in found]
        return list(dict.fromkeys([*starts, *ends]))

    def _candidate(self, *, system: str, **fields: Any) -> dict[str, Any]:
        """Return a template; a BOS token at the start becomes an id, as MLC has it."""
        bos = self.text.rules.special_tokens.get("bos_token")
        prefix_ids: list[int] = []
        others = (fields["user"], fields["assistant"], *fields["seps"])
        is_head = bos in self.tokens and not any(str(bos) in other for other in others)
        if bos is not None and is_head and system.startswith(bos):
            prefix_ids, system = [self.tokens[bos]], system.removeprefix(bos)
        return _conv_template("edgekit", self.stops, system=system, prefix_ids=prefix_ids, **fields)

    def _uncuttable(self, around: Surroundings) -> str:
        """Say why there may be no candidate."""
        before_answer, _, _ = around.headers()
        for place, between in (
            ("between a question and its answer", before_answer),
            ("between an answer and the next question", around.after_answer),
        ):
            if not self._cuts(between):
                return (
                    f"no special token is in {between!r}, {place}, so that they cannot be "
                    "tokenized apart, as WebLLM does"
                )
        return (
            f"{around.head!r} before the first question and {around.after_answer!r} before the "
            "next have no header in common"
        )

    # The proof

    def _prove(
        self, template: Mapping[str, Any], systems: Sequence[str | None]
    ) -> tuple[int, str | None]:
        """Return how many conversations agree, and the first difference if one does not."""
        passed = 0
        for passed, messages in enumerate(conversations(systems)):
            difference = self._difference(template, messages)
            if difference is not None:
                return passed, difference
        return passed, None

    def _difference(self, template: Mapping[str, Any], messages: Sequence[Message]) -> str | None:
        """Return how MLC's prompt differs from the template's, None if it does not."""
        shown = [self._as_app_sends(message) for message in messages]
        wanted = self.text.render(messages)
        found = self._prefix_text(template) + clients.mlc_text(template, shown)
        if found != wanted:
            return _text_difference(wanted, found)
        wanted_ids = self._encode(wanted)
        sent = clients.sent_to_webllm(template, shown)
        for client, ids in (
            ("WebLLM", clients.webllm_ids(template, sent, self._encode)),
            ("MLC", clients.mlc_ids(template, shown, self._encode)),
        ):
            if ids != wanted_ids:
                return self._id_difference(client, wanted_ids, ids)
        return None

    def _as_app_sends(self, message: Message) -> Message:
        is_trimmed = message["role"] in self._trimmed_roles
        return {**message, "content": message["content"].strip()} if is_trimmed else message

    def _encode(self, text: str) -> list[int]:
        return self.text.encode(text, adds_bos=False)

    def _prefix_text(self, template: Mapping[str, Any]) -> str:
        return "".join(map(self.text.tokenizer.id_to_token, template["system_prefix_token_ids"]))

    def _id_difference(self, client: str, wanted: Sequence[int], found: Sequence[int]) -> str:
        at = _first_difference(wanted, found)
        tokens = [
            [self.text.tokenizer.id_to_token(id) for id in ids[at : at + 4]]
            for ids in (wanted, found)
        ]
        return (
            f"after {at} tokens the template continues with {tokens[0]}, {client} with {tokens[1]}"
        )


def conversations(systems: Sequence[str | None]) -> Conversations:
    """Yield conversations of one to three turns, with each of ``systems``; None: without one."""
    for turns in range(1, LONGEST_TURNS + 1):
        for system in systems:
            lead = [] if system is None else [{"role": "system", "content": system}]
            for first in range(len(CONTENTS)):
                contents = (CONTENTS[(first + n) % len(CONTENTS)] for n in range(2 * turns - 1))
                yield lead + [
                    {"role": template_affixes.ROLES[1 + n % 2], "content": content}
                    for n, content in enumerate(contents)
                ]


def _text_difference(wanted: str, found: str) -> str:
    at = _first_difference(wanted, found)
    start = max(0, at - 20)
    return (
        f"the template writes {wanted[start : at + 20]!r} where MLC would write "
        f"{found[start : at + 20]!r}"
    )


def _first_difference(wanted: Sequence[Any], found: Sequence[Any]) -> int:
    pairs = enumerate(zip(wanted, found, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(wanted), len(found)))


def _inexpressible(finding: str) -> UsageError:
    return UsageError(f"MLC cannot express the chat template: {finding}", hint=WAYS_OUT)


# What an app has to do, since a fixed text cannot


def _with_notes(found: Conversation, *, text: Text, source: str, day: date | None) -> Conversation:
    steps = list(_steps(found))
    notes = [f"an app must do more than call WebLLM, as index.html does: {'; '.join(steps)}"]
    if day is not None:
        notes.append(_date_note(day, text))
    if "tools" in source:
        notes.append("MLC cannot express how the chat template writes tools")
    if "enable_thinking" in source and not _can_switch_thoughts(found, text):
        notes.append("leave WebLLM's enable_thinking alone: it does not do what the template does")
    return replace(found, notes=tuple(notes if steps else notes[1:]))


def _date_note(day: date, text: Text) -> str:
    known = text.template.variables if text.template else frozenset()
    name = next((name for name in sorted(known) if "date" in name), None)
    fixed = f" (--template-var {name}=TEXT fixes another)" if name else ""
    return (
        f"the chat template writes the day's date: for MLC it stays that of the export, "
        f"{day.isoformat()}{fixed}; with `--variant raw-prompt` the app writes it"
    )


def _steps(found: Conversation) -> Iterator[str]:
    if found.with_system is not None:
        yield f"for a system message, load the model whose name ends in {WITH_SYSTEM}"
    if not found.takes_system:
        yield "pass no system message, it would be dropped"
    if found.needs_system:
        yield "pass a system message, an empty one would be written anyway"
    if found.trimmed_roles:
        yield f"strip the whitespace around {' and '.join(found.trimmed_roles)} messages"
    if found.drops_thoughts:
        breaks = ", but not the line breaks after it" if found.keeps_breaks else ""
        yield f"cut <think>…</think> out of earlier answers{breaks}"
    if found.fills_answers:
        yield "write $$ for $ in earlier answers, and their first {function_string} twice"
    if not found.keeps_cache:
        after = [found.template["seps"][-1], *found.template["stop_str"]]
        missing = next(filter(None, after), "")
        where = f"{missing!r} after an answer" if missing else "what stands before an answer"
        yield f"call resetChat() before each turn, or WebLLM errs about {where}"


def _can_switch_thoughts(found: Conversation, text: Text) -> bool:
    """Tell whether WebLLM's ``enable_thinking: false`` does what the chat template's does."""
    template = found.template
    head = template["roles"]["assistant"] + template["role_content_sep"]
    ask = [{"role": "user", "content": "Hi"}]
    asked = text.render(ask, enable_thinking=False)
    return asked.endswith(template["seps"][0] + head + NO_THOUGHTS)
