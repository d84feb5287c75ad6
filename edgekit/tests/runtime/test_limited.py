"""A child with limits: what it is asked costs no more, whatever it does, and nothing is left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgekit.runtime import limited
from edgekit.runtime.child import environment
from edgekit.runtime.limited import Allowance, OverLimitError, Worker


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the system has no such limits")

# What the child does with a question.
CHILD = """\
import os
import time

from edgekit.runtime.limited import work


def answer(question):
    match question["do"]:
        case "echo":
            return question
        case "take":
            return {"size": len(bytearray(question["size_bytes"]))}
        case "compute":
            return {"number": 7 ** 3_000_000_000}
        case "wait":
            time.sleep(60)
        case "exit":
            os._exit(7)
        case "abort":
            os.abort()
        case "write":
            try:
                with open(question["path"], "w") as file:
                    file.write("x")
            except OSError as error:
                return {"refusal": str(error)}
    return {"pid": os.getpid()}


work(answer)
"""
MIB = 1 << 20
SMALL = Allowance(cpu_s=1, memory_bytes=64 * MIB)


@pytest.fixture
def worker(tmp_path, monkeypatch):
    (tmp_path / "child_of_a_test.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    made = Worker("child_of_a_test")
    yield made
    made.close()


def test_it_answers_one_question_after_another_in_the_same_process(worker):
    odd = {"do": "echo", "text": "\ud800 \n 日本語 \x00", "numbers": [2**70, 0.1, None]}
    assert worker.ask(odd, SMALL) == odd
    first, second = (worker.ask({"do": "who"}, SMALL) for _ in range(2))
    assert first == second != {"pid": os.getpid()}


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        ({"do": "take", "size_bytes": 80 * MIB}, "takes more than 64 MiB of memory"),
        pytest.param({"do": "compute"}, "takes more than 1 s", marks=pytest.mark.slow),
        ({"do": "exit"}, "ends the process that reads it, which ended with status 7"),
        ({"do": "abort"}, "takes more than 64 MiB of memory, or makes the library .* abort"),
    ],
)
def test_what_takes_too_much_is_ended_and_the_next_question_is_answered(worker, question, reason):
    with pytest.raises(OverLimitError, match=f"^{reason}$"):
        worker.ask(question, SMALL)
    assert worker.ask({"do": "take", "size_bytes": 8 * MIB}, SMALL) == {"size": 8 * MIB}


def test_each_question_has_an_allowance_of_its_own(worker):
    large = Allowance(cpu_s=1, memory_bytes=256 * MIB)
    assert worker.ask({"do": "take", "size_bytes": 80 * MIB}, large) == {"size": 80 * MIB}
    with pytest.raises(OverLimitError, match="64 MiB"):
        worker.ask({"do": "take", "size_bytes": 80 * MIB}, SMALL)


def test_what_waits_is_ended_by_the_clock(worker, monkeypatch):
    monkeypatch.setattr(limited, "_CLOCK_PER_CPU", 0.5)
    with pytest.raises(OverLimitError, match="takes more than 1 s"):
        worker.ask({"do": "wait"}, SMALL)


def test_it_cannot_write_a_file(worker, tmp_path):
    path = tmp_path / "file"
    signal.signal(signal.SIGXFSZ, signal.getsignal(signal.SIGXFSZ))
    assert "too large" in worker.ask({"do": "write", "path": str(path)}, SMALL)["refusal"]
    assert path.read_text() == ""


def test_it_ends_with_its_parent_even_if_that_is_killed(worker):
    ask = "import sys, time; from edgekit.runtime.limited import *; w = Worker('child_of_a_test')"
    ask += "; print(w.ask({'do': 'who'}, Allowance(cpu_s=1, memory_bytes=1 << 28))['pid'])"
    ask += "; sys.stdout.flush(); time.sleep(60)"
    parent = subprocess.Popen(
        [sys.executable, "-c", ask], stdout=subprocess.PIPE, text=True, env=environment()
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert Path(f"/proc/{pid}").exists()
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 10
    while _is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _is_running(pid)


def test_a_fork_has_a_child_of_its_own(worker):
    ask = "import os; from edgekit.runtime.limited import *; w = Worker('child_of_a_test')"
    ask += "; who = lambda: w.ask({'do': 'who'}, Allowance(cpu_s=2, memory_bytes=1 << 28))['pid']"
    ask += "; who(); fork = os.fork(); print(who(), flush=True); fork and os.wait()"
    ask += "; fork or os._exit(0)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ask],
        capture_output=True, text=True, check=True, env=environment(), timeout=60,
    )  # fmt: skip
    assert len(set(done.stdout.split())) == 2


def _is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
