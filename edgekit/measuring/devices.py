"""Devices: where a bundle is measured. This machine, a browser, or what the system's ssh reaches.

A device takes a bundle and runs a module of edgekit. Over ssh it gets edgekit's own sources as one
zip, so that both ends are always the same version; of the device it needs Python and the runtime.

The system's ssh is used because it honours ``~/.ssh/config``, agents and jump hosts. It ends with
255 both when it cannot connect and when the remote command dies of a signal, so every command
reports its own status on its last line.
"""

import dataclasses
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self
from urllib.parse import parse_qs, urlsplit

from edgekit import scratch
from edgekit.browser import chromium
from edgekit.browser.options import BrowserOptions, Limits, is_browser
from edgekit.bundle.manifest import MANIFEST
from edgekit.bundle.signature import signature_path
from edgekit.encodings.hashing import sha256_of_all
from edgekit.errors import EdgekitError, MissingDependencyError, ToolchainError, UsageError
from edgekit.runtime.child import death_of, environment, shell_status


SSH_CONFIG_VARIABLE = "EDGEKIT_SSH_CONFIG"  # a file for `ssh -F`, instead of ~/.ssh/config
OLDEST_PYTHON = (3, 11)

_IN_BROWSER = "edgekit.measuring.in_browser"
_ENDING_S = 10  # for a child to end what it started
_REMOTE_CACHE = ".cache/edgekit"  # relative to the home directory, where ssh starts
_STATUS = re.compile(r"\n?__RC=(\d+)\s*$")
_CONNECT_TIMEOUT_S = 10
_OLD_PART_MIN = 24 * 60  # no copy takes a day
_SOCKET = "s"  # short, because the path of a socket may have 108 bytes at most

