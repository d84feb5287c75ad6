"""The import contract: it covers every module, and a newcomer to a wing needs no line in it."""

import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "edgekit"
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
    "importlinter"
]["contracts"]
# The command line leads to both sides; a format is parted in `running` and `writing`.
ON_NEITHER_SIDE = {"__init__", "__main__", "cli", "formats", "tests"}


def wings():
    return {path.parent.name for path in PACKAGE.glob("*/__init__.py")} - {"tests"}


def modules():
    found = {path.stem for path in PACKAGE.glob("*.py")} | wings()
    assert len(found) > 20
    return found


def names_in(contract, field):
    return {name.split(".")[1] for name in contract[field] if name.startswith("edgekit.")}


def test_every_module_is_on_the_devices_side_or_on_the_workstations():
    (sides,) = (c for c in CONTRACTS if "device" in c["name"])
    device = names_in(sides, "source_modules")
    workstation = names_in(sides, "forbidden_modules")
    assert device & workstation == {"formats"}
    assert (device | workstation | ON_NEITHER_SIDE) == modules() | {"tests"}


def test_the_contract_tells_the_whole_truth():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert "exclude_type_checking_imports" not in text
    assert "unmatched_ignore_imports_alerting" not in text  # an ignore without a match is an error
    ignored = [line for contract in CONTRACTS for line in contract.get("ignore_imports", ())]
    assert ignored == ["edgekit.formats.executorch.stock_runtime -> torch"]


@pytest.fixture
def copy(tmp_path):
    """A tree to put modules into, as somebody who adds one would."""
    pytest.importorskip("importlinter")
    ignored = shutil.ignore_patterns("tests", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "edgekit", ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint(directory):
    done = subprocess.run(
        [Path(sysconfig.get_path("scripts")) / "lint-imports"], cwd=directory,
        env={"PYTHONPATH": str(directory), "PATH": str(Path(sys.executable).parent)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


@pytest.mark.toolchain
def test_a_file_put_into_a_wing_needs_no_edit_elsewhere(copy):
    assert len(wings()) > 10
    for wing in wings():
        (copy / "edgekit" / wing / "newcomer.py").write_text('"""A newcomer."""\n')
    status, said = lint(copy)
    assert status == 0, said


@pytest.mark.toolchain
@pytest.mark.parametrize(
    ("place", "imported"),
    [
        ("runtime", "edgekit.source.checkpoint"), ("text", "torch"),
        ("model", "edgekit.quant.grid"),
        ("formats/gguf", "edgekit.source.checkpoint"), ("formats/gguf", "edgekit.formats.onnx"),
    ],
)  # fmt: skip
def test_one_that_reaches_where_it_must_not_is_found(copy, place, imported):
    (copy / "edgekit" / place / "newcomer.py").write_text(
        f'"""A newcomer."""\n\n\ndef reach() -> None:\n    import {imported}\n'
    )
    status, said = lint(copy)
    assert status == 1
    assert f"newcomer -> {imported}" in said
