"""Plans against what three phones were measured at: 148 published cells."""

import statistics

import pytest

from edgekit.tests.benchmarks import planner_error


pytestmark = pytest.mark.slow
# Where a phone with 8 GB ran out of memory, as the source expects: nothing is predicted of that.
SWAPPING = {("Q5_K_M", "dimensity-8400"), ("Q3_K_M", "snapdragon-8-gen-2")}


@pytest.fixture(scope="module")
def cells():
    found = list(planner_error.cells())
    assert len(found) == 148
    return found


def is_swapping(cell):
    return cell.model == "gemma-4-e2b" and (cell.quant, cell.target.name) in SWAPPING


@pytest.mark.parametrize("model", planner_error.MODELS)
def test_decoding_is_planned_closely(cells, model):
    errors = [abs(it.decode_error) for it in cells if it.model == model and not is_swapping(it)]
    assert statistics.median(errors) < 0.15
    assert max(errors) < (0.15 if model.startswith("qwen") else 0.23)


def test_memory_is_never_planned_much_too_low(cells):
    errors = [cell.memory_error for cell in cells]
    assert min(errors) > -0.03
    assert max(errors) < 0.12


def test_a_fit_to_the_cells_finds_the_constants_of_plans(cells):
    pytest.importorskip("numpy")
    from edgekit import formats

    fitted = planner_error.Fit.to(cells)
    types = formats.get("gguf").TENSOR_TYPES
    assert fitted.costs == pytest.approx(
        {name: types[name].decode_cost for name in fitted.costs}, rel=0.05
    )
    rates = {cell.target.name: cell.target.decode_bandwidth_bytes_per_s for cell in cells}
    assert fitted.rates == pytest.approx(rates, rel=0.05)
