"""Run an attack in processes of its own, and count how its cases end.

Such a process and its parent share a page of memory: which case is being tried, since when, and how
the earlier ones ended. So one that hangs is killed, of one that crashes it is known over what, and
the next process goes on with the case after it.
"""

import contextlib
import faulthandler
import json
import mmap
import os
import signal
import struct
import time
import traceback
from collections.abc import Callable
from dataclasses import astuple, dataclass, field
from pathlib import Path

from edgekit.errors import MissingDependencyError
from edgekit.tests.attack.attack import Attack
from edgekit.tests.attack.trying import Fault, Outcome, try_cases


FAULTS = ("traceback", "crash", "hang", "memory", "left behind", "breach")
_OPENING_S = 120
_SAYING_S = 0.2
EVERY = 10**9  # more cases than there is time for


@dataclass
class Count:
    """How the cases of one attack ended."""

    title: str
    is_file_mutation: bool
    skipped: str = ""  # why none was tried
    tried: int = 0
    refused: int = 0
    accepted: int = 0
    faults: list[Fault] = field(default_factory=list)

    def of(self, kind: str) -> int:
        return sum(fault.kind == kind for fault in self.faults)


def run(attack: Attack, *, seed: int, seconds: float, numbers: range = range(EVERY)) -> Count:
    """Try cases for so many seconds, one at least.

    Args:
        attack: Whose ``place`` is an empty directory.
        seed: With the number of a case it decides what the case is.
        seconds: From when everything is prepared.
        numbers: Of the cases, if not all.
    """
    count = Count(attack.title(), attack.is_file_mutation)
    count.skipped = _prepare(attack)
    until = time.monotonic() + seconds
    suspect = None  # a case that took too long: once more, as the machine may have been busy
    while numbers and not count.skipped:
        ended = _Process(attack, seed=seed, numbers=numbers, until=until).watch()
        is_second = suspect == ended.number
        suspect = ended.number if ended.fault and ended.fault.kind == "hang" else None
        tried = ended.number - numbers.start
        if ended.fault and (suspect is None or is_second):
            count.faults.append(ended.fault)
            tried += 1
        count.tried += tried
        count.refused += ended.refused
        count.accepted += ended.accepted
        count.faults += ended.faults
        numbers = numbers[tried:]
        if ended.fault is None or (time.monotonic() > until and suspect is None):
            break
    count.faults.sort(key=lambda fault: fault.number)
    assert count.tried == count.refused + count.accepted + len(count.faults)
    return count


def _prepare(attack: Attack) -> str:
    """Prepare, in a process of its own; return why that is not possible here, "" if it is."""
    reason = attack.place / "reason"

    def prepare() -> None:
        try:
            attack.prepare()
        except (MissingDependencyError, ImportError) as error:
            reason.write_text(str(error) or "not installed")

    _, status = os.waitpid(_start(prepare, attack.place / "preparation"), 0)
    if status != 0:
        said = (attack.place / "preparation").read_text(errors="replace")
        raise RuntimeError(f"{attack.title()} cannot be prepared:\n{said}")
    return reason.read_text() if reason.exists() else ""


def _start(work: Callable[[], None], words: Path) -> int:
    """Fork a process that works, in a session of its own, and writes what it says to a file."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        for descriptor, path, flags in (
            (0, os.devnull, os.O_RDONLY),
            (1, words, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND),
        ):
            os.dup2(os.open(path, flags), descriptor)
        os.dup2(1, 2)
        faulthandler.enable(2)
        faulthandler.register(signal.SIGUSR1, 2)
        work()
        status = 0
    except BaseException:  # noqa: BLE001 - the parent reads it
        traceback.print_exc()
    finally:
        os._exit(status)


class _Process:
    """A process that tries cases until it comes to their end, or to its own."""

    _BOARD = struct.Struct("<qqqd")  # the case being tried, refused, accepted, since when

    def __init__(self, attack: Attack, *, seed: int, numbers: range, until: float) -> None:
        self._attack, self._seed, self._numbers, self._until = attack, seed, numbers, until
        self._page = mmap.mmap(-1, mmap.PAGESIZE)
        self._log = attack.place / "faults"
        self._log.unlink(missing_ok=True)
        self._words = attack.place / "words"
        self.number, self.refused, self.accepted = numbers.start, 0, 0
        self.faults: list[Fault] = []
        self.fault: Fault | None = None  # what ended the process, in case ``number``
        self._write(time.monotonic() + _OPENING_S)

    def watch(self) -> "_Process":
        """Start it, and return when it has ended."""
        pid = _start(self._work, self._words)
        try:
            status = self._wait(pid)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # what it may have started, too
        self.number, self.refused, self.accepted, since = self._BOARD.unpack_from(self._page)
        said = self._words.read_text(errors="replace")[-4000:]
        if status and since > time.monotonic():  # not in a case
            raise RuntimeError(f"{self._attack.title()} cannot be tried:\n{said}")
        if self._log.exists():
            lines = self._log.read_text().splitlines()
            self.faults = [Fault(*json.loads(line)) for line in lines]
        if status is None:
            self.fault = Fault(self.number, "hang", f"over {self._attack.limit_s} s", said)
        elif status:
            self.fault = Fault(self.number, "crash", f"the process ended with {status}", said)
        return self

    def _wait(self, pid: int) -> int | None:
        """Return the status of the process, None if it has to be killed."""
        pause_s = 0.001
        while True:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            *_, since = self._BOARD.unpack_from(self._page)
            if time.monotonic() - since > self._attack.limit_s:
                os.kill(pid, signal.SIGUSR1)  # it says where it is
                time.sleep(_SAYING_S)
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return None
            time.sleep(pause_s)
            pause_s = min(0.1, 2 * pause_s)

    def _work(self) -> None:
        try_cases(
            self._attack,
            seed=self._seed,
            numbers=self._numbers,
            until=self._until,
            started=self._started,
            ended=self._ended,
        )

    def _write(self, since: float) -> None:
        self._BOARD.pack_into(self._page, 0, self.number, self.refused, self.accepted, since)

    def _started(self, number: int) -> None:
        self.number = number
        self._write(time.monotonic())

    def _ended(self, outcome: Outcome) -> None:
        if isinstance(outcome, Fault):
            with self._log.open("a") as log:
                log.write(json.dumps(astuple(outcome)) + "\n")
        self.refused += outcome == "refused"
        self.accepted += outcome == "accepted"
        self.number += 1
        self._write(time.monotonic() + _OPENING_S)
