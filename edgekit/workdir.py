"""Work happens in a temporary sibling that is renamed at the end: OUT is whole or not there."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgekit.errors import EdgekitError, UsageError


@contextmanager
def new_directory(out: Path, *, replaces: str | None = None) -> Iterator[Path]:
    """Yield an empty directory that becomes ``out`` when the block ends well.

    An exception, Ctrl-C included, removes it; what a killed process left is removed by the next.

    Args:
        out: Where the result shall be.
        replaces: None refuses an ``out`` that exists; else one that holds a file of this name may
            be replaced, at the very end.

    Raises:
        UsageError: If ``out`` exists, or its parent cannot be written.
        EdgekitError: If the disk is full; nothing is left behind.
    """
    refuse_existing(out, replaces=replaces)
    work = _create_sibling(out)
    try:
        yield work
        _sync(work)
        _put(work, out)
        _sync_directory(out.parent)
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise EdgekitError(
                f"the disk under {out.parent} is full", hint="free some space; nothing was written"
            ) from error
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def refuse_existing(out: Path, *, replaces: str | None = None) -> None:
    """Stop before slow work if the result would have no place.

    Raises:
        UsageError: If ``out`` exists, and is not of the kind that may be replaced.
    """
    if not out.exists() and not out.is_symlink():
        return
    if replaces is None:
        raise UsageError(f"{out} exists", hint="remove it, or choose another with -o")
    if out.is_symlink() or not (out / replaces).is_file():
        raise UsageError(
            f"{out} exists and is not what would replace it: it has no {replaces}",
            hint="choose another with -o",
        )


def _put(work: Path, out: Path) -> None:
    """Move the finished directory into place; what was there goes only when it is known whole."""
    if not out.exists():
        work.rename(out)
        return
    old = work.with_suffix(".old")
    out.rename(old)
    work.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _create_sibling(out: Path) -> Path:
    parent = out.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_orphans(parent, out.name)
        work = parent / f".{out.name}.{os.getpid()}.part"
        work.mkdir()
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(
            f"cannot write into {parent}: {reason}", hint="choose another place with -o"
        ) from error
    return work


def _remove_orphans(parent: Path, name: str) -> None:
    """Remove what killed processes left of this same output."""
    for path in parent.glob(f".{name}.*.part"):
        pid = path.name.rsplit(".", 2)[1]
        if pid.isdigit() and not _is_running(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    with suppress(OSError):  # not every system can open a directory
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
