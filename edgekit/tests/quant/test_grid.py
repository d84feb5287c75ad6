"""Grids: weights as codes, whatever a format's grid is."""

import pytest

from edgekit.errors import UsageError
from edgekit.quant import grid
from edgekit.quant.grid import Grid
from edgekit.quant.rounding import bfloat16, from_bfloat16


np = pytest.importorskip("numpy")

COLUMNS = 128
GRIDS = {
    "unsigned": Grid(block_weights=32, bottom=0, top=15, zero=8),
    "signed": Grid(block_weights=32, bottom=-8, top=7, zero=0),
    "own zero points": Grid(block_weights=32, bottom=0, top=15, zero=None),
    "signed, own zero points": Grid(block_weights=32, bottom=-8, top=7, zero=None),
    "whole rows": Grid(block_weights=COLUMNS, bottom=0, top=15, zero=7),
    "half": Grid(block_weights=32, bottom=0, top=14, zero=7, scales="float16"),
    "positive bfloat16": Grid(
        block_weights=32, bottom=-8, top=7, zero=0, scales="bfloat16", has_negative_scales=False
    ),
    "eight bits": Grid(block_weights=32, bottom=-127, top=127, zero=0),
}


@pytest.fixture(params=GRIDS)
def on(request):
    return GRIDS[request.param]


@pytest.fixture
def weights():
    values = np.random.default_rng(0).normal(0, 0.2, (7, COLUMNS)).astype(np.float32)
    values[0] = 0
    values[1] = np.abs(values[1]) + 0.1  # all on one side
    values[2] *= 100
    return values


def error(values, found, importance=1.0):
    return float((importance * np.square(values - found.values())).sum())


@pytest.mark.parametrize("way", [grid.nearest, lambda values, on: grid.fit(values, None, on)])
def test_what_is_found_is_on_the_grid(way, on, weights):
    found = way(weights, on)
    assert found.codes.shape == (7, COLUMNS // on.block_weights, on.block_weights)
    assert found.scales.shape == found.zeros.shape == found.codes.shape[:2]
    assert found.codes.dtype == (np.int8 if on.bottom < 0 else np.uint8)
    for codes in (found.codes, found.zeros):
        assert on.bottom <= codes.min() <= codes.max() <= on.top
    if on.zero is not None:
        assert (found.zeros == on.zero).all()
    if not on.has_negative_scales:
        assert (found.scales >= 0).all()
    if on.scales == "bfloat16":
        assert not (found.scales.view(np.uint32) & 0xFFFF).any()
    if on.scales == "float16":
        np.testing.assert_array_equal(found.scales.astype(np.float16), found.scales)
    assert (found.values()[0] == 0).all()


def test_a_fit_is_closer_than_the_nearest_and_both_are_close(on, weights):
    fitted, nearest = (error(weights, f) for f in (
        grid.fit(weights, None, on), grid.nearest(weights, on)
    ))  # fmt: skip
    assert fitted < nearest
    assert nearest < 0.02 * float(np.square(weights).sum())


def test_importance_leads_the_fit(on, weights):
    importance = np.where(np.arange(COLUMNS) % 4 == 0, 100, 1).astype(np.float32)
    led, plain = grid.fit(weights, importance, on), grid.fit(weights, None, on)
    assert error(weights, led, importance) < 0.99 * error(weights, plain, importance)
    assert error(weights, led) > error(weights, plain)


def test_importance_that_is_all_zero_leads_nothing(on, weights):
    led, plain = (grid.fit(weights, i, on) for i in (np.zeros(COLUMNS, np.float32), None))
    np.testing.assert_allclose(led.values(), plain.values(), rtol=1e-6)


def test_many_rows_are_found_as_few_are(on):
    """They are dealt to threads."""
    values = np.random.default_rng(0).normal(0, 1, (3000, COLUMNS)).astype(np.float32)
    whole, few = grid.fit(values, None, on), grid.fit(values[1500:1503], None, on)
    np.testing.assert_array_equal(whole.codes[1500:1503], few.codes)
    np.testing.assert_array_equal(whole.scales[1500:1503], few.scales)


@pytest.mark.parametrize("way", [grid.nearest, lambda values, on: grid.fit(values, None, on)])
def test_weights_below_all_normal_numbers_become_zeros(way, on, weights):
    weights[3] *= np.float32(1e-41)
    weights[4, ::2], weights[4, 1::2] = 1e-42, -2e-42
    assert np.count_nonzero(weights[3:5])
    found = way(weights, on)
    assert (found.values()[3:5] == 0).all()
    assert np.abs(found.values()[5] - weights[5]).max() < 0.1


@pytest.mark.parametrize("large", [3e38, float("inf"), float("nan")])
def test_a_weight_beyond_all_scales_is_refused(large, on, weights):
    weights[3, 3] = large
    for way in (grid.nearest, lambda values, on: grid.fit(values, None, on)):
        with pytest.raises(UsageError, match=f"too large for scales in {on.scales}"):
            way(weights, on)


def test_the_largest_scale_of_float16_is_not_outgrown(weights):
    on = GRIDS["half"]
    weights *= 65504 * 6.9 / np.abs(weights).max()
    found = grid.fit(weights, None, on)
    assert np.abs(found.scales).max() <= 65504
    assert error(weights, found) < 0.02 * float(np.square(weights).sum())
    weights *= 1.1
    with pytest.raises(UsageError, match="too large for scales in float16"):
        grid.fit(weights, None, on)


def test_bfloat16_rounds_to_even_as_the_format_says():
    values = np.array([1.0, 1.00390625, 1.01171875, -3.3e38, 1e-40], np.float32)
    found = from_bfloat16(bfloat16(values))
    np.testing.assert_array_equal(found[:3], np.array([1.0, 1.0, 1.015625], np.float32))
    assert not (found.view(np.uint32) & 0xFFFF).any()


def test_of_two_sides_as_long_as_each_other_the_upper_one_sets_the_scale():
    values = np.zeros((1, COLUMNS), np.float32)
    values[0, :3] = 1, -1, 0.5
    found = grid.nearest(values, GRIDS["signed"])
    assert found.scales[0, 0] == -1 / 8
    assert found.codes[0, 0, :4].tolist() == [-8, 7, -4, 0]


def test_of_starts_as_good_as_each_other_the_first_stays(weights):
    """A block of zeros is met by all of them."""
    for name in ("own zero points", "signed, own zero points"):
        found = grid.fit(weights, None, GRIDS[name])
        assert (found.zeros[0] == GRIDS[name].bottom).all()
        assert (found.codes[0] == GRIDS[name].bottom).all()


def test_no_column_is_free_to_err(weights):
    """A tenth of the mean is added to all."""
    importance = np.tile(np.array([0, 2], np.float32), COLUMNS // 2)
    added = np.tile(np.float32([0.1, 2.1]), COLUMNS // 2)
    found = grid.fit(weights, importance, GRIDS["unsigned"])
    expected = grid.fit_weighted(weights, added, GRIDS["unsigned"])
    assert np.array_equal(found.codes, expected.codes)
    assert np.array_equal(found.scales, expected.scales)
