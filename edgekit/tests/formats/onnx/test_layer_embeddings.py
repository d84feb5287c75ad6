"""Decoders whose layers have embeddings of their own, or read the keys of earlier ones: Gemma 4."""

from dataclasses import replace
from pathlib import Path

import pytest

from edgekit.errors import BundleError
from edgekit.formats import BuildRequest
from edgekit.formats.onnx import conversion, memory, model, tensor_types
from edgekit.formats.onnx.runtime import OnnxSession
from edgekit.formats.onnx.tensor_types import RECIPES
from edgekit.model.mixers import Attention
from edgekit.model.spec import Layer, LayerEmbedding
from edgekit.source import opening
from edgekit.tests.needs import needs
from edgekit.tests.tiny.checkpoints import WINDOW_TOKENS, write_tiny_checkpoint
from edgekit.tests.tiny.random_checkpoints import random_checkpoint


np = pytest.importorskip("numpy")

KINDS = ("gemma4", "gemma4-other-donors", "gemma4-31b")
MAX_KL_NATS = 1e-9
ROWS, LAYERS, WIDTH = 300, 5, 64
OWN = LayerEmbedding(
    width=WIDTH, vocab_size=ROWS, scale=8.0, projection_scale=0.125, sum_scale=0.5**0.5
)
# Gemma 4 E2B: rows, layers, numbers of a token for each.
E2B = (262_144, 35, 256)
MIB = 2**20


def embedded(directory):
    return random_checkpoint(
        directory, "gemma4_text", layers=LAYERS, layer_embedding=OWN, has_layer_scales=True,
        is_tied=True, has_post_norms=True,
    )  # fmt: skip


def convert(checkpoint, directory, recipe="F32"):
    directory.mkdir(parents=True, exist_ok=True)
    request = BuildRequest(recipe=RECIPES[recipe])
    return directory / conversion.convert(checkpoint, request, directory, progress=lambda _: None)


def lay_out(checkpoint, recipe):
    return conversion.lay_out(checkpoint, BuildRequest(recipe=RECIPES[recipe]))


# Tables


