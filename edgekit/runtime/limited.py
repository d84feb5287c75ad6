"""Work on what strangers wrote, done by a child process that cannot take much time or memory.

Checks within a program can be outwitted; a process that the system ends cannot. A `Worker` keeps
one child for many questions, a line of JSON each way. Where the system has no such limits the clock
still holds (Windows), and macOS does not enforce the one on memory.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from edgekit.runtime.child import death_of, environment, shell_status


_OUT_OF_MEMORY = 3  # the exit status of a child that was refused memory
# How much longer than its processor time a question may take on a busy machine. Where the system
# limits that time the clock is only for a child that does nothing at all.
_CLOCK_PER_CPU = 5 if sys.platform == "win32" else 30
_MAPPED_BYTES = 1 << 30  # of programs and libraries, over what they write to: address space only
# Threads take memory each, and nobody reads a backtrace, which takes longer than many a question.
_SETTINGS = {
    "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "RUST_BACKTRACE": "0",
}  # fmt: skip


class OverLimitError(Exception):
    """What was asked takes more than it may; the message goes on after a name: ``takes more …``."""


@dataclass(frozen=True, kw_only=True)
class Allowance:
    """What a question may take."""

    cpu_s: int
    memory_bytes: int  # that the child writes to, what Python takes of it included


class Worker:
    """A child that answers questions, started by the first one and again after it had to be ended.

    Args:
        module: What the child runs; it calls `work`.
    """

    def __init__(self, module: str) -> None:
        self._module = module
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # the process that started it
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start the child and do not wait for it, so that the first answer comes sooner."""
        with self._lock:
            self._running()

    def ask(self, question: Mapping[str, Any], allowance: Allowance) -> dict[str, Any]:
        """Return the child's answer.

        Args:
            question: What JSON can hold; halves of surrogate pairs pass as they are.
            allowance: What it may take.

        Raises:
            OverLimitError: If it takes more, or ends the child.
            TypeError: If JSON cannot hold the question.
        """
        line = json.dumps({"allowance": asdict(allowance), "question": question}).encode()
        with self._lock:
            process = self._running()
            answer, is_late = _exchange(process, line, allowance.cpu_s * _CLOCK_PER_CPU)
            if answer.endswith(b"\n"):
                found: dict[str, Any] = json.loads(answer)
                return found
            self._close()
        raise OverLimitError(_cause(process.returncode, allowance, is_late=is_late))

    def close(self) -> None:
        """End the child; the next question starts another."""
        with self._lock:
            self._close()

    def _running(self) -> subprocess.Popen[bytes]:
        """Return this process's child: a fork of its parent has pipes to the same one."""
        if self._process is None or self._owner != os.getpid():
            self._process, self._owner = self._start(), os.getpid()
        return self._process

    def _start(self) -> subprocess.Popen[bytes]:
        atexit.register(self.close)
        return subprocess.Popen(
            [sys.executable, "-P", "-m", self._module],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=environment() | _SETTINGS,
        )  # fmt: skip

    def _close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        atexit.unregister(self.close)
        with suppress(OSError), process:  # its input ends, and with it the child
            pass


def _exchange(process: subprocess.Popen[bytes], line: bytes, clock_s: float) -> tuple[bytes, bool]:
    """Return a line of the child, cut short if it ended, and whether that was for the clock."""
    assert process.stdin is not None  # noqa: S101 - both are pipes
    assert process.stdout is not None  # noqa: S101
    late = threading.Event()

    def end() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(clock_s, end)
    timer.start()
    try:
        with suppress(BrokenPipeError):  # it has ended; there is no answer either
            process.stdin.write(line + b"\n")
            process.stdin.flush()
        return process.stdout.readline(), late.is_set()
    except BaseException:  # Ctrl-C: the next answer would be that of this question
        process.kill()
        raise
    finally:
        timer.cancel()
        timer.join()


def _cause(returncode: int, allowance: Allowance, *, is_late: bool) -> str:
    if is_late or returncode == -getattr(signal, "SIGPROF", 0):
        return f"takes more than {allowance.cpu_s} s"
    memory = f"takes more than {allowance.memory_bytes >> 20} MiB of memory"
    if returncode == _OUT_OF_MEMORY:
        return memory
    if returncode == -getattr(signal, "SIGABRT", 0):  # as libraries do that get no memory
        return f"{memory}, or makes the library that reads it abort"
    death = death_of(shell_status(returncode)) or f"ended with status {returncode}"
    return f"ends the process that reads it, which {death}"


def work(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer questions from standard input, within their limits, until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end ends this
    _limit("RLIMIT_CORE", 0)
    _limit("RLIMIT_FSIZE", 0)  # it has nothing to write to a file
    for line in sys.stdin.buffer:
        try:
            asked = json.loads(line)
            set_limits(Allowance(**asked["allowance"]))
            said = json.dumps(answer(asked["question"])).encode()
            sys.stdout.buffer.write(said + b"\n")
            sys.stdout.buffer.flush()
        except MemoryError:
            os._exit(_OUT_OF_MEMORY)
    os._exit(0)  # at once: there is nothing to put away


def set_limits(allowance: Allowance) -> None:
    """Let the system end this process when it has taken so much from now on."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, allowance.cpu_s)  # SIGPROF ends it
    _limit("RLIMIT_DATA", allowance.memory_bytes)
    _limit("RLIMIT_AS", allowance.memory_bytes + _MAPPED_BYTES)  # where DATA counts no mappings


def _limit(name: str, value: int) -> None:
    """Set the soft limit of this process, as far as the system has one and allows that."""
    try:
        import resource
    except ImportError:  # Windows
        return
    with suppress(AttributeError, ValueError, OSError):
        number = getattr(resource, name)
        _, hard = resource.getrlimit(number)
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (most, hard))
