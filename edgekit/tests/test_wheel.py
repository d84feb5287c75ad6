"""What a Raspberry Pi gets: the wheel in an environment of its own, without torch."""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from edgekit import formats
from edgekit.export import export


pytestmark = [pytest.mark.toolchain, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build("wheel", tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    return build("sdist", tmp_path_factory.mktemp("dist"))


def build(kind, out):
    """Build a distribution, and return its only file."""
    subprocess.run(
        [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(out)],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def device_python(wheel, tmp_path_factory):
    """A fresh virtual environment with the locks of devices; pip's cache spares the compiler."""
    home = tmp_path_factory.mktemp("device") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    python = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    names = [f".ci/locks/{name}.txt" for name in ("run-gguf", "run-onnx", "mlc-compile")]
    install(python, "--no-deps", "--require-hashes", *(w for name in names for w in ("-r", name)))
    install(python, "--no-deps", str(wheel))
    subprocess.run([str(python), "-m", "pip", "check"], check=True)
    # Of what its wheel asks for, to make programs, nothing is used to run them.
    install(python, "--no-deps", f"executorch=={metadata.version('executorch')}")
    return python


def install(python, *words):
    subprocess.run(
        [str(python), "-m", "pip", "install", "-q", *words],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip


def run(python, *words, cwd):
    return subprocess.run(
        [str(python), *map(str, words)], capture_output=True, text=True, cwd=cwd, check=False
    )


def test_the_wheel_has_targets_and_data_but_no_tests(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "edgekit/_targets/raspberry-pi-5-8gb.toml" in names
    assert "edgekit/schemas/measurement.schema.json" in names
    assert "edgekit/measuring/report_template.html" in names
    assert "edgekit/text/corpus/english.txt" in names
    assert "edgekit/formats/executorch/shim.cpp" in names
    assert "edgekit/formats/gguf/llama_cpp.cmake" in names
    assert "edgekit/formats/mlc/libraries.toml" in names
    assert "edgekit/formats/mlc/index.html" in names
    assert "optimum/commands/register/register_edgekit.py" in names
    assert not [name for name in names if "/tests/" in name]


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_two_builds_have_the_same_bytes(kind, request, tmp_path):
    first = request.getfixturevalue(kind)
    second = build(kind, tmp_path)
    assert second.name == first.name
    assert second.read_bytes() == first.read_bytes()


def test_the_licence_is_in_the_wheel_and_in_the_source_distribution(wheel, sdist):
    licence = (ROOT / "LICENSE").read_bytes()
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith("/licenses/LICENSE")]
    assert archive.read(name) == licence
    with tarfile.open(sdist) as sources:
        held = sources.extractfile(f"{sdist.name.removesuffix('.tar.gz')}/LICENSE")
        assert held is not None
        assert held.read() == licence


def test_the_core_needs_at_most_five_packages_and_no_torch(wheel):
    archive = zipfile.ZipFile(wheel)
    (path,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
    lines = archive.read(path).decode().splitlines()
    core = [line for line in lines if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert 0 < len(core) <= 5
    assert not any("torch" in line for line in core)


RUN_HERE = [name for name in formats.names() if formats.running(name).is_run_here(None)]


@pytest.fixture(scope="module", params=RUN_HERE)
def bundle(request, tiny_checkpoint, tiny_bundle, tmp_path_factory):
    """A proven bundle of each format."""
    if request.param == "gguf":
        return tiny_bundle
    out = tmp_path_factory.mktemp("other") / request.param
    export(
        tiny_checkpoint, "raspberry-pi-5-8gb", format=request.param, context_tokens=128, out=out,
        quant=next(iter(formats.get(request.param).RECIPES)),
    )  # fmt: skip
    return out


def test_a_bundle_answers_where_no_torch_is_installed(device_python, bundle, tmp_path):
    probe = run(
        device_python, "-c",
        "import importlib.util as u; print([n for n in ('torch', 'transformers', 'peft', 'gguf') "
        "if u.find_spec(n)])",
        cwd=tmp_path,
    )  # fmt: skip
    assert probe.stdout.strip() == "[]"
    done = run(
        device_python, "-m", "edgekit", "run", bundle, "hello", "--max-tokens", 4, "--json",
        "--threads", 1, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["answer_tokens"] > 0


def test_it_measures_there_too_and_says_what_else_it_would_need(
    device_python, tiny_bundle, tmp_path
):
    done = run(
        device_python, "-m", "edgekit", "validate", tiny_bundle, "--target",
        _roomy_target(tmp_path), "--repetitions", 3, "--threads", 1, "--json", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode in {0, 4}, done.stderr  # a busy machine may be too noisy to judge
    assert json.loads(done.stdout)["outcome"] in {"pass", "unstable"}
    refused = run(
        device_python, "-m", "edgekit", "export", "demo", "--target", "raspberry-pi-5-8gb",
        cwd=tmp_path,
    )  # fmt: skip
    assert refused.returncode == 5
    assert "pip install 'edgekit[gguf]'" in refused.stderr


def _roomy_target(directory):
    """Return a target whose prompts fit the tiny bundle's context."""
    text = (ROOT / "targets" / "raspberry-pi-5-8gb.toml").read_text()
    path = directory / "roomy.toml"
    for old, new in (
        ('prompt = "128 tokens"', 'prompt = "16 tokens"'),
        ('prompt = "512 tokens"', 'prompt = "32 tokens"'),
        ('answer = { value = "128 tokens"', 'answer = { value = "16 tokens"'),
    ):
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return path


def test_doctor_finds_every_runtime_there_and_says_what_is_not_made_there(device_python, tmp_path):
    done = run(device_python, "-m", "edgekit", "doctor", "--json", cwd=tmp_path)
    found = {finding["name"]: finding for finding in json.loads(done.stdout)}
    for name in RUN_HERE:
        assert found[f"{name} back-end"]["state"] == "ok", found[f"{name} back-end"]
    assert "cannot be exported" in found["executorch back-end"]["found"]
