"""Which of a checkpoint's files count where an answer ends."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edgekit.errors import UsageError


CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
_SPACES = "▁ĠĊĉč"  # a space; and in byte-level BPE a space, \\n, \\t and \\r


class Tokens(Protocol):
    """What is asked about a tokenizer."""

    def token(self, id: int) -> str | None:
        """Return the token of an id, None if there is none."""
        ...

    def is_special(self, id: int) -> bool:
        """Tell whether it is an added token, or has a name such as ``eos_token``."""
        ...


@dataclass(frozen=True, kw_only=True)
class Stops:
    """The ids that end an answer, and what was decided between the files."""

    by_file: dict[str, tuple[int, ...]]  # those that count, by the file that says so
    notes: tuple[str, ...] = ()


def settle(
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any],
    *,
    eos_id: int | None,
    tokens: Tokens,
    directory: Path,
) -> Stops:
    """Return the ids that end an answer.

    generation_config.json overrules config.json, as in transformers; the tokenizer's end joins
    them, since it rescues fine-tunes whose configs were left behind. Where config.json is such a
    one, its id can be any word: text does not end an answer.

    Args:
        config: The fields of config.json.
        generation_config: The fields of generation_config.json, or none.
        eos_id: The token that tokenizer_config.json calls the end, where it has one.
        tokens: The tokenizer's.
        directory: For messages.

    Raises:
        UsageError: If an id is not a whole number.
    """
    said = _ids(config.get("eos_token_id"), directory / CONFIG)
    generation = _ids(generation_config.get("eos_token_id"), directory / GENERATION_CONFIG)
    inherited = [id for id in generation if id in said]
    words = {
        id: token
        for id in (inherited if generation else said)
        if not tokens.is_special(id) and (token := tokens.token(id)) and is_text(token)
    }
    notes = [
        f"{CONFIG} ends answers at the token {id}, which is the text {token!r}: it ends none"
        for id, token in words.items()
    ]
    if generation and (overruled := sorted(set(said) - {*generation, *words})):
        notes.append(
            f"{CONFIG} ends answers at {overruled}, {GENERATION_CONFIG} at {sorted(generation)}: "
            "the latter counts, as in transformers"
        )
    return Stops(
        by_file={
            CONFIG: () if generation else tuple(id for id in said if id not in words),
            GENERATION_CONFIG: tuple(id for id in generation if id not in words),
            "tokenizer_config.json": () if eos_id is None else (eos_id,),
        },
        notes=tuple(notes),
    )


def is_text(token: str) -> bool:
    """Tell whether a token is a piece of text: it has a letter or a digit and no brackets.

    Those of SentencePiece and byte-level BPE that stand for spaces are not letters here.
    """
    if re.fullmatch(r"<.*>|\[.*\]", token, re.DOTALL):
        return False
    return any(letter.isalnum() for letter in token if letter not in _SPACES)


def within(ids_by_file: Mapping[str, tuple[int, ...]], rows: int) -> Stops:
    """Leave out the ids for which a model of so many rows has none: it never says them."""
    beyond = {file: [id for id in ids if not 0 <= id < rows] for file, ids in ids_by_file.items()}
    return Stops(
        by_file={
            file: tuple(id for id in ids if id not in beyond[file])
            for file, ids in ids_by_file.items()
        },
        notes=tuple(
            f"{file} ends answers at {ids}: left out, as the model has {rows} rows and never says "
            "them"
            for file, ids in beyond.items()
            if ids
        ),
    )


def together(ids_by_file: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Return all of them, sorted, each once."""
    return tuple(sorted({id for ids in ids_by_file.values() for id in ids}))


def strings(generation_config: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    """Return the texts that end an answer, each once.

    Args:
        generation_config: The fields of generation_config.json, or none.
        path: The file, for messages.

    Raises:
        UsageError: If ``stop_strings`` is neither text nor a list of texts.
    """
    declared = generation_config.get("stop_strings")
    texts = [] if declared is None else [declared] if isinstance(declared, str) else declared
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UsageError(
            f"{path}: stop_strings = {declared!r}, expected text or a list of texts",
            hint="remove the field, or repair it",
        )
    return tuple(dict.fromkeys(filter(None, texts)))


def _ids(value: Any, path: Path) -> tuple[int, ...]:
    return tuple(_flatten(value, path))


def _flatten(value: Any, path: Path) -> Iterator[int]:
    if isinstance(value, list):
        for item in value:
            yield from _flatten(item, path)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value
    elif value is not None:
        raise UsageError(
            f"{path}: eos_token_id = {value!r}, expected a token id or a list of them",
            hint="remove the field, or repair it",
        )
