"""The attack finds what it looks for, and edgekit withstands a short one."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgekit.errors import UsageError
from edgekit.runtime.child import environment
from edgekit.tests.attack.attack import Attack, LeftBehindError
from edgekit.tests.attack.running import run


class _Every(Attack):
    """every ending"""

    limit_s = 1.0
    memory_bytes = 32 << 20

    def case(self, random):
        self.random = random.random()
        number = int((self.place / "number").read_text() or 0) if self._later() else 0
        (self.place / "number").write_text(str(number + 1))
        ENDINGS[number % len(ENDINGS)](self.place)

    def _later(self):
        return (self.place / "number").exists()


def _refuse(_):
    raise UsageError("no")


def _leave(place):
    (place / "temporary" / "something").mkdir()


def _leave_and_hang(place):
    _leave(place)
    time.sleep(60)


def _hold(_):
    assert bytearray(b"x") * (64 << 20)


def _lose(_):
    raise LeftBehindError("x.part")


ENDINGS: tuple[Callable[[Any], object], ...] = (
    _refuse,
    lambda _: None,
    lambda place: place.nothing,
    lambda _: os.abort(),
    _refuse,
    lambda _: time.sleep(60),
    lambda _: time.sleep(60),  # it is tried twice
    _leave,
    _hold,
    _hold,  # so is this
    _lose,
    _refuse,
    _leave_and_hang,
    lambda _: None,  # as it was only busy, what it left is nobody's fault
)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="it asks Linux")
def test_every_ending_of_a_case_is_counted(tmp_path):
    count = run(_Every(tmp_path), seed=1, seconds=60, numbers=range(11))
    assert (count.tried, count.refused, count.accepted) == (11, 3, 2)
    assert [(fault.number, fault.kind) for fault in count.faults] == [
        (2, "traceback"), (3, "crash"), (5, "hang"), (6, "left behind"), (7, "memory"),
        (8, "left behind"),
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="it asks Linux")
def test_damaged_files_are_accepted_or_refused():
    pytest.importorskip("tokenizers")
    done = subprocess.run(
        [sys.executable, "-m", "edgekit.tests.attack", "--seconds", "2", "--files", "--only",
         "^(addr|config|goldens|manifest|safetensors|setti|shards)"],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| mutated files together |" in done.stdout


@pytest.mark.toolchain
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="it asks Linux")
def test_hostile_input_kills_and_full_disks_are_withstood():
    done = subprocess.run(
        [sys.executable, "-m", "edgekit.tests.attack", "--seconds", "20", "--only",
         "^(hostile|turns|requests|kill|closed|full|command)"],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| together |" in done.stdout
