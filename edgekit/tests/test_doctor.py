import json

import pytest
from click.testing import CliRunner

from edgekit import doctor as doctor_function
from edgekit import formats
from edgekit.cli import cli
from edgekit.tests.tiny import pretend_format


def find(name):
    return next(finding for finding in doctor_function() if finding.name == name)


@pytest.fixture
def without_backends(monkeypatch):
    """Leave only what needs no runtime."""
    monkeypatch.setattr(formats, "names", list)


@pytest.fixture
def only(monkeypatch):
    """Return what makes a format the only one."""

    def put(name):
        monkeypatch.setattr(formats, "names", lambda: [name])

    return put


def test_everything_looked_at_has_a_state_and_what_is_not_well_a_way_out(without_backends):
    findings = doctor_function()
    assert len({finding.name for finding in findings}) == len(findings) > 3
    for finding in findings:
        assert finding.state in {"ok", "missing", "broken"}
        assert finding.found
        assert bool(finding.way_out) == (finding.state != "ok"), finding


def test_python_and_the_compiler_are_looked_at(without_backends, monkeypatch):
    assert find("python").state == "ok"
    monkeypatch.setenv("PATH", "")
    compiler = find("C++ compiler")
    assert compiler.state == "missing"
    assert "g++" in compiler.way_out


def test_every_extra_with_packages_of_its_own_is_a_line(without_backends):
    names = {finding.name for finding in doctor_function()}
    assert {"edgekit[gguf]", "edgekit[run-gguf]", "edgekit[serve]", "edgekit[demo]"} <= names


def test_a_missing_package_is_named_with_the_line_that_installs_it(without_backends, monkeypatch):
    from importlib import metadata

    def version(package, found=metadata.version):
        if package == "jinja2":
            raise metadata.PackageNotFoundError(package)
        return found(package)

    monkeypatch.setattr(metadata, "version", version)
    finding = find("edgekit[run-gguf]")
    assert finding.state == "missing"
    assert "jinja2" in finding.found
    assert finding.way_out == "pip install 'edgekit[run-gguf]'"


def test_a_backend_whose_runtime_is_missing_says_so(only, monkeypatch, tmp_path):
    pretend_format.use(tmp_path / "pretend", monkeypatch)
    module, writing = formats.get("pretend"), formats.writing("pretend")
    monkeypatch.setattr(module, "RECIPES", {"none": None}, raising=False)
    monkeypatch.setattr(writing, "convert", lambda *_, **__: "tokenizer.json")
    monkeypatch.setenv("PRETEND_MOOD", "no runtime")
    only("pretend")
    finding = find("pretend back-end")
    assert (finding.state, finding.way_out) == ("missing", "pip")


def test_a_backend_that_fails_is_broken_and_the_others_are_still_looked_at(
    only, monkeypatch, tmp_path
):
    pretend_format.use(tmp_path / "pretend", monkeypatch)
    module, writing = formats.get("pretend"), formats.writing("pretend")

    def refuse(*_, **__):
        raise OSError("libggml.so: cannot open shared object file")

    monkeypatch.setattr(module, "RECIPES", {"none": None}, raising=False)
    monkeypatch.setattr(writing, "convert", refuse)
    only("pretend")
    finding = find("pretend back-end")
    assert finding.state == "broken"
    assert "libggml.so" in finding.found
    assert "edgekit[run-gguf]" in finding.way_out


@pytest.mark.toolchain
def test_the_gguf_backend_really_runs_here():
    pytest.importorskip("llama_cpp")
    pytest.importorskip("tokenizers")
    finding = find("gguf back-end")
    assert finding.state == "ok", finding
    assert "ran and produced token" in finding.found


def test_the_command_prints_each_finding_and_its_way_out(without_backends):
    findings = doctor_function()
    printed = CliRunner().invoke(cli, ["doctor"]).stdout
    for finding in findings:
        assert finding.name in printed
        assert finding.way_out in printed
    as_json = json.loads(CliRunner().invoke(cli, ["doctor", "--json"]).stdout)
    assert [finding["name"] for finding in as_json] == [finding.name for finding in findings]
