"""One artifact as several files."""

import itertools
import json
import shutil

import pytest

from edgekit import formats
from edgekit.bundle.manifest import Bundle
from edgekit.cli import main, size_bytes
from edgekit.doctor import _tiny_checkpoint
from edgekit.errors import BundleError, UsageError
from edgekit.export import export
from edgekit.formats import BuildRequest
from edgekit.formats.gguf import layout, running, split, writing
from edgekit.formats.gguf.layout import TensorEntry
from edgekit.formats.gguf.split import FilesWriter, PlannedFile, plan_files
from edgekit.inspect import inspect
from edgekit.verify import verify


METADATA = {"general.architecture": ("string", "llama"), "general.name": ("string", "x" * 100)}
# Of 5 to 120 bytes, so that padding and headers decide.
TENSORS = [TensorEntry(name=f"t{n}", shape=(n % 24 + 5,), tensor_type="F32") for n in range(40)]
LIMITS = [400, 640, 999, 1024, 4096]


def payload(tensor):
    return tensor.name.encode().ljust(tensor.size_bytes, b".")


def write(directory, files, *, tensors=TENSORS, fails_with=None):
    with FilesWriter(directory, files) as writer:
        for tensor in tensors:
            content = payload(tensor)
            writer.write(tensor.name, content[:7])
            writer.write(tensor.name, content[7:])
        if fails_with:
            raise fails_with
    return directory / files[0].name


def made(directory, limit=640):
    return write(directory, plan_files("model", METADATA, TENSORS, split_bytes=limit))


def rewrite(path, **changes):
    """Write a part again with other split keys."""
    found = layout.read(path)
    words = {"split.no": "uint16", "split.count": "uint16", "split.tensors.count": "int32"}
    keys = {key: (words[key], found.metadata[key]) for key in words} | {
        f"split.{key}": (words[f"split.{key}"], value) for key, value in changes.items()
    }
    entries = [
        TensorEntry(name=t.name, shape=t.shape, tensor_type=t.tensor_type) for t in found.tensors
    ]
    with layout.Writer(path, keys, entries) as writer:
        for entry in entries:
            writer.write(entry.name, payload(entry))


@pytest.mark.parametrize("limit", LIMITS)
def test_no_file_is_larger_than_asked_and_each_is_as_large_as_planned(limit, tmp_path):
    files = plan_files("model", METADATA, TENSORS, split_bytes=limit)
    made(tmp_path, limit)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes == {file.name: file.size_bytes for file in files}
    assert max(sizes.values()) <= limit
    assert len(sizes) > 1


@pytest.mark.parametrize("limit", LIMITS)
def test_a_file_is_filled_before_the_next_is_begun(limit):
    files = plan_files("model", METADATA, TENSORS, split_bytes=limit)
    assert len(files) > 1
    for file, following in itertools.pairwise(files):
        with_next = PlannedFile(
            name="", metadata=file.metadata, tensors=(*file.tensors, following.tensors[0])
        )
        assert with_next.size_bytes + 32 > limit  # the metadata's end is rounded up, too


