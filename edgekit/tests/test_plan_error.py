"""Plans against what three phones were measured at: 148 published cells."""

import statistics

import pytest

from edgekit.tests.benchmarks import planner_error


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cells():
    found = list(planner_error.cells())
    assert len(found) == 148
    return found


@pytest.fixture(scope="module")
def fast(cells):
    """Return those that the phone had the memory for."""
    return [cell for cell in cells if not planner_error.is_out_of_memory(cell, cells)]


def test_a_phone_without_memory_for_more_is_not_judged_by_the_largest_it_held(cells, fast):
    apart = {(it.model, it.quant, it.target.name) for it in cells if it not in fast}
    assert apart == {
        ("gemma-4-e2b", "Q5_K_M", "dimensity-8400"),
        ("gemma-4-e2b", "Q3_K_M", "snapdragon-8-gen-2"),
    }


@pytest.mark.parametrize("model", planner_error.MODELS)
def test_decoding_is_planned_closely(fast, model):
    errors = [abs(it.decode_error) for it in fast if it.model == model]
    assert statistics.median(errors) < 0.10
    assert max(errors) < 0.20


@pytest.mark.parametrize("model", planner_error.MODELS)
def test_a_model_that_was_not_in_the_fit_is_planned_as_closely(fast, model):
    pytest.importorskip("numpy")
    fit = planner_error.Fit.to([it for it in fast if it.model != model])
    errors = [abs(fit.error(it)) for it in fast if it.model == model]
    # What capped logits cost cannot be known from models that cap none.
    assert max(errors) < (0.40 if model == "gemma-4-e2b" else 0.20)


def test_memory_is_never_planned_much_too_low(cells):
    errors = [cell.memory_error for cell in cells]
    assert min(errors) > -0.03
    assert max(errors) < 0.12


def test_a_fit_to_the_cells_finds_the_constants_of_plans(fast):
    pytest.importorskip("numpy")
    from edgekit import formats
    from edgekit.formats.gguf import speed

    fitted = planner_error.Fit.to(fast)
    types = formats.get("gguf").TENSOR_TYPES
    assert fitted.costs == pytest.approx(
        {name: types[name].decode_cost for name in fitted.costs}, rel=0.05
    )
    flop = {name: types[name].decode_flop for name in fitted.work if name in types}
    assert fitted.work == pytest.approx(
        flop | {planner_error.CAPPED_LOGIT: 1e9 * speed.CAPPED_LOGIT_S}, rel=0.05
    )
    rates = {cell.target.name: cell.target.decode_bandwidth_bytes_per_s for cell in fast}
    assert fitted.rates == pytest.approx(rates, rel=0.05)
