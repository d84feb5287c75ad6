"""What is ONNX Runtime's own in its `Session`: batches, recipes, refusals."""

import pytest

from edgekit.doctor import _tiny_checkpoint
from edgekit.errors import BundleError, MissingDependencyError, ToolchainError, UsageError
from edgekit.formats import BuildRequest
from edgekit.formats.onnx import conversion, model, runtime, tensor_types
from edgekit.formats.onnx.runtime import BATCH_TOKENS, OnnxSession
from edgekit.proof import load_probe
from edgekit.tests.needs import needs


pytestmark = [pytest.mark.toolchain, needs("onnxruntime", "tokenizers")]
np = pytest.importorskip("numpy")

CONTEXT_TOKENS = BATCH_TOKENS + 20  # two batches
VOCABULARY_TOKENS = 257
IDS = [72, 101, 108, 108, 111, 220, 4, 9]
CLOSE = {"rtol": 0, "atol": 1e-4}


def convert(directory, recipe):
    directory.mkdir(exist_ok=True)
    checkpoint = _tiny_checkpoint(directory)
    entry = conversion.convert(
        checkpoint,
        BuildRequest(recipe=tensor_types.RECIPES[recipe]),
        directory,
        progress=lambda _: None,
    )
    return directory / entry


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return convert(tmp_path_factory.mktemp("tiny"), "F32")


@pytest.fixture
def session(path):
    session = OnnxSession(path, context_tokens=CONTEXT_TOKENS, threads=1)
    yield session
    session.close()


def test_a_text_longer_than_a_batch_has_every_row(session):
    ids = [(7 * index) % 256 for index in range(CONTEXT_TOKENS)]
    rows = session.all_logits(ids)
    np.testing.assert_allclose(session.prefill(ids), rows[-1], **CLOSE)
    session.reset()
    np.testing.assert_allclose(session.prefill(ids[:5]), rows[4], **CLOSE)
    assert np.abs(rows[BATCH_TOKENS]).max() > 0.01


@pytest.mark.parametrize("token", [-1, VOCABULARY_TOKENS, 2**40])
def test_a_token_that_does_not_exist_is_refused_and_nothing_is_read(session, token):
    session.prefill(IDS[:2])
    with pytest.raises(UsageError, match=f"token id {token}, the vocabulary has 257"):
        session.decode(token)
    said = session.prefill(IDS[2:]).copy()
    session.reset()
    np.testing.assert_allclose(session.prefill(IDS), said, **CLOSE)


@pytest.mark.parametrize("recipe", list(tensor_types.RECIPES))
def test_every_recipe_runs_in_both_ways(recipe, tmp_path):
    session = OnnxSession(convert(tmp_path, recipe), context_tokens=32, threads=1)
    rows = session.all_logits(IDS)
    session.reset()
    for index, token in enumerate(IDS):
        # Activations are rounded to 8 bits in blocks; a last digit may fall otherwise.
        np.testing.assert_allclose(session.decode(token), rows[index], rtol=0, atol=0.05)
    session.close()


@pytest.mark.parametrize(
    ("available", "told"),
    [([], "on the CPU only; QNN, Core ML, NNAPI not in this build"),
     (["CoreMLExecutionProvider"],
      "on the CPU only; QNN, NNAPI not in this build; Core ML in this build, but never used")],
)  # fmt: skip
def test_processors_that_were_never_proven_are_told(available, told, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    assert runtime.processors() == told


@pytest.mark.parametrize("threads", [-5, 0, 100_000])
def test_impossible_numbers_of_threads_are_refused(path, threads):
    with pytest.raises(UsageError, match=f"{threads} threads are not possible"):
        OnnxSession(path, context_tokens=32, threads=threads)


def test_the_cpu_is_asked_for_by_name(session):
    assert session._session.get_providers() == ["CPUExecutionProvider"]


def test_a_version_that_errs_is_refused(path, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", "1.23.2")
    with pytest.raises(MissingDependencyError, match=r"1\.23\.2 is too old"):
        OnnxSession(path, context_tokens=32)


def test_a_probe_says_nothing_of_a_good_model_and_tells_what_is_wrong_with_another(path, tmp_path):
    load_probe.probe("onnx", path, context_tokens=32)
    with pytest.raises(ToolchainError, match="failed; it was given") as refusal:
        load_probe.probe("onnx", tmp_path / "absent.onnx", context_tokens=32)
    assert "is missing" in refusal.value.log


@pytest.mark.parametrize("recipe", ["F16_GPU", "UINT4_GPU"])
def test_a_cache_in_half_precision_takes_half_the_room_and_runs_in_both_ways(recipe, tmp_path):
    path = convert(tmp_path, recipe)
    session = OnnxSession(path, context_tokens=CONTEXT_TOKENS, threads=1)
    assert {values.dtype.name for values in session._cache} == {"float16"}
    ids = [(7 * index) % 256 for index in range(CONTEXT_TOKENS)]
    rows = session.all_logits(ids)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(session.prefill(ids), rows[-1], rtol=0, atol=0.01)
    session.close()
    exact = OnnxSession(
        convert(tmp_path / "exact", recipe.replace("_GPU", "")), context_tokens=300, threads=1
    )
    np.testing.assert_allclose(exact.all_logits(ids), rows, rtol=0, atol=0.05)
    exact.close()


@pytest.mark.parametrize("name", [b"GroupQueryAttenti0n", b"GroupQueryAttenti\xf3n"])
def test_a_graph_the_runtime_does_not_know_is_a_damaged_bundle(name, path, tmp_path, capfd):
    changed = path.read_bytes()[: -model.SEAL_BYTES].replace(b"GroupQueryAttention", name)
    (tmp_path / path.name).write_bytes(model.sealed(changed))
    data = path.with_name(f"{path.name}_data")
    (tmp_path / data.name).write_bytes(data.read_bytes())
    with pytest.raises(BundleError, match=r"ONNX Runtime [\d.]+ refuses"):
        OnnxSession(tmp_path / path.name, context_tokens=32)
    assert capfd.readouterr() == ("", "")
