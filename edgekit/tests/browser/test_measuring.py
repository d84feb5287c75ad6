"""A tiny bundle is measured in a real Chromium, as the command line does it."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

import jsonschema
import pytest

import edgekit
from edgekit import target
from edgekit.browser import chromium
from edgekit.browser.options import BrowserOptions, Limits
from edgekit.errors import BudgetError
from edgekit.formats import GpuBuffer
from edgekit.measuring import in_browser
from edgekit.measuring.measurement import Measurement
from edgekit.target import FirstTokenLimit
from edgekit.tests.browser.test_chromium import wait_for_end
from edgekit.validate import plan_workload, validate


pytestmark = [pytest.mark.toolchain, pytest.mark.usefixtures("needs_browser")]


@pytest.fixture
def browser_target():
    found = target.load("webgpu-desktop-integrated")
    budget = dataclasses.replace(
        found.budget, answer_tokens=4, context_tokens=128,
        first_token=(FirstTokenLimit(prompt_tokens=40, limit_s=60.0),),
    )  # fmt: skip
    return dataclasses.replace(found, budget=budget)


def check(result, name):
    return next(check for check in result.verdict.checks if check.name.startswith(name))


def test_a_browser_is_measured_like_any_device(onnx_bundle, browser_target):
    result = validate(
        onnx_bundle.directory, browser_target, device="browser?adapter=software", repetitions=1
    )
    (repetition,), cold = result.measurement.repetitions, result.measurement.cold_start

    assert repetition.browser is not None
    assert cold is not None
    assert cold.answers is not None
    assert repetition.browser.backend == "webgpu"
    assert check(result, "peak memory").measured > 200 << 20
    assert "process tree pss" in check(result, "peak memory").basis
    answers = check(result, "answers")
    assert answers.outcome == "pass"
    assert answers.measured < 1e-4
    assert cold.answers.said_ids
    assert check(result, "decoding").is_void
    assert any("not judged: software adapter" in doubt for doubt in result.verdict.doubts)
    assert any("of memory was predicted" in note for note in result.verdict.notes)
    assert any("subgroups" in note for note in result.verdict.notes)
    assert check(result, "maxStorageBufferBindingSize").measured == 128 << 20  # the target's

    text = (resources.files("edgekit") / "schemas/measurement.schema.json").read_text("utf-8")
    document = result.measurement.to_json()
    jsonschema.validate(json.loads(document), json.loads(text))
    assert Measurement.from_json(document) == result.measurement


def test_what_the_target_does_not_grant_is_over_budget(
    onnx_bundle,
    browser_target,
    monkeypatch,
):
    """Seen in the page, whose GPU is held to the target's limits."""
    from edgekit.formats.onnx import browsing

    request = browsing.request(onnx_bundle.artifact_path, context_tokens=128)
    greedy = dataclasses.replace(
        request, largest_buffer=GpuBuffer(name="big", size_bytes=200 << 20)
    )
    monkeypatch.setattr(browsing, "request", lambda *_, **__: greedy)
    options = BrowserOptions.parse("browser?backend=webgpu&adapter=software")
    limits = Limits(at_most={"maxStorageBufferBindingSize": 128 << 20})
    workload = plan_workload(
        onnx_bundle, browser_target, in_browser.describe(onnx_bundle.directory, options)
    )
    with pytest.raises(BudgetError, match=r"big needs 200 MiB of maxStorageBufferBindingSize"):
        in_browser.repeat(
            onnx_bundle.directory, workload, dataclasses.replace(options, limits=limits)
        )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_measurement_that_is_ended_leaves_no_browser_and_no_profile(
    onnx_bundle, short_place, number
):
    command = [
        sys.executable, "-m", "edgekit", "validate", str(onnx_bundle.directory),
        "--device", "browser?backend=wasm",
    ]  # fmt: skip
    environment = os.environ | {"TMPDIR": str(short_place)}
    root = Path(edgekit.__file__).parents[1]
    with subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        browsers = wait_for_browser(process.pid)
        process.send_signal(number)
    wait_for_end(browsers)
    if number == signal.SIGTERM:
        assert [*short_place.iterdir()] == []
    scratch_of(short_place)
    assert [*short_place.iterdir()] == []  # at the latest with what edgekit does next


def wait_for_browser(pid):
    limit, found = time.monotonic() + 60, []
    while time.monotonic() < limit:
        found = chromium.tree(pid)
        if len(found) > 5:  # edgekit, its child, and some of the browser's
            return found[1:]
        time.sleep(0.05)
    raise AssertionError(found)


def scratch_of(place):
    """Start something that needs a directory for a while, there."""
    script = "from edgekit import scratch; scratch.remove_orphans()"
    root = Path(edgekit.__file__).parents[1]
    environment = os.environ | {"TMPDIR": str(place)}
    subprocess.run([sys.executable, "-c", script], check=True, cwd=root, env=environment)


def test_a_software_adapter_is_given_little_to_do(onnx_bundle, browser_target):
    environment = in_browser.describe(
        onnx_bundle.directory, BrowserOptions.parse("browser?adapter=software")
    )
    workload = plan_workload(onnx_bundle, browser_target, environment)
    assert environment.browser is not None
    assert environment.browser.is_software
    assert (workload.generations, workload.answer_tokens) == (1, 4)
    assert environment.versions["onnxruntime-web"]
