"""Bits that are known, and torch's own rounding of many more."""

import pytest

from edgekit.errors import UsageError
from edgekit.quant import rounding


np = pytest.importorskip("numpy")

KNOWN = {  # bits of a float32: those of its bfloat16
    0x3F807FFF: 0x3F80, 0x3F808000: 0x3F80, 0x3F808001: 0x3F81,  # around a tie: down to even
    0x3F817FFF: 0x3F81, 0x3F818000: 0x3F82, 0x3F818001: 0x3F82,  # up to even
    0xBF818000: 0xBF82, 0x00008000: 0x0000, 0x00018000: 0x0002,  # negative; subnormal
    0x3FFF8000: 0x4000, 0x80000000: 0x8000,  # into the next power of two; minus zero
    0x7F7F7FFF: 0x7F7F, 0x7F7F8000: 0x7F80,  # the largest, and the first that is too large
}  # fmt: skip


def floats(bits):
    return np.array(list(bits), np.uint32).view(np.float32)


def test_bfloat16_takes_the_nearest_and_of_two_the_even_one():
    assert rounding.bfloat16(floats(KNOWN)).tolist() == list(KNOWN.values())


def test_it_can_be_put_where_it_goes():
    out = np.empty(len(KNOWN), "<u2")
    assert rounding.bfloat16(floats(KNOWN), out=out) is out
    assert out.tolist() == list(KNOWN.values())


def test_what_is_read_back_has_the_upper_half_of_the_bits():
    stored = np.array([0x3F81, 0xBF80, 0x0001], np.uint16)
    assert rounding.from_bfloat16(stored).view(np.uint32).tolist() == [
        0x3F810000, 0xBF800000, 0x00010000,
    ]  # fmt: skip
    assert rounding.bfloat16(rounding.from_bfloat16(stored)).tolist() == stored.tolist()


@pytest.mark.toolchain
def test_torch_rounds_to_the_same():
    torch = pytest.importorskip("torch")
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    theirs = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(rounding.bfloat16(values), theirs)


@pytest.mark.parametrize("value", [65519.99, -65519.99])
def test_float16_holds_what_rounds_to_its_largest(value):
    (found,) = rounding.float16(np.array([value], np.float32), hint="")
    assert abs(found) == 65504


@pytest.mark.parametrize("value", [65520.0, -65520.0, 1e30])
def test_what_float16_would_make_infinite_is_refused(value):
    with pytest.raises(UsageError, match="too large for F16") as refusal:
        rounding.float16(np.array([value], np.float32), hint="take F32")
    assert refusal.value.hint == "take F32"


def test_two_codes_share_a_byte_the_first_in_the_lower_half():
    assert rounding.packed_pairs(np.array([[1, 2, 15, 0]], np.uint8)).tolist() == [[0x21, 0x0F]]
