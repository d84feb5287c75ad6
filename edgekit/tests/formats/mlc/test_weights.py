"""MLC's weights: to the byte what mlc_llm writes, and what is read back from them."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import edgekit.source.checkpoint
from edgekit.doctor import _tiny_checkpoint
from edgekit.errors import BundleError, UsageError
from edgekit.formats import BuildRequest
from edgekit.formats.mlc import (
    chat_config,
    conversion,
    decoders,
    names,
    packing,
    reading,
    running,
    shards,
    writing,
)
from edgekit.formats.mlc.names import Parameter
from edgekit.formats.mlc.packing import GROUPS, RECIPES, PackedTensor
from edgekit.model.checkpoint_protocol import Calibration
from edgekit.model.shapes import Shape
from edgekit.quant.rounding import from_bfloat16
from edgekit.source import families
from edgekit.source.checkpoint import Checkpoint
from edgekit.tests.formats.mlc.test_config import COMPUTED, tiny_spec


np = pytest.importorskip("numpy")
pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

# What mlc_llm 79d603f085 with TVM 0.26.0 wrote of these checkpoints: name, scheme, file, SHA-256.
# Of cohere_f32 it was given queries and keys in the order of halves, which its model rotates.
GOLDEN = Path(__file__).parent / "data"
HASHES = json.loads((GOLDEN / "sha256.json").read_text())
# What its dataclass of a model made of their config.json.
TOLD = sorted(GOLDEN.glob("*/mlc-model-config.json"))


def quiet(_weights):
    """Take no notice of progress."""


def open_golden(name, directory):
    """Open one of the checkpoints; they have no tokenizer, so one that reads bytes lies next to."""
    shutil.copytree(GOLDEN / name, directory, dirs_exist_ok=True)
    text = directory / "text"
    text.mkdir()
    shutil.copyfile(_tiny_checkpoint(text).text.tokenizer_json, directory / "tokenizer.json")
    return Checkpoint.open(directory)


def write(checkpoint, scheme, directory, **options):
    directory.mkdir()
    conversion.write(checkpoint, RECIPES[scheme], directory, progress=quiet, **options)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def in_every_scheme(names):
    """Name models and schemes; quick are one model in all schemes, and all models in one."""
    pairs = [(name, scheme) for name in names for scheme in RECIPES]
    return pytest.mark.parametrize(
        ("name", "scheme"),
        [
            pytest.param(
                name,
                scheme,
                marks=[pytest.mark.slow] * (name != "llama_odd_f32" and scheme != "q4f16_1"),
            )
            for name, scheme in pairs
        ],
    )


# Bytes


def test_every_scheme_was_made_of_every_checkpoint():
    assert {frozenset(schemes) for schemes in HASHES.values()} == {frozenset(RECIPES)}
    types = {json.loads((GOLDEN / name / "config.json").read_text())["model_type"]
             for name in HASHES}  # fmt: skip
    assert types == decoders.MODELS.keys() - {"mistral"}  # which is a Llama in every name


@in_every_scheme(HASHES)
def test_the_bytes_are_those_of_mlc_llm(name, scheme, tmp_path):
    checkpoint = open_golden(name, tmp_path / "checkpoint")
    # mlc_llm stores infinity where float16 holds no more, and this must be the same then too.
    found = write(checkpoint, scheme, tmp_path / scheme, refuses_overflow=False)
    hashes = {file: hashlib.sha256(data).hexdigest() for file, data in found.items()}
    assert hashes == HASHES[name][scheme]
    planned = conversion.plan(checkpoint, RECIPES[scheme])
    assert sum(map(len, found.values())) == planned.size_bytes


@pytest.mark.parametrize("path", TOLD, ids=lambda path: path.parent.name)
def test_a_model_is_told_what_mlc_llm_would_tell_it(path, tmp_path):
    checkpoint = open_golden(path.parent.name, tmp_path / "checkpoint")
    name = decoders.model_type(checkpoint.architecture, checkpoint.spec)
    found = chat_config.model_config(name, checkpoint.spec, context_tokens=512, chunk_tokens=512)
    expected = json.loads(path.read_text())
    if name == "starcoder2":  # which is read back
        assert found.pop("tie_word_embeddings") is True
    assert json.dumps(found) == json.dumps(expected)


def test_without_an_index_tensors_come_in_order_of_their_names(tmp_path):
    checkpoint = open_golden("qwen2_tied_f32", tmp_path / "checkpoint")
    index = checkpoint.directory / "model.safetensors.index.json"
    usual = [parameter.name for parameter in names.in_file_order(checkpoint)]
    places = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": dict(reversed(places.items()))}))
    assert [parameter.name for parameter in names.in_file_order(checkpoint)] != usual
    index.unlink()
    assert [parameter.name for parameter in names.in_file_order(checkpoint)] == usual


def test_a_weight_too_large_for_float16_is_refused_with_a_way_out(tmp_path):
    checkpoint = open_golden("llama_edge_f32", tmp_path / "checkpoint")
    with pytest.raises(UsageError, match="holds 123740, too large for float16") as refusal:
        write(checkpoint, "q4f16_1", tmp_path / "half")
    assert "q4f32_1" in refusal.value.hint
    assert write(checkpoint, "q4f32_1", tmp_path / "full")


def test_mistral_and_stablelm_fuse_queries_keys_and_values_as_llama_does():
    spec = tiny_spec()
    assert names.parameters("mistral", spec) == names.parameters("llama", spec)
    fused = names.parameters("llama", spec)["model.layers.0.self_attn.qkv_proj.weight"]
    assert fused.roles == ("layers.0.query", "layers.0.key", "layers.0.value")
    assert list(fused.parts())[1:] == [("layers.0.key", 64, 32), ("layers.0.value", 96, 32)]


# Files


def gathered(*sizes):
    """Return which tensors of so many MiB share a file, file by file."""
    tensors = [
        PackedTensor(name=str(number), shape=(size * 2**19,), dtype="float16")
        for number, size in enumerate(sizes)
    ]
    return [[record.tensor.name for record in shard.records] for shard in shards.place(tensors)]


def test_tensors_share_a_file_until_it_is_full():
    assert gathered(10, 10, 10, 10) == [["0", "1", "2"], ["3"]]
    assert gathered(16, 1) == [["0", "1"]]
    assert gathered(15, 15, 2) == [["0", "1"], ["2"]]  # 32 MiB are too many already


def test_a_large_tensor_has_a_file_whose_number_comes_first():
    assert gathered(1, 40, 1) == [["1"], ["0", "2"]]
    assert gathered(20, 16) == [["1"], ["0"]]
    assert gathered(40) == [["0"]]


# Numbers


def random_rows(rows, columns, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


@pytest.mark.parametrize("tensor_type", packing.TENSOR_TYPES)
@pytest.mark.parametrize("columns", [64, 70, 256])
def test_what_is_encoded_is_decoded_within_half_a_step(tensor_type, columns):
    rows = random_rows(9, columns)
    stored = packing.encode(rows, tensor_type)
    found = packing.decode(stored, tensor_type, columns=columns)
    assert found.shape == rows.shape
    assert found.dtype == np.float32
    step = {"BF16": 2**-7, "F16": 2**-10}.get(tensor_type)
    if step is None:
        step = 1.02 / GROUPS[tensor_type].zero  # and how a scale is rounded
    assert np.abs(found - rows).max() <= step / 2 * np.abs(rows).max()


@pytest.mark.parametrize("tensor_type", packing.TENSOR_TYPES)
def test_a_weight_costs_what_the_storage_says(tensor_type):
    rows = random_rows(8, 160)
    size = sum(part.nbytes for part in packing.encode(rows, tensor_type))
    assert size * 8 / rows.size == packing.TENSOR_TYPES[tensor_type].bits_per_weight


def test_a_calibration_makes_what_counts_more_exact():
    rows = random_rows(64, 128)
    importance = np.where(np.arange(128) % 32 < 2, 100, 0.01).astype(np.float32)

    def error(**options):
        stored = packing.encode(rows, "INT4_F16", **options)
        found = packing.decode(stored, "INT4_F16", columns=128)
        return float((importance * (found - rows) ** 2).mean())

    native, calibrated = error(), error(is_calibrated=True, importance=importance)
    assert calibrated < 0.7 * native
    assert error(is_calibrated=True) < native


def test_a_row_that_does_not_fill_its_last_group_is_led_too():
    rows = random_rows(5, 70)
    stored = packing.encode(
        rows, "INT3_F16", is_calibrated=True, importance=np.ones(70, np.float32)
    )
    assert stored[0].shape == (5, GROUPS["INT3_F16"].words(70))
    assert np.abs(packing.decode(stored, "INT3_F16", columns=70) - rows).max() < 1
    assert (stored[0].reshape(5, 2, 4)[:, 1, 3] == 0).all()  # columns 70 and up


def test_a_layout_says_whose_text_led_the_fit_and_only_where_something_is_fitted(tmp_path):
    tiny = _tiny_checkpoint(tmp_path)
    led = replace(tiny, calibration=Calibration(text_sha256="5ca1ab1e"))
    assert writing.lay_out(led, BuildRequest(recipe=RECIPES["q4f16_1"])).calibration == "5ca1ab1e"
    assert writing.lay_out(led, BuildRequest(recipe=RECIPES["q0f16"])).calibration is None
    assert writing.lay_out(tiny, BuildRequest(recipe=RECIPES["q4f16_1"])).calibration is None


def test_a_led_artifact_has_other_codes_and_the_same_size(tmp_path):
    tiny = _tiny_checkpoint(tmp_path)
    rng = np.random.default_rng(1)
    importance = {
        role: rng.random(shape[1], np.float32) for role, shape in tiny.spec.weights() if shape[1:]
    }
    led = replace(tiny, calibration=Calibration(text_sha256="", importance=importance))
    native = write(tiny, "q4f16_1", tmp_path / "native")
    fitted = write(led, "q4f16_1", tmp_path / "fitted")
    sizes = [{name: len(data) for name, data in found.items()} for found in (native, fitted)]
    assert sizes[0] == sizes[1]
    assert native["params_shard_0.bin"] != fitted["params_shard_0.bin"]


# Read back


def stored_rows(checkpoint, scheme, role, shape: Shape):
    """Return what an artifact must hold of a weight, computed on the whole of it at once."""
    adds_one = decoders.MODELS[checkpoint.architecture].adds_one
    is_offset = checkpoint.spec.unit_offset(role) and not adds_one
    values = checkpoint.weight(role) + (1 if is_offset else 0)
    tensor_type = RECIPES[scheme].tensor_type_for(role, checkpoint.spec)
    encoded = packing.encode(values, tensor_type)
    return packing.decode(encoded, tensor_type, columns=shape[1] if shape[1:] else None)


READ_BACK = [
    "llama_odd_f32", "phi3_f32", "gemma2_f32", "olmo2_f32", "phi_f32", "nemotron_f32",
    "starcoder2_tied_f32", "cohere_f32", "qwen3_5_tied_f32",
]  # fmt: skip


@in_every_scheme(READ_BACK)
def test_every_weight_is_read_back_as_it_was_stored(name, scheme, tmp_path):
    checkpoint = open_golden(name, tmp_path / "checkpoint")
    spec = checkpoint.spec
    (tmp_path / "out").mkdir()
    entry = writing.convert(
        checkpoint, BuildRequest(recipe=RECIPES[scheme]), tmp_path / "out", progress=quiet
    )
    model = running.read_back(tmp_path / "out" / entry, spec)
    assert model.spec == decoders.computed(checkpoint.architecture, spec)
    for role, shape in spec.weights():
        found = model.weight(role)
        np.testing.assert_array_equal(found, stored_rows(checkpoint, scheme, role, shape))
        some = model.weight(role, 1, 2)
        np.testing.assert_array_equal(some, found[1:3])
    listed = {role: (shape, tensor_type) for role, shape, tensor_type in running.contents(
        tmp_path / "out" / entry)}  # fmt: skip
    assert listed == {
        role: (shape, RECIPES[scheme].tensor_type_for(role, spec)) for role, shape in spec.weights()
    }


def test_what_a_delta_net_forgets_by_is_float32_in_every_scheme(tmp_path):
    checkpoint = open_golden("qwen3_5_tied_f32", tmp_path / "checkpoint")
    for scheme in ("q0f16", "q4f16_1", "q4f32_1"):
        planned = conversion.plan(checkpoint, RECIPES[scheme])
        found = {tensor.name: tensor for weight in planned.weights for tensor in weight.tensors}
        net = "model.layers.0.linear_attn"
        assert found[f"{net}.A_log"].dtype == found[f"{net}.dt_bias"].dtype == "float32"
        assert found[f"{net}.conv1d_weight"].shape == (80, 1, 4)


def test_delta_nets_whose_small_matrices_are_packed_are_told_of(tmp_path):
    checkpoint = open_golden("qwen3_5_tied_f32", tmp_path / "checkpoint")
    told = {
        scheme: " ".join(conversion.lay_out(checkpoint, BuildRequest(recipe=RECIPES[scheme])).notes)
        for scheme in ("q0f16", "q4f16_1")
    }
    assert "in_proj_a and in_proj_b" in told["q4f16_1"]
    assert "in_proj_a" not in told["q0f16"]


def test_norms_that_add_one_are_stored_with_it_and_computed_without(tmp_path):
    checkpoint = open_golden("gemma2_f32", tmp_path / "checkpoint")
    assert checkpoint.spec.norm.unit_offset
    assert not decoders.computed("gemma2", checkpoint.spec).norm.unit_offset
    found = write(checkpoint, "q0f32", tmp_path / "out")
    (record,) = (
        record
        for shard in shards.read(tmp_path / "out" / shards.CACHE)
        for record in shard.records
        if record.tensor.name == "model.norm.weight"
    )
    data = np.frombuffer(found[record.file], "<u2", 64, record.offset)
    np.testing.assert_allclose(from_bfloat16(data), checkpoint.weight("final_norm") + 1, rtol=2**-8)


def test_a_transposed_matrix_has_its_columns_first_and_the_embedding_not():
    scheme = packing.SCHEMES["q4f16_0"]
    head = Parameter(name="lm_head.weight", roles=("output_head",), rows=(96,), columns=64)
    words = replace(head, name="model.embed_tokens.weight", roles=("token_embedding",))
    assert packing.tensors(head, "INT4_F16", scheme)[0].shape == (8, 96)
    assert packing.tensors(words, "INT4_F16", scheme)[0].shape == (96, 8)


def test_blocks_of_rows_make_the_same_bytes_as_the_whole(tmp_path, monkeypatch):
    checkpoint = open_golden("llama_odd_f32", tmp_path / "checkpoint")
    for scheme in ("q4f16_1", "q4f16_0", "q3f16_1"):
        whole = write(checkpoint, scheme, tmp_path / f"{scheme}-whole")
        monkeypatch.setattr(edgekit.source.checkpoint, "BLOCK_WEIGHTS", 7 * 60)
        assert write(checkpoint, scheme, tmp_path / f"{scheme}-blocks") == whole
        monkeypatch.undo()


@pytest.mark.parametrize("architecture", COMPUTED)
def test_a_parameter_is_made_of_the_tensors_that_the_family_has(architecture):
    """mlc_llm goes through the checkpoint's tensors, whose names the format states itself."""
    spec = COMPUTED[architecture]
    assert len(dict(spec.weights())) > 10
    for role, _ in spec.weights():
        source = families.get(architecture).source(role, spec)
        assert names._tensor(architecture, role) == source.tensor


