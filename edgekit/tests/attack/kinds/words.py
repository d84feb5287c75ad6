"""Targets, addresses of devices and words of the command line."""

import os
import shutil
from pathlib import Path
from random import Random

from edgekit import cli, target
from edgekit.measuring.devices import SshDevice
from edgekit.tests.attack import samples
from edgekit.tests.attack.attack import OTHER_PROGRAMS_S, Attack, DamagedFiles
from edgekit.tests.attack.commands import call
from edgekit.tests.attack.mutations import mutated


class Targets(DamagedFiles):
    """target files"""

    damaged = "*.toml"
    share = 4.0

    def prepare(self) -> None:
        for name, path in target._files().items():
            (self.whole / name).mkdir(parents=True)
            shutil.copy(path, self.whole / name / "target.toml")

    def read(self, directory: Path) -> object:
        loaded = target.load(directory / "target.toml")
        return list(cli.target_lines(loaded))


class Addresses(DamagedFiles):
    """addresses of devices"""

    damaged = "*.txt"

    def prepare(self) -> None:
        self.whole.mkdir()
        for number, url in enumerate(
            ("ssh://pi@raspberrypi.local", "ssh://pi@[fe80::1]:22", "ssh://a:b@host:2222",
             "ssh://pi@pi5?python=/opt/venv/bin/python")
        ):  # fmt: skip
            (self.whole / str(number)).mkdir()
            (self.whole / str(number) / "url.txt").write_text(url)

    def read(self, directory: Path) -> object:
        url = (directory / "url.txt").read_bytes().decode("utf-8", "surrogateescape")
        with SshDevice.parse(url) as device:
            return device.label


_LINES = (
    "plan MODEL --target raspberry-pi-5-8gb --format gguf --quant Q4_K_M --context 64",
    "plan MODEL --target TARGET --variant x --template-var enable_thinking=false",
    "export MODEL --target raspberry-pi-5-8gb --quant F16 --split 100MB --no-verify -o OUT/x",
    "export MODEL --target raspberry-pi-5-8gb --adapter MODEL --calibration MODEL -o OUT/y",
    "merge MODEL --adapter MODEL -o OUT/z --precision bf16",
    "inspect BUNDLE --tensors --json",
    "run BUNDLE hello --max-tokens 2 --threads 1 --temperature 1 --top-p 0.5 --seed 3 --context 32",
    "run BUNDLE hello --system x --stop a --template-var x=1 --max-tokens 1",
    "validate BUNDLE --target raspberry-pi-5-8gb --measurement MODEL --html OUT/h --junit OUT/j",
    "validate BUNDLE --device ssh://[::1 --repetitions 0 --threads 0",
    "serve BUNDLE --host 256.0.0.1 --port -1 --context 0 --threads 0",
    "targets raspberry-pi-5-8gb --json",
    "targets --schema",
    "formats --json",
)


class CommandLines(Attack):
    """command lines"""

    share = 1.0
    limit_s = OTHER_PROGRAMS_S

    def prepare(self) -> None:
        samples.checkpoint(self.place / "model")
        samples.bundle(self.place / "bundle")

    def open(self) -> None:
        self.out = self.place / "temporary" / "out"
        here = self.place / "here"  # where a damaged path may lead to
        here.mkdir(exist_ok=True)
        os.chdir(here)

    def case(self, random: Random) -> None:
        words = random.choice(_LINES).split()
        for _ in range(random.choice((0, 1, 1, 2))):
            index = random.randrange(1, len(words))
            damaged = mutated(
                words[index].encode(errors="surrogateescape"),
                "",
                random,
                other=random.choice(words).encode(errors="surrogateescape"),
            )
            words[index] = damaged[:9000].decode("utf-8", "surrogateescape").replace("\0", "")
        if random.random() < 0.3:
            words.insert(random.randrange(1, len(words)), random.choice(words))
        places = {"MODEL": "model", "BUNDLE": "bundle"}
        words = [str(self.place / places[word]) if word in places else word for word in words]
        words = [word.replace("OUT/", f"{self.out}/") for word in words]
        try:
            call(*words)
        finally:
            shutil.rmtree(self.out, ignore_errors=True)
