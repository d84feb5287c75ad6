import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
from click.testing import CliRunner

from edgekit import inspect
from edgekit.bundle.manifest import Agreement, Artifact, Bundle, Gate, ModelRecord
from edgekit.cli import cli
from edgekit.errors import BundleError, UsageError
from edgekit.formats.gguf.layout import TensorEntry, Writer
from edgekit.inspect import lines
from edgekit.text.rules import TextRules, ThoughtMarks


def write_gguf(path):
    tensors = (
        TensorEntry(name="token_embd.weight", shape=(4, 32), tensor_type="Q8_0"),
        TensorEntry(name="output_norm.weight", shape=(32,), tensor_type="F32"),
        TensorEntry(name="blk.0.attn_norm.weight", shape=(32,), tensor_type="F32"),
    )
    with Writer(path, {"general.architecture": ("string", "llama")}, tensors) as writer:
        for tensor in tensors:
            writer.write(tensor.name, bytes(tensor.size_bytes))
    return path


@pytest.fixture
def gguf(tmp_path):
    return write_gguf(tmp_path / "any.gguf")


@pytest.fixture
def bundle(tmp_path):
    directory = tmp_path / "out"
    directory.mkdir()
    write_gguf(directory / "model.gguf")
    gates = (
        Gate(name="logits", passed=True, finding="mean KL 3.1e-7"),
        Gate(name="stops", passed=False, finding="never"),
    )
    bundle = Bundle(
        directory=directory,
        model=ModelRecord(
            name="Shore", sha256="0" * 64, architecture="llama", parameters=9, adapter="tides"
        ),
        target="raspberry-pi-5-8gb",
        context_tokens=512,
        text=TextRules(
            stop_ids=(2, 7), special_tokens={}, adds_bos=False, chat_template_sha256=None
        ),
        artifact=Artifact.of_directory(
            directory, "model.gguf", format="gguf", recipe="Q8_0",
            substitutions=("2 tensors are F16 instead of Q8_0",),
        ),
        agreement=Agreement(
            gates=gates, positions=5, mean_kl_nats=0.1, p99_kl_nats=0.2, same_top_token=0.9,
            perplexity_ratio=1.1,
            said_by="llama.cpp",
        ),
        predicted={"artifact_bytes": 1.0},
        tools={"edgekit": "0.1.0", "llama-cpp-python": "0.3.36"},
    )  # fmt: skip
    bundle.save()
    return bundle


def test_a_file_shows_what_its_header_says(gguf):
    found = inspect(gguf)
    assert found.bundle is None
    assert found.size_bytes == gguf.stat().st_size
    assert found.tensors == (
        ("token_embd.weight", (4, 32), "Q8_0"),
        ("output_norm.weight", (32,), "F32"),
        ("blk.0.attn_norm.weight", (32,), "F32"),
    )
    assert list(found.tensors_by_storage.items()) == [("F32", 2), ("Q8_0", 1)]


def test_a_bundle_shows_what_is_inside_and_how_it_was_proven(bundle):
    text = "\n".join(lines(inspect(bundle.directory)))
    for fact in (
        "tensors: 3 (2 F32, 1 Q8_0)", "model: Shore (llama), licence not stated", "adapter: tides",
        "target: raspberry-pi-5-8gb, recipe Q8_0", "context: 512 tokens, stops at [2, 7]",
        "substituted: 2 tensors are F16 instead of Q8_0", "proof: ok   logits: mean KL 3.1e-7",
        "proof: FAIL stops: never", "made with edgekit 0.1.0, llama-cpp-python 0.3.36",
    ):  # fmt: skip
        assert fact in text


def test_a_bundle_shows_stop_strings_and_what_was_fixed_in_its_template(bundle):
    variables = {"effort": '"low"', "enable_thinking": "false"}
    text = replace(bundle.text, stop_strings=("END",), template_variables=variables)
    replace(bundle, text=text).save()
    shown = list(lines(inspect(bundle.directory)))
    assert "context: 512 tokens, stops at [2, 7], and before ['END']" in shown
    assert 'chat template: with effort = "low", enable_thinking = false' in shown


def test_a_bundle_shows_what_stands_around_a_thought(bundle):
    marks = ThoughtMarks(opens="<think>", closes="</think>")
    replace(bundle, text=replace(bundle.text, thoughts=marks)).save()
    assert "thoughts: between '<think>' and '</think>'" in lines(inspect(bundle.directory))