# What OpenSSH prints on stderr, and what to do about it; the first match counts.
_REFUSALS = (
    ("Host key verification failed", "its host key is unknown or has changed",
     "connect once with `ssh {host}` and accept the key"),
    ("Permission denied", "it did not accept your key or user name",
     "set up a key: `ssh-copy-id {host}`; edgekit never asks for a password"),
    ("Could not resolve hostname", "the host name is unknown", "check the spelling"),
    ("Connection refused", "nothing listens on that port", "is sshd running there?"),
    ("timed out", "it did not answer", "is it on, and on this network?"),
    ("No route to host", "there is no route to it", "is it on, and on this network?"),
    ("Bad configuration option", "your ssh configuration has an error", "see the log"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What a command left."""

    status: int  # as a shell counts: 128 and the signal's number if it died of one
    output: str
    log: str  # stderr

    @property
    def death(self) -> str | None:
        """How it died, or None if it ended by itself."""
        return death_of(self.status)


class Device(Protocol):
    """A place that can hold a bundle and run edgekit's modules."""

    label: str
    python: str  # the interpreter, as one types it there
    is_browser: bool  # whether pages run the bundle, not Python

    def push(self, bundle: Path) -> str:
        """Copy a bundle there, unless it is there already; return its directory there."""
        ...

    def run_module(self, module: str, arguments: Sequence[str]) -> Finished:
        """Run ``python -m module`` there, in a process of its own, and wait for it."""
        ...

    def close(self) -> None:
        """Close the connection."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def connect(text: str, *, ssh_config: Path | None = None, limits: Limits | None = None) -> Device:
    """Return the device that ``text`` names: ``"this"``, ``"browser"`` or ``"ssh://user@host:port"``.

    Args:
        text: The device. ``ssh://pi@pi5?python=/opt/venv/bin/python`` chooses the interpreter,
            ``browser?backend=wasm`` what computes in the page.
        ssh_config: For `ssh -F`; by default the file that `SSH_CONFIG_VARIABLE` names, if any.
        limits: What a browser's GPU is held to; None: nothing.

    Raises:
        UsageError: If ``text`` is neither.
        ToolchainError: If it cannot be reached.
        MissingDependencyError: If ssh or a browser is not installed here, or no suitable Python
            there.
    """
    if text == "this":
        return ThisMachine()
    if is_browser(text):
        options = replace(BrowserOptions.parse(text), limits=limits or Limits())
        return BrowserDevice(options)
    if text.startswith("ssh://"):
        named = os.environ.get(SSH_CONFIG_VARIABLE)
        device = SshDevice.parse(text, config=ssh_config or (Path(named) if named else None))
        try:
            device.check_python()
        except EdgekitError:
            device.close()
            raise
        return device
    raise UsageError(
        f"{text!r} is not a device",
        hint="devices: this, browser, ssh://user@host, ssh://user@host:port",
    )


class _Closing:
    """Ends with its ``with`` block."""

    def close(self) -> None:
        """Release what is held."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class ThisMachine(_Closing):
    """The machine that edgekit runs on."""

    label = "this machine"
    python = sys.executable
    is_browser = False

    def push(self, bundle: Path) -> str:
        """Return the bundle's own directory: it is here."""
        return str(bundle.absolute())

    def run_module(self, module: str, arguments: Sequence[str]) -> Finished:
        """Run ``python -m module`` with this interpreter and these sources."""
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        with process:
            try:
                output, log = process.communicate()
            except BaseException:  # Ctrl-C: let it put away what it started
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_ENDING_S)
                process.kill()
                raise
        return Finished(status=shell_status(process.returncode), output=output, log=log)

    def close(self) -> None:
        """Do nothing: there is no connection."""


class BrowserDevice(ThisMachine):
    """A browser of this machine's, started anew where another device starts a process."""

    is_browser = True

    def __init__(self, options: BrowserOptions) -> None:
        self.label = f"{chromium.find().name} on this machine"
        self._options = options

    def run_module(self, module: str, arguments: Sequence[str]) -> Finished:
        """Run the module's counterpart, which starts a browser."""
        del module  # `measure`, always
        told = json.dumps(dataclasses.asdict(self._options))
        return super().run_module(_IN_BROWSER, [*arguments, "--browser", told])


class SshDevice(_Closing):
    """A machine behind ssh, with one connection for all commands."""

    is_browser = False

    def __init__(
        self, host: str, *, port: int | None, python: str = "python3", config: Path | None = None
    ) -> None:
        if shutil.which("ssh") is None or shutil.which("scp") is None:
            raise MissingDependencyError(
                "ssh is not installed on this machine", hint="install the OpenSSH client"
            )
        self.host = host
        self.label = host if port is None else f"{host}:{port}"
        self.python = python
        self._scratch = ExitStack()
        self._sockets = self._scratch.enter_context(scratch.directory("ssh"))
        self._options = _ssh_options(self._sockets / _SOCKET, port=port, config=config)
        self._address = host if port is None else f"-p {port} {host}"  # as one types it
        self._pushed: dict[Path, str] = {}
        self._library: str | None = None

    @classmethod
    def parse(cls, url: str, *, config: Path | None = None) -> Self:
        """Read ``ssh://user@host:port?python=/path``.

        Raises:
            UsageError: If the address has no host, an impossible port or an unknown option.
        """
        try:
            parts, options = urlsplit(url), parse_qs(urlsplit(url).query)
            host, port = parts.hostname, parts.port
        except ValueError as error:  # [::1 without its end, a port of letters
            raise UsageError(f"{url!r}: {error}", hint="write ssh://user@host:port") from error
        python = options.pop("python", ["python3"])[-1]
        # A leading dash would be read as an option by ssh.
        if not host or host.startswith("-") or (parts.username or "").startswith("-"):
            raise UsageError(f"{url!r} has no host", hint="write ssh://user@host")
        if options or parts.path.strip("/") or parts.fragment:
            raise UsageError(
                f"{url!r} has more than a host, a port and ?python=",
                hint="write ssh://user@host:port?python=/path/to/python",
            )
        user = f"{parts.username}@" if parts.username else ""
        return cls(f"{user}{host}", port=port, python=python, config=config)

    def check_python(self) -> None:
        """Make sure that the device has a Python that can run edgekit.

        Raises:
            ToolchainError: If the device cannot be reached.
            MissingDependencyError: If it has no Python, or one too old.
        """
        wanted = ".".join(map(str, OLDEST_PYTHON))
        script = f"import sys; sys.exit(sys.version_info[:2] < {OLDEST_PYTHON})"
        done = self.run_shell(f"{shlex.quote(self.python)} -c {shlex.quote(script)}")
        if done.status != 0:
            problem = "is older" if done.status == 1 else "is not there"
            raise MissingDependencyError(
                f"{self.label} needs Python {wanted} or newer, but {self.python!r} {problem}",
                hint="install one there, or name one: ssh://user@host?python=/path/to/python",
            )

    def push(self, bundle: Path) -> str:
        """Bring a bundle there, unless its files are there already, hashes checked.

        Raises:
            ToolchainError: If it did not arrive whole, for lack of space, for example.
        """
        if bundle not in self._pushed:
            manifest = bundle / MANIFEST
            told = filter(Path.exists, (manifest, signature_path(manifest)))
            place = f"{_REMOTE_CACHE}/bundles/{sha256_of_all(told)}"
            if not self._is_whole(place):
                self._upload(bundle, place)
            self._pushed[bundle] = place
        return self._pushed[bundle]

    def _upload(self, bundle: Path, place: str) -> None:
        self._must(f"rm -rf {place} && mkdir -p {_REMOTE_CACHE}/bundles")
        self._bring(bundle, place)
        if not self._is_whole(place):
            raise ToolchainError(
                f"the bundle was damaged on the way to {self.label}",
                hint=f"look at the storage of the device: {place}",
            )

    def _bring(self, source: Path, place: str) -> None:
        """Copy a file or a directory under another name, then give it its own; or leave nothing."""
        part = f"{place}.part"
        # What was being copied when this machine, or the line to it, died: nobody else removes it.
        old = f"find {_REMOTE_CACHE} -name '*.part' -mmin +{_OLD_PART_MIN} -exec rm -rf {{}} +"
        self._must(f"rm -rf {part}; {old} 2>/dev/null; true")
        try:
            self._copy(source, part)
            self._must(f"mv {part} {place}")
        except BaseException:  # SIGTERM too: the device's storage is small
            with suppress(EdgekitError):
                self.run_shell(f"rm -rf {part}")
            raise

    def _is_whole(self, place: str) -> bool:
        if self.run_shell(f"test -f {place}/{MANIFEST}").status != 0:
            return False
        return self.run_module("edgekit.measuring.measure", [place, "--check"]).status == 0

    def run_module(self, module: str, arguments: Sequence[str]) -> Finished:
        """Run ``python -m module`` there, with the sources of this edgekit."""
        words = shlex.join([self.python, "-m", module, *arguments])
        return self.run_shell(
            f'PYTHONPATH="$HOME/{self._push_library()}" PYTHONDONTWRITEBYTECODE=1 '
            f"GGML_NO_BACKTRACE=1 {words}"
        )

    def _push_library(self) -> str:
        if self._library is None:
            content = library_zip()
            place = f"{_REMOTE_CACHE}/lib/{hashlib.sha256(content).hexdigest()}.zip"
            if self.run_shell(f"test -f {place}").status != 0:
                self._must(f"mkdir -p {_REMOTE_CACHE}/lib")
                local = self._sockets / "edgekit.zip"
                local.write_bytes(content)
                self._bring(local, place)
            self._library = place
        return self._library

    def run_shell(self, script: str) -> Finished:
        """Run a line of POSIX shell there.

        Raises:
            ToolchainError: If the connection fails; the command's own failure is in the status.
        """
        # A subshell, so that nothing in the script skips the report of its status.
        remote = f"({script}) </dev/null; s=$?; echo; echo __RC=$s"
        command = ["ssh", *self._options, "--", self.host, f"sh -c {shlex.quote(remote)}"]
        done = _run_here(command)
        status = _STATUS.search(done.stdout)
        if status is None:
            raise self._refusal(done.stderr)
        output = done.stdout[: status.start()]
        return Finished(status=int(status[1]), output=output, log=done.stderr)

    def _must(self, script: str) -> None:
        done = self.run_shell(script)
        if done.status != 0:
            raise ToolchainError(
                f"{self.label} failed to run `{script}`: {_last_line(done.log)}", log=done.log
            )

    def _copy(self, source: Path, place: str) -> None:
        # scp names the port -P, but takes it as -o Port, as ssh does.
        command = ["scp", *self._options, "-q", "-r", "--", str(source), f"{self.host}:{place}"]
        done = _run_here(command)
        if done.returncode != 0:
            raise ToolchainError(
                f"{source.name} could not be copied to {self.label}: {_last_line(done.stderr)}",
                hint="is there space left on the device?",
                log=done.stderr,
            )

    def _refusal(self, log: str) -> ToolchainError:
        for sign, reason, hint in _REFUSALS:
            if sign in log:
                return ToolchainError(
                    f"cannot connect to {self.label}: {reason}",
                    hint=hint.format(host=self._address),
                    log=log,
                )
        return ToolchainError(
            f"the connection to {self.label} was lost: {_last_line(log)}", log=log
        )

    def close(self) -> None:
        """End the shared connection."""
        if (self._sockets / _SOCKET).exists():
            with suppress(OSError):
                _run_here(["ssh", *self._options, "-O", "exit", "--", self.host])
        self._scratch.close()


def library_zip() -> bytes:
    """Return edgekit's own sources, tests left out, as a zip that Python can import from.

    The same sources give the same bytes.
    """
    package = Path(__file__).parents[1]
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(package.rglob("*.py")):
            name = path.relative_to(package.parent)
            if "tests" not in name.parts:
                archive.writestr(zipfile.ZipInfo(name.as_posix()), path.read_bytes())
    return content.getvalue()


def _ssh_options(socket: Path, *, port: int | None, config: Path | None) -> list[str]:
    options = {
        "BatchMode": "yes",  # never ask: nobody may be there to answer
        "ConnectTimeout": str(_CONNECT_TIMEOUT_S),
        "ServerAliveInterval": "15",
        "ControlMaster": "auto",
        "ControlPath": str(socket),
        "ControlPersist": "60",
    }
    if port is not None:
        options["Port"] = str(port)
    words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    return [*(["-F", str(config)] if config else []), *words]


def _run_here(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )


def _last_line(log: str) -> str:
    lines = [line for line in log.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it said nothing"
