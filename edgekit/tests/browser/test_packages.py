import base64
import hashlib
import io
import json
import tarfile

import pytest

from edgekit import formats
from edgekit.browser import packages
from edgekit.errors import MissingDependencyError, ToolchainError
from edgekit.formats import NpmPackage
from edgekit.tests.witnesses.javascript_clients import SCRIPTS


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tarball():
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        entry = tarfile.TarInfo("package/index.js")
        entry.size = 2
        archive.addfile(entry, io.BytesIO(b"{}"))
    return content.getvalue()


def package_of(content):
    digest = base64.b64encode(hashlib.sha512(content).digest()).decode()
    return NpmPackage(name="@tiny/runtime", version="1.0.0", integrity=f"sha512-{digest}")


@pytest.fixture
def pretend_npm(tmp_path, monkeypatch):
    """Put a program named npm first, and count its calls."""
    places = tmp_path / "bin"
    places.mkdir()
    monkeypatch.setenv("PATH", str(places), prepend=":")

    def put(script):
        (places / "npm").write_text(f"#!/bin/sh\necho >> {places}/calls\n{script}\n")
        (places / "npm").chmod(0o755)
        return places / "calls"

    return put


def test_a_package_is_fetched_once_and_its_files_are_kept(pretend_npm, tmp_path):
    (tmp_path / "runtime.tgz").write_bytes(tarball())
    calls = pretend_npm(f'cp {tmp_path}/runtime.tgz "$5"')

    found = [packages.directory(package_of(tarball())) for _ in range(2)]

    assert found[0] == found[1]
    assert (found[0] / "index.js").read_text() == "{}"
    assert calls.read_text().count("\n") == 1


def test_another_file_than_the_one_tested_with_is_refused_and_nothing_is_kept(
    pretend_npm, tmp_path, cache
):
    (tmp_path / "runtime.tgz").write_bytes(tarball())
    pretend_npm(f'cp {tmp_path}/runtime.tgz "$5"')

    with pytest.raises(ToolchainError, match="is not the file that edgekit was tested with"):
        packages.directory(package_of(b"another"))
    assert [*(cache / "npm").iterdir()] == []


def test_npm_that_is_offline_is_said_in_a_sentence_with_its_reason(pretend_npm, cache):
    pretend_npm("echo 'npm error network request to https://registry failed' >&2; exit 1")

    with pytest.raises(ToolchainError, match=r"npm could not fetch @tiny/runtime@1\.0\.0.*failed$"):
        packages.directory(package_of(tarball()))
    assert [*(cache / "npm").iterdir()] == []


def test_a_missing_npm_is_named_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingDependencyError, match="npm is not installed") as refusal:
        packages.directory(package_of(tarball()))
    assert "apt install npm" in refusal.value.hint


def test_the_runtimes_are_those_that_the_clients_are_tested_with():
    locked = json.loads((SCRIPTS / "package-lock.json").read_text())["packages"]
    named = {name.removeprefix("node_modules/"): entry for name, entry in locked.items()}
    pinned = [
        package for format in ("onnx", "mlc") for package in formats.browsing(format).PACKAGES
    ]
    assert len(pinned) == 3
    for package in pinned:
        assert named[package.name]["version"] == package.version
        assert named[package.name]["integrity"] == package.integrity
