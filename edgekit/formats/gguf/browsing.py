"""GGUF in a browser: wllama, which is llama.cpp in WebAssembly and on WebGPU."""

from pathlib import Path

from edgekit.formats import BrowserRequest, NpmPackage
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
