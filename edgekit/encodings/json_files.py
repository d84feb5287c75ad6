"""JSON files: an object each, refused where two readers could see two different things.

RFC 8259 leaves open which of two equal keys counts; programs differ in that, so what edgekit proved
and what a runtime reads could be two models. Therefore a repeated key is refused in every file.
"""

import json
import re
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

from edgekit.encodings.files import is_file, readable, require_file
from edgekit.encodings.limits import (
    NESTING,
    SETTINGS_BYTES,
    SETTINGS_MEMORY_BYTES,
    TOKENIZER_BYTES,
    VOCABULARY_MEMORY_BYTES,
    check_size,
)
from edgekit.errors import BundleError, UsageError


_VOCABULARIES = ("tokenizer.json", "vocab.json", "runner_tokenizer.json")
_COSTS = {"{": 240, "[": 80, ":": 190, ",": 60}  # bytes: what each opens, or comes before or after
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")  # or a whole one

Refusal = type[UsageError] | type[BundleError]  # of what a user brings, of what a bundle holds


def parse(text: str | bytes, *, memory_bytes: int = SETTINGS_MEMORY_BYTES) -> Any:
    """Return the value that JSON text stands for.

    Args:
        text: In UTF-8, if bytes.
        memory_bytes: What its value may take.

    Raises:
        ValueError: If it is not JSON in UTF-8, has a key twice in one object, is nested in more
            than `NESTING` levels, would take more memory, or has an integer of more than 4,300
            digits or half a surrogate pair.
    """
    if isinstance(text, bytes):
        text = text.decode()  # json would guess at other encodings
    if _memory_bytes(text) > memory_bytes:
        raise ValueError(f"it takes more than {memory_bytes >> 20} MiB of memory")
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    opened = text.count("[") + text.count("{")
    # How much Python itself reads depends on its version.
    if opened > NESTING and _is_deeper(value, NESTING):
        raise ValueError(f"it is nested too deeply, in more than {NESTING} levels")
    if _HALF_PAIR.search(text):
        _refuse_half_pairs(value)
    return value


def _memory_bytes(text: str) -> int:
    """Return about what the text and its value take in Python, rather too much than too little."""
    letter_bytes = 1 if text.isascii() else 4
    return letter_bytes * len(text) + sum(cost * text.count(at) for at, cost in _COSTS.items())


def _is_deeper(value: Any, levels: int) -> bool:
    """Tell whether something is within more lists and objects than that, without recursion."""
    level: list[Any] = [[value]]
    for _ in range(levels + 1):
        items = chain.from_iterable(it.values() if type(it) is dict else it for it in level)
        level = [item for item in items if type(item) in {dict, list}]
    return bool(level)


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
    memory_bytes: int = SETTINGS_MEMORY_BYTES,
) -> dict[str, Any]:
    """Return the object that JSON text stands for.

    Args:
        text: In UTF-8, if bytes.
        origin: Where it came from, for messages.
        refusal: What is raised; a damaged bundle is not the fault of what a user brought.
        hint: The way out.
        memory_bytes: What its value may take.

    Raises:
        UsageError, BundleError: As ``refusal``, if it is not JSON, has a key twice, or is not an
            object.
    """
    try:
        fields = parse(text, memory_bytes=memory_bytes)
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
    with readable(path, refusal=refusal, hint=hint):
        text = path.read_bytes()
    memory_bytes = VOCABULARY_MEMORY_BYTES if is_vocabulary else SETTINGS_MEMORY_BYTES
    return parse_object(text, origin=path, refusal=refusal, hint=hint, memory_bytes=memory_bytes)


def read_object_if_there(path: Path, *, refusal: Refusal = UsageError) -> dict[str, Any]:
    """Return the object in a JSON file, an empty one if there is no such file.

    Raises:
        UsageError, BundleError: As `read_object`.
    """
    return read_object(path, refusal=refusal) if is_file(path, refusal=refusal) else {}
