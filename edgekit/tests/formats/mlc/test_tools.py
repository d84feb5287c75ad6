"""What compiles MLC's libraries: what is missing or unfitting is named, with the way out."""

import re

import pytest

from edgekit import versions
from edgekit.errors import MissingDependencyError, ToolchainError
from edgekit.formats.mlc.compiling import tools


FITTING = {"apache-tvm": versions.APACHE_TVM, "apache-tvm-ffi": versions.APACHE_TVM_FFI}


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A directory that is all of PATH."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", str(directory))
    return directory


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that makes a package look installed, as pip's own records do."""
    monkeypatch.syspath_prepend(tmp_path)

    def record(found):
        for package, version in found.items():
            directory = tmp_path / f"{package.replace('-', '_')}-{version}.dist-info"
            directory.mkdir()
            text = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
            (directory / "METADATA").write_text(text)

    return record


def compiler_in(directory, name="clang++"):
    path = directory / name
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)


def test_everything_that_fits_is_enough(programs, install):
    install(FITTING)
    compiler_in(programs)
    assert tools.are_here()
    tools.require("a test")


def test_without_a_compiler_its_installation_is_named(programs, install):
    install(FITTING)
    assert not tools.are_here()
    with pytest.raises(MissingDependencyError, match=r"a test needs a C\+\+ compiler") as refusal:
        tools.require("a test")
    assert "apt install g++" in refusal.value.hint


def test_another_version_is_named_with_the_one_that_is_needed(programs, install):
    install(FITTING | {"apache-tvm": "0.26.0"})
    compiler_in(programs)
    assert not tools.are_here()
    words = f"a test needs apache-tvm {versions.APACHE_TVM}, 0.26.0 is installed"
    with pytest.raises(MissingDependencyError, match=re.escape(words)) as refusal:
        tools.require("a test")
    assert refusal.value.hint == "pip install 'edgekit[mlc-compile]'"


def test_a_failure_to_compile_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path))

    def fail(path):
        path.write_text("half a library")
        raise ValueError("no such instruction")

    with pytest.raises(ToolchainError, match="cannot compile") as refusal:
        tools.library("a shape", "model.so", fail)
    assert refusal.value.log == "no such instruction"
    assert list(tmp_path.rglob("model.so")) == []


def test_a_library_is_made_once_and_again_when_it_was_altered(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path))
    made = []

    def compile_to(path):
        made.append(path)
        path.write_text("a library")

    first = tools.library("a shape", "model.so", compile_to)
    assert tools.library("a shape", "model.so", compile_to) == first
    assert len(made) == 1
    assert tools.library("another", "model.so", compile_to) != first
    assert len(made) == 2
    first.write_text("something else")
    assert tools.library("a shape", "model.so", compile_to).read_text() == "a library"
    assert len(made) == 3
