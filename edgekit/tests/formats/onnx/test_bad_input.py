"""Damaged and hostile ONNX files: told in one sentence, before native code looks."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from edgekit.bundle.manifest import Artifact
from edgekit.doctor import _tiny_checkpoint
from edgekit.encodings import protobuf
from edgekit.encodings.protobuf import ProtobufMessage
from edgekit.errors import BundleError
from edgekit.formats import BuildRequest
from edgekit.formats.onnx import conversion, model, runtime, tensor_types
from edgekit.tests.bundle.test_manifest import make_bundle


np = pytest.importorskip("numpy")

OPENED_MUTANTS = 200


def convert(directory, recipe="UINT4"):
    directory.mkdir(exist_ok=True)
    checkpoint = _tiny_checkpoint(directory)
    chosen = tensor_types.RECIPES[recipe]
    return directory / conversion.convert(
        checkpoint, BuildRequest(recipe=chosen), directory, progress=lambda _: None
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the files of an artifact, by name."""
    path = convert(tmp_path_factory.mktemp("whole"))
    return {file.name: file.read_bytes() for file in model.files(path)}


@pytest.fixture
def path(whole, tmp_path):
    """Return a copy of it to damage."""
    directory = tmp_path / "onnx"
    directory.mkdir()
    for name, content in whole.items():
        (directory / name).write_bytes(content)
    return directory / "model_q4.onnx"


def data_of(path):
    return path.with_name(f"{path.name}_data")


def unsealed(path):
    return path.read_bytes()[: -model.SEAL_BYTES]


def rewrite(path, change):
    """Write the model file with other places for its weights, as one who means harm would."""
    tensors = model.read(path)
    whole = ProtobufMessage.whole(path.read_bytes(), origin="")
    graph = whole.message(7)
    assert graph is not None
    nodes = b"".join(protobuf.nested(1, node.content) for node in graph.messages(1))
    weights = b"".join(protobuf.nested(5, change(tensor).encode()) for tensor in tensors)
    opsets = b"".join(protobuf.nested(8, entry.content) for entry in whole.messages(8))
    version = protobuf.integer(1, model.IR_VERSION)
    path.write_bytes(model.sealed(version + protobuf.nested(7, nodes, weights) + opsets))


# Data files


def test_a_data_file_that_was_cut_off_is_told(path):
    data = data_of(path)
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"model_q4.onnx_data has \d+ bytes, .* is at") as told:
        model.files(path)
    assert "cut off" in told.value.hint


def test_a_missing_data_file_is_told(path):
    data_of(path).unlink()
    with pytest.raises(BundleError, match=r"model_q4.onnx_data is missing"):
        model.files(path)


def test_the_data_of_another_recipe_is_told_by_its_size_if_not_by_its_name(path, tmp_path):
    other = convert(tmp_path / "other", "UINT4_ALL")
    data_of(path).write_bytes(data_of(other).read_bytes())
    with pytest.raises(BundleError, match=r"model_q4.onnx_data has \d+ bytes, .* is at"):
        model.files(path)


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_data_file_may_be_a_hard_link_which_is_a_file_but_no_symbolic_one(link, path, tmp_path):
    data_of(path).rename(tmp_path / "elsewhere")
    link(tmp_path / "elsewhere", data_of(path))
    if link is os.link:
        assert data_of(path) in model.files(path)
        return
    with pytest.raises(BundleError, match="is a link"):
        model.files(path)


@pytest.mark.parametrize(
    "file",
    ["../model.onnx_data", "/etc/passwd", "", ".", "..", "a/model.onnx_data", "model.onnx_data\0",
     "model.onnx", "x" * 5000, "model.onnx_data_0", "C:\\model.onnx_data", "model.onnx_data\n"],
)  # fmt: skip
def test_weights_are_read_from_data_files_beside_the_model_only(path, file):
    rewrite(path, lambda tensor: replace(tensor, file=file))
    with pytest.raises(BundleError, match="which is not a data file next to it"):
        model.read(path)


@pytest.mark.parametrize("offset", [2**40, -1, 2**62])
def test_a_weight_outside_its_file_is_refused(path, offset):
    rewrite(path, lambda tensor: replace(tensor, offset=offset))
    with pytest.raises(BundleError, match=r"layers|rope|token|norm"):
        model.read(path)


def test_a_shape_that_its_bytes_do_not_fill_is_refused(path):
    changed = unsealed(path).replace(b"\x0a\x06length\x12\x04", b"\x0a\x06length\x12\x049", 1)
    assert changed != unsealed(path)
    path.write_bytes(model.sealed(changed))
    with pytest.raises(BundleError):
        model.read(path)


def test_a_storage_that_edgekit_never_writes_is_refused(path):
    rewrite(path, lambda tensor: tensor if "scales" not in tensor.name
            else replace(tensor, name=tensor.name.replace("scales", "steps")))  # fmt: skip
    with pytest.raises(BundleError, match="stored in a way that edgekit never writes"):
        tensor_types.contents(path)


# Data files that fit, but are not those: only a bundle's manifest can tell


