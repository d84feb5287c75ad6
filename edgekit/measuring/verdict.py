"""Verdicts: a measurement held against a target's budget, check by check.

A miss is a miss even if the numbers are noisy; a pass counts only if they are steady, or if the
worst of them is so far inside the limit that no noise hides a miss. Whoever was
throttled, or shared the cores with other work, is not judged on speed at all: that would be the
speed of something else.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from edgekit import formats
from edgekit.bundle.manifest import Bundle
from edgekit.measuring.machine import THROTTLED_NOW, THROTTLED_SINCE_BOOT
from edgekit.measuring.measurement import JUDGED_METRICS, Generation, Measurement, MemoryMetric
from edgekit.measuring.statistics import (
    MedianBounds,
    bounds_of_median,
    coefficient_of_variation,
    drift,
)
from edgekit.target import Budget, Target
from edgekit.units import format_bytes


Outcome = Literal["pass", "fail", "unstable"]
CheckOutcome = Literal["pass", "fail", "inconclusive"]
Unit = Literal["bytes", "s", "tokens/s", "tokens", "nats", "features"]
Direction = Literal["at most", "at least"]

EXIT_STATUSES: dict[Outcome, int] = {"pass": 0, "fail": 3, "unstable": 4}  # as in errors.py
LEAST_PROCESSES = 3  # a peak is the largest of so many: one process may miss it
# Other machines than the target's, servers with neighbours among them, are held to what phones are.
SPREAD_ELSEWHERE = 0.10
# Where the worst of all samples could be twice as bad, no noise hides a miss.
AMPLE_MARGIN = 2.0
LARGEST_DRIFT = 0.05  # between the medians of the first and the second half

# A thread that waits for a core w of its time makes a token 1 / (1 - w) times as long, and with
# several threads every layer waits for the slowest: 5 % hides more than the drift we allow.
LARGEST_RUN_DELAY = 0.05
# Where threads do not tell their wait: the share of time in which anybody on the machine waited.
# It also counts those who waited for us, so it is allowed more.
LARGEST_CPU_PRESSURE = 0.25
LARGEST_MEMORY_PRESSURE = 0.01  # any steady wait for memory means that it does not suffice
SOFTWARE_ADAPTER = "not judged: software adapter"
# How far a device's logits may be from the workstation's, mean KL in nats. The criterion is not
# the same words: one artifact on two instruction sets chose another word at 2 of 5 positions, and
# differed by at most 0.13 nats (int4, ONNX Runtime, Cortex-A76 against x86). So 0.2 at the most;
# and never more than a proof lets this recipe differ from its checkpoint, for a device that adds
# as much again halves what was proven. For scale: the same build differs from itself by 1e-10 if it
# reads a text in a batch as long as before, and by 0.002 to 0.003 if in one of 256 tokens instead
# of 48, where other kernels work (Q8_0, SmolLM2-135M, 0.02 allowed).
LARGEST_MEAN_KL_NATS = 0.2
# Weights kept in floats: half-precision arithmetic is one processor's way and not another's.
LEAST_MEAN_KL_NATS = 1e-3
# All weights are read for every token: a fault for each means that they do not stay in memory.
THRASHING_FAULTS_PER_TOKEN = 1.0


@dataclass(frozen=True, kw_only=True)
class Check:
    """One limit, what was measured, and how sure that is."""

    name: str
    unit: Unit
    direction: Direction
    limit: float
    measured: float | None  # a median, or the number itself if it is exact; None: nothing to judge
    judged: float | None  # what is held against the limit: the bound on the worse side
    outcome: CheckOutcome
    basis: str  # what `judged` is, and why the outcome is not a pass
    samples: tuple[float, ...] = ()
    more_samples_may_help: bool = False
    is_void: bool = False  # not judged at all; the verdict's doubts say why


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """All checks, what makes the measurement doubtful, and what a reader should know."""

    checks: tuple[Check, ...]
    doubts: tuple[str, ...]  # each of them forbids a pass
    notes: tuple[str, ...] = ()

    @property
    def outcome(self) -> Outcome:
        """Return fail for any miss, pass for no miss and no doubt, unstable for the rest."""
        if any(check.outcome == "fail" for check in self.checks):
            return "fail"
        is_clear = all(check.outcome == "pass" for check in self.checks)
        return "pass" if is_clear and not self.doubts else "unstable"

    @property
    def exit_status(self) -> int:
        """The exit status of `edgekit validate`."""
        return EXIT_STATUSES[self.outcome]

    @property
    def more_samples_may_help(self) -> bool:
        """Whether chance is the only thing between this verdict and a pass or a fail."""
        unclear = [check for check in self.checks if check.outcome == "inconclusive"]
        return (
            self.outcome == "unstable"
            and not self.doubts
            and all(check.more_samples_may_help for check in unclear)
        )


def judge(measurement: Measurement, bundle: Bundle, target: Target) -> Verdict:
    """Hold a measurement of a bundle against the budget of a target."""
    void = tuple(_reasons_to_ignore_speed(measurement))
    checks = (
        _check_artifact(bundle, target.budget),
        _check_context(bundle, target.budget),
        _check_memory(measurement, target.budget),
        *_check_gpu(measurement),
        *_check_answers(measurement, bundle),
        *_check_speed(measurement, target, is_void=bool(void)),
    )
    doubts = (*void, *_other_doubts(measurement, bundle))
    return Verdict(checks=checks, doubts=doubts, notes=tuple(_notes(measurement, bundle, target)))


def _check_artifact(bundle: Bundle, budget: Budget) -> Check:
    size = bundle.artifact.size_bytes
    return Check(
        name="artifact",
        unit="bytes",
        direction="at most",
        limit=budget.artifact_bytes,
        measured=size,
        judged=size,
        outcome="pass" if size <= budget.artifact_bytes else "fail",
        basis="exact: all files of the artifact",
    )


def _check_context(bundle: Bundle, budget: Budget) -> Check:
    needed = max(limit.prompt_tokens for limit in budget.first_token) + budget.answer_tokens
    return Check(
        name="context",
        unit="tokens",
        direction="at least",
        limit=needed,
        measured=bundle.context_tokens,
        judged=bundle.context_tokens,
        outcome="pass" if bundle.context_tokens >= needed else "fail",
        basis="exact: the budget's longest prompt and its answer",
    )


def _check_memory(measurement: Measurement, budget: Budget) -> Check:
    metric = judged_metric(measurement)
    peaks = measurement.memory_peaks_bytes(metric) if metric else ()
    peak = max(peaks, default=None)
    outcome, reason = _judge_memory(measurement, peaks, budget.peak_memory_bytes)
    name = (metric or "memory").replace("_", " ")
    return Check(
        name="peak memory",
        unit="bytes",
        direction="at most",
        limit=budget.peak_memory_bytes,
        measured=peak,
        judged=peak,
        outcome=outcome,
        basis="; ".join(
            filter(
                None, (f"largest {name} of {counted(len(peaks), 'process', 'processes')}", reason)
            )
        ),
        samples=tuple(float(peak) for peak in peaks),
        more_samples_may_help=outcome == "inconclusive" and len(peaks) < LEAST_PROCESSES,
    )


def _check_gpu(measurement: Measurement) -> Iterator[Check]:
    """Yield what a model needs of a browser's GPU, and whether it has that."""
    browser = measurement.environment.browser
    if browser is None or browser.gpu is None or not _ran_on_gpu(measurement):
        return
    gpu, buffer = browser.gpu, browser.buffer_needed
    if buffer is not None:
        for limit in ("maxStorageBufferBindingSize", "maxBufferSize"):
            granted = gpu.limits.get(limit, 0)
            yield Check(
                name=limit, unit="bytes", direction="at least", limit=buffer.size_bytes,
                measured=granted, judged=granted,
                outcome="pass" if granted >= buffer.size_bytes else "fail",
                basis=f"exact: {buffer.name} is bound as a whole",
            )  # fmt: skip
    for feature in browser.features_needed:
        has = int(feature in gpu.features)
        yield Check(
            name=feature, unit="features", direction="at least", limit=1, measured=has, judged=has,
            outcome="pass" if has else "fail", basis="exact: a feature of the GPU",
        )  # fmt: skip


