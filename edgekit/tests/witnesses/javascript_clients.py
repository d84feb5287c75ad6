"""Runs the JavaScript clients of edgekit's artifacts: in Node, and in a real, headless Chromium.

The scripts are in ``javascript/``; each gets a request and gives an answer, both JSON, through
``answer.mjs``. ``package-lock.json`` pins the clients, which are installed once for each lock file.
"""

import functools
import hashlib
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest


SCRIPTS = Path(__file__).parent / "javascript"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER_FLAGS = (
    "--headless=new",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--enable-logging=stderr",  # the page's console too
    "--enable-unsafe-webgpu",  # WebGPU where there is no GPU: SwiftShader, without shader-f16
    "--use-webgpu-adapter=swiftshader",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
INSTALL_TIMEOUT_S = 600
# A page may take everything from its own server and nothing else; what it tried is reported.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' blob: data:; report-uri /foreign"


class ClientError(AssertionError):
    """A client failed, or gave no answer in time."""


@dataclass(frozen=True, kw_only=True)
class Visit:
    """What a page answered, and what its browser asked for."""

    answer: Any
    paths: tuple[str, ...]  # from the page's own server, in order
    foreign: tuple[str, ...]  # from others, in vain


def need_node() -> None:
    """Skip the test where there is no Node."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip(
            "needs Node 20 or newer, and npm: https://nodejs.org, or apt install nodejs npm"
        )


def need_browser() -> None:
    """Skip the test where there is no Chromium."""
    need_node()
    if _browser() is None:
        pytest.skip(f"needs {' or '.join(BROWSERS)}: apt install chromium")


def run_node(script: str, request: Any = None, *, timeout_s: float = 120) -> Any:
    """Return a script's answer to a request, from Node.

    Raises:
        ClientError: If the script fails, or takes too long.
    """
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        # Node looks for packages next to the script, and next to what a link to it points to.
        shutil.copytree(SCRIPTS, directory, dirs_exist_ok=True)
        (directory / "node_modules").symlink_to(installed_packages())
        command = ["node", str(directory / script)]
        try:
            done = subprocess.run(
                command, input=json.dumps(request), capture_output=True, text=True, check=False,
                timeout=timeout_s,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            said = (error.stderr or b"")[-4000:].decode(errors="replace")
            raise ClientError(f"{script} took longer than {timeout_s} s: {said}") from error
    if done.returncode != 0:
        raise ClientError(f"{script} exited with {done.returncode}: {done.stderr[-4000:]}")
    # JSON leaves in texts what Python splits lines at, such as U+0085.
    return json.loads(done.stdout.removesuffix("\n").rpartition("\n")[2])


def run_page(script: str, request: Any = None, *, directory: Path, timeout_s: float = 120) -> Visit:
    """Return a script's answer to a request, from a page in a new, headless Chromium.

    Args:
        script: In ``javascript/``; the page's only one.
        request: What the script is asked.
        directory: What the page finds under ``/files/``.
        timeout_s: For the browser's start and all that the page does.

    Raises:
        ClientError: If the script fails, the browser dies, or it takes too long.
    """
    with _serve(directory, script=script, request=request) as server, _visit(server) as browser:
        if not server.has_answer.wait(timeout_s):
            browser.kill()
            raise ClientError(f"{script} took longer than {timeout_s} s: {browser.log()}")
    if "error" in server.answer:
        raise ClientError(f"{script}: {server.answer['error']}\n{browser.log()}")
    return Visit(
        answer=server.answer["result"],
        paths=tuple(server.paths),
        # The browser reports when it likes; the page knows at once, but not what its workers ask.
        foreign=tuple(dict.fromkeys([*server.answer["foreign"], *server.foreign])),
    )


# The packages


@functools.cache
def installed_packages() -> Path:
    """Return the directory of the packages that the lock file pins; installed if need be."""
    lock = (SCRIPTS / "package-lock.json").read_bytes()
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = caches / "edgekit-tests" / f"javascript-{hashlib.sha256(lock).hexdigest()[:16]}"
    if not directory.is_dir():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent) as made:
            _install(Path(made) / "made")
            _publish(Path(made) / "made", directory)
    return directory / "node_modules"


def _install(directory: Path) -> None:
    directory.mkdir()
    for name in ("package.json", "package-lock.json"):
        shutil.copy(SCRIPTS / name, directory)
    # Scripts of packages would fetch what no test needs, such as binaries for CUDA.
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    done = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, check=False,
        timeout=INSTALL_TIMEOUT_S,
    )  # fmt: skip
    if done.returncode != 0:
        raise ClientError(f"npm ci exited with {done.returncode}: {done.stderr[-4000:]}")


def _publish(made: Path, directory: Path) -> None:
    """Put what was installed in its place, unless another process was faster."""
    try:
        made.rename(directory)
    except OSError:
        if not directory.is_dir():
            raise


# The page's server


class _Server(http.server.ThreadingHTTPServer):
    """Serves the page, its script, packages and files."""

    daemon_threads = True

    def __init__(self, directory: Path, *, script: str, request: Any) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.roots: Mapping[str, Path] = {
            "files": directory, "node_modules": installed_packages(), "scripts": SCRIPTS,
        }  # fmt: skip
        self.page = (SCRIPTS / "page.html").read_text().replace("SCRIPT", script).encode()
        self.request = json.dumps(request).encode()
        self.paths: list[str] = []
        self.foreign: list[str] = []
        self.answer: dict[str, Any] = {}
        self.has_answer = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a browser leaves as it likes
            super().handle_error(request, client_address)


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Answers what a browser asks."""

    server: _Server  # type: ignore[mutable-override]
    protocol_version = "HTTP/1.1"
    extensions_map = {  # noqa: RUF012 - the base class has it so
        **http.server.SimpleHTTPRequestHandler.extensions_map,
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def do_GET(self) -> None:
        if self.path == "/":
            self._send("text/html", self.server.page)
        elif self.path == "/request":
            self._send("application/json", self.server.request)
        else:
            self.server.paths.append(self.path)
            super().do_GET()

    def do_HEAD(self) -> None:
        self.server.paths.append(self.path)
        super().do_HEAD()

    def do_POST(self) -> None:
        said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._send("text/plain", b"")
        if self.path == "/foreign":
            self.server.foreign.append(said["csp-report"]["blocked-uri"])
        elif not self.server.has_answer.is_set():  # the first counts
            self.server.answer = said
            self.server.has_answer.set()

    def translate_path(self, path: str) -> str:
        first, _, rest = unquote(urlsplit(path).path).lstrip("/").partition("/")
        root = self.server.roots.get(first)
        if root is None or ".." in Path(rest).parts:
            return os.devnull + "/none"
        return str(root / rest)

    def end_headers(self) -> None:
        # Only such a page may share memory between threads, as WebAssembly's threads do.
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Content-Security-Policy", POLICY)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the test says what matters."""

    def _send(self, kind: str, body: bytes) -> None:
        self.send_response(http.HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def _serve(directory: Path, *, script: str, request: Any) -> Iterator[_Server]:
    with _Server(directory, script=script, request=request) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


# The browser


@dataclass(kw_only=True)
class _Browser:
    process: subprocess.Popen[bytes]
    log_file: Path
    lines: list[str] = field(default_factory=list)

    def kill(self) -> None:
        """End it with all its children."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        if self.log_file.exists():
            lines = self.log_file.read_text(errors="replace").splitlines()
            self.lines = [line for line in lines if "dbus" not in line]  # a desktop's, not missed

    def log(self) -> str:
        """Return the end of what it and its page said."""
        return "\n".join(self.lines[-60:])


def _browser() -> str | None:
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@contextmanager
def _visit(server: _Server) -> Iterator[_Browser]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = [*BROWSER_FLAGS, f"--user-data-dir={profile}"]
        if os.geteuid() == 0:
            flags.append("--no-sandbox")  # it refuses to start as root otherwise
        log = Path(profile) / "log"
        command = [str(_browser()), *flags, server.url]
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
        browser = _Browser(process=process, log_file=log)
        try:
            yield browser
        finally:
            browser.kill()
