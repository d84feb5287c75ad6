"""What is installed: packages, their versions, and the way out where one is missing."""

import importlib.metadata
import importlib.util
import re
from collections.abc import Iterable, Iterator

from edgekit.errors import MissingDependencyError


def missing(*packages: str) -> list[str]:
    """Return those packages that cannot be imported here, without importing any."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def require(*packages: str, purpose: str, extra: str, otherwise: str = "") -> None:
    """Check that packages are installed, before slow work.

    Args:
        packages: The names they are imported by.
        purpose: What needs them, as the subject of a sentence: ``"a calibration"``.
        extra: Of edgekit, that brings them.
        otherwise: What to do without them: ``"go without: --no-calibration"``.

    Raises:
        MissingDependencyError: If one is missing; the message names all that are.
    """
    lacking = missing(*packages)
    if lacking:
        raise missing_error(*lacking, purpose=purpose, extra=extra, otherwise=otherwise)


def missing_error(
    *packages: str, purpose: str, extra: str, otherwise: str = ""
) -> MissingDependencyError:
    """Return the refusal of `require`, for whoever noticed by an import that failed."""
    names, verb = " and ".join(packages), "are" if len(packages) > 1 else "is"
    return MissingDependencyError(
        f"{purpose} needs {names}, which {verb} not installed",
        hint=f"pip install 'edgekit[{extra}]'" + (f", or {otherwise}" if otherwise else ""),
    )


def version(package: str) -> str | None:
    """Return the version of a distribution, None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the version of each distribution that is installed."""
    known = ((package, version(package)) for package in packages)
    return {package: number for package, number in known if number is not None}


def extras() -> dict[str, list[str]]:
    """Return the distributions that each extra of edgekit asks for, from its own metadata."""
    by_extra: dict[str, list[str]] = {}
    for extra, requirement in _requirements():
        name = re.findall(r"[A-Za-z0-9._-]+", requirement)[0]
        if name != "edgekit":
            by_extra.setdefault(extra, []).append(name)
    return by_extra


def requirements_of(extra: str) -> list[str]:
    """Return what ``pip install 'edgekit[extra]'`` would bring, without edgekit itself.

    Falls back on that extra's name where edgekit runs from its sources, uninstalled.
    """
    wanted = [requirement for name, requirement in _requirements() if name == extra]
    return wanted or [f"edgekit[{extra}]"]


def _requirements() -> Iterator[tuple[str, str]]:
    """Yield what extras ask for, with the name of the extra."""
    try:
        lines = importlib.metadata.requires("edgekit") or []
    except importlib.metadata.PackageNotFoundError:  # run from a tree that is not installed
        lines = []
    for line in lines:
        requirement, _, marker = line.partition(";")
        named = re.search(r"extra == ['\"]([^'\"]+)['\"]", marker)
        if named:
            yield named[1], requirement.strip()
