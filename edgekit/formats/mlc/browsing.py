"""MLC in a browser: WebLLM."""

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from edgekit.encodings.json_files import read_object
from edgekit.errors import BundleError, UsageError
from edgekit.formats import BrowserMemory, BrowserRequest, GpuBuffer, NpmPackage
from edgekit.formats.mlc import chat_config, shards, web_app


RUNTIME = "WebLLM"
PACKAGES = (
    NpmPackage(
        name="@mlc-ai/web-llm",
        version=web_app.PREBUILT_FOR,
        integrity=(
            "sha512-plciXBCYtY7iTKHzEcsqOfSO+s5u8NqMYFPnHmRbsN8CEdKcolgXIoGLPbzO6FtJHV43m7YP00x6qQ6Kb"
            "8CJJw=="
        ),
    ),
)
IMPORTS = {"@mlc-ai/web-llm": "@mlc-ai/web-llm/lib/index.js"}
MODULE = Path(__file__).with_name("browsing.mjs")
CHAT = None  # `web_app` writes a page of its own

# Measured, in MiB: 661 with a model of two layers, 868 with 72 (SmolLM2-135M, q4f32_1), which gives
# 660 and 869.
MEMORY = {"webgpu": BrowserMemory(base_bytes=660 * 2**20, copies=2.9)}


def request(path: Path, *, context_tokens: int) -> BrowserRequest:
    """Return what the page is told to open.

    Raises:
        BundleError: If WebLLM's settings are damaged.
        UsageError: If the bundle has no compiled library, or one for another WebLLM.
    """
    settings = read_object(path.with_name(web_app.SETTINGS), refusal=BundleError)
    try:
        record, known = settings["model_list"][0], settings["edgekit"]
        library, version = str(record["model_lib"]), str(known["webllm_version"])
        features, buffer = record["required_features"], _largest_buffer(record, known)
    except (LookupError, TypeError) as error:
        raise BundleError(
            f"{path.with_name(web_app.SETTINGS)} is not as edgekit wrote it: it lacks {error}"
        ) from error
    origin = _origin(path, library, version)
    record["overrides"] = {**record["overrides"], "context_window_size": context_tokens}
    config = chat_config.read(path.with_name(chat_config.NAME))
    return BrowserRequest(
        entry=path.name,
        files=tuple(file.name for file in shards.files(path)),
        features=tuple(features),
        largest_buffer=buffer,
        runs_in_wasm=False,
        settings={
            "record": record,
            "address": web_app.ADDRESS,
            "vocabulary": config["vocab_size"],
        },
        connects_to=(origin,) if origin else (),
    )


def _largest_buffer(record: dict[str, Any], known: dict[str, Any]) -> GpuBuffer | None:
    size = record.get("buffer_size_required_bytes")
    return None if size is None else GpuBuffer(name=str(known["largest_buffer"]), size_bytes=size)


def _origin(path: Path, library: str, version: str) -> str | None:
    """Return whose library the page must fetch, None where it lies in the bundle."""
    if version != web_app.PREBUILT_FOR:
        raise UsageError(
            f"the library of {path.parent} is for WebLLM {version}, the browser here gets WebLLM "
            f"{web_app.PREBUILT_FOR}",
            hint="export it again",
        )
    name = library.removeprefix(web_app.ADDRESS)
    if name == library:
        parts = urlsplit(library)
        return f"{parts.scheme}://{parts.netloc}"
    if not (path.parent / name).is_file():
        raise UsageError(
            f"{path.parent} has no library for WebLLM: {name} is not there, and none that is "
            "prebuilt fits the model",
            hint="export it again with --compile, or as onnx or gguf for a browser",
        )
    return None
