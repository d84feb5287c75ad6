import doctest
import re

import pytest

from edgekit import units
from edgekit.errors import UsageError
from edgekit.units import format_bytes, format_duration, format_rate, parse_quantity


@pytest.mark.parametrize(
    ("text", "base"),
    [
        ("512 B", 512),
        ("1.5 GiB", 1_610_612_736),
        ("0.7 GB", 700_000_000),
        ("17.1 GB/s", 17.1e9),
        ("8 tokens/s", 8),
        ("2 s", 2),
        ("350 ms", 0.35),
        ("2 min", 120),
        ("128 tokens", 128),
        ("2.4 GHz", 2.4e9),
        ("60 GFLOP/s", 60e9),
        ("3.3 TFLOP/s", 3.3e12),
        ("1 thread", 1),
        ("5 %", 0.05),
    ],
)
def test_a_quantity_is_read_into_its_base_unit(text, base):
    assert parse_quantity(text, of="x") == base


@pytest.mark.parametrize(
    "text", ["", "2", "2GB", "GB", "-2 GB", "2  GB", "2 GB ", "1e9 B", "1,5 GB", "٢ GB", "nan GB"]
)
def test_what_is_not_a_number_a_space_and_a_unit_is_refused(text):
    with pytest.raises(UsageError, match=r"^memory = .* is not a number, a space and a unit$"):
        parse_quantity(text, of="memory")


@pytest.mark.parametrize("text", [f"{'9' * 5000} MB", "9223372036854775808 B", f"1{'0' * 30} s"])
def test_what_no_file_could_say_again_is_refused_in_a_short_sentence(text):
    with pytest.raises(UsageError, match="is too large") as caught:
        parse_quantity(text, of="memory")
    assert len(str(caught.value)) < 500
    assert parse_quantity("9223372036854774784 B", of="memory") == 9223372036854774784


def test_a_unit_is_never_guessed_but_the_nearest_is_named():
    with pytest.raises(UsageError, match="peak_memory = '2 Gb'") as caught:
        parse_quantity("2 Gb", of="peak_memory")
    assert "did you mean 'GB'?" in caught.value.hint


def test_a_quantity_of_another_dimension_is_refused():
    assert parse_quantity("2 s", of="load", dimension="seconds") == 2
    with pytest.raises(UsageError, match="peak_memory = '2 s' has no unit that fits") as caught:
        parse_quantity("2 s", of="peak_memory", dimension="bytes")
    assert "GiB" in caught.value.hint
    assert "tokens" not in caught.value.hint


@pytest.mark.parametrize("dimension", units.DIMENSIONS)
def test_the_published_pattern_accepts_what_the_reader_accepts(dimension):
    pattern = units.quantity_pattern(dimension)
    for unit in units.units():
        is_ours = unit in units.units(dimension)
        assert bool(re.search(pattern, f"1.5 {unit}")) is is_ours
        if is_ours:
            assert parse_quantity(f"1.5 {unit}", of="x", dimension=dimension) > 0
    assert re.search(pattern, f"1.5{units.units(dimension)[0]}") is None


def test_no_unit_belongs_to_two_dimensions():
    assert len(set(units.units())) == len(units.units())


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (2**20 * 98.23, "98.2 MiB"), (5e9, "4.66 GiB")],
)
def test_sizes_are_printed_with_three_digits(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.0421, "42.1 ms"),
        (0.9994, "999 ms"),
        (0.9996, "1 s"),
        (59.9, "59.9 s"),
        (59.96, "1 min 0 s"),
        (3599.7, "1 h 0 min"),
    ],
)
def test_durations_are_printed_in_the_unit_a_person_would_use(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("rate", "unit", "text"),
    [
        (7.934, "tokens/s", "7.93 tokens/s"),
        (1250.4, "tokens/s", "1250 tokens/s"),
        (11.3e9, "B/s", "11.3 GB/s"),
        (2.0e12, "FLOP/s", "2 TFLOP/s"),
        (12, "B/s", "12 B/s"),
    ],
)
def test_rates_are_printed_with_three_digits(rate, unit, text):
    assert format_rate(rate, unit) == text


def test_the_examples_in_the_docstrings_are_true():
    assert doctest.testmod(units) == (0, 7)
