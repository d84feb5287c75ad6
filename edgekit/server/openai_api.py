"""OpenAI's API, as far as a small model needs it: what is asked, how an answer is written.

What would change the answer and is not supported is refused by name, never ignored. Nothing here
knows HTTP; `edgekit.serve` does.
"""

import json
import time
import uuid
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from edgekit.encodings.json_files import parse
from edgekit.errors import EdgekitError, UsageError
from edgekit.run import Answer
from edgekit.runtime.generate import PromptTooLongError, Sampling
from edgekit.text.answer import Part
from edgekit.text.template import Message


TEMPLATE_VARIABLES = "chat_template_kwargs"  # not OpenAI's; vLLM, SGLang and llama.cpp take it
REASONING = "reasoning_content"  # not OpenAI's; DeepSeek, vLLM and llama.cpp say it
MAX_STOP_STRINGS = 4  # OpenAI API reference, `stop`
_DEFAULT_COMPLETION_TOKENS = 16  # OpenAI API reference, `max_tokens` of /v1/completions
_SAMPLING_FIELDS = {
    "temperature": float,
    "top_p": float,
    "seed": int,
    # Not OpenAI's, but what other local servers take.
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
}
# Fields that would change the answer, and the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "echo": (False,),
    "suffix": ("",),
}
# Fields that say something about the request, not about the answer.
_IGNORED = (
    "user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier",
    "parallel_tool_calls",
)  # fmt: skip


class ApiError(Exception):
    """A request refused, in the words of OpenAI's API."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    @property
    def body(self) -> dict[str, Any]:
        """What the client gets."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    @classmethod
    def of(cls, error: EdgekitError) -> "ApiError":
        """Translate a refusal of edgekit."""
        message = f"{error}; {error.hint}" if error.hint else str(error)
        if isinstance(error, PromptTooLongError):
            return cls(message, code="context_length_exceeded")
        return cls(message, status=400 if isinstance(error, UsageError) else 500)


