"""Try cases one after another in this process, and say how each ends."""

import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from edgekit.errors import EdgekitError
from edgekit.tests.attack.attack import Attack, BreachError, LeftBehindError


_ADDRESS_SPACE_BYTES = 8 << 30  # above what is loaded: no case may take the machine down
_LARGEST_FILE_BYTES = 1 << 30
_LOG_CHARACTERS = 4000
_PACKAGE = Path(__file__).parents[2]


@dataclass(frozen=True)
class Fault:
    """A case that ended otherwise than by an answer or a refusal."""

    number: int  # of the case
    kind: str
    cause: str  # the same for cases that found the same
    log: str = ""


Outcome = str | Fault  # "refused" or "accepted"
Started = Callable[[int], None]  # told the number of a case before it is tried
Ended = Callable[[Outcome], None]


def try_cases(
    attack: Attack, *, seed: int, numbers: range, until: float, started: Started, ended: Ended
) -> None:
    """Try cases, one at least, in this process, which is changed by it: limits, directories."""
    temporary = attack.place / "temporary"
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed while it worked
    temporary.mkdir()
    os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
    os.environ["EDGEKIT_CACHE"] = str(attack.place / "cache")
    attack.open()
    limit_process()
    memory = _Memory(attack.memory_bytes)
    for number in numbers:
        started(number)
        outcome = _try(attack, seed, number)
        if memory.has_grown():  # by this case, or slowly by many
            outcome = _try(attack, seed, number)
            if memory.has_grown():
                outcome = Fault(number, "memory", f"over {attack.memory_bytes} bytes")
        left = next(temporary.iterdir(), None)
        if left is not None:
            outcome = Fault(number, "left behind", f"in the temporary directory: {left.name[:12]}…")
            shutil.rmtree(temporary)
            temporary.mkdir()
        ended(outcome)
        if time.monotonic() > until:
            break


def _try(attack: Attack, seed: int, number: int) -> Outcome:
    try:
        attack.case(Random(f"{seed} {attack.title()} {number}"))
    except EdgekitError:
        return "refused"
    except MemoryError as error:
        return _fault(number, "memory", error)
    except LeftBehindError as error:
        return _fault(number, "left behind", error)
    except BreachError as error:
        return _fault(number, "breach", error)
    except BaseException as error:  # noqa: BLE001 - a panic of a foreign library is no Exception
        return _fault(number, "traceback", error)
    return "accepted"


def _fault(number: int, kind: str, error: BaseException) -> Fault:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [it for it in frames if Path(it.filename).is_relative_to(_PACKAGE)]
    own = [it for it in ours if "attack" not in Path(it.filename).parts] or ours
    where = f"{Path(own[-1].filename).relative_to(_PACKAGE)}:{own[-1].name}" if own else "?"
    detail = f": {str(error)[:80]!r}" if kind in {"left behind", "breach"} else ""
    log = "".join(traceback.format_exception(error))
    return Fault(number, kind, f"{type(error).__name__} in {where}{detail}", log[-_LOG_CHARACTERS:])


def limit_process() -> None:
    """Let this process, and what it starts, take no more than a machine can give."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    space = pages * resource.getpagesize() + _ADDRESS_SPACE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_LARGEST_FILE_BYTES, _LARGEST_FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.setrecursionlimit(1000)  # as everywhere


class _Memory:
    """How much more this process holds at most than when it was last asked to forget that."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._rebase()

    def has_grown(self) -> bool:
        """Tell whether it is over the limit, and if so, count from here on."""
        if self._peak_bytes() - self._base_bytes <= self._limit_bytes:
            return False
        self._rebase()
        return True

    def _rebase(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is held now
        self._base_bytes = self._peak_bytes()

    @staticmethod
    def _peak_bytes() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return 1024 * int(line.split()[1])
        raise OSError("this system does not say how much memory a process holds")
