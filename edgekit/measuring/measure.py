"""Measure a bundle: one fresh process for each repetition, on the device, every sample kept.

``python -m edgekit.measuring.measure BUNDLE --workload JSON`` is one repetition. It needs the
standard library and what the runtime needs, and prints one JSON document on its last line.
`measure_bundle` starts such processes and collects what they say.
"""

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgekit import formats, installed
from edgekit.browser.devtools import KilledError
from edgekit.bundle.manifest import Artifact, Bundle
from edgekit.encodings.json_files import parse
from edgekit.errors import (
    BudgetError,
    BundleError,
    EdgekitError,
    MissingDependencyError,
    ToolchainError,
    UsageError,
)
from edgekit.measuring.devices import Device, Finished
from edgekit.measuring.machine import Machine, Watch, cached_share, faults, forget
from edgekit.measuring.measurement import (
    ColdStart,
    Environment,
    Generation,
    Measurement,
    Repetition,
    Workload,
    read_fields,
)
from edgekit.runtime.child import KILLED
from edgekit.runtime.session import Session


DEFAULT_REPETITIONS = 5
WARM_UP_TOKENS = 8

RepetitionProgress = Callable[[int, int], None]  # repetitions done, repetitions to do

_MODULE = "edgekit.measuring.measure"


def measure_bundle(  # noqa: PLR0913 - what, where and how, and what is known already
    bundle: Bundle,
    device: Device,
    workload: Workload,
    *,
    repetitions: int = DEFAULT_REPETITIONS,
    environment: Environment | None = None,
    progress: RepetitionProgress | None = None,
) -> Measurement:
    """Measure a bundle on a device.

    One process more comes first, for a cold start; the others find the artifact in memory.

    Args:
        bundle: What to measure.
        device: Where.
        workload: What every process does.
        repetitions: How many processes.
        environment: What `environment_of` said, where it was asked already.
        progress: Called before each repetition and after the last.

    Raises:
        MissingDependencyError: If the device lacks the runtime; the hint says what to install.
        ToolchainError: If a process fails for another reason than a lack of memory.
    """
    measurement = Measurement(
        device=device.label,
        artifact_sha256=artifact_sha256(bundle.artifact),
        workload=workload,
        environment=environment or environment_of(bundle, device),
        repetitions=(),
    )
    if progress:
        progress(0, repetitions)
    measurement = _start_cold(measurement, bundle, device)
    return add_repetitions(measurement, bundle, device, count=repetitions, progress=progress)


def _start_cold(measurement: Measurement, bundle: Bundle, device: Device) -> Measurement:
    arguments = _workload_arguments(measurement, bundle, device)
    finished = device.run_module(_MODULE, [*arguments, "--cold"])
    if finished.status == KILLED:
        return dataclasses.replace(measurement, deaths=(f"the cold start {finished.death}",))
    fields = _answer(finished, "cold_start", device, bundle)
    cold_start = read_fields(ColdStart, fields, of="cold_start")
    return dataclasses.replace(measurement, cold_start=cold_start)


def add_repetitions(
    measurement: Measurement,
    bundle: Bundle,
    device: Device,
    *,
    count: int,
    progress: RepetitionProgress | None = None,
) -> Measurement:
    """Return the measurement with ``count`` more repetitions.

    The first one that the system kills for lack of memory is the last: more would be killed, too.
    """
    arguments = _workload_arguments(measurement, bundle, device)
    done = list(measurement.repetitions)
    total = len(done) + count
    while len(done) < total and not measurement.deaths:
        if progress:
            progress(len(done), total)
        finished = device.run_module(_MODULE, arguments)
        if finished.status == KILLED:
            death = f"repetition {len(done) + 1} {finished.death}"
            return dataclasses.replace(
                measurement, repetitions=tuple(done), deaths=(*measurement.deaths, death)
            )
        fields = _answer(finished, "repetition", device, bundle)
        done.append(read_fields(Repetition, fields, of="repetition"))
    if progress:
        progress(total, total)
    return dataclasses.replace(measurement, repetitions=tuple(done))


def _workload_arguments(measurement: Measurement, bundle: Bundle, device: Device) -> list[str]:
    workload = json.dumps(dataclasses.asdict(measurement.workload))
    return [device.push(bundle.directory), "--workload", workload]


