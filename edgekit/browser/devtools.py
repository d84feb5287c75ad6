"""The DevTools protocol over a pair of pipes, as Chromium speaks it: JSON, a zero byte after each.

A pipe needs no port that others could open, and Chromium ends when it is closed, however the
process at this end of it died.

Source: https://chromedevtools.github.io/devtools-protocol/ and ``--remote-debugging-pipe``.
"""

import json
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from edgekit.errors import ToolchainError


Event = Mapping[str, Any]
_CHUNK_BYTES = 1 << 20


class ClosedError(ToolchainError):
    """The browser is gone."""


class KilledError(ClosedError):
    """The system killed the page's process, as it does when memory runs out."""


class CallError(ToolchainError):
    """The browser refused a call."""


class DevTools:
    """One connection; calls wait for their answers, events go to a listener.

    Args:
        writing: The descriptor that Chromium reads from.
        reading: The descriptor that it writes to.
        on_event: Is told everything that is not an answer, in a thread of its own; it may `send`.
    """

    def __init__(
        self, writing: int, reading: int, on_event: "Callable[[DevTools, Event], None]"
    ) -> None:
        self._writing, self._reading = writing, reading
        self._on_event = on_event
        self._changed = threading.Condition()
        self._answers: dict[int, Event] = {}
        self._last_id = 0
        self._is_closed = False
        self._failure: ClosedError | None = None
        self._thread = threading.Thread(target=self._listen, name="edgekit-devtools", daemon=True)
        self._thread.start()

    def send(
        self, method: str, params: Mapping[str, Any] | None = None, *, session: str | None = None
    ) -> int:
        """Send a call and return its number, without waiting for the answer.

        Raises:
            ClosedError: If the browser is gone.
        """
        with self._changed:
            self._last_id += 1
            number = self._last_id
            message = {"id": number, "method": method, "params": params or {}}
            if session is not None:
                message["sessionId"] = session
            rest = memoryview(json.dumps(message).encode() + b"\0")
            try:
                while rest:
                    rest = rest[os.write(self._writing, rest) :]
            except OSError as error:
                raise self._closed() from error
        return number

    def call(
        self,
        method: str,
        params: Mapping[str, Any] | None = None,
        *,
        session: str | None = None,
        timeout_s: float = 60,
    ) -> dict[str, Any]:
        """Return the answer to a call.

        Raises:
            CallError: If the browser refuses it.
            ClosedError: If the browser is gone, or `fail` was called meanwhile.
            TimeoutError: If there is no answer in time.
        """
        number = self.send(method, params, session=session)
        with self._changed:
            is_there = self._changed.wait_for(
                lambda: number in self._answers or self._is_closed or self._failure, timeout_s
            )
            answer = self._answers.pop(number, None)
            if answer is None:
                if not is_there:
                    raise TimeoutError(f"{method} took longer than {timeout_s:.0f} s")
                raise self._closed()
        if "error" in answer:
            raise CallError(f"the browser refused {method}: {answer['error'].get('message')}")
        found: dict[str, Any] = answer["result"]
        return found

    def fail(self, reason: ClosedError) -> None:
        """End all calls that wait, and those to come, with this refusal."""
        with self._changed:
            self._failure = self._failure or reason
            self._changed.notify_all()

    def close(self) -> None:
        """Close the connection, which ends the browser."""
        with suppress(OSError):
            os.close(self._writing)
        self._thread.join(timeout=5)

    def _closed(self) -> ClosedError:
        return self._failure or ClosedError("the browser was closed")

    def _listen(self) -> None:
        rest = b""
        while chunk := self._read():
            *messages, rest = (rest + chunk).split(b"\0")
            for message in messages:
                self._take(json.loads(message))
        os.close(self._reading)
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _read(self) -> bytes:
        try:
            return os.read(self._reading, _CHUNK_BYTES)
        except OSError:
            return b""

    def _take(self, message: dict[str, Any]) -> None:
        if "id" not in message:
            with suppress(ClosedError):
                self._on_event(self, message)
            return
        with self._changed:
            self._answers[message["id"]] = message
            self._changed.notify_all()
