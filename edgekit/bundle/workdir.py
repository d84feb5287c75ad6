"""Work happens in a temporary sibling that is renamed at the end: OUT is whole or not there."""

import errno
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgekit.errors import EdgekitError, UsageError


_OURS: set[Path] = set()  # what this process is working in


@contextmanager
def new_directory(out: Path, *, replaces: str | None = None) -> Iterator[Path]:
    """Yield an empty directory that becomes ``out`` when the block ends well.

    An exception, Ctrl-C included, removes it; what a killed process left is removed by the next.

    Args:
        out: Where the result must be.
        replaces: None refuses an ``out`` that exists; else one that holds a file of this name may
            be replaced, at the very end.

    Raises:
        UsageError: If ``out`` exists, or its parent cannot be written.
        EdgekitError: If the disk is full; nothing is left behind.
    """
    _remove_orphans(out)
    refuse_existing(out, replaces=replaces)
    work = _create_sibling(out)
    try:
        yield work
        _sync(work)
        refuse_existing(out, replaces=replaces)  # it may have come meanwhile
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
        _OURS.discard(work)


def refuse_existing(out: Path, *, replaces: str | None = None) -> None:
    """Stop before slow work if the result would have no place.

    Raises:
        UsageError: If ``out`` exists, and is not of the kind that may be replaced.
    """
    if not os.path.lexists(out):
        return
    if replaces is None:
        raise UsageError(f"{out} exists", hint="remove it, or choose another with -o")
    if out.is_symlink() or not os.path.isfile(out / replaces):  # noqa: PTH113 - never an error
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
    try:
        work.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _create_sibling(out: Path) -> Path:
    parent = out.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        work = parent / f".{out.name}.{os.getpid()}.part"
        work.mkdir()
        _OURS.add(work)
    except (OSError, ValueError, RecursionError) as error:  # a null byte, a thousand levels
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"cannot write into {parent}: {reason}", hint="choose another place with -o"
        ) from error
    return work


def _remove_orphans(out: Path) -> None:
    """Remove what killed processes left of this same output."""
    found: list[Path] = []
    with suppress(OSError, ValueError):  # a place that there cannot be: a name that is too long
        found = [*out.absolute().parent.glob(f".{glob.escape(out.name)}.*.*")]
    for path in found:
        pid, kind = path.name.rsplit(".", 2)[1:]
        if kind not in {"part", "old"} or not pid.isdigit() or path in _OURS:
            continue
        # A container gives every process the same id: what has ours and is not ours is left over.
        if int(pid) == os.getpid() or not _is_running(int(pid)):
            _remove_orphan(path, out)


def _remove_orphan(path: Path, out: Path) -> None:
    if path.suffix == ".old" and not os.path.lexists(out):
        with suppress(OSError):
            path.rename(out)  # the process died between the two renames
    else:
        shutil.rmtree(path, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):  # no such process, no such number
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