def _check_answers(measurement: Measurement, bundle: Bundle) -> Iterator[Check]:
    """Yield how far the device's distributions are from those that were proven."""
    answers = measurement.cold_start and measurement.cold_start.answers
    if not answers or not answers.positions:
        return
    limit = largest_mean_kl_nats(bundle)
    yield Check(
        name="answers", unit="nats", direction="at most", limit=limit,
        measured=answers.mean_kl_nats, judged=answers.mean_kl_nats,
        outcome="pass" if answers.mean_kl_nats <= limit else "fail",
        basis=f"mean KL from the bundle's goldens over {counted(answers.positions, 'position')}",
    )  # fmt: skip


def largest_mean_kl_nats(bundle: Bundle) -> float:
    """Return how far a device's logits may be from a bundle's goldens."""
    recipe = formats.get(bundle.artifact.format).RECIPES.get(bundle.artifact.recipe)
    proven = recipe.max_mean_kl_nats if recipe else LARGEST_MEAN_KL_NATS
    return min(max(proven, LEAST_MEAN_KL_NATS), LARGEST_MEAN_KL_NATS)


def judged_metric(measurement: Measurement) -> MemoryMetric | None:
    """Return the metric that this device's peak is judged by."""
    known = (metric for metric in JUDGED_METRICS if measurement.memory_peaks_bytes(metric))
    return next(known, None)


