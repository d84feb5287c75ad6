"""Processes that are killed, and places that cannot be written."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from random import Random

from edgekit.bundle.manifest import Bundle
from edgekit.errors import MissingDependencyError
from edgekit.runtime.child import environment
from edgekit.tests.attack import samples
from edgekit.tests.attack.attack import OTHER_PROGRAMS_S, Attack, BreachError, LeftBehindError
from edgekit.tests.attack.commands import RefusedError, call


_SLOWER = 1.3  # how much longer than undisturbed a command may run before it is killed
_NEW_MOUNTS = 0x0002_0000  # CLONE_NEWNS of sched.h
_STREAMS = ("<&-", ">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full", "</dev/zero")
_ANSWERS_AT_ONCE = (
    "targets", "formats --json", "--help", "targets nowhere", "plan MODEL --target x",
    "inspect BUNDLE --tensors", "inspect MODEL", "run BUNDLE --max-tokens 1",
)  # fmt: skip


class Kills(Attack):
    """kill -9"""

    share = 26.0  # 2 s for each
    limit_s = OTHER_PROGRAMS_S

    def prepare(self) -> None:
        samples.checkpoint(self.place / "model")
        samples.bundle(self.place / "bundle")
        samples.small_target(self.place / "small.toml")

    def open(self) -> None:
        self.out = self.place / "out" / "bundle"

    def case(self, random: Random) -> None:
        os.environ["EDGEKIT_CACHE"] = str(self.place / "kept")
        if random.random() < 0.5:
            shutil.rmtree(self.place / "kept", ignore_errors=True)
        words = random.choice(self._commands())
        signal_number = random.choice((signal.SIGKILL,) * 9 + (signal.SIGTERM, signal.SIGHUP))
        self._end(words, random.random() * _SLOWER * self._undisturbed_s(words), signal_number)
        if self.out.exists():
            Bundle.load(self.out)
            shutil.rmtree(self.out)
        call(*self._commands()[0])  # the next one removes what it left
        shutil.rmtree(self.out)
        if left := list(self.out.parent.iterdir()):
            raise LeftBehindError(left[0].name)

    def _commands(self) -> tuple[Sequence[object], ...]:
        export = ("export", self.place / "model", "--target", samples.TARGET, "--no-verify")
        run = ("run", self.place / "bundle", "hello", "--max-tokens", 40, "--threads", 1)
        validate = ("validate", self.place / "bundle", "--target", self.place / "small.toml",
                    "--repetitions", 1, "--threads", 1)  # fmt: skip
        return (*((*export, "--quant", quant, "-o", self.out) for quant in ("F16", "Q8_0")),
                (*export, "--format", "onnx", "-o", self.out), run, validate)  # fmt: skip

    def _undisturbed_s(self, words: Sequence[object]) -> float:
        return {"export": 2.0, "run": 1.0, "validate": 4.0}[str(words[0])]

    def _end(self, words: Sequence[object], after_s: float, number: int) -> None:
        """Start a command, and end it by a signal unless it is done before."""
        process = subprocess.Popen(
            [sys.executable, "-m", "edgekit", *map(str, words)], env=environment(),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            process.wait(after_s)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
        _, said = process.communicate()
        if process.returncode not in {0, 3, 4, -9, -15, -1, 143, 129}:
            raise BreachError(f"status {process.returncode} of {words[0]}: {said[-200:]!r}")


class Streams(Attack):
    """closed and full streams"""

    share = 1.0
    limit_s = OTHER_PROGRAMS_S

    def prepare(self) -> None:
        samples.checkpoint(self.place / "model")
        samples.bundle(self.place / "bundle")

    def case(self, random: Random) -> None:
        words = random.choice(_ANSWERS_AT_ONCE).split()
        places = {"MODEL": str(self.place / "model"), "BUNDLE": str(self.place / "bundle")}
        words = [places.get(word, word) for word in words]
        stream = random.choice(_STREAMS)
        done = subprocess.run(
            ["sh", "-c", f'exec "$@" {stream}', "sh", sys.executable, "-m", "edgekit", *words],
            env=environment(), capture_output=True, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if b"Traceback" in done.stderr or b"Exception ignored" in done.stderr:
            raise RuntimeError(done.stderr.decode(errors="replace")[-2000:])
        if done.returncode not in {*range(9), 141}:
            raise BreachError(f"status {done.returncode} with {stream}")
        if done.returncode:
            raise RefusedError("refused")


class FullDisks(Attack):
    """full and read-only disks"""

    share = 2.0
    limit_s = OTHER_PROGRAMS_S

    def prepare(self) -> None:
        self._own_mounts()
        samples.checkpoint(self.place / "model")
        samples.bundle(self.place / "bundle")

    def open(self) -> None:
        self._own_mounts()
        self.disk = self.place / "disk"
        self.disk.mkdir(exist_ok=True)

    @staticmethod
    def _own_mounts() -> None:
        """Let what is mounted be seen, and last, in this process only."""
        is_apart = ctypes.CDLL(None).unshare(_NEW_MOUNTS) == 0
        done = subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True, check=False)
        if not is_apart or done.returncode:
            raise MissingDependencyError("mounting a small disk needs root")

    def case(self, random: Random) -> None:
        kilobytes = random.choice((4, 40, 100, 200, 300, 400, 600, 2000))
        is_read_only = random.random() < 0.3
        self._run("mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "attack", self.disk)
        try:
            if is_read_only:
                self._run("mount", "-o", "remount,ro", self.disk)
            self._fill(random)
        finally:
            self._run("umount", self.disk)

    def _fill(self, random: Random) -> None:
        out, kept = self.disk / "sub" / "out", {key: os.environ[key] for key in ("EDGEKIT_CACHE",)}
        export = ("export", self.place / "model", "--target", samples.TARGET, "--no-verify")
        command: Sequence[object] = random.choice((
            (*export, "-o", out),
            (*export, "--format", "onnx", "-o", out),
            (*export, "--split", "100kB", "-o", out),
            ("merge", self.place / "model", "--precision", "f32", "-o", out),
            (*export, "-o", self.place / "elsewhere"),  # with its cache on the disk
        ))  # fmt: skip
        if command[-1] != out:
            os.environ["EDGEKIT_CACHE"] = str(self.disk / "cache")
        try:
            call(*command)
        except RefusedError:
            if out.parent.exists() and list(out.parent.iterdir()):
                raise LeftBehindError("after a refusal") from None
            raise
        finally:
            os.environ.update(kept)
            shutil.rmtree(self.place / "elsewhere", ignore_errors=True)

    @staticmethod
    def _run(*words: object) -> None:
        subprocess.run(list(map(str, words)), check=True)
