"""Targets: what a class of devices is, and what an answer may cost on it.

One TOML file is one target; the file name is the target's name. Every number in it is a table of
``value`` (with a unit), ``basis``, ``source``, ``date`` and perhaps a ``note``, so that a verdict
can say where its limits come from. `_NUMBERS` is the whole grammar: the reader, the JSON schema
and the names of the dataclass fields come from it.
"""

import datetime as dt
import difflib
import itertools
import os
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, cast, get_args

from edgekit.encodings.files import is_directory, is_file, shown
from edgekit.encodings.limits import TARGET_BYTES, check_size
from edgekit.errors import UsageError
from edgekit.units import (
    DIMENSIONS,
    Dimension,
    format_bytes,
    format_duration,
    format_quantity,
    parse_quantity,
    quantity_pattern,
)


Basis = Literal["measured", "documented", "extrapolated", "policy"]
BASES: tuple[Basis, ...] = get_args(Basis)
# Facts about devices name runtimes that this edgekit may not write for yet.
FormatName = Literal["gguf", "onnx", "executorch", "mlc"]
FORMATS: tuple[FormatName, ...] = get_args(FormatName)

RUNNERS = ("edgekit", "app")  # who calls the runtime there; the first by default
DIRECTORY_VARIABLE = "EDGEKIT_TARGETS"
MOST_SUGGESTIONS = 4
_MISSING_HINT = "the files in targets/ are complete examples"
_DATE_PATTERN = r"[0-9]{4}-[0-9]{2}-[0-9]{2}"
_TEXT = {"type": "string", "minLength": 1}
_ORIGIN_KEYS = ("basis", "source", "date", "note")
_ORIGIN_SCHEMA: dict[str, Any] = {
    "basis": {"enum": list(BASES)},
    "source": _TEXT | {"description": "an address, or 'edgekit policy'"},
    "date": {"type": "string", "pattern": f"^{_DATE_PATTERN}$"},
    "note": _TEXT,
}
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a number comes from.

    ``measured``: on such a device, or it follows from such a measurement by the arithmetic in the
    note. ``documented``: its maker, a standard or the source states it. ``extrapolated``: from
    another device, or nobody published a figure; the note says from what. ``policy``: a choice.
    """

    basis: Basis
    source: str  # an address, or "edgekit policy"
    date: str  # when the source was read, YYYY-MM-DD
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class FirstTokenLimit:
    """How long a prompt of this length may take until the first token of the answer."""

    prompt_tokens: int
    limit_s: float


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The limits `edgekit validate` enforces, and the workload they hold for."""

    artifact_bytes: int
    peak_memory_bytes: int
    load_s: float  # files in the page cache
    first_token: tuple[FirstTokenLimit, ...]  # shortest prompt first
    decode_tokens_per_s: float
    answer_tokens: int
    context_tokens: int


@dataclass(frozen=True, kw_only=True)
class WebGpuLimits:
    """What a browser on this target grants."""

    max_buffer_bytes: int
    max_binding_bytes: int
    has_shader_f16: bool