def test_a_weight_that_no_model_has_is_refused_by_name():
    with pytest.raises(UsageError, match="MLC's llama model has no gate bias"):
        names._tensor("llama", "layers.0.gate_bias")


@pytest.mark.toolchain
@pytest.mark.parametrize(
    "name",
    ["stablelm_f32", "olmo2_f32", "phi_f32", "nemotron_f32", "starcoder2_tied_f32",
     "qwen3_5_untied_f32"],
)  # fmt: skip
def test_the_model_that_is_read_back_says_what_the_checkpoint_says(name, tmp_path):
    pytest.importorskip("torch")
    from edgekit.proof import interpreter

    checkpoint = open_golden(name, tmp_path / "checkpoint")
    (tmp_path / "out").mkdir()
    entry = writing.convert(
        checkpoint, BuildRequest(recipe=RECIPES["q0f16"]), tmp_path / "out", progress=quiet
    )
    model = reading.open_weights(tmp_path / "out" / entry, checkpoint.spec)
    texts = [[1, 5, 60, 17, 33]]
    (expected,), (found,) = (list(interpreter.logits(m, texts)) for m in (checkpoint, model))
    assert np.abs(found - expected).max() < 1e-2 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("full_attention_interval", 0, "full_attention_interval of model_config is 0"),
        ("full_attention_interval", 5, "full_attention_interval of model_config is 5"),
        ("full_attention_interval", 4, "lacks the tensor model.layers.1.linear_attn"),
        ("linear_num_value_heads", "4", "linear_num_value_heads of model_config is '4'"),
        ("linear_conv_kernel_dim", 3, "which does not hold"),
    ],
)
def test_settings_that_say_other_delta_nets_than_are_stored_are_refused(
    tmp_path, field, value, words
):
    checkpoint = open_golden("qwen3_5_tied_f32", tmp_path / "checkpoint")
    out = tmp_path / "out"
    out.mkdir()
    path = out / writing.convert(
        checkpoint, BuildRequest(recipe=RECIPES["q0f16"]), out, progress=quiet
    )
    settings = out / chat_config.NAME
    config = json.loads(settings.read_text())
    config["model_config"][field] = value
    settings.write_text(json.dumps(config))
    with pytest.raises(BundleError, match=words):
        running.contents(path)
