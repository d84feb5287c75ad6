"""GGUF in a browser: wllama, which is llama.cpp in WebAssembly and on WebGPU."""

from pathlib import Path

from edgekit.formats import BrowserMemory, BrowserRequest, NpmPackage
from edgekit.formats.gguf import split


RUNTIME = "wllama"
PACKAGES = (
    NpmPackage(
        name="@wllama/wllama",
        version="3.13.0",
        integrity=(
            "sha512-ZvoRdQAn+E+18EvQ9qS036gudiI9rbZRBJgG/qNICPPwrA0Y6SMMdbziz/j7K/0WxcbJlhaRraVIYsnE"
            "y732NA=="
        ),
    ),
)
IMPORTS = {"@wllama/wllama": "@wllama/wllama/esm/index.min.js"}
MODULE = Path(__file__).with_name("browsing.mjs")
CHAT = Path(__file__).with_name("chat.mjs")

# Measured, in MiB: 703 with a model of 91 (Q4_0), 726 with 142 (Q8_0), 872 with 262 (F16), which
# gives 701, 752 and 872. On WebGPU nothing was: no adapter of software has shader-f16.
MEMORY = {"wasm": BrowserMemory(base_bytes=610 * 2**20, copies=1.0)}


def request(path: Path, *, context_tokens: int) -> BrowserRequest:
    """Return what the page is told to open.

    Raises:
        BundleError: If a part of a model that is split is missing.
    """
    del context_tokens  # the page is told it in any case
    return BrowserRequest(
        reads_text=True,
        entry=path.name,
        files=tuple(file.name for file in split.paths(path)),
        features=("shader-f16",),  # llama.cpp's WebGPU back-end does not start without
    )
