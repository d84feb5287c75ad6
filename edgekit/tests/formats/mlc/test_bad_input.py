"""Damaged MLC artifacts: one sentence each, and never a wrong model."""

import json
import random
import shutil

import pytest

from edgekit.doctor import _tiny_checkpoint
from edgekit.errors import BundleError, MissingDependencyError
from edgekit.formats import BuildRequest
from edgekit.formats.mlc import chat_config, running, shards, writing
from edgekit.formats.mlc.packing import RECIPES


pytest.importorskip("numpy")
pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    directory = tmp_path_factory.mktemp("mlc")
    tiny = _tiny_checkpoint(directory)
    (directory / "bundle").mkdir()
    writing.convert(
        tiny, BuildRequest(recipe=RECIPES["q4f32_1"]), directory / "bundle", progress=lambda _: None
    )
    return directory / "bundle", tiny.spec


@pytest.fixture
def artifact(original, tmp_path):
    """Return a copy of a whole artifact, and what its checkpoint computes."""
    directory, spec = original
    shutil.copytree(directory, tmp_path / "bundle")
    return tmp_path / "bundle" / shards.CACHE, spec


def read(artifact):
    path, spec = artifact
    return running.read_back(path, spec)


def edit(path, change):
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def refused(artifact, words):
    """Check that contents and weights are refused with these words, on one line."""
    path, spec = artifact
    for ask in (running.contents, lambda path: running.read_back(path, spec)):
        with pytest.raises(BundleError, match=words) as refusal:
            ask(path)
        assert "\n" not in str(refusal.value)


def test_a_whole_artifact_is_read(artifact):
    path, _ = artifact
    assert read(artifact).weight("final_norm").shape == (64,)
    assert len(running.contents(path)) == 20
    assert {file.name for file in running.files(path)} == {
        "tensor-cache.json", "tensor-cache-b16.json", "params_shard_0.bin"
    }  # fmt: skip


def test_without_a_compiler_it_runs_in_a_browser_and_nowhere_else(artifact, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert not running.is_run_here(None)
    assert "in a browser with WebGPU" in running.runtime_state()
    with pytest.raises(MissingDependencyError, match="outside a browser needs") as refusal:
        running.load(artifact[0], context_tokens=32)
    assert "install" in refusal.value.hint


@pytest.mark.parametrize("name", ["params_shard_0.bin", chat_config.NAME, shards.CACHE])
def test_a_missing_file_is_named(artifact, name):
    (artifact[0].parent / name).unlink()
    refused(artifact, f"{name} is missing")


def test_a_short_shard_is_told_by_its_size(artifact):
    shard = artifact[0].parent / "params_shard_0.bin"
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(artifact, "params_shard_0.bin has 44451 bytes, tensor-cache.json says 44452")


def test_an_altered_shard_is_told_by_its_hash(artifact):
    shard = artifact[0].parent / "params_shard_0.bin"
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)
    with pytest.raises(BundleError, match="its MD5 differs"):
        read(artifact)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("dataPath", "../shard.bin", "'../shard.bin', which is not a shard next to it"),
        ("dataPath", 5, "dataPath of a shard is 5, expected str"),
        ("nbytes", 10, "the tensors of params_shard_0.bin take 44452 bytes, not 10"),
        ("md5sum", None, "md5sum of params_shard_0.bin is None"),
        ("records", {}, "records of params_shard_0.bin is {}, expected list"),
        ("records", [1], "name of params_shard_0.bin is None"),
    ],
)
def test_a_shard_is_described_whole(artifact, field, value, words):
    edit(artifact[0], lambda cache: cache["records"][0].update({field: value}))
    refused(artifact, words)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("dtype", "float64", "is float64 as f32-to-bf16, expected uint32, float16, float32"),
        ("format", "raw", "is uint32 as raw"),
        ("shape", [257, -8], r"has shape \[257, -8\]"),
        ("shape", [257, 8.5], r"has shape \[257, 8.5\]"),
        ("shape", [256, 8], "claims 8224 bytes, its shape takes 8192"),
        ("byteOffset", 4, "claims to start at byte 4 of params_shard_0.bin, expected 0"),
        ("name", "lm_tail.q_weight", "lacks the tensor model.embed_tokens.weight"),
        ("name", "model.embed_tokens.q_scale", "tensor model.embed_tokens.q_scale twice"),
    ],
)
def test_a_tensor_is_what_the_model_needs(artifact, field, value, words):
    edit(artifact[0], lambda cache: cache["records"][0]["records"][0].update({field: value}))
    refused(artifact, words)


