"""Error feedback: matrices on the lattice of every tensor type, as runtimes read them."""

import pytest

from edgekit.errors import UsageError
from edgekit.formats.executorch import tensor_types as executorch
from edgekit.formats.gguf import tensor_types as gguf_types
from edgekit.formats.gguf.lattices import LATTICES, GgmlLattice
from edgekit.formats.mlc import packing
from edgekit.formats.onnx import tensor_types as onnx


np = pytest.importorskip("numpy")
pytest.importorskip("torch")

from edgekit.quant.lattice import round_column  # noqa: E402
from edgekit.solver import feedback  # noqa: E402
from edgekit.solver.feedback import Feedback, solve  # noqa: E402


ROWS, COLUMNS = 48, 512


@pytest.fixture(scope="module")
def weights():
    return np.random.default_rng(1).standard_normal((ROWS, COLUMNS)).astype(np.float32) * 0.05


@pytest.fixture(scope="module")
def inputs():
    """Inputs whose columns go together, and of which some hardly ever pass."""
    random = np.random.default_rng(2)
    mixed = np.eye(COLUMNS) + random.standard_normal((COLUMNS, COLUMNS)) / 20
    return random.standard_normal((3000, COLUMNS)) @ mixed * random.exponential(1, COLUMNS)


@pytest.fixture(scope="module")
def moment(inputs):
    return inputs.T @ inputs


def error(rounded, weights, inputs):
    """Return what rounding changes in what the matrix says about the inputs."""
    return float(np.square(inputs @ (rounded - weights).T.astype(np.float64)).sum())


def read_gguf(stored, tensor_type):
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[tensor_type]
    return gguf.quants.dequantize(stored[0].reshape(-1), kind).reshape(ROWS, COLUMNS)


def read_onnx(stored, tensor_type):
    codes, scales, *zeros = stored
    pairs = np.stack((codes & 15, codes >> 4), -1).reshape(ROWS, scales.shape[1], -1)
    if zeros:
        centre = np.stack((zeros[0] & 15, zeros[0] >> 4), -1).reshape(ROWS, -1)
    else:
        centre = np.full(scales.shape, 8)
    centred = pairs.astype(np.float32) - centre[..., None].astype(np.float32)
    return (centred * scales[..., None].astype(np.float32)).reshape(ROWS, COLUMNS)


def read_mlc(stored, tensor_type):
    return packing.decode(list(stored), tensor_type, columns=COLUMNS)


def read_executorch(stored, tensor_type):
    return executorch.decode(list(stored), tensor_type)


def encode_gguf(weights, tensor_type, importance):
    return [gguf_types.quantize(weights, tensor_type, importance=importance)]


def encode_mlc(weights, tensor_type, importance):
    return packing.encode(weights, tensor_type, is_calibrated=True, importance=importance)


def encode_onnx(weights, tensor_type, importance):
    return onnx.encode(weights, tensor_type, importance=importance)


def encode_executorch(weights, tensor_type, importance):
    return executorch.encode(weights, tensor_type, importance=importance)


CASES = [
    *((name, lattice, read_gguf, encode_gguf) for name, lattice in LATTICES.items()),
    *((name, onnx.lattice(name), read_onnx, encode_onnx)
      for name in ("INT4", "UINT4", "UINT4_128", "INT4_F16")),
    *((name, packing.lattice(name), read_mlc, encode_mlc)
      for name in ("INT4_F16", "INT4_BF16", "INT3_F16")),
    *((name, executorch.lattice(name), read_executorch, encode_executorch)
      for name in ("INT4_G32", "INT4_G128", "Q4GSW_G64")),
]  # fmt: skip


@pytest.mark.toolchain
@pytest.mark.parametrize("case", CASES, ids=[f"{c[2].__name__[5:]}-{c[0]}" for c in CASES])
def test_what_is_stored_reads_as_what_was_solved_and_errs_less_than_importance_weighting(
    case, weights, inputs, moment
):
    name, lattice, read, encode = case
    found = solve(weights, Feedback.of(moment, block_weights=lattice.block_weights), lattice)
    np.testing.assert_allclose(found.values, read(found.stored, name), rtol=1e-3, atol=1e-7)
    importance = (np.diagonal(moment) / len(inputs)).astype(np.float32)
    weighted = read(encode(weights, name, importance), name)
    assert [part.shape for part in found.stored] == [
        part.shape for part in encode(weights, name, importance)
    ]
    assert error(found.values, weights, inputs) < 0.8 * error(weighted, weights, inputs)


@pytest.mark.toolchain
@pytest.mark.parametrize("name", [*LATTICES])
def test_ggufs_blocks_hold_the_solved_values_to_the_bit(name, weights, moment):
    lattice = LATTICES[name]
    found = solve(weights, Feedback.of(moment, block_weights=lattice.block_weights), lattice)
    assert np.array_equal(read_gguf(found.stored, name), found.values)


@pytest.mark.toolchain
def test_every_coarse_tensor_type_has_a_lattice():
    assert LATTICES.keys() >= gguf_types.WEIGHTED
    coarse = {name for name, blocks in onnx.BLOCKS.items() if blocks.is_coarse}
    assert {name for name in onnx.TENSOR_TYPES if onnx.lattice(name)} == coarse
    assert {name for name in packing.TENSOR_TYPES if packing.lattice(name)} == {*packing.GROUPS}
    found = {name for name in executorch.TENSOR_TYPES if executorch.lattice(name)}
    assert found == executorch.COARSE


