import random
import struct
import tracemalloc
from pathlib import Path

import pytest

from edgekit.errors import UsageError
from edgekit.formats.gguf import layout
from edgekit.formats.gguf.layout import TensorEntry, Writer, encode_header, file_bytes, read


METADATA = {
    "general.architecture": ("string", "llama"),
    "a.uint8": ("uint8", 255),
    "a.int8": ("int8", -128),
    "a.uint16": ("uint16", 65535),
    "a.int16": ("int16", -2),
    "a.uint32": ("uint32", 2**32 - 1),
    "a.int32": ("int32", -3),
    "a.float32": ("float32", 0.5),
    "a.bool": ("bool", True),
    "a.uint64": ("uint64", 2**64 - 1),
    "a.int64": ("int64", -(2**63)),
    "a.float64": ("float64", 0.1),
    "a.strings": ("array[string]", ["", "é", "한국", "🦙"]),
    "a.ints": ("array[int32]", [-1, 0, 1]),
    "a.floats": ("array[float32]", [0.25, -2.0]),
    "a.bools": ("array[bool]", [True, False]),
    "a.nothing": ("array[string]", []),
}
TENSORS = (
    TensorEntry(name="norm", shape=(3,), tensor_type="F32"),
    TensorEntry(name="matrix", shape=(2, 64), tensor_type="Q8_0"),
    TensorEntry(name="cube", shape=(2, 3, 5), tensor_type="F16"),
)
PAYLOADS = {
    "norm": struct.pack("<3f", 1, 2, 3),
    "matrix": bytes(range(136)),
    "cube": struct.pack("<30e", *range(30)),
}


def write_file(path, metadata=METADATA, tensors=TENSORS, payloads=PAYLOADS):
    with Writer(path, metadata, tensors) as writer:
        for tensor in tensors:
            writer.write(tensor.name, payloads[tensor.name])
    return path


@pytest.fixture
def tiny(tmp_path):
    return write_file(tmp_path / "tiny.gguf")


# Writing


def test_a_header_has_the_bytes_of_the_specification():
    header = encode_header(
        {"k": ("uint8", 7), "s": ("array[string]", ["xy"])},
        [
            TensorEntry(name="t", shape=(2, 32), tensor_type="Q4_0"),
            TensorEntry(name="u", shape=(1,), tensor_type="F32"),
        ],
    )
    expected = (
        b"GGUF\x03\0\0\0" + b"\x02" + bytes(7) + b"\x02" + bytes(7)
        + b"\x01" + bytes(7) + b"k" + b"\0\0\0\0" + b"\x07"
        + b"\x01" + bytes(7) + b"s" + b"\x09\0\0\0" + b"\x08\0\0\0" + b"\x01" + bytes(7)
        + b"\x02" + bytes(7) + b"xy"
        + b"\x01" + bytes(7) + b"t" + b"\x02\0\0\0" + b"\x20" + bytes(7) + b"\x02" + bytes(7)
        + b"\x02\0\0\0" + bytes(8)
        + b"\x01" + bytes(7) + b"u" + b"\x01\0\0\0" + b"\x01" + bytes(7)
        + b"\0\0\0\0" + b"\x40" + bytes(7)  # 36 bytes of Q4_0, padded to 64
    )  # fmt: skip
    assert header.startswith(expected)
    assert len(header) % 32 == 0
    assert not header[len(expected) :].strip(b"\0")
    assert len(header) - len(expected) < 32


def test_what_is_written_is_read(tiny):
    file = read(tiny)
    assert file.metadata == {key: value for key, (_, value) in METADATA.items()}
    assert [(t.name, t.shape, t.tensor_type) for t in file.tensors] == [
        (t.name, t.shape, t.tensor_type) for t in TENSORS
    ]
    content = tiny.read_bytes()
    for tensor in file.tensors:
        payload = content[tensor.offset : tensor.offset + tensor.size_bytes]
        assert payload == PAYLOADS[tensor.name]
        assert tensor.offset % 32 == 0


@pytest.mark.parametrize("count", range(len(TENSORS) + 1))
def test_the_size_of_a_file_is_known_beforehand(count, tmp_path):
    path = write_file(tmp_path / "x.gguf", tensors=TENSORS[:count])
    assert path.stat().st_size == file_bytes(METADATA, TENSORS[:count])


