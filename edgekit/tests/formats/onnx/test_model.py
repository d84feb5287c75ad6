"""ONNX files as bytes: what is written is read back."""

import os
import subprocess
import sys

import pytest

from edgekit.doctor import _tiny_checkpoint
from edgekit.encodings import protobuf
from edgekit.encodings.protobuf import ProtobufMessage
from edgekit.formats import BuildRequest
from edgekit.formats.onnx import conversion, model, tensor_types
from edgekit.formats.onnx.model import External


np = pytest.importorskip("numpy")


EXPORT = """
import hashlib, sys
from pathlib import Path
from edgekit.doctor import _tiny_checkpoint
from edgekit.formats import BuildRequest
from edgekit.formats.onnx import RECIPES, writing
out = Path(sys.argv[1])
request = BuildRequest(recipe=RECIPES[sys.argv[2]])
writing.convert(_tiny_checkpoint(out), request, out, progress=lambda _: None)
for file in sorted(out.rglob("*.*")):
    if file.is_file():
        print(file.relative_to(out), hashlib.sha256(file.read_bytes()).hexdigest())
"""


@pytest.fixture
def path(tmp_path):
    directory = tmp_path / "artifact"
    directory.mkdir()
    checkpoint = _tiny_checkpoint(tmp_path)
    entry = conversion.convert(
        checkpoint,
        BuildRequest(recipe=tensor_types.RECIPES["UINT4"]),
        directory,
        progress=lambda _: None,
    )
    return directory / entry


def data_of(path):
    return path.with_name(f"{path.name}_data")


def test_a_number_is_read_as_it_was_written():
    for value in (0, 1, 127, 128, 300, 2**31, 2**63 - 1, -1, -(2**63)):
        message = ProtobufMessage.whole(protobuf.integer(3, value), origin="test")
        assert message.integer(3) == value
        assert message.integer(4) == 0


def test_texts_and_messages_are_read_as_they_were_written():
    inner = protobuf.text(1, "조수") + protobuf.real(2, 0.5) + protobuf.integer(3, 7)
    message = ProtobufMessage.whole(protobuf.nested(9, inner) * 2, origin="test")
    assert [part.text(1) for part in message.messages(9)] == ["조수", "조수"]
    assert [part.integer(3) for part in message.messages(9)] == [7, 7]
    assert message.message(8) is None


def test_the_same_checkpoint_makes_the_same_bytes(path, tmp_path):
    again = tmp_path / "again"
    again.mkdir()
    conversion.convert(
        _tiny_checkpoint(tmp_path),
        BuildRequest(recipe=tensor_types.RECIPES["UINT4"]),
        again,
        progress=lambda _: None,
    )
    assert len(model.files(path)) > 1
    for file in model.files(path):
        assert (again / "onnx" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.toolchain
@pytest.mark.parametrize("recipe", ["INT8", "UINT4_GPU"])
def test_another_process_makes_the_same_bytes_whatever_its_hashes(recipe, tmp_path):
    digests = set()
    for seed in ("0", "1"):
        out = tmp_path / seed
        out.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", EXPORT, str(out), recipe],
            env={**os.environ, "PYTHONHASHSEED": seed}, check=True, capture_output=True, text=True,
        )  # fmt: skip
        digests.add(done.stdout)
    assert len(digests) == 1
    assert "model" in digests.pop()


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
