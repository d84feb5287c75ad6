"""What a model directory says about itself next to its weights: licence, descent, usual sampling.

A model card begins with a few lines of YAML. Only names and lists of names are read from it, by a
reader of its own: a model card is a stranger's file, and a Raspberry Pi has no YAML package.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgekit.encodings.files import is_file
from edgekit.encodings.json_files import read_object, read_object_if_there
from edgekit.errors import UsageError


_MAX_CHARACTERS = 65_536  # of a card that are read; front matter is seldom a hundredth of it
_KEY = re.compile(r"(?P<key>[A-Za-z_][\w-]*):(?:\s+(?P<value>.*))?")
_ITEM = re.compile(r"\s*-\s+(?P<value>.*)")
_UNREAD = re.compile(r"[&*!|>{%@`]|\w+:\s")  # what begins anchors, blocks and mappings
_HUB = re.compile(r"(?P<organization>[\w.-]*\w[\w.-]*)/(?P<name>[\w.-]*\w[\w.-]*)", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What the front matter of a README.md states; empty where it says nothing."""

    licence: str | None = None
    licence_name: str | None = None  # where the licence is "other"
    licence_link: str | None = None
    base_models: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """How the makers of a model sample from it; None where they do not say."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


def read(directory: Path) -> ModelCard:
    """Return what the model card of a directory says; no card says nothing.

    Raises:
        UsageError: If README.md is not a regular file.
    """
    path = directory / "README.md"
    if not is_file(path):
        return ModelCard()
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            fields = front_matter(file.read(_MAX_CHARACTERS))
    except OSError:
        return ModelCard()
    return ModelCard(
        licence=", ".join(fields.get("license", ())) or None,
        licence_name=", ".join(fields.get("license_name", ())) or None,
        licence_link=", ".join(fields.get("license_link", ())) or None,
        base_models=fields.get("base_model", ()),
        datasets=fields.get("datasets", ()),
        languages=fields.get("language", ()),
        tags=fields.get("tags", ()),
    )


def with_adapter(card: ModelCard, adapter: Path, *, base_name: str) -> ModelCard:
    """Return the card of a base with an adapter merged in: the base is its parent now.

    Args:
        card: Of the base, whose licence stays.
        adapter: The adapter's directory; its config names the base, its own card the datasets.
        base_name: What the base is called where the adapter names a path, or nothing.
    """
    own = read(adapter)
    named = _base_of(adapter / "adapter_config.json")
    candidates = [name for name in (named, *own.base_models) if name and _HUB.fullmatch(name)]
    return replace(
        card,
        base_models=tuple((candidates or [base_name])[:1]),
        datasets=tuple(dict.fromkeys((*own.datasets, *card.datasets))),
        languages=tuple(dict.fromkeys((*card.languages, *own.languages))),
        tags=tuple(dict.fromkeys((*card.tags, *own.tags))),
    )


def _base_of(config: Path) -> str | None:
    try:
        name = read_object(config).get("base_model_name_or_path")
    except UsageError:
        return None  # whoever merges it has told already
    return name if isinstance(name, str) else None


def hub_id(name: str) -> tuple[str, str] | None:
    """Split ``organization/name``; None for a path, a sentence or a bare name.

    >>> hub_id("HuggingFaceTB/SmolLM2-135M"), hub_id("./models/mine")
    (('HuggingFaceTB', 'SmolLM2-135M'), None)
    """
    match = _HUB.fullmatch(name)
    return (match["organization"], match["name"]) if match else None


# YAML, as far as model cards need it


def front_matter(text: str) -> dict[str, tuple[str, ...]]:
    """Return the names and lists of names between the two ``---`` that begin a model card.

    Everything is text, so that the language ``no`` stays Norwegian. What is neither a name nor a
    list of names (mappings, blocks of text, anchors) is left out.
    """
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in _front_lines(text):
        if match := _KEY.fullmatch(line):
            current = found[match["key"]] = list(_values(match["value"] or ""))
        elif match := _ITEM.fullmatch(line):
            current.extend(_scalar(match["value"]))
    return {key: tuple(values) for key, values in found.items() if values}


def _front_lines(text: str) -> Iterator[str]:
    lines = iter(text.splitlines())
    if next(lines, "").removeprefix("\ufeff").rstrip() != "---":
        return
    taken: list[str] = []
    for line in lines:
        if line.rstrip() == "---":
            yield from taken
            return
        taken.append(line.rstrip())


def _values(text: str) -> Iterator[str]:
    """Yield the items of ``[a, "b, c"]``, or the one name that stands there."""
    if not (text.startswith("[") and text.endswith("]")):
        yield from _scalar(text)
        return
    for item in re.findall(r"""\s*("(?:[^"\\]|\\.)*"|'(?:[^']|'')*'|[^,"']+)""", text[1:-1]):
        yield from _scalar(item)


def _scalar(text: str) -> Iterator[str]:
    """Yield a name without quotes and comment; nothing if it is not a name."""
    text = text.strip()
    if text.startswith('"'):
        match = re.match(r'"(?:[^"\\]|\\.)*"', text)
        try:
            text = str(json.loads(match[0])) if match else ""
        except ValueError:
            return
    elif text.startswith("'"):
        match = re.match("'((?:[^']|'')*)'", text)
        text = match[1].replace("''", "'") if match else ""
    else:
        text = re.split(r"(?:^|\s)#", text, maxsplit=1)[0].strip()
        if _UNREAD.match(text) or text in {"~", "null"}:
            return
    text = " ".join(text.split())
    if text and text.isprintable():
        yield text


# Sampling

_LIMITS: Mapping[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "top_k": (0, 2**31 - 1),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0, 100),
}


_NO_TOP_K = -1  # how vLLM spells a top_k that is off


def generation_settings(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a ``generation_config.json`` in words that every program knows."""
    return {**fields, **({"top_k": 0} if fields.get("top_k") == _NO_TOP_K else {})}


def read_sampling(directory: Path) -> SamplingDefaults:
    """Return what ``generation_config.json`` says; ``do_sample: false`` is a temperature of 0.

    Raises:
        UsageError: If a value is not a number, or one that cannot be meant; names file and field.
    """
    path = directory / "generation_config.json"
    fields = read_object_if_there(path)
    fields = generation_settings(fields)
    found = {name: _number(fields, name, path) for name in _LIMITS}
    if fields.get("do_sample") is False:
        found |= {"temperature": 0.0, "top_k": None, "top_p": None, "min_p": None}
    top_k = found.pop("top_k")
    return SamplingDefaults(top_k=None if top_k is None else int(top_k), **found)


def _number(fields: Mapping[str, Any], name: str, path: Path) -> float | None:
    value = fields.get(name)
    if value is None:
        return None
    low, high = _LIMITS[name]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # NaN is not, and integers may be of any size
        raise UsageError(
            f"{path}: {name} = {ascii(value)[:60]}, expected a number from {low:g} to {high:g}",
            hint="remove the field, or repair it",
        )
    return float(value)