@pytest.mark.parametrize(
    ("tensor_type", "layers", "largest"),
    # 262,144 rows of 256 numbers: in 8 bits 64 MiB, so that two layers fill 128 MiB.
    [("F32", 1, 256), ("F16", 1, 128), ("INT8", 2, 128), ("UINT4", 4, 128), ("INT4_F16", 4, 128)],
)
def test_a_table_has_as_many_layers_as_every_webgpu_binds(tensor_type, layers, largest):
    rows, count, width = E2B
    tables = tensor_types.tables(
        "layer_embedding", (rows, count * width), tensor_type, part_columns=width
    )
    assert sum(tables.values()) == count * width
    assert len(tables) == -(-count // layers)
    sizes = [
        tensor.size_bytes
        for name, columns in tables.items()
        for tensor in tensor_types.tensors(name, (rows, columns), tensor_type)
    ]
    assert max(sizes) == largest * MIB


def test_a_table_that_every_webgpu_binds_stays_whole():
    found = tensor_types.tables("layer_embedding", (ROWS, 320), "UINT4", part_columns=WIDTH)
    assert found == {"layer_embedding": 320}


@pytest.mark.parametrize(
    ("recipe", "table", "projection"),
    [("F32", "F32", "F32"), ("F16", "F16", "F16"), ("INT8", "INT8", "INT8"),
     ("UINT4", "INT8", "INT8"), ("INT4_128", "INT8", "INT8"), ("UINT4_ALL", "UINT4", "UINT4"),
     ("UINT4_GPU", "UINT4_F16", "INT8_F16")],
)  # fmt: skip
def test_what_is_looked_up_keeps_eight_bits_unless_a_gpu_must_hold_it(
    recipe, table, projection, tmp_path
):
    spec, chosen = embedded(tmp_path).spec, RECIPES[recipe]
    assert chosen.tensor_type_for("layer_embedding", spec) == table
    assert chosen.tensor_type_for("layer_embedding_projection", spec) == projection
    assert chosen.tensor_type_for("layers.1.layer_gate", spec) == chosen.default
    for role in ("layer_embedding_norm", "layers.1.layer_norm", "layers.1.layer_scale"):
        assert chosen.tensor_type_for(role, spec) == "F32"


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_buffer_holds_the_tables_together_and_the_largest_is_told(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_types, "TABLE_BYTES", 1)  # a table for each layer
    checkpoint = embedded(tmp_path)
    layout = lay_out(checkpoint, recipe)
    planned = conversion.plan(checkpoint, BuildRequest(recipe=RECIPES[recipe]))
    found = [it for it in planned.tensors if it.name.startswith("layer_embedding.")]
    codes = [it for it in found if it.name[-1].isdigit()]
    assert [it.name for it in codes] == [f"layer_embedding.{layer}" for layer in range(LAYERS)]
    assert {it.shape[0] for it in found} == {ROWS}
    assert layout.largest_buffer is not None
    assert layout.largest_buffer.size_bytes >= max(it.size_bytes for it in found)
    assert not layout.largest_buffer.name.startswith("layer_embedding.")
    assert any("are in 5 tables" in note for note in layout.notes)


@pytest.mark.parametrize("recipe", ["F32", "INT8", "UINT4_ALL"])
def test_tables_side_by_side_are_the_whole_one(recipe, tmp_path, monkeypatch):
    checkpoint = embedded(tmp_path / "model")
    whole = convert(checkpoint, tmp_path / "whole", recipe)
    size = max(tensor.size_bytes for tensor in model.read(whole) if "layer_em" in tensor.name)
    monkeypatch.setattr(tensor_types, "TABLE_BYTES", size // 2)  # two, two and one layer
    parted = convert(checkpoint, tmp_path / "parted", recipe)
    names = [tensor.name for tensor in model.read(parted)]
    assert "layer_embedding.2" in names
    assert "layer_embedding.3" not in names
    assert sorted(tensor_types.contents(parted)) == sorted(tensor_types.contents(whole))
    for suffix in {name.removeprefix("layer_embedding.2") for name in names if "ding.2" in name}:
        tables = [values(parted, f"layer_embedding.{n}{suffix}") for n in range(3)]
        expected = values(whole, f"layer_embedding{suffix}")
        np.testing.assert_array_equal(np.concatenate(tables, axis=1), expected)


def values(path, name):
    tensor = next(it for it in model.read(path) if it.name == name)
    data = (path.parent / tensor.file).read_bytes()[tensor.offset :][: tensor.size_bytes]
    return np.frombuffer(data, tensor.dtype).reshape(tensor.shape)


def test_tables_that_do_not_fit_together_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_types, "TABLE_BYTES", 1)
    path = convert(embedded(tmp_path / "model"), tmp_path)
    found = model.read(path)
    short = [
        replace(it, shape=(ROWS - 1, WIDTH)) if it.name == "layer_embedding.3" else it
        for it in found
    ]
    monkeypatch.setattr(model, "read", lambda _: short)
    with pytest.raises(BundleError, match=r"layer_embedding\.3 is stored in a way"):
        tensor_types.contents(path)


# Memory


def test_a_table_is_held_as_stored_and_only_layers_with_keys_of_their_own_cache_them(tmp_path):
    own, read = Attention(heads=4, num_kv_heads=2, head_dim=16, softmax_scale=1.0), 2
    wide = replace(own, num_kv_heads=1, head_dim=32)
    layers = (
        Layer(), Layer(), Layer(mixer=wide),
        Layer(mixer=replace(own, cache_of=1)), Layer(mixer=replace(wide, cache_of=read)),
    )  # fmt: skip
    checkpoint = embedded(tmp_path)
    spec = replace(checkpoint.spec, attention=own, layers=layers)
    assert memory.cache_bytes(spec, context_tokens=10, is_half=False) == 4 * 10 * 2 * (32 + 32 + 32)
    placements = lay_out(checkpoint, "F16").placements
    (table,) = (it for it in placements if it.role == "layer_embedding")
    assert memory.weight_bytes(spec, table, is_half=False) == 2 * ROWS * LAYERS * WIDTH
    uniform = replace(spec, layers=layers[:3])
    copied = memory.compute_bytes(spec, context_tokens=100)
    copied -= memory.compute_bytes(uniform, context_tokens=100)
    # Keys and values of one layer once more, and what two layers more are given.
    assert copied == 4 * (100 * 2 * 32 + 100 * 3 * 2 * WIDTH)


# What ONNX Runtime makes of it


@pytest.fixture(scope="module")
def longest(tmp_path_factory):
    """Return for each kind a checkpoint of 4,096 tokens, its model and its logits."""
    pytest.importorskip("torch")
    pytest.importorskip("onnxruntime")
    transformers_logits = pytest.importorskip("edgekit.proof.transformers_logits")
    found = {}
    for kind in KINDS:
        directory = tmp_path_factory.mktemp(kind)
        source = write_tiny_checkpoint(directory / "model", kind, max_position_embeddings=4096)
        checkpoint = opening.open_checkpoint(source)
        ids = np.random.default_rng(1).integers(0, checkpoint.spec.vocab_size, 4000).tolist()
        texts = [ids, ids[2000:2150]]
        expected = list(transformers_logits.logits(checkpoint, texts))
        found[kind] = convert(checkpoint, directory), texts, expected
    return found


def open_session(path: Path, *, tokens: int = 4096) -> OnnxSession:
    return OnnxSession(path, context_tokens=tokens, threads=1)


def mean_kl_nats(expected, said):
    """Return how far logits are off: the mean over rows."""
    expected, said = (np.asarray(rows, np.float64) for rows in (expected, said))
    logs = [rows - rows.max(-1, keepdims=True) for rows in (expected, said)]
    logs = [rows - np.log(np.exp(rows).sum(-1, keepdims=True)) for rows in logs]
    return float((np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean())


@pytest.mark.toolchain
@needs("torch", "onnxruntime")
@pytest.mark.parametrize("kind", KINDS)
def test_four_thousand_tokens_and_a_text_after_them_say_what_transformers_says(kind, longest):
    path, texts, expected = longest[kind]
    session = open_session(path)
    for ids, rows in zip(texts, expected, strict=True):
        whole = session.all_logits(ids)
        assert mean_kl_nats(rows, whole) <= MAX_KL_NATS
        assert (whole.argmax(1) == rows.argmax(1)).mean() > 0.999
    said = [
        session.prefill(texts[1][:20]).copy(),
        *(session.decode(i).copy() for i in texts[1][20:]),
    ]
    assert mean_kl_nats(expected[1][19:], said) <= MAX_KL_NATS
    session.close()


@pytest.mark.toolchain
@needs("torch", "onnxruntime")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [1, 7, 8, 9, *(WINDOW_TOKENS + n for n in (-1, 0, 1)), 63, 64, 65])
def test_a_text_may_be_cut_anywhere(kind, cut, longest):
    path, (_, ids), (_, expected) = longest[kind]
    session = open_session(path, tokens=150)
    said = [session.prefill(ids[:cut]).copy(), session.prefill(ids[cut:]).copy()]
    assert mean_kl_nats(expected[[cut - 1, -1]], said) <= MAX_KL_NATS
    session.close()


@pytest.mark.toolchain
@needs("torch", "onnxruntime")
@pytest.mark.parametrize("recipe", ["F32", "F16_GPU", "INT8", "UINT4_ALL"])
def test_many_tables_say_what_one_says(recipe, tmp_path, monkeypatch):
    source = write_tiny_checkpoint(tmp_path / "model", "gemma4", hidden_size_per_layer_input=64)
    checkpoint, said = opening.open_checkpoint(source), []
    ids = list(range(3, 60))
    for table_bytes in (2**27, 1):
        monkeypatch.setattr(tensor_types, "TABLE_BYTES", table_bytes)
        path = convert(checkpoint, tmp_path / str(table_bytes), recipe)
        session = open_session(path, tokens=60)
        said.append(session.all_logits(ids))
        session.close()
    np.testing.assert_array_equal(*said)
