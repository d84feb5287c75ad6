"""The order of value heads in a file, against the transposition that it is."""

import math

import pytest

from edgekit.formats.gguf.value_heads import ValueHeads, value_heads
from edgekit.tests.formats.gguf.test_architectures import GEMMA4, QWEN35


np = pytest.importorskip("numpy")

SHAPES = [(2, 2, 3, 0), (3, 2, 4, 5), (2, 4, 1, 0), (4, 1, 2, 6), (1, 3, 2, 2)]


def transposed(rows, key_heads, values_per_key, width, first):
    """Return rows with the value heads of a checkpoint, key head by key head, taking turns."""
    heads = rows[first:].reshape(key_heads, values_per_key, width, *rows.shape[1:])
    return np.concatenate([rows[:first], heads.swapaxes(0, 1).reshape(rows[first:].shape)])


def gathered(rows, heads, to, first=0, count=None):
    runs = heads.runs(first, len(rows) - first if count is None else count, to)
    return np.concatenate([rows[at : at + taken] for at, taken in runs])


@pytest.mark.parametrize("shape", SHAPES)
def test_heads_take_turns_at_the_key_heads_and_come_back(shape):
    keys, values, width, first = shape
    heads = ValueHeads(key_heads=keys, values_per_key=values, width=width, first=first)
    rows = np.arange((first + keys * values * width) * 2, dtype=np.float32).reshape(-1, 2)
    turned = gathered(rows, heads, "file")
    assert np.array_equal(turned, transposed(rows, *shape))
    assert np.array_equal(gathered(turned, heads, "checkpoint"), rows)
    assert np.array_equal(heads.columns(rows.T, "file"), turned.T)
    assert np.array_equal(heads.columns(turned.T, "checkpoint"), rows.T)


def test_some_rows_are_those_of_the_whole():
    heads = ValueHeads(key_heads=3, values_per_key=2, width=4, first=5)
    rows = np.arange(29, dtype=np.float32)
    turned, parts = gathered(rows, heads, "file"), []
    for first, count in ((0, 3), (3, 7), (10, 1), (11, 18)):
        part = gathered(rows, heads, "file", first, count)
        parts.append(part)
        assert np.array_equal(part, turned[first : first + count])
    assert math.fsum(len(part) for part in parts) == 29


def test_only_what_counts_value_heads_changes_places():
    """Every weight but the norm, which all heads share; the last by its columns."""
    moved = {role: value_heads(role, QWEN35) for role, _ in QWEN35.weights()}
    parts = {role.rpartition(".")[2]: heads.axis for role, heads in moved.items() if heads}
    assert parts == {
        "delta_qkv": 0, "delta_taps": 0, "delta_beta": 0, "delta_alpha": 0, "delta_decay": 0,
        "delta_decay_bias": 0, "delta_gate": 0, "delta_output": 1,
    }  # fmt: skip
    assert not any(value_heads(role, GEMMA4) for role, _ in GEMMA4.weights())
