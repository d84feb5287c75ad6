"""tokenizer.json as edgekit itself reads it, next to the library that runs it.

The library checks a file when it opens one. What edgekit looks up comes before and after that, so
the parts that it looks at are checked once, here.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgekit.encodings.json_files import Refusal, read_object
from edgekit.errors import UsageError


HINT = "save it again with AutoTokenizer and save_pretrained()"
_PARTS = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "post_processor": "processors",
    "decoder": "decoders",
}
# Of a step, wherever it stands; "pattern" is {"String": …} or {"Regex": …}.
_FIELDS: Mapping[str, tuple[type, str]] = {
    "type": (str, "text"),
    "content": (str, "text"),
    "prepend": (str, "text"),
    "replacement": (str, "text"),
    "prepend_scheme": (str, "text"),
    "pattern": (dict, "an object"),
    "start": (int, "an integer"),
    "stop": (int, "an integer"),
}
_NEEDED = {
    "Replace": ("pattern", "content"),
    "Strip": ("content", "start", "stop"),
    "Metaspace": ("replacement",),
    "Prepend": ("prepend",),
}
_MOST_SHOWN = 60  # characters of what was found


def read(path: Path, *, refusal: Refusal = UsageError) -> dict[str, Any]:
    """Return the object in a tokenizer.json, whose parts have the types that readers rely on.

    Raises:
        UsageError, BundleError: As ``refusal``, if it is missing, not JSON or malformed; the
            message names the part, what was found and what was expected.
    """
    fields = read_object(path, refusal=refusal, hint=HINT)
    for place, found, expected in _mismatches(fields):
        shown = ascii(found)[:_MOST_SHOWN]
        raise refusal(f"{path}: {place} is {shown}, expected {expected}", hint=HINT)
    return fields


def _mismatches(fields: Mapping[str, Any]) -> Iterator[tuple[str, object, str]]:
    """Yield where something is of another type, what it is, and what it must be."""
    yield from _of_added(fields.get("added_tokens", []))
    yield from _of_model(fields.get("model"))
    for part, inner in _PARTS.items():
        yield from _of_step(fields.get(part), part, inner)


def _of_added(tokens: object) -> Iterator[tuple[str, object, str]]:
    if not isinstance(tokens, list):
        yield "added_tokens", tokens, "a list"
        return
    for number, token in enumerate(tokens):
        is_token = (
            isinstance(token, dict)
            and isinstance(token.get("content"), str)
            and _is_id(token.get("id"))
            and isinstance(token.get("rstrip", False), bool)
        )
        if not is_token:
            yield f"added_tokens[{number}]", token, "a token with content and id"


def _of_model(model: object) -> Iterator[tuple[str, object, str]]:
    if model is not None and not isinstance(model, dict):
        yield "model", model, "an object"
        return
    vocabulary = model.get("vocab", {}) if model else {}
    if isinstance(vocabulary, dict):
        for token, id in vocabulary.items():
            if not _is_id(id):
                yield f"model.vocab.{token[:_MOST_SHOWN]}", id, "a token id"
    elif isinstance(vocabulary, list):
        for number, piece in enumerate(vocabulary):  # Unigram's, each with its score
            if not (isinstance(piece, list) and len(piece) == 2 and isinstance(piece[0], str)):
                yield f"model.vocab[{number}]", piece, "a piece and its score"
    else:
        yield "model.vocab", vocabulary, "an object of token ids, or a list of pieces"


def _of_step(step: object, part: str, inner: str) -> Iterator[tuple[str, object, str]]:
    if step is None:
        return
    if not isinstance(step, dict):
        yield part, step, "an object"
        return
    yield from _of_fields(step, part)
    if step.get("type") != "Sequence":
        return
    if not isinstance(step.get(inner), list) or None in step[inner]:
        yield f"{part}.{inner}", step.get(inner), "a list of steps"
        return
    for each in step[inner]:
        yield from _of_step(each, part, inner)


def _of_fields(step: Mapping[str, Any], part: str) -> Iterator[tuple[str, object, str]]:
    for name, (expected, words) in _FIELDS.items():
        value = step.get(name)
        if name in step and (not isinstance(value, expected) or isinstance(value, bool)):
            yield f"{part}.{name}", value, words
    kind = step.get("type")
    needed = _NEEDED.get(kind, ()) if isinstance(kind, str) else ()
    if part == "normalizer" and kind == "Strip":
        needed = ()  # it has other fields there
    for name in ("type", *needed) if part == "decoder" else needed:
        if name not in step:
            yield part, step, f"a step with {name}"


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 32
