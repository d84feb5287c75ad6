"""The part of a bundle that an app in a browser takes: what WebLLM is told, and a page that chats.

``webllm.json`` is WebLLM's ``appConfig``, with what an app must know besides it under ``edgekit``.
WebLLM takes whole addresses only, so it has those at which `edgekit serve` shows a bundle, for an
app that is served from there; ``webllm.mjs`` puts its own in their place.
``webllm.mjs`` loads it and says in a sentence what is missing; ``index.html`` is a page around it.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from edgekit.formats import PAGE, GpuBuffer
from edgekit.formats.mlc.conversation import WITH_SYSTEM, Conversation, keeps_cache


SETTINGS = "webllm.json"
PAGE_DIRECTORY = Path(__file__).parent
PAGE_FILES = (
    PAGE_DIRECTORY / "webllm.mjs", PAGE_DIRECTORY / "index.html", PAGE / "storage.mjs",
)  # fmt: skip
ADDRESS = "http://localhost:8080/"  # where `edgekit serve` shows a bundle by default
# WebLLM adds "resolve/main/" to an address that has none, which ".." takes away again.
_MODEL = f"{ADDRESS}resolve/main/../../"
OWN_LIBRARY = "model-webgpu.wasm"  # where the page looks for a library that the user compiled
PREBUILT_FOR = "0.2.86"  # the version of WebLLM that the page was tested with
# Which models WebLLM's own list offers to phones; it has no sharp bound, half of them are below.
LOW_RESOURCE_BYTES = 2 << 30


class LinkedLibrary(Protocol):
    """A compiled library that somebody offers."""

    @property
    def name(self) -> str:
        """Its file's name."""
        ...

    @property
    def url(self) -> str:
        """Where WebLLM gets it."""
        ...

    @property
    def webllm_version(self) -> str:
        """Of the package that it works with."""
        ...


def write(  # noqa: PLR0913 - what the page has to know
    directory: Path,
    *,
    model_id: str,
    config: Mapping[str, Any],
    conversation: Conversation,
    library: LinkedLibrary | None,
    vram_bytes: int,
    largest_buffer: GpuBuffer | None = None,
    needs_shader_f16: bool = False,
    has_states: bool = False,
) -> None:
    """Write the settings, the module and the page.

    Args:
        directory: The bundle's.
        model_id: What an app calls the model.
        config: What is in its ``mlc-chat-config.json``.
        conversation: How it is talked to.
        library: None where the user has to compile one, as `OWN_LIBRARY`.
        vram_bytes: What the model will take of the GPU's memory.
        largest_buffer: The largest array that the GPU must bind at once.
        needs_shader_f16: Whether the scheme computes in 16 bits.
        has_states: Whether layers keep a state, of which WebLLM then holds the current one alone.
    """
    record: dict[str, Any] = {
        "model": _MODEL,
        "model_id": model_id,
        "model_lib": ADDRESS + OWN_LIBRARY if library is None else library.url,
        "vram_required_MB": round(vram_bytes / (1 << 20), 2),
        "low_resource_required": vram_bytes <= LOW_RESOURCE_BYTES,
        "required_features": ["shader-f16"] if needs_shader_f16 else [],
        "overrides": {"context_window_size": config["context_window_size"]},
    }
    if has_states:
        record["overrides"]["max_history_size"] = 1
    if largest_buffer is not None:
        record["buffer_size_required_bytes"] = largest_buffer.size_bytes
    settings = {
        "model_list": list(_records(record, conversation)),
        "edgekit": {
            "address": ADDRESS,
            "webllm_version": PREBUILT_FOR if library is None else library.webllm_version,
            "quantization": config["quantization"],
            "largest_buffer": largest_buffer and largest_buffer.name,
            "chat": _rules(conversation),
        },
    }
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (directory / SETTINGS).write_text(text, encoding="utf-8")
    for path in PAGE_FILES:
        shutil.copyfile(path, directory / path.name)


def _records(record: dict[str, Any], conversation: Conversation) -> Iterator[dict[str, Any]]:
    """Yield the model, and again as it is loaded for conversations with a system message."""
    yield record
    if conversation.with_system is not None:
        overrides = {**record["overrides"], "conv_config": dict(conversation.with_system)}
        yield record | {"model_id": record["model_id"] + WITH_SYSTEM, "overrides": overrides}


def _rules(conversation: Conversation) -> dict[str, Any]:
    """Return what the app must do besides WebLLM; an answer goes on from the cache where it may."""
    with_system = {**conversation.template, **(conversation.with_system or {})}
    return {
        "is_raw": conversation.is_raw,
        "takes_system": conversation.takes_system and not conversation.is_raw,
        "needs_system": conversation.needs_system,
        "has_system_model": conversation.with_system is not None,
        "trimmed_roles": list(conversation.trimmed_roles),
        "drops_thoughts": conversation.drops_thoughts,
        "keeps_breaks": conversation.keeps_breaks,
        "fills_answers": conversation.fills_answers,
        "keeps_cache": conversation.keeps_cache,
        "keeps_cache_with_system": conversation.is_raw or keeps_cache(with_system),
    }