def test_a_tensor_may_come_in_pieces(tiny, tmp_path):
    other = tmp_path / "pieces.gguf"
    with Writer(other, METADATA, TENSORS) as writer:
        for tensor in TENSORS:
            payload = PAYLOADS[tensor.name]
            for start in range(0, len(payload), 7):
                writer.write(tensor.name, payload[start : start + 7])
    assert other.read_bytes() == tiny.read_bytes()


def test_a_failed_file_does_not_stay(tmp_path):
    path = tmp_path / "x.gguf"
    with pytest.raises(KeyError, match="matrix"):
        write_file(path, payloads={"norm": PAYLOADS["norm"]})
    assert not path.exists()


def test_a_file_without_its_last_tensor_does_not_stay(tmp_path):
    path = tmp_path / "x.gguf"
    with pytest.raises(ValueError, match="lacks cube"):
        write_file(path, payloads=PAYLOADS | {"cube": b""})
    assert not path.exists()


@pytest.mark.parametrize(
    ("name", "payload", "message"),
    [
        ("matrix", bytes(136), "not the turn of matrix"),
        ("norm", bytes(13), "norm takes 12 bytes, got 13"),
    ],
)
def test_the_writer_takes_only_what_the_header_announced(name, payload, message, tmp_path):
    path = tmp_path / "x.gguf"
    with pytest.raises(ValueError, match=message), Writer(path, METADATA, TENSORS) as writer:
        writer.write(name, payload)
    assert not path.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("size", [1, 2**20], ids=["at the end", "at once"])
def test_a_full_disk_is_a_sentence_and_nothing_stays(size, tmp_path):
    path = tmp_path / "x.gguf"
    path.symlink_to("/dev/full")
    with pytest.raises(UsageError, match="No space left on device"):
        write_file(path, metadata={"a": ("string", "x" * size)})
    assert not path.is_symlink()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (("uint8", 256), "not every item is a uint8"),
        (("float32", 1e39), "not every item is a float32"),
        (("array[uint32]", [1, -1]), "not every item is a uint32"),
        (("text", "x"), "no type 'text'"),
        (("array[array]", []), "no type"),
    ],
)
def test_metadata_that_no_type_holds_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        encode_header({"k": value}, [])


@pytest.mark.parametrize(
    ("name", "shape", "tensor_type"),
    [
        ("", (1,), "F32"),
        ("x" * 64, (1,), "F32"),
        ("x", (), "F32"),
        ("x", (1, 1, 1, 1, 1), "F32"),
        ("x", (0, 32), "F32"),
        ("x", (2, 48), "Q8_0"),
    ],
)
def test_tensors_that_ggml_cannot_hold_are_refused(name, shape, tensor_type):
    with pytest.raises(ValueError, match=r"name|shape|columns"):
        TensorEntry(name=name, shape=shape, tensor_type=tensor_type)


def test_two_tensors_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two tensors have one name"):
        encode_header({}, [TENSORS[0], TENSORS[0]])


# Reading what is wrong


def u32(number):
    return struct.pack("<I", number)


def u64(number):
    return struct.pack("<Q", number)


def text(content):
    return u64(len(content)) + content


def key(name=b"k", kind=4, value=b"\1\0\0\0"):
    return text(name) + u32(kind) + value


def entry(name=b"t", shape=(8,), tensor_type=0, offset=0, dimensions=None):
    count = len(shape) if dimensions is None else dimensions
    dims = b"".join(u64(d) for d in reversed(shape))
    return text(name) + u32(count) + dims + u32(tensor_type) + u64(offset)


def raw(keys=(), entries=(), data=b"", *, magic=b"GGUF", version=3, counts=(None, None)):
    tensors = len(entries) if counts[0] is None else counts[0]
    count = len(keys) if counts[1] is None else counts[1]
    header = magic + u32(version) + u64(tensors) + u64(count) + b"".join([*keys, *entries])
    return header + bytes(-len(header) % 32) + data


def array(item, count, content=b""):
    return u32(item) + u64(count) + content


