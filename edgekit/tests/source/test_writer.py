import errno
import json
from dataclasses import replace

import pytest

from edgekit.errors import EdgekitError, UsageError
from edgekit.quant.rounding import bfloat16
from edgekit.source.checkpoint import Checkpoint, read_safetensors
from edgekit.source.made_tensors import stored_dtype
from edgekit.source.writer import write_checkpoint, written_bytes
from edgekit.tests.tiny import adapters as tiny


np = pytest.importorskip("numpy")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return Checkpoint.open(tiny.write_base(tmp_path_factory.mktemp("writer") / "base"))


def with_norm(checkpoint, value):
    values = np.ones(16)
    values[3] = value
    tensors = {**checkpoint.tensors, "model.norm.weight": tiny.Given(values)}
    return replace(checkpoint, tensors=tensors)


def test_what_is_written_reads_as_what_was_given(base, tmp_path):
    write_checkpoint(base, tmp_path / "out")
    written = Checkpoint.open(tmp_path / "out")
    assert written.spec == base.spec
    assert written.text.chat_template == base.text.chat_template
    assert written.text.declared_stop_ids == base.text.declared_stop_ids
    for role, _ in base.spec.weights():
        np.testing.assert_array_equal(written.weight(role), base.weight(role))


def test_shards_hold_no_more_than_asked_and_read_as_one(base, tmp_path):
    write_checkpoint(base, tmp_path / "out", shard_bytes=6000)
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        assert sum(tensor.size_bytes for _, tensor in read_safetensors(shard)) <= 6000
    written = Checkpoint.open(tmp_path / "out")
    np.testing.assert_array_equal(written.weight("output_head"), base.weight("output_head"))


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", "BF16"), ("f16", "F16")])
def test_a_precision_halves_the_bytes_and_is_in_the_config(base, tmp_path, precision, dtype):
    done: list[int] = []
    write_checkpoint(base, tmp_path / "out", precision=precision, advance=done.append)
    written = Checkpoint.open(tmp_path / "out")
    assert {stored_dtype(tensor) for tensor in written.tensors.values()} == {dtype}
    assert sum(done) == written_bytes(base, precision) == written_bytes(base) / 2
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == {"BF16": "bfloat16", "F16": "float16"}[dtype]


def test_a_mixed_base_keeps_the_type_of_each_tensor(base, tmp_path):
    write_checkpoint(base, tmp_path / "half", precision="bf16")
    half = Checkpoint.open(tmp_path / "half")
    norm = base.tensors["model.norm.weight"]
    mixed = replace(half, tensors={**half.tensors, "model.norm.weight": norm})
    write_checkpoint(mixed, tmp_path / "out")
    written = Checkpoint.open(tmp_path / "out")
    assert stored_dtype(written.tensors["model.norm.weight"]) == "F32"
    assert stored_dtype(written.tensors["lm_head.weight"]) == "BF16"


@pytest.mark.parametrize(
    "kept", [["model.norm.weight"], ["lm_head.weight", "model.embed_tokens.weight"]]
)
def test_a_config_names_the_type_that_most_bytes_have(base, tmp_path, kept):
    write_checkpoint(base, tmp_path / "half", precision="bf16")
    half = Checkpoint.open(tmp_path / "half")
    wide = {name: base.tensors[name] for name in kept}
    mixed = replace(half, tensors={**half.tensors, **wide})
    sizes = {name: sum(t.size_bytes for t in mixed.tensors.values() if stored_dtype(t) == name)
             for name in ("F32", "BF16")}  # fmt: skip
    write_checkpoint(mixed, tmp_path / "out")
    named = json.loads((tmp_path / "out" / "config.json").read_text())["dtype"]
    assert named == {"F32": "float32", "BF16": "bfloat16"}[max(sizes, key=sizes.__getitem__)]


def test_bfloat16_rounds_to_nearest_and_ties_to_even():
    exact = np.array([1.0, -2.5, 0.0, 3.0e38], dtype=np.float32)
    np.testing.assert_array_equal(bfloat16(exact)[:3], exact.view(np.uint32)[:3] >> 16)
    below, tie_down, tie_up, above = 0x3F807FFF, 0x3F808000, 0x3F818000, 0x3F808001
    bits = np.array([below, tie_down, tie_up, above], dtype=np.uint32)
    assert bfloat16(bits.view(np.float32)).tolist() == [0x3F80, 0x3F80, 0x3F82, 0x3F81]


