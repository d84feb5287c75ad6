"""What a browser is served: files below prefixes, and pages made here, to this machine alone.

Every answer has the headers with which a page may share memory between threads (COOP, COEP), as
WebAssembly's threads do.
"""

import http.server
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


TYPES = {
    ".html": "text/html", ".js": "text/javascript", ".mjs": "text/javascript",
    ".json": "application/json", ".wasm": "application/wasm",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Site:
    """What is served."""

    pages: Mapping[str, tuple[str, bytes]] = field(default_factory=dict)  # path: (type, content)
    # Below which path which directory lies, or a file; the longest that fits counts.
    roots: Mapping[str, Path] = field(default_factory=dict)
    connects_to: Sequence[str] = ()  # the only others that the page may fetch from

    @property
    def headers(self) -> dict[str, str]:
        """What every answer has."""
        others = " ".join(self.connects_to)
        policy = (
            "default-src 'self' 'unsafe-inline' 'unsafe-eval' blob: data:; "
            f"connect-src 'self' blob: data: {others}"
        )
        return {
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Embedder-Policy": "require-corp",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Content-Security-Policy": policy.strip(),
            "Cache-Control": "no-cache",
        }

    def file(self, path: str) -> Path | None:
        """Return the file that a path means, None for what is not served."""
        wanted = unquote(path)
        prefixes = [prefix for prefix in self.roots if wanted.startswith(prefix)]
        if not prefixes or ".." in wanted.split("/") or "\0" in wanted:
            return None
        prefix = max(prefixes, key=len)
        rest = wanted.removeprefix(prefix)
        found = self.roots[prefix] / rest if rest else self.roots[prefix]
        return found if found.is_file() else None


class SiteServer(http.server.ThreadingHTTPServer):
    """Serves one site on loopback."""

    daemon_threads = True

    def __init__(self, site: Site, *, host: str = "127.0.0.1", port: int = 0) -> None:
        super().__init__((host, port), _Handler)
        self.site = site

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a browser that left."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def serving(site: Site) -> Iterator[SiteServer]:
    """Serve a site while the block runs."""
    with SiteServer(site) as server:
        thread = threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Answers what a browser asks."""

    server: SiteServer  # type: ignore[mutable-override]
    protocol_version = "HTTP/1.1"
    extensions_map = {  # noqa: RUF012 - the base class has it so
        **http.server.SimpleHTTPRequestHandler.extensions_map,
        **TYPES,
    }

    def do_GET(self) -> None:
        """Send a page, or a file."""
        page = self.server.site.pages.get(urlsplit(self.path).path)
        if page is None:
            super().do_GET()
            return
        kind, body = page
        self.send_response(http.HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def list_directory(self, path: str | os.PathLike[str]) -> None:
        """List nothing."""
        del path
        self.send_error(http.HTTPStatus.NOT_FOUND)

    def translate_path(self, path: str) -> str:
        """Return the file that a path means; one that is not there for what is not served."""
        found = self.server.site.file(urlsplit(path).path)
        return os.devnull + "/none" if found is None else str(found)

    def end_headers(self) -> None:
        """Add what every answer has."""
        for name, value in self.server.site.headers.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""
