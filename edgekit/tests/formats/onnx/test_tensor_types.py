"""How ONNX files store weights, against the formula and against what ONNX Runtime makes of them."""

from dataclasses import replace

import pytest

from edgekit.doctor import _tiny_checkpoint
from edgekit.errors import UsageError
from edgekit.formats import BuildRequest, GpuBuffer
from edgekit.formats.onnx import clients, conversion, graph, model, tensor_types
from edgekit.formats.onnx.model import OnnxGraph, Port
from edgekit.formats.onnx.tensor_types import BLOCKS, BUILDS, RECIPES, TENSOR_TYPES, GraphBuild


np = pytest.importorskip("numpy")

ROWS, COLUMNS = 6, 256
FOUR_BITS = [name for name, blocks in BLOCKS.items() if blocks.bits == 4]
HALF = [name for name, build in BUILDS.items() if build.is_half]


@pytest.fixture
def weights():
    random = np.random.default_rng(0)
    values = random.normal(0, 0.2, (ROWS, COLUMNS)).astype(np.float32)
    values[0, :128] = 0  # blocks without a scale
    values[1, :32] = np.abs(values[1, :32]) + 0.1  # all on one side
    values[2] *= 100
    return values


def decode(parts, kind):
    """Return the weights that codes stand for, by the formula of MatMulNBits alone."""
    codes, scales = parts[0], parts[1].astype(np.float32)
    codes = _unpacked(codes) if BLOCKS[kind].bits == 4 else codes
    zeros = np.full(scales.shape, BLOCKS[kind].implied_zero or 0)
    if not BLOCKS[kind].is_symmetric:
        zeros = _unpacked(parts[2])
    values = (codes.astype(np.float32) - zeros[..., None]) * scales[..., None]
    return values.reshape(len(codes), -1)


def _unpacked(codes):
    return np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)


def nearest(values, kind):
    """Return what rounding to nearest makes of weights: the range of a block decides."""
    blocks = values.reshape(len(values), -1, BLOCKS[kind].weights)
    if BLOCKS[kind].is_symmetric:
        scales, zeros, bottom = np.abs(blocks).max(-1, keepdims=True) / 7, 0, -7
    else:
        low = np.minimum(blocks.min(-1, keepdims=True), 0)
        scales = (np.maximum(blocks.max(-1, keepdims=True), 0) - low) / 15
        scales[scales == 0] = 1
        zeros, bottom = np.rint(-low / scales), 0
    scales[scales == 0] = 1
    codes = np.clip(np.rint(blocks / scales) + zeros, bottom, bottom + 15)
    return ((codes - zeros) * scales).reshape(values.shape)


def error(values, decoded, importance=1.0):
    return float((importance * np.square(values - decoded)).sum())


@pytest.mark.parametrize("kind", ["INT8", "INT8_F16"])
def test_eight_bits_come_back_within_half_a_step(kind, weights):
    parts = tensor_types.encode(weights, kind)
    steps = np.abs(parts[1].astype(np.float32)).repeat(BLOCKS[kind].weights, 1)
    errors = np.abs(decode(parts, kind) - weights)
    # One side has 127 codes: what would take the 128th is a step off at most.
    assert (errors <= 1.07 * steps).all()
    assert (errors <= 0.5001 * steps).mean() > 0.99
    assert errors.max() > 0


@pytest.mark.parametrize("kind", FOUR_BITS)
def test_four_bits_are_closer_than_the_nearest_of_the_whole_range(kind, weights):
    found = error(weights, decode(tensor_types.encode(weights, kind), kind))
    assert 0 < found < 0.98 * error(weights, nearest(weights, kind))


@pytest.mark.parametrize("kind", FOUR_BITS)
def test_columns_with_large_inputs_come_back_closer(kind, weights):
    importance = np.where(np.arange(COLUMNS) % 4 == 0, 100, 1).astype(np.float32)
    led = decode(tensor_types.encode(weights, kind, importance=importance), kind)
    plain = decode(tensor_types.encode(weights, kind), kind)
    assert error(weights, led, importance) < 0.9 * error(weights, plain, importance)
    assert error(weights, led) > error(weights, plain)


@pytest.mark.parametrize("kind", BLOCKS)
def test_zeros_stay_zeros(kind, weights):
    assert (decode(tensor_types.encode(weights, kind), kind)[0, :128] == 0).all()