@dataclass(frozen=True, kw_only=True)
class Target:
    """A class of devices."""

    name: str
    title: str
    aliases: tuple[str, ...] = ()  # devices of this kind, as people call them
    soc: str
    cpu_features: tuple[str, ...]  # as Linux writes them; empty where no CPU code of ours runs
    memory_bytes: int
    usable_memory_bytes: int  # by one application
    memory_bandwidth_bytes_per_s: float  # the theoretical ceiling
    decode_bandwidth_bytes_per_s: float  # weights per second that decoding reaches
    prefill_flop_per_s: float  # 2 * parameters * prompt tokens per second that prefill reaches
    formats: tuple[FormatName, ...]  # best first
    prefill_threads: int
    decode_threads: int
    max_spread: float  # coefficient of variation above which a measurement is not evidence
    budget: Budget
    webgpu: WebGpuLimits | None = None
    # Which builds of a format its programs take, the usual one first; a format not named: any.
    variants: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    by_app: bool = False  # an app calls the runtimes, with its own settings; False: edgekit does
    origins: Mapping[str, Origin] = field(hash=False)  # by name of the field

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read one target file.

        Raises:
            UsageError: If the file cannot be read, is not TOML, or a field is unknown, missing, of
                the wrong type or without a unit; the message names the file and the field.
        """
        path = Path(path)
        root = _Table(path, "", _parse(path), known=(*_TOP, *_TABLES))
        target = cls._from_table(path.stem, root)
        _check(path, target)
        return target

    @classmethod
    def _from_table(cls, name: str, root: "_Table") -> Self:
        tables = {table: root.table(table, known) for table, known in _TABLES.items()}
        cpu, webgpu = tables["cpu"], None
        if root.has("webgpu"):
            webgpu = WebGpuLimits(
                **_numbers(tables["webgpu"]),
                has_shader_f16=tables["webgpu"].flag("shader_f16", as_="has_shader_f16"),
            )
        first_token = tables["budget"].first_token_limits()
        return cls(
            name=name,
            title=root.text("title"),
            aliases=root.aliases(),
            formats=cast("tuple[FormatName, ...]", root.choices("formats", FORMATS)),
            soc=cpu.text("soc"),
            cpu_features=cpu.words("features"),
            **_numbers(tables["hardware"]),
            **_numbers(tables["measurement"]),
            budget=Budget(**_numbers(tables["budget"]), first_token=first_token),
            webgpu=webgpu,
            variants=root.variants(),
            by_app=root.has("runner") and root.choice("runner", RUNNERS) == "app",
            origins={"cpu_features": cpu.origin()}
            | {key: origin for table in tables.values() for key, origin in table.origins.items()},
        )


@dataclass(frozen=True, kw_only=True)
class _Number:
    """A number of a target file: its place, its dimension, its meaning."""

    table: str
    key: str
    dimension: Dimension
    meaning: str

    @property
    def is_whole(self) -> bool:
        return self.dimension in {"bytes", "tokens", "threads"}


def _number(place: str, dimension: Dimension, meaning: str) -> _Number:
    table, key = place.split(".")
    return _Number(table=table, key=key, dimension=dimension, meaning=meaning)


_NUMBERS = {
    "memory_bytes": _number("hardware.memory", "bytes", "RAM of the device"),
    "usable_memory_bytes": _number("hardware.usable_memory", "bytes", "what one app may hold"),
    "memory_bandwidth_bytes_per_s": _number(
        "hardware.memory_bandwidth", "bytes/s", "theoretical ceiling of the memory"
    ),
    "decode_bandwidth_bytes_per_s": _number(
        "hardware.decode_bandwidth", "bytes/s", "weights per second that decoding reaches"
    ),
    "prefill_flop_per_s": _number(
        "hardware.prefill_compute", "FLOP/s", "2 * parameters * prompt tokens per second"
    ),
    "prefill_threads": _number("hardware.prefill_threads", "threads", "for reading the prompt"),
    "decode_threads": _number("hardware.decode_threads", "threads", "for writing the answer"),
    "max_spread": _number(
        "measurement.max_spread", "share", "coefficient of variation that a verdict tolerates"
    ),
    "artifact_bytes": _number("budget.artifact", "bytes", "all files of the artifact"),
    "peak_memory_bytes": _number("budget.peak_memory", "bytes", "working set while answering"),
    "load_s": _number("budget.load", "seconds", "until the model is ready, files cached"),
    "decode_tokens_per_s": _number("budget.decode_rate", "tokens/s", "the slowest answer allowed"),
    "answer_tokens": _number("budget.answer", "tokens", "answer length of the workload"),
    "context_tokens": _number("budget.context", "tokens", "what the cache must hold"),
    "max_buffer_bytes": _number("webgpu.max_buffer", "bytes", "maxBufferSize"),
    "max_binding_bytes": _number(
        "webgpu.max_binding", "bytes", "maxStorageBufferBindingSize"
    ),
}  # fmt: skip
_EXTRA_KEYS = {
    "cpu": ("soc", "features", *_ORIGIN_KEYS),
    "budget": ("first_token",),
    "webgpu": ("shader_f16",),
}
_TOP = ("title", "aliases", "formats", "variants", "runner")
_OPTIONAL = ("aliases", "webgpu", "variants", "runner")
_TABLES = {
    table: (
        *(number.key for number in _NUMBERS.values() if number.table == table),
        *_EXTRA_KEYS.get(table, ()),
    )
    for table in ("cpu", "hardware", "measurement", "budget", "webgpu")
}


def names() -> list[str]:
    """Return the names of all known targets, sorted."""
    return sorted(_files())


def titles() -> dict[str, str]:
    """Return the title of every known target by name, without judging the rest of its file."""
    return {
        name: _Table(path, "", content, known=content).text("title")
        for name, path in sorted(_files().items())
        for content in (_parse(path),)
    }


def load(name_or_path: str | Path | Target) -> Target:
    """Return the target of that name or alias, or the one in that file if it ends in ``.toml``.

    A `Target` is returned as it is, so that whoever takes a target takes all three.

    Raises:
        UsageError: If there is no such target or its file is wrong; the hint offers the way out.
    """
    if isinstance(name_or_path, Target):
        return name_or_path
    return Target.from_file(path_of(name_or_path))


def path_of(name_or_path: str | Path) -> Path:
    """Return the file of the target of that name or alias, or the path if it ends in ``.toml``.

    Raises:
        UsageError: If there is no target of that name.
    """
    name = str(name_or_path)
    if name.endswith(".toml"):
        return Path(name)
    files = _files()
    path = files.get(name) or _file_with_alias(name, files)
    if path is None:
        raise UsageError(
            f"no target named {shown(name)!r}",
            hint=f"{_near_names(name, sorted(files))}`edgekit targets` lists all; "
            "a file of your own ends in .toml",
        )
    return path


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A value of a target file, for people."""

    key: str  # as the file names it: ``hardware.memory``
    value: str
    origin: Origin


