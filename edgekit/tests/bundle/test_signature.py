"""Signatures, made and checked by the real ssh-keygen: good ones, and what else may lie there."""

import functools
import json
import os
import pty
import re
import shutil
import subprocess
import sys

import pytest

from edgekit import inspect as inspect_module
from edgekit.bundle import signature
from edgekit.bundle.manifest import MANIFEST, Bundle
from edgekit.cli import main
from edgekit.encodings.hashing import sha256_of
from edgekit.errors import BundleError, MissingDependencyError, ToolchainError, UsageError
from edgekit.export import export
from edgekit.run import Runner
from edgekit.serve import serve
from edgekit.tests.tiny import pretend_format
from edgekit.validate import judge_document, validate
from edgekit.verify import verify


pytestmark = pytest.mark.skipif(
    shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed"
)
SIGNATURE = f"{MANIFEST}.sig"


def ssh_keygen(*words, stdin=b""):
    return subprocess.run(
        ["ssh-keygen", *map(str, words)], input=stdin, capture_output=True, check=True
    ).stdout.decode()


PASSPHRASE = "correct horse"  # noqa: S105 - nothing is kept with it


def make_key(path, *words, passphrase=""):
    ssh_keygen("-q", "-N", passphrase, "-C", "alice@example.com", "-f", path, *words)
    return path


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Alice's key, and another's."""
    directory = tmp_path_factory.mktemp("keys")
    make_key(directory / "alice", "-t", "ed25519")
    make_key(directory / "mallory", "-t", "ed25519")
    return directory


@pytest.fixture
def alice(keys):
    return keys / "alice.pub"


@pytest.fixture(scope="module")
def signed(tmp_path_factory, keys):
    """One bundle signed by Alice, to make copies of."""
    made = pretend_format.make_bundle(tmp_path_factory.mktemp("signed") / "bundle")
    made.sign(keys / "alice")
    return made.directory


@pytest.fixture
def bundle(signed, tmp_path):
    return Bundle.load(shutil.copytree(signed, tmp_path / "bundle"))


def fingerprint(key):
    return ssh_keygen("-l", "-f", key).split()[1]


# A signature is ssh-keygen's


def test_what_edgekit_signs_ssh_keygen_verifies(bundle, keys, tmp_path):
    allowed = tmp_path / "allowed"
    allowed.write_text(f"alice@example.com {(keys / 'alice.pub').read_text()}")
    said = ssh_keygen(
        "-Y", "verify", "-f", allowed, "-I", "alice@example.com", "-n", "edgekit",
        "-s", bundle.directory / SIGNATURE, stdin=(bundle.directory / MANIFEST).read_bytes(),
    )  # fmt: skip
    assert said.startswith('Good "edgekit" signature for alice@example.com')


def test_what_ssh_keygen_signs_edgekit_verifies(tmp_path, keys, alice):
    bundle = pretend_format.make_bundle(tmp_path / "unsigned")
    ssh_keygen("-Y", "sign", "-n", "edgekit", "-f", keys / "alice", bundle.directory / MANIFEST)
    assert Bundle.load(bundle.directory, trusted=alice) == bundle


KINDS = {
    "ed25519": ("-t", "ed25519"),
    "rsa": ("-t", "rsa", "-b", "2048"),
    "ecdsa": ("-t", "ecdsa"),
}


@pytest.fixture(scope="module")
def key_of_kind(tmp_path_factory):
    """Return a key of a kind, made once: large primes are not found at once."""
    directory = tmp_path_factory.mktemp("kinds")
    return functools.cache(lambda kind: make_key(directory / kind, *KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_key_signs(kind, key_of_kind, tmp_path):
    key = key_of_kind(kind)
    bundle = pretend_format.make_bundle(tmp_path / "bundle")
    bundle.sign(key)
    assert bundle.signed_by(trusted=key.with_name(f"{kind}.pub")) == signature.Signature(
        key=f"{kind.upper()} {fingerprint(key)}", is_trusted=True
    )


@pytest.mark.parametrize("kind", ["ed25519", "rsa"])
def test_signing_again_gives_the_same_bytes(kind, key_of_kind, tmp_path):
    key = key_of_kind(kind)
    found = set()
    for name in ("a", "b"):
        bundle = pretend_format.make_bundle(tmp_path / name)
        bundle.sign(key)
        found.add((bundle.directory / SIGNATURE).read_bytes())
    assert len(found) == 1


def test_a_key_may_be_held_by_an_agent(tmp_path, monkeypatch):
    key = make_key(tmp_path / "key", "-t", "ed25519")
    public = shutil.copy(f"{key}.pub", tmp_path / "alone.pub")
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(tmp_path / "s")], stdout=subprocess.PIPE)
    assert agent.stdout is not None
    agent.stdout.readline()  # it listens
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "s"))
    try:
        subprocess.run(["ssh-add", "-q", str(key)], check=True, capture_output=True)
        signature.require_signing(tmp_path / "alone.pub")
        bundle = pretend_format.make_bundle(tmp_path / "bundle")
        bundle.sign(tmp_path / "alone.pub")
    finally:
        agent.terminate()
        agent.communicate()
    found = bundle.signed_by(trusted=public)
    assert found is not None
    assert found.is_trusted


# Whom to trust


def test_a_list_of_allowed_signers_names_the_signer(bundle, keys, tmp_path):
    allowed = tmp_path / "allowed"
    lines = [
        "# those who release",
        "",
        f"bob@example.com {(keys / 'mallory.pub').read_text().strip()}",
        f'alice@example.com namespaces="git,edgekit" {(keys / "alice.pub").read_text().strip()}',
    ]
    allowed.write_text("\n".join(lines))
    assert bundle.signed_by(trusted=allowed) == signature.Signature(
        key=f"ED25519 {fingerprint(keys / 'alice')}", signer="alice@example.com", is_trusted=True
    )


def test_a_file_may_hold_several_public_keys(bundle, keys, tmp_path):
    both = tmp_path / "both.pub"
    both.write_text("".join((keys / f"{name}.pub").read_text() for name in ("mallory", "alice")))
    assert Bundle.load(bundle.directory, trusted=str(both)) == bundle


DISTRUSTED = {
    "another key": ("{mallory}", "ask the signer"),
    "a key allowed for git only": ('alice namespaces="git" {alice}', "not permitted"),
    "a key that has expired": ('alice valid-before="20200101" {alice}', "line 1 of .*expired"),
    "a damaged line": ("alice ssh-ed25519 AAAAgarbage", "line 1 of .*invalid key"),
}


@pytest.mark.parametrize("case", DISTRUSTED)
def test_a_signature_by_a_key_that_is_not_trusted_is_refused(case, bundle, keys, tmp_path):
    line, reason = DISTRUSTED[case]
    trusted = tmp_path / "trusted"
    public = {name: (keys / f"{name}.pub").read_text().strip() for name in ("alice", "mallory")}
    trusted.write_text(line.format(**public))
    with pytest.raises(BundleError, match=r"by a key that .*trusted does not trust") as found:
        Bundle.load(bundle.directory, trusted=trusted)
    assert fingerprint(keys / "alice") in str(found.value)
    assert re.search(reason, found.value.hint)


NO_KEYS = {
    "missing": (lambda keys, path: None, "is missing"),
    "a directory": (lambda keys, path: path.mkdir(), "is a directory"),
    "a pipe": (lambda keys, path: os.mkfifo(path), "is a named pipe"),
    "empty": (lambda keys, path: path.touch(), "holds no public key"),
    "a text": (lambda keys, path: path.write_text("alice is fine\n"), "holds no public key"),
    "bytes": (lambda keys, path: path.write_bytes(b"\xff\xfe\0" * 9), "holds no public key"),
    "a comment": (
        lambda keys, path: path.write_text(f"# {(keys / 'alice.pub').read_text()}"),
        "holds no public key",
    ),
    "a private key": (
        lambda keys, path: path.write_text((keys / "alice").read_text()), "is a private key",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_KEYS)
def test_what_holds_no_public_key_is_refused(case, bundle, keys, tmp_path):
    make, words = NO_KEYS[case]
    make(keys, tmp_path / "trusted")
    with pytest.raises(UsageError, match=words):
        Bundle.load(bundle.directory, trusted=tmp_path / "trusted")


# What does not fit is refused, and nothing else is read


def put_pipe(bundle):
    (bundle.directory / SIGNATURE).unlink()
    os.mkfifo(bundle.directory / SIGNATURE)


def resign(bundle, key, *, namespace="edgekit"):
    (bundle.directory / SIGNATURE).unlink(missing_ok=True)
    ssh_keygen("-Y", "sign", "-n", namespace, "-f", key, bundle.directory / MANIFEST)


def change_manifest(bundle):
    path = bundle.directory / MANIFEST
    fields = json.loads(path.read_text())
    fields["agreement"]["mean_kl_nats"] = 0.0
    path.write_text(json.dumps(fields))


def change_everything(bundle):
    """Replace the artifact and write a manifest that fits it, as who made a bundle would."""
    (bundle.directory / "model.bin").write_bytes(b"\1" * 1000)
    path = bundle.directory / MANIFEST
    fields = json.loads(path.read_text())
    fields["artifact"]["files"]["model.bin"] = {
        "sha256": sha256_of(bundle.directory / "model.bin"), "size_bytes": 1000,
    }  # fmt: skip
    path.write_text(json.dumps(fields))
    Bundle.load(bundle.directory)  # its hashes fit


def write_signature(content):
    return lambda bundle, keys: (bundle.directory / SIGNATURE).write_bytes(content)


DAMAGE = {
    "none": (lambda bundle, keys: (bundle.directory / SIGNATURE).unlink(), "is not signed"),
    "by another": (lambda bundle, keys: resign(bundle, keys / "mallory"), "does not trust"),
    "for git": (
        lambda bundle, keys: resign(bundle, keys / "alice", namespace="git"),
        "namespace is not 'edgekit'",
    ),
    "a changed manifest": (lambda bundle, keys: change_manifest(bundle), "is not what was signed"),
    "all changed": (lambda bundle, keys: change_everything(bundle), "is not what was signed"),
    "a manifest that is no JSON": (
        lambda bundle, keys: (bundle.directory / MANIFEST).write_text("{"), "is not what was signed"
    ),
    "a changed artifact": (
        lambda bundle, keys: (bundle.directory / "model.bin").write_bytes(
            bytes((bundle.directory / "model.bin").stat().st_size)
        ),
        "its SHA-256 differs",
    ),
    "a new file": (
        lambda bundle, keys: (bundle.directory / "new").touch(), "does not belong to the bundle"
    ),
    "empty": (write_signature(b""), "is not a signature"),
    "garbage": (write_signature(b"\xff" * 500), "is not a signature"),
    "cut": (write_signature(b"-----BEGIN SSH SIGNATURE-----\nU1NIU0lH\n"), "is not a signature"),
    "long": (write_signature(b"A" * 10**6), "which no signature has"),
    "a pipe": (lambda bundle, keys: put_pipe(bundle), "is a named pipe"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_a_bundle_that_is_not_as_it_was_signed_is_refused(case, bundle, keys, alice):
    damage, words = DAMAGE[case]
    damage(bundle, keys)
    with pytest.raises(BundleError, match=words):
        Bundle.load(bundle.directory, trusted=alice)


def test_a_bundle_that_is_not_signed_is_refused_before_its_manifest_is_believed(bundle, alice):
    (bundle.directory / MANIFEST).write_text('{"schema_version": 99}')
    with pytest.raises(BundleError, match="is not what was signed"):
        Bundle.load(bundle.directory, check_hashes=False, trusted=alice)


def test_a_signature_that_nobody_asks_about_is_no_part_of_the_bundle(bundle):
    (bundle.directory / SIGNATURE).write_bytes(b"anything")
    assert Bundle.load(bundle.directory) == bundle


READERS = {
    "run": lambda path, alice: Runner.open(path, trusted=alice),
    "serve": lambda path, alice: serve(path, port=0, trusted=alice),
    "validate": lambda path, alice: validate(path, "raspberry-pi-5-8gb", trusted=alice),
    "validate over ssh": lambda path, alice: validate(
        path, "raspberry-pi-5-8gb", device="ssh://nobody@host.invalid", trusted=alice
    ),
    "judge": lambda path, alice: judge_document(
        path, "raspberry-pi-5-8gb", "nothing.json", trusted=alice
    ),
    "verify": lambda path, alice: verify(path, "no-model", trusted=alice),
    "inspect": lambda path, alice: inspect_module(path, trusted=alice),
}


@pytest.mark.parametrize("reader", READERS)
def test_every_verb_that_reads_a_bundle_asks_who_signed_it(reader, bundle, alice):
    change_everything(bundle)
    with pytest.raises(BundleError, match="is not what was signed"):
        READERS[reader](bundle.directory, alice)


@pytest.mark.parametrize("verb", ["run", "serve", "validate", "verify", "inspect"])
def test_the_command_line_refuses_with_the_status_of_a_damaged_bundle(verb, bundle, alice, capsys):
    change_everything(bundle)
    words = {"run": ["hello"], "verify": ["no-model"]}.get(verb, [])
    with pytest.raises(SystemExit) as exit_:
        main([verb, str(bundle.directory), *words, "--trusted", str(alice)])
    said = capsys.readouterr()
    assert (exit_.value.code, said.out) == (6, "")
    assert len(said.err.splitlines()) == 2  # what was found, and the way out
    assert "is not what was signed" in said.err


# Signing that cannot work is refused before slow work, and never asks


CANNOT_SIGN = {
    "a missing key": (lambda path: None, "is missing"),
    "a directory": (lambda path: path.mkdir(), "is a directory"),
    "a text": (lambda path: path.write_text("hello\n"), "cannot sign with .*key: ssh-keygen says"),
    "a passphrase": (
        lambda path: make_key(path, "-t", "ed25519", passphrase=PASSPHRASE),
        "has a passphrase, and edgekit never asks",
    ),
    "open to others": (
        lambda path: make_key(path, "-t", "ed25519").chmod(0o644), "Permissions 0644 .* too open",
    ),
    "a public key alone": (
        lambda path: (make_key(path, "-t", "ed25519").unlink(),
                      path.with_name("key.pub").rename(path)),
        "cannot sign with .*key: ssh-keygen says",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CANNOT_SIGN)
def test_a_key_that_cannot_sign_is_refused_before_the_model_is_opened(case, tmp_path, monkeypatch):
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    make, words = CANNOT_SIGN[case]
    make(tmp_path / "key")
    with pytest.raises(UsageError, match=words):
        export(
            tmp_path / "no-model", "raspberry-pi-5-8gb", out=tmp_path / "out",
            sign=tmp_path / "key",
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_passphrase_is_asked_neither_at_the_terminal_nor_in_a_window(tmp_path):
    """In a terminal of its own, which ssh-keygen would otherwise ask."""
    key = make_key(tmp_path / "key", "-t", "ed25519", passphrase=PASSPHRASE)
    words = ["export", "demo", "--target", "raspberry-pi-5-8gb", "--sign", str(key)]
    said = []

    def read(descriptor):
        said.append(os.read(descriptor, 4096))
        return said[-1]

    status = pty.spawn([sys.executable, "-m", "edgekit", *words], read)
    assert os.waitstatus_to_exitcode(status) == 2
    text = b"".join(said).decode()
    assert "has a passphrase" in text
    assert "Enter passphrase" not in text


def without_ssh_keygen(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


def test_whoever_lacks_ssh_keygen_is_told_how_to_install_it(bundle, keys, tmp_path, monkeypatch):
    without_ssh_keygen(monkeypatch, tmp_path)
    with pytest.raises(MissingDependencyError, match="ssh-keygen") as refusal:
        export(tmp_path / "no-model", "raspberry-pi-5-8gb", sign=keys / "alice")
    assert "apt install openssh-client" in refusal.value.hint
    with pytest.raises(MissingDependencyError, match="ssh-keygen"):
        Bundle.load(bundle.directory, trusted=keys / "alice.pub")
    assert bundle.signed_by() == signature.Signature(key=None)


def test_an_agent_that_does_not_answer_is_waited_for_so_long_only(bundle, tmp_path, monkeypatch):
    program = tmp_path / "ssh-keygen"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(signature, "TIME_LIMIT_S", 0.1)
    with pytest.raises(ToolchainError, match="did not answer"):
        bundle.signed_by()
