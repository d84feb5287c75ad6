"""Whole models, solved layer by layer, and what the files of every format then hold."""

import math
from dataclasses import replace
from typing import Any, cast

import pytest

from edgekit import formats
from edgekit.bundle.manifest import Bundle
from edgekit.errors import UsageError
from edgekit.export import export
from edgekit.formats import BuildRequest
from edgekit.plan import plan
from edgekit.progress import Silent
from edgekit.proof import calibration, interpreter
from edgekit.quant.planned import lattices
from edgekit.solver import layers
from edgekit.solver.feedback import Feedback, solve
from edgekit.solver.methods import prepare
from edgekit.source.checkpoint import Checkpoint
from edgekit.tests.tiny.checkpoints import write_tiny_checkpoint


np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")

pytestmark = pytest.mark.toolchain
TARGET = "raspberry-pi-5-8gb"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _short_text(tmp_path, monkeypatch):
    """A tenth of the text: enough where only the way counts."""
    directory = tmp_path / "calibration"
    directory.mkdir()
    for name in ("chat.txt", "korean.txt"):
        (directory / name).write_bytes((calibration.DIRECTORY / name).read_bytes())
    monkeypatch.setattr(calibration, "DIRECTORY", directory)


def solved(checkpoint, format, recipe):
    """Return a checkpoint whose weights are solved for a recipe, with the plan of it."""
    request = BuildRequest(recipe=formats.get(format).RECIPES[recipe], context_tokens=128)
    announced = calibration.announce(checkpoint, method="feedback")
    layout = formats.writing(format).lay_out(announced, request)
    return prepare(announced, layout.placements, listener=Silent()), layout, request


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma3", "phi", "lfm2-moe-scaled"])
def test_a_gguf_file_holds_the_codes_that_were_solved(name, tmp_path):
    """Heads that are interleaved and parts that are joined keep them."""
    from edgekit.formats.gguf import conversion, layout

    plain = Checkpoint.open(write_tiny_checkpoint(tmp_path / name, name))
    checkpoint, planned, request = solved(plain, "gguf", "Q4_0")
    by_role = checkpoint.calibration.solved
    assert by_role.keys() == lattices(planned.placements).keys() != set()
    values: dict[str, Any] = {}
    exact: dict[str, Any] = {}
    for recipe, found in (("Q4_0", values), ("F32", exact)):
        made = replace(request, recipe=formats.get("gguf").RECIPES[recipe])
        (tmp_path / recipe).mkdir()
        entry = conversion.convert(
            checkpoint if recipe == "Q4_0" else plain, made, tmp_path / recipe, pre="smollm",
            progress=lambda _: None,
        )  # fmt: skip
        file = layout.read(tmp_path / recipe / entry)
        for info in file.tensors:
            found[info.name] = layout.read_tensor(file, info).reshape(info.shape)
    for part in planned.placements:
        if part.is_calibrated and part.lattice:
            stored = np.concatenate([by_role[role][0] for role in part.roles])
            assert sorted(map(bytes, stored)) == sorted(map(bytes, raw(tmp_path, part)))
            # Each row of the file is near its own row of the exact one: none was exchanged.
            error = np.abs(values[part.name] - exact[part.name]).mean(-1)
            assert (error < 0.5 * np.abs(exact[part.name]).mean(-1)).all(), part.name


def raw(directory, part):
    """Return the rows of a tensor of the file as bytes."""
    from edgekit.formats.gguf import layout

    file = layout.read(directory / "Q4_0" / "model.gguf")
    (info,) = (info for info in file.tensors if info.name == part.name)
    content = file.path.read_bytes()[info.offset : info.offset + info.size_bytes]
    return np.frombuffer(content, np.uint8).reshape(math.prod(part.shape[:-1]), -1)


@pytest.mark.parametrize(
    ("format", "recipe"), [("onnx", "UINT4"), ("executorch", "8da4w"), ("gguf", "Q4_K_M")]
)
def test_a_runtime_says_what_the_solved_weights_say(format, recipe, tmp_path):
    """The real runtime against the interpreter with the values that the solver decided on."""
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path / "m", "llama", hidden_size=256))
    ready, planned, request = solved(checkpoint, format, recipe)
    out = tmp_path / "out"
    out.mkdir()
    entry = formats.writing(format).convert(ready, request, out, progress=lambda _: None)
    ids = checkpoint.text.loaded().encode("Bring tea, bread and a warm hat.")[:40]
    session = formats.running(format).load(out / entry, context_tokens=128, has_exact_cache=True)
    got = session.all_logits(ids)
    session.close()
    values = decided(checkpoint, planned)
    (expected,) = interpreter.logits(Replaced(checkpoint, values), [ids])
    (plain,) = interpreter.logits(checkpoint, [ids])
    # What is rounded besides, embeddings and activations to eight bits, is small beside this.
    assert np.abs(got - expected).mean() < 0.35 * np.abs(plain - expected).mean()


