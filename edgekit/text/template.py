"""Chat templates: Jinja source that came with a model, rendered in a sandbox with limits.

The environment is the one transformers 5 builds, so that the same source gives the same bytes. A
template is code by a stranger: besides Jinja's sandbox, every loop turn and every call looks at the
clock, and everything that can grow (``~``, ``+``, ``*``, literals, filters, padding) is measured.
"""

import functools
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Self

from edgekit.errors import UsageError
from edgekit.installed import missing_error


if TYPE_CHECKING:
    import jinja2


MAX_CHARACTERS = 1 << 20  # of a rendered conversation, and of any value on the way to it
MAX_SECONDS = 2.0  # a usual template takes a millisecond
_MAX_FILTER_CHARACTERS = 1 << 24  # what one filter may make before it is measured
_MAX_INTEGER_BITS = 4096
_MAX_JSON_INDENT = 16
# Fields under which older libraries pass what a model thought (transformers 5, _REASONING_FIELDS).
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_FILTERS_THAT_TAKE_ANY_NUMBER = ("do_default", "do_int", "do_float", "do_round", "_to_json")
# What a template can make Python raise, besides Jinja's own errors: None + "x", 1 / 0, …
_TEMPLATE_ERRORS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError)

_deadline: ContextVar[float] = ContextVar("deadline", default=math.inf)  # of time.monotonic()

Message = Mapping[str, Any]  # {"role": "user", "content": "…"}


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
    """A compiled chat template."""

    compiled: "jinja2.Template"
    variables: frozenset[str] = frozenset()  # what it reads and does not set itself

    @classmethod
    def compile(cls, source: str) -> Self:
        """Compile Jinja source.

        Raises:
            UsageError: If it is not Jinja, with the line.
            MissingDependencyError: If jinja2 is not installed.
        """
        environment = _environment()
        import jinja2
        from jinja2 import meta

        try:
            return cls(
                compiled=environment.from_string(source),
                variables=frozenset(meta.find_undeclared_variables(environment.parse(source))),
            )
        except jinja2.TemplateSyntaxError as error:
            raise UsageError(
                f"the chat template is not Jinja: {error.message} (line {error.lineno})"
            ) from error

    def render(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
        """Return the conversation as text.

        Args:
            messages: The conversation; a key whose value is None counts as absent.
            variables: What else the template may read: special tokens, ``add_generation_prompt``.

        Raises:
            UsageError: If the template refuses the conversation or fails.
            EndlessTemplateError: If it grows without end.
        """
        import jinja2

        token = _deadline.set(time.monotonic() + MAX_SECONDS)
        try:
            return _join(self.compiled.generate(messages=_plain(messages), **variables))
        except _refusal_type() as error:
            raise UsageError(f"the chat template refuses this conversation: {error}") from error
        except (jinja2.TemplateError, *_TEMPLATE_ERRORS) as error:
            raise UsageError(f"the chat template failed: {error}") from error
        except (RecursionError, MemoryError) as error:
            raise EndlessTemplateError("the chat template calls itself without end") from error
        finally:
            _deadline.reset(token)


def _join(pieces: "Sequence[str] | Any") -> str:
    parts: list[str] = []
    characters = 0
    for piece in pieces:
        _check_time()
        characters += len(piece)
        if characters > MAX_CHARACTERS:
            raise _too_large()
        parts.append(piece)
    return "".join(parts)


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


@functools.cache
def _refusal_type() -> type[Exception]:
    import jinja2

    class Refusal(jinja2.TemplateError):
        """What ``raise_exception(…)`` in a template raises."""

    return Refusal


@functools.cache
def _environment() -> "jinja2.Environment":
    """Build the environment that transformers 5 builds, with limits."""
    try:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ModuleNotFoundError:
        raise missing_error("jinja2", purpose="a chat template", extra="run-gguf") from None

    class LimitedEnvironment(ImmutableSandboxedEnvironment):
        """Jinja's sandbox, with a clock and a measure on everything that can grow."""

        intercepted_binops = frozenset({"+", "*", "**", "%"})
        bounded = staticmethod(_bounded)
        tick = staticmethod(_check_time)

        def _parse(self, source: str, name: str | None, filename: str | None) -> Any:
            return _limiter().visit(super()._parse(source, name, filename))

        def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
            _check_time()
            args = _checked_call(obj, args, kwargs)
            return _bounded(super().call(context, obj, *args, **kwargs))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_operands(operator, left, right)
            return _bounded(super().call_binop(context, operator, left, right))

    environment = LimitedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_generation_tag(), "jinja2.ext.loopcontrols"],
    )
    environment.filters |= {"tojson": _to_json}
    environment.filters = {name: _limited(f) for name, f in environment.filters.items()}
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "namespace": _namespace_type(),
    }
    del environment.globals["lipsum"]  # random text: no conversation needs it
    return environment


def _raise_exception(message: object) -> None:
    raise _refusal_type()(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)  # noqa: DTZ005 - the device's own day, as transformers


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON without Jinja's escapes for HTML."""
    if _size(indent) > _MAX_JSON_INDENT or (isinstance(indent, int) and indent > _MAX_JSON_INDENT):
        raise _too_large()
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    return _join(encoder.iterencode(value))


