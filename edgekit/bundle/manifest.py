"""Bundles: a directory with the artifact, its text rules, and a manifest that says what it is.

``manifest.json`` is written last and names every other file with its size and SHA-256: a directory
without it is not a bundle, and a bundle with a changed byte is refused. A path in it never leaves
the directory. That is a checksum: who made the bundle is said by a signature of the manifest, see
`edgekit.bundle.signature`, the only other file that it does not name.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Self, TypeVar

from edgekit.bundle import signature
from edgekit.encodings.files import is_file, readable, require_file
from edgekit.encodings.hashing import sha256_of
from edgekit.encodings.json_files import parse_object
from edgekit.encodings.typed_json import FieldReader, check_version
from edgekit.errors import BundleError, DisagreementError
from edgekit.text.rules import TextRules


SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One file as it was when the bundle was made."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """The files of one format, and which of them its runtime opens."""

    format: str
    recipe: str
    entry: str  # relative to the bundle, like every name here
    files: dict[str, FileRecord]
    substitutions: tuple[str, ...] = ()  # weights stored otherwise than the recipe asked, and why
    split_bytes: int | None = None  # the most that one of its files may take, where that was asked
    calibration: str | None = None  # SHA-256 of the calibration text, where one was used
    variant: str | None = None  # which of the format's builds, where it has several
    quant_method: str | None = None  # how coarse weights found their codes, where there are any

    @property
    def size_bytes(self) -> int:
        """All files together."""
        return sum(record.size_bytes for record in self.files.values())

    @classmethod
    def of_directory(  # noqa: PLR0913 - what the files cannot say themselves
        cls,
        directory: Path,
        entry: str,
        *,
        format: str,
        recipe: str,
        substitutions: tuple[str, ...] = (),
        split_bytes: int | None = None,
        calibration: str | None = None,
        variant: str | None = None,
        quant_method: str | None = None,
    ) -> Self:
        """Describe what lies in ``directory``: every file but the manifest."""
        return cls(
            format=format,
            recipe=recipe,
            entry=entry,
            files=_records(directory),
            substitutions=substitutions,
            split_bytes=split_bytes,
            calibration=calibration,
            variant=variant,
            quant_method=quant_method,
        )


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """Where the weights came from."""

    name: str
    sha256: str  # over the config and every weight file, in order of name
    architecture: str  # the checkpoint's model_type
    parameters: int
    licence: str | None = None
    adapter: str | None = None
    adapter_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One condition an artifact must meet, and what was found."""

    name: str
    passed: bool
    finding: str  # "mean KL 3.1e-7 (<= 1e-4) over 1 021 positions"

    @property
    def line(self) -> str:
        """It in one line, for a person."""
        return f"{'ok  ' if self.passed else 'FAIL'} {self.name}: {self.finding}"


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """The proof that the artifact says what the checkpoint says."""

    gates: tuple[Gate, ...]
    positions: int
    mean_kl_nats: float  # of next-token distributions, checkpoint against artifact
    p99_kl_nats: float
    same_top_token: float  # share of positions, 0 to 1
    perplexity_ratio: float  # artifact / checkpoint, on the same text
    said_by: str = "its runtime"  # or what computed the artifact's side of the proof instead

    @property
    def passed(self) -> bool:
        """Whether every gate holds."""
        return all(gate.passed for gate in self.gates)


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """An exported model for one target."""

    directory: Path
    model: ModelRecord
    target: str
    context_tokens: int
    text: TextRules
    artifact: Artifact
    agreement: Agreement | None  # None: exported with --no-verify
    predicted: dict[str, float]  # the plan's numbers: artifact_bytes, peak_memory_bytes, …
    tools: dict[str, str]  # package -> version that took part

    @property
    def artifact_path(self) -> Path:
        """What the runtime opens."""
        return self.directory / self.artifact.entry

    def save(self) -> None:
        """Write ``manifest.json``, at once: it is there whole or not at all."""
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "model": asdict(self.model),
            "target": self.target,
            "context_tokens": self.context_tokens,
            "text": asdict(self.text),
            "artifact": asdict(self.artifact),
            "agreement": asdict(self.agreement) if self.agreement else None,
            "predicted": self.predicted,
            "tools": self.tools,
        }
        temporary = self.directory / f"{MANIFEST}.part"
        text = json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(self.directory / MANIFEST)

    def sign(self, key: Path) -> None:
        """Sign ``manifest.json``; arguments and errors are those of `signature.require_signing`."""
        signature.sign(self.directory / MANIFEST, key)

    def signed_by(self, *, trusted: str | Path | None = None) -> signature.Signature | None:
        """Return the signature of the manifest, None if there is none.

        Args:
            trusted: As of `load`; without it, a signature is not read where ssh-keygen is missing.

        Raises:
            BundleError: If there is a damaged one, one of something else, or not a trusted one.
        """
        path = self.directory / MANIFEST
        if not is_file(signature.signature_path(path), refusal=BundleError):
            return None
        if trusted is None and not signature.is_installed():
            return signature.Signature(key=None)
        trusted = None if trusted is None else Path(trusted)
        return signature.check(path, _read_manifest(self.directory), trusted=trusted)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        check_hashes: bool = True,
        trusted: str | Path | None = None,
    ) -> Self:
        """Open a bundle and check that its files are the ones the manifest describes.

        Args:
            directory: The bundle.
            check_hashes: False checks names and sizes only, in a millisecond.
            trusted: A file with public keys, or OpenSSH's list of allowed signers: one of them
                must have signed the manifest, which is believed after that only. None: anybody
                may have written it.

        Raises:
            BundleError: If the manifest is missing, unreadable or of another schema, it is not
                signed as it must be, or a file is missing, new, or changed; the message names it.
            UsageError: If ``trusted`` holds no public key.
            MissingDependencyError: If ssh-keygen is needed and not installed.
        """
        directory = Path(directory)
        content = _read_manifest(directory)
        if trusted is not None:
            signature.check(directory / MANIFEST, content, trusted=Path(trusted))
        bundle = cls._from_manifest(directory, _parse_manifest(directory, content))
        bundle.check_files(check_hashes=check_hashes)
        return bundle

    @classmethod
    def _from_manifest(cls, directory: Path, manifest: Mapping[str, Any]) -> Self:
        reader = FieldReader(
            origin=directory / MANIFEST, refusal=BundleError, hint="copy the bundle again"
        )
        fields = {name: value for name, value in manifest.items() if name != "schema_version"}
        bundle = reader.read(cls, fields, directory=directory)
        marks = bundle.text.thoughts
        if marks is not None and not (marks.opens.strip() and marks.closes.strip()):
            raise BundleError(
                f"{directory / MANIFEST}: text.thoughts opens with {marks.opens!r} and closes with "
                f"{marks.closes!r}, expected two marks that are not blank",
                hint="copy the bundle again",
            )
        return bundle

    def check_files(self, *, check_hashes: bool = True) -> None:
        """Compare what lies in the directory with the manifest.

        Raises:
            BundleError: If a file is missing, new, or changed; the message names it.
        """
        for name in self.artifact.files:
            _refuse_to_leave(self.directory, name)
        present = {
            str(PurePosixPath(path.relative_to(self.directory))) for path in _files(self.directory)
        }
        for name in sorted(self.artifact.files.keys() - present):
            raise BundleError(f"{self.directory / name} is missing", hint="copy the bundle again")
        for name, record in self.artifact.files.items():
            _check_file(self.directory / name, record, check_hash=check_hashes)
        for name in sorted(present - self.artifact.files.keys()):
            raise BundleError(
                f"{self.directory / name} does not belong to the bundle", hint="move it elsewhere"
            )
        if self.artifact.entry not in self.artifact.files:
            raise BundleError(f"{self.directory} has no file {self.artifact.entry!r} to open")

    def with_agreement(self, agreement: Agreement) -> Self:
        """Return the same bundle with its proof.

        Raises:
            DisagreementError: If a gate does not hold; the message lists each that failed.
        """
        failed = [f"{gate.name}: {gate.finding}" for gate in agreement.gates if not gate.passed]
        if failed:
            raise DisagreementError(
                "the artifact does not say what the checkpoint says\n  " + "\n  ".join(failed),
                hint="nothing was written; --no-verify keeps the artifact for inspection",
            )
        return replace(self, agreement=agreement)


