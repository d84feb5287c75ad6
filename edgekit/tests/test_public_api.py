import inspect
import re
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path
from types import FunctionType

import pytest

import edgekit
from edgekit.errors import EdgekitError
from edgekit.progress import Listener
from edgekit.target import Target


VERBS = [
    "compare",
    "doctor",
    "export",
    "inspect",
    "merge",
    "plan",
    "run",
    "serve",
    "validate",
    "verify",
]


def run_python(*lines):
    found = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


def functions_of(name):
    """Return the functions behind a public name: itself, or the methods its class adds."""
    found = getattr(edgekit, name)
    if isinstance(found, FunctionType):
        return [found]
    members = [getattr(member, "__func__", member) for member in vars(found).values()]
    return [
        member
        for member in members
        if isinstance(member, FunctionType)
        and member.__module__.startswith("edgekit")
        and not member.__name__.startswith("_")
    ]


@pytest.mark.parametrize("name", edgekit.__all__)
def test_every_public_name_is_there_and_documented(name):
    found = getattr(edgekit, name)
    assert found.__module__.startswith("edgekit.")
    documentation = inspect.getdoc(found) or ""
    assert documentation
    assert not documentation.startswith(f"{name}(")  # a dataclass without a docstring


@pytest.mark.parametrize("name", edgekit.__all__)
def test_every_public_function_is_documented_and_annotated(name):
    found = getattr(edgekit, name)
    assert functions_of(name) or is_dataclass(found) or issubclass(found, EdgekitError)
    for function in functions_of(name):
        assert inspect.getdoc(function), function
        signature = inspect.signature(function)
        unannotated = [
            parameter.name
            for parameter in signature.parameters.values()
            if parameter.annotation is parameter.empty and parameter.name not in {"self", "cls"}
        ]
        assert unannotated == [], function
        assert signature.return_annotation is not signature.empty, function


def test_all_lists_each_name_once_and_dir_shows_them_and_no_others():
    assert len(set(edgekit.__all__)) == len(edgekit.__all__)
    assert set(dir(edgekit)) == {*edgekit.__all__, "__version__"}
    assert set(VERBS) <= set(edgekit.__all__)


def parameters_of(name):
    return inspect.signature(getattr(edgekit, name)).parameters


PATHS = {"adapters", "bundle_directory", "calibration", "directory", "model", "out", "path",
         "trained_on"}  # fmt: skip


@pytest.mark.parametrize("name", [*VERBS, "load_target", "open_checkpoint"])
def test_a_path_may_be_a_text_in_every_verb(name):
    narrow = [
        parameter
        for parameter in parameters_of(name).values()
        if parameter.name in PATHS or "Path" in str(parameter.annotation)
        if not re.search(r"str \| (pathlib\.(_local\.)?)?Path", str(parameter.annotation))
    ]
    assert narrow == []


@pytest.mark.parametrize("name", ["export", "plan", "validate"])
def test_a_target_may_be_a_name_a_file_or_a_target(name):
    (parameter,) = (p for n, p in parameters_of(name).items() if n in {"target", "target_name"})
    assert parameter.annotation == str | Path | Target


@pytest.mark.parametrize("name", sorted({*VERBS, "open_checkpoint"} - {"inspect"}))
def test_every_verb_that_has_something_to_tell_takes_the_same_listener(name):
    parameter = parameters_of(name)["listener"]
    assert parameter.annotation == Listener | None
    assert parameter.default is None
    assert parameter.kind is parameter.KEYWORD_ONLY


@pytest.mark.toolchain
def test_verbs_find_what_a_text_names(tiny_bundle, tiny_checkpoint, tmp_path):
    bundle = str(tiny_bundle)
    assert edgekit.Bundle.load(bundle).directory == tiny_bundle
    assert edgekit.inspect(bundle).bundle == edgekit.Bundle.load(bundle)
    assert edgekit.verify(bundle, str(tiny_checkpoint)).passed
    assert next(edgekit.run(bundle, "hello", max_tokens=2))
    made = edgekit.export(
        str(tiny_checkpoint), "raspberry-pi-5-8gb", quant="F32", context_tokens=64,
        out=str(tmp_path / "out"), verify=False,
    )  # fmt: skip
    assert made.directory == tmp_path / "out"


def test_verbs_refuse_what_a_text_does_not_name(tmp_path):
    missing = str(tmp_path / "missing")
    with pytest.raises(edgekit.EdgekitError, match="missing"):
        list(edgekit.run(missing, "Hi"))
    with pytest.raises(edgekit.EdgekitError, match="missing"):
        edgekit.validate(missing, "raspberry-pi-5-8gb")
    with pytest.raises(edgekit.EdgekitError, match="missing"):
        edgekit.verify(missing, missing)
    with pytest.raises(edgekit.EdgekitError, match="missing"):
        edgekit.merge(missing, [missing], str(tmp_path / "out"))
    with pytest.raises(edgekit.EdgekitError, match="missing"):
        edgekit.export(missing, "raspberry-pi-5-8gb", out=str(tmp_path / "out"), verify=False)


def test_one_adapter_instead_of_a_list_is_refused_and_not_read_letter_by_letter(tmp_path):
    with pytest.raises(edgekit.EdgekitError, match=r"adapters = 'lora' is not a list"):
        edgekit.merge("demo", "lora", tmp_path / "out")


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'exprot'"):
        edgekit.exprot  # noqa: B018 - the access is the test


def test_the_version_is_that_of_the_package():
    assert run_python(
        "import edgekit, importlib.metadata",
        "print(edgekit.__version__ == importlib.metadata.version('edgekit'))",
    ) == "True"  # fmt: skip


@pytest.mark.parametrize("before", ["import edgekit.{0}", "from edgekit.{0} import {0} as other"])
def test_importing_a_verbs_module_does_not_hide_the_verb(before):
    lines = [before.format(name) for name in VERBS]
    checks = [f"assert type(edgekit.{name}) is types.FunctionType, '{name}'" for name in VERBS]
    run_python("import types, edgekit", *lines, *checks)


def test_nor_does_a_verb_hide_its_module_from_those_who_import_names():
    assert run_python(
        "import edgekit",
        "edgekit.export",
        "from edgekit.export import default_out, export",
        "import sys",
        "print(export is edgekit.export, sys.modules['edgekit.export'].export is export)",
    ) == "True True"  # fmt: skip


def test_a_module_that_is_no_verb_is_an_attribute_as_usual():
    run_python("import edgekit.errors, types", "assert type(edgekit.errors) is types.ModuleType")


def test_a_star_brings_every_public_name():
    run_python(
        "from edgekit import *",
        f"missing = {edgekit.__all__!r}",
        "assert not [name for name in missing if name not in globals()]",
    )