def environment_of(bundle: Bundle, device: Device) -> Environment:
    """Return what the device is, and make sure that it can open the bundle's format.

    Raises:
        MissingDependencyError: If it lacks the runtime.
    """
    arguments = [device.push(bundle.directory), "--environment"]
    finished = device.run_module(_MODULE, arguments)
    fields = _answer(finished, "environment", device, bundle)
    return read_fields(Environment, fields, of="environment")


def artifact_sha256(artifact: Artifact) -> str:
    """Return one hash for all files of an artifact: over their names and hashes, sorted."""
    lines = (f"{name} {record.sha256}\n" for name, record in sorted(artifact.files.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _answer(finished: Finished, name: str, device: Device, bundle: Bundle) -> object:
    """Return the field of that name on the last line, or raise what the process refused."""
    lines = finished.output.strip().splitlines()
    try:
        answer = json.loads(lines[-1]) if lines else None
    except ValueError:
        answer = None
    if isinstance(answer, dict) and name in answer:
        return answer[name]
    if isinstance(answer, dict) and "error" in answer:
        raise _refusal(answer["error"], device, bundle)
    what = finished.death or f"ended with status {finished.status}"
    raise ToolchainError(
        f"measuring on {device.label} failed: the process {what}", log=finished.log[-4000:]
    )


def _refusal(error: dict[str, Any], device: Device, bundle: Bundle) -> EdgekitError:
    message = f"{device.label}: {error['message']}"
    if error["exit_status"] == MissingDependencyError.exit_status and not device.is_browser:
        extra = formats.get(bundle.artifact.format).RUN_EXTRA
        line = " ".join(f"'{requirement}'" for requirement in installed.requirements_of(extra))
        hint = f"run there: {device.python} -m pip install {line}"
        return MissingDependencyError(message, hint=hint)
    for kind in (UsageError, BundleError, BudgetError, MissingDependencyError):
        if error["exit_status"] == kind.exit_status:
            return kind(message, hint=error["hint"])
    return ToolchainError(message, hint=error["hint"], log=error["log"])


# What follows runs on the device.


def repeat(directory: Path, workload: Workload, machine: Machine) -> Repetition:
    """Load a bundle, warm up and time the workload, once.

    Raises:
        BundleError: If the bundle is damaged.
        MissingDependencyError: If the runtime is not installed.
    """
    started = time.perf_counter()
    bundle = Bundle.load(directory, check_hashes=False)
    cached = cached_share_of(bundle)
    with Watch(machine, started=started) as watch:
        session, load_s = _load(bundle, workload)
        warm_up = _warm_up(session, workload)
        watch.begin()
        generations = _time_generations(session, workload)
    session.close()
    return Repetition(
        load_s=load_s,
        cached_before_load=cached,
        warm_up=warm_up,
        generations=generations,
        memory_peaks_bytes=watch.peaks_bytes(),
        memory_over_time=watch.points,
        conditions=watch.conditions,
    )


def start_cold(directory: Path, workload: Workload) -> ColdStart:
    """Load a bundle that the kernel was asked to forget, and wait for a first token."""
    # Hashing would read the files into the page cache that this must find empty.
    bundle = Bundle.load(directory, check_hashes=False)
    for name in bundle.artifact.files:
        forget(bundle.directory / name)
    cached = cached_share_of(bundle)
    session, load_s = _load(bundle, workload)
    generation = _warm_up(session, workload)
    session.close()
    return ColdStart(
        load_s=load_s,
        first_token_s=generation.first_token_s,
        prompt_tokens=generation.prompt_tokens,
        cached_before_load=cached,
    )


def prompt_ids(vocabulary_tokens: int, length: int) -> list[int]:
    """Return a prompt of that length, the same for everyone.

    Special tokens stand at either end of a vocabulary, so the ids come from its middle half, and
    with a step that is prime, so that they differ. What a token costs does not depend on its id.
    """
    first, span = vocabulary_tokens // 4, max(1, vocabulary_tokens // 2)
    return [first + index * 7919 % span for index in range(length)]


def _load(bundle: Bundle, workload: Workload) -> tuple[Session, float]:
    running = formats.running(bundle.artifact.format)  # imported before the clock starts
    started = time.perf_counter()
    session = running.load(
        bundle.artifact_path, context_tokens=workload.context_tokens, threads=workload.threads
    )
    return session, time.perf_counter() - started


def _warm_up(session: Session, workload: Workload) -> Generation:
    prompt = prompt_ids(session.vocabulary_tokens, min(workload.prompt_lengths_tokens))
    return _generate(session, prompt, answer_tokens=min(WARM_UP_TOKENS, workload.answer_tokens))


def _time_generations(session: Session, workload: Workload) -> tuple[Generation, ...]:
    prompts = [
        prompt_ids(session.vocabulary_tokens, length)
        for length in workload.prompt_lengths_tokens
        for _ in range(workload.generations)
    ]
    return tuple(
        _generate(session, prompt, answer_tokens=workload.answer_tokens) for prompt in prompts
    )


def _generate(session: Session, prompt: Sequence[int], *, answer_tokens: int) -> Generation:
    """Time one answer, chosen greedily; it goes on past a stop id, to have the length asked."""
    session.reset()
    started = time.perf_counter()
    token = int(session.prefill(prompt).argmax())
    first_token_s = time.perf_counter() - started
    decode_s, decode_cpu_s, faults_before = [], [], faults()
    for _ in range(answer_tokens - 1):
        wall, cpu = time.perf_counter(), time.process_time()
        token = int(session.decode(token).argmax())
        decode_s.append(time.perf_counter() - wall)
        decode_cpu_s.append(time.process_time() - cpu)
    major, minor = _difference(faults_before, faults())
    return Generation(
        prompt_tokens=len(prompt),
        first_token_s=first_token_s,
        decode_s=tuple(decode_s),
        decode_cpu_s=tuple(decode_cpu_s),
        major_faults=major,
        minor_faults=minor,
    )


def _difference(
    before: tuple[int, int] | None, after: tuple[int, int] | None
) -> tuple[int | None, int | None]:
    if before is None or after is None:
        return None, None
    return after[0] - before[0], after[1] - before[1]


def cached_share_of(bundle: Bundle) -> float | None:
    """Return the share of the artifact's bytes that is in memory."""
    cached_bytes = 0.0
    for name, record in bundle.artifact.files.items():
        share = cached_share(bundle.directory / name) if record.size_bytes else 0.0
        if share is None:
            return None
        cached_bytes += share * record.size_bytes
    return cached_bytes / max(1, bundle.artifact.size_bytes)


def _describe(directory: Path, machine: Machine) -> Environment:
    bundle = Bundle.load(directory, check_hashes=False)
    return machine.environment(["numpy", *bundle.tools])


def arguments_of(words: Sequence[str] | None) -> argparse.Namespace:
    """Return what a process is asked to do."""
    parser = argparse.ArgumentParser(prog=f"python -m {_MODULE}", description=__doc__)
    parser.add_argument("bundle", type=Path)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--workload", metavar="JSON", help="measure once")
    task.add_argument("--environment", action="store_true", help="describe this machine")
    task.add_argument("--check", action="store_true", help="check the hashes of the bundle")
    parser.add_argument("--cold", action="store_true", help="with the artifact in storage only")
    return parser.parse_args(words)


def _perform(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.check:
        Bundle.load(arguments.bundle)
        return {"whole": True}
    if arguments.environment:
        return {"environment": dataclasses.asdict(_describe(arguments.bundle, Machine()))}
    workload = read_fields(Workload, parse(arguments.workload), of="workload")
    if arguments.cold:
        return {"cold_start": dataclasses.asdict(start_cold(arguments.bundle, workload))}
    return {"repetition": dataclasses.asdict(repeat(arguments.bundle, workload, Machine()))}


def main(words: Sequence[str] | None = None) -> int:
    """Perform one task on the device; print its result, or its refusal, as one line of JSON."""
    return report(lambda: _perform(arguments_of(words)))


def report(perform: Callable[[], dict[str, Any]]) -> int:
    """Perform a task and print its result, or its refusal, as one line; return its status."""
    try:
        answer, status = perform(), 0
    except KilledError:
        raise
    except EdgekitError as error:
        status = error.exit_status
        fields = {"message": str(error), "hint": error.hint, "log": getattr(error, "log", "")}
        answer = {"error": {"exit_status": status, **fields}}
    print(f"\n{json.dumps(answer)}", flush=True)  # noqa: T201  # its result, read by a program
    return status


if __name__ == "__main__":
    sys.exit(main())
