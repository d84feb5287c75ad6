"""The system's Chromium: where it is, how it is started, what it holds in memory, and its end."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from edgekit import scratch
from edgekit.browser.devtools import DevTools, Event
from edgekit.errors import MissingDependencyError, ToolchainError


VARIABLE = "EDGEKIT_BROWSER"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
MAC_PATHS = tuple(
    Path(f"/Applications/{name}.app/Contents/MacOS/{name}")
    for name in ("Google Chrome", "Chromium")
)
INSTALL_LINE = (
    f"apt install chromium (Debian), brew install --cask google-chrome (macOS), or set {VARIABLE}"
)
_FLAGS = (
    "--headless=new",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-breakpad",  # a handler of crashes would outlive it
    "--disable-crash-reporter",
    "--disable-extensions",
    "--enable-unsafe-webgpu",  # on Linux it is not on everywhere
    "--disable-features=OptimizationGuideModelDownloading,Translate,MediaRouter",
)
# A WebGPU of the processor's. With flags for ANGLE next to this, Chromium 156 has no GPU process.
SOFTWARE_ADAPTER = "--use-webgpu-adapter=swiftshader"
_START_S = 60
# Puts the pipes in their places; a function between fork and exec could not, with threads around.
_PLACE = """
import fcntl, os, sys
high = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
for number, place in zip(high, (3, 4)):
    os.dup2(number, place)
os.execv(sys.argv[3], sys.argv[3:])
"""
_PSS = re.compile(r"^(?:Pss|SwapPss):\s+(\d+) kB", re.MULTILINE)
_RSS = re.compile(r"^Rss:\s+(\d+) kB", re.MULTILINE)
_ANONYMOUS = re.compile(r"^Pss_(?:Anon|Shmem):\s+(\d+) kB", re.MULTILINE)


def find() -> Path:
    """Return the browser's program: what `VARIABLE` names, or the first that is known.

    Raises:
        MissingDependencyError: If there is none.
    """
    named = os.environ.get(VARIABLE)
    if named:
        path = shutil.which(named)
        if path is None:
            raise MissingDependencyError(
                f"{VARIABLE} names {named!r}, which is not a program", hint=INSTALL_LINE
            )
        return Path(path)
    found = [Path(path) for path in map(shutil.which, NAMES) if path]
    found += [path for path in MAC_PATHS if path.exists()]
    if not found:
        raise MissingDependencyError(
            f"no Chromium or Chrome is installed: looked for {', '.join(NAMES)}", hint=INSTALL_LINE
        )
    return found[0]


def reaching_only(origins: Sequence[str]) -> str:
    """Return the flag by which it finds this machine and these origins, and nothing else."""
    hosts = ["127.0.0.1", "localhost", *(urlsplit(origin).hostname or "" for origin in origins)]
    excluded = ", ".join(f"EXCLUDE {host}" for host in hosts)
    return f"--host-resolver-rules=MAP * ~NOTFOUND, {excluded}"


@dataclass(frozen=True, kw_only=True)
class Held:
    """What a tree of processes holds."""

    pss_bytes: int  # shared pages by their share
    unreclaimable_bytes: int  # of them, those that no file backs


@dataclass(frozen=True, kw_only=True)
class Browser:
    """A running browser with one page."""

    process: subprocess.Popen[bytes]
    tools: DevTools
    session: str  # of the page

    def call(
        self, method: str, params: Mapping[str, Any] | None = None, *, timeout_s: float = 60
    ) -> dict[str, Any]:
        """Ask the page's own target something."""
        return self.tools.call(method, params, session=self.session, timeout_s=timeout_s)

    def version(self) -> str:
        """Return its name and version, as ``Chrome/156.0.8078.108``."""
        product: str = self.tools.call("Browser.getVersion")["product"]
        return product.removeprefix("Headless")

    def held(self) -> Held | None:
        """Return what all its processes hold, None where the system does not tell."""
        return tree_memory(self.process.pid)

    def process_ids(self, kind: str) -> list[int]:
        """Return the processes of one kind: ``"GPU"``, ``"renderer"``, ``"browser"``."""
        found = self.tools.call("SystemInfo.getProcessInfo")["processInfo"]
        return [int(each["id"]) for each in found if each["type"] == kind]


