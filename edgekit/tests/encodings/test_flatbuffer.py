import struct

import pytest

from edgekit.encodings.flatbuffer import Table


# A table of two fields, a number and a text, laid out by hand after the format's description.
VTABLE = struct.pack("<4H", 8, 12, 4, 8)  # its size, the table's, and where the two fields lie
TABLE = struct.pack("<iII", 8, 7, 4)  # back to the vtable, the number, on to the text
WHOLE = struct.pack("<I", 12) + VTABLE + TABLE + struct.pack("<I", 5) + b"hello\0"


def test_fields_are_read_through_the_vtable():
    root = Table.root(WHOLE)
    assert (root.number(0, "I"), root.text(1), root.number(2, "I"), root.text(3)) == (
        7,
        "hello",
        0,
        "",
    )
    assert root.numbers(1, "b") == tuple(b"hello")
    assert list(root.tables(2)) == []


@pytest.mark.parametrize("length", range(len(WHOLE) - 1))
def test_what_is_cut_off_is_refused(length):
    def read():
        root = Table.root(WHOLE[:length])
        return root.number(0, "I"), root.text(1)

    with pytest.raises(struct.error, match="leads out of it"):
        read()


def test_what_lies_past_the_flatbuffer_is_not_read():
    with pytest.raises(struct.error, match="leads out of it"):
        Table.root(WHOLE, end=len(WHOLE) - 4).text(1)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [(0, 2**31, "leads out"), (12, 1000, "leads out"), (20, 2**20, "leads out"),
     (24, 2**31, "leads out"), (28, 0xFF, "not UTF-8")],
)  # fmt: skip
def test_an_offset_that_leads_elsewhere_is_refused(place, value, said):
    data = bytearray(WHOLE)
    data[place : place + 4] = struct.pack("<I", value)

    def read():
        return Table.root(bytes(data)).text(1)

    with pytest.raises(struct.error, match=said):
        read()


def test_a_table_that_must_be_there_is_missed():
    with pytest.raises(struct.error, match="a table is missing"):
        Table.root(WHOLE).table(5)