def flip(path):
    data = bytearray(data_of(path).read_bytes())
    data[len(data) // 2] ^= 1
    data_of(path).write_bytes(data)


def swap(path):
    """Put other weights of the same model there, as large as those were."""
    data_of(path).write_bytes(bytes(data_of(path).stat().st_size))


def link_elsewhere(path):
    other = path.parent.parent / "elsewhere"
    other.write_bytes(bytes(data_of(path).stat().st_size))
    data_of(path).unlink()
    os.link(other, data_of(path))


@pytest.mark.parametrize("harm", [flip, swap, link_elsewhere])
def test_weights_that_are_not_those_exported_are_told_by_the_manifest(harm, path, tmp_path):
    bundle = make_bundle(tmp_path / "bundle")
    inside = convert(bundle.directory)
    artifact = Artifact.of_directory(
        bundle.directory, "onnx/model_q4.onnx", format="onnx", recipe="UINT4"
    )
    bundle = replace(bundle, artifact=artifact)
    bundle.check_files()
    harm(inside)
    assert data_of(inside) in model.files(inside)  # nothing else is wrong
    with pytest.raises(BundleError, match="its SHA-256 differs"):
        bundle.check_files()


# Model files


@pytest.mark.parametrize("garbage", [b"", b"not a model" * 10, b"\x3a\x00", bytes(1000)])
def test_what_is_no_model_is_refused(path, garbage):
    path.write_bytes(garbage)
    with pytest.raises(BundleError):
        model.read(path)


def test_a_model_too_large_for_protocol_buffers_is_refused_unread(path):
    with path.open("r+b") as file:
        file.truncate(2**31 + 1)  # a hole, which takes no room
    with pytest.raises(BundleError, match=r"has 2147483649 bytes, .* ends at 2 GiB"):
        model.read(path)


@pytest.mark.parametrize(
    ("extra", "told"),
    [(protobuf.nested(8, protobuf.integer(2, 99)), r"asks for operators .* writes opset 21"),
     (protobuf.nested(8, protobuf.text(1, "ai.acme"), protobuf.integer(2, 1)), "'ai.acme': 1"),
     (protobuf.integer(1, 77), "has IR version 77, this edgekit writes 10")],
)  # fmt: skip
def test_operators_and_encodings_of_another_version_are_refused(path, extra, told):
    path.write_bytes(model.sealed(unsealed(path) + extra))
    with pytest.raises(BundleError, match=told):
        model.read(path)


def test_a_model_cut_off_anywhere_is_refused(path):
    whole = path.read_bytes()
    for length in range(1, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(BundleError, match=r"at offset \d+|no graph|asks for operators|SHA-256"):
            model.read(path)


@pytest.mark.toolchain
@pytest.mark.parametrize(
    ("changes", "told"),
    [({"OPSET": 97}, "97"), ({"IR_VERSION": 98}, "98"),
     ({}, "GroupQueryAttenti0n")],
)  # fmt: skip
def test_what_the_installed_runtime_does_not_know_is_told_with_its_version(
    changes, told, tmp_path, monkeypatch, capfd
):
    onnxruntime = pytest.importorskip("onnxruntime")
    for name, value in changes.items():  # as a later edgekit would write it, and read it
        monkeypatch.setattr(model, name, value)
    path = convert(tmp_path / "later")
    if not changes:
        renamed = unsealed(path).replace(b"GroupQueryAttention", told.encode())
        path.write_bytes(model.sealed(renamed))
    with pytest.raises(BundleError, match=told) as refusal:
        runtime.open_model(path)
    assert f"ONNX Runtime {onnxruntime.__version__} refuses" in str(refusal.value)
    assert capfd.readouterr() == ("", "")


# Mutants


def mutate(content, random):
    """Return a content with some bytes set, one bit turned, a piece lost, or a piece repeated."""
    changed = bytearray(content)
    first, second = random.integers(0, len(content), 2)
    match random.integers(0, 4):
        case 0:
            for at in random.integers(0, len(content), 3):
                changed[at] = random.integers(0, 256)
        case 1:
            changed[first] ^= 1 << random.integers(0, 8)
        case 2:
            del changed[first : first + random.integers(1, 40)]
        case _:
            changed[first:first] = content[second : second + random.integers(1, 200)]
    return bytes(changed)


@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_no_mutant_is_opened(path, count):
    """Damaged files end in a `BundleError`, never in another exception."""
    content, random, seals = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(count):
        mutant = mutate(content, random)
        if mutant == content:
            continue
        path.write_bytes(mutant)
        with pytest.raises(BundleError) as refusal:
            tensor_types.contents(path)
        assert os.fspath(path.parent) in str(refusal.value)
        seals += "SHA-256" in str(refusal.value)
    assert count // 10 < seals < count  # what only the seal can tell, and what more is told


OPEN = """
import sys
from pathlib import Path
from edgekit.errors import EdgekitError
from edgekit.formats.onnx.runtime import OnnxSession
path = Path(sys.argv[1])
for mutant in sorted(path.parent.glob("*.mutant")):
    mutant.replace(path)
    try:
        session = OnnxSession(path, context_tokens=32, threads=1)
        session.prefill([1, 2, 3])
        session.close()
    except EdgekitError:
        continue
print("done")
"""


@pytest.mark.toolchain
def test_mutants_with_a_new_seal_do_not_bring_the_runtime_down_either(path):
    pytest.importorskip("onnxruntime")
    content, random, accepted = unsealed(path), np.random.default_rng(1), 0
    for number in range(OPENED_MUTANTS):
        mutant = model.sealed(mutate(content, random))
        path.write_bytes(mutant)
        try:
            tensor_types.contents(path)
        except BundleError:
            continue
        path.with_name(f"{number:03}.mutant").write_bytes(mutant)
        accepted += 1
    assert accepted > OPENED_MUTANTS // 10
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
