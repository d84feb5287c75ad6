"""ONNX in a browser: ONNX Runtime Web."""

from pathlib import Path

from edgekit.formats import BrowserMemory, BrowserRequest, GpuBuffer, NpmPackage
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
    NpmPackage(  # of the page in a bundle, which reads and writes text
        name="@huggingface/transformers",
        version="4.3.1",
        integrity=(
            "sha512-5+voSeUCFK6PCKlY15dPhNOKq3/zOTxDN7oC+Wy9dFb1QZ0TSQomZRRy7URRK8YRuUoE9fGMQTTPC5d/"
            "pWBJhA=="
        ),
    ),
)
IMPORTS = {
    "onnxruntime-web/webgpu": "onnxruntime-web/dist/ort.webgpu.bundle.min.mjs",
    "@huggingface/transformers": "@huggingface/transformers/dist/transformers.min.js",
}
MODULE = Path(__file__).with_name("browsing.mjs")
CHAT = Path(__file__).with_name("chat.mjs")

# Measured: wasm 624 MiB with a model of 1 MiB, 760 with 97 (UINT4), 823 with 146 (INT8), 1838 with
# 515 (F32), which gives 582, 793, 901 and 1713; WebGPU 890, 1202, 1268 and 2372: 913, 1186, 1326
# and 2378.
MEMORY = {
    "wasm": BrowserMemory(base_bytes=580 * 2**20, copies=2.2),
    "webgpu": BrowserMemory(base_bytes=910 * 2**20, copies=2.85),
}


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