class Replaced:
    """A checkpoint with some matrices in other values."""

    def __init__(self, checkpoint, values):
        self.spec, self._checkpoint, self._values = checkpoint.spec, checkpoint, values

    def weight(self, role, first_row=0, rows=None):
        whole = self._values.get(role)
        if whole is None:
            return self._checkpoint.weight(role, first_row, rows)
        return whole[first_row : None if rows is None else first_row + rows]


def decided(checkpoint, planned):
    """Return the values of every solved matrix, by role."""
    values: list[Any] = []

    def noted(weights, feedback, lattice):
        found = solve(weights, feedback, lattice)
        values.append(found.values)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "solve", noted)
        found = layers.solve_layers(
            checkpoint, calibration.pieces(checkpoint), lattices(planned.placements),
            reads_as=lambda role: calibration.reads_as(role, checkpoint.spec), listener=Silent(),
        )  # fmt: skip
    return dict(zip(found, values, strict=True))


def test_mlcs_files_hold_the_codes_that_were_solved(tmp_path):
    from edgekit.formats.mlc import packing

    plain = Checkpoint.open(write_tiny_checkpoint(tmp_path / "m", "llama", hidden_size=256))
    ready, planned, request = solved(plain, "mlc", "q4f16_1")
    (tmp_path / "out").mkdir()
    entry = formats.writing("mlc").convert(
        ready, request, tmp_path / "out", progress=lambda _: None
    )
    weights = cast("Any", formats.running("mlc")).read_back(tmp_path / "out" / entry, plain.spec)
    roles = lattices(planned.placements)
    assert roles.keys() == ready.calibration.solved.keys()
    for role, stored in ready.calibration.solved.items():
        expected = packing.decode(list(stored), "INT4_F16", columns=None)
        columns = dict(plain.spec.weights())[role][1]
        np.testing.assert_array_equal(weights.weight(role), expected[:, :columns])


def test_later_layers_are_solved_for_what_solved_layers_give_them(tmp_path):
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path / "m", "llama"))
    seen: list[Any] = []
    request = BuildRequest(recipe=formats.get("gguf").RECIPES["Q4_0"])
    planned = formats.writing("gguf").lay_out(checkpoint, request)
    texts = calibration.pieces(checkpoint)

    class Noting:
        @staticmethod
        def of(moment, *, block_weights):
            seen.append(moment.copy())
            return Feedback.of(moment, block_weights=block_weights)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "Feedback", Noting)
        values = decided(checkpoint, planned)
    exact, rounded = moments(checkpoint, texts), moments(Replaced(checkpoint, values), texts)
    np.testing.assert_allclose(seen[0], exact[0], rtol=1e-3, atol=1e-3)
    of_second = len(seen) // len(checkpoint.spec.layers)
    np.testing.assert_allclose(seen[of_second], rounded[1], rtol=2e-3, atol=2e-3)
    assert not np.allclose(exact[1], rounded[1], rtol=2e-2, atol=2e-2)


def moments(model, texts):
    """Return the second moments of what the queries of each layer are multiplied with."""
    sums: dict[str, Any] = {}

    def observe(role, x):
        if role.endswith("query"):
            sums[role] = sums.get(role, 0) + (x.T @ x).double().numpy()

    interpreter.hidden_states(model, texts, observe=observe)
    return [*sums.values()]


def test_a_bundle_says_by_which_method_and_a_plan_too(tiny_checkpoint, tmp_path):
    for method in ("native", "weighted", "feedback"):
        planned = plan(tiny_checkpoint, TARGET, quant="Q4_1", quant_method=method)
        assert planned.quant_method == method
        out = tmp_path / method
        made = export(tiny_checkpoint, TARGET, quant="Q4_1", context_tokens=128,
                      quant_method=method, verify=False, out=out)  # fmt: skip
        assert made.artifact.quant_method == method
        assert Bundle.load(out).artifact.quant_method == method
        assert (made.artifact.calibration is None) is (method == "native")
    contents = {path.name: (path / "model.gguf").read_bytes() for path in tmp_path.glob("*ed*")}
    contents["native"] = (tmp_path / "native" / "model.gguf").read_bytes()
    assert len({*contents.values()}) == 3
    assert len(contents["weighted"]) == len(contents["feedback"])  # at equal bytes
    bare = export(tiny_checkpoint, TARGET, quant="Q4_1", context_tokens=128, calibrate=False,
                  verify=False, out=tmp_path / "bare")  # fmt: skip
    assert bare.artifact_path.read_bytes() == contents["native"]
    assert plan(tiny_checkpoint, TARGET, quant="F16").quant_method is None


