"""What is read from a model directory, and what is refused before any weight is loaded."""

import json
import math
import random
import struct
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import pytest

from edgekit.errors import UsageError
from edgekit.model.spec import Multipliers
from edgekit.source.checkpoint import Checkpoint, read_safetensors
from edgekit.tests.tiny.checkpoints import write_tiny_checkpoint
from edgekit.tests.tiny.random_checkpoints import GEMMA2, random_checkpoint
from edgekit.tests.tiny.stored_names import edit_header


CONFIG = {
    "model_type": "llama", "vocab_size": 6, "hidden_size": 4, "intermediate_size": 5,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 8, "tie_word_embeddings": True, "eos_token_id": 2,
}  # fmt: skip
LAYER = "model.layers.0"
SHAPES = {
    "model.embed_tokens.weight": (6, 4),
    "model.norm.weight": (4,),
    f"{LAYER}.input_layernorm.weight": (4,),
    f"{LAYER}.post_attention_layernorm.weight": (4,),
    f"{LAYER}.self_attn.q_proj.weight": (4, 4),
    f"{LAYER}.self_attn.k_proj.weight": (2, 4),
    f"{LAYER}.self_attn.v_proj.weight": (2, 4),
    f"{LAYER}.self_attn.o_proj.weight": (4, 4),
    f"{LAYER}.mlp.gate_proj.weight": (5, 4),
    f"{LAYER}.mlp.up_proj.weight": (5, 4),
    f"{LAYER}.mlp.down_proj.weight": (4, 5),
}
END_BYTES = 4 * sum(math.prod(shape) for shape in SHAPES.values())
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I8": 1}


@dataclass(frozen=True)
class Model:
    """A model directory of a few hundred bytes."""

    directory: Path

    @property
    def weights(self):
        return self.directory / "model.safetensors"

    def open(self):
        return Checkpoint.open(self.directory)

    def write_config(self, **changes):
        fields = {name: value for name, value in (CONFIG | changes).items() if value != "absent"}
        (self.directory / "config.json").write_text(json.dumps(fields))

    def write_weights(self, shapes=None, *, name="model.safetensors", dtype="F32", edit=None):
        """Write ones; ``edit`` changes the header before it is written."""
        header, data = {}, b""
        for tensor, shape in (SHAPES if shapes is None else shapes).items():
            size = math.prod(shape) * ITEM_BYTES[dtype]
            offsets = [len(data), len(data) + size]
            header[tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
            value = struct.pack("<f", 1.0) if dtype == "F32" else b"\x00"
            data += value * (size // len(value))
        if edit:
            edit(header)
        text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
        path = self.directory / name
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.fixture
def model(tmp_path):
    found = Model(tmp_path)
    found.write_config()
    found.write_weights()
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": []}')
    return found


def refusal(model):
    with pytest.raises(UsageError) as caught:
        model.open()
    assert str(model.directory) in str(caught.value)  # says which file
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_whole_checkpoint_opens(model):
    checkpoint = model.open()
    assert checkpoint.architecture == "llama"
    assert checkpoint.parameters == sum(math.prod(shape) for shape in SHAPES.values())
    assert checkpoint.text.declared_stop_ids == (2,)


def test_some_rows_of_a_weight_are_read_without_the_others(model):
    checkpoint = model.open()
    data = bytearray(model.weights.read_bytes())
    data[-(4 * 4 * 5) + 4 * 5 : -(4 * 4 * 5) + 4 * 6] = struct.pack("<f", 7.0)
    model.weights.write_bytes(data)  # row 1, column 0 of the last tensor
    assert checkpoint.weight("layers.0.down", 1, 2).tolist() == [[7.0, 1, 1, 1, 1], [1.0] * 5]
    assert checkpoint.weight("layers.0.down").shape == (4, 5)


@pytest.mark.parametrize(("role", "row_multiple", "starts"), [
    ("layers.0.query", 1, range(0, 64, 7)),
    ("layers.0.query", 8, range(0, 64, 8)),  # a head is not cut
    ("layers.0.mlp_norm", 1, [0]),
])  # fmt: skip
def test_a_weight_is_read_in_blocks_of_rows(role, row_multiple, starts, tmp_path, monkeypatch):
    np = pytest.importorskip("numpy")
    monkeypatch.setattr("edgekit.source.checkpoint.BLOCK_WEIGHTS", 7 * 64)
    checkpoint = random_checkpoint(tmp_path, "gemma2", **GEMMA2)
    blocks = list(checkpoint.blocks(role, row_multiple=row_multiple))
    expected = checkpoint.weight(role) + checkpoint.spec.unit_offset(role)
    assert [first for first, _ in blocks] == [*starts]
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in blocks]), expected)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_every_stored_precision_is_read_as_float32(model, dtype):
    model.write_weights(dtype=dtype)
    weight = model.open().weight("token_embedding")
    assert weight.dtype.name == "float32"
    assert weight.shape == (6, 4)


