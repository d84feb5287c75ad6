"""Requests to a server."""

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

from edgekit import installed
from edgekit.errors import UsageError
from edgekit.runtime.child import environment
from edgekit.tests.attack import mutations, samples
from edgekit.tests.attack.attack import Attack, BreachError


_START_S = 60
_MOST_BYTES = 20_000_000
_CHAT: dict[str, Any] = {
    "model": "model", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2,
    "temperature": 0.5, "top_p": 0.9, "stop": ["x"], "seed": 1, "stream": False,
}  # fmt: skip
_TEXT: dict[str, Any] = {"model": "model", "prompt": "hello", "max_tokens": 2, "n": 1}
_HEADERS = ("Host", "Content-Type", "Content-Length", "Transfer-Encoding", "Authorization",
            "Accept", "Expect", "Connection")  # fmt: skip
_HEADER_VALUES = ("", "x", "evil.example", "-1", "99999999999", "chunked", "Bearer x",
                  "100-continue", "close", "a" * 70_000, "127.0.0.1")  # fmt: skip


class Requests(Attack):
    """requests to a server"""

    share = 2.0

    def prepare(self) -> None:
        for package in ("llama_cpp", "starlette", "uvicorn"):
            installed.require(package, purpose="a server", extra="serve")
        samples.bundle(self.place / "bundle")

    def open(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.server = subprocess.Popen(
            [sys.executable, "-m", "edgekit", "serve", str(self.place / "bundle"), "--port",
             str(self.port), "--threads", "1"],
            env=environment(), stdin=subprocess.DEVNULL,
        )  # fmt: skip
        until = time.monotonic() + _START_S
        while not self._answers():
            if self.server.poll() is not None or time.monotonic() > until:
                raise RuntimeError("the server does not start")
            time.sleep(0.1)
        self.base_bytes = self._held_bytes()

    def _answers(self) -> bool:
        try:
            return self._status("GET", "/v1/models", b"", {}) == 200
        except OSError:
            return False

    def case(self, random: Random) -> None:
        method, path, content, headers = self._request(random)
        try:
            status = self._status(method, path, content, headers)
        except (OSError, http.client.HTTPException):
            status = 400  # it hung up
        if self.server.poll() is not None or status >= 500:
            raise BreachError(f"status {status} of {method} {path} {content[:200]!r}")
        if self._held_bytes() - self.base_bytes > self.memory_bytes:
            raise MemoryError("the server")
        if status >= 400:
            raise UsageError(f"status {status}")

    def _request(self, random: Random) -> tuple[str, str, bytes, dict[str, str]]:
        path, fields = random.choice(
            (("/v1/chat/completions", _CHAT), ("/v1/completions", _TEXT), ("/v1/models", {}))
        )
        content = json.dumps(fields).encode()
        if random.random() < 0.9:
            content = mutations.mutated(content, ".json", random, other=content)
        if random.random() < 0.05:
            content = content * (_MOST_BYTES // len(content or b" "))
        headers = {"Content-Type": "application/json"}
        if random.random() < 0.2:
            headers[random.choice(_HEADERS)] = random.choice(_HEADER_VALUES)
        if random.random() < 0.1:
            path = random.choice(("/", "/v1/", "/../etc/passwd", "/v1/%00", "/v1/models?x=%ff"))
        return random.choice(("POST", "POST", "POST", "GET", "PUT")), path, content, headers

    def _status(self, method: str, path: str, content: bytes, headers: dict[str, str]) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=self.limit_s / 4)
        try:
            connection.request(method, path, content, headers)
            answer = connection.getresponse()
            answer.read()
            return answer.status
        finally:
            connection.close()

    def _held_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.server.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
