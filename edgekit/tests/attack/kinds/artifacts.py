"""Artifacts of every format, damaged one file at a time."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

from edgekit import formats, installed
from edgekit.progress import Silent
from edgekit.runtime.child import environment
from edgekit.source.gguf import write_from_gguf
from edgekit.tests.attack import samples
from edgekit.tests.attack.attack import DamagedFiles


class _Artifacts(DamagedFiles):
    format: ClassVar[str]

    def open(self) -> None:
        self.running, ending = formats.running(self.format), formats.get(self.format).ENDING
        inputs = (self.place / "work" / path.name for path in self.whole.glob("[!.]*"))
        copies = {path: self.whole / path.name for path in inputs}
        self.entries = {
            path: path / next(whole.rglob(f"*{ending}")).relative_to(whole)
            for path, whole in copies.items()
        }
        super().open()

    def prepare(self) -> None:
        for recipe in (None, list(formats.get(self.format).RECIPES)[-1]):
            samples.artifact(self.whole / (recipe or "plain"), self.format, recipe)

    def entry(self, directory: Path) -> Path:
        return self.entries[directory]

    def read(self, directory: Path) -> object:
        entry = self.entry(directory)
        found = self.running.contents(entry), self.running.own_template(entry)
        return found, [path.stat().st_size for path in self.running.files(entry)]


class GgufArtifacts(_Artifacts):
    """GGUF artifacts"""

    format = "gguf"
    damaged = "*.gguf"
    share = 3.0


class OnnxArtifacts(_Artifacts):
    """ONNX artifacts"""

    format = "onnx"
    damaged = "onnx/*"
    share = 3.0


class MlcArtifacts(_Artifacts):
    """MLC artifacts"""

    format = "mlc"
    damaged = "tensor-cache.json"


class ExecutorchArtifacts(_Artifacts):
    """ExecuTorch artifacts"""

    format = "executorch"
    damaged = "*.pte"
    share = 2.0

    def prepare(self) -> None:
        for package in ("executorch", "torch"):
            installed.require(package, purpose="programs to damage", extra="executorch")
        for variant in ("portable", "vulkan", "coreml"):
            subprocess.run(
                [sys.executable, "-c", _EXPORT, str(self.whole / variant), variant],
                env=environment(), check=variant == "portable",
            )  # fmt: skip


_EXPORT = """
import shutil, sys
from edgekit.tests.tiny.executorch_artifacts import tiny
shutil.copytree(tiny(sys.argv[2]), sys.argv[1])
"""


class GgufModels(DamagedFiles):
    """GGUF models"""

    damaged = "*.gguf"
    share = 2.0

    def prepare(self) -> None:
        installed.require("gguf", purpose="GGUF models", extra="gguf")
        samples.artifact(self.whole / "model", "gguf")

    def read(self, directory: Path) -> None:
        out = self.place / "temporary" / "decoded"
        try:
            write_from_gguf(directory / "model.gguf", out, listener=Silent())
        finally:
            shutil.rmtree(out, ignore_errors=True)
