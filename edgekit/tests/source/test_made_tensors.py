import pytest

from edgekit.errors import UsageError
from edgekit.model.checkpoint_protocol import Tensor, row_chunks
from edgekit.model.spec import Pairs
from edgekit.source.made_tensors import (
    ColumnMagnitudes,
    EmbeddingUpdate,
    LowRankUpdate,
    PairOrder,
    ReplacedRows,
    RowMagnitudes,
    Sum,
    Twin,
    Zeros,
)
from edgekit.tests.tiny.adapters import Given


np = pytest.importorskip("numpy")
seed = np.random.default_rng(3)


def given(*shape):
    return Given(seed.normal(size=shape))


BASE = given(10, 6)
SAME = Given(BASE.read())
MERGED: dict[str, Tensor] = {
    "low rank": LowRankUpdate(base=BASE, down=given(2, 6), up=given(10, 2), scale=0.5),
    "embedding": EmbeddingUpdate(base=BASE, down=given(2, 10), up=given(6, 2), scale=0.5),
    "row magnitudes": RowMagnitudes(base=BASE, magnitudes=given(10)),
    "column magnitudes": ColumnMagnitudes(base=BASE, magnitudes=given(6)),
    "replaced rows": ReplacedRows(base=BASE, replaced=(9, 4), values=given(2, 6)),
    "sum": Sum(base=BASE, addend=given(10, 6), scale=2.0),
    "twin": Twin(base=BASE, other=SAME, complaint="no"),
    "zeros": Zeros(shape=(10, 6), dtype="F32"),
}


@pytest.mark.parametrize("name", MERGED)
def test_rows_read_in_pieces_are_the_rows_of_the_whole(name):
    tensor = MERGED[name]
    pieces = [tensor.read(*chunk) for chunk in row_chunks(tensor.shape, weights=3 * 6)]
    assert [len(piece) for piece in pieces] == [3, 3, 3, 1]
    whole = tensor.read()
    assert whole.dtype == np.float32
    assert whole.shape == tensor.shape
    np.testing.assert_allclose(np.concatenate(pieces), whole, rtol=1e-6)


def test_reading_leaves_the_base_as_it_was():
    before = BASE.read().copy()
    for tensor in MERGED.values():
        tensor.read()
    np.testing.assert_array_equal(BASE.read(), before)


def test_magnitudes_become_the_lengths():
    rows, columns = given(10), given(6)
    lengths = np.linalg.norm(RowMagnitudes(base=BASE, magnitudes=rows).read(), axis=1)
    np.testing.assert_allclose(lengths, np.abs(rows.read()), rtol=1e-5)
    lengths = np.linalg.norm(ColumnMagnitudes(base=BASE, magnitudes=columns).read(), axis=0)
    np.testing.assert_allclose(lengths, np.abs(columns.read()), rtol=1e-5)


def test_a_row_without_length_becomes_no_number_rather_than_a_guess():
    empty = Given(np.zeros((2, 3)))
    assert np.isnan(RowMagnitudes(base=empty, magnitudes=Given(np.ones(2))).read()).all()


def test_replaced_rows_are_the_given_ones_and_the_others_stay():
    tensor = MERGED["replaced rows"]
    assert isinstance(tensor, ReplacedRows)
    np.testing.assert_array_equal(tensor.read()[[9, 4]], tensor.values.read())
    np.testing.assert_array_equal(tensor.read()[:4], BASE.read()[:4])


def test_twins_that_differ_are_refused():
    other = Given(BASE.read() + np.eye(10, 6))
    with pytest.raises(UsageError, match="two versions"):
        Twin(base=BASE, other=other, complaint="two versions").read()


PAIRS = {
    "whole heads": ((12, 3), Pairs(6, 6)),
    "parts of heads": ((12, 3), Pairs(6, 4)),
    "a bias": ((12,), Pairs(6, 4)),
    "norms that heads share": ((6,), Pairs(6, 4)),
    "a norm for each head": ((2, 6), Pairs(6, 4, axis=1)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_are_reordered_alike_whichever_rows_are_read(name):
    shape, pairs = PAIRS[name]
    stored = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    halves = PairOrder(base=Given(stored), pairs=pairs, to="halves")
    whole = halves.read()
    again = PairOrder(base=Given(whole), pairs=pairs, to="neighbours")
    assert not np.array_equal(whole, stored)
    for first in range(shape[0]):
        for count in range(1, shape[0] - first + 1):
            assert np.array_equal(halves.read(first, count), whole[first : first + count])
            assert np.array_equal(again.read(first, count), stored[first : first + count])


def test_the_first_of_each_pair_come_first_and_what_is_not_rotated_stays():
    stored = Given(np.array([0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15], np.float32))
    halves = PairOrder(base=stored, pairs=Pairs(6, 4), to="halves").read()
    assert halves.tolist() == [0, 2, 1, 3, 4, 5, 10, 12, 11, 13, 14, 15]
