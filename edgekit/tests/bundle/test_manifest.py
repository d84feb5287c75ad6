import json
import os
import shutil
from dataclasses import replace

import pytest

from edgekit.bundle.manifest import (
    MANIFEST,
    Agreement,
    Artifact,
    Bundle,
    FileRecord,
    Gate,
    ModelRecord,
)
from edgekit.encodings.hashing import sha256_of
from edgekit.errors import BundleError, DisagreementError
from edgekit.text.rules import TextRules, ThoughtMarks


PROOF = Agreement(
    gates=(Gate(name="logits", passed=True, finding="mean KL 3.1e-7 (<= 1e-4)"),),
    positions=1021,
    mean_kl_nats=3.1e-7,
    p99_kl_nats=2e-6,
    same_top_token=1.0,
    perplexity_ratio=1.0000002,
    said_by="llama.cpp",
)


def make_bundle(directory, **changes):
    (directory / "parts").mkdir(parents=True)
    (directory / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    (directory / "parts" / "tokenizer.json").write_text("{}")
    artifact = Artifact.of_directory(
        directory, "model.gguf", format="gguf", recipe="Q8_0", substitutions=("1 tensor is F16",)
    )
    bundle = Bundle(
        directory=directory,
        model=ModelRecord(
            name="Küste", sha256="ab" * 32, architecture="llama", parameters=7, adapter="lora"
        ),
        target="raspberry-pi-5-8gb",
        context_tokens=2048,
        text=TextRules(
            stop_ids=(2, 5),
            special_tokens={"bos_token": "<s>"},
            adds_bos=True,
            chat_template_sha256=None,
            stop_strings=("END",),
            template_variables={"enable_thinking": "false", "tools": "[null]"},
            content_parts=("user",),
            thoughts=ThoughtMarks(opens="<|channel>thought", closes="<channel|>"),
        ),
        artifact=artifact,
        agreement=PROOF,
        predicted={"artifact_bytes": 104.0, "decode_tokens_per_s": 12.5},
        tools={"edgekit": "0.1.0"},
    )
    bundle = replace(bundle, **changes)
    bundle.save()
    return bundle


@pytest.fixture
def bundle(tmp_path):
    return make_bundle(tmp_path / "out")


def edit_manifest(directory, change):
    fields = json.loads((directory / MANIFEST).read_text())
    change(fields)
    (directory / MANIFEST).write_text(json.dumps(fields))


def rename_entry(fields, name):
    """Let the manifest call the artifact by another name."""
    files = fields["artifact"]["files"]
    files[name] = files.pop("model.gguf")
    fields["artifact"]["entry"] = name


# A bundle comes back


@pytest.mark.parametrize("agreement", [PROOF, None])
def test_what_was_saved_is_what_is_loaded(tmp_path, agreement):
    saved = make_bundle(tmp_path / "out", agreement=agreement)
    assert Bundle.load(saved.directory) == saved


def test_a_bundle_from_before_stop_strings_has_none(bundle):
    new = ("stop_strings", "template_variables", "content_parts", "thoughts")
    edit_manifest(bundle.directory, lambda fields: [fields["text"].pop(name) for name in new])
    text = replace(
        bundle.text, stop_strings=(), template_variables={}, content_parts=(), thoughts=None
    )
    assert Bundle.load(bundle.directory).text == text


@pytest.mark.parametrize("blank", ["", " \n"])
@pytest.mark.parametrize("mark", ["opens", "closes"])
def test_a_thought_without_a_mark_is_refused(bundle, mark, blank):
    edit_manifest(bundle.directory, lambda fields: fields["text"]["thoughts"].update({mark: blank}))
    with pytest.raises(
        BundleError, match=r"text.thoughts opens with .*, expected two marks that are not"
    ):
        Bundle.load(bundle.directory)


def test_a_bundle_may_be_moved(bundle, tmp_path):
    shutil.move(bundle.directory, tmp_path / "elsewhere")
    loaded = Bundle.load(tmp_path / "elsewhere")
    assert loaded == replace(bundle, directory=tmp_path / "elsewhere")
    assert loaded.artifact_path.read_bytes().startswith(b"GGUF")


def test_an_artifact_knows_every_file_but_the_manifest(bundle):
    artifact = bundle.artifact
    assert artifact.files.keys() == {"model.gguf", "parts/tokenizer.json"}
    assert artifact.size_bytes == 104 + 2
    assert Artifact.of_directory(
        bundle.directory, "model.gguf", format="gguf", recipe="Q8_0",
        substitutions=artifact.substitutions,
    ) == artifact  # fmt: skip


def test_saving_again_leaves_the_same_bytes_and_nothing_else(bundle):
    before = (bundle.directory / MANIFEST).read_bytes()
    bundle.save()
    assert (bundle.directory / MANIFEST).read_bytes() == before
    assert {path.name for path in bundle.directory.iterdir()} == {"model.gguf", "parts", MANIFEST}


def test_a_name_is_written_as_people_read_it(bundle):
    assert "Küste" in (bundle.directory / MANIFEST).read_text(encoding="utf-8")


# A damaged one is refused, and the damage named


def truncate(directory):
    os.truncate(directory / "model.gguf", 50)


def flip_a_byte(directory):
    path = directory / "model.gguf"
    found = bytearray(path.read_bytes())
    found[60] ^= 1
    path.write_bytes(found)


def point_to_nowhere(directory):
    (directory / "model.gguf").unlink()
    (directory / "model.gguf").symlink_to("gone.gguf")


DAMAGES = {
    "no manifest": (lambda d: (d / MANIFEST).unlink(), "has no manifest.json"),
    "not JSON": (lambda d: (d / MANIFEST).write_text('{"schema_version": 1,'), "is not JSON"),
    "not UTF-8": (lambda d: (d / MANIFEST).write_bytes(b"\xff\xfe{"), "is not JSON"),
    "too deep": (lambda d: (d / MANIFEST).write_text("[" * 100_000), "is not JSON"),
    "an array": (lambda d: (d / MANIFEST).write_text("[1]"), "holds a list, expected an object"),
    "a directory": (
        lambda d: ((d / MANIFEST).unlink(), (d / MANIFEST).mkdir()), "is a directory",
    ),
    "another schema": (
        lambda d: edit_manifest(d, lambda m: m.update(schema_version=2)),
        "has schema 2, this edgekit reads 1",
    ),
    "a section missing": (lambda d: edit_manifest(d, lambda m: m.pop("model")), "'model'"),
    "a key missing": (lambda d: edit_manifest(d, lambda m: m["text"].pop("adds_bos")), "adds_bos"),
    "an unknown key": (
        lambda d: edit_manifest(d, lambda m: m["model"].update(colour="red")), "colour",
    ),
    "a section of another kind": (
        lambda d: edit_manifest(d, lambda m: m.update(artifact=["x"])),
        "manifest.json: artifact = ['x'], expected an object",
    ),
    "a record of another kind": (
        lambda d: edit_manifest(d, lambda m: m["artifact"]["files"].update({"model.gguf": 7})),
        "manifest.json: artifact.files.model.gguf = 7, expected an object",
    ),
    "a flipped byte": (flip_a_byte, "model.gguf is not what was exported: its SHA-256 differs"),
    "a truncated file": (truncate, "model.gguf has 50 bytes, the manifest says 104"),
    "a longer file": (
        lambda d: (d / "model.gguf").write_bytes(bytes(105)), "has 105 bytes, the manifest says 104"
    ),
    "a file missing": (
        lambda d: (d / "parts" / "tokenizer.json").unlink(), "parts/tokenizer.json is missing",
    ),
    "a file more": (
        lambda d: (d / "parts" / "notes.txt").write_text("x"),
        "parts/notes.txt does not belong to the bundle",
    ),
    "a symlink more": (
        lambda d: (d / "link").symlink_to("/etc"), "link does not belong to the bundle",
    ),
    "a symlink to nowhere": (point_to_nowhere, "model.gguf is missing"),
    "an entry that is not a file": (
        lambda d: edit_manifest(d, lambda m: m["artifact"].update(entry="model.onnx")),
        "has no file 'model.onnx' to open",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_and_named(bundle, damage):
    do, message = DAMAGES[damage]
    do(bundle.directory)
    with pytest.raises(BundleError) as refusal:
        Bundle.load(bundle.directory)
    assert message in str(refusal.value)
    assert refusal.value.exit_status == 6


@pytest.mark.parametrize(
    "name", ["../secret", "parts/../../secret", "/etc/passwd", "..\\secret", "a\0b"]
)
def test_a_path_never_leaves_the_bundle(bundle, tmp_path, name):
    (tmp_path / "secret").write_bytes(b"GGUF" + bytes(100))
    edit_manifest(bundle.directory, lambda manifest: rename_entry(manifest, name))
    with pytest.raises(BundleError, match="outside the bundle"):
        Bundle.load(bundle.directory)


def test_an_absolute_path_is_refused_even_into_the_bundle(bundle):
    inside = str(bundle.artifact_path.absolute())
    edit_manifest(bundle.directory, lambda manifest: rename_entry(manifest, inside))
    with pytest.raises(BundleError, match="outside the bundle"):
        Bundle.load(bundle.directory)


@pytest.mark.parametrize("target", ["file", "directory"])
def test_nor_does_it_leave_through_a_symlink(bundle, tmp_path, target):
    (tmp_path / "secret").mkdir()
    shutil.move(bundle.directory / "model.gguf", tmp_path / "secret" / "model.gguf")
    if target == "file":
        (bundle.directory / "model.gguf").symlink_to(tmp_path / "secret" / "model.gguf")
    else:
        (bundle.directory / "way-out").symlink_to(tmp_path / "secret")
        edit_manifest(
            bundle.directory, lambda manifest: rename_entry(manifest, "way-out/model.gguf")
        )
    with pytest.raises(BundleError, match="outside the bundle"):
        Bundle.load(bundle.directory)


def test_symlinks_in_a_circle_are_refused(bundle):
    (bundle.directory / "model.gguf").unlink()
    (bundle.directory / "model.gguf").symlink_to("model.gguf")
    with pytest.raises(BundleError, match=r"model\.gguf cannot be read"):
        Bundle.load(bundle.directory)


def test_a_file_and_nothing_at_all_are_no_bundles(bundle, tmp_path):
    for path in (bundle.directory / "model.gguf", tmp_path / "nothing"):
        with pytest.raises(BundleError, match="not a bundle") as refusal:
            Bundle.load(path)
        assert "edgekit export" in refusal.value.hint


def test_without_hashes_only_the_hashes_go_unchecked(bundle):
    flip_a_byte(bundle.directory)
    assert Bundle.load(bundle.directory, check_hashes=False) == bundle
    truncate(bundle.directory)
    with pytest.raises(BundleError, match="has 50 bytes"):
        Bundle.load(bundle.directory, check_hashes=False)


# The proof


def test_a_proof_that_holds_is_kept(bundle):
    bare = replace(bundle, agreement=None)
    assert bare.with_agreement(PROOF).agreement == PROOF


def test_a_proof_that_fails_stops_the_bundle_and_lists_every_failed_gate(bundle):
    gates = (
        Gate(name="loads", passed=True, finding="in 12 ms"),
        Gate(name="logits", passed=False, finding="mean KL 0.9"),
        Gate(name="stops", passed=False, finding="never"),
    )
    with pytest.raises(DisagreementError) as refusal:
        bundle.with_agreement(replace(PROOF, gates=gates))
    assert "logits: mean KL 0.9" in str(refusal.value)
    assert "stops: never" in str(refusal.value)
    assert "loads" not in str(refusal.value)
    assert refusal.value.exit_status == 8


def test_the_files_can_be_taken_stock_of_again(bundle):
    (bundle.directory / "goldens.json").write_text("{}")
    again = Artifact.of_directory(bundle.directory, "model.gguf", format="gguf", recipe="Q8_0")
    replace(bundle, artifact=again).save()
    assert "goldens.json" in Bundle.load(bundle.directory).artifact.files


def test_a_hash_is_that_of_sha256sum(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")  # the example in FIPS 180-4
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of(tmp_path / "abc") == digest
    artifact = Artifact.of_directory(tmp_path, "abc", format="gguf", recipe="F32")
    assert artifact.files == {"abc": FileRecord(sha256=digest, size_bytes=3)}
