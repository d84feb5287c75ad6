"""Which library a plan chooses: a prebuilt one, one that it compiles, or none."""

from dataclasses import replace

import pytest

from edgekit.doctor import _tiny_checkpoint
from edgekit.errors import MissingDependencyError, UsageError
from edgekit.formats import BuildRequest
from edgekit.formats.mlc import artifact, libraries, writing
from edgekit.formats.mlc.compiling import tools
from edgekit.formats.mlc.packing import RECIPES
from edgekit.model.rope import Rope
from edgekit.model.spec import Layer
from edgekit.plan import Choice, make
from edgekit.target import load as load_target


def lay_out(spec, checkpoint, *, compiles, context_tokens=64, scheme="q4f32_1"):
    request = BuildRequest(recipe=RECIPES[scheme], context_tokens=context_tokens, compiles=compiles)
    return artifact.lay_out(replace(checkpoint, spec=spec), request)


@pytest.fixture
def tiny(tmp_path):
    return _tiny_checkpoint(tmp_path)


@pytest.fixture
def with_tools(monkeypatch):
    monkeypatch.setattr(tools, "are_here_for_browsers", lambda: True)
    monkeypatch.setattr(tools, "require_for_browsers", lambda _purpose: None)


def test_without_a_library_a_plan_names_what_would_compile_one(tiny):
    layout = lay_out(tiny.spec, tiny, compiles=False)
    assert layout.lacks_library
    assert "--compile" in layout.notes[-1]
    assert "edgekit[mlc-compile]" in layout.notes[-1]
    assert "apt install emscripten" in layout.notes[-1]


@pytest.mark.usefixtures("with_tools")
def test_where_the_tools_are_a_library_is_compiled_unless_one_is_prebuilt(tiny, monkeypatch):
    layout = lay_out(tiny.spec, tiny, compiles=None)
    assert not layout.lacks_library
    assert "is compiled" in layout.notes[-1]
    (prebuilt,) = (
        it
        for it in libraries.prebuilt()
        if it.name.startswith("SmolLM2-135M") and it.scheme == "q0f32"
    )
    monkeypatch.setattr(libraries, "find", lambda *_: prebuilt)
    assert "prebuilt" in lay_out(tiny.spec, tiny, compiles=None).notes[-1]
    assert "is compiled" in lay_out(tiny.spec, tiny, compiles=True).notes[-1]


def test_what_compiles_a_library_is_named_where_it_is_missing(tiny, monkeypatch):
    monkeypatch.setattr(tools, "_unfitting", dict)
    monkeypatch.setattr(tools, "linker", lambda: None)
    with pytest.raises(
        MissingDependencyError, match=r"needs Emscripten \(looked for em\+\+\)"
    ) as it:
        lay_out(tiny.spec, tiny, compiles=True)
    assert it.value.hint == tools.INSTALL_LINKER


DIFFERENT = (
    Layer(rope=Rope(width=16, theta=1e4), window_tokens=16),
    Layer(rope=Rope(width=16, theta=1e6)),
)


@pytest.mark.usefixtures("with_tools")
@pytest.mark.parametrize(
    "layers",
    [DIFFERENT, (Layer(rope=None), DIFFERENT[1]), (Layer(rope=None),) * 2],
    ids=["two ropes and a window", "no positions in some", "no positions"],
)
def test_a_library_of_its_own_holds_layers_that_no_model_of_mlc_computes(tiny, layers):
    spec = replace(tiny.spec, layers=layers)
    with pytest.raises(UsageError, match="MLC") as refusal:
        lay_out(spec, tiny, compiles=False)
    assert "--compile" in refusal.value.hint
    assert not lay_out(spec, tiny, compiles=None).lacks_library
    mixed = replace(tiny, spec=spec)
    assert writing.context_limit(mixed, compiles=True).tokens == spec.context_tokens


@pytest.mark.usefixtures("with_tools")
def test_windows_of_two_lengths_are_refused_by_name(tiny):
    windows = (DIFFERENT[0], replace(DIFFERENT[1], window_tokens=8))
    with pytest.raises(UsageError, match="one window for all layers, the decoder 2"):
        lay_out(replace(tiny.spec, layers=windows), tiny, compiles=True)


def test_a_plan_prefers_what_runs_as_it_is(tiny, monkeypatch):
    target = load_target("webgpu-desktop-integrated")
    made = make(tiny, target, Choice(compiles=False))
    assert made.format == "onnx"
    passed_over = {it.name: it.misses for it in made.rejected}
    assert passed_over["mlc q0f32"] == ("nothing runs it before a library is compiled",)
    assert make(tiny, target, Choice(compiles=False, format="mlc")).format == "mlc"
    monkeypatch.setattr(tools, "are_here_for_browsers", lambda: True)
    monkeypatch.setattr(tools, "require_for_browsers", lambda _purpose: None)
    assert make(tiny, target, Choice()).format == "mlc"


def test_formats_without_anything_to_compile_refuse_it_by_name(tiny):
    target = load_target("raspberry-pi-5-8gb")
    with pytest.raises(UsageError, match="nothing is compiled for gguf") as refusal:
        make(tiny, target, Choice(format="gguf", compiles=True))
    assert "mlc has a library for browsers" in refusal.value.hint