def _judge_memory(
    measurement: Measurement, peaks: Sequence[int], limit_bytes: int
) -> tuple[CheckOutcome, str]:
    if measurement.deaths:
        return "fail", measurement.deaths[0]
    if max(peaks, default=0) > limit_bytes:
        return "fail", ""
    faults = faults_per_token(measurement)
    if faults is not None and faults >= THRASHING_FAULTS_PER_TOKEN:
        return "fail", f"{faults:.1f} major faults per token: the weights do not stay in memory"
    if faults:
        return "inconclusive", f"{faults:.3f} major faults per token: some pages were dropped"
    if len(peaks) < LEAST_PROCESSES:
        return "inconclusive", f"at least {LEAST_PROCESSES} processes are needed"
    return "pass", ""


def faults_per_token(measurement: Measurement) -> float | None:
    """Return the major faults for each token decoded after the warm-up."""
    every = [g for repetition in measurement.repetitions for g in repetition.generations]
    counted = [g for g in every if g.major_faults is not None and g.decode_s]
    tokens = sum(len(g.decode_s) for g in counted)
    return sum(g.major_faults or 0 for g in counted) / tokens if tokens else None


def _check_speed(measurement: Measurement, target: Target, *, is_void: bool) -> Iterator[Check]:
    budget = target.budget
    judging = _Judging(is_void=is_void, max_spread=_allowed_spread(measurement, target))
    # How long a disk or an allocator takes varies; a load is one event, so its bound suffices.
    loading = _Judging(is_void=is_void, max_spread=None)
    yield loading.check("load", measurement.load_s, budget.load_s, unit="s", direction="at most")
    measured = set(measurement.prompt_lengths_tokens)
    for limit in budget.first_token:
        if limit.prompt_tokens in measured:
            done = measurement.generations(limit.prompt_tokens)
            firsts = tuple(generation.first_token_s for generation in done)
            name = f"first token after {limit.prompt_tokens}"
            yield judging.check(name, firsts, limit.limit_s, unit="s", direction="at most")
    for length in measurement.prompt_lengths_tokens:
        yield judging.check(
            f"decoding after {length}",
            decode_rates(measurement.generations(length)),
            budget.decode_tokens_per_s,
            unit="tokens/s",
            direction="at least",
        )


def decode_rates(generations: Sequence[Generation]) -> tuple[float, ...]:
    """Return one rate for each answer of more than one token, as far as the clock could tell."""
    return tuple(g.decode_tokens_per_s for g in generations if sum(g.decode_s) > 0)


