"""JSON files: an object each, refused where two readers could see two different things.

RFC 8259 leaves open which of two equal keys counts; programs differ in that, so what edgekit proved
and what a runtime reads could be two models. Therefore a repeated key is refused in every file.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from edgekit.encodings.files import is_file, require_file
from edgekit.encodings.limits import (
    INTEGER_DIGITS,
    SETTINGS_BYTES,
    SETTINGS_PARTS,
    TOKENIZER_BYTES,
    VOCABULARY_PARTS,
    check_size,
)
from edgekit.errors import BundleError, UsageError


_VOCABULARIES = ("tokenizer.json", "vocab.json", "runner_tokenizer.json")
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")  # or a whole one

Refusal = type[UsageError] | type[BundleError]  # of what a user brings, of what a bundle holds


def parse(text: str | bytes, *, most_parts: int = SETTINGS_PARTS) -> Any:
    """Return the value that JSON text stands for.

    Args:
        text: In UTF-8, if bytes.
        most_parts: How many lists, objects and fields it may have.

    Raises:
        ValueError: If it is not JSON in UTF-8, has a key twice in one object, is nested too deeply,
            has more parts or longer integers than anything known, or half a surrogate pair.
    """
    if isinstance(text, bytes):
        text = text.decode()  # json would guess at other encodings
    if sum(map(text.count, "[{:")) > most_parts:
        raise ValueError(f"it has more than {most_parts} lists, objects and fields")
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_int=_integer)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if _HALF_PAIR.search(text):
        _refuse_half_pairs(value)
    return value


def _integer(digits: str) -> int:
    if len(digits) > INTEGER_DIGITS:
        raise ValueError(f"an integer has {len(digits)} digits, more than {INTEGER_DIGITS}")
    return int(digits)


def _refuse_half_pairs(value: Any) -> None:
    """Refuse text that no file in UTF-8 can hold and no tokenizer reads."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half a surrogate pair, which is not Unicode") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return fields


def parse_object(
    text: str | bytes,
    *,
    origin: str | Path,
    refusal: Refusal = UsageError,
    hint: str = "",
    most_parts: int = SETTINGS_PARTS,
) -> dict[str, Any]:
    """Return the object that JSON text stands for.

    Args:
        text: In UTF-8, if bytes.
        origin: Where it came from, for messages.
        refusal: What is raised; a damaged bundle is not the fault of what a user brought.
        hint: The way out.
        most_parts: How many lists, objects and fields it may have.

    Raises:
        UsageError, BundleError: As ``refusal``, if it is not JSON, has a key twice, or is not an
            object.
    """
    try:
        fields = parse(text, most_parts=most_parts)
    except ValueError as error:
        raise refusal(f"{origin} is not JSON: {error}", hint=hint) from error
    if not isinstance(fields, dict):
        raise refusal(f"{origin} holds a {type(fields).__name__}, expected an object", hint=hint)
    return fields


def read_object(path: Path, *, refusal: Refusal = UsageError, hint: str = "") -> dict[str, Any]:
    """Return the object in a JSON file; arguments and errors are those of `parse_object`.

    Raises:
        UsageError, BundleError: As ``refusal``, also if the file is missing, cannot be read or is
            larger than any of its kind.
    """
    require_file(path, refusal=refusal, hint=hint)
    is_vocabulary = path.name in _VOCABULARIES
    most_bytes = TOKENIZER_BYTES if is_vocabulary else SETTINGS_BYTES
    check_size(path, most_bytes, refusal=refusal, hint=hint)
    try:
        text = path.read_bytes()
    except OSError as error:
        raise refusal(f"{path} cannot be read: {error.strerror}", hint=hint) from error
    most_parts = VOCABULARY_PARTS if is_vocabulary else SETTINGS_PARTS
    return parse_object(text, origin=path, refusal=refusal, hint=hint, most_parts=most_parts)


def read_object_if_there(path: Path, *, refusal: Refusal = UsageError) -> dict[str, Any]:
    """Return the object in a JSON file, an empty one if there is no such file.

    Raises:
        UsageError, BundleError: As `read_object`.
    """
    return read_object(path, refusal=refusal) if is_file(path, refusal=refusal) else {}
