"""Files, asked what they are before they are opened.

To open a named pipe is to wait for whoever writes into it, a device may never end, and a name can
be longer than a system allows: where a file is expected, it is a regular one or it is refused.
"""

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgekit.errors import BundleError, UsageError


_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
_MOST_CHARACTERS = 300  # of a path in a message


def is_file(
    path: Path, *, refusal: type[UsageError] | type[BundleError] = UsageError, hint: str = ""
) -> bool:
    """Tell whether there is a regular file, itself or where its links lead.

    Args:
        path: Is not opened.
        refusal: What is raised; a damaged bundle is not the fault of what a user brought.
        hint: The way out.

    Raises:
        UsageError, BundleError: As ``refusal``, if there is something else of this name, or it
            cannot be told, as with links in a circle.
    """
    kind = _kind(path, refusal=refusal, hint=hint)
    if kind in {None, stat.S_IFREG}:
        return kind is not None
    raise refusal(
        f"{shown(path)} is {_KINDS.get(kind or 0, 'something else')}, expected a regular file",
        hint=hint or "put the file itself there",
    )


def require_file(
    path: Path, *, refusal: type[UsageError] | type[BundleError] = UsageError, hint: str = ""
) -> None:
    """Refuse what is not a regular file, as `is_file` does, and what is not there.

    Raises:
        UsageError, BundleError: As ``refusal``.
    """
    if not is_file(path, refusal=refusal, hint=hint):
        raise refusal(f"{shown(path)} is missing", hint=hint)


@contextmanager
def readable(
    path: Path, *, refusal: type[UsageError] | type[BundleError] = UsageError, hint: str = ""
) -> Iterator[None]:
    """Refuse a file that turns out unreadable in the block: no right to it, a disk that fails.

    Raises:
        UsageError, BundleError: As ``refusal``.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise refusal(f"{shown(path)} cannot be read: {reason}", hint=hint) from error


def is_directory(path: Path) -> bool:
    """Tell whether there is a directory of this name, itself or where its links lead.

    Raises:
        UsageError: If it cannot be told, as with links in a circle.
    """
    return _kind(path, refusal=UsageError, hint="") == stat.S_IFDIR


def shown(text: str | Path, most_characters: int = _MOST_CHARACTERS) -> str:
    """Return a path, a name or a line for a message, the middle of a long one left out."""
    text = str(text)
    half = most_characters // 2
    return text if len(text) <= most_characters else f"{text[:half]}…{text[-half:]}"


def _kind(path: Path, *, refusal: type[UsageError] | type[BundleError], hint: str) -> int | None:
    try:
        return stat.S_IFMT(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # a loop, a name too long, or one with a null byte
        reason = getattr(error, "strerror", None) or str(error)
        raise refusal(f"{shown(path)} cannot be read: {reason}", hint=hint) from error
