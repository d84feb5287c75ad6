"""Jinja as transformers 5 builds it, in a sandbox: what the child that renders templates runs.

The limits of that process hold whatever a template does (`edgekit.text.guarded`). Those here refuse
most of it earlier and say what it was: at every loop turn and every call a clock, and a measure on
everything that can grow (``~``, ``+``, ``*``, literals, filters, padding).
"""

import functools
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import date, datetime
from typing import TYPE_CHECKING, Any

from edgekit.encodings.limits import TEMPLATE_CHARACTERS


if TYPE_CHECKING:
    from collections.abc import Iterator

    import jinja2


_MAX_FILTER_CHARACTERS = 1 << 24  # what one filter may make before it is measured
_MAX_INTEGER_BITS = 4096
_MAX_JSON_INDENT = 16
_MAX_PRECISION = 100  # of `round`
_MAX_SAID_CHARACTERS = 300  # of an error, in a refusal
_FILTERS_THAT_TAKE_ANY_NUMBER = ("do_default", "do_int", "do_float", "do_round", "_to_json")
# What a template can make Python raise, besides Jinja's own errors: None + "x", 1 / 0, loops that
# are nested too deeply for Python's own compiler, …
_TEMPLATE_ERRORS = (
    TypeError, ValueError, ArithmeticError, LookupError, AttributeError, SyntaxError, RuntimeError,
    AssertionError,
)  # fmt: skip


class EndlessError(Exception):
    """A template takes more time or makes more text than any conversation needs."""


class RefusedError(Exception):
    """A template is not Jinja, fails, or refuses the conversation."""


@dataclass(frozen=True, kw_only=True)
class _Limits:
    seconds: float = math.inf
    characters: int = TEMPLATE_CHARACTERS
    deadline: float = math.inf  # of time.monotonic()


_limits: ContextVar[_Limits] = ContextVar("limits", default=_Limits())  # noqa: B039 - it is frozen


def prepare() -> None:
    """Import what rendering takes, before the first template comes.

    Raises:
        ImportError: If jinja2 is not installed.
    """
    _environment()


def answer(question: Mapping[str, Any]) -> dict[str, Any]:
    """Do what `edgekit.text.template` asks: compile a template, and render a conversation with it.

    Args:
        question: ``source``; the limits ``seconds`` and ``characters``; and to render ``messages``,
            ``variables``, and ``day`` (ISO) or ``clock`` (a text) for ``strftime_now``.

    Returns:
        ``variables`` that it reads, or the ``text``; or why not: what is ``endless``, or else a
        ``refusal``.
    """
    try:
        with _within(question["seconds"], question["characters"]):
            compiled = _compiled(question["source"])
            if "messages" not in question:
                return {"variables": sorted(_variables(question["source"]))}
            return {"text": _rendered(compiled, question)}
    except EndlessError as error:
        return {"endless": str(error)}
    except RefusedError as error:
        return {"refusal": str(error)}
    except RecursionError:
        return {"endless": "is nested too deeply, or calls itself without end"}


@contextmanager
def _within(seconds: float, characters: int) -> "Iterator[None]":
    limits = _Limits(seconds=seconds, characters=characters, deadline=time.monotonic() + seconds)
    token = _limits.set(limits)
    try:
        yield
    finally:
        _limits.reset(token)


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> "jinja2.Template":
    import jinja2

    try:
        return _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise RefusedError(f"is not Jinja: {_said(error.message)} (line {error.lineno})") from error
    except RecursionError:
        raise
    except (jinja2.TemplateError, *_TEMPLATE_ERRORS) as error:
        raise RefusedError(f"is not Jinja that Python can run: {_said(error)}") from error


def _variables(source: str) -> set[str]:
    """Return what a template reads and does not set itself."""
    from jinja2 import meta

    return meta.find_undeclared_variables(_environment().parse(source))


def _rendered(template: "jinja2.Template", question: Mapping[str, Any]) -> str:
    import jinja2

    variables = {**question["variables"], **_clock(question)}
    try:
        return _join(template.generate(messages=question["messages"], **variables))
    except _refusal_type() as error:
        raise RefusedError(f"refuses this conversation: {_said(error)}") from error
    except RecursionError:
        raise
    except (jinja2.TemplateError, *_TEMPLATE_ERRORS) as error:
        raise RefusedError(f"failed: {_said(error)}") from error


def _clock(question: Mapping[str, Any]) -> dict[str, Any]:
    """Return the template's clock, if it is not the machine's."""
    if (day := question.get("day")) is not None:
        return {"strftime_now": date.fromisoformat(day).strftime}
    if (said := question.get("clock")) is not None:
        return {"strftime_now": lambda _pattern: said}
    return {}


def _said(error: object) -> str:
    said = str(error)
    return f"{said[:_MAX_SAID_CHARACTERS]}…" if len(said) > _MAX_SAID_CHARACTERS else said


def _join(pieces: "Sequence[str] | Any") -> str:
    parts: list[str] = []
    characters = 0
    for piece in pieces:
        _check_time()
        characters += len(piece)
        if characters > _limits.get().characters:
            raise _too_large()
        parts.append(piece)
    return "".join(parts)


@functools.cache
def _refusal_type() -> type[Exception]:
    import jinja2

    class Refusal(jinja2.TemplateError):
        """What ``raise_exception(…)`` in a template raises."""

    return Refusal


@functools.cache
def _environment() -> "jinja2.Environment":
    """Build the environment that transformers 5 builds, with limits."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

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
    limits = _limits.get()
    if time.monotonic() > limits.deadline:
        raise EndlessError(f"takes more than {limits.seconds:g} s")


def _bounded(value: Any) -> Any:
    """Return ``value`` if it is not too large."""
    if _size(value) > _limits.get().characters:
        raise _too_large()
    return value


def _too_large() -> EndlessError:
    return EndlessError(f"makes more than {_limits.get().characters} characters")


def _size(value: Any) -> int:
    """Count characters and items, shared ones as often as they would be written; stop early."""
    size, waiting, most = 0, [value], _limits.get().characters
    while waiting and size <= most:
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
        things = [side for side in (left, right) if isinstance(side, str | bytes | list | tuple)]
        if times and things and times[0] * len(things[0]) > _limits.get().characters:
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
    return any(isinstance(item, int) and item > _limits.get().characters // 100 for item in flat)


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
            raise RefusedError("calls translate(), which edgekit does not offer")
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
        elif name == "do_round" and _has_more(given[1:2], _MAX_PRECISION):
            raise _too_large()
        elif name not in _FILTERS_THAT_TAKE_ANY_NUMBER:
            # What is piped in may be any number, too: `1700000000 | string`.
            _check_product(given[1:] if isinstance(args[0], int) else given)
        return _bounded(function(*args, **kwargs))

    return limited


def _has_more(numbers: Sequence[Any], most: int) -> bool:
    return any(isinstance(number, int) and abs(number) > most for number in numbers)


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