def test_the_parts_are_named_and_numbered_as_llama_cpp_looks_for_them(tmp_path):
    made(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    count = len(names)
    assert names[0] == f"model-00001-of-{count:05}.gguf"
    for index, name in enumerate(names):
        keys = layout.read(tmp_path / name).metadata
        assert keys["split.no"] == index
        assert keys["split.count"] == count
        assert keys["split.tensors.count"] == len(TENSORS)


def test_only_the_first_part_carries_the_metadata(tmp_path):
    first, *others = sorted(made(tmp_path).parent.iterdir())
    assert layout.read(first).metadata.keys() > METADATA.keys()
    assert not any(layout.read(path).metadata.keys() & METADATA.keys() for path in others)


def test_the_contents_of_the_first_part_are_those_of_all(tmp_path):
    first = made(tmp_path)
    found = list(split.read_tensors(first))
    assert [(t.name, t.shape, t.tensor_type) for t in found] == [
        (t.name, t.shape, t.tensor_type) for t in TENSORS
    ]


@pytest.mark.parametrize("limit", [None, 10**6])
def test_what_fits_into_one_file_is_one_file(limit, tmp_path):
    assert made(tmp_path, limit).name == "model.gguf"
    assert "split.count" not in layout.read(tmp_path / "model.gguf").metadata


def test_a_tensor_larger_than_a_file_is_named():
    large = TensorEntry(name="wide.weight", shape=(1000,), tensor_type="F32")
    with pytest.raises(UsageError, match=r"wide\.weight takes 4\d\d\d bytes, more than the 640"):
        plan_files("model", METADATA, [*TENSORS, large], split_bytes=640)


def test_metadata_larger_than_a_file_is_named():
    with pytest.raises(UsageError, match="the metadata and t0 take"):
        plan_files("model", METADATA, TENSORS, split_bytes=200)


def test_more_parts_than_can_be_numbered_are_refused(monkeypatch):
    monkeypatch.setattr(split, "MAX_PARTS", 3)
    with pytest.raises(UsageError, match="at most 3 are possible"):
        plan_files("model", METADATA, TENSORS, split_bytes=400)


@pytest.mark.parametrize("kept", [0, 11, len(TENSORS) - 1])
def test_a_block_that_ends_early_leaves_no_part(kept, tmp_path):
    files = plan_files("model", METADATA, TENSORS, split_bytes=640)
    with pytest.raises(ValueError, match=r"lacks|was not written"):
        write(tmp_path, files, tensors=TENSORS[:kept])
    assert list(tmp_path.iterdir()) == []


def test_a_block_that_fails_leaves_no_part(tmp_path):
    files = plan_files("model", METADATA, TENSORS, split_bytes=640)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, files, tensors=TENSORS[:30], fails_with=KeyboardInterrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_out_of_turn_is_an_error(tmp_path):
    files = plan_files("model", METADATA, TENSORS, split_bytes=640)
    with pytest.raises(ValueError, match="not the turn"):
        write(tmp_path, files, tensors=TENSORS[::-1])


def test_a_missing_part_is_named(tmp_path):
    first = made(tmp_path)
    third = sorted(tmp_path.iterdir())[2]
    third.unlink()
    with pytest.raises(BundleError, match=f"{third.name} is missing, part 3 of"):
        split.paths(first)


def test_another_part_than_the_first_is_sent_to_the_first(tmp_path):
    first = made(tmp_path)
    with pytest.raises(BundleError, match="is part 2 of") as caught:
        split.paths(sorted(tmp_path.iterdir())[1])
    assert first.name in caught.value.hint


def test_parts_in_each_others_place_are_noticed(tmp_path):
    first = made(tmp_path)
    second, third = sorted(tmp_path.iterdir())[1:3]
    second.rename(tmp_path / "x")
    third.rename(second)
    (tmp_path / "x").rename(third)
    with pytest.raises(BundleError, match="says it is part 3 of"):
        list(split.read_tensors(first))


def test_a_renamed_part_is_no_whole_artifact(tmp_path):
    shutil.copy(made(tmp_path), tmp_path / "alone.gguf")
    with pytest.raises(BundleError, match="says it is part 1 of"):
        list(split.read_tensors(tmp_path / "alone.gguf"))


def test_a_part_of_another_artifact_is_noticed(tmp_path):
    first = made(tmp_path)
    rewrite(sorted(tmp_path.iterdir())[1], **{"tensors.count": 7})
    with pytest.raises(BundleError, match="says it is part 2 of"):
        list(split.read_tensors(first))


def test_fewer_tensors_than_promised_are_noticed(tmp_path):
    first = made(tmp_path)
    for path in tmp_path.iterdir():
        rewrite(path, **{"tensors.count": 41})
    with pytest.raises(BundleError, match="with 41 tensors, not 40"):
        list(split.read_tensors(first))


def test_a_tensor_in_two_parts_is_noticed(tmp_path):
    first = made(tmp_path)
    second, third = sorted(tmp_path.iterdir())[1:3]
    shutil.copy(second, third)
    rewrite(third, no=2)
    with pytest.raises(BundleError, match="which another part has too"):
        list(split.read_tensors(first))


def test_a_damaged_part_is_a_damaged_bundle(tmp_path):
    first = made(tmp_path)
    second = sorted(tmp_path.iterdir())[1]
    second.write_bytes(second.read_bytes()[:-40])
    with pytest.raises(BundleError, match=second.name):
        list(split.read_tensors(first))


@pytest.mark.parametrize(
    ("text", "count"),
    [("512MB", 512_000_000), ("512 MB", 512_000_000), ("1.5GiB", 1610612736), ("2GB", 2 * 10**9)],
)
def test_a_size_on_the_command_line_needs_no_space(text, count):
    assert size_bytes(text, of="--split") == count


@pytest.mark.parametrize("text", ["512", "512Mb", "0MB", "-1MB", "many", "5 s", "MB", ""])
def test_a_size_that_is_none_is_a_usage_error(text, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["export", "demo", "--target", "raspberry-pi-5-8gb", "--split", text])
    assert caught.value.code == 2
    assert "--split" in capsys.readouterr().err


# The real thing


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("split") / "bundle"
    export(
        tiny_checkpoint, "raspberry-pi-5-8gb", quant="F16", context_tokens=128, out=out,
        split_bytes=100_000,
    )  # fmt: skip
    return out


@pytest.mark.toolchain
def test_a_split_bundle_is_proven_and_hashed_part_by_part(bundle):
    loaded = Bundle.load(bundle)
    parts = sorted(name for name in loaded.artifact.files if name.endswith(".gguf"))
    assert len(parts) > 1
    assert loaded.artifact.entry == parts[0]
    assert loaded.agreement is not None
    assert loaded.agreement.passed
    sizes = [loaded.artifact.files[name].size_bytes for name in parts]
    assert max(sizes) <= 100_000
    assert sum(sizes) == loaded.predicted["artifact_bytes"]
    assert inspect(bundle).size_bytes == sum(sizes)


@pytest.mark.toolchain
def test_the_parts_say_what_the_whole_says(bundle, tiny_bundle):
    np = pytest.importorskip("numpy")
    said = []
    for path in (bundle, tiny_bundle):
        session = running.load(Bundle.load(path).artifact_path, context_tokens=64, threads=1)
        said.append(session.all_logits([1, 5, 9, 30]).copy())
        session.close()
    assert np.array_equal(*said)


@pytest.mark.toolchain
def test_the_proof_of_a_split_bundle_can_be_repeated(bundle, tiny_checkpoint):
    assert verify(bundle, tiny_checkpoint).passed


@pytest.mark.toolchain
def test_without_one_of_its_parts_an_artifact_does_not_load(bundle, tmp_path):
    first = Bundle.load(bundle).artifact_path
    shutil.copy(first, tmp_path)
    with pytest.raises(BundleError, match=r"00002-of-.* is missing, part 2 of"):
        formats.running("gguf").load(tmp_path / first.name, context_tokens=64)


@pytest.mark.toolchain
def test_ollama_takes_one_file_only(bundle, tiny_bundle):
    assert not (bundle / "Modelfile").exists()
    assert "FROM ./model.gguf" in (tiny_bundle / "Modelfile").read_text()


@pytest.mark.toolchain
def test_the_plan_says_how_many_files_and_that_ollama_takes_one(tiny_checkpoint, capsys, tmp_path):
    with pytest.raises(SystemExit) as caught:
        main([
            "export", str(tiny_checkpoint), "--target", "raspberry-pi-5-8gb", "--quant", "F16",
            "--split", "100kB", "--no-verify", "-o", str(tmp_path / "out"),
        ])  # fmt: skip
    assert caught.value.code == 0
    assert "files; Ollama takes one only, so there is no Modelfile" in capsys.readouterr().err
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["artifact"]["split_bytes"] == 100_000


def test_a_split_too_small_for_the_model_is_refused_with_the_tensor(tmp_path):
    pytest.importorskip("numpy")
    checkpoint = _tiny_checkpoint(tmp_path)
    fmt = formats.get("gguf")
    with pytest.raises(UsageError, match=r"the metadata and token_embd\.weight take \d+ bytes"):
        writing.lay_out(checkpoint, BuildRequest(recipe=fmt.RECIPES["F32"], split_bytes=20_000))


def test_one_part_of_a_model_is_no_model(tmp_path):
    (tmp_path / "model-00001-of-00002.gguf").touch()
    with pytest.raises(UsageError, match="is one part of a model") as caught:
        export(str(tmp_path / "model-00001-of-00002.gguf"), "raspberry-pi-5-8gb", verify=False)
    assert "--merge" in caught.value.hint
