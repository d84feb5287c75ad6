import ctypes
import functools
import logging
import re

import pytest

from edgekit.errors import MissingDependencyError, UsageError
from edgekit.formats.gguf import layout, tensor_types
from edgekit.formats.gguf.layout import ALL_TENSOR_TYPES, TENSOR_TYPE_NUMBERS, TensorEntry, Writer
from edgekit.formats.gguf.tensor_types import FILE_TYPES, RECIPES, TENSOR_TYPES, quantize, stored_as
from edgekit.model.mixers import Attention
from edgekit.model.norm import Norm
from edgekit.model.rope import Rope
from edgekit.model.spec import DecoderSpec, Layer


DEPTH = 18  # the first sixteenth, the first eighth and the first four layers all differ


def make_spec(*, heads, num_kv_heads, head_dim, intermediate_size, is_tied, depth=DEPTH):
    rope = Rope(width=head_dim, theta=10_000.0)
    return DecoderSpec(
        vocab_size=5,
        hidden_size=heads * head_dim,
        intermediate_size=intermediate_size,
        context_tokens=64,
        layers=(Layer(rope=rope),) * depth,
        attention=Attention(
            heads=heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            softmax_scale=head_dim**-0.5,
            has_qkv_bias=True,
        ),
        norm=Norm(kind="rms", epsilon=1e-5),
        is_tied=is_tied,
    )


SPECS = {
    "256 columns, grouped": make_spec(
        heads=8, num_kv_heads=2, head_dim=32, intermediate_size=512, is_tied=False
    ),
    "256 columns, tied": make_spec(
        heads=8, num_kv_heads=4, head_dim=32, intermediate_size=256, is_tied=True
    ),
    "96 columns, tied": make_spec(
        heads=6, num_kv_heads=3, head_dim=16, intermediate_size=160, is_tied=True
    ),
    "576 columns, 1536 in the mlp, tied": make_spec(  # SmolLM2-135M but for its depth
        heads=9, num_kv_heads=3, head_dim=64, intermediate_size=1536, is_tied=True
    ),
    "80 columns, grouped": make_spec(
        heads=5, num_kv_heads=1, head_dim=16, intermediate_size=112, is_tied=False
    ),
}


# Which tensor type


@pytest.mark.parametrize(
    ("wanted", "columns", "stored"),
    [
        ("Q4_K", 256, "Q4_K"),
        ("Q6_K", 576, "Q8_0"),
        ("Q5_K", 576, "Q5_1"),
        ("Q4_K", 576, "Q5_0"),
        ("Q3_K", 576, "Q4_0"),
        ("Q2_K", 576, "Q4_0"),
        ("Q4_0", 576, "Q4_0"),
        ("Q4_0", 100, "F16"),
        ("Q6_K", 100, "F16"),
        ("IQ4_NL", 100, "F16"),
        ("BF16", 7, "BF16"),
        ("F32", 7, "F32"),
    ],
)
def test_rows_that_fill_no_block_get_another_storage(wanted, columns, stored):
    assert stored_as(wanted, columns) == stored


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.name)
def test_a_recipe_names_known_storages_and_keeps_small_weights_exact(recipe):
    weights = dict(SPECS["96 columns, tied"].weights())
    assert {"final_norm", "token_embedding"} < weights.keys()
    for role, shape in weights.items():
        wanted = recipe.tensor_type_for(role, SPECS["96 columns, tied"])
        assert wanted in TENSOR_TYPES
        assert len(shape) > 1 or wanted == "F32"


def test_every_recipe_has_a_file_type():
    assert FILE_TYPES.keys() == RECIPES.keys()


def test_a_deep_model_gets_more_bits_where_llama_quantize_gives_them():
    spec = make_spec(
        heads=8, num_kv_heads=4, head_dim=32, intermediate_size=256, is_tied=True, depth=30
    )
    wanted = [RECIPES["Q4_K_M"].tensor_type_for(f"layers.{i}.down", spec) for i in range(30)]
    sensitive = [index for index, name in enumerate(wanted) if name == "Q6_K"]
    assert sensitive == [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29]


# Encoding


@pytest.fixture(scope="module")
def np():
    return pytest.importorskip("numpy")


