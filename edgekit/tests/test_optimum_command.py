"""`optimum-cli export edgekit`: the same options, the same bundles, the same refusals."""

import os
import shutil
import subprocess
import sysconfig
import tomllib
from pathlib import Path

import pytest

from edgekit import cli
from edgekit.bundle.manifest import Bundle


pytestmark = pytest.mark.toolchain
ROOT = Path(__file__).resolve().parents[2]
MODULE = "edgekit/optimum_command.py"
INSTALLED = "optimum/commands/register/register_edgekit.py"  # a namespace of Optimum's


@pytest.fixture(scope="module")
def optimum_cli(tmp_path_factory):
    """Return what runs Optimum with edgekit's module where the wheel has it."""
    pytest.importorskip("optimum.commands.optimum_cli", reason="pip install 'edgekit[optimum]'")
    paths = [str(ROOT)]
    if not (Path(sysconfig.get_path("purelib")) / INSTALLED).exists():  # or Optimum sees it twice
        site = tmp_path_factory.mktemp("site")
        (site / INSTALLED).parent.mkdir(parents=True)
        shutil.copy(ROOT / MODULE, site / INSTALLED)
        paths.append(str(site))
    program = Path(sysconfig.get_path("scripts")) / "optimum-cli"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "100"}

    def run(*words):
        return subprocess.run(
            [str(program), "export", "edgekit", *map(str, words)],
            capture_output=True, text=True, env=environment, check=False,
        )  # fmt: skip

    return run


def test_the_wheel_has_the_module_where_optimum_looks():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included[MODULE] == INSTALLED


def test_help_has_every_option_of_edgekit_export(optimum_cli):
    done = optimum_cli("--help")
    assert done.returncode == 0, done.stderr
    names = {name for option in cli.export_command.params for name in option.opts}
    assert {"--target", "--adapter", "--no-verify"} < names
    for name in names - {"model", "-o", "--out"}:
        assert f" {name}" in done.stdout
    assert "MODEL" in done.stdout
    assert "OUTPUT" in done.stdout


def test_it_makes_the_bundle_that_edgekit_export_makes(optimum_cli, tiny_checkpoint, tmp_path):
    done = optimum_cli(
        tiny_checkpoint, "--target", "raspberry-pi-5-8gb", "--format", "onnx", "--quant", "F32",
        "--context", 64, "--split", "2MB", "--no-verify", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "out")
    bundle = Bundle.load(tmp_path / "out")
    assert (bundle.artifact.format, bundle.artifact.recipe) == ("onnx", "F32")
    assert (bundle.context_tokens, bundle.artifact.split_bytes) == (64, 2_000_000)


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["--target", "raspbery-pi-5-8gb"], 2, "raspberry-pi-5-8gb"),
        (["--target", "raspberry-pi-5-8gb", "--context", "many"], 2, "--context"),
        (["--target", "raspberry-pi-5-8gb", "--adapter", "nowhere"], 2, "nowhere"),
        (["--target", "small.toml", "--context", "64"], 3, "to download"),
        ([], 2, "--target"),
    ],
)
def test_it_refuses_as_edgekit_export_does(  # noqa: PLR0917
    words, status, says, optimum_cli, tiny_checkpoint, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    target = (ROOT / "targets" / "raspberry-pi-5-8gb.toml").read_text(encoding="utf-8")
    assert '"2.8 GB"' in target
    Path("small.toml").write_text(target.replace('"2.8 GB"', '"9 kB"'), encoding="utf-8")
    done = optimum_cli(tiny_checkpoint, *words, "out")
    assert done.returncode == status, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not Path("out").exists()
