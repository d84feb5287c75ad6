import math

import pytest

from edgekit.errors import UsageError
from edgekit.source.config import Config


def config(**fields):
    return Config(fields, origin="config.json")


def test_a_field_of_another_type_is_refused_with_both():
    with pytest.raises(UsageError, match=r"config\.json: tied = 'yes', expected bool"):
        config(tied="yes").get("tied", default=False)


def test_a_null_is_the_default_but_not_the_absent_value():
    fields = config(window=None, cap=None)
    assert fields.get("window", 7) == 7
    assert fields.optional_integer("window", absent=7) is None
    assert fields.optional_number("cap", absent=7.0) is None
    assert config().optional_integer("window", absent=7) == 7
    assert config().optional_number("cap", absent=7.0) == 7.0


@pytest.mark.parametrize("value", [0, -1, 2**31, 1.5, "8", True, None, [8]])
def test_an_integer_is_positive_and_not_absurd(value):
    with pytest.raises(UsageError, match="layers = "):
        config(layers=value).integer("layers")


def test_an_integer_may_have_a_lower_limit_than_the_usual():
    assert config(layers=64).integer("layers", most=64) == 64
    with pytest.raises(UsageError, match="from 1 to 64"):
        config(layers=65).integer("layers", most=64)


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, 10**400, "1e-5", True, None])
def test_a_number_is_positive_and_finite(value):
    with pytest.raises(UsageError, match="epsilon = "):
        config(epsilon=value).number("epsilon")


def test_a_whole_number_is_a_number():
    assert config(theta=10000).number("theta") == 10000.0


def test_fields_nobody_read_are_refused_together():
    fields = config(read=1, zeta=2, alpha=3, null=None, transformers_version="5.0")
    fields.integer("read")
    with pytest.raises(UsageError, match=r"alpha = 3, zeta = 2$"):
        fields.refuse_unread()
    fields.ignore("alpha", "zeta")
    fields.refuse_unread()


def test_a_section_remembers_its_own_fields_and_where_it_is():
    outer = config(rope={"factor": 2.0, "mystery": 1})
    inner = outer.section("rope")
    outer.refuse_unread()
    inner.number("factor")
    with pytest.raises(UsageError, match=r"config\.json: rope has .* know: mystery"):
        inner.refuse_unread()


def test_a_section_that_is_no_object_is_refused():
    with pytest.raises(UsageError, match="rope = 'llama3', expected dict"):
        config(rope="llama3").section("rope")


def test_an_absent_section_is_empty():
    assert "factor" not in config().section("rope")


def test_a_value_that_is_not_implemented_is_refused_and_its_absence_is_not():
    config().expect(act="silu")
    config(act=None).expect(act="silu")
    config(act="silu").expect(act="silu")
    with pytest.raises(UsageError, match="act = 'relu' is not supported"):
        config(act="relu").expect(act="silu")
