"""Which of a checkpoint's files count where an answer ends."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgekit.errors import UsageError


def by_file(
    config: Mapping[str, Any], generation_config: Mapping[str, Any], *, eos_id: int | None
) -> dict[str, tuple[int, ...]]:
    """Return the ids that end an answer, by the file that says so.

    Args:
        config: The fields of config.json.
        generation_config: The fields of generation_config.json, or none.
        eos_id: The token that tokenizer_config.json calls the end, where it has one.
    """
    return {
        "config.json": _ids(config.get("eos_token_id")),
        "generation_config.json": _ids(generation_config.get("eos_token_id")),
        "tokenizer_config.json": () if eos_id is None else (eos_id,),
    }


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


def _ids(value: Any) -> tuple[int, ...]:
    return tuple(_flatten(value))


def _flatten(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _flatten(item)