@pytest.mark.parametrize(("precision", "ulp"), [("bf16", 2.0**-7), ("f16", 2.0**-10)])
def test_what_is_written_is_the_nearest_and_of_two_the_even_one(base, tmp_path, precision, ulp):
    given = 1 + ulp * np.array([0.49, 0.5, 0.51, 1.5, 2.5])
    norm = np.resize(np.concatenate([given, -given]), 16)
    tensors = {**base.tensors, "model.norm.weight": tiny.Given(norm)}
    write_checkpoint(replace(base, tensors=tensors), tmp_path / "out", precision=precision)
    written = Checkpoint.open(tmp_path / "out").tensors["model.norm.weight"].read()
    expected = 1 + ulp * np.array([0, 0, 1, 2, 2])
    np.testing.assert_array_equal(written[:10], np.concatenate([expected, -expected]))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_number_that_is_none_is_refused_with_its_tensor(base, tmp_path, value):
    with pytest.raises(UsageError, match=r"model\.norm\.weight holds NaN or infinity"):
        write_checkpoint(with_norm(base, value), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("precision", "value"), [("f16", 70000.0), ("bf16", 3.4e38)])
def test_a_number_too_large_for_the_precision_is_refused(base, tmp_path, precision, value):
    with pytest.raises(UsageError, match=r"model\.norm\.weight holds .*too large for"):
        write_checkpoint(with_norm(base, value), tmp_path / "out", precision=precision)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_left_alone(base, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="exists"):
        write_checkpoint(base, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_ctrl_c_leaves_nothing(base, tmp_path):
    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(base, tmp_path / "out", advance=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_leaves_nothing(base, tmp_path):
    def fill(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(EdgekitError, match="is full"):
        write_checkpoint(base, tmp_path / "out", advance=fill)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(base, tmp_path):
    norm = tiny.Given([1.0])
    norm.shape = (2**60,)
    vast = replace(base, tensors={**base.tensors, "model.norm.weight": norm})
    with pytest.raises(EdgekitError, match=r"bytes free, the weights take \d+"):
        write_checkpoint(vast, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_a_config_gets_one_that_names_its_tokens(base, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    bare = replace(base, directory=tmp_path / "elsewhere", config={})
    write_checkpoint(bare, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    written = Checkpoint.open(tmp_path / "out")
    assert written.spec == base.spec
    assert written.text.declared_stop_ids == base.text.declared_stop_ids


@pytest.mark.parametrize("template", ["line\n{{ messages }}", "line\r\n{{ messages }}"])
def test_a_template_that_the_tokenizer_files_do_not_hold_is_written(base, tmp_path, template):
    text = replace(base.text, chat_template=template)
    write_checkpoint(replace(base, text=text), tmp_path / "out")
    assert Checkpoint.open(tmp_path / "out").text.chat_template == template


def test_licence_and_origin_are_carried_over(base, tmp_path):
    directory = tiny.write_base(tmp_path / "base")
    (directory / "LICENSE").write_text("Do what is fair.")
    (directory / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    write_checkpoint(Checkpoint.open(directory), tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "Do what is fair."
    assert Checkpoint.open(tmp_path / "out").licence == "apache-2.0"
    assert 'base_model: "base"' in (tmp_path / "out" / "README.md").read_text()


def test_a_number_that_the_decoder_has_built_in_may_be_stored_and_no_other(tmp_path):
    weights = tiny.write_base(tmp_path / "a", model_type="apertus") / "model.safetensors"
    beta, epsilon = (
        dict(read_safetensors(weights))[f"model.layers.1.mlp.act_fn.{name}"]
        for name in ("beta", "eps")
    )
    assert len(Checkpoint.open(tmp_path / "a").spec.layers) == 2
    with weights.open("r+b") as file:
        file.seek(epsilon.offset)
        file.write(np.float32(-9.98e-7).tobytes())  # as bfloat16 has it
        assert "layers.1.xielu_positive" in dict(Checkpoint.open(tmp_path / "a").spec.weights())
        file.seek(beta.offset)
        file.write(np.float32(0.7).tobytes())
    with pytest.raises(
        UsageError, match=r"layers\.1\.mlp\.act_fn\.beta in .* holds 0\.7, expected"
    ):
        Checkpoint.open(tmp_path / "a")


def test_what_is_written_has_the_names_and_numbers_of_its_family(tmp_path):
    for model_type in ("exaone", "apertus"):
        given = tiny.write_base(tmp_path / model_type, model_type=model_type)
        out = write_checkpoint(Checkpoint.open(given), tmp_path / f"{model_type} again")
        names = [dict(read_safetensors(at / "model.safetensors")).keys() for at in (given, out)]
        assert names[0] == names[1]


@pytest.mark.toolchain
@pytest.mark.parametrize("shard_bytes", [4_000_000_000, 6000])
def test_transformers_loads_what_was_written(base, tmp_path, shard_bytes):
    write_checkpoint(base, tmp_path / "out", shard_bytes=shard_bytes)
    found, expected = (tiny.logits_of(tiny.load(at)) for at in (tmp_path / "out", base.directory))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.toolchain
def test_torch_rounds_as_we_do(base, tmp_path):
    import torch

    values = np.random.default_rng(0).normal(size=4096).astype(np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    np.testing.assert_array_equal(bfloat16(values), expected)
