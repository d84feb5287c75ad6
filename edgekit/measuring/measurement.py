"""Measurements: every sample a device gave, as frozen data and as JSON.

The JSON, described by ``schemas/measurement.schema.json``, is a contract: the runner of a phone or
of a browser fills in the same document. So whatever only Linux knows may be null.
"""

import dataclasses
import json
import math
import types
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from edgekit.encodings.json_files import parse_object
from edgekit.errors import UsageError


SCHEMA_VERSION = 1
T = TypeVar("T")

# What "peak memory" was read from. A budget is held against the first one that is there: they
# count the weights, which every token reads, whether or not the kernel could drop them.
MemoryMetric = Literal[
    "working_set",  # Linux: VmHWM, elsewhere ru_maxrss
    "phys_footprint",  # iOS, macOS: TASK_VM_INFO ledger_phys_footprint_peak
    "total_pss",  # Android: dumpsys meminfo TOTAL PSS + SWAP PSS
    "process_tree_pss",  # a browser: its renderer and GPU processes, from outside
    "unreclaimable",  # Linux: highest RssAnon + RssShmem seen
    "cgroup",  # Linux: memory.peak of the control group, other processes included
]
JUDGED_METRICS: tuple[MemoryMetric, ...] = (
    "working_set", "phys_footprint", "total_pss", "process_tree_pss",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What one repetition does, in a process of its own."""

    prompt_lengths_tokens: tuple[int, ...]
    answer_tokens: int  # decoded after every prompt
    context_tokens: int
    generations: int = 2  # timed, for each prompt length, after one that only warms up
    threads: int | None = None  # None: the runtime decides


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One prompt and its answer."""

    prompt_tokens: int
    first_token_s: float  # from the empty cache to the first token chosen
    decode_s: tuple[float, ...]  # wall time of every further token, its choice included
    decode_cpu_s: tuple[float, ...] | None = None  # CPU time of the same, all threads together
    major_faults: int | None = None  # while decoding: pages that had to come from storage
    minor_faults: int | None = None

    @property
    def decode_tokens_per_s(self) -> float:
        """The rate over the whole answer."""
        return len(self.decode_s) / sum(self.decode_s)


@dataclass(frozen=True, kw_only=True)
class MemoryPoint:
    """What a process held at one moment, counted from its start."""

    time_s: float
    resident_bytes: int
    unreclaimable_bytes: int


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What the device was like during one repetition; a share is of the measured time."""

    run_delay_share: float | None = None  # of its running time a thread waited for a core
    cpu_pressure_share: float | None = None  # some task waited for a core
    memory_pressure_share: float | None = None  # some task waited for memory
    temperature_before_c: float | None = None
    temperature_max_c: float | None = None
    frequency_min_hz: float | None = None
    frequency_max_hz: float | None = None
    throttled_before: int | None = None  # the bits of `vcgencmd get_throttled`
    throttled_during: int | None = None  # every bit that was set at any moment, the end included


@dataclass(frozen=True, kw_only=True)
class ColdStart:
    """A process that found the artifact in storage only, as after a boot."""

    load_s: float
    first_token_s: float
    prompt_tokens: int
    cached_before_load: float | None  # share of the artifact that was in memory all the same


@dataclass(frozen=True, kw_only=True)
class Repetition:
    """One fresh process: load, warm-up, generations."""

    load_s: float
    cached_before_load: float | None  # share of the artifact that was in memory already
    warm_up: Generation
    generations: tuple[Generation, ...]
    memory_peaks_bytes: dict[MemoryMetric, int]
    memory_over_time: tuple[MemoryPoint, ...]
    conditions: Conditions


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The device and the software that took part."""

    system: str  # "Linux 6.12.25", "Android 15", "iOS 18.5", "Chrome 140"
    model: str | None  # the board or the phone
    cpu: str | None
    cores: int | None  # that the process may use
    cpu_features: tuple[str, ...]
    memory_bytes: int | None
    page_bytes: int | None
    governor: str | None  # of the clock frequency
    has_swap: bool | None
    python: str | None
    versions: dict[str, str]  # of edgekit and of the runtime


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one device did with one artifact, every sample kept."""

    device: str
    artifact_sha256: str
    workload: Workload
    environment: Environment
    repetitions: tuple[Repetition, ...]
    cold_start: ColdStart | None = None
    deaths: tuple[str, ...] = ()  # repetitions that the system killed, and how
    doubts: tuple[str, ...] = ()  # what the runner itself found wrong with the measurement

    @property
    def prompt_lengths_tokens(self) -> tuple[int, ...]:
        """The prompt lengths, shortest first."""
        return tuple(sorted(set(self.workload.prompt_lengths_tokens)))

    @property
    def load_s(self) -> tuple[float, ...]:
        """How long each process took to open the artifact."""
        return tuple(repetition.load_s for repetition in self.repetitions)

    def generations(self, prompt_tokens: int) -> tuple[Generation, ...]:
        """Return every timed generation after a prompt of this length, in the order of time."""
        every = (g for repetition in self.repetitions for g in repetition.generations)
        return tuple(g for g in every if g.prompt_tokens == prompt_tokens)

    def memory_peaks_bytes(self, metric: MemoryMetric) -> tuple[int, ...]:
        """Return one peak for each process that knew this metric."""
        peaks = (repetition.memory_peaks_bytes.get(metric) for repetition in self.repetitions)
        return tuple(peak for peak in peaks if peak is not None)

    def to_json(self) -> str:
        """Return the document that ``schemas/measurement.schema.json`` describes."""
        fields = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}
        return json.dumps(fields, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Measurement":
        """Read a document, from this device or another.

        Raises:
            UsageError: If it is of another schema version, or a field is missing, unknown or of
                the wrong type; the message names it.
        """
        fields = _parse(text)
        version = fields.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise UsageError(
                f"the measurement has schema {version!r}, this edgekit reads {SCHEMA_VERSION}"
            )
        return read_fields(cls, fields, of="measurement")


def _parse(text: str) -> dict[str, Any]:
    return parse_object(text, origin="the measurement")


def read_fields(cls: type[T], value: object, *, of: str) -> T:
    """Build a dataclass of this module from parsed JSON, checking every field.

    Args:
        cls: The dataclass.
        value: What `json.loads` returned.
        of: What is being read, for messages.

    Raises:
        UsageError: If a field is missing, unknown or of the wrong type.
    """
    if not isinstance(value, dict):
        raise _mismatch(of, value, "an object")
    hints = get_type_hints(cls)
    if unknown := sorted(value.keys() - hints.keys()):
        raise UsageError(f"{of} has an unknown field {unknown[0]!r}")
    required = {
        field.name
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]  # T is a dataclass
        if field.default is dataclasses.MISSING
    }
    if missing := sorted(required - value.keys()):
        raise UsageError(f"{of} has no field {missing[0]!r}")
    return cls(**{name: _read(hints[name], item, f"{of}.{name}") for name, item in value.items()})


def _read(hint: Any, value: object, of: str) -> Any:
    origin = get_origin(hint)
    if dataclasses.is_dataclass(hint):
        return read_fields(hint, value, of=of)  # type: ignore[arg-type]  # hint is a class
    if origin in {types.UnionType, Union}:
        return None if value is None else _read(get_args(hint)[0], value, of)
    if origin is tuple:
        return _read_tuple(get_args(hint)[0], value, of)
    if origin is dict:
        return _read_dict(*get_args(hint), value=value, of=of)
    return _read_scalar(hint, value, of)


def _read_tuple(item: Any, value: object, of: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _mismatch(of, value, "a list")
    return tuple(_read(item, entry, f"{of}[{index}]") for index, entry in enumerate(value))


def _read_dict(key: Any, item: Any, *, value: object, of: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _mismatch(of, value, "an object")
    known = get_args(key)  # of a Literal; nothing for plain strings
    if known and (unknown := sorted(value.keys() - set(known))):
        raise UsageError(f"{of} has an unknown field {unknown[0]!r}")
    return {name: _read(item, entry, f"{of}.{name}") for name, entry in value.items()}


def _read_scalar(hint: type, value: object, of: str) -> Any:
    kinds = (int, float) if hint is float else hint
    if not isinstance(value, kinds) or (isinstance(value, bool) and hint is not bool):
        raise _mismatch(of, value, {float: "a number", int: "an integer"}.get(hint, hint.__name__))
    if isinstance(value, int | float) and not _is_possible(value, of):
        raise _mismatch(of, value, "a finite number of at least 0")
    return hint(value)


def _is_possible(value: float, of: str) -> bool:
    """Only a temperature may be negative."""
    return math.isfinite(value) and (value >= 0 or of.endswith("_c"))


def _mismatch(of: str, value: object, expected: str) -> UsageError:
    return UsageError(f"{of} = {repr(value)[:60]}, expected {expected}")
