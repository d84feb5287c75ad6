"""A tiny ONNX bundle, and what a browser needs to open it."""

import shutil
import tempfile
from pathlib import Path

import pytest

from edgekit.browser import chromium
from edgekit.bundle.manifest import Bundle
from edgekit.errors import MissingDependencyError
from edgekit.export import export
from edgekit.text.tokenizer import Text


CONTEXT_TOKENS = 128
PROMPT = [5 + 7 * index % 90 for index in range(40)]


@pytest.fixture(scope="session")
def needs_browser():
    """Skip the test where there is no Chromium, or no npm."""
    try:
        chromium.find()
    except MissingDependencyError as error:
        pytest.skip(f"{error}: {error.hint}")
    if shutil.which("npm") is None:
        pytest.skip("needs npm: apt install npm")


@pytest.fixture(scope="session")
def onnx_bundle(needs_browser, tiny_checkpoint, tmp_path_factory):
    """Of a random Llama of three layers, proven and for a browser; read only."""
    pytest.importorskip("torch")
    pytest.importorskip("onnxruntime")
    out = tmp_path_factory.mktemp("browser") / "onnx"
    export(
        tiny_checkpoint, "webgpu-desktop-integrated", format="onnx", quant="F32", out=out,
        context_tokens=CONTEXT_TOKENS,
    )  # fmt: skip
    return Bundle.load(out)


@pytest.fixture(scope="session")
def onnx_text(onnx_bundle):
    return Text.open(onnx_bundle.directory, onnx_bundle.text)


@pytest.fixture
def short_place():
    """A path that leaves room for the name of a socket."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        yield Path(name)
