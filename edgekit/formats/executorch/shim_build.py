"""The C++ runtime of the ``executorch`` wheel, reached through a small library compiled here.

The wheel brings headers and shared libraries that need no torch; its own Python bindings need it.
So ``shim.cpp`` is compiled on first use and kept in the user's cache.
"""

import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from edgekit import installed
from edgekit.bundle import kept
from edgekit.cache import cache_directory
from edgekit.errors import MissingDependencyError, ToolchainError, UsageError


_LIBRARY = "shim.so"
SOURCE = Path(__file__).with_name("shim.cpp")
INSTALL_WHEEL = "pip install 'edgekit[run-executorch]'"
INSTALL_COMPILER = "apt install g++ (Debian), xcode-select --install (macOS)"
COMPILERS = ("c++", "g++", "clang++")
# Each registers kernels or a backend while it is loaded, so none may be dropped as unused.
LIBRARIES = (
    "executorch",
    "executorch_kernels_optimized",
    "executorch_backend_xnnpack",
    "executorch_threadpool",
)
QUANTIZED_KERNELS = "executorch_kernels_quantized"  # loaded where a program asks for one of them
LOG_LINES = 30
TIMEOUT_S = 600  # a Raspberry Pi takes half a minute


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """The installed ``executorch`` package, found without importing it."""

    directory: Path
    version: str

    @classmethod
    def find(cls) -> "Wheel":
        """Return it.

        Raises:
            MissingDependencyError: If it is not installed, or has no libraries to link with.
        """
        version = installed_version()
        if version is None:
            raise MissingDependencyError("ExecuTorch is not installed", hint=INSTALL_WHEEL)
        spec = importlib.util.find_spec("executorch")
        places = [] if spec is None else spec.submodule_search_locations or []
        for place in map(Path, places):
            if _library_in(place, LIBRARIES[0]).is_file():
                return cls(directory=place, version=version)
        raise MissingDependencyError(
            f"ExecuTorch {version} brings no C++ libraries on {platform.platform(terse=True)}",
            hint=f"{INSTALL_WHEEL}; wheels since 1.5 have them, on Linux and macOS",
        )

    def library(self, name: str) -> Path:
        """Return the file of a shared library."""
        return _library_in(self.directory, name)


def _library_in(directory: Path, name: str) -> Path:
    suffix = "dylib" if platform.system() == "Darwin" else "so"
    return directory / "lib" / f"lib{name}.{suffix}"


def installed_version() -> str | None:
    """Return the version of ExecuTorch, None if it is not installed."""
    return installed.version("executorch")


def compiler() -> str | None:
    """Return the C++ compiler of this system: $CXX, or the first one there is."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), *COMPILERS))), None)


def compile_command(
    compiler: str, wheel: Path, output: Path, *, sources: tuple[Path, ...] = (SOURCE,)
) -> list[str]:
    """Return what compiles the shim against the wheel that lies in ``wheel``."""
    include = wheel / "include"
    return [
        compiler, "-std=c++20", "-O2", "-fPIC", "-shared",
        # The vendored c10 headers would look for one that only a build of PyTorch makes.
        "-DC10_USING_CUSTOM_GENERATED_MACROS",
        "-isystem", str(include),
        "-isystem", str(include / "executorch/runtime/core/portable_type/c10"),
        *map(str, sources), "-o", str(output),
        f"-L{wheel / 'lib'}", f"-Wl,-rpath,{wheel / 'lib'}",
        *([] if platform.system() == "Darwin" else ["-Wl,--no-as-needed"]),
        *(f"-l{name}" for name in LIBRARIES),
    ]  # fmt: skip


@functools.cache
def load() -> ctypes.CDLL:
    """Return the shim, compiled before or now.

    Raises:
        MissingDependencyError: If ExecuTorch or a C++ compiler is not installed.
        ToolchainError: If the compiler fails; the log has its last words.
    """
    wheel = Wheel.find()
    path = _compiled(wheel)
    try:
        return _declared(ctypes.CDLL(str(path)))
    except (OSError, AttributeError):  # a file that another system left in a shared home
        path.unlink(missing_ok=True)
        path = _compiled(wheel)
    try:
        return _declared(ctypes.CDLL(str(path)))
    except OSError as error:
        raise ToolchainError(
            f"what was just compiled for ExecuTorch {wheel.version} does not load",
            hint=f"pip install --force-reinstall executorch=={wheel.version}",
            log=str(error),
        ) from error


def _compiled(wheel: Wheel) -> Path:
    """Return the library, compiled if it is not kept whole and out of others' reach."""
    try:
        out = kept.directory(_cached(wheel), lambda work: _compile(wheel, work), is_code=True)
    except UsageError as error:
        raise ToolchainError(str(error), hint=error.hint) from error
    return out / _LIBRARY


def _cached(wheel: Wheel) -> Path:
    """Return the directory for the shim of this wheel, these flags and this kind of CPU."""
    command = compile_command("", wheel.directory, Path())
    parts = [wheel.version, *command, platform.system(), platform.machine()]
    key = hashlib.sha256("\0".join(parts).encode() + SOURCE.read_bytes()).hexdigest()[:16]
    return cache_directory() / "executorch" / f"shim-{wheel.version}-{platform.machine()}-{key}"


def _compile(wheel: Wheel, directory: Path) -> None:
    command = compiler()
    if command is None:
        raise MissingDependencyError(
            f"there is no C++ compiler, which ExecuTorch needs here once (looked for "
            f"{', '.join(COMPILERS)})",
            hint=INSTALL_COMPILER,
        )
    _run(compile_command(command, wheel.directory, directory / _LIBRARY))


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False,
            timeout=TIMEOUT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ToolchainError(f"{command[0]} did not end in {TIMEOUT_S} s") from error
    if done.returncode != 0:
        raise ToolchainError(
            f"{command[0]} exited with {done.returncode} over {SOURCE.name}",
            hint="it must know C++20, as g++ 12 does; set CXX to another one",
            log="\n".join(done.stderr.strip().splitlines()[:LOG_LINES]),
        )


def _declared(shim: ctypes.CDLL) -> ctypes.CDLL:
    """State what each function takes and returns, and start the runtime."""
    pointer, text, count = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
    number, numbers = ctypes.c_int64, ctypes.POINTER(ctypes.c_int64)
    counts, pointers = ctypes.POINTER(count), ctypes.POINTER(pointer)
    for name, returned, arguments in (
        ("start", None, []),
        ("log", text, []),
        ("has_kernel", ctypes.c_bool, [text]),
        ("has_backend", ctypes.c_bool, [text]),
        ("threads", count, [count]),
        ("open", count, [text, ctypes.c_bool, pointers]),
        ("close", None, [pointer]),
        ("constants", count, [pointer, text, numbers, counts]),
        ("limits", count, [pointer, numbers, numbers]),
        ("read", count, [pointer, pointer, count, number, pointers, numbers, numbers]),
    ):
        function = getattr(shim, f"edgekit_{name}")
        function.restype, function.argtypes = returned, arguments
    shim.edgekit_start()
    return shim
