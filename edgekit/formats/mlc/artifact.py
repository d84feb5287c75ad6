"""The whole artifact: weights, settings, and what an app or a phone's build reads."""

import functools
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.errors import UsageError
from edgekit.formats import BuildRequest, Layout
from edgekit.formats.mlc import (
    chat_config,
    conversation,
    conversion,
    decoder_file,
    decoders,
    libraries,
    memory,
    tokenizer_info,
    web_app,
)
from edgekit.formats.mlc.compiling import tools, web
from edgekit.formats.mlc.compiling.shape import LibraryShape
from edgekit.formats.mlc.libraries import Library
from edgekit.progress import Advance


if TYPE_CHECKING:
    from edgekit.formats.mlc.conversation import Conversation
    from edgekit.model.checkpoint_protocol import CheckpointProtocol
    from edgekit.model.tokenizer_files import TokenizerFiles


CHAT, RAW_PROMPT = "chat", "raw-prompt"
PACKAGE = "mlc-package-config.json"
PHONE_CHUNK_TOKENS = 128  # as MLC's own apps set it, for phones read more slowly and hold less


def lay_out(checkpoint: "CheckpointProtocol", request: BuildRequest) -> Layout:
    """Return what the weights will be, and what a user should know about the rest.

    Raises:
        UsageError: If MLC computes the decoder, or writes a conversation, otherwise, or cannot load
            the tokenizer.
    """
    _tokenizer_info(checkpoint.text)
    own = own_library(checkpoint, request)
    layout = conversion.lay_out(checkpoint, request, has_own=own is not None)
    prebuilt = _prebuilt(checkpoint, request)
    said = _conversation(checkpoint, request.variant)
    return replace(
        layout,
        notes=(*layout.notes, *said.notes, _library_note(checkpoint, request, own, prebuilt)),
        variant=RAW_PROMPT if said.is_raw else CHAT,
        lacks_library=own is None and prebuilt is None,
    )


def own_library(checkpoint: "CheckpointProtocol", request: BuildRequest) -> LibraryShape | None:
    """Return what the library is bound to that is compiled for a model; None if none is.

    Raises:
        UsageError: If a library was asked for that cannot hold the model.
        MissingDependencyError: If one was asked for, and what compiles it is not installed.
    """
    if request.compiles is False:
        return None
    if request.compiles is None and (
        _prebuilt(checkpoint, request) or not tools.are_here_for_browsers()
    ):
        return None
    tools.require_for_browsers("compiling a library for browsers")
    spec = checkpoint.spec
    try:
        shape = LibraryShape.of(
            decoders.model_type(checkpoint.architecture, spec),
            spec,
            request.recipe.name,
            context_tokens=request.context_tokens or spec.context_tokens,
        )
        web.refuse(shape)
    except UsageError:
        if request.compiles:
            raise
        return None
    return shape


def _prebuilt(checkpoint: "CheckpointProtocol", request: BuildRequest) -> Library | None:
    """Return the library that somebody offers, if it computes as long a context."""
    limit = decoders.context_limit(checkpoint.architecture, checkpoint.spec)
    if (request.context_tokens or 0) > limit.tokens:
        return None
    return libraries.find(checkpoint, request.recipe.name)


@functools.lru_cache(maxsize=1)
def _tokenizer_info(text: "TokenizerFiles") -> Mapping[str, Any]:
    return tokenizer_info.read(text.tokenizer_json)


def _conversation(checkpoint: "CheckpointProtocol", variant: str | None) -> "Conversation":
    return conversation.derive(checkpoint, raw_prompt=variant == RAW_PROMPT)


def _library_note(
    checkpoint: "CheckpointProtocol",
    request: BuildRequest,
    own: LibraryShape | None,
    prebuilt: Library | None,
) -> str:
    """Say which WebGPU library runs it: one that somebody offers, or one of its own."""
    if own:
        return (
            f"a WebGPU library is compiled for it here, {libraries.OWN} in the bundle, unless an "
            f"earlier model of its shape left one; it runs in WebLLM {web_app.PREBUILT_FOR}"
        )
    if prebuilt:
        return f"it runs with {prebuilt.name}, prebuilt for WebLLM {prebuilt.webllm_version}"
    return (
        f"{libraries.missing(checkpoint, request.recipe.name)}; `edgekit export --compile` makes "
        f"one, with `pip install 'edgekit[{tools.EXTRA}]'` and Emscripten: {tools.INSTALL_LINKER}"
    )


def convert(
    checkpoint: "CheckpointProtocol",
    request: BuildRequest,
    directory: Path,
    *,
    progress: Advance,
    context_tokens: int,
) -> str:
    """Write everything but the tokenizer; return the name of the tensor cache."""
    layout, recipe = lay_out(checkpoint, request), request.recipe
    own, prebuilt = own_library(checkpoint, request), _prebuilt(checkpoint, request)
    if own:
        shutil.copyfile(web.compiled(own), directory / libraries.OWN)
    entry = conversion.write(checkpoint, recipe, directory, progress=progress)
    said = _conversation(checkpoint, layout.variant)
    config = chat_config.build(
        checkpoint, recipe.name, context_tokens=context_tokens, conv_template=said.template
    )
    _write_json(directory / chat_config.NAME, config)
    model_id = f"{checkpoint.name}-{recipe.name}-MLC"
    used = memory.use(
        checkpoint.architecture, checkpoint.spec, layout, context_tokens=context_tokens
    )
    web_app.write(
        directory,
        config=config,
        library=None if own else prebuilt,
        vram_bytes=memory.vram_bytes(used),
        conversation=said,
        model_id=model_id,
        largest_buffer=layout.largest_buffer,
        needs_shader_f16=layout.needs_shader_f16,
        has_states=checkpoint.spec.has_states,
    )
    package = package_config(checkpoint, layout, model_id=model_id, context_tokens=context_tokens)
    _write_json(directory / PACKAGE, package)
    decoder_file.write(directory, checkpoint.spec)
    return entry


def package_config(
    checkpoint: "CheckpointProtocol", layout: Layout, *, model_id: str, context_tokens: int
) -> dict[str, Any]:
    """Return what ``mlc_llm package`` reads to build an app: for an iPhone, change the device."""
    chunk_tokens = min(context_tokens, PHONE_CHUNK_TOKENS)
    used = memory.use(
        checkpoint.architecture, checkpoint.spec, layout, context_tokens=context_tokens,
        chunk_tokens=chunk_tokens,
    )  # fmt: skip
    return {
        "device": "android",
        "model_list": [
            {
                "model": ".",
                "model_id": model_id,
                "estimated_vram_bytes": memory.vram_bytes(used),
                "bundle_weight": True,
                "overrides": {
                    "context_window_size": context_tokens,
                    "prefill_chunk_size": chunk_tokens,
                },
            }
        ],
    }


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
