"""Run a bundle: text in, text out, one piece at a time."""

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from edgekit import formats
from edgekit.browser.options import BrowserOptions, is_browser
from edgekit.browser.session import BrowserSession
from edgekit.bundle.manifest import Bundle
from edgekit.errors import UsageError
from edgekit.progress import Listener, Silent
from edgekit.runtime.generate import (
    FinishReason,
    PromptTooLongError,
    Sampling,
    TokenStream,
    generate,
)
from edgekit.runtime.processors import check_threads
from edgekit.runtime.session import Session
from edgekit.text import guarded
from edgekit.text.answer import AnswerReader, Part
from edgekit.text.template import Message
from edgekit.text.tokenizer import Text


DEFAULT_MAX_TOKENS = 512
GREEDY = Sampling()
NO_TEMPLATE_NOTE = "the model has no chat template; it continues the prompt as plain text"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A finished answer, and how fast it came."""

    text: str
    reasoning: str  # what the model thought before it; empty: nothing
    prompt_tokens: int
    reused_tokens: int  # of the prompt, already read for the answer before
    answer_tokens: int
    finish_reason: FinishReason | None  # None: the reader did not wait for the end
    time_to_first_token_s: float  # reading the prompt included
    decode_tokens_per_s: float | None  # after the first token; None if there was only one
    token_ids: tuple[int, ...]
    notes: tuple[str, ...] = ()


@dataclass(kw_only=True, eq=False)
class Reply(Iterator[str]):
    """The pieces of an answer, as they are made; `answer` once they have ended.

    What the model thinks before it answers is not among them: `next_part` gives both.
    """

    generation: TokenStream
    reader: AnswerReader
    notes: tuple[str, ...] = ()
    on_end: Callable[[], None] | None = None  # called once, unless nothing was generated
    _token_ids: list[int] = field(default_factory=list, init=False)
    _said: list[str] = field(default_factory=list, init=False)
    _thought: list[str] = field(default_factory=list, init=False)
    _first_token_s: float | None = field(default=None, init=False)
    _decode_s: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        """Prepare; nothing runs before the first piece is requested."""
        self._parts = self._generate()

    def __iter__(self) -> Self:
        """Return itself."""
        return self

    def __next__(self) -> str:
        """Return the next piece of the answer, never empty."""
        return next(part.text for part in self._parts if not part.is_thought)

    def next_part(self) -> Part | None:
        """Return the next piece of what the model thinks, or of its answer; None at the end."""
        return next(self._parts, None)

    def close(self) -> None:
        """Stop generating."""
        self._parts.close()

    @property
    def said(self) -> str:
        """The answer so far."""
        return "".join(self._said)

    @property
    def reasoning(self) -> str:
        """What the model has thought so far."""
        return "".join(self._thought)

    @property
    def answer(self) -> Answer:
        """The whole answer, once the rest of it has come."""
        for _ in self:
            pass
        decoded = self.generation.decoded_tokens
        return Answer(
            text=self.said,
            reasoning=self.reasoning,
            prompt_tokens=len(self.generation.prompt_ids),
            reused_tokens=self.generation.reused_tokens,
            answer_tokens=len(self._token_ids),
            finish_reason=self._finish_reason,
            time_to_first_token_s=self._first_token_s or 0.0,
            decode_tokens_per_s=decoded / self._decode_s if decoded else None,
            token_ids=tuple(self._token_ids),
            notes=self.notes,
        )

    @property
    def _finish_reason(self) -> FinishReason | None:
        return "stop" if self.reader.has_stopped else self.generation.finish_reason

    def _generate(self) -> Generator[Part]:
        is_complete = False
        try:
            for part in self._read_tokens():
                (self._thought if part.is_thought else self._said).append(part.text)
                yield part
            is_complete = True
        finally:
            if self.on_end and (is_complete or self._said or self._thought):
                self.on_end()

    def _read_tokens(self) -> Iterator[Part]:
        """Yield what the tokens say, up to a stop string."""
        for token in self._timed_tokens():
            self._token_ids.append(token)
            yield from self.reader.feed(token)
            if self.reader.has_stopped:
                return
        yield from self.reader.finish()

    def _timed_tokens(self) -> Iterator[int]:
        """Yield the tokens; only the time within the session's work counts, not the reader's."""
        while True:
            started = time.perf_counter()
            token = next(self.generation, None)
            elapsed_s = time.perf_counter() - started
            if self._first_token_s is None:
                self._first_token_s = elapsed_s
            else:
                self._decode_s += elapsed_s
            if token is None:
                return
            yield token


@dataclass(kw_only=True, eq=False)
class Runner:
    """A loaded bundle: its session, its text, and what the session has read so far.

    One answer at a time: start the next when the last one has ended or is abandoned.
    """

    session: Session
    text: Text
    bundle: Bundle
    template_variables: Mapping[str, Any] = field(default_factory=dict)  # of every conversation
    _cached_ids: list[int] = field(default_factory=list, init=False)

    @classmethod
    def open(  # noqa: PLR0913 - what a bundle is loaded with
        cls,
        directory: str | Path,
        *,
        context_tokens: int | None = None,
        threads: int | None = None,
        check_hashes: bool = True,
        trusted: str | Path | None = None,
        template_variables: Mapping[str, Any] | None = None,
        device: str = "this",
    ) -> Self:
        """Load a bundle.

        Args:
            directory: What `edgekit export` printed.
            context_tokens: How much the cache must hold; None: what the bundle was made for.
            threads: From 1 to the number of cores; None: as many as there are fast ones.
            check_hashes: False checks names and sizes only: faster, and blind to a changed byte.
            trusted: Public keys, or a list of allowed signers, one of whom must have signed the
                bundle (see `Bundle.load`); None: anybody may have made it.
            template_variables: What the chat template reads, by name, for every conversation.
            device: ``"this"``, or ``"browser"``: a page of the system's Chromium computes.

        Raises:
            BundleError: If the bundle is damaged, or not signed as it must be.
            MissingDependencyError: If its runtime, or the browser, is not installed.
            UsageError: If the device is neither, the context would be longer than what the bundle
                was proven for, the machine cannot run that many threads, or the template does not
                read a variable.
        """
        check_threads(threads)
        guarded.start()
        bundle = Bundle.load(directory, check_hashes=check_hashes, trusted=trusted)
        if context_tokens is not None and not 0 < context_tokens <= bundle.context_tokens:
            raise UsageError(
                f"a context of {context_tokens} tokens is not possible: {directory} was "
                f"exported for {bundle.context_tokens}",
                hint="export again with a larger --context",
            )
        text = Text.open(bundle.directory, bundle.text)  # cheap, so that its refusals come first
        text.check_variables(template_variables or {})
        session = _load(
            bundle,
            text,
            device,
            context_tokens=context_tokens or bundle.context_tokens,
            threads=threads,
        )
        return cls(
            session=session,
            text=text,
            bundle=bundle,
            template_variables=dict(template_variables or {}),
        )

    def ask(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int | None = DEFAULT_MAX_TOKENS,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
        template_variables: Mapping[str, Any] | None = None,
    ) -> Reply:
        """Answer a conversation, ``[{"role": "user", "content": "…"}]``.

        Args:
            messages: The conversation.
            max_tokens: The length of the answer at most; None allows the rest of the context.
            sampling: How to choose tokens.
            stop: Strings that end the answer and are not part of it, besides the model's own.
            template_variables: What the chat template reads, by name, this time.

        Raises:
            UsageError: If the template refuses it or does not read a variable, or it is longer than
                the context; nothing ran.
        """
        self.text.check_variables(template_variables or {})
        variables = {**self.template_variables, **(template_variables or {})}
        text = self._within_context(self.text.render(messages, **variables))
        ids = self.text.encode(text, adds_bos=False)
        reader = AnswerReader(self.text, prompt=text, stop=stop)
        return self._reply(ids, reader, max_tokens=max_tokens, sampling=sampling)

    def complete(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = DEFAULT_MAX_TOKENS,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
    ) -> Reply:
        """Continue plain text, or token ids.

        Raises:
            UsageError: If the prompt is empty or longer than the context; nothing ran.
        """
        if isinstance(prompt, str):
            prompt = self.text.encode(self._within_context(prompt))
        reader = AnswerReader(self.text, prompt=None, stop=stop)
        return self._reply(prompt, reader, max_tokens=max_tokens, sampling=sampling)

    def _within_context(self, text: str) -> str:
        """Return the text, unless it is plain without tokenizing that the context cannot hold it.

        Tokenizing takes seconds and hundreds of times the text's memory for some megabytes.
        """
        size = len(text.encode("utf-8", "surrogatepass"))
        if size <= self.session.context_tokens:  # as most are: the vocabulary need not be read
            return text
        limit = self.session.context_tokens * self.text.longest_token_bytes
        if size > limit:
            raise PromptTooLongError(
                f"the prompt has {size} bytes, the context holds {self.session.context_tokens} "
                f"tokens, {limit} bytes at most"
            )
        return text

    def device_notes(self) -> tuple[str, ...]:
        """Return what is known by now of where the answers were computed, if not by Python."""
        session = self.session
        return tuple(session.notes()) if isinstance(session, BrowserSession) else ()

    def close(self) -> None:
        """Free the session's memory."""
        self.session.close()

    def __enter__(self) -> Self:
        """Return itself; the end of the block closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _reply(
        self,
        ids: Sequence[int],
        reader: AnswerReader,
        *,
        max_tokens: int | None,
        sampling: Sampling,
    ) -> Reply:
        generation = generate(
            self.session,
            ids,
            max_tokens=max_tokens,
            stop_ids=self.text.rules.stop_ids,
            sampling=sampling,
            cached_ids=self._cached_ids,
        )
        return Reply(generation=generation, reader=reader)


def _load(
    bundle: Bundle, text: Text, device: str, *, context_tokens: int, threads: int | None
) -> Session:
    artifact = bundle.artifact
    if is_browser(device):
        return BrowserSession.open(
            bundle.artifact_path, artifact.format, BrowserOptions.parse(device), text=text,
            context_tokens=context_tokens, threads=threads,
        )  # fmt: skip
    if device != "this":
        raise UsageError(
            f"bundles do not run on {device!r} from here", hint="devices: this, browser"
        )
    return formats.running(artifact.format).load(
        bundle.artifact_path, context_tokens=context_tokens, threads=threads
    )


def answer(  # noqa: PLR0913 - a request in full
    runner: Runner,
    prompt: str,
    *,
    system: str | None = None,
    max_tokens: int | None = DEFAULT_MAX_TOKENS,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
    raw: bool = False,
) -> Reply:
    """Answer one prompt with a loaded bundle.

    Args:
        runner: The bundle.
        prompt: What the user says.
        system: The system prompt.
        max_tokens: The length of the answer at most; None allows the rest of the context.
        sampling: How to choose tokens.
        stop: Strings that end the answer and are not part of it, besides the model's own.
        raw: Whether to continue the prompt as it is, without the chat template.

    Raises:
        UsageError: If a system prompt is given but no template can hold it.
    """
    has_template = runner.text.template is not None
    if has_template and not raw:
        messages = conversation(prompt, system=system)
        return runner.ask(messages, max_tokens=max_tokens, sampling=sampling, stop=stop)
    if system is not None:
        raise UsageError("a system prompt needs a chat template", hint="put it before the prompt")
    reply = runner.complete(prompt, max_tokens=max_tokens, sampling=sampling, stop=stop)
    reply.notes = () if raw else (NO_TEMPLATE_NOTE,)
    return reply


def conversation(prompt: str, *, system: str | None = None) -> list[Message]:
    """Return a conversation of one question."""
    opening = [] if system is None else [{"role": "system", "content": system}]
    return [*opening, {"role": "user", "content": prompt}]


def run(  # noqa: PLR0913 - a request in full
    bundle_directory: str | Path,
    prompt: str,
    *,
    system: str | None = None,
    max_tokens: int | None = DEFAULT_MAX_TOKENS,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
    raw: bool = False,
    template_variables: Mapping[str, Any] | None = None,
    trusted: str | Path | None = None,
    listener: Listener | None = None,
    device: str = "this",
) -> Generator[str]:
    """Load a bundle, yield the pieces of one answer, and close it; see `Runner.open`, `answer`.

    ``listener`` is told the notes: what a reader of the answer should know.
    """
    with Runner.open(
        bundle_directory, template_variables=template_variables, trusted=trusted, device=device
    ) as runner:
        reply = answer(
            runner,
            prompt,
            system=system,
            max_tokens=max_tokens,
            sampling=sampling,
            stop=stop,
            raw=raw,
        )
        for note in reply.notes:
            (listener or Silent()).say(note)
        yield from reply


@dataclass(kw_only=True)
class Chat:
    """A conversation with memory; of each turn, the session reads only what is new to it.

    What the model thought is remembered too: the chat template decides whether it is read again.
    """

    runner: Runner
    system: str | None = None
    max_tokens: int | None = DEFAULT_MAX_TOKENS
    sampling: Sampling = GREEDY
    stop: Sequence[str] = ()
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Begin."""
        self.clear()

    def clear(self) -> None:
        """Forget what was said; the system prompt stays."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def say(self, prompt: str) -> Reply:
        """Answer, and remember both once the answer ends; what is cut short is remembered too.

        Raises:
            UsageError: If the conversation no longer fits the context; it stays as it was.
        """
        question: Message = {"role": "user", "content": prompt}
        reply = self.runner.ask(
            [*self.messages, question],
            max_tokens=self.max_tokens,
            sampling=self.sampling,
            stop=self.stop,
        )
        reply.on_end = lambda: self._remember(question, reply)
        return reply

    def _remember(self, question: Message, reply: Reply) -> None:
        thought = {"reasoning_content": reply.reasoning} if reply.reasoning else {}
        said = {"role": "assistant", "content": reply.said, **thought}
        self.messages += [question, said]
