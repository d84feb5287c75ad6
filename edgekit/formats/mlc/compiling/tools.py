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
LINKER = "em++"  # Emscripten's
INSTALL_LINKER = "apt install emscripten (Debian), brew install emscripten (macOS)"
INSTALL_COMPILER = "apt install g++ (Debian), xcode-select --install (macOS)"


def are_here() -> bool:
    """Tell whether TVM, in the version that was read, and a C++ compiler are installed."""
    return not _unfitting() and _compiler() is not None


def are_here_for_browsers() -> bool:
    """Tell whether TVM, in the version that was read, and Emscripten are installed."""
    return not _unfitting() and linker() is not None


def require(purpose: str) -> None:
    """Check that TVM and a C++ compiler are installed.

    Args:
        purpose: What needs them, as the subject of a sentence.

    Raises:
        MissingDependencyError: If one is missing, or another version of TVM is there.
    """
    _require_tvm(purpose)
    if _compiler() is None:
        raise MissingDependencyError(
            f"{purpose} needs a C++ compiler (looked for {', '.join(COMPILERS)})",
            hint=INSTALL_COMPILER,
        )


def require_for_browsers(purpose: str) -> None:
    """Check that TVM and Emscripten are installed.

    Args:
        purpose: What needs them, as the subject of a sentence.

    Raises:
        MissingDependencyError: If one is missing, or another version of TVM is there.
    """
    _require_tvm(purpose)
    if linker() is None:
        raise MissingDependencyError(
            f"{purpose} needs Emscripten (looked for {LINKER})", hint=INSTALL_LINKER
        )


def _require_tvm(purpose: str) -> None:
    for package, found in _unfitting().items():
        if found is None:
            raise installed.missing_error(package, purpose=purpose, extra=EXTRA)
        raise MissingDependencyError(
            f"{purpose} needs {package} {PACKAGES[package]}, {found} is installed",
            hint=f"pip install 'edgekit[{EXTRA}]'",
        )


def _unfitting() -> dict[str, str | None]:
    """Return the packages that are missing, and those of another version with it."""
    found = {package: installed.version(package) for package in PACKAGES}
    return {package: version for package, version in found.items() if version != PACKAGES[package]}


def linker() -> str | None:
    """Return the program that makes WebAssembly of objects; None if it is not installed."""
    return shutil.which(LINKER)


def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, COMPILERS)), None)


@functools.cache
def hash_of(directory: Path) -> str:
    """Return a hash over the names and contents of all sources below a directory."""
    digest = hashlib.sha256()
    for source in sorted(directory.rglob("*")):
        if source.is_file() and source.suffix != ".pyc":
            digest.update(f"{source.relative_to(directory).as_posix()}\n".encode())
            digest.update(source.read_bytes())
    return digest.hexdigest()


def library(key: str, name: str, compile_to: Callable[[Path], None]) -> Path:
    """Return a library that is kept under a key, made with ``compile_to`` if it is not there whole.

    Raises:
        ToolchainError: If it cannot be compiled or kept; the log is the compiler's.
    """

    def write(work: Path) -> None:
        try:
            compile_to(work / name)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise ToolchainError("TVM cannot compile this model", log=str(error)) from error

    return kept_directory(write, key, hash_of(Path(__file__).parent)) / name


def kept_directory(write: Callable[[Path], None], *made_by: str) -> Path:
    """Return a directory of code, written if it is not there whole.

    Args:
        write: Fills an empty directory.
        made_by: All that its contents depend on, besides TVM.

    Raises:
        ToolchainError: If it cannot be kept.
    """
    kind = hashlib.sha256(" ".join([*PACKAGES.values(), *made_by]).encode()).hexdigest()[:32]
    try:
        return kept.directory(cache_directory() / "mlc" / kind, write, is_code=True)
    except UsageError as error:
        raise ToolchainError(str(error), hint=error.hint) from error
