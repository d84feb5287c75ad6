"""ONNX in a browser: ONNX Runtime Web."""

from pathlib import Path

from edgekit.formats import BrowserRequest, GpuBuffer, NpmPackage
from edgekit.formats.onnx import model
from edgekit.formats.onnx.graph import ROPE_BORDER


RUNTIME = "ONNX Runtime Web"
# The version that transformers.js 4.3.1 asks for.
PACKAGES = (
    NpmPackage(
        name="onnxruntime-web",
        version="1.31.0-dev.20260914-8d85527a0",
        integrity=(
            "sha512-Iy7rtadoBgxS/LLvDr3QW38DB1PNXRnr0GJMcL0TAt7c9qjgVQl83UlGCVyeAnK2InpmW8Uc3PL8XIuq"
            "tDeF6g=="
        ),
    ),
)
IMPORTS = {"onnxruntime-web/webgpu": "/npm/onnxruntime-web/dist/ort.webgpu.bundle.min.mjs"}
MODULE = Path(__file__).with_name("browsing.mjs")


def request(path: Path, *, context_tokens: int) -> BrowserRequest:
    """Return what the page is told to open.

    Raises:
        BundleError: If the model file is damaged.
    """
    del context_tokens  # the cache grows with the text
    weights = model.read(path)
    largest = max(weights, key=lambda weight: weight.size_bytes)
    border = model.metadata(path).get(ROPE_BORDER)
    return BrowserRequest(
        entry=path.name,
        files=tuple(file.name for file in model.files(path)),
        features=("shader-f16",) if any(w.dtype == "float16" for w in weights) else (),
        largest_buffer=GpuBuffer(name=largest.name, size_bytes=largest.size_bytes),
        settings={
            "outputs": model.outputs(path),
            "border": None if border is None else int(border),
        },
    )