@pytest.mark.parametrize("kind", BLOCKS)
def test_what_is_on_the_grid_comes_back_as_it_was(kind, weights):
    once = decode(tensor_types.encode(weights, kind), kind)
    again = decode(tensor_types.encode(once, kind), kind)
    np.testing.assert_allclose(again, once, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", TENSOR_TYPES)
def test_a_storage_costs_what_it_says(kind, weights):
    parts = tensor_types.encode(weights, kind)
    described = list(tensor_types.tensors("layers.0.up", weights.shape, kind))
    assert [part.shape for part in parts] == [tensor.shape for tensor in described]
    assert [part.dtype.name for part in parts] == [tensor.dtype for tensor in described]
    bits = 8 * sum(part.nbytes for part in parts) / weights.size
    assert bits == TENSOR_TYPES[kind].bits_per_weight
    assert bits == {
        "F32": 32, "F16": 16, "INT8": 9, "UINT4": 5.125, "INT4": 5, "UINT4_128": 4.28125,
        "INT4_128": 4.25, "INT8_F16": 8.5, "UINT4_F16": 4.625, "INT4_F16": 4.5,
    }[kind]  # fmt: skip


def test_a_weight_too_large_for_float16_is_refused(weights):
    weights[3, 3] = -70_000
    with pytest.raises(UsageError, match="a weight is 70000, too large for F16"):
        tensor_types.encode(weights, "F16")


@pytest.mark.parametrize(
    ("wanted", "columns", "stored"),
    [("UINT4", 128, "UINT4"), ("UINT4", 96, "INT4"), ("UINT4", 40, "F16"), ("INT8", 40, "F16"),
     ("INT8", 96, "INT8"), ("F32", 7, "F32"), ("UINT4_128", 512, "UINT4_128"),
     ("UINT4_128", 384, "INT4_128"), ("UINT4_128", 576, "UINT4"), ("INT4_128", 96, "INT4"),
     ("UINT4_F16", 96, "INT4_F16"), ("INT8_F16", 40, "F16")],
)  # fmt: skip
def test_rows_that_fill_no_blocks_are_stored_otherwise(wanted, columns, stored):
    assert tensor_types.stored_as(wanted, columns) == stored


def test_four_bits_leave_the_token_embedding_at_eight_unless_all_is_asked_for(tmp_path):
    spec = _tiny_checkpoint(tmp_path).spec
    for recipe, words in (
        ("INT4", "INT8"), ("UINT4", "INT8"), ("UINT4_ALL", "UINT4"), ("INT4_128", "INT8"),
        ("UINT4_GPU", "INT8_F16"),
    ):  # fmt: skip
        assert RECIPES[recipe].tensor_type_for("token_embedding", spec) == words
        assert RECIPES[recipe].tensor_type_for("layers.1.attention_norm", spec) == "F32"


def test_a_recipe_has_one_precision_of_scales_and_it_is_that_of_its_products(tmp_path):
    spec = _tiny_checkpoint(tmp_path).spec
    assert len(RECIPES) > 1
    for name, recipe in RECIPES.items():
        stored = {recipe.tensor_type_for(role, spec) for role, _ in spec.weights()}
        scales = {BLOCKS[kind].scales for kind in stored if kind in BLOCKS}
        assert scales <= {BUILDS[name].arithmetic}


@pytest.mark.parametrize(
    ("recipe", "file", "told"),
    [("F32", "model.onnx", {"dtype": "fp32"}), ("F16", "model_fp16.onnx", {"dtype": "fp16"}),
     ("F16_GPU", "model_fp16.onnx", {"dtype": "fp16", "kv_cache_dtype": "float16"}),
     ("INT8", "model_quantized.onnx", {"dtype": "q8"}), ("UINT4", "model_q4.onnx", {"dtype": "q4"}),
     ("INT4_128", "model_q4.onnx", {"dtype": "q4"}),
     ("UINT4_GPU", "model_q4f16.onnx", {"dtype": "q4f16", "kv_cache_dtype": "float16"})],
)  # fmt: skip
def test_files_have_the_names_that_transformers_js_looks_for(recipe, file, told, tmp_path):
    checkpoint = _tiny_checkpoint(tmp_path)
    entry = conversion.convert(
        checkpoint, BuildRequest(recipe=RECIPES[recipe]), tmp_path, progress=lambda _: None
    )
    files = [path.name for path in model.files(tmp_path / entry)]
    assert (entry, files) == (f"onnx/{file}", [file, f"{file}_data"])
    settings = clients._transformers_js(RECIPES[recipe], data_files=1)
    assert settings == told | {"use_external_data_format": 1}


def test_what_rounds_activations_is_told(tmp_path):
    checkpoint = _tiny_checkpoint(tmp_path)
    told = [name for name in RECIPES if "INT" in name]
    assert 0 < len(told) < len(RECIPES)
    for recipe in RECIPES.values():
        notes = conversion.lay_out(checkpoint, BuildRequest(recipe=recipe)).notes
        assert (tensor_types.ACTIVATIONS_NOTE in notes) == ("INT" in recipe.name)


# What a browser must bind


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_largest_buffer_is_told_as_it_is_on_the_gpu(recipe, tmp_path):
    checkpoint = _tiny_checkpoint(tmp_path)
    layout = conversion.lay_out(checkpoint, BuildRequest(recipe=RECIPES[recipe]))
    sizes = {
        "F32": 257 * 64 * 4, "F16": 257 * 64 * 4, "F16_GPU": 257 * 64 * 2, "UINT4_ALL": 257 * 32,
    }  # fmt: skip
    assert layout.largest_buffer == GpuBuffer(
        name="token_embedding", size_bytes=sizes.get(recipe, 257 * 64)
    )
    assert layout.needs_shader_f16 == any("F16" in p.tensor_type for p in layout.placements)
    assert layout.is_half == (recipe in HALF)


# What the runtime makes of the codes


def builder(tmp_path, kind):
    """Return what makes the operators of one weight called ``w``, activations not rounded."""
    arithmetic = BLOCKS[kind].scales
    how = GraphBuild(dtype="", arithmetic=arithmetic, accuracy_level=0)
    return graph._Builder(spec=_tiny_checkpoint(tmp_path).spec, tensor_types={"w": kind}, how=how)


def run(tmp_path, nodes, *, inputs, output, weights, kind, fed):
    """Return what ONNX Runtime computes with one weight called ``w``."""
    onnxruntime = pytest.importorskip("onnxruntime")
    parts = tensor_types.encode(weights, kind)
    placed = list(model.place(list(tensor_types.tensors("w", weights.shape, kind)), stem="data"))
    held = bytearray(model.file_sizes(placed)["data"])
    for tensor, part in zip(placed, parts, strict=True):
        held[tensor.offset : tensor.offset + tensor.size_bytes] = part.tobytes()
    (tmp_path / "data").write_bytes(held)
    made = OnnxGraph(
        nodes=tuple(nodes.nodes),
        constants=tuple(nodes.constants.values()),
        inputs=inputs,
        outputs=(replace(output, name=nodes.nodes[-1].outputs[0]),),
        metadata={},
    )
    path = tmp_path / "model.onnx"
    path.write_bytes(model.encode(made, placed))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, fed)[0]


