"""Signatures of bundles: whose key signed ``manifest.json``, and with it the hash of every file.

A signature is what ``ssh-keygen -Y sign -n edgekit`` writes (SSHSIG: PROTOCOL.sshsig of OpenSSH),
in a file next to what it signs. So whoever has OpenSSH can make and check one without edgekit.
"""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from edgekit import scratch
from edgekit.encodings.files import is_file, readable, require_file
from edgekit.errors import BundleError, MissingDependencyError, ToolchainError, UsageError


SUFFIX = ".sig"  # what ssh-keygen appends to the name of what it signs
NAMESPACE = "edgekit"  # a signature made for git, or for a mail, is not one of a bundle
TIME_LIMIT_S = 60  # for an agent or a hardware key that waits for a person
MOST_BYTES = 64 * 1024  # of a signature; one by an RSA key of 16,384 bits has 6 KiB
_PUBLIC_KEY = re.compile(r"(?:^|\s)[\w.@-]+\s+AAAA[\w+/]")  # its type, and its bytes in base64
_ANYBODY = "*"  # the name that a list gives to a key that stands alone


@dataclass(frozen=True, kw_only=True)
class Signature:
    """A signature that fits what it signs."""

    key: str | None  # "ED25519 SHA256:…" as `ssh-keygen -l` has it; None: it is not installed
    signer: str | None = None  # the name that a list of allowed signers gives to the key
    is_trusted: bool = False  # whether a list was asked, and has the key


def is_installed() -> bool:
    """Tell whether ssh-keygen, which makes and checks signatures, is there."""
    return shutil.which("ssh-keygen") is not None


def require_signing(key: Path) -> None:
    """Make sure that a key can sign, by signing with it, before slow work.

    Args:
        key: A private key, or the public one of a key that an agent holds.

    Raises:
        MissingDependencyError: If ssh-keygen is not installed.
        UsageError: If the key is missing, is not a key, or asks for a passphrase.
        ToolchainError: If what holds the key does not answer.
    """
    with scratch.directory("sign") as work:
        trial = work / "trial"
        trial.touch()
        sign(trial, key)


def sign(path: Path, key: Path) -> None:
    """Write the signature of a file next to it; the key and the errors are `require_signing`'s."""
    require_file(key, hint="pass a private key, or the public one of a key that an agent holds")
    done = _ssh_keygen("-Y", "sign", "-n", NAMESPACE, "-f", str(key.absolute()), str(path))
    if done.returncode != 0 or not signature_path(path).is_file():
        _refuse_key(key, done.stderr)


def _refuse_key(key: Path, log: str) -> NoReturn:
    if "passphrase" in log:
        raise UsageError(
            f"cannot sign with {key}: it has a passphrase, and edgekit never asks for one",
            hint=f"let an agent hold the key: `ssh-add {key}`",
        )
    lines = [line for line in log.splitlines() if line.strip() and not line.startswith("@")]
    reason = next((line for line in lines if "too open" in line), lines[-1] if lines else log)
    raise UsageError(
        f"cannot sign with {key}: ssh-keygen says {reason.strip()!r}",
        hint="pass a private key, or the public one of a key that an agent holds",
    )


def signature_path(path: Path) -> Path:
    """Return where the signature of a file lies."""
    return path.with_name(path.name + SUFFIX)


def check(path: Path, content: bytes, *, trusted: Path | None) -> Signature:
    """Return the signature of a file, if it is a good one, and of a trusted key where asked.

    Args:
        path: What is signed.
        content: What was read from it.
        trusted: Public keys, or OpenSSH's list of allowed signers; None trusts any key.

    Raises:
        BundleError: If there is no signature, it is damaged or fits something else, or its key is
            not trusted.
        UsageError: If ``trusted`` is missing or holds no public key.
        MissingDependencyError: If ssh-keygen is not installed.
        ToolchainError: If ssh-keygen does not end.
    """
    allowed = None if trusted is None else _allowed_signers(trusted)
    signature = _read_signature(path)
    with scratch.directory("sign") as work:
        (work / "signature").write_bytes(signature)
        key = _key_of(work / "signature", path, content)
        if trusted is None or allowed is None:
            return Signature(key=key)
        (work / "allowed").write_text(allowed, encoding="utf-8")
        return _by_trusted(work, path, content, key=key, trusted=trusted)


def _read_signature(path: Path) -> bytes:
    place = signature_path(path)
    if not is_file(place, refusal=BundleError):
        raise BundleError(
            f"{path.parent} is not signed: it has no {place.name}",
            hint="ask for one that was exported with --sign, or leave out --trusted",
        )
    with place.open("rb") as file:
        signature = file.read(MOST_BYTES + 1)
    if len(signature) > MOST_BYTES:
        raise BundleError(f"{place} has more than {MOST_BYTES} bytes, which no signature has")
    return signature