def quantities(target: Target) -> Iterator[Quantity]:
    """Yield every value of a target that has an origin, in the order of its file."""
    for name, origin in target.origins.items():
        key, value = _key_and_value(target, name)
        yield Quantity(key=key, value=value, origin=origin)


def _key_and_value(target: Target, name: str) -> tuple[str, str]:
    if name == "cpu_features":
        return "cpu.features", ", ".join(target.cpu_features) or "none"
    if name == "has_shader_f16":
        return (
            "webgpu.shader_f16",
            "yes" if target.webgpu and target.webgpu.has_shader_f16 else "no",
        )
    for limit in target.budget.first_token:
        if name == _limit_name(limit.prompt_tokens):
            prompt = format_quantity(limit.prompt_tokens, "tokens")
            return f"budget.first_token, {prompt}", format_duration(limit.limit_s)
    number = _NUMBERS[name]
    part = {"budget": target.budget, "webgpu": target.webgpu}.get(number.table, target)
    return f"{number.table}.{number.key}", format_quantity(getattr(part, name), number.dimension)


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a target file, for editors."""
    tables = {name: _table_schema(name) for name in _TABLES}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "edgekit target",
        **_closed(
            {
                "title": _TEXT,
                "aliases": _list_of(_TEXT),
                "formats": _list_of({"enum": list(FORMATS)}) | {"minItems": 1},
                "runner": {"enum": list(RUNNERS), "default": RUNNERS[0]},
                "variants": _closed(
                    dict.fromkeys(FORMATS, _list_of(_TEXT) | {"minItems": 1}), optional=FORMATS
                ),
                **tables,
            },
            optional=_OPTIONAL,
        ),
        "$defs": {dimension: _quantity_schema(dimension) for dimension in DIMENSIONS},
    }


def _files() -> dict[str, Path]:
    """Return every known target file by name; the user's own hide shipped ones."""
    here = Path(__file__).parent
    # A wheel has its own folder; next to an installed package, `targets` may be anyone's.
    shipped = here / "_targets" if (here / "_targets").is_dir() else here.parent / "targets"
    directories = [shipped]
    if own := os.environ.get(DIRECTORY_VARIABLE):
        if not is_directory(Path(own)):
            raise UsageError(
                f"{DIRECTORY_VARIABLE} = {own!r} is not a directory",
                hint="let it name a folder of target files, or unset it",
            )
        directories.append(Path(own))
    return {
        path.stem: path for directory in directories for path in sorted(directory.glob("*.toml"))
    }


