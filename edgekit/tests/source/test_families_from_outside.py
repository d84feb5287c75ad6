"""A model type of somebody else's: a package with an entry point, installed next to edgekit."""

import json

import pytest

from edgekit import formats
from edgekit.errors import UsageError
from edgekit.formats import BuildRequest
from edgekit.source import families
from edgekit.source.checkpoint import Checkpoint
from edgekit.source.opening import open_checkpoint
from edgekit.source.writer import write_checkpoint
from edgekit.tests.tiny.random_checkpoints import random_checkpoint
from edgekit.tests.tiny.stored_names import rename


np = pytest.importorskip("numpy")

FAMILY = """
from dataclasses import replace

from edgekit.model.spec import Multipliers
from edgekit.source.families import llama

SIZES = llama.SIZES


def describe(config):
    loudness = config.number("loudness")
    return replace(llama.describe(config), multipliers=Multipliers(logits=loudness))


def config(spec):
    names = {"model_type": "acme", "architectures": ["AcmeForCausalLM"]}
    return llama.config(spec) | names | {"loudness": spec.multipliers.logits}


def source(role, spec):
    found = llama.source(role, spec)
    return replace(found, tensor=found.tensor.replace("model.", "acme."))
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put distributions on the path, as pip would."""
    caches = (families._from_outside, families.get)

    def put(name, module, text=FAMILY, *, model_type="acme"):
        place = tmp_path / name
        about = place / f"{name.replace('-', '_')}-1.2.dist-info"
        about.mkdir(parents=True)
        (place / f"{module}.py").write_text(text)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        (about / "entry_points.txt").write_text(f"[edgekit.families]\n{model_type} = {module}\n")
        monkeypatch.syspath_prepend(place)
        for cache in caches:
            cache.cache_clear()

    yield put
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def acme(tmp_path):
    """A Llama under another model type and other names, and the Llama."""
    llama = random_checkpoint(tmp_path / "tokenizer")
    directory = write_checkpoint(llama, tmp_path / "model")
    path = directory / "config.json"
    config = json.loads(path.read_text()) | {"model_type": "acme", "loudness": 3.0}
    path.write_text(json.dumps(config))
    rename(directory / "model.safetensors", lambda name: name.replace("model.", "acme."))
    return directory, llama


def test_it_is_read_and_every_format_plans_it(install, acme):
    install("acme-models", "acme_models")
    directory, llama = acme
    checkpoint = open_checkpoint(directory)
    assert "acme" in families.names()
    (note,) = checkpoint.notes
    assert "'acme' compute is described by acme-models 1.2" in note
    assert np.array_equal(checkpoint.weight("layers.1.key"), llama.weight("layers.1.key"))
    assert np.allclose(checkpoint.weight("final_norm"), 3 * llama.weight("final_norm"))
    sizes = {}
    for name in formats.names():
        recipe = formats.get(name).RECIPES[formats.get(name).DEFAULT_RECIPES[0]]
        layout = formats.writing(name).lay_out(checkpoint, BuildRequest(recipe=recipe))
        sizes[name] = layout.artifact_bytes
    assert sizes.keys() == {"executorch", "gguf", "mlc", "onnx"}
    assert min(sizes.values()) > 50_000


def test_it_is_written_and_read_again(install, acme, tmp_path):
    install("acme-models", "acme_models")
    checkpoint = Checkpoint.open(acme[0])
    again = Checkpoint.open(write_checkpoint(checkpoint, tmp_path / "again"))
    assert (again.architecture, again.spec) == ("acme", checkpoint.spec)


def test_without_the_package_the_model_type_is_unknown(acme):
    with pytest.raises(UsageError, match="models of type 'acme' are not supported"):
        Checkpoint.open(acme[0])


def test_two_packages_that_describe_one_model_type_are_refused_by_name(install, acme):
    install("acme-models", "acme_models")
    install("acme-too", "acme_too")
    with pytest.raises(UsageError, match=r"acme-(models|too) 1\.2 and by acme-(models|too) 1\.2"):
        Checkpoint.open(acme[0])


def test_a_package_cannot_take_the_place_of_a_family_of_edgekit(install):
    install("acme-models", "acme_models", model_type="llama")
    with pytest.raises(UsageError, match=r"'llama' are described by edgekit and by acme-models"):
        families.get("llama")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import nowhere_to_be_found", r"acme-models 1\.2.*cannot be loaded: ModuleNotFoundError"),
        ("SIZES = {}", "has no config, describe, source, which a family needs"),
    ],
)
def test_a_package_that_is_no_family_is_refused_by_name(install, acme, text, expected):
    install("acme-models", f"acme_broken_{len(text)}", text)
    with pytest.raises(UsageError, match=expected):
        Checkpoint.open(acme[0])


@pytest.mark.toolchain
def test_a_model_that_transformers_does_not_know_is_proven_layer_by_layer(install, acme, tmp_path):
    pytest.importorskip("transformers")
    from edgekit.proof import transformers_logits

    install("acme-models", "acme_models")
    directory, llama = acme
    plain = Checkpoint.open(write_checkpoint(llama, tmp_path / "llama"))
    ids = [[5, 7, 11, 200, 13, 17]]
    (expected,) = transformers_logits.logits(plain, ids, fits_in_memory=True)
    (found,) = transformers_logits.logits(Checkpoint.open(directory), ids)
    assert np.abs(found - 3 * expected).max() < 1e-4
    assert np.abs(found).max() > 0.1