@dataclass(kw_only=True)
class Fields:
    """The fields of a request, each taken once, so that unknown ones can be refused."""

    values: dict[str, Any]
    prefix: str = ""  # of every name, for messages
    ignored: Collection[str] = _IGNORED  # names that nobody has to take

    @classmethod
    def parse(cls, body: bytes) -> "Fields":
        """Read a JSON object.

        Raises:
            ApiError: If it is none.
        """
        try:
            values = parse(body)
        except ValueError as error:
            raise ApiError(f"the body is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ApiError(f"the body is a JSON {type(values).__name__}, expected an object")
        return cls(values=values)

    def take(self, name: str) -> Any:
        """Return a field, None if it is absent."""
        return self.values.pop(name, None)

    def take_as(self, name: str, kind: type) -> Any:
        """Return a field of a type, None if it is absent; a whole number is a number, too.

        Raises:
            ApiError: If it is of another type.
        """
        value = self.take(name)
        kinds = (int, float) if kind is float else (kind,)
        is_boolean = isinstance(value, bool)
        if value is None or (isinstance(value, kinds) and is_boolean == (kind is bool)):
            return value
        name = self.prefix + name
        raise ApiError(f"{name} = {value!r} is not a {kind.__name__}", param=name)

    def take_fields(self, name: str) -> "Fields":
        """Return the fields of an object, none if it is absent.

        Raises:
            ApiError: If it is of another type.
        """
        values = self.take_as(name, dict) or {}
        return Fields(values=dict(values), prefix=f"{self.prefix}{name}.", ignored=())

    def refuse_unsupported(self) -> None:
        """Refuse what would change the answer in a way edgekit does not do.

        Raises:
            ApiError: If there is such a field.
        """
        for name, neutral in _UNSUPPORTED.items():
            value = self.take(name)
            asks = [json.dumps(item) for item in (None, *neutral)]
            if json.dumps(value) not in asks:
                raise ApiError(
                    f"{name} = {value!r} is not supported", param=name, code="unsupported_parameter"
                )

    def refuse_rest(self) -> None:
        """Refuse what nobody took.

        Raises:
            ApiError: If there is such a field.
        """
        for name in sorted(self.values.keys() - set(self.ignored)):
            path = self.prefix + name
            raise ApiError(f"no field named {path!r}", param=path, code="unknown_parameter")


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A request, understood."""

    kind: Literal["chat", "text"]
    messages: list[Message] = field(default_factory=list)  # of a chat
    template_variables: dict[str, Any] = field(default_factory=dict)  # of a chat
    prompt: str | list[int] = ""  # of a text
    max_tokens: int | None
    sampling: Sampling
    stop: tuple[str, ...]
    streams: bool
    streams_usage: bool

    @classmethod
    def chat(cls, fields: Fields, *, sampling: Sampling) -> "Ask":
        """Read a request to /v1/chat/completions.

        Raises:
            ApiError: With the field at fault.
        """
        messages = _messages(fields.take("messages"))
        older, newer = (fields.take_as(n, int) for n in ("max_tokens", "max_completion_tokens"))
        return cls._rest(
            fields,
            sampling,
            kind="chat",
            messages=messages,
            template_variables=fields.take_as(TEMPLATE_VARIABLES, dict) or {},
            max_tokens=older if newer is None else newer,
        )

    @classmethod
    def text(cls, fields: Fields, *, sampling: Sampling) -> "Ask":
        """Read a request to /v1/completions.

        Raises:
            ApiError: With the field at fault.
        """
        prompt = _prompt(fields.take("prompt"))
        longest = fields.take_as("max_tokens", int)
        if longest is None:
            longest = _DEFAULT_COMPLETION_TOKENS
        return cls._rest(fields, sampling, kind="text", prompt=prompt, max_tokens=longest)

    @classmethod
    def _rest(cls, fields: Fields, sampling: Sampling, **known: Any) -> "Ask":
        streams = bool(fields.take_as("stream", bool))
        options = fields.take_fields("stream_options")
        ask = cls(
            **known,
            sampling=_sampling(fields, sampling),
            stop=_stop(fields.take("stop")),
            streams=streams,
            streams_usage=bool(options.take_as("include_usage", bool)),
        )
        options.take_as("include_obfuscation", bool)  # padding, which a client may not rely on
        options.refuse_rest()
        if ask.max_tokens is not None and ask.max_tokens < 1:
            raise ApiError(
                f"max_tokens = {ask.max_tokens}, expected at least 1", param="max_tokens"
            )
        fields.refuse_unsupported()
        fields.refuse_rest()
        return ask


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ApiError("messages must be a list with at least one message", param="messages")
    return [_message(item, f"messages[{index}]") for index, item in enumerate(value)]


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise ApiError(f"{where} must be an object with a role", param=where)
    # What OpenAI's newer models call the developer, chat templates know as the system.
    role = "system" if value["role"] == "developer" else value["role"]
    return {**value, "role": role, "content": _content(value.get("content"), f"{where}.content")}


def _content(value: Any, where: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ApiError(f"{where} must be text or a list of parts", param=where)
    return "".join(_part(part, f"{where}[{index}]") for index, part in enumerate(value))


def _part(value: Any, where: str) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind != "text":
        raise ApiError(
            f"{where} is of type {kind!r}, this model reads text only",
            param=where,
            code="unsupported_content",
        )
    if not isinstance(value.get("text"), str):
        raise ApiError(f"{where}.text must be text", param=where)
    return str(value["text"])


def _prompt(value: Any) -> str | list[int]:
    if isinstance(value, list) and len(value) == 1 and not isinstance(value[0], int):
        value = value[0]  # a batch of one
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(type(item) is int for item in value):
        return value
    raise ApiError("prompt must be a string or a list of token ids", param="prompt")


def _stop(value: Any) -> tuple[str, ...]:
    strings = [] if value is None else [value] if isinstance(value, str) else value
    is_list = isinstance(strings, list) and len(strings) <= MAX_STOP_STRINGS
    if not is_list or not all(isinstance(item, str) and item for item in strings):
        raise ApiError(f"stop must be up to {MAX_STOP_STRINGS} non-empty strings", param="stop")
    return tuple(strings)


def _sampling(fields: Fields, sampling: Sampling) -> Sampling:
    for name, kind in _SAMPLING_FIELDS.items():
        value = fields.take_as(name, kind)
        if value is None:
            continue
        changes: dict[str, Any] = {name: value}
        try:
            sampling = replace(sampling, **changes)
        except UsageError as error:
            raise ApiError(f"{error}; {error.hint}", param=name) from error
    return sampling


@dataclass(frozen=True, kw_only=True)
class Wire:
    """How an answer is written: the JSON of one response, or of its chunks."""

    ask: Ask
    model: str
    fingerprint: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answer: Answer) -> dict[str, Any]:
        """Return the response that does not stream."""
        said: dict[str, Any] = {"text": answer.text}
        if self.ask.kind == "chat":
            said = {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
            if answer.reasoning:
                said["message"][REASONING] = answer.reasoning
        return self._envelope([_choice(said, _reason(answer))]) | {"usage": _usage(answer)}

    def head(self) -> list[dict[str, Any]]:
        """Return what a stream begins with."""
        is_chat = self.ask.kind == "chat"
        return [self._chunk({"role": "assistant", "content": ""}, None)] if is_chat else []

    def piece(self, part: Part) -> dict[str, Any]:
        """Return the chunk of some text."""
        return self._chunk({REASONING if part.is_thought else "content": part.text}, None)

    def tail(self, answer: Answer) -> list[dict[str, Any]]:
        """Return what a stream ends with."""
        end = self._chunk({} if self.ask.kind == "chat" else {"content": ""}, _reason(answer))
        if not self.ask.streams_usage:
            return [end]
        return [end, self._envelope([], is_chunk=True) | {"usage": _usage(answer)}]

    def _chunk(self, delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
        said = {"delta": delta} if self.ask.kind == "chat" else {"text": delta["content"]}
        chunk = self._envelope([_choice(said, reason)], is_chunk=True)
        return chunk | ({"usage": None} if self.ask.streams_usage else {})

    def _envelope(self, choices: list[dict[str, Any]], *, is_chunk: bool = False) -> dict[str, Any]:
        is_chat = self.ask.kind == "chat"
        kind = "chat.completion" + (".chunk" if is_chunk else "") if is_chat else "text_completion"
        return {
            "id": ("chatcmpl-" if is_chat else "cmpl-") + self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }


def _choice(said: dict[str, Any], reason: str | None) -> dict[str, Any]:
    return {"index": 0, **said, "logprobs": None, "finish_reason": reason}


def _reason(answer: Answer) -> str:
    return "stop" if answer.finish_reason == "stop" else "length"  # a full context is a length


def _usage(answer: Answer) -> dict[str, Any]:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.answer_tokens,
        "total_tokens": answer.prompt_tokens + answer.answer_tokens,
        "prompt_tokens_details": {"cached_tokens": answer.reused_tokens},
    }