def test_bfloat16_is_the_upper_half_of_float32(model):
    model.write_weights(dtype="BF16")
    data = model.weights.read_bytes()
    first = 8 + struct.unpack("<Q", data[:8])[0]
    value = struct.pack("<f", -0.15625)[2:]
    model.weights.write_bytes(data[:first] + value + data[first + 2 :])
    assert model.open().weight("token_embedding")[0, 0] == -0.15625


def test_a_directory_without_a_config_is_no_checkpoint(tmp_path):
    assert "is not a checkpoint" in refusal(Model(tmp_path))


def test_a_path_that_is_not_there_is_no_checkpoint(tmp_path):
    assert "is not a checkpoint" in refusal(Model(tmp_path / "nowhere"))


def test_a_file_is_no_checkpoint_directory(model):
    assert "is not a checkpoint" in refusal(Model(model.weights))


@pytest.mark.parametrize("text", ["{", "[1]", "\x00", '"llama"', "[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(model, text):
    (model.directory / "config.json").write_text(text)
    assert "config.json" in refusal(model)


def test_an_unknown_architecture_is_refused_with_the_known_ones(model):
    model.write_config(model_type="mamba9")
    with pytest.raises(UsageError, match="'mamba9' are not supported") as caught:
        model.open()
    assert "gemma2" in caught.value.hint


def test_a_config_without_a_model_type_says_so(model):
    model.write_config(model_type="absent")
    assert "model_type" in refusal(model)


def test_a_checkpoint_without_a_tokenizer_is_refused(model):
    (model.directory / "tokenizer.json").unlink()
    assert "tokenizer.json" in refusal(model)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"added_tokens": 3}', '{"added_tokens": [{}]}'])
def test_a_damaged_tokenizer_is_refused(model, text):
    (model.directory / "tokenizer.json").write_text(text)
    (model.directory / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert "tokenizer.json" in refusal(model)


def test_a_template_that_is_no_text_is_refused(model):
    (model.directory / "chat_template.jinja").write_bytes(b"{{ '\xff' }}")
    assert "chat_template.jinja is not UTF-8" in refusal(model)


def test_pickles_are_not_opened(model):
    model.weights.rename(model.directory / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"no \*\.safetensors") as caught:
        model.open()
    assert "never opens pickles" in caught.value.hint


@pytest.mark.parametrize("kept_bytes", [0, 7, 8, 200, -200, -1])
def test_a_truncated_file_is_refused_wherever_it_ends(model, kept_bytes):
    data = model.weights.read_bytes()
    model.weights.write_bytes(data[:kept_bytes])
    assert "model.safetensors" in refusal(model)


def test_trailing_bytes_are_refused(model):
    model.weights.write_bytes(model.weights.read_bytes() + b"\x00")
    assert "its header describes" in refusal(model)


def test_a_flipped_bit_in_the_header_is_a_refusal_or_changes_nothing(model):
    data = model.weights.read_bytes()
    shapes = {name: tensor.shape for name, tensor in model.open().tensors.items()}
    header_bytes = struct.unpack("<Q", data[:8])[0]
    for position in range(0, 8 + header_bytes, 7):
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        model.weights.write_bytes(damaged)
        try:
            checkpoint = model.open()
        except UsageError:
            continue
        assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == shapes


@pytest.mark.parametrize("length", [2**63, 2**40, 10**8])
def test_a_header_that_claims_to_be_huge_is_refused_before_it_is_read(model, length):
    data = model.weights.read_bytes()
    model.weights.write_bytes(struct.pack("<Q", length) + data[8:])
    assert f"claims {length} bytes" in refusal(model)


def test_a_missing_tensor_is_named(model):
    model.write_weights({name: shape for name, shape in SHAPES.items() if "v_proj" not in name})
    assert "lacks the tensor model.layers.0.self_attn.v_proj.weight" in refusal(model)


def test_a_tensor_nothing_would_read_is_named(model):
    model.write_weights(SHAPES | {f"{LAYER}.self_attn.q_proj.lora_A.weight": (2, 4)})
    assert "q_proj.lora_A.weight" in refusal(model)


def test_tables_that_are_computed_anyway_may_be_there(model):
    model.write_weights(SHAPES | {f"{LAYER}.self_attn.rotary_emb.inv_freq": (1,)})
    model.open()


def test_a_stored_head_that_is_the_embedding_of_a_tied_model_is_read_once(model):
    model.write_weights(SHAPES | {"lm_head.weight": (6, 4)})
    assert "output_head" not in dict(model.open().spec.weights())
    assert model.open().notes == ()
    model.write_config(tie_word_embeddings=False)
    assert "output_head" in dict(model.open().spec.weights())


def test_a_tensor_that_only_a_prefix_hides_is_named_with_it(model):
    shapes = {f"net.{name}": shape for name, shape in SHAPES.items()}
    del shapes[f"net.{LAYER}.mlp.up_proj.weight"]
    model.write_weights(shapes)
    message = refusal(model)
    assert "holds tensors under 'net.model.', where transformers has 'model.'" in message
    assert f"net.{LAYER}.mlp.up_proj.weight" in message


def test_a_tensor_under_two_names_is_refused(model):
    twice = "model._orig_mod.norm.weight"
    model.write_weights(SHAPES | {twice: (4,)})
    assert "holds a tensor twice" in refusal(model)


def test_a_file_of_other_tensors_is_described(model):
    model.write_weights({"encoder.weight": (4,), "decoder.weight": (4,)})
    with pytest.raises(UsageError, match="lacks the tensor") as caught:
        model.open()
    assert caught.value.hint == "it holds 2 tensors: decoder.weight, encoder.weight"


def test_the_empty_tensors_of_zero_3_are_named_for_what_they_are(model):
    model.write_weights(SHAPES | {f"{LAYER}.mlp.up_proj.weight": (0,)})
    assert "DeepSpeed ZeRO-3" in refusal(model)


def test_heads_that_draft_further_tokens_are_left_out(model):
    model.write_weights(SHAPES | {"mtp.layers.0.mlp.up_proj.weight": (5, 4)})
    assert "without mtp (1 tensor)" in model.open().notes[0]


def test_a_wrapped_text_model_of_an_unknown_kind_is_named(model):
    model.write_config(model_type="seer", text_config={"model_type": "owl"})
    assert "text_config, in a 'seer': models of type 'owl' are not supported" in refusal(model)


def test_a_model_in_the_hubs_cache_has_its_own_name(tmp_path):
    directory = tmp_path / "models--maker--Small-1B" / "snapshots" / "0a1b2c"
    directory.mkdir(parents=True)
    cached = Model(directory)
    cached.write_config()
    cached.write_weights()
    (directory / "tokenizer.json").write_text('{"added_tokens": []}')
    assert cached.open().name == "Small-1B"


def test_masks_of_any_type_may_lie_beside_the_weights(model):
    model.write_weights()
    rest = f"{LAYER}.self_attn.bias"
    edit_header(
        model.weights,
        lambda header: (
            header | {rest: {"dtype": "BOOL", "shape": [0], "data_offsets": [END_BYTES, END_BYTES]}}
        ),
    )
    model.open()


def test_shards_without_an_index_must_all_be_there(model):
    model.weights.rename(model.directory / "model-00001-of-00002.safetensors")
    assert "holds model-00001-of-00002.safetensors and not model-00002-of-00002" in refusal(model)


@pytest.mark.parametrize("name", ["model_name", "trained_with", "base_path"])
def test_a_name_that_a_tool_left_in_the_config_is_noted(model, name):
    """Unsloth writes ``model_name`` into every config that it saves."""
    model.write_config(**{name: "unsloth/some-model"})
    (note,) = model.open().notes
    assert f"{name} = 'unsloth/some-model'" in note


@pytest.mark.parametrize("value", [2, 0.5, True, False, {"a": 1}, ["full"]])
def test_an_unknown_field_that_is_no_name_is_refused(model, value):
    model.write_config(mystery=value)
    assert "mystery" in refusal(model)


def test_fields_that_tools_leave_behind_are_known(model):
    model.write_config(
        context_window_size=4096, prefill_chunk_size=128, num_labels=2, tf_legacy_loss=False,
        pruned_heads={}, add_cross_attention=False, cross_attention_hidden_size=None,
    )  # fmt: skip
    assert model.open().notes == ()
    model.write_config(add_cross_attention=True)
    assert "add_cross_attention" in refusal(model)


@pytest.mark.parametrize("shape", [(5, 4), (4, 6), (24,), (), (6, 4, 1)])
def test_a_tensor_of_another_shape_is_named_with_both_shapes(model, shape):
    model.write_weights(SHAPES | {"model.embed_tokens.weight": shape})
    message = refusal(model)
    assert f"model.embed_tokens.weight in {model.directory} has shape {list(shape)}" in message
    assert "[6, 4]" in message


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8"])
def test_quantized_checkpoints_are_refused(model, dtype):
    model.write_weights(dtype=dtype)
    assert f"has dtype '{dtype}'" in refusal(model)


def test_overlapping_tensors_are_refused(model):
    def overlap(header):
        first, last = header["model.norm.weight"]["data_offsets"]
        header["model.norm.weight"]["data_offsets"] = [first - 4, last - 4]

    model.write_weights(edit=overlap)
    assert "claims bytes" in refusal(model)


@pytest.mark.parametrize(
    ("field", "value"),
    [("data_offsets", None), ("data_offsets", [0]), ("data_offsets", ["0", "16"]),
     ("data_offsets", [-16, 0]), ("data_offsets", [0, 2**70]), ("shape", [2**40, 2**40]),
     ("shape", [-4]), ("shape", "4"), ("shape", None), ("dtype", None), ("dtype", ["F32"])],
)  # fmt: skip
def test_a_header_that_makes_no_sense_is_refused(model, field, value):
    def damage(header):
        header["model.norm.weight"][field] = value

    model.write_weights(edit=damage)
    assert "model.norm.weight" in refusal(model)


@pytest.mark.parametrize("entry", [None, 3, [1, 2], "F32"])
def test_a_header_entry_that_is_no_object_is_refused(model, entry):
    model.write_weights(edit=lambda header: header.update({"model.norm.weight": entry}))
    assert "model.norm.weight" in refusal(model)


def test_a_header_beyond_what_safetensors_itself_reads_is_refused(model, monkeypatch):
    length = struct.unpack("<Q", model.weights.read_bytes()[:8])[0]
    monkeypatch.setattr("edgekit.source.checkpoint.MAX_HEADER_BYTES", length)
    model.open()
    monkeypatch.setattr("edgekit.source.checkpoint.MAX_HEADER_BYTES", length - 1)
    assert f"claims {length} bytes" in refusal(model)


def split(model, *, names=("a.safetensors", "b.safetensors"), index=None):
    """Write the weights as two shards and their index."""
    first, second = dict(list(SHAPES.items())[:5]), dict(list(SHAPES.items())[5:])
    model.weights.unlink()
    model.write_weights(first, name="a.safetensors")
    model.write_weights(second, name="b.safetensors")
    where = dict.fromkeys(first, names[0]) | dict.fromkeys(second, names[1])
    text = json.dumps({"weight_map": where} if index is None else index)
    (model.directory / "model.safetensors.index.json").write_text(text)


def test_shards_are_read_as_one(model):
    split(model)
    assert model.open().tensors.keys() == SHAPES.keys()


def test_one_whole_file_counts_before_an_index_and_what_lies_beside_it(model):
    """As in transformers."""
    whole = model.weights.read_bytes()
    split(model)
    model.weights.write_bytes(whole)
    assert {tensor.path for tensor in model.open().tensors.values()} == {model.weights}
    (model.directory / "model.safetensors.index.json").unlink()
    assert {tensor.path for tensor in model.open().tensors.values()} == {model.weights}


def test_a_missing_shard_is_named(model):
    split(model)
    (model.directory / "b.safetensors").unlink()
    assert "b.safetensors is missing" in refusal(model)


def test_a_truncated_shard_is_named(model):
    split(model)
    path = model.directory / "b.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    assert "b.safetensors" in refusal(model)


def test_a_tensor_in_two_shards_is_refused(model):
    split(model)
    model.write_weights(SHAPES, name="b.safetensors")
    assert "twice" in refusal(model)


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/etc/passwd", "x/y.safetensors", "", "..", 7]
)
def test_an_index_that_points_elsewhere_is_refused(model, name):
    split(model, names=("a.safetensors", name))
    assert "not a file next to it" in refusal(model)


@pytest.mark.parametrize("index", [{}, {"weight_map": ["a.safetensors"]}, {"weight_map": None}])
def test_an_index_without_a_map_is_refused(model, index):
    split(model, index=index)
    assert "weight_map" in refusal(model)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_named_when_it_is_read(model, value):
    data = bytearray(model.weights.read_bytes())
    data[-4:] = struct.pack("<f", value)
    model.weights.write_bytes(data)
    checkpoint = model.open()
    with pytest.raises(UsageError, match=r"mlp\.down_proj\.weight .* holds NaN or infinity"):
        checkpoint.weight("layers.0.down")


def test_a_file_that_shrinks_after_opening_is_noticed(model):
    checkpoint = model.open()
    model.weights.write_bytes(model.weights.read_bytes()[:-4])
    with pytest.raises(UsageError, match="became shorter"):
        checkpoint.weight("layers.0.down")


def test_a_header_is_read_without_its_weights(model):
    [first, *_] = read_safetensors(model.weights)
    assert first[0] == "model.embed_tokens.weight"
    assert first[1].size_bytes == 6 * 4 * 4


@pytest.mark.toolchain
def test_norms_of_heads_are_stacked_into_one_weight(tmp_path):
    import numpy as np

    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path, "stablelm-12b"))
    stacked = checkpoint.weight("layers.1.query_norm")
    assert stacked.shape == (4, 16)
    name = "model.layers.1.self_attn.q_layernorm.norms.2.weight"
    assert np.array_equal(stacked[2], checkpoint.tensors[name].read())
    assert np.array_equal(stacked[1:3], checkpoint.weight("layers.1.query_norm", 1, 2))


