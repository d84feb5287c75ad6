"""ONNX files as bytes: what is written is read back, and damage is told before a runtime looks."""

import os
from dataclasses import replace

import pytest

from edgekit.doctor import _tiny_checkpoint
from edgekit.errors import BundleError
from edgekit.formats.onnx import conversion, model, protobuf, storage
from edgekit.formats.onnx.model import External
from edgekit.formats.onnx.protobuf import Message


np = pytest.importorskip("numpy")


@pytest.fixture
def path(tmp_path):
    directory = tmp_path / "artifact"
    directory.mkdir()
    checkpoint = _tiny_checkpoint(tmp_path)
    entry = conversion.convert(
        checkpoint, storage.RECIPES["UINT4"], directory, progress=lambda _: None
    )
    return directory / entry


def data_of(path):
    return path.with_name(conversion.DATA)


def rewrite(path, change):
    """Write the model file with other places for its weights."""
    tensors = model.read(path)
    whole = Message.whole(path.read_bytes(), origin="")
    graph = whole.message(7)
    assert graph is not None
    nodes = b"".join(protobuf.nested(1, node.content) for node in graph.messages(1))
    weights = b"".join(protobuf.nested(5, change(tensor).encode()) for tensor in tensors)
    opsets = b"".join(protobuf.nested(8, entry.content) for entry in whole.messages(8))
    path.write_bytes(protobuf.nested(7, nodes, weights) + opsets)


def test_a_number_is_read_as_it_was_written():
    for value in (0, 1, 127, 128, 300, 2**31, 2**63 - 1, -1, -(2**63)):
        message = Message.whole(protobuf.integer(3, value), origin="test")
        assert message.integer(3) == value
        assert message.integer(4) == 0


def test_texts_and_messages_are_read_as_they_were_written():
    inner = protobuf.text(1, "조수") + protobuf.real(2, 0.5) + protobuf.integer(3, 7)
    message = Message.whole(protobuf.nested(9, inner) * 2, origin="test")
    assert [part.text(1) for part in message.messages(9)] == ["조수", "조수"]
    assert [part.integer(3) for part in message.messages(9)] == [7, 7]
    assert message.message(8) is None


def test_the_same_checkpoint_makes_the_same_bytes(path, tmp_path):
    again = tmp_path / "again"
    again.mkdir()
    conversion.convert(
        _tiny_checkpoint(tmp_path), storage.RECIPES["UINT4"], again, progress=lambda _: None
    )
    for file in model.files(path):
        assert (again / file.name).read_bytes() == file.read_bytes()


def test_no_weight_overlaps_another(path):
    tensors = sorted(model.read(path), key=lambda tensor: tensor.offset)
    ends = [0, *(tensor.offset + tensor.size_bytes for tensor in tensors)]
    assert all(tensor.offset >= end for tensor, end in zip(tensors, ends, strict=False))
    assert ends[-1] == data_of(path).stat().st_size


def test_large_weights_begin_at_a_page_and_small_ones_at_a_cache_line():
    sizes = [10, 2**20, 3, 2**20 + 1, 5]
    tensors = [External(name=str(n), dtype="uint8", shape=(n,)) for n in sizes]
    placed = list(model.place(tensors, stem="data"))
    assert [tensor.offset for tensor in placed] == [0, 4096, 1052672, 1056768, 2105408]
    assert model.file_sizes(placed) == {"data": 2105413}


# Damage


def test_a_data_file_that_was_cut_off_is_told(path):
    data = data_of(path)
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"model.onnx_data has \d+ bytes, .* is at \d+") as told:
        model.files(path)
    assert "cut off" in told.value.hint


def test_a_missing_data_file_is_told(path):
    data_of(path).unlink()
    with pytest.raises(BundleError, match=r"model.onnx_data is missing"):
        model.files(path)


def test_a_data_file_that_is_a_link_is_refused(path, tmp_path):
    data_of(path).rename(tmp_path / "elsewhere")
    data_of(path).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="is a link"):
        model.files(path)


@pytest.mark.parametrize("file", ["../model.onnx_data", "/etc/passwd", "", ".", "..", "a/b"])
def test_weights_are_read_from_beside_the_model_only(path, file):
    rewrite(path, lambda tensor: replace(tensor, file=file))
    with pytest.raises(BundleError, match="which is no file beside it"):
        model.read(path)


@pytest.mark.parametrize("offset", [2**40, -1])
def test_a_weight_outside_its_file_is_refused(path, offset):
    rewrite(path, lambda tensor: replace(tensor, offset=offset))
    with pytest.raises(BundleError, match=r"layers|rope|token|norm"):
        model.read(path)


def test_a_shape_that_its_bytes_do_not_fill_is_refused(path):
    text = path.read_bytes().replace(b"\x0a\x06length\x12\x04", b"\x0a\x06length\x12\x049", 1)
    assert text != path.read_bytes()
    path.write_bytes(text)
    with pytest.raises(BundleError):
        model.read(path)


def test_a_storage_that_edgekit_never_writes_is_refused(path):
    rewrite(path, lambda tensor: tensor if "scales" not in tensor.name
            else replace(tensor, name=tensor.name.replace("scales", "steps")))  # fmt: skip
    with pytest.raises(BundleError, match="stored in a way that edgekit never writes"):
        storage.contents(path)


@pytest.mark.parametrize("garbage", [b"", b"not a model" * 10, b"\x3a\x00", bytes(1000)])
def test_what_is_no_model_is_refused(path, garbage):
    path.write_bytes(garbage)
    with pytest.raises(BundleError):
        model.read(path)


def test_operators_of_another_version_are_refused(path):
    rewrite(path, lambda tensor: tensor)
    model.read(path)
    path.write_bytes(path.read_bytes() + protobuf.nested(8, protobuf.integer(2, 99)))
    with pytest.raises(BundleError, match=r"asks for operators .* this edgekit writes opset 21"):
        model.read(path)


def test_a_model_cut_off_anywhere_is_refused_with_the_offset(path):
    whole = path.read_bytes()
    for length in range(1, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(BundleError, match=r"at offset \d+|no graph|asks for operators"):
            model.read(path)


def test_no_damage_is_more_than_a_refusal(path):
    whole, random = path.read_bytes(), np.random.default_rng(0)
    refusals = []
    for _ in range(300):
        damaged = bytearray(whole)
        for at in random.integers(0, len(whole), 4):
            damaged[at] = random.integers(0, 256)
        path.write_bytes(damaged)
        try:
            storage.contents(path)
        except BundleError as error:
            refusals.append(str(error))
    assert len(refusals) > 30
    assert all(os.fspath(path.parent) in refusal for refusal in refusals)