@dataclass(frozen=True, kw_only=True)
class _Judging:
    """How samples of a time or a rate become a check."""

    is_void: bool
    max_spread: float | None  # None: a spread is no reason for doubt

    def check(
        self,
        name: str,
        samples: tuple[float, ...],
        limit: float,
        *,
        unit: Unit,
        direction: Direction,
    ) -> Check:
        bounds = bounds_of_median(samples)
        ruling = self._rule_out(bounds, limit, direction) or self._rule_on_steadiness(
            samples, _margin(samples, limit, direction)
        )
        side = _GOOD_SIDE[direction] if ruling.outcome == "fail" else _BAD_SIDE[direction]
        basis = bounds.basis(side) if bounds else counted(len(samples), "sample")
        return Check(
            name=name,
            unit=unit,
            direction=direction,
            limit=limit,
            measured=statistics.median(samples) if samples else None,
            judged=getattr(bounds, side, None),
            outcome=ruling.outcome,
            basis="; ".join(filter(None, (basis, ruling.reason))),
            samples=samples,
            more_samples_may_help=ruling.more_samples_may_help,
            is_void=self.is_void,
        )

    def _rule_out(
        self, bounds: MedianBounds | None, limit: float, direction: Direction
    ) -> "_Ruling | None":
        """Return why this is not a pass; None if even the worse bound holds the limit."""
        if self.is_void:
            return _Ruling("inconclusive", "not judged, see the doubts")
        if bounds is None:
            return _Ruling(
                "inconclusive", "too few for a confidence bound", more_samples_may_help=True
            )
        if not _holds(getattr(bounds, _GOOD_SIDE[direction]), limit, direction):
            return _Ruling("fail", "even the better bound is over the limit")
        if not _holds(getattr(bounds, _BAD_SIDE[direction]), limit, direction):
            reason = "the limit lies within the confidence bounds"
            return _Ruling("inconclusive", reason, more_samples_may_help=True)
        return None

    def _rule_on_steadiness(self, samples: Sequence[float], margin: float) -> "_Ruling":
        """Return a pass if the samples are steady, or so far inside that it does not matter."""
        if self.max_spread is None:
            return _Ruling("pass")
        if margin >= AMPLE_MARGIN:
            return _Ruling(
                "pass", f"even the worst sample is within the limit by a factor of {margin:.1f}"
            )
        spread, change = coefficient_of_variation(samples), drift(samples)
        if spread > self.max_spread:
            reason = f"unstable: varies by {spread:.1%}, {self.max_spread:.1%} allowed"
            return _Ruling("inconclusive", reason)
        if change is not None and abs(change) > LARGEST_DRIFT:
            reason = f"drifts by {change:+.1%} from the first half to the second"
            return _Ruling("inconclusive", reason, more_samples_may_help=True)
        return _Ruling("pass")


def _margin(samples: Sequence[float], limit: float, direction: Direction) -> float:
    """Return how many times the worst sample could be worse before it missed the limit."""
    if not samples:
        return 0.0
    return limit / max(samples) if direction == "at most" else min(samples) / limit


class _Ruling(NamedTuple):
    outcome: CheckOutcome
    reason: str = ""
    more_samples_may_help: bool = False


_BAD_SIDE: dict[Direction, Literal["low", "high"]] = {"at most": "high", "at least": "low"}
_GOOD_SIDE: dict[Direction, Literal["low", "high"]] = {"at most": "low", "at least": "high"}


def _holds(value: float, limit: float, direction: Direction) -> bool:
    return value <= limit if direction == "at most" else value >= limit


def _reasons_to_ignore_speed(measurement: Measurement) -> Iterator[str]:
    conditions = [repetition.conditions for repetition in measurement.repetitions]
    bits = 0
    for each in conditions:
        during, before = each.throttled_during or 0, each.throttled_before or 0
        bits |= during & THROTTLED_NOW
        bits |= (during & ~before & THROTTLED_SINCE_BOOT) >> 16
    if bits:
        yield f"the board was throttled ({throttling_in_words(bits)}): its speed is not typical"
    delay = _mean([each.run_delay_share for each in conditions])
    pressure = _mean([each.cpu_pressure_share for each in conditions])
    if delay is not None and delay > LARGEST_RUN_DELAY:
        yield (
            f"other work used the cores: threads waited {delay:.0%} of their time, "
            f"{LARGEST_RUN_DELAY:.0%} allowed"
        )
    if delay is None and pressure is not None and pressure > LARGEST_CPU_PRESSURE:
        yield (
            f"other work used the cores: some task waited {pressure:.0%} of the time, "
            f"{LARGEST_CPU_PRESSURE:.0%} allowed"
        )

    if _is_software(measurement):
        yield f"speeds are {SOFTWARE_ADAPTER}"


def _is_software(measurement: Measurement) -> bool:
    """Tell whether a WebGPU of the processor's did the work."""
    browser = measurement.environment.browser
    return browser is not None and browser.is_software and _ran_on_gpu(measurement)


def _ran_on_gpu(measurement: Measurement) -> bool:
    runs = [repetition.browser for repetition in measurement.repetitions]
    return any(run is not None and run.backend == "webgpu" for run in runs)


def throttling_in_words(bits: int) -> str:
    """Return what the low four bits of get_throttled mean."""
    meanings = ("under-voltage", "clock capped", "throttled", "soft temperature limit")
    return ", ".join(meaning for bit, meaning in enumerate(meanings) if bits >> bit & 1)