def weights_of(np, rows, columns, seed=0):
    """Return weights as they are in models: near zero, with outliers, and rows of zeros."""
    chance = np.random.default_rng(seed)
    values = chance.normal(0, 0.05, (rows, columns)).astype(np.float32)
    values[chance.random((rows, columns)) < 0.002] *= 30
    values[rows // 2] = 0
    return values


def test_f32_is_kept_bit_by_bit(np):
    values = weights_of(np, 3, 7)
    assert quantize(values, "F32").tobytes() == values.tobytes()


@pytest.mark.parametrize(
    ("bits", "rounded"),
    [
        (0x3F807FFF, 0x3F80), (0x3F808000, 0x3F80), (0x3F808001, 0x3F81),  # around 1 + 2**-8
        (0x3F817FFF, 0x3F81), (0x3F818000, 0x3F82), (0x3F818001, 0x3F82),  # 1 + 3 * 2**-8
        (0xBF808000, 0xBF80), (0xBF818000, 0xBF82), (0x00008000, 0x0000), (0x00018000, 0x0002),
        (0x3FFF8000, 0x4000), (0x80000000, 0x8000),
    ],
)  # fmt: skip
def test_bfloat16_takes_the_nearest_and_of_two_the_even_one(bits, rounded, np):
    values = np.array([[bits]], np.uint32).view(np.float32)
    assert quantize(values, "BF16").view("<u2").tolist() == [[rounded]]


@pytest.mark.parametrize(
    ("value", "rounded"),
    [(1 + 2**-11, 0x3C00), (1 + 3 * 2**-11, 0x3C02), (1 + 2**-11 + 2**-20, 0x3C01),
     (-1 - 3 * 2**-11, 0xBC02), (65504.0, 0x7BFF), (65519.9, 0x7BFF)],
)  # fmt: skip
def test_float16_takes_the_nearest_and_of_two_the_even_one(value, rounded, np):
    values = np.array([[value]], np.float32)
    assert quantize(values, "F16").view("<u2").tolist() == [[rounded]]


def test_a_vector_is_one_row(np):
    assert quantize(np.ones(5, np.float32), "F32").shape == (1, 20)


def test_a_weight_beyond_f16_is_refused_not_made_infinite(np):
    with pytest.raises(UsageError, match="a weight is 65520, too large for F16"):
        quantize(np.array([[65520.0]], np.float32), "F16")


def test_columns_that_fill_no_block_are_a_mistake_of_the_caller(np):
    with pytest.raises(ValueError, match="48 columns do not fill the blocks of Q8_0"):
        quantize(np.ones((2, 48), np.float32), "Q8_0")


def test_without_ggml_the_way_out_is_named(np, monkeypatch):
    tensor_types._ggml.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError) as caught:
        quantize(np.ones((2, 32), np.float32), "Q8_0")
    assert caught.value.hint == "pip install 'edgekit[gguf]'"