def _file_with_alias(name: str, files: Mapping[str, Path]) -> Path | None:
    """Return the target file that says it is also called so; the user's own come first."""
    for path in reversed(list(files.values())):
        with suppress(UsageError):  # another file that is wrong
            if name in _Table(path, "", _parse(path), known=(*_TOP, *_TABLES)).aliases():
                return path
    return None


def _parse(path: Path) -> dict[str, Any]:
    if not is_file(path):
        raise UsageError(
            f"there is no target file {path}", hint="`edgekit targets` lists the known ones"
        )
    check_size(path, TARGET_BYTES)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: byte {error.start}") from error
    except ValueError as error:  # TOMLDecodeError, and integers of thousands of digits
        raise UsageError(f"{path} is not TOML: {error}") from error
    except RecursionError as error:
        raise UsageError(f"{path} is not TOML: it is nested too deeply") from error


def _numbers(table: "_Table") -> dict[str, Any]:
    """Read every number of `_NUMBERS` in this table, by name of its field."""
    return {
        name: table.quantity(number.key, number.dimension, as_=name, is_whole=number.is_whole)
        for name, number in _NUMBERS.items()
        if number.table == table.name
    }


class _Table:
    """One table of a target file: it knows its place, and refuses unknown keys."""

    def __init__(
        self, path: Path, name: str, content: Mapping[str, object], *, known: Collection[str]
    ) -> None:
        self.path = path
        self.name = name
        self.origins: dict[str, Origin] = {}
        self._content = content
        for key in content:
            if key not in known:
                raise UsageError(
                    f"{path}: unknown key {self.full(key)!r}", hint=_did_you_mean(key, known)
                )

    def has(self, key: str) -> bool:
        return key in self._content

    def table(self, key: str, known: Collection[str]) -> "_Table":
        is_optional = key in _OPTIONAL and not self.has(key)
        content = {} if is_optional else self.get(key, dict, f"a table of {', '.join(known)}")
        return _Table(self.path, self.full(key), content, known=known)

    def text(self, key: str) -> str:
        text = self.get(key, str, "a text")
        if not text.strip():
            raise self.refusal(key, "is empty")
        return text

    def words(self, key: str) -> tuple[str, ...]:
        words = self.get(key, list, "a list of texts")
        if not all(isinstance(word, str) for word in words) or len(set(words)) != len(words):
            raise self.refusal(key, f"= {words!r} is not a list of different texts")
        return tuple(words)

    def aliases(self) -> tuple[str, ...]:
        """Read the other names of the target: devices that people have."""
        return self.words("aliases") if self.has("aliases") else ()

    def choices(self, key: str, allowed: Collection[str]) -> tuple[str, ...]:
        """Read one or more of the allowed words."""
        chosen = self.words(key)
        if not chosen:
            raise self.refusal(key, "is empty", f"one or more of {', '.join(allowed)}")
        for word in chosen:
            if word not in allowed:
                raise self.refusal(
                    key, f"has the unknown value {word!r}", _did_you_mean(word, allowed)
                )
        return chosen

    def choice(self, key: str, allowed: Collection[str]) -> str:
        """Read one of the allowed words."""
        word = self.text(key)
        if word not in allowed:
            raise self.refusal(key, f"has the unknown value {word!r}", _did_you_mean(word, allowed))
        return word

    def variants(self) -> dict[str, tuple[str, ...]]:
        """Read which builds of a format are taken, for the formats that are named."""
        table = self.table("variants", self.choices("formats", FORMATS))
        variants: dict[str, tuple[str, ...]] = {
            name: table.words(name) for name in FORMATS if table.has(name)
        }
        for name, words in variants.items():
            if not all(word.strip() for word in words) or not words:
                raise table.refusal(name, "is empty")
        return variants

    def quantity(self, key: str, dimension: Dimension, *, as_: str, is_whole: bool) -> float:
        """Read a number with its unit, and keep its origin under the name ``as_``."""
        entry = self.table(key, ("value", *_ORIGIN_KEYS))
        self.origins[as_] = entry.origin()
        return entry.number("value", dimension, is_whole=is_whole)

    def flag(self, key: str, *, as_: str) -> bool:
        """Read a yes or no, and keep its origin under the name ``as_``."""
        entry = self.table(key, ("value", *_ORIGIN_KEYS))
        self.origins[as_] = entry.origin()
        return entry.get("value", bool, "true or false")

    def first_token_limits(self) -> tuple[FirstTokenLimit, ...]:
        """Read the list of limits, shortest prompt first."""
        limits: dict[int, float] = {}
        for entry in self.tables("first_token", ("prompt", "value", *_ORIGIN_KEYS)):
            prompt_tokens = int(entry.number("prompt", "tokens", is_whole=True))
            if prompt_tokens in limits:
                raise entry.refusal("prompt", f"= {prompt_tokens} tokens appears twice")
            limits[prompt_tokens] = entry.number("value", "seconds", is_whole=False)
            self.origins[_limit_name(prompt_tokens)] = entry.origin()
        return tuple(FirstTokenLimit(prompt_tokens=n, limit_s=limits[n]) for n in sorted(limits))

    def tables(self, key: str, known: Collection[str]) -> "list[_Table]":
        """Read a list of one or more tables."""
        contents = self.get(key, list, "a list of tables")
        if not contents or not all(isinstance(content, dict) for content in contents):
            raise self.refusal(key, f"= {contents!r} is not a list of one or more tables")
        return [
            _Table(self.path, f"{self.full(key)}[{index}]", content, known=known)
            for index, content in enumerate(contents)
        ]

    def origin(self) -> Origin:
        """Read where this entry's value comes from."""
        basis = self.text("basis")
        if basis not in BASES:
            raise self.refusal("basis", f"= {basis!r} is not one of {', '.join(BASES)}")
        date = self.text("date")
        if not _is_date(date):
            raise self.refusal("date", f"= {date!r} is not a date", "write it as YYYY-MM-DD")
        note = self.text("note") if self.has("note") else None
        return Origin(basis=basis, source=self.text("source"), date=date, note=note)

    def number(self, key: str, dimension: Dimension, *, is_whole: bool) -> float:
        place = f"{self.path}: {self.full(key)}"
        value = parse_quantity(self.text(key), of=place, dimension=dimension)
        if is_whole and dimension != "bytes" and value != int(value):
            raise self.refusal(key, f"= {value} is not a whole number of {dimension}")
        rounded = round(value) if is_whole else value  # nobody means the fraction of a byte
        if rounded == 0:
            raise self.refusal(key, "is zero")
        return rounded

    def get(self, key: str, expected: type[_T], description: str) -> _T:
        if not self.has(key):
            raise self.refusal(key, f"is missing: {description} is expected", _MISSING_HINT)
        value = self._content[key]
        if not isinstance(value, expected):
            raise self.refusal(key, f"= {value!r} is not {description}")
        return value

    def full(self, key: str) -> str:
        return f"{self.name}.{key}" if self.name else key

    def refusal(self, key: str, finding: str, hint: str = "") -> UsageError:
        return UsageError(f"{self.path}: {self.full(key)} {finding}", hint=hint)


