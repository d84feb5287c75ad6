"""A format and a bundle that tests put in place, so that the measuring is real and small.

`RUNNING` has a session that does a little arithmetic for every token. It is found by
any interpreter that has its directory on PYTHONPATH, through a ``sitecustomize`` next to it.
"""

import sys
from dataclasses import replace
from pathlib import Path

from edgekit import formats
from edgekit.bundle.manifest import Agreement, Artifact, Bundle, Gate, ModelRecord
from edgekit.target import Budget, FirstTokenLimit, Target, load
from edgekit.text.rules import TextRules


SITECUSTOMIZE = """
from pathlib import Path

import edgekit.formats

edgekit.formats.__path__.append(str(Path(__file__).parent / "formats"))
"""

FACE = '''
"""A stand-in format; its "runtime" adds numbers."""

RUN_EXTRA = "run-gguf"
'''

WRITING = '''
"""It writes nothing."""


def convert(checkpoint, request, directory, *, progress):
    raise NotImplementedError
'''

RUNNING = '''
"""A stand-in format; its "runtime" adds numbers."""

import os
import signal

from edgekit.errors import MissingDependencyError


def is_run_here(variant):
    return True


class PretendSession:
    vocabulary_tokens = 64

    def __init__(self, path, context_tokens):
        import numpy as np

        self.weights = np.frombuffer(path.read_bytes(), dtype=np.uint8).astype(np.float32)
        self.context_tokens = context_tokens
        self.seen = []

    def prefill(self, ids):
        self.seen.extend(ids)
        assert len(self.seen) <= self.context_tokens
        return sum((self.step(token) for token in ids[:-1]), self.step(ids[-1]))

    def decode(self, token):
        self.seen.append(token)
        return self.step(token)

    def step(self, token):
        import numpy as np

        return np.roll(self.weights[:64], token) + self.weights.mean()

    def reset(self):
        self.seen.clear()

    def close(self):
        self.weights = None


def runtime_state():
    return "a pretended runtime"


def load(path, *, context_tokens, threads=None):
    mood = os.environ.get("PRETEND_MOOD")
    if mood == "no runtime":
        raise MissingDependencyError("pretend_runtime is not installed", hint="pip")
    if mood == "no memory":
        os.kill(os.getpid(), signal.SIGKILL)
    if mood == "crash":
        raise ZeroDivisionError("a foreign bug")
    if mood == "old processor":
        os.kill(os.getpid(), signal.SIGILL)
    return PretendSession(path, context_tokens)
'''


def install(directory: Path) -> Path:
    """Write the format where ``directory`` on PYTHONPATH makes every interpreter find it."""
    package = directory / "formats" / "pretend"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FACE)
    (package / "writing.py").write_text(WRITING)
    (package / "running.py").write_text(RUNNING)
    (directory / "sitecustomize.py").write_text(SITECUSTOMIZE)
    return directory


def use(directory: Path, monkeypatch) -> None:
    """Put the format in place for this process and for those that it starts."""
    monkeypatch.setenv("PYTHONPATH", str(install(directory)))
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(directory / "formats")])
    for name in ("", ".writing", ".running"):
        monkeypatch.delitem(sys.modules, f"edgekit.formats.pretend{name}", raising=False)


def make_bundle(directory: Path, *, is_proven: bool = True, size_bytes: int = 200_000) -> Bundle:
    """Write a bundle of this format."""
    directory.mkdir()
    (directory / "model.bin").write_bytes(bytes(range(256)) * (size_bytes // 256))
    gate = Gate(name="logits", passed=True, finding="mean KL 0.001")
    proof = Agreement(
        gates=(gate,),
        positions=100,
        mean_kl_nats=0.001,
        p99_kl_nats=0.01,
        same_top_token=0.98,
        perplexity_ratio=1.01,
        said_by="llama.cpp",
    )
    bundle = Bundle(
        directory=directory,
        model=ModelRecord(name="tiny", sha256="0" * 64, architecture="llama", parameters=1000),
        target="raspberry-pi-5-8gb",
        context_tokens=64,
        text=TextRules(stop_ids=(2,), special_tokens={}, adds_bos=False, chat_template_sha256=None),
        artifact=Artifact.of_directory(directory, "model.bin", format="pretend", recipe="none"),
        agreement=proof if is_proven else None,
        predicted={"artifact_bytes": 200_000.0, "peak_memory_bytes": 45e6},
        tools={"numpy": "1"},
    )
    bundle.save()
    return bundle


def make_target(**limits) -> Target:
    """Return a target with a budget that anything meets, ``limits`` apart."""
    budget = Budget(
        artifact_bytes=10**9,
        peak_memory_bytes=10**9,
        load_s=100.0,
        first_token=(FirstTokenLimit(prompt_tokens=8, limit_s=10.0),),
        decode_tokens_per_s=0.001,
        answer_tokens=8,
        context_tokens=64,
    )
    return replace(load("raspberry-pi-5-8gb"), cpu_features=(), budget=replace(budget, **limits))