def _read_manifest(directory: Path) -> bytes:
    path = directory / MANIFEST
    if not is_file(path, refusal=BundleError):
        raise BundleError(
            f"{directory} is not a bundle: it has no {MANIFEST}",
            hint="pass the directory that `edgekit export` printed",
        )
    with readable(path, refusal=BundleError):
        return path.read_bytes()


def _parse_manifest(directory: Path, content: bytes) -> Mapping[str, Any]:
    manifest = parse_object(content, origin=directory / MANIFEST, refusal=BundleError)
    found = manifest.get("schema_version")
    check_version(found, SCHEMA_VERSION, origin=directory, refusal=BundleError)
    return manifest


def _refuse_to_leave(directory: Path, name: str) -> None:
    path = PurePosixPath(name)
    inside = not path.is_absolute() and ".." not in path.parts and not {"\\", "\0"} & {*name}
    if not inside or not _real(directory / name).is_relative_to(_real(directory)):
        raise BundleError(f"{directory / MANIFEST} names {name!r}, outside the bundle")


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve() raises where symlinks run in a circle


def _check_file(path: Path, record: FileRecord, *, check_hash: bool) -> None:
    with readable(path, refusal=BundleError, hint="copy the bundle again"):
        _compare(path, record, check_hash=check_hash)


def _compare(path: Path, record: FileRecord, *, check_hash: bool) -> None:
    require_file(path, refusal=BundleError, hint="copy the bundle again")
    size = path.stat().st_size
    if size != record.size_bytes:
        raise BundleError(
            f"{path} has {size} bytes, the manifest says {record.size_bytes}",
            hint="copy the bundle again",
        )
    if check_hash and sha256_of(path) != record.sha256:
        raise BundleError(
            f"{path} is not what was exported: its SHA-256 differs", hint="copy the bundle again"
        )


def _records(directory: Path) -> dict[str, FileRecord]:
    return {
        str(PurePosixPath(path.relative_to(directory))): FileRecord(
            sha256=sha256_of(path), size_bytes=path.stat().st_size
        )
        for path in _files(directory)
    }


def _files(directory: Path) -> list[Path]:
    found = (path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir())
    manifest = directory / MANIFEST
    return sorted(set(found) - {manifest, signature.signature_path(manifest)})