def test_an_unproven_bundle_says_so(bundle):
    replace(bundle, agreement=None).save()
    assert "proof: none; it was exported with --no-verify" in lines(inspect(bundle.directory))


def test_a_bundle_shows_who_signed_it(bundle, tmp_path, monkeypatch):
    if shutil.which("ssh-keygen") is None:
        pytest.skip("ssh-keygen is not installed")
    assert list(lines(inspect(bundle.directory)))[-1].startswith("signature: none")
    words = ["-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "key")]
    subprocess.run(["ssh-keygen", *words], check=True)
    bundle.sign(tmp_path / "key")
    allowed = tmp_path / "allowed"
    allowed.write_text(f"lab@example.com {(tmp_path / 'key.pub').read_text()}")
    shown = list(lines(inspect(bundle.directory)))
    assert re.fullmatch(
        r"signature: good, by the key ED25519 SHA256:\S+; --trusted FILE checks whose that is",
        shown[-1],
    )
    shown = list(lines(inspect(bundle.directory, trusted=allowed)))
    assert re.fullmatch(
        r"signature: good, by the trusted key ED25519 SHA256:\S+ of lab@example\.com", shown[-1]
    )
    monkeypatch.setenv("PATH", "")
    shown = list(lines(inspect(bundle.directory)))
    assert shown[-1] == "signature: not read, since ssh-keygen is not installed"


def test_a_signature_is_asked_of_a_bundle_only(gguf, tmp_path):
    with pytest.raises(UsageError, match="only bundles are signed"):
        inspect(gguf, trusted=tmp_path / "key.pub")


def test_tensors_are_listed_when_asked_for(gguf):
    found = inspect(gguf)
    listed = list(lines(found, lists_tensors=True))[2:]
    assert [line.split() for line in listed] == [
        ["token_embd.weight", "4x32", "Q8_0"],
        ["output_norm.weight", "32", "F32"],
        ["blk.0.attn_norm.weight", "32", "F32"],
    ]
    assert list(lines(found))[2:] == []


def test_a_changed_byte_is_found(bundle):
    found = bytearray(bundle.artifact_path.read_bytes())
    found[-1] ^= 1
    bundle.artifact_path.write_bytes(found)
    with pytest.raises(BundleError, match="SHA-256 differs"):
        inspect(bundle.directory)


def test_a_damaged_file_is_refused_with_the_place(gguf):
    gguf.write_bytes(gguf.read_bytes()[:40])
    with pytest.raises(BundleError, match=r"any\.gguf"):
        inspect(gguf)


def test_what_is_no_artifact_is_refused(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        inspect(tmp_path / "nothing.gguf")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UsageError, match="not an artifact") as refusal:
        inspect(tmp_path / "notes.txt")
    assert "gguf" in refusal.value.hint
    with pytest.raises(BundleError, match="not a bundle"):
        inspect(tmp_path)


HOSTILE = "a\x1b[2J\x9b1mb\n\rok   \u202ec\u2028"


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_no_name_of_a_bundle_acts_on_the_terminal(bundle, options):
    model = replace(bundle.model, name=HOSTILE, licence=HOSTILE, adapter=HOSTILE)
    replace(bundle, model=model, tools={HOSTILE: HOSTILE}).save()
    printed = CliRunner().invoke(cli, ["inspect", str(bundle.directory), "--tensors", *options])
    assert printed.exit_code == 0
    assert printed.stdout.replace("\n", "").isprintable()
    if options:
        assert json.loads(printed.stdout)["bundle"]["model"]["licence"] == HOSTILE
    else:
        assert r"adapter: a\x1b[2J\x9b1mb\n\rok   \u202ec\u2028" in printed.stdout.splitlines()


def test_no_name_of_a_tensor_acts_on_the_terminal(tmp_path):
    path = tmp_path / "names.gguf"
    tensor = TensorEntry(name=HOSTILE, shape=(32,), tensor_type="F32")
    with Writer(path, {"general.architecture": ("string", "llama")}, (tensor,)) as writer:
        writer.write(tensor.name, bytes(tensor.size_bytes))
    printed = CliRunner().invoke(cli, ["inspect", str(path), "--tensors"])
    assert printed.exit_code == 0
    assert printed.stdout.replace("\n", "").isprintable()
    assert r"a\x1b[2J\x9b1mb\n\rok" in printed.stdout


def test_the_command_prints_the_same(gguf):
    printed = CliRunner().invoke(cli, ["inspect", str(gguf), "--tensors"]).stdout
    assert printed.splitlines() == list(lines(inspect(gguf), lists_tensors=True))