def _key_of(signature: Path, path: Path, content: bytes) -> str:
    """Return the fingerprint of the key that made a signature, whosever it is."""
    words = ("-Y", "check-novalidate", "-n", NAMESPACE, "-s", str(signature))
    done = _ssh_keygen(*words, content=content)
    good = re.search(r"signature with (\S+) key (\S+)", done.stdout)
    if done.returncode == 0 and good:
        return f"{good[1]} {good[2]}"
    place = signature_path(path)
    if "namespace" in done.stderr:
        raise BundleError(
            f"{place} was not made for a bundle: its namespace is not {NAMESPACE!r}",
            hint=f"sign with `ssh-keygen -Y sign -n {NAMESPACE} -f KEY {path}`",
        )
    if "incorrect signature" in done.stderr:
        raise BundleError(
            f"{path} is not what was signed: {place.name} does not fit it",
            hint="get the bundle again, from where you would get a program",
        )
    raise BundleError(
        f"{place} is not a signature that ssh-keygen reads: {_last_line(done.stderr)}",
        hint="copy the bundle again",
    )


def _by_trusted(work: Path, path: Path, content: bytes, *, key: str, trusted: Path) -> Signature:
    """Return the signature if a line of ``work / "allowed"`` allows its key to sign bundles now."""
    lists = ("-s", str(work / "signature"), "-f", str(work / "allowed"))
    found = _ssh_keygen("-Y", "find-principals", *lists)
    log = found.stderr
    for name in found.stdout.splitlines() if found.returncode == 0 else ():
        done = _ssh_keygen("-Y", "verify", "-I", name, "-n", NAMESPACE, *lists, content=content)
        if done.returncode == 0:
            signer = None if name == _ANYBODY else name
            return Signature(key=key, signer=signer, is_trusted=True)
        log += done.stderr
    complaints = [
        f"line {number} of {trusted}: {complaint}"
        for number, complaint in re.findall(rf"{work / 'allowed'}:(\d+): (.+)", log)
    ]
    raise BundleError(
        f"{path.parent} is signed by a key that {trusted} does not trust: {key}",
        hint="; ".join(dict.fromkeys(complaints)) or "ask the signer, not the bundle, for the key",
    )


def _allowed_signers(trusted: Path) -> str:
    """Return a list of allowed signers: the file's own lines, names put before keys alone.

    Raises:
        UsageError: If it is missing, or holds no public key.
    """
    require_file(trusted, hint="pass a public key, or a list of allowed signers")
    with readable(trusted):
        text = trusted.read_text(encoding="utf-8", errors="replace")
    if "PRIVATE KEY-----" in text:
        raise UsageError(
            f"{trusted} is a private key, which only its owner may have",
            hint=f"pass the public one: {trusted}.pub",
        )
    if not any(_PUBLIC_KEY.search(line) for line in text.splitlines() if line[:1] != "#"):
        raise UsageError(
            f"{trusted} holds no public key of OpenSSH",
            hint="pass a public key (id_ed25519.pub), or a list of allowed signers",
        )
    return "".join(
        f'{_ANYBODY} namespaces="{NAMESPACE}" {line}\n' if _PUBLIC_KEY.match(line) else f"{line}\n"
        for line in text.splitlines()
    )


def _ssh_keygen(*words: str, content: bytes = b"") -> "subprocess.CompletedProcess[str]":
    """Run ssh-keygen where it can ask nobody for a passphrase: no terminal, no window, no input."""
    if not is_installed():
        raise MissingDependencyError(
            "signatures need ssh-keygen, which is not installed",
            hint="apt install openssh-client (Debian); macOS and Windows have it",
        )
    try:
        done = subprocess.run(
            ["ssh-keygen", *words],
            input=content,
            capture_output=True,
            check=False,
            timeout=TIME_LIMIT_S,
            env=os.environ | {"SSH_ASKPASS_REQUIRE": "never", "LC_ALL": "C"},
            start_new_session=True,
        )
    except subprocess.TimeoutExpired as error:
        raise ToolchainError(
            f"ssh-keygen did not answer in {TIME_LIMIT_S} s",
            hint="does an agent or a hardware key wait for you to confirm?",
        ) from error
    texts = (stream.decode("utf-8", "replace") for stream in (done.stdout, done.stderr))
    return subprocess.CompletedProcess(done.args, done.returncode, *texts)


def _last_line(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return repr(lines[-1] if lines else "nothing")