@functools.cache
def _namespace_type() -> type:
    import jinja2
    from jinja2.utils import Namespace

    class PublicNamespace(Namespace):
        """A namespace without names that start with an underscore."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, *rest = args
            for name in (attributes := dict(*rest, **kwargs)):
                _check_name(name)
            Namespace.__init__(self, attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_name(name)
            super().__setitem__(name, value)

    def _check_name(name: str) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")

    return PublicNamespace


@functools.cache
def _generation_tag() -> Any:
    """Return the extension for ``{% generation %}``, which marks an answer when one trains."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class GenerationTag(Extension):
        """Renders its body, in a scope of its own."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's declaration

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_body")
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _body(self, caller: Callable[[], str]) -> str:
            return caller()

    return GenerationTag


@functools.cache
def _limiter() -> Any:
    """Return the pass that puts the clock into loops and the measure around what grows."""
    from jinja2 import nodes
    from jinja2.visitor import NodeTransformer

    def call(function: str, *arguments: nodes.Expr) -> nodes.Call:
        callee = nodes.EnvironmentAttribute(function)
        return nodes.Call(callee, list(arguments), [], None, None)

    class Limiter(NodeTransformer):
        """Rewrites loops, ``~`` and literals."""

        def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - jinja2 calls it
            self.generic_visit(node)
            node.body.insert(0, nodes.ExprStmt(call("tick")).set_lineno(node.lineno))
            return node

        def measured(self, node: nodes.Expr) -> nodes.Node:
            self.generic_visit(node)
            is_target = getattr(node, "ctx", "load") != "load"  # `for a, b in …`
            return node if is_target else call("bounded", node).set_lineno(node.lineno)

        visit_Concat = visit_List = visit_Tuple = visit_Dict = measured  # noqa: N815

    return Limiter()


def _check_time() -> None:
    if time.monotonic() > _deadline.get():
        raise EndlessTemplateError(f"the chat template takes more than {MAX_SECONDS:g} s")


def _bounded(value: Any) -> Any:
    """Return ``value`` if it is not too large."""
    if _size(value) > MAX_CHARACTERS:
        raise _too_large()
    return value


def _too_large() -> EndlessTemplateError:
    return EndlessTemplateError(f"the chat template makes more than {MAX_CHARACTERS} characters")


def _size(value: Any) -> int:
    """Count characters and items, shared ones as often as they would be written; stop early."""
    size, waiting = 0, [value]
    while waiting and size <= MAX_CHARACTERS:
        item = waiting.pop()
        if isinstance(item, str | bytes | list | tuple | dict):
            size += len(item)
        if isinstance(item, dict):
            waiting.extend(item.values())
        elif isinstance(item, list | tuple):
            waiting.extend(item)
    return size


def _check_operands(operator: str, left: Any, right: Any) -> None:
    if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
        factor = abs(right) if operator == "**" else 1
        if left.bit_length() * factor + right.bit_length() > _MAX_INTEGER_BITS:
            raise _too_large()
    elif operator == "*":
        times = [side for side in (left, right) if isinstance(side, int)]
        things = [side for side in (left, right) if isinstance(side, str | list | tuple)]
        if times and things and times[0] * len(things[0]) > MAX_CHARACTERS:
            raise _too_large()
    elif operator == "%" and isinstance(left, str):
        _check_pattern(left, (right,))


def _check_pattern(pattern: str, arguments: Sequence[Any]) -> None:
    """Refuse a width of 10 000 or more, in the pattern itself or passed to it."""
    is_indirect = "*" in pattern or re.search(r"\{[^{}]*\{", pattern)
    if re.search(r"[0-9]{5}", pattern) or (is_indirect and _has_large_integer(arguments)):
        raise _too_large()


def _has_large_integer(arguments: Sequence[Any]) -> bool:
    flat = [item for a in arguments for item in (a if isinstance(a, list | tuple) else (a,))]
    return any(isinstance(item, int) and item > MAX_CHARACTERS // 100 for item in flat)


def _checked_call(
    function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Return the arguments of a call, unless it is a method of a string that makes too much."""
    method = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
    text = getattr(method, "__self__", None)
    if not isinstance(text, str):
        return args
    match method.__name__:
        case "translate":
            raise UsageError("the chat template calls translate(), which edgekit does not offer")
        case "format" | "format_map":
            _check_pattern(text, (*args, *kwargs.values()))
        case "replace":
            _check_replacement(text, args)
        case "join" if args:
            parts = list(args[0])  # it may be a generator
            if _size(parts) + len(parts) * len(text) > _MAX_FILTER_CHARACTERS:
                raise _too_large()
            return (parts,)
        case "center" | "ljust" | "rjust" | "zfill" | "expandtabs":
            _check_product((text, *args, *kwargs.values()))
        case _:
            pass  # makes no more than it is given
    return args


def _check_replacement(text: str, arguments: Sequence[Any]) -> None:
    old, new = (*arguments, "", "")[:2]
    if isinstance(old, str) and isinstance(new, str):
        made = len(text) + text.count(old) * len(new)
        if made > _MAX_FILTER_CHARACTERS:
            raise _too_large()


def _limited(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a filter so that what it makes is measured."""
    name = function.__name__

    @functools.wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        _check_time()
        given = (*args, *kwargs.values())
        if name == "do_format":
            _check_pattern(str(args[0]), given[1:])
        elif name == "do_replace":  # after the evaluation context
            _check_replacement(str(args[1]), given[2:])
        elif name not in _FILTERS_THAT_TAKE_ANY_NUMBER:
            # What is piped in may be any number, too: `1700000000 | string`.
            _check_product(given[1:] if isinstance(args[0], int) else given)
        return _bounded(function(*args, **kwargs))

    return limited


def _check_product(arguments: Sequence[Any]) -> None:
    """Refuse arguments whose sizes, multiplied, are more than a filter or a method may make."""
    product = 1
    for argument in arguments:
        if isinstance(argument, int):
            product *= max(1, argument)
        elif isinstance(argument, str | list | tuple):
            product *= max(1, len(argument))
    if product > _MAX_FILTER_CHARACTERS:
        raise _too_large()
