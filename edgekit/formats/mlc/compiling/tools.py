"""What compiles libraries, and where they are kept: a second fine-tune waits for no compiler."""

import functools
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

from edgekit import installed, versions
from edgekit.bundle import kept
from edgekit.cache import cache_directory
from edgekit.errors import MissingDependencyError, ToolchainError, UsageError


EXTRA = "mlc-compile"
PACKAGES = {"apache-tvm": versions.APACHE_TVM, "apache-tvm-ffi": versions.APACHE_TVM_FFI}
COMPILERS = ("g++", "clang++", "c++")  # as TVM looks for one
INSTALL_COMPILER = "apt install g++ (Debian), xcode-select --install (macOS)"


def are_here() -> bool:
    """Tell whether TVM, in the version that was read, and a C++ compiler are installed."""
    return not _unfitting() and _compiler() is not None


def require(purpose: str) -> None:
    """Check that TVM and a C++ compiler are installed.

    Args:
        purpose: What needs them, as the subject of a sentence.

    Raises:
        MissingDependencyError: If one is missing, or another version of TVM is there.
    """
    for package, found in _unfitting().items():
        if found is None:
            raise installed.missing_error(package, purpose=purpose, extra=EXTRA)
        raise MissingDependencyError(
            f"{purpose} needs {package} {PACKAGES[package]}, {found} is installed",
            hint=f"pip install 'edgekit[{EXTRA}]'",
        )
    if _compiler() is None:
        raise MissingDependencyError(
            f"{purpose} needs a C++ compiler (looked for {', '.join(COMPILERS)})",
            hint=INSTALL_COMPILER,
        )


def _unfitting() -> dict[str, str | None]:
    """Return the packages that are missing, and those of another version with it."""
    found = {package: installed.version(package) for package in PACKAGES}
    return {package: version for package, version in found.items() if version != PACKAGES[package]}


def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, COMPILERS)), None)


@functools.cache
def _made_by() -> str:
    """Return what makes libraries: TVM's version, and a hash over this package."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.iterdir()):
        if source.is_file():
            digest.update(source.read_bytes())
    return " ".join([*PACKAGES.values(), digest.hexdigest()])


def library(key: str, name: str, compile_to: Callable[[Path], None]) -> Path:
    """Return a library that is kept under a key, made with ``compile_to`` if it is not there whole.

    Raises:
        ToolchainError: If it cannot be compiled or kept; the log is the compiler's.
    """
    kind = hashlib.sha256(f"{key} {_made_by()}".encode()).hexdigest()[:32]

    def write(work: Path) -> None:
        try:
            compile_to(work / name)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise ToolchainError("TVM cannot compile this model", log=str(error)) from error

    try:
        place = kept.directory(cache_directory() / "mlc" / kind, write, is_code=True)
    except UsageError as error:
        raise ToolchainError(str(error), hint=error.hint) from error
    return place / name