@pytest.mark.toolchain
def test_a_missing_norm_of_one_head_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    path = write_tiny_checkpoint(tmp_path, "stablelm-12b") / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.self_attn.q_layernorm.norms.2.weight"]
    save_file(weights, path)
    with pytest.raises(UsageError, match=r"lacks .*q_layernorm\.norms\.2\.weight"):
        Checkpoint.open(tmp_path)


def fused(*, attention_rows=8, mlp_rows=10):
    """Return the shapes of a Phi-3, which fuses queries, keys and values, and gate and up."""
    parts = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    plain = {name: shape for name, shape in SHAPES.items() if not any(p in name for p in parts)}
    return plain | {
        f"{LAYER}.self_attn.qkv_proj.weight": (attention_rows, 4),
        f"{LAYER}.mlp.gate_up_proj.weight": (mlp_rows, 4),
    }


def test_a_fused_tensor_of_just_the_rows_in_use_opens(model):
    model.write_config(model_type="phi3")
    model.write_weights(fused())
    assert model.open().parameters == sum(math.prod(shape) for shape in fused().values())


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ({"attention_rows": 9}, "qkv_proj.weight in {} has 9 rows, the config uses 8"),
        ({"mlp_rows": 11}, "gate_up_proj.weight in {} has 11 rows, the config uses 10"),
        ({"attention_rows": 7}, "qkv_proj.weight in {} has shape [7, 4], the config asks for"),
    ],
)
def test_rows_of_a_fused_tensor_that_nothing_would_read_are_refused(model, rows, said):
    model.write_config(model_type="phi3")
    model.write_weights(fused(**rows))
    assert said.format(model.directory) in refusal(model)