DATA = bytes(32)
HUGE = 2**63
REJECTS = {
    "an empty file": (b"", "the magic at byte 0 needs 4 bytes, the file has 0"),
    "another format": (raw(magic=b"PK\3\4"), r"the magic at byte 0 is b'PK\\x03\\x04'"),
    "version 1": (raw(version=1), "the version at byte 4 is 1"),
    "version 0": (raw(version=0), "the version at byte 4 is 0"),
    "a future version": (raw(version=4), "the version at byte 4 is 4, edgekit reads 2 and 3"),
    "big-endian": (raw(version=3 << 24), "the version at byte 4 is big-endian"),
    "cut before the counts": (raw()[:12], "the number of tensors at byte 8 needs 8 bytes"),
    "too many tensors": (raw(counts=(HUGE, 0)), "the number of tensors at byte 8 is 9223"),
    "too many keys": (raw(counts=(0, HUGE)), "the number of keys at byte 16 is 9223"),
    "one key too many": (
        raw([key(name=b"k" * 40)], counts=(0, 2), data=DATA),
        "key 1 at byte",
    ),
    "an empty key": (raw([key(name=b"")]), "key 0 at byte 24 is empty"),
    "a long key": (raw([key(name=b"k" * 65536)]), "key 0 at byte 24 is empty or too long"),
    "a key beyond the end": (raw([u64(HUGE) + bytes(20)]), "key 0 at byte"),
    "a key that is not text": (raw([key(name=b"a\xff")]), "key 0 at byte 33 is not UTF-8"),
    "a key twice": (raw([key(), key()]), "key 1 at byte 41 repeats 'k'"),
    "an unknown value type": (raw([key(kind=13)]), "the type of 'k' at byte 33 is 13"),
    "a value cut off": (raw([key(kind=10, value=b"")])[:38], "k at byte 37 needs 8 bytes"),
    "a string beyond the end": (raw([key(kind=8, value=u64(HUGE))]), "k at byte 45 is too large"),
    "a string a little too long": (
        raw([key(kind=8, value=u64(200) + b"x")]),
        "k at byte 45 needs 200 bytes, the file has 19",
    ),
    "a string that is not text": (
        raw([key(kind=8, value=text(b"ab\xc3"))]),
        "k at byte 47 is not UTF-8",
    ),
    "a boolean of 2": (raw([key(kind=7, value=b"\2")]), "k at byte 37 holds a boolean"),
    "an array of booleans of 2": (
        raw([key(kind=9, value=array(7, 2, b"\1\2"))]),
        "k at byte 49 holds a boolean",
    ),
    "an array of arrays": (
        raw([key(kind=9, value=array(9, 1, array(4, 0)))]),
        "k at byte 37 is an array of arrays",
    ),
    "an array of unknown items": (
        raw([key(kind=9, value=array(99, 1))]),
        "the item type of 'k' at byte 37 is 99",
    ),
    "an array of too many numbers": (
        raw([key(kind=9, value=array(6, 2**61))]),
        "the length of 'k' at byte 41 is 2305843009213693952",
    ),
    "an array of too many strings": (
        raw([key(kind=9, value=array(8, 4))]),
        "the length of 'k' at byte 41 is 4: too long",
    ),
    "an alignment of 0": (
        raw([key(name=b"general.alignment", value=u32(0))]),
        "general.alignment at byte 53 is 0, no power of two",
    ),
    "an alignment of 48": (
        raw([key(name=b"general.alignment", value=u32(48))]),
        "general.alignment at byte 53 is 48",
    ),
    "an alignment that is a string": (
        raw([key(name=b"general.alignment", kind=8, value=text(b"32"))]),
        "the type of 'general.alignment' at byte 49 is string",
    ),
    "an alignment that is an array": (
        raw([key(name=b"general.alignment", kind=9, value=array(4, 1, u32(32)))]),
        "the type of 'general.alignment' at byte 49 is array",
    ),
    "an alignment larger than the file": (
        raw([key(name=b"general.alignment", value=u32(2**31))], [entry()], DATA),
        "'t' at byte 2147483648 ends at byte 2147483680",
    ),
    "a tensor without a name": (
        raw(entries=[entry(name=b"")], data=DATA),
        "the name of tensor 0 at byte 24 is empty",
    ),
    "a long tensor name": (
        raw(entries=[entry(name=b"t" * 64)], data=DATA),
        "the name of tensor 0 at byte 24 is empty or too long",
    ),
    "a tensor name that is not text": (
        raw(entries=[entry(name=b"\x80")], data=DATA),
        "the name of tensor 0 at byte 32 is not UTF-8",
    ),
    "a tensor twice": (
        raw(entries=[entry(), entry(offset=32)], data=DATA + DATA),
        "the tensor 't' at byte .* is there twice",
    ),
    "no dimensions": (
        raw(entries=[entry(shape=())], data=DATA),
        "the shape of 't' at byte 33 has 0 dimensions",
    ),
    "five dimensions": (
        raw(entries=[entry(shape=(1, 1, 1, 1, 1))], data=DATA),
        "the shape of 't' at byte 33 has 5 dimensions",
    ),
    "four thousand million dimensions": (
        raw(entries=[entry(dimensions=2**32 - 1)], data=DATA),
        "the shape of 't' at byte 33 has 4294967295 dimensions",
    ),
    "an empty dimension": (
        raw(entries=[entry(shape=(0, 8))], data=DATA),
        r"the shape of 't' at byte 33 is \[0, 8\]: it holds nothing",
    ),
    "a shape that overflows": (
        raw(entries=[entry(shape=(2**32, 2**32))], data=DATA),
        "the shape of 't' at byte 33 is .* more than ggml can count",
    ),
    "a negative dimension": (
        raw(entries=[entry(shape=(2**64 - 1,))], data=DATA),
        "the shape of 't' at byte 33 is .* more than ggml can count",
    ),
    "a removed tensor type": (
        raw(entries=[entry(tensor_type=4)], data=DATA),
        "the tensor type of 't' at byte 45 is 4",
    ),
    "an unknown tensor type": (
        raw(entries=[entry(tensor_type=2**31)], data=DATA),
        "the tensor type of 't' at byte 45 is 2147483648",
    ),
    "columns that do not fill a block": (
        raw(entries=[entry(tensor_type=8)], data=DATA),
        "the tensor type of 't' at byte 45 is Q8_0, whose blocks of 32 do not fill 8 columns",
    ),
    "an offset off the grid": (
        raw(entries=[entry(offset=8)], data=DATA + DATA),
        "the offset of 't' at byte 49 is 8, no multiple of 32",
    ),
    "a first offset that is not 0": (
        raw(entries=[entry(offset=32)], data=DATA + DATA),
        "the offset of 't' at byte 49 is 32, which leaves a gap; expected 0",
    ),
    "overlapping tensors": (
        raw(entries=[entry(), entry(name=b"u", offset=0)], data=DATA + DATA),
        "the offset of 'u' at byte 82 is 0, inside the tensor before; expected 32",
    ),
    "an offset beyond the file": (
        raw(entries=[entry(), entry(name=b"u", offset=2**40)], data=DATA + DATA),
        "the offset of 'u' at byte 82 is 1099511627776, which leaves a gap",
    ),
    "a tensor longer than the file": (
        raw(entries=[entry(shape=(2**40, 8))], data=DATA),
        "the tensor 't' at byte 96 ends at byte 35184372088928, the file at 128",
    ),
    "a tensor cut off": (
        raw(entries=[entry()], data=DATA[:-1]),
        "the tensor 't' at byte 64 ends at byte 96, the file at 95",
    ),
    "data after the last tensor": (
        raw(entries=[entry()], data=DATA + b"x"),
        "the data at byte 96 is not part of any tensor",
    ),
    "data without any tensor": (
        raw([key()], data=DATA),
        "the data at byte 64 is not part of any tensor",
    ),
}