def _other_doubts(measurement: Measurement, bundle: Bundle) -> Iterator[str]:
    yield from measurement.doubts
    yield from dict.fromkeys(
        f"the page computed in WebAssembly, not on the GPU: {repetition.browser.fell_back}"
        for repetition in measurement.repetitions
        if repetition.browser is not None and repetition.browser.fell_back
    )
    if bundle.agreement is None:
        yield "the bundle was exported without verification: its outputs are unproven"
    elif not bundle.agreement.passed:
        yield "the bundle does not agree with its checkpoint"
    shares = [repetition.conditions.memory_pressure_share for repetition in measurement.repetitions]
    pressure = _mean(shares)
    if pressure is not None and pressure > LARGEST_MEMORY_PRESSURE:
        yield f"tasks waited for memory {pressure:.0%} of the time: there is too little of it"


def _notes(measurement: Measurement, bundle: Bundle, target: Target) -> Iterator[str]:
    environment, budget = measurement.environment, target.budget
    if foreign := foreign_features(measurement, target):
        yield (
            f"measured on {environment.model or environment.cpu or environment.system}, which is "
            f"not a {target.title} (it lacks {foreign[0]}): the verdict holds for the machine "
            "measured"
        )
    yield from _browser_notes(measurement, bundle)
    if bundle.target != target.name:
        yield f"the bundle was exported for {bundle.target}"
    if bundle.context_tokens != budget.context_tokens:
        yield (
            f"the bundle's context is {bundle.context_tokens} tokens, the budget's "
            f"{budget.context_tokens}: memory was measured with the bundle's"
        )
    if environment.governor not in {None, "performance"}:
        yield f"the clock governor is {environment.governor!r}: speed may depend on the load"
    first = measurement.repetitions[0].conditions if measurement.repetitions else None
    if first and (first.throttled_before or 0) & THROTTLED_SINCE_BOOT:
        earlier = throttling_in_words((first.throttled_before or 0) >> 16)
        yield f"the board has been limited since boot, before this measurement ({earlier})"
    cached = [repetition.cached_before_load for repetition in measurement.repetitions]
    if any(share is not None and share < 0.9 for share in cached):
        yield "parts of the artifact were not in the page cache and were read from storage on load"


def _browser_memory(measurement: Measurement, bundle: Bundle, backend: str) -> Iterator[str]:
    """Yield what was to be expected of the browser's processes, where that is known."""
    known = formats.browsing(bundle.artifact.format).MEMORY.get(backend)
    peak = max(measurement.memory_peaks_bytes("process_tree_pss"), default=None)
    browser = measurement.environment.browser
    is_as_known = backend == "wasm" or (browser is not None and browser.is_software)
    if known is not None and peak is not None and is_as_known:
        predicted = known.peak_bytes(bundle.artifact.size_bytes)
        yield (
            f"{format_bytes(predicted)} of memory was predicted for this browser, "
            f"{format_bytes(peak)} measured: {peak / predicted:.2f} of it"
        )


def _browser_notes(measurement: Measurement, bundle: Bundle) -> Iterator[str]:
    """Yield what computed in a browser, and what its runtime had to be helped with."""
    browser = measurement.environment.browser
    runs = [it.browser for it in measurement.repetitions if it.browser is not None]
    if browser is None or not runs:
        return
    gpu = browser.gpu
    where = gpu.name if runs[0].backend == "webgpu" and gpu else "WebAssembly"
    yield f"computed by {browser.runtime} in {where}, {browser.agent}"
    yield from dict.fromkeys(run.note for run in runs if run.note)
    yield from _browser_memory(measurement, bundle, runs[0].backend)
    answers = measurement.cold_start and measurement.cold_start.answers
    if answers and answers.said_ids != answers.expected_ids:
        yield (
            f"its greedy answer is {list(answers.said_ids)}, the workstation's "
            f"{list(answers.expected_ids)}: a near tie may fall otherwise"
        )


def foreign_features(measurement: Measurement, target: Target) -> list[str]:
    """Return what CPUs of the target have and this one lacks: then it is another kind of device."""
    return sorted(set(target.cpu_features) - set(measurement.environment.cpu_features))


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number of things: ``1 sample``, ``2 samples``."""
    return f"{number} {noun}" if number == 1 else f"{number} {plural or noun + 's'}"


def _allowed_spread(measurement: Measurement, target: Target) -> float:
    """Return how far speeds may vary: what the target's own kind of device keeps, or a tenth."""
    if foreign_features(measurement, target):
        return max(target.max_spread, SPREAD_ELSEWHERE)
    return target.max_spread


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