@pytest.mark.toolchain
def test_a_fused_tensor_gives_up_its_parts(tmp_path):
    import numpy as np

    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path, "phi3-longrope"))
    parts = [checkpoint.weight(f"layers.0.{role}") for role in ("query", "key", "value")]
    whole = checkpoint.tensors["model.layers.0.self_attn.qkv_proj.weight"].read()
    assert np.array_equal(np.concatenate(parts), whole)


def safetensors_mutants(content, header_bytes, *, count, seed):
    """Yield the file with flipped bits, other digits and lengths, cut off, or lengthened."""
    chance = random.Random(seed)
    for _ in range(count):
        mutant = bytearray(content)
        match chance.randrange(5):
            case 0:
                mutant[chance.randrange(len(mutant))] ^= 1 << chance.randrange(8)
            case 1:
                place = chance.randrange(8, header_bytes)
                mutant[place] = chance.choice(b'0123456789-."{}[]:,eE')
            case 2:
                mutant[:8] = struct.pack("<Q", chance.choice([0, 1, 2**31, 2**63, 2**64 - 1]))
            case 3:
                del mutant[chance.randrange(len(mutant)) :]
            case _:
                place = chance.randrange(8, header_bytes)
                mutant[place : place + chance.randrange(9)] = chance.randbytes(chance.randrange(9))
        yield bytes(mutant)