def test_exporting_twice_gives_the_same_bytes(tiny_checkpoint, tmp_path):
    first, second = (
        export(tiny_checkpoint, TARGET, quant="Q4_0", context_tokens=128, quant_method="feedback",
               verify=False, out=tmp_path / name).artifact_path.read_bytes()
        for name in ("first", "second")
    )  # fmt: skip
    assert first == second


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"quant_method": "gptq"}, "no quant method 'gptq'"),
        ({"quant_method": "feedback", "calibrate": False}, "exclude each other"),
        ({"quant_method": "native", "calibration": "own.txt"}, "exclude each other"),
        ({"quant_method": "feedback", "quant": "Q8_0"}, "has no effect on Q8_0"),
    ],
)
def test_a_method_that_cannot_be_had_is_refused_before_anything_is_written(
    wishes, message, tiny_checkpoint, tmp_path
):
    with pytest.raises(UsageError, match=message):
        export(tiny_checkpoint, TARGET, **{"quant": "Q4_0", **wishes}, context_tokens=128,
               verify=False, out=tmp_path / "out")  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_an_input_that_overflows_is_named(tmp_path):
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path / "m", "llama"))

    class Overflowing:
        spec = checkpoint.spec

        def weight(self, role, first_row=0, rows=None):
            found = checkpoint.weight(role, first_row, rows)
            return np.full_like(found, 3e38) if role == "layers.0.attention_norm" else found

    request = BuildRequest(recipe=formats.get("gguf").RECIPES["Q4_0"])
    planned = formats.writing("gguf").lay_out(checkpoint, request)
    with pytest.raises(UsageError, match=r"what layers\.0\.query is multiplied with is NaN or inf"):
        layers.solve_layers(
            Overflowing(), calibration.pieces(checkpoint), lattices(planned.placements),
            reads_as=lambda role: calibration.reads_as(role, checkpoint.spec), listener=Silent(),
        )  # fmt: skip


def test_what_has_no_lattice_is_importance_weighted(tmp_path):
    """Delta nets' columns change places on their way into a GGUF file."""
    from edgekit.tests.formats.gguf.test_families import make
    from edgekit.tests.formats.gguf.test_states import WIDE

    checkpoint = make(tmp_path, "qwen3.5", **WIDE["qwen3.5"]).checkpoint
    ready, planned, _ = solved(checkpoint, "gguf", "Q4_0")
    left = [it for it in planned.placements if it.is_calibrated and it.lattice is None]
    assert left
    assert ready.calibration.importance is not None
    assert not {it.role for it in left} & ready.calibration.solved.keys()


def test_feedback_brings_a_model_closer_than_importance_weighting_does(tmp_path):
    """At equal bytes, in llama.cpp, on a text that neither has seen."""
    from edgekit.proof.fidelity import Comparison

    plain = Checkpoint.open(write_tiny_checkpoint(tmp_path / "m", "llama", hidden_size=256))
    ids = plain.text.loaded().encode("Der Zug nach Süden hielt an jeder Station, und niemand fror.")
    (exact,) = interpreter.logits(plain, [ids])
    kl, sizes = {}, set()
    for method in ("weighted", "feedback"):
        announced = calibration.announce(plain, method=method)
        request = BuildRequest(recipe=formats.get("gguf").RECIPES["Q4_0"], context_tokens=128)
        layout = formats.writing("gguf").lay_out(announced, request)
        ready = prepare(announced, layout.placements, listener=Silent())
        out = tmp_path / method
        out.mkdir()
        entry = formats.writing("gguf").convert(ready, request, out, progress=lambda _: None)
        session = formats.running("gguf").load(
            out / entry, context_tokens=128, has_exact_cache=True
        )
        comparison = Comparison()
        comparison.add(exact, session.all_logits(ids), np.array(ids))
        session.close()
        kl[method] = comparison.result().mean_kl_nats
        sizes.add((out / entry).stat().st_size)
    assert len(sizes) == 1
    assert kl["feedback"] < 0.9 * kl["weighted"]
