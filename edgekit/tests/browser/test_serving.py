"""`edgekit serve` on a bundle for browsers: its page, and the API where that can be served."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

import edgekit


pytestmark = [
    pytest.mark.toolchain,
    pytest.mark.usefixtures("needs_browser"),
    pytest.mark.skipif(os.name != "posix", reason="sends signals"),
]
WITHOUT_API = """
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "uvicorn" else found(name, *rest)
"""


@pytest.fixture(params=["", WITHOUT_API])
def lines(request, onnx_bundle):
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"{request.param}\nfrom edgekit import cli\n"
        f"cli.main(['serve', {str(onnx_bundle.directory)!r}, '--port', '0'])\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stderr=subprocess.PIPE, text=True,
        cwd=Path(edgekit.__file__).parents[1],
    ) as process:  # fmt: skip
        assert process.stderr
        found = [process.stderr.readline() for _ in range(2)]
        yield found
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=20)
        finally:
            process.kill()


@pytest.fixture
def http():
    with httpx.Client(trust_env=False, timeout=10) as client:
        yield client


def test_the_page_of_a_bundle_for_browsers_is_served_with_its_runtime(lines, onnx_bundle, http):
    page = next(line for line in lines if "its page is" in line)
    url = next(word.rstrip(";") for word in page.split() if word.startswith("http://"))

    index = http.get(url)
    assert index.headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert index.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    assert index.text == (onnx_bundle.directory / "index.html").read_text()
    runtime = "node_modules/onnxruntime-web/dist/ort.webgpu.bundle.min.mjs"
    assert http.get(url + runtime).headers["Content-Type"].startswith("text/javascript")
    assert http.get(url + "onnx/model.onnx").content == onnx_bundle.artifact_path.read_bytes()
    assert http.get(url + "../../etc/passwd").status_code == 404
    has_api = "the page alone" not in lines[0]
    assert (http.get(url + "v1/models").status_code == 200) == has_api
