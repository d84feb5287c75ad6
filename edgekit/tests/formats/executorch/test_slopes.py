"""The slopes of xIELU, before and after their softplus."""

import math

import pytest

from edgekit.formats.executorch import slopes


np = pytest.importorskip("numpy")
LEARNED = np.array([-9.5, -1.0, 0.0, 0.5, 40.0], np.float32)


def test_a_program_holds_what_a_softplus_makes_of_a_slope():
    zero = np.zeros(1, np.float32)
    assert slopes.to_slopes("layers.3.xielu_positive", zero) == pytest.approx([math.log(2)])
    assert slopes.to_slopes("layers.3.xielu_negative", zero) == pytest.approx([math.log(2) + 0.5])
    large = np.array([40], np.float32)  # where a naive exponential would still do, and nothing adds
    assert slopes.to_slopes("layers.3.xielu_positive", large).tolist() == [40]


@pytest.mark.parametrize("role", ["layers.0.xielu_positive", "layers.0.xielu_negative"])
def test_reading_back_undoes_it(role):
    held = slopes.to_slopes(role, LEARNED)
    assert held.dtype == np.float32
    np.testing.assert_allclose(slopes.from_slopes(role, held), LEARNED, atol=1e-3)


def test_a_slope_that_rounding_took_is_still_a_number():
    lost = np.array([0.5], np.float32)
    assert np.isfinite(slopes.from_slopes("layers.0.xielu_negative", lost)).all()


def test_other_weights_stay_as_they_are():
    assert slopes.to_slopes("layers.0.up_bias", LEARNED) is LEARNED
    assert slopes.from_slopes("layers.0.up_bias", LEARNED) is LEARNED