@pytest.mark.toolchain
@pytest.mark.parametrize("kind", BLOCKS)
def test_the_runtime_multiplies_with_what_the_codes_stand_for(kind, weights, tmp_path):
    built, dtype = builder(tmp_path, kind), BLOCKS[kind].scales
    built._multiply("w", "x", ROWS, COLUMNS)
    found = run(
        tmp_path, built,
        inputs=(Port(name="x", dtype=dtype, shape=("n", COLUMNS)),),
        output=Port(name="", dtype=dtype, shape=("n", ROWS)),
        weights=weights, kind=kind, fed={"x": np.eye(COLUMNS, dtype=dtype)},
    )  # fmt: skip
    expected = decode(tensor_types.encode(weights, kind), kind)
    np.testing.assert_allclose(found.T, expected, rtol=1e-6 if dtype == "float32" else 1e-3)


@pytest.mark.toolchain
@pytest.mark.parametrize("kind", BLOCKS)
def test_rows_of_an_embedding_are_those_the_head_multiplies_with(kind, weights, tmp_path):
    built = builder(tmp_path, kind)
    built._rows("w", "ids", tables=["w"])
    fed = {"ids": np.array([[5, 0, 2], [1, 1, 4]])}
    found = run(
        tmp_path, built,
        inputs=(Port(name="ids", dtype="int64", shape=("batch", "n")),),
        output=Port(name="", dtype="float32", shape=("batch", "n", COLUMNS)),
        weights=weights, kind=kind, fed=fed,
    )  # fmt: skip
    expected = decode(tensor_types.encode(weights, kind), kind)
    np.testing.assert_allclose(found, expected[fed["ids"]], rtol=1e-6)


# A file read back


@pytest.mark.parametrize("recipe", RECIPES)
def test_contents_are_told_from_the_tensors(recipe, tmp_path):
    checkpoint = _tiny_checkpoint(tmp_path)
    entry = conversion.convert(
        checkpoint, BuildRequest(recipe=RECIPES[recipe]), tmp_path, progress=lambda _: None
    )
    held = {name: (shape, kind) for name, shape, kind in tensor_types.contents(tmp_path / entry)}
    layout = conversion.lay_out(checkpoint, BuildRequest(recipe=RECIPES[recipe]))
    shapes = dict(checkpoint.spec.weights())
    planned = {p.role: (shapes[p.role], p.tensor_type) for p in layout.placements}
    assert planned.items() <= held.items()
    assert set(held) - set(planned) == {"rope.0.frequencies"}
