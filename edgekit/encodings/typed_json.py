"""Parsed JSON as frozen dataclasses: every field is there, known, and of the type it is declared.

The declaration is the schema: text, integers, numbers, booleans, literals, ``X | None``, tuples of
one type, and mappings from text. A number is finite and fits 64 bits, text is Unicode.
"""

import dataclasses
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from edgekit.encodings.json_files import Refusal
from edgekit.errors import UsageError


T = TypeVar("T")
_MAX_SHOWN = 60  # characters of what was found
_NAMES = {float: "a number", int: "an integer", str: "text", bool: "true or false"}


def _is_fraction(_: str, hint: object) -> bool:
    """Whether a field may be negative: no count, size or id may, and only those are integers."""
    return hint is float


def check_version(
    found: object, readable: int, *, origin: str | Path, refusal: Refusal = UsageError
) -> None:
    """Check the version of a document's schema.

    Raises:
        UsageError, BundleError: As ``refusal``, if it is another one.
    """
    if type(found) is not int or found != readable:
        raise refusal(
            f"{origin} has schema {ascii(found)[:_MAX_SHOWN]}, this edgekit reads {readable}",
            hint="make it again, or install the edgekit that made it",
        )


@dataclass(frozen=True, kw_only=True)
class FieldReader:
    """Reads the dataclasses of one document."""

    origin: str | Path  # the file, or another name of the document, for messages
    refusal: Refusal = UsageError
    hint: str = ""
    is_signed: Callable[[str, object], bool] = _is_fraction  # whether a number may be below 0

    def read(self, cls: type[T], value: object, **given: object) -> T:
        """Build a dataclass from parsed JSON.

        Args:
            cls: The dataclass.
            value: What `edgekit.encodings.json_files.parse` returned.
            **given: Fields that are not in the document.

        Raises:
            UsageError, BundleError: As ``refusal``, if a field is missing, unknown or of the wrong
                type; the message says where, what was found and what was expected.
        """
        return self._object(cls, value, "", given)

    def _object(
        self, cls: type[T], value: object, path: str, given: Mapping[str, object] | None = None
    ) -> T:
        given = given or {}
        if not isinstance(value, dict):
            raise self._mismatch(path, value, "an object")
        hints = {name: hint for name, hint in get_type_hints(cls).items() if name not in given}
        self._refuse_unknown(path, value, hints)
        required = {
            field.name
            for field in dataclasses.fields(cls)  # type: ignore[arg-type]  # T is a dataclass
            if field.default is field.default_factory is dataclasses.MISSING
        }
        if missing := sorted(required - value.keys() - given.keys()):
            raise self._refused(path, f"has no field {missing[0]!r}")
        fields = {
            name: self._value(hints[name], item, f"{path}.{name}".lstrip("."))
            for name, item in value.items()
        }
        return cls(**fields, **given)

    def _value(self, hint: Any, value: object, path: str) -> Any:
        origin = get_origin(hint)
        if dataclasses.is_dataclass(hint):
            return self._object(hint, value, path)  # type: ignore[arg-type]  # hint is a class
        if origin in {types.UnionType, Union}:
            return None if value is None else self._value(get_args(hint)[0], value, path)
        if origin is tuple:
            return self._tuple(get_args(hint)[0], value, path)
        if origin in {dict, Mapping}:
            return self._mapping(*get_args(hint), value=value, path=path)
        return self._scalar(hint, value, path)

    def _tuple(self, item: Any, value: object, path: str) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise self._mismatch(path, value, "a list")
        return tuple(
            self._value(item, entry, f"{path}[{index}]") for index, entry in enumerate(value)
        )

    def _mapping(self, key: Any, item: Any, *, value: object, path: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self._mismatch(path, value, "an object")
        if known := get_args(key):  # of a Literal; nothing for plain text
            self._refuse_unknown(path, value, known)
        return {
            self._scalar(str, name, path): self._value(item, entry, f"{path}.{name}")
            for name, entry in value.items()
        }

    def _scalar(self, hint: Any, value: object, path: str) -> Any:
        choices = get_args(hint)  # of a Literal
        if hint is Any or (choices and value in choices):
            return value
        if choices:
            raise self._mismatch(path, value, " or ".join(map(repr, choices)))
        kinds = (int, float) if hint is float else hint
        if not isinstance(value, kinds) or (isinstance(value, bool) and hint is not bool):
            raise self._mismatch(path, value, _NAMES[hint])
        if isinstance(value, str) and not _is_unicode(value):
            raise self._mismatch(path, value, "Unicode text")
        if isinstance(value, int | float) and hint is not bool:
            self._check_number(hint, value, path)
        return hint(value)

    def _check_number(self, hint: object, value: float, path: str) -> None:
        is_signed = self.is_signed(path, hint)
        fits = abs(value) < 1 << 63 if isinstance(value, int) else math.isfinite(value)
        if not fits or (value < 0 and not is_signed):
            kind = "a finite number" if hint is float else "a 63-bit integer"
            raise self._mismatch(path, value, kind + ("" if is_signed else " of at least 0"))

    def _refuse_unknown(self, path: str, value: Mapping[str, object], known: Any) -> None:
        if unknown := sorted(value.keys() - {*known}):
            raise self._refused(path, f"has an unknown field {unknown[0][:_MAX_SHOWN]!r}")

    def _mismatch(self, path: str, value: object, expected: str) -> Exception:
        return self._refused(path, f"= {ascii(value)[:_MAX_SHOWN]}, expected {expected}")

    def _refused(self, path: str, found: str) -> Exception:
        where = f"{self.origin}: {path}" if path else str(self.origin)
        return self.refusal(f"{where} {found}", hint=self.hint)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