@pytest.mark.parametrize("damage", REJECTS)
def test_a_damaged_header_is_refused_with_the_field_and_the_byte(damage, tmp_path):
    content, message = REJECTS[damage]
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        raw(),
        raw(version=2),
        raw([key()], [entry(), entry(name=b"u", offset=32)], DATA + DATA),
        raw([key(name=b"general.alignment", value=u32(1))], [entry()])[:-6] + DATA,
        raw([key(kind=9, value=array(4, 0))], [entry(shape=(7,))], DATA[:28]),
    ],
    ids=["nothing", "version 2", "two tensors", "alignment 1", "no last padding"],
)
def test_the_builder_of_damaged_headers_also_makes_sound_ones(content, tmp_path):
    path = tmp_path / "sound.gguf"
    path.write_bytes(content)
    assert read(path).version in {2, 3}


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match="is missing"):
        read(tmp_path / "nothing.gguf")


def test_a_directory_is_refused(tmp_path):
    with pytest.raises(UsageError, match="is a directory"):
        read(tmp_path)


@pytest.mark.parametrize("step", [31, pytest.param(1, marks=pytest.mark.slow)])
def test_every_truncation_is_refused(tiny, tmp_path, step):
    content = tiny.read_bytes()
    last = read(tiny).tensors[-1]
    path = tmp_path / "short.gguf"
    whole = last.offset + last.size_bytes
    for length in (*range(0, whole, step), whole - 1):
        path.write_bytes(content[:length])
        with pytest.raises(UsageError):
            read(path)