def _check(path: Path, target: Target) -> None:
    """Refuse numbers that contradict each other."""
    budget = target.budget
    longest = budget.first_token[-1].prompt_tokens + budget.answer_tokens
    size_order = (
        ("budget.peak_memory", budget.peak_memory_bytes),
        ("hardware.usable_memory", target.usable_memory_bytes),
        ("hardware.memory", target.memory_bytes),
    )
    for (small, less), (large, more) in itertools.pairwise(size_order):
        if less > more:
            raise UsageError(
                f"{path}: {small} is {format_bytes(less)}, more than {large} {format_bytes(more)}"
            )
    if target.decode_bandwidth_bytes_per_s > target.memory_bandwidth_bytes_per_s:
        raise UsageError(
            f"{path}: hardware.decode_bandwidth is above hardware.memory_bandwidth",
            hint="weights that are not read for every token do not count (embeddings, experts)",
        )
    if budget.context_tokens < longest:
        raise UsageError(
            f"{path}: budget.context is {budget.context_tokens} tokens, but the longest prompt "
            f"and its answer need {longest}"
        )


def _near_names(name: str, known: Sequence[str]) -> str:
    """Ask for the targets that may have been meant: ``pi4`` is part of three names."""
    containing = [other for other in known if (bare := _bare(name)) and bare in _bare(other)]
    near = containing[:MOST_SUGGESTIONS] or difflib.get_close_matches(name, known, n=3)
    return f"did you mean {', '.join(near)}? " if near else ""


