"""Bundles that somebody changed, and what is said to one that is whole."""

import shutil
from pathlib import Path
from random import Random

from edgekit import installed
from edgekit.bundle.manifest import MANIFEST
from edgekit.run import Chat, Runner
from edgekit.runtime.generate import Sampling
from edgekit.tests.attack import mutations, odd_files, samples
from edgekit.tests.attack.attack import OTHER_PROGRAMS_S, Attack, LeftBehindError
from edgekit.tests.attack.commands import call
from edgekit.tests.attack.kinds.bundle_files import rehash


class HostileBundles(Attack):
    """hostile bundles"""

    share = 2.0
    limit_s = OTHER_PROGRAMS_S

    def prepare(self) -> None:
        samples.bundle(self.place / "bundle")
        (self.place / "measurement.json").write_text("{}")

    def case(self, random: Random) -> None:
        work = self.place / "work"
        odd_files.remove(work)
        bundle = shutil.copytree(self.place / "bundle", work / "bundle")
        for _ in range(random.choice((1, 1, 2))):
            names = [path.name for path in bundle.iterdir()]
            self._damage(bundle / random.choice([*names, odd_files.name(random)]), random)
        if random.random() < 0.3:
            _try_to_rehash(bundle)
        before = sorted(path.name for path in bundle.iterdir())
        try:
            call(*self._command(random, bundle))
            after = sorted(path.name for path in bundle.iterdir())
        finally:
            odd_files.remove(work)
        if after != before:
            raise LeftBehindError(f"{after}")

    @staticmethod
    def _damage(path: Path, random: Random) -> None:
        """Damage a file, but leave to others what only llama.cpp reads: it aborts over some."""
        if path.suffix != ".gguf" or random.random() < 0.5:
            odd_files.put(path, random)

    def _command(self, random: Random, bundle: Path) -> tuple[object, ...]:
        measurement = ("--measurement", self.place / "measurement.json")
        return random.choice((
            ("inspect", bundle, "--tensors"),
            ("run", bundle, "hello", "--max-tokens", 1, "--threads", 1),
            ("validate", bundle, *measurement),
            ("serve", bundle, "--port", -1),
        ))  # fmt: skip


def _try_to_rehash(bundle: Path) -> None:
    try:
        if (bundle / MANIFEST).is_file():
            rehash(bundle)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return  # nothing that could be read


class Turns(Attack):
    """turns of a chat"""

    share = 1.0

    def prepare(self) -> None:
        installed.require("llama_cpp", purpose="a chat", extra="run-gguf")
        samples.bundle(self.place / "bundle")

    def open(self) -> None:
        self.runner = Runner.open(self.place / "bundle", threads=1)
        self.chat = Chat(runner=self.runner, max_tokens=2)

    def case(self, random: Random) -> None:
        if random.random() < 0.3:
            system = str(mutations.value(random))
            self.chat = Chat(runner=self.runner, system=system, max_tokens=2)
        self.chat.sampling = Sampling(temperature=random.choice((0, 1, 5.0)), seed=1)
        self.chat.stop = random.choice(((), ("a",), ("<|end|>", "\n")))
        text = "".join(_SAID[random.randrange(len(_SAID))] for _ in range(random.randrange(1, 5)))
        "".join(self.chat.say(text))


_SAID = ("hello", "<|end|>", "<|assistant|>", "\0", "\ud800", "\x1b[2J", "é" * 40, "", " ", "\n",
         "x" * 5000, "a" * 2_000_000, "{{ 1 }}", "{% raw %}", "\u202e", "😀", "\ufffd",
         "<0x00>", "</s>", "'\"\\")  # fmt: skip