def mutations(content, header_bytes, *, count, seed):
    """Yield copies with a bit, a byte or a wide number changed, a piece doubled or cut."""
    chance = random.Random(seed)
    numbers = [0, 1, 255, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]
    for index in range(count):
        mutant = bytearray(content)
        place = chance.randrange(header_bytes)
        match index % 5:
            case 0:
                mutant[place] ^= 1 << chance.randrange(8)
            case 1:
                mutant[place] = chance.randrange(256)
            case 2:
                mutant[place : place + 8] = u64(chance.choice(numbers))
            case 3:
                mutant[place:place] = mutant[place : place + chance.randrange(1, 40)]
            case _:
                del mutant[place : place + chance.randrange(1, 40)]
        yield bytes(mutant)


@pytest.mark.parametrize("count", [100, pytest.param(4000, marks=pytest.mark.slow)])
def test_no_mutation_crashes_the_reader(tiny, tmp_path, count):
    content = tiny.read_bytes()
    header_bytes = read(tiny).tensors[0].offset
    path = tmp_path / "mutant.gguf"
    refused = 0
    for mutant in mutations(content, header_bytes, count=count, seed=20261124):
        path.write_bytes(mutant)
        try:
            file = read(path)
        except UsageError as error:
            assert " at byte " in str(error)  # noqa: PT017
            refused += 1
        else:
            assert all(t.offset + t.size_bytes <= len(mutant) for t in file.tensors)
    assert refused > count // 2


@pytest.mark.slow
def test_a_file_may_be_little_more_than_the_largest_vocabulary(tmp_path):
    """Gemma's, as llama.cpp has them in files without weights."""
    tokens, merges = [f"t{index}" for index in range(262_144)], ["to ken"] * 514_906
    vocabulary = {
        "tokenizer.ggml.tokens": ("array[string]", tokens),
        "tokenizer.ggml.scores": ("array[float32]", [0.0] * len(tokens)),
        "tokenizer.ggml.token_type": ("array[int32]", [1] * len(tokens)),
        "tokenizer.ggml.merges": ("array[string]", merges),
    }
    path = write_file(tmp_path / "vocabulary.gguf", vocabulary, (), {})
    assert path.stat().st_size < 16 * 2**20
    found = read(path).metadata
    assert found["tokenizer.ggml.tokens"] == tokens
    assert len(found["tokenizer.ggml.merges"]) == len(merges)


@pytest.mark.parametrize("item", ["string", "long string", "uint8", "uint64", "tensor", "key"])
def test_a_hostile_file_cannot_take_more_memory_than_allowed(item, tmp_path, monkeypatch):
    floor = 2**20
    monkeypatch.setattr(layout, "_MEMORY_FLOOR_BYTES", floor)
    content = {
        "string": raw([key(kind=9, value=array(8, 40_000, text(b"ab") * 40_000))]),
        "long string": raw([key(kind=8, value=text("🦙a".encode() * 120_000))]),
        "uint8": raw([key(kind=9, value=array(0, 400_000, bytes(400_000)))]),
        "uint64": raw([key(kind=9, value=array(10, 50_000, b"\xff" * 400_000))]),
        "tensor": raw(entries=[entry(name=b"%05d" % i, offset=32 * i) for i in range(10_000)]),
        "key": raw([key(name=b"%05d" % i) for i in range(20_000)]),
    }[item]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(UsageError, match="is too large for a file of"):
            read(path)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < max(floor, 2 * len(content)) + 2**17  # the file's own buffer


