"""Hashes of files, of one and of several together."""

import hashlib
from collections.abc import Iterable
from pathlib import Path


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_all(paths: Iterable[Path], *, after: str | None = None) -> str:
    """Return one hash over the hashes of files, in hexadecimal.

    Args:
        paths: In the order that counts.
        after: A hash of the same kind that comes before them.
    """
    digest = hashlib.sha256(bytes.fromhex(after or ""))
    for path in paths:
        digest.update(bytes.fromhex(sha256_of(path)))
    return digest.hexdigest()
