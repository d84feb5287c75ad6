"""TVM's runtime for browsers, compiled once from the sources in its wheels.

They include a few small headers that the wheels do not bring; those in ``web_runtime/`` are
edgekit's own. What a model's library never does (sessions over a network, sorting on the processor)
is left out by files of the same names there.
"""

import subprocess
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from edgekit.errors import ToolchainError
from edgekit.formats.mlc.compiling import tools


SOURCES = ("wasm_runtime", "tvmjs_support", "webgpu_runtime")
HEADERS = Path(__file__).with_suffix("")
_COMPILE = ("-O1", "-std=c++17", "-w", "-c")
_LINK = (
    "-O1",
    "--no-entry",
    "-sWASM_BIGINT=1",
    "-sSTANDALONE_WASM=1",
    "-sERROR_ON_UNDEFINED_SYMBOLS=0",  # what WebLLM brings
    "-sALLOW_MEMORY_GROWTH=1",
    "-sINITIAL_MEMORY=160MB",
    "-Wno-undefined",
)


def link(objects: Sequence[str], out: Path) -> None:
    """Link the objects of a library with the runtime.

    Raises:
        ToolchainError: If Emscripten cannot.
    """
    _run([*_LINK, "-o", str(out), *(str(path) for path in compiled()), *objects])


def compiled() -> list[Path]:
    """Return the objects, compiled now unless they are kept."""
    made_by = ("runtime", *_COMPILE, _version(), tools.hash_of(HEADERS))
    place = tools.kept_directory(_compile_into, *made_by)
    return [place / f"{name}.o" for name in SOURCES]


def _compile_into(work: Path) -> None:
    tvm, ffi = (_package(name) for name in ("tvm", "tvm_ffi"))
    sources = work / "3rdparty"  # where the runtime looks for the other wheel
    sources.mkdir()
    (sources / "tvm-ffi").symlink_to(ffi)
    own = [HEADERS / name for name in ("", "include", "src/runtime", "src/runtime/rpc")]
    places = [*own, work, tvm, tvm / "include", ffi / "include"]
    for name in SOURCES:
        source, out = tvm / "web/emcc" / f"{name}.cc", work / f"{name}.o"
        _run([*_COMPILE, *(f"-I{place}" for place in places), str(source), "-o", str(out)])
    (sources / "tvm-ffi").unlink()
    sources.rmdir()


def _package(name: str) -> Path:
    found = find_spec(name)
    assert found is not None  # noqa: S101 - required before
    assert found.origin is not None  # noqa: S101 - neither is a namespace
    return Path(found.origin).parent


def _version() -> str:
    return _run(["--version"]).partition("\n")[0]


def _run(arguments: Sequence[str]) -> str:
    command = [str(tools.linker()), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ToolchainError(
            f"{tools.LINKER} cannot make a library for browsers", log=done.stderr or done.stdout
        )
    return done.stdout
