"""The whole artifact: weights, settings, and what an app or a phone's build reads."""

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.formats import BuildRequest, Layout
from edgekit.formats.mlc import (
    chat_config,
    conversation,
    conversion,
    decoder_file,
    libraries,
    memory,
    tokenizer_info,
    web_app,
)
from edgekit.progress import Advance
from edgekit.quant.recipe import Recipe


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
    layout = conversion.lay_out(checkpoint, request)
    said = _conversation(checkpoint, request.variant)
    notes = (*layout.notes, *said.notes, *_library_notes(checkpoint, request.recipe))
    return replace(layout, notes=notes, variant=RAW_PROMPT if said.is_raw else CHAT)


@functools.lru_cache(maxsize=1)
def _tokenizer_info(text: "TokenizerFiles") -> Mapping[str, Any]:
    return tokenizer_info.read(text.tokenizer_json)


def _conversation(checkpoint: "CheckpointProtocol", variant: str | None) -> "Conversation":
    return conversation.derive(checkpoint, raw_prompt=variant == RAW_PROMPT)


def _library_notes(checkpoint: "CheckpointProtocol", recipe: Recipe) -> Iterator[str]:
    library = libraries.find(checkpoint, recipe.name)
    if library:
        yield f"it runs with {library.name}, prebuilt for WebLLM {library.webllm_version}"
    else:
        yield (
            f"{libraries.missing(checkpoint, recipe.name)}; in the bundle, "
            f"`{libraries.compile_command()}` makes one"
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
        library=libraries.find(checkpoint, recipe.name),
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