def _bare(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _did_you_mean(word: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(word, known, n=3)
    return f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(known)}"


def _limit_name(prompt_tokens: int) -> str:
    """Return the name under which the origin of a first-token limit is kept."""
    return f"first_token[{prompt_tokens}]"


def _is_date(text: str) -> bool:
    if re.fullmatch(_DATE_PATTERN, text, flags=re.ASCII) is None:
        return False
    try:
        dt.date.fromisoformat(text)
    except ValueError:
        return False
    return True


def _table_schema(table: str) -> dict[str, Any]:
    properties: dict[str, Any] = {
        number.key: {"$ref": f"#/$defs/{_pointer(number.dimension)}", "description": number.meaning}
        for number in _NUMBERS.values()
        if number.table == table
    }
    match table:
        case "cpu":
            properties |= {"soc": _TEXT, "features": _list_of(_TEXT), **_ORIGIN_SCHEMA}
        case "budget":
            entry = {
                "prompt": {"type": "string", "pattern": quantity_pattern("tokens")},
                "value": {"type": "string", "pattern": quantity_pattern("seconds")},
            }
            limit = _closed(entry | _ORIGIN_SCHEMA, optional=("note",))
            properties["first_token"] = _list_of(limit) | {"minItems": 1}
        case "webgpu":
            properties["shader_f16"] = _closed(
                {"value": {"type": "boolean"}} | _ORIGIN_SCHEMA, optional=("note",)
            )
        case _:
            pass
    return _closed(properties, optional=("note",))


def _quantity_schema(dimension: Dimension) -> dict[str, Any]:
    value = {"type": "string", "pattern": quantity_pattern(dimension)}
    return _closed({"value": value} | _ORIGIN_SCHEMA, optional=("note",))


def _closed(properties: Mapping[str, Any], *, optional: Collection[str] = ()) -> dict[str, Any]:
    """Return the schema of a table that has these keys and no others."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": [key for key in properties if key not in optional],
        "additionalProperties": False,
    }


def _list_of(item: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": dict(item), "uniqueItems": True}


def _pointer(dimension: Dimension) -> str:
    return dimension.replace("/", "~1")  # RFC 6901
