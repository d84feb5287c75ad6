"""Directories for a while: gone with the block, or with the next run if the process was killed."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


_PREFIX, _SUFFIX = "edgekit-", ".scratch"
_CONTENT = "w"  # short: the path of a socket may have 108 bytes at most
_UNBORN_S = 60  # after which a directory that was never locked is left over


@contextmanager
def directory(purpose: str) -> Iterator[Path]:
    """Yield an empty directory under the system's one for temporary files, and remove it.

    What killed processes left of the same user goes first. A directory is locked while its process
    lives, in whatever container, and something is put into it only then: one that holds something
    and is not locked is left over.

    Args:
        purpose: A word of its name.
    """
    remove_orphans()
    outer = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{purpose}-", suffix=_SUFFIX))
    descriptor = _locked(outer)
    try:
        inner = outer / _CONTENT
        inner.mkdir()
        yield inner
    finally:
        shutil.rmtree(outer, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def remove_orphans() -> None:
    """Remove what killed processes of this user left; a live process's stays."""
    with suppress(OSError):  # a directory that cannot be listed
        for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*{_SUFFIX}"):
            _remove_if_orphan(path)


def _remove_if_orphan(path: Path) -> None:
    descriptor = None
    with suppress(OSError):  # it went meanwhile
        found = path.lstat()
        if not hasattr(os, "geteuid") or found.st_uid != os.geteuid():
            return
        descriptor = _locked(path)
        if descriptor is None:
            return
        content = [entry.name for entry in path.iterdir()]
        is_old = time.time() - found.st_mtime > _UNBORN_S
        if content == [_CONTENT] or (not content and is_old):
            shutil.rmtree(path, ignore_errors=True)
    if descriptor is not None:
        os.close(descriptor)


def _locked(path: Path) -> int | None:
    """Return a descriptor that holds the lock of a directory, None if another process has it."""
    fcntl: Any
    try:
        import fcntl
    except ImportError:  # Windows: nothing is locked, so nothing is taken for left over
        return None
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return None
        return descriptor
    return None