@contextmanager
def running(
    *, on_event: Callable[[DevTools, Event], None], flags: Sequence[str] = ()
) -> Iterator[Browser]:
    """Start a browser with a profile of its own, and end it with all its processes.

    Args:
        on_event: Is told events of DevTools, with the browser's connection.
        flags: Besides those that it always gets.

    Raises:
        MissingDependencyError: If there is none.
        ToolchainError: If it does not start.
    """
    if sys.platform == "win32":
        raise MissingDependencyError(
            "browsers are started on Linux and macOS only", hint="use WSL on this machine"
        )
    program = find()
    with scratch.directory("browser") as profile:
        command = [str(program), *_FLAGS, *flags, f"--user-data-dir={profile}/profile"]
        if os.geteuid() == 0:
            command.append("--no-sandbox")  # it refuses to start as root otherwise
        log = profile / "log"
        process, writing, reading = _start(command, log, temporary=profile)
        tools = None
        try:
            tools = DevTools(writing, reading, on_event)
            session = _open_page(tools, process, program, log)
            yield Browser(process=process, tools=tools, session=session)
        finally:
            _end(process)
            if tools is not None:
                tools.close()


def _start(
    command: Sequence[str], log: Path, *, temporary: Path
) -> tuple[subprocess.Popen[bytes], int, int]:
    """Start it with pipes at descriptors 3 and 4, where it looks for them.

    It leaves a directory with a socket among temporary files, so it gets a place of its own.
    """
    its_input, writing = os.pipe()
    reading, its_output = os.pipe()
    words = [*command, "--remote-debugging-pipe", "about:blank"]
    placing = [sys.executable, "-I", "-S", "-c", _PLACE, str(its_input), str(its_output)]
    try:
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*placing, *words], stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                env=os.environ | {"TMPDIR": str(temporary)},
                pass_fds=(its_input, its_output), start_new_session=True,
            )  # fmt: skip
    finally:
        os.close(its_input)
        os.close(its_output)
    return process, writing, reading


def _open_page(tools: DevTools, process: subprocess.Popen[bytes], program: Path, log: Path) -> str:
    try:
        tools.call("Target.setDiscoverTargets", {"discover": True}, timeout_s=_START_S)
        targets = tools.call("Target.getTargets")["targetInfos"]
        page = next(target for target in targets if target["type"] == "page")
        attached = tools.call(
            "Target.attachToTarget", {"targetId": page["targetId"], "flatten": True}
        )
    except (ToolchainError, TimeoutError, StopIteration) as error:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1)
        said = log.read_text(errors="replace")[-4000:] if log.exists() else ""
        lines = [line for line in said.splitlines() if line.strip() and "dbus" not in line]
        raise ToolchainError(
            f"{program} does not start: {lines[-1] if lines else error}",
            hint=INSTALL_LINE,
            log=said,
        ) from error
    session: str = attached["sessionId"]
    return session


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill it with all of its group; what left the group goes with the pipes and their parent."""
    processes = tree(process.pid)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for pid in processes:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def tree_memory(pid: int) -> Held | None:
    """Return what a process and all that it started hold, None where the system does not tell."""
    pss = kept = 0
    for each in tree(pid):
        try:
            text = Path(f"/proc/{each}/smaps_rollup").read_text(encoding="ascii")
        except ProcessLookupError:
            continue
        except OSError:
            if not Path(f"/proc/{each}").exists():
                continue
            return None
        pss += sum(map(int, _PSS.findall(text)))
        kept += sum(map(int, _ANONYMOUS.findall(text)))
    return Held(pss_bytes=pss * 1024, unreclaimable_bytes=kept * 1024) if pss else None


def tree(pid: int) -> list[int]:
    """Return a process and all that descend from it."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            after_name = stat.read_text(errors="replace").rpartition(")")[2].split()
            parents.setdefault(int(after_name[1]), []).append(int(stat.parent.name))
    found, waiting = [], [pid]
    while waiting:
        each = waiting.pop()
        found.append(each)
        waiting += parents.get(each, [])
    return found