@pytest.mark.parametrize("name", TENSOR_TYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_refused(name, bad, np):
    if name not in {"F32", "F16", "BF16"}:
        pytest.importorskip("llama_cpp")
    values = weights_of(np, 4, 256)
    values[3, 60] = bad
    with pytest.raises(UsageError, match="a weight is NaN or infinite"):
        quantize(values, name)


# Against ggml and llama.cpp


@pytest.fixture(scope="module")
def llama_cpp():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GGML_NO_BACKTRACE", "1")
        module = pytest.importorskip("llama_cpp")
        patch.setattr(module._logger.logger, "level", logging.ERROR)
        yield module


@pytest.mark.toolchain
def test_the_sizes_of_every_storage_are_those_of_ggml(llama_cpp):
    ggml = tensor_types._ggml()
    ggml.ggml_type_name.restype = ctypes.c_char_p
    ggml.ggml_blck_size.restype = ctypes.c_int64
    ggml.ggml_type_size.restype = ctypes.c_size_t
    assert TENSOR_TYPES.keys() <= TENSOR_TYPE_NUMBERS.keys()
    for name, number in TENSOR_TYPE_NUMBERS.items():
        assert ggml.ggml_type_name(number).decode().upper() == name
        assert ggml.ggml_blck_size(number) == ALL_TENSOR_TYPES[name].block_weights
        assert ggml.ggml_type_size(number) == ALL_TENSOR_TYPES[name].block_bytes


@pytest.mark.toolchain
@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_halves_round_as_in_ggml(name, np, llama_cpp):
    chance = np.random.default_rng(1)
    bits = chance.integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    values = bits[np.abs(bits) < 65_000]
    ties = np.arange(0x3F800000, 0x3F820000, 0x800, dtype=np.uint32).view(np.float32)
    values = np.concatenate([values, ties, chance.normal(0, 1e-6, 10_000)]).astype(np.float32)
    expected = np.empty(values.size, np.uint16)
    tensor_types._ggml().ggml_quantize_chunk(
        TENSOR_TYPE_NUMBERS[name], values.ctypes.data, expected.ctypes.data, 0, 1, values.size, None
    )
    assert quantize(values, name).tobytes() == expected.tobytes()


# Of weights with outliers, relative to their squares; twice what was measured.
SQUARED_ERRORS = {
    "BF16": 7e-6, "Q8_0": 3e-4, "Q6_K": 0.002, "Q5_K": 0.005, "Q5_1": 0.006, "Q5_0": 0.011,
    "Q4_K": 0.013, "Q4_1": 0.03, "Q4_0": 0.018, "IQ4_NL": 0.018, "Q3_K": 0.02, "Q2_K": 0.18,
}  # fmt: skip


@pytest.mark.toolchain
@pytest.mark.parametrize("name", SQUARED_ERRORS)
def test_what_is_encoded_decodes_to_nearly_the_same(name, np, llama_cpp, tmp_path):
    pytest.importorskip("gguf")
    values = weights_of(np, 6, 512)
    entry = TensorEntry(name="t", shape=(6, 512), tensor_type=name)
    with Writer(tmp_path / "x.gguf", {}, [entry]) as writer:
        writer.write("t", quantize(values, name))
    file = layout.read(tmp_path / "x.gguf")
    decoded = layout.read_tensor(file, file.tensors[0])
    error = float(np.square(decoded - values).sum() / np.square(values).sum())
    assert 0 < error < SQUARED_ERRORS[name]
    assert np.array_equal(layout.read_tensor(file, file.tensors[0], first_row=4), decoded[4:])


@pytest.mark.toolchain
def test_a_matrix_of_many_chunks_is_encoded_as_its_rows(np, llama_cpp, monkeypatch):
    values = weights_of(np, 101, 64)
    whole = quantize(values, "Q5_0")
    monkeypatch.setattr(tensor_types, "_CHUNK_WEIGHTS", 64 * 7)
    assert np.array_equal(quantize(values, "Q5_0"), whole)
    assert np.array_equal(quantize(values[50:53], "Q5_0"), whole[50:53])


@pytest.mark.toolchain
def test_many_blocks_are_encoded_as_each_of_them(np, llama_cpp):
    blocks = [
        (f"tensor {index}", weights_of(np, rows, 64, seed=index), name)
        for index, (rows, name) in enumerate([(1, "F32"), (9, "Q8_0"), (70, "Q4_0"), (3, "F16")])
    ]
    importance = {"tensor 2": np.linspace(0.1, 2, 64, dtype=np.float32)}
    found = list(tensor_types.quantize_each(iter(blocks), importance=importance))
    assert [name for name, _ in found] == [name for name, *_ in blocks]
    for (name, values, kind), (_, encoded) in zip(blocks, found, strict=True):
        expected = quantize(values, kind, importance=importance.get(name))
        assert np.array_equal(encoded, expected)
    assert not np.array_equal(found[2][1], quantize(blocks[2][1], "Q4_0"))


def test_no_block_is_made_long_before_its_turn(np):
    made = []

    def blocks():
        for index in range(9):
            made.append(index)
            yield f"{index}", np.ones((1, 8), np.float32), "F32"

    for count, _ in enumerate(tensor_types.quantize_each(blocks())):
        assert len(made) <= count + 2
    assert made == [*range(9)]


def test_the_tensor_with_a_bad_weight_is_named(np):
    blocks = [
        ("good", np.ones((1, 8), np.float32), "F16"),
        ("bad", np.full((1, 8), np.inf, np.float32), "F16"),
    ]
    with pytest.raises(UsageError, match="bad: a weight is NaN or infinite"):
        list(tensor_types.quantize_each(blocks))


@pytest.mark.toolchain
@pytest.mark.parametrize("name", [name for name in TENSOR_TYPES if "F" not in name])
@pytest.mark.parametrize("value", [2.7e8, -1e12, 1e38])
def test_a_weight_that_no_scale_can_hold_is_refused(name, value, np, llama_cpp):
    values = weights_of(np, 4, 256)
    values[3, 60] = value
    with pytest.raises(UsageError, match=f"too large for {name}"):
        quantize(values, name)


@pytest.mark.toolchain
def test_importance_of_the_wrong_length_is_a_mistake_of_the_caller(np, llama_cpp):
    with pytest.raises(ValueError, match="importance has the shape"):
        quantize(weights_of(np, 2, 64), "Q4_0", importance=np.ones(32, np.float32))


NAMES = {
    "token_embedding": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "output_head": "output.weight",
    "attention_norm": "attn_norm.weight",
    "query": "attn_q.weight",
    "query_bias": "attn_q.bias",
    "key": "attn_k.weight",
    "key_bias": "attn_k.bias",
    "value": "attn_v.weight",
    "value_bias": "attn_v.bias",
    "attention_output": "attn_output.weight",
    "mlp_norm": "ffn_norm.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
}


def gguf_name(role):
    layer = re.fullmatch(r"layers\.(\d+)\.(\w+)", role)
    return f"blk.{layer[1]}.{NAMES[layer[2]]}" if layer else NAMES[role]


@functools.cache
def make_weights(label):
    """Return every weight by role; matrices have three rows, since only columns matter here."""
    import numpy as np

    shapes = [(role, (3, *s[1:]) if s[1:] else s) for role, s in SPECS[label].weights()]
    chance = np.random.default_rng(7)
    return {
        role: weights_of(np, shape[0], shape[1], seed=index)
        if shape[1:]
        else chance.normal(1, 0.1, shape).astype(np.float32)
        for index, (role, shape) in enumerate(shapes)
    }


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Write the F32 files that llama.cpp must quantize, each once."""
    directory = tmp_path_factory.mktemp("sources")

    @functools.cache
    def write(label):
        spec, weights = SPECS[label], make_weights(label)
        metadata = {
            "general.architecture": ("string", "llama"),
            "llama.context_length": ("uint32", spec.context_tokens),
            "llama.embedding_length": ("uint32", spec.hidden_size),
            "llama.block_count": ("uint32", len(spec.layers)),
            "llama.feed_forward_length": ("uint32", spec.intermediate_size),
            "llama.attention.head_count": ("uint32", spec.attention.heads),
            "llama.attention.head_count_kv": ("uint32", spec.attention.num_kv_heads),
            "llama.attention.layer_norm_rms_epsilon": ("float32", spec.norm.epsilon),
        }
        entries = [
            TensorEntry(name=gguf_name(role), shape=values.shape, tensor_type="F32")
            for role, values in weights.items()
        ]
        path = directory / f"{spec.hidden_size}-{spec.is_tied}.gguf"
        with Writer(path, metadata, entries) as writer:
            for role, values in weights.items():
                writer.write(gguf_name(role), values)
        return path

    return write


def quantize_with_llama_cpp(llama_cpp, source, target, recipe, imatrix=None):
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = FILE_TYPES[recipe]
    parameters.nthread = 1
    if imatrix is not None:
        parameters.imatrix = imatrix
    status = llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(parameters)
    )
    assert status == 0
    return layout.read(target)


def payload(file, info):
    with file.path.open("rb") as stream:
        stream.seek(info.offset)
        return stream.read(info.size_bytes)


@pytest.mark.toolchain
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("label", SPECS)
def test_every_tensor_has_the_type_and_the_bytes_of_llama_quantize(
    label, recipe, llama_cpp, sources, tmp_path
):
    spec = SPECS[label]
    theirs = quantize_with_llama_cpp(llama_cpp, sources(label), tmp_path / "x.gguf", recipe)
    found = {info.name: info for info in theirs.tensors}
    ours = {}
    for role, values in make_weights(label).items():
        kind = stored_as(RECIPES[recipe].tensor_type_for(role, spec), values.shape[-1])
        ours[gguf_name(role)] = kind, quantize(values, kind).tobytes()
    assert {name: info.tensor_type for name, info in found.items()} == {
        name: kind for name, (kind, _) in ours.items()
    }
    for name, (_, encoded) in ours.items():
        assert payload(theirs, found[name]) == encoded, name
    assert theirs.metadata["general.quantization_version"] == tensor_types.QUANTIZATION_VERSION


@pytest.mark.toolchain
@pytest.mark.parametrize("recipe", ["Q4_K_M", "IQ4_NL", "Q2_K", "Q4_0"])
@pytest.mark.parametrize("label", ["256 columns, tied", "96 columns, tied"])
def test_importance_counts_as_in_llama_quantize(label, recipe, llama_cpp, sources, tmp_path):
    import numpy as np

    weights = {r: w for r, w in make_weights(label).items() if w.ndim == 2}
    chance = np.random.default_rng(3)
    importance = {
        role: chance.gamma(0.5, 1.0, values.shape[1]).astype(np.float32)
        for role, values in weights.items()
    }
    entries = [
        llama_cpp.llama_cpp.llama_model_imatrix_data(
            gguf_name(role).encode(),
            values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
            values.size,
        )
        for role, values in importance.items()
    ]
    table = (llama_cpp.llama_cpp.llama_model_imatrix_data * (len(entries) + 1))(*entries)
    theirs = quantize_with_llama_cpp(
        llama_cpp, sources(label), tmp_path / "x.gguf", recipe, imatrix=table
    )
    found = {info.name: info for info in theirs.tensors}
    changed = 0
    for role, values in weights.items():
        info = found[gguf_name(role)]
        encoded = quantize(values, info.tensor_type, importance=importance[role])
        assert payload(theirs, info) == encoded.tobytes(), role
        changed += not np.array_equal(encoded, quantize(values, info.tensor_type))
    assert changed > len(weights) // 2