@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_no_mutation_of_a_safetensors_file_crashes_its_reader(tmp_path, count):
    """Each damaged file is refused in a sentence, or reads as tensors that are there."""
    np = pytest.importorskip("numpy")
    header = {
        "__metadata__": {"format": "pt"},
        "model.embed_tokens.weight": {"dtype": "F32", "shape": [8, 4], "data_offsets": [0, 128]},
        "model.norm.weight": {"dtype": "BF16", "shape": [4], "data_offsets": [128, 136]},
        "lm_head.weight": {"dtype": "F16", "shape": [8, 4], "data_offsets": [136, 200]},
    }
    text = json.dumps(header).encode()
    content = struct.pack("<Q", len(text)) + text + bytes(200)
    path, refused = tmp_path / "model.safetensors", 0
    tracemalloc.start()
    for mutant in safetensors_mutants(content, 8 + len(text), count=count, seed=20261124):
        path.write_bytes(mutant)
        try:
            for _, tensor in read_safetensors(path):
                if tensor.shape:
                    assert tensor.read().dtype == np.float32
        except UsageError:
            refused += 1
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count // 2 < refused < count
    assert peak_bytes < 64 * 2**20


def test_a_norm_that_adds_one_is_multiplied_with_its_one(tmp_path):
    np = pytest.importorskip("numpy")
    plain = random_checkpoint(tmp_path / "a", "gemma2", **GEMMA2, is_tied=True)
    scaled = random_checkpoint(
        tmp_path / "b", "gemma2", **GEMMA2, is_tied=True, multipliers=Multipliers(residual=0.25)
    )
    role = "layers.1.mlp_post_norm"
    (_, before), (_, after) = (next(it.blocks(role)) for it in (plain, scaled))
    np.testing.assert_allclose(after, before / 4, rtol=1e-6)
    np.testing.assert_allclose(scaled.weight(role) + 1, after, rtol=1e-6)