def test_errors_are_taken_off_as_a_least_squares_fit_would_take_them_off(weights, inputs, moment):
    """Once one column is rounded, the others are the best there are for its error."""
    lattice = onnx.lattice("INT4")
    assert lattice
    made = Feedback.of(moment, block_weights=32)
    damped = moment / np.diagonal(moment).mean() + feedback.DAMPING * np.eye(COLUMNS)
    order = made.order
    ordered = damped[np.ix_(order, order)]
    for place in (0, 100, COLUMNS - 2):
        rest = ordered[place + 1 :, place + 1 :]
        best = np.linalg.solve(rest, ordered[place + 1 :, place])
        taken = -made.factor[place, place + 1 :] / made.factor[place, place]
        np.testing.assert_allclose(taken, best, rtol=1e-3, atol=1e-4)


def test_columns_are_rounded_in_order_of_importance_and_blocks_stay_together(moment):
    made = Feedback.of(moment, block_weights=64)
    blocks = made.order.reshape(-1, 64) // 64
    assert (blocks == blocks[:, :1]).all()
    sums = made.importance.reshape(-1, 64).sum(1)[blocks[:, 0]]
    assert (np.diff(sums) <= 0).all()
    for columns in made.order.reshape(-1, 64):
        assert (np.diff(made.importance[columns]) <= 0).all()
    assert sorted(made.order) == [*range(COLUMNS)]


def test_rows_that_do_not_fill_their_last_group_are_solved(weights, moment):
    """MLC's three bits: groups of 40, and a last one of which the rest is stored as 0."""
    lattice = packing.lattice("INT3_F16")
    assert lattice
    assert COLUMNS % 40
    found = solve(weights, Feedback.of(moment, block_weights=40), lattice)
    held = packing.decode(list(found.stored), "INT3_F16", columns=None)
    assert held.shape[1] == 520
    np.testing.assert_allclose(held[:, :COLUMNS], found.values, rtol=1e-3)


def test_columns_that_nothing_passes_are_rounded_all_the_same(weights, moment):
    lattice = onnx.lattice("UINT4")
    assert lattice
    silent = moment.copy()
    silent[:40], silent[:, :40] = 0, 0
    for statistics in (silent, np.zeros_like(moment), np.full_like(moment, 7.0)):
        found = solve(weights, Feedback.of(statistics, block_weights=32), lattice)
        assert np.isfinite(found.values).all()
        assert np.abs(found.values - weights).mean() < 0.3 * np.abs(weights).mean()


def test_statistics_that_are_not_definite_are_damped_until_they_are(weights, moment):
    lattice = onnx.lattice("UINT4")
    assert lattice
    indefinite = moment - 0.3 * np.diagonal(moment).mean() * np.eye(COLUMNS)
    indefinite[np.diag_indices(COLUMNS)] = np.diagonal(moment)
    indefinite[:, :5] *= 3
    indefinite[:5] *= 3
    found = solve(weights, Feedback.of(indefinite, block_weights=32), lattice)
    assert np.isfinite(found.values).all()


def test_a_matrix_on_the_lattice_already_stays(moment):
    """A model that was trained on a grid loses nothing."""
    random = np.random.default_rng(3)
    codes = random.integers(-8, 8, (ROWS, COLUMNS // 32, 32)).astype(np.float32)
    codes[..., 0] = -8
    scales = (2.0 ** random.integers(-8, -4, (ROWS, COLUMNS // 32, 1))).astype(np.float32)
    values = (codes * scales).reshape(ROWS, COLUMNS)
    lattice = onnx.lattice("INT4")
    assert lattice
    found = solve(values, Feedback.of(moment, block_weights=32), lattice)
    np.testing.assert_allclose(found.values, values, rtol=1e-5)


def test_solving_twice_gives_the_same_bytes(weights, moment):
    lattice = LATTICES["Q4_K"]
    many = np.tile(weights, (feedback._PART_ROWS // ROWS + 2, 1))
    first, second = (
        solve(many, Feedback.of(moment.copy(), block_weights=256), lattice) for _ in range(2)
    )
    assert first.values.shape == many.shape
    assert all(np.array_equal(*both) for both in zip(first.stored, second.stored, strict=True))


def test_a_weight_too_large_for_the_scales_is_refused(weights, moment):
    lattice = packing.lattice("INT4_F16")
    assert lattice
    large = weights.copy()
    large[3, 5] = 1e9
    with pytest.raises(UsageError, match=r"1e\+09, too large"):
        solve(large, Feedback.of(moment, block_weights=32), lattice)


@pytest.mark.parametrize("levels", [range(-8, 8), [-127, -104, -10, 1, 13, 113]])
def test_a_column_gets_the_nearest_level(levels):
    table = np.array([*levels], np.float32)
    values = np.linspace(-20, 20, 999).astype(np.float32)
    scales, offsets = np.full(999, 0.13, np.float32), np.full(999, 0.5, np.float32)
    found = table[round_column(values, scales, offsets, table)] * scales + offsets
    every = table * np.float32(0.13) + np.float32(0.5)
    best = np.abs(values[:, None] - every).min(1)
    np.testing.assert_allclose(np.abs(found - values), best, atol=1e-6)
    zeros = np.zeros(999, np.float32)
    assert (round_column(values, zeros, offsets, table) < len(table)).all()


@pytest.mark.parametrize("name", LATTICES)
def test_planes_of_a_block_never_overlap_and_leave_the_scales(name):
    lattice = LATTICES[name]
    assert isinstance(lattice, GgmlLattice)
    places = [
        {*range(plane.first_byte, plane.first_byte + lattice.block_weights * plane.bits // 8)}
        for plane in lattice.planes
    ]
    size = gguf_types.TENSOR_TYPES[name].block_bytes
    assert len(set().union(*places)) == sum(map(len, places)) < size
    assert set().union(*places) <= {*range(size)}
    assert sum(plane.bits for plane in lattice.planes) == (len(lattice.levels) - 1).bit_length()