# Against the gguf package


@pytest.mark.toolchain
def test_the_gguf_package_reads_what_we_write(tiny):
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(tiny)
    fields = {name: f.contents() for name, f in reader.fields.items() if "GGUF." not in name}
    assert fields == {key: value for key, (_, value) in METADATA.items()}
    found = {t.name: t for t in reader.tensors}
    assert found.keys() == PAYLOADS.keys()
    for tensor in TENSORS:
        theirs = found[tensor.name]
        assert tuple(reversed([int(d) for d in theirs.shape])) == tensor.shape
        assert theirs.tensor_type.name == tensor.tensor_type
        assert theirs.data.tobytes() == PAYLOADS[tensor.name]


@pytest.mark.toolchain
def test_the_gguf_package_writes_what_we_write(tmp_path):
    gguf = pytest.importorskip("gguf")
    import numpy as np

    metadata = {
        "general.architecture": ("string", "llama"),
        "llama.block_count": ("uint32", 2),
        "tokenizer.ggml.tokens": ("array[string]", ["a", "b"]),
    }
    values = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(5, np.float16)}
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    for name, array_ in values.items():
        writer.add_tensor(name, array_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors = [
        TensorEntry(name="a", shape=(3, 4), tensor_type="F32"),
        TensorEntry(name="b", shape=(5,), tensor_type="F16"),
    ]
    ours = write_file(tmp_path / "ours.gguf", metadata, tensors, values)
    assert ours.read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


@pytest.mark.toolchain
def test_rows_of_a_tensor_are_those_of_the_whole(tiny):
    pytest.importorskip("gguf")
    import numpy as np

    file = read(tiny)
    norm, matrix, cube = file.tensors
    assert layout.read_tensor(file, norm).tolist() == [1, 2, 3]
    assert layout.read_tensor(file, norm, first_row=1, rows=2).tolist() == [2, 3]
    whole = layout.read_tensor(file, cube)
    assert np.array_equal(whole, np.arange(30, dtype=np.float32).reshape(2, 3, 5))
    assert np.array_equal(layout.read_tensor(file, cube, first_row=1, rows=1), whole[1:])
    assert layout.read_tensor(file, matrix, first_row=1).shape == (1, 64)
    assert np.array_equal(
        layout.read_tensor(file, matrix, first_row=1), layout.read_tensor(file, matrix)[1:]
    )


@pytest.mark.parametrize(("first_row", "rows"), [(1, 2), (2, 1), (-1, 1), (0, 0)])
def test_rows_that_a_tensor_does_not_have_are_a_mistake_of_the_caller(tiny, first_row, rows):
    file = read(tiny)
    with pytest.raises(ValueError, match=f"has no rows {first_row} to {first_row + rows}"):
        layout.read_tensor(file, file.tensors[1], first_row=first_row, rows=rows)


@pytest.mark.toolchain
def test_a_tensor_of_integers_is_refused(tmp_path):
    pytest.importorskip("gguf")
    tensors = [TensorEntry(name="ids", shape=(4,), tensor_type="I32")]
    file = read(write_file(tmp_path / "x.gguf", {}, tensors, {"ids": bytes(16)}))
    with pytest.raises(
        UsageError, match="ids has the tensor type I32, which edgekit cannot decode"
    ):
        layout.read_tensor(file, file.tensors[0])


@pytest.mark.toolchain
def test_a_file_that_shrank_after_its_header_was_read_is_refused(tiny):
    pytest.importorskip("gguf")
    file = read(tiny)
    tiny.write_bytes(tiny.read_bytes()[:-40])
    with pytest.raises(UsageError, match="cube ends early, at byte"):
        layout.read_tensor(file, file.tensors[-1])
