"""Directories of the cache: made once, and made again when anything in them differs.

A damaged copy would be believed: the proof compares an artifact with what was read from here. So a
directory lists the hash of each file, and everything is compared before the directory is used.

Hashing gigabytes at every start would take longer than what they are read for. A file whose size
and times (of its content and of its entry, in nanoseconds) are as they were when it was last hashed
is not hashed again: whoever writes to a file, in place too, changes them. What a disk loses without
a write is not found so, and whoever may write here may also write the list: it is no signature.
"""

import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgekit.bundle.workdir import new_directory
from edgekit.encodings.hashing import sha256_of
from edgekit.encodings.json_files import read_object
from edgekit.errors import UsageError


LIST = ".sha256.json"
_SETTLED_NS = 2_000_000_000  # coarser clocks of file systems: a later write may show no other time
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


def directory(out: Path, write: Callable[[Path], object], *, is_code: bool = False) -> Path:
    """Return a directory of the cache, written if it is not there or not as it was written.

    Args:
        out: Where it is kept.
        write: Fills an empty directory.
        is_code: Whether something in it will be executed, so that nobody else may have written it.

    Raises:
        UsageError: If it cannot be written, or belongs to somebody else and is code.
    """
    is_safe = _is_private(out) if is_code else True
    if is_safe and is_whole(out):
        return out
    _make_room(out)
    if is_code:
        _close(out.parent)
    try:
        with new_directory(out) as work:
            write(work)
            _store(_listed(work), work / LIST)
            if is_code:
                _close(work)
    except UsageError:
        if not is_whole(out):  # else another process was faster
            raise
    return out


def is_whole(out: Path) -> bool:
    """Tell whether a directory holds the files that were written, and nothing else."""
    try:
        recorded = read_object(out / LIST)
        found = {name: _stamp(path) for name, path in _files(out)}
        if found.keys() != recorded.keys():
            return False
        changed = [name for name, stamp in found.items() if recorded[name]["stamp"] != stamp]
        if any(sha256_of(out / name) != recorded[name]["sha256"] for name in changed):
            return False
    except (UsageError, OSError, LookupError, TypeError):
        return False
    if changed:  # hashed a moment ago: it need not be next time
        part = out.with_name(f".{out.name}.{os.getpid()}.list")
        with suppress(OSError):
            _store({name: recorded[name] | {"stamp": found[name]} for name in found}, part)
            part.replace(out / LIST)
    return True


def _listed(work: Path) -> dict[str, Any]:
    return {name: {"sha256": sha256_of(path), "stamp": _stamp(path)} for name, path in _files(work)}


def _store(recorded: dict[str, Any], path: Path) -> None:
    """Write the list; of a file changed just now, the times say nothing yet."""
    newest = time.time_ns() - _SETTLED_NS
    for entry in recorded.values():
        if max(entry["stamp"][1:]) > newest:
            entry["stamp"] = None
    path.write_text(json.dumps(recorded), encoding="utf-8")


def _files(place: Path) -> Iterator[tuple[str, Path]]:
    """Yield what lies in a directory, by its path there.

    Raises:
        OSError: If something is neither a directory nor a regular file.
    """
    for path in sorted(place.rglob("*")):
        mode = path.lstat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise OSError(f"{path} is not a regular file")
        if stat.S_ISREG(mode) and path != place / LIST:
            yield path.relative_to(place).as_posix(), path


def _stamp(path: Path) -> list[int]:
    found = path.lstat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _make_room(out: Path) -> None:
    """Remove what is damaged, and see to it that something can be written there."""
    try:
        if out.is_dir() and not out.is_symlink():
            shutil.rmtree(out)
        else:
            out.unlink(missing_ok=True)
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot write into {out.parent}: {error.strerror}",
            hint="set EDGEKIT_CACHE to a directory that can be written",
        ) from error


def _is_private(out: Path) -> bool:
    """Tell whether nobody else can have written what is kept here.

    Raises:
        UsageError: If the directory it lies in, or itself, belongs to somebody else.
    """
    if not hasattr(os, "geteuid"):  # no such owners on this system
        return True
    is_private = True
    for path in (out.parent, out, *out.glob("*")):
        with suppress(FileNotFoundError, NotADirectoryError):
            found = path.lstat()
            if found.st_uid not in {os.geteuid(), 0}:
                raise UsageError(
                    f"{path} belongs to another user, and a program in it would be executed",
                    hint="set EDGEKIT_CACHE to a directory of your own",
                )
            if found.st_mode & _OTHERS_MAY_WRITE and not stat.S_ISLNK(found.st_mode):
                is_private = False
                if path == out.parent:
                    _close(path)
    return is_private


def _close(place: Path) -> None:
    """Take from others the right to write into a directory, and to its files."""
    try:
        for path in (place, *(path for path in place.glob("*") if path.is_file())):
            path.chmod(path.stat().st_mode & ~_OTHERS_MAY_WRITE)
    except OSError as error:
        raise UsageError(
            f"others may write into {place}, and a program in it would be executed",
            hint=f"chmod go-w {place}, or set EDGEKIT_CACHE to a directory of your own",
        ) from error
