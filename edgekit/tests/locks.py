"""Locks: every package of an environment, with its version and the hashes of its files.

``python -m edgekit.tests.locks`` resolves `pyproject.toml` with uv (``pip install uv``), for every
Python and system at once, and writes ``.ci/locks/*.txt`` for ``pip --require-hashes``. What is
locked already keeps its version while that satisfies `pyproject.toml`; ``--upgrade`` takes the
newest of everything.
"""

import argparse
import re
import subprocess
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
DIRECTORY = ROOT / ".ci" / "locks"
OLDEST_PYTHON = "3.11"
EXTRAS = {  # by file, the extras of edgekit that are locked in it
    "ci": ("all", "dev"),
    "all": ("all",),
    "test": ("test",),
    "run-gguf": ("run-gguf",),
    "run-onnx": ("run-onnx",),
    "run-executorch": ("run-executorch",),
    "mlc-compile": ("mlc-compile",),
}
# What a device needs to run a format.
DEVICES = ("run-gguf", "run-onnx", "run-executorch", "mlc-compile")
# What builds edgekit, and what comes as sources only: llama-cpp-python and antlr4-python3-runtime.
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
BUILD = (
    *PROJECT["build-system"]["requires"], "editables>=0.5",
    "scikit-build-core>=0.9.2", "cmake>=3.21", "ninja>=1.5", "setuptools", "wheel",
)  # fmt: skip
CUDA = re.compile(r"(cuda|nvidia)-|triton$")  # of PyPI's torch on Linux; that for CPUs needs none
# PyTorch's own index has builds for CPUs, a tenth of the size; `==2.13.0` accepts `2.13.0+cpu`.
CPU_WHEELS = {
    "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl": (
        "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b"
    ),
}
ENTRY = re.compile(
    r"^(?P<name>[\w.-]+)==(?P<version>\S+)(?: ; (?P<marker>[^\\\n]+?))?"
    r"(?P<hashes>(?: \\\n +--hash=sha256:[0-9a-f]{64})+)$",
    re.MULTILINE,
)


@dataclass(frozen=True, kw_only=True)
class Locked:
    """One package of a lock."""

    name: str
    version: str
    marker: str  # empty: everywhere
    sha256: tuple[str, ...]  # of each of its files

    @property
    def text(self) -> str:
        """It as pip reads it."""
        marker = f" ; {self.marker}" if self.marker else ""
        hashes = "".join(f" \\\n    --hash=sha256:{value}" for value in self.sha256)
        return f"{self.name}=={self.version}{marker}{hashes}\n"


def read(name: str) -> dict[str, Locked]:
    """Return the packages of a lock of this repository, by name."""
    return parse((DIRECTORY / f"{name}.txt").read_text(encoding="utf-8"))


def parse(text: str) -> dict[str, Locked]:
    """Return the packages of a requirements file with hashes, by name."""
    locked = (
        Locked(
            name=found["name"],
            version=found["version"],
            marker=found["marker"] or "",
            sha256=tuple(sorted(re.findall(r"[0-9a-f]{64}", found["hashes"]))),
        )
        for found in ENTRY.finditer(text)
    )
    return {package.name: package for package in locked}


def write(*, upgrade: bool = False) -> None:
    """Resolve everything, and write all locks."""
    DIRECTORY.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        build, everything = Path(directory) / "build.in", Path(directory) / "everything.txt"
        build.write_text("\n".join(BUILD), encoding="utf-8")
        if not upgrade:
            known = (path.read_text(encoding="utf-8") for path in sorted(DIRECTORY.glob("*.txt")))
            everything.write_text("\n".join(known), encoding="utf-8")
        _resolve([build, *_project("ci")], out=everything)
        _store("build", _locked([build], within=everything))
        for name in EXTRAS:
            found = _locked(_project(name), within=everything)
            _store(name, (package for package in found if not CUDA.match(package.name)))
        everything_locked = parse(everything.read_text(encoding="utf-8")).values()
        _store("cuda", (package for package in everything_locked if CUDA.match(package.name)))
        _store("cpu", _cpu_builds())


def _project(name: str) -> list[str | Path]:
    return ["pyproject.toml", *(word for extra in EXTRAS[name] for word in ("--extra", extra))]


def _locked(words: Sequence[str | Path], *, within: Path) -> Iterable[Locked]:
    """Return what requirements bring, at the versions of a lock of more."""
    out = within.with_name("some.txt")
    out.unlink(missing_ok=True)
    _resolve([*words, "--constraint", within], out=out)
    return parse(out.read_text(encoding="utf-8")).values()


def _resolve(words: Sequence[str | Path], *, out: Path) -> None:
    """Write a lock; a version that ``out`` holds already is kept if it can be."""
    command = [
        "uv", "pip", "compile", *words, "--output-file", out, "--quiet", "--no-config",
        "--universal", "--python-version", OLDEST_PYTHON, "--generate-hashes",
        "--no-annotate", "--no-header", "--no-emit-package", "pip",
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True)


def _store(name: str, packages: Iterable[Locked]) -> None:
    lines = [
        "# Made by `python -m edgekit.tests.locks`; install it with\n",
        f"# pip install --no-deps --require-hashes -r .ci/locks/{name}.txt\n\n",
        *(package.text for package in packages),
    ]
    (DIRECTORY / f"{name}.txt").write_text("".join(lines), encoding="utf-8")


def _cpu_builds() -> Iterator[Locked]:
    """Yield the packages of `CPU_WHEELS`."""
    names = {tuple(wheel.split("-")[:2]) for wheel in CPU_WHEELS}
    for name, version in sorted(names):
        found = [value for wheel, value in CPU_WHEELS.items() if f"{name}-{version}-" in wheel]
        yield Locked(name=name, version=version, marker="", sha256=tuple(sorted(found)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions")
    write(upgrade=parser.parse_args().upgrade)
