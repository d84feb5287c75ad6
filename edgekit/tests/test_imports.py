"""What importing costs, in fresh interpreters: a Raspberry Pi waits for every package."""

import functools
import subprocess
import sys

import pytest


HEAVY = {
    "click", "gguf", "huggingface_hub", "jinja2", "llama_cpp", "numpy", "peft", "rich",
    "safetensors", "starlette", "tokenizers", "torch", "transformers", "uvicorn",
}  # fmt: skip
ON_A_DEVICE = [
    "bundle.goldens", "bundle.manifest", "calibrate_target",
    "errors", "formats", "formats.gguf", "inspect",
    "measuring.measure", "measuring.verdict", "run", "runtime.generate", "runtime.session", "serve",
    "target", "text.template", "text.tokenizer", "validate",
]  # fmt: skip
ON_A_WORKSTATION = [
    "compare", "doctor", "export", "merge", "plan", "proof.gates", "source.adapters.merging",
    "source.checkpoint", "source.families", "source.gguf", "source.opening",
]  # fmt: skip
NEVER_ON_A_DEVICE = {
    f"edgekit.{name}"
    for name in (*ON_A_WORKSTATION, "proof.interpreter", "proof.transformers_logits")
}
PRINT_MODULES = "import sys; print(*sys.modules)"


@functools.cache
def loaded(code):
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return set(found.stdout.splitlines()[-1].split())


def modules_after(statement):
    """Return what a fresh interpreter has loaded after a statement, beyond what it starts with."""
    return loaded(f"{statement}\n{PRINT_MODULES}") - loaded(PRINT_MODULES)


def packages(modules):
    return {name.partition(".")[0] for name in modules}


def test_importing_edgekit_loads_the_standard_library_and_one_module():
    found = modules_after("import edgekit")
    assert {name for name in found if name.startswith("edgekit")} == {"edgekit"}
    assert packages(found) - {"edgekit"} <= sys.stdlib_module_names


def test_what_runs_on_a_device_loads_no_heavy_package_and_nothing_of_a_workstation():
    names = ", ".join(f"edgekit.{name}" for name in ON_A_DEVICE)
    found = modules_after(f"import {names}")
    assert packages(found) & HEAVY == set()
    assert found & NEVER_ON_A_DEVICE == set()


def test_what_runs_on_a_workstation_loads_heavy_packages_only_when_it_works():
    names = ", ".join(f"edgekit.{name}" for name in ON_A_WORKSTATION)
    assert packages(modules_after(f"import {names}")) & HEAVY == set()


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["run", "--help"], ["export", "--help"]]
)
def test_help_comes_without_the_verbs(arguments):
    found = modules_after(
        "import contextlib\n"
        "from edgekit.cli import main\n"
        f"with contextlib.suppress(SystemExit): main({arguments!r})"
    )
    assert packages(found) & HEAVY == {"click"}
    assert {name for name in found if name.startswith("edgekit.")} == {
        "edgekit.cli", "edgekit.encodings", "edgekit.encodings.visible", "edgekit.errors",
        "edgekit.versions",
    }  # fmt: skip


def test_python_dash_m_is_the_command():
    found = subprocess.run(
        [sys.executable, "-m", "edgekit", "--help"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert found.stdout.startswith("Usage: edgekit ")
    assert found.stderr == ""


def test_a_public_name_loads_its_own_module_only():
    found = modules_after("import edgekit; edgekit.load_target")
    assert "edgekit.target" in found
    assert found & {"edgekit.run", "edgekit.export", "edgekit.formats"} == set()
