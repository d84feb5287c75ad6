"""Measurements: every sample a device gave, as frozen data and as JSON.

The JSON, described by ``schemas/measurement.schema.json``, is a contract: the runner of a phone or
of a browser fills in the same document. So whatever only Linux knows may be null.
"""

import dataclasses
import json
import re
from dataclasses import dataclass
from typing import Literal, TypeVar

from edgekit.browser.gpu import Gpu
from edgekit.browser.options import Backend
from edgekit.encodings.json_files import parse_object
from edgekit.encodings.typed_json import FieldReader, check_version
from edgekit.errors import UsageError
from edgekit.formats import GpuBuffer


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
class Answers:
    """What a device said where a bundle's goldens say what was proven."""

    positions: int  # at which distributions were compared
    mean_kl_nats: float  # the workstation's against the device's
    expected_ids: tuple[int, ...]  # the workstation's greedy answer
    said_ids: tuple[int, ...]  # the device's


@dataclass(frozen=True, kw_only=True)
class ColdStart:
    """A process that found the artifact in storage only, as after a boot."""

    load_s: float
    first_token_s: float
    prompt_tokens: int
    cached_before_load: float | None  # share of the artifact that was in memory all the same
    answers: Answers | None = None  # None: they were not compared


@dataclass(frozen=True, kw_only=True)
class BrowserRun:
    """How a page computed."""

    backend: Backend  # that did the work: what was handed to the GPU is counted
    gpu_submits: int
    threads: int | None  # of WebAssembly
    fell_back: str | None = None  # why not on the GPU
    note: str | None = None  # what was done about a fault of the runtime


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
    browser: BrowserRun | None = None  # None: not a browser's


@dataclass(frozen=True, kw_only=True)
class BrowserEnvironment:
    """The browser, and what a model needs of it."""

    agent: str  # "Chrome/140.0.7339.80"
    runtime: str  # "ONNX Runtime Web 1.31.0"
    gpu: Gpu | None  # None: no WebGPU, or WebAssembly was asked for
    features_needed: tuple[str, ...] = ()
    buffer_needed: GpuBuffer | None = None  # what the GPU must bind at once

    @property
    def is_software(self) -> bool:
        """Whether a WebGPU of the processor's stands in for a GPU."""
        return self.gpu is not None and self.gpu.is_software


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
    browser: BrowserEnvironment | None = None  # None: not in a browser


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
    def from_json(cls, text: str, *, origin: str = "the measurement") -> "Measurement":
        """Read a document, from this device or another.

        Args:
            text: The JSON.
            origin: Where it came from, for messages.

        Raises:
            UsageError: If it is of another schema version, or a field is missing, unknown or of
                the wrong type; the message names it.
        """
        fields = parse_object(text, origin=origin)
        check_version(fields.pop("schema_version", None), SCHEMA_VERSION, origin=origin)
        measurement = read_fields(cls, fields, of=origin)
        _check_ranges(measurement, origin)
        return measurement


def _check_ranges(measurement: Measurement, origin: str) -> None:
    """Check what the schema says beyond types and signs."""
    workload = measurement.workload
    counts = {
        "prompt_lengths_tokens": min(workload.prompt_lengths_tokens, default=0),
        "answer_tokens": workload.answer_tokens,
        "context_tokens": workload.context_tokens,
        "generations": workload.generations,
        "threads": 1 if workload.threads is None else workload.threads,
    }
    for name, count in counts.items():
        if count < 1:
            raise UsageError(f"{origin}: workload.{name} has {count}, expected at least 1")
    shares = {
        f"repetitions[{index}]": repetition.cached_before_load
        for index, repetition in enumerate(measurement.repetitions)
    }
    if measurement.cold_start is not None:
        shares["cold_start"] = measurement.cold_start.cached_before_load
    for place, share in shares.items():
        if share is not None and share > 1:
            raise UsageError(f"{origin}: {place}.cached_before_load = {share}, expected at most 1")
    if not re.fullmatch("[0-9a-f]{64}", measurement.artifact_sha256):
        found = ascii(measurement.artifact_sha256)[:70]
        raise UsageError(f"{origin}: artifact_sha256 = {found}, expected 64 hexadecimal digits")


def read_fields(cls: type[T], value: object, *, of: str) -> T:
    """Build a dataclass of this module from parsed JSON, checking every field.

    Args:
        cls: The dataclass.
        value: What `json.loads` returned.
        of: What is being read, for messages.

    Raises:
        UsageError: If a field is missing, unknown or of the wrong type.
    """
    return FieldReader(origin=of, is_signed=_is_temperature).read(cls, value)


def _is_temperature(path: str, _: object) -> bool:
    return path.endswith("_c")
