"""The device keeps the target's budget, by the rules of `edgekit validate`."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from edgekit.bundle.manifest import Bundle
from edgekit.measuring.devices import Device
from edgekit.measuring.measure import environment_of, measure_bundle
from edgekit.measuring.report import Result, as_text, summarize
from edgekit.measuring.verdict import LEAST_PROCESSES, judge
from edgekit.target import Target
from edgekit.units import format_bytes
from edgekit.validate import plan_workload, validate


Record = Callable[[str, object], None]

FEW_TOKENS = 8  # of an answer: memory peaks while the longest prompt is read


def test_the_memory_of_fresh_processes_stays_within_the_budget(
    bundle: Bundle, target: Target, device: Device, threads: int | None, record_property: Record
):
    environment = environment_of(bundle, device)
    workload = plan_workload(bundle, target, environment, threads=threads)
    short = replace(workload, answer_tokens=FEW_TOKENS, generations=1)
    measurement = measure_bundle(bundle, device, short, repetitions=LEAST_PROCESSES)
    verdict = judge(measurement, bundle, target)
    check = next(check for check in verdict.checks if check.name == "peak memory")
    limit = format_bytes(check.limit)
    if check.measured is None and check.outcome != "fail":
        pytest.skip(f"{device.label} does not tell how much memory a process takes")
    found = "no peak" if check.measured is None else format_bytes(check.measured)
    finding = f"{found}, expected at most {limit} ({check.basis})"
    assert check.outcome != "fail", finding
    if check.outcome == "inconclusive":
        pytest.skip(finding)
    record_property("peak memory", finding)


@pytest.fixture
def result(
    bundle_directory: Path, target: Target, device_name: str, pytestconfig: pytest.Config
) -> Result:
    options = pytestconfig.option
    return validate(
        bundle_directory,
        target,
        device=device_name,
        repetitions=options.repetitions,
        threads=options.threads,
    )


@pytest.mark.latency
def test_the_budget_is_kept_steadily(result: Result, record_property: Record):
    verdict = result.verdict
    if verdict.outcome == "fail":
        pytest.fail(f"found {verdict.outcome!r}, expected 'pass'\n{as_text(result)}", pytrace=False)
    if verdict.outcome == "unstable":
        unclear = [check for check in verdict.checks if check.outcome == "inconclusive"]
        unsure = [f"{check.name}: {check.basis}" for check in unclear if not check.is_void]
        pytest.skip(f"{summarize(result)} {'; '.join([*verdict.doubts, *unsure])}")
    record_property("verdict", summarize(result))
