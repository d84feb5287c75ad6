import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

import edgekit
from edgekit.bundle.manifest import Artifact
from edgekit.encodings.hashing import sha256_of
from edgekit.export import export
from edgekit.measuring.devices import SSH_CONFIG_VARIABLE
from edgekit.tests.needs import needs
from edgekit.tests.tiny.checkpoints import write_tiny_checkpoint
from edgekit.tests.witnesses import real_sshd


pytestmark = [pytest.mark.toolchain, needs("torch", "transformers", "llama_cpp")]

ROOT = Path(edgekit.__file__).parents[1]
TARGET = "raspberry-pi-5-8gb"

# What no device has: importing it anywhere in the suite's processes is an error.
WORKSTATION = ("torch", "transformers", "peft", "safetensors", "gguf", "huggingface_hub")
SITECUSTOMIZE = f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {WORKSTATION}:
            raise ImportError(name + " is not on a device")

sys.meta_path.insert(0, Refuse())
"""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run of the suite said, test by test."""

    status: int
    output: str
    tests: dict[str, tuple[str, str]]  # name -> (passed, failure, error or skipped; message)

    def names(self, kind):
        return {name for name, (found, _) in self.tests.items() if found == kind}

    def message(self, name):
        return self.tests[name][1]


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    """Return a directory like a device's: the suite alone, and nothing of a workstation."""
    directory = tmp_path_factory.mktemp("device")
    without_caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "device_tests", directory / "device_tests", ignore=without_caches)
    (directory / "site").mkdir()
    (directory / "site" / "sitecustomize.py").write_text(SITECUSTOMIZE)
    (directory / "site" / "edgekit").symlink_to(ROOT / "edgekit")
    (directory / "site" / "targets").symlink_to(ROOT / "targets")
    return directory


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Return a bundle of a tiny random model, exported and proven."""
    directory = tmp_path_factory.mktemp("tiny")
    checkpoint = write_tiny_checkpoint(directory / "checkpoint", "llama")
    return export(checkpoint, TARGET, quant="F32", out=directory / "bundle")


def run_suite(device, bundle_words, *words, place=None, **environment):
    """Run the suite in a directory like a device's, or in ``place``."""
    report = device / "report.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "device_tests", *bundle_words, *words]
    done = subprocess.run(
        [
            *command,
            f"--junitxml={report}",
            "-p",
            "no:cacheprovider",
            f"--basetemp={device / 'tmp'}",
        ],
        cwd=place or device,
        env={**os.environ, "PYTHONPATH": str(device / "site"), "PYTHONWARNINGS": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    tests = dict(map(_read, ET.parse(report).iter("testcase"))) if report.exists() else {}  # noqa: S314
    return Outcome(status=done.returncode, output=done.stdout + done.stderr, tests=tests)


def _read(case):
    kinds = {child.tag: child for child in case if child.tag != "properties"}
    kind = next((kind for kind in ("failure", "error", "skipped") if kind in kinds), "passed")
    message = kinds[kind].get("message", "") if kind in kinds else ""
    return case.get("name"), (kind, message)


def words_for(directory):
    return [f"--bundle={directory}", f"--target={TARGET}", "--threads=1"]


def altered_copy(sound, directory, **fields):
    """Copy a bundle, its directory open for changes; `seal` makes a manifest of what is there."""
    shutil.copytree(sound.directory, directory)
    return replace(sound, directory=directory, **fields)


def seal(bundle):
    artifact = Artifact.of_directory(
        bundle.directory,
        bundle.artifact.entry,
        format=bundle.artifact.format,
        recipe=bundle.artifact.recipe,
    )
    replace(bundle, artifact=artifact).save()


def test_a_sound_bundle_passes_with_nothing_of_a_workstation_installed(device, sound):
    outcome = run_suite(device, words_for(sound.directory), "-m", "not latency")
    assert outcome.status == 0, outcome.output
    assert len(outcome.names("passed")) >= 30
    # Whatever a random model says, it need not end.
    may_skip = {
        "test_an_answer_to_a_simple_question_ends",
        "test_its_greedy_answer_is_the_workstations",
    }
    assert outcome.names("skipped") <= may_skip
    assert all(outcome.message(name) for name in outcome.names("skipped"))
    assert "logits of text 1: mean KL" in outcome.output


def test_a_sound_bundle_passes_from_a_checkout_too_where_warnings_are_errors(device, sound):
    words = ["--bundle", str(sound.directory), "--threads=1"]
    outcome = run_suite(device, words, "-m", "not latency and not slow", place=ROOT)
    assert outcome.status == 0, outcome.output
    assert "rootdir: " + str(ROOT) in outcome.output
    assert "logits of text 1: mean KL" in outcome.output
    assert not outcome.names("error")


def test_a_bundle_that_says_something_else_fails_where_it_does(device, sound, tmp_path):
    bundle = altered_copy(sound, tmp_path / "bundle")
    model = bundle.artifact_path
    content = bytearray(model.read_bytes())
    content[-len(content) // 4 :] = bytes(len(content) // 4)
    model.write_bytes(content)
    template = bundle.directory / "chat_template.jinja"
    template.write_text("Well, " + template.read_text(encoding="utf-8"), encoding="utf-8")
    tokenizer = bundle.directory / "tokenizer.json"
    first_merge = tokenizer.read_text(encoding="utf-8").partition('"merges":')[2].split("]")[0]
    assert first_merge.strip().startswith("[")
    tokenizer.write_text(
        tokenizer.read_text(encoding="utf-8").replace(first_merge + "],", "[", 1), encoding="utf-8"
    )
    digest = sha256_of(template)
    rules = replace(bundle.text, stop_ids=(5,), chat_template_sha256=digest)
    seal(replace(bundle, text=rules))

    outcome = run_suite(device, words_for(bundle.directory), "-k", "not memory and not budget")

    assert outcome.status == 1, outcome.output
    assert outcome.names("failure") == {
        "test_its_logits_are_those_that_were_proven",
        "test_every_text_becomes_the_same_ids",
        "test_every_conversation_renders_to_the_same_text_and_ids",
        "test_what_the_template_puts_after_an_answer_is_a_stop_id",
    }
    assert not outcome.names("error")
    for name in outcome.names("failure"):
        said = outcome.message(name)
        assert "expected" in said or "<=" in said or "the stop ids are (5,)" in said


def test_a_damaged_bundle_is_asked_nothing(device, sound, tmp_path):
    bundle = altered_copy(sound, tmp_path / "bundle")
    content = bytearray(bundle.artifact_path.read_bytes())
    content[len(content) // 2] ^= 1
    bundle.artifact_path.write_bytes(content)

    outcome = run_suite(device, words_for(bundle.directory))

    assert outcome.status == 1
    assert not outcome.names("passed")
    assert not outcome.names("skipped")
    assert "model.gguf is not what was exported: its SHA-256 differs" in outcome.output
    assert "Traceback" not in outcome.output


def write_target(path, *, artifact):
    """Write a target whose workload a context of 256 tokens holds, with a limit of bytes."""
    lines = (ROOT / "targets" / f"{TARGET}.toml").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if '{ prompt = "512 tokens"' not in line]
    assert len(kept) == len(lines) - 1
    text = "\n".join(kept)
    assert text.count('artifact = { value = "2.8 GB"') == 1
    path.write_text(
        text.replace('artifact = { value = "2.8 GB"', f'artifact = {{ value = "{artifact}"')
    )
    return path


def test_an_unproven_bundle_is_no_pass(device, sound, tmp_path):
    bundle = altered_copy(sound, tmp_path / "bundle", agreement=None)
    (bundle.directory / "goldens.json").unlink()
    seal(bundle)
    target = write_target(tmp_path / "roomy.toml", artifact="1 MB")
    words = [f"--bundle={bundle.directory}", f"--target={target}", "--threads=1"]

    outcome = run_suite(device, words, "-k", "proven or budget_is_kept", "--repetitions=1")

    assert outcome.status == 1, outcome.output
    assert outcome.names("failure") == {"test_it_was_proven_to_say_what_its_checkpoint_says"}
    assert "--no-verify" in outcome.message("test_its_logits_are_those_that_were_proven")
    assert "exported without verification" in outcome.message("test_the_budget_is_kept_steadily")


def test_a_missed_budget_fails_with_the_table(device, sound, tmp_path):
    target = write_target(tmp_path / "narrow.toml", artifact="1 kB")
    words = [f"--bundle={sound.directory}", f"--target={target}", "--threads=1"]

    outcome = run_suite(device, words, "-m", "latency", "--repetitions=1")

    assert outcome.names("failure") == {"test_the_budget_is_kept_steadily"}, outcome.output
    assert "1 check is over budget: artifact." in outcome.output


def test_from_afar_it_checks_what_can_be_checked_and_says_where_to_run_the_rest(
    device, sound, tmp_path
):
    if reason := real_sshd.reason_to_skip():
        pytest.skip(reason)
    server = real_sshd.start(tmp_path)
    try:
        outcome = run_suite(
            device,
            words_for(sound.directory),
            "-m",
            "not latency",
            f"--device={server.url}?python={sys.executable}",
            **{SSH_CONFIG_VARIABLE: str(server.client_config)},
        )
    finally:
        real_sshd.stop(server)
    assert outcome.status == 0, outcome.output
    assert outcome.names("passed") == {
        "test_every_file_is_the_one_that_was_exported",
        "test_it_was_proven_to_say_what_its_checkpoint_says",
        "test_the_memory_of_fresh_processes_stays_within_the_budget",
    }
    reasons = {outcome.message(name) for name in outcome.names("skipped")}
    assert len(reasons) == 1
    assert "run `pytest device_tests` on ssh://" in reasons.pop()


def test_without_a_bundle_it_says_what_to_pass(device):
    outcome = run_suite(device, [])
    assert outcome.status == 4
    assert "pass --bundle=DIR" in outcome.output


def test_code_in_a_bundle_is_not_run(device, sound, tmp_path):
    bundle = altered_copy(sound, tmp_path / "bundle")
    trace = tmp_path / "was_run"
    (bundle.directory / "conftest.py").write_text(f"open({str(trace)!r}, 'w').close()\n")

    apart = run_suite(device, ["--bundle", str(bundle.directory)], "-k", "proven")
    joined = run_suite(device, [f"--bundle={bundle.directory}"], "-k", "proven")

    assert not trace.exists()
    for outcome in (apart, joined):
        assert outcome.status != 0
        assert "conftest.py does not belong to" in outcome.output