def test_a_tensor_of_another_shape_is_named_with_both(artifact):
    def turn(cache):
        record = cache["records"][0]["records"][0]
        record["shape"].reverse()

    edit(artifact[0], turn)
    refused(artifact, r"embed_tokens.q_weight has shape \[8, 257\] as uint32, which does not hold")


def test_a_tensor_that_no_model_has_is_named(artifact):
    extra = {
        "name": "model.layers.0.extra.weight", "shape": [2], "dtype": "float32",
        "format": "f32-to-bf16", "nbytes": 4,
    }  # fmt: skip

    def add(cache):
        (shard,) = cache["records"]
        shard["records"].append(extra | {"byteOffset": shard["nbytes"]})
        shard["nbytes"] += 4

    edit(artifact[0], add)
    shard = artifact[0].parent / "params_shard_0.bin"
    shard.write_bytes(shard.read_bytes() + b"1234")
    path, _ = artifact
    with pytest.raises(BundleError, match=r"does not use: model.layers.0.extra.weight"):
        running.contents(path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"records": []}', "{}", '"records"'])
def test_a_cache_that_is_none_is_refused(artifact, text):
    artifact[0].write_text(text)
    refused(artifact, "is not JSON|expected an object|lists no records")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_style": "new"}, "has fields that MLC does not know: rope_style"),
        ({"vocab_size": "257"}, "vocab_size is '257', expected int"),
        ({"temperature": True}, "temperature is True, expected int or float"),
        ({"conv_template": None}, "conv_template is None, expected dict"),
        ({"version": "2.0"}, "version is '2.0', this edgekit reads 0.1.0"),
        ({"model_type": "gpt2"}, "model_type is 'gpt2', this edgekit reads llama, mistral"),
        ({"quantization": "q8f16_1"}, "quantization is 'q8f16_1', this edgekit reads q0f32"),
    ],
)
def test_settings_that_are_not_mlcs_are_refused_with_the_field(artifact, change, words):
    edit(artifact[0].with_name(chat_config.NAME), lambda config: config.update(change))
    refused(artifact, words)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("hidden_size", 128, r"q_weight has shape \[257, 8\] .* does not hold \[257, 128\]"),
        ("num_hidden_layers", 1, "has a tensor that the model does not use: model.layers.1"),
        ("num_hidden_layers", 10**9, "num_hidden_layers of model_config is 1000000000"),
        ("head_dim", None, "head_dim of model_config is None, expected a size"),
    ],
)
def test_settings_of_another_shape_do_not_go_with_the_weights(artifact, field, value, words):
    path, _ = artifact
    edit(
        path.with_name(chat_config.NAME),
        lambda config: config["model_config"].update({field: value}),
    )
    with pytest.raises(BundleError, match=words):
        running.contents(path)


def test_weights_of_another_scheme_than_the_settings_say_are_refused(artifact):
    edit(
        artifact[0].with_name(chat_config.NAME),
        lambda config: config.update(quantization="q4f16_1"),
    )
    refused(artifact, "does not hold")


@pytest.mark.parametrize("count", [60, pytest.param(300, marks=pytest.mark.slow)])
def test_mutations_of_a_cache_give_one_sentence_or_the_same_weights(artifact, count):
    path, _ = artifact
    text, expected = path.read_bytes(), running.contents(path)
    rng, said = random.Random(5), list[str]()
    for _ in range(count):
        data = bytearray(text)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.choice(b'0159-{}[]",:.ex \x80')
        path.write_bytes(data)
        try:
            found = running.contents(path)
        except BundleError as error:
            said.append(str(error))
        else:
            assert sorted(found) == sorted(expected)
    assert len(said) > count // 3
    assert not any("\n" in words for words in said)
