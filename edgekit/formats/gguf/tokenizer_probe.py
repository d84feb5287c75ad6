"""A child process that asks llama.cpp for the ids of texts under several pre-tokenizer names.

``python -m edgekit.formats.gguf.tokenizer_probe`` reads one JSON object from standard input and
writes one line of JSON for each name, as soon as it is known: a name may abort the process.
"""

import ctypes
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgekit.errors import ToolchainError
from edgekit.formats.gguf.runtime import library, log


_LOAD_MODE_NONE = 0  # LLAMA_LOAD_MODE_NONE in llama.h: plain reads, no memory map


def main() -> None:
    """Answer the request on standard input."""
    request = json.load(sys.stdin)
    log()  # what llama.cpp says about strange vocabularies belongs to nobody
    for name in request["names"]:
        ids = _ids_under(name, Path(request["gguf"]), request["texts"])
        answer = {"name": name} if ids is None else {"name": name, "ids": ids}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _ids_under(name: str, path: Path, texts: Sequence[str]) -> list[list[int]] | None:
    """Return the ids of each text, or None if llama.cpp refuses the vocabulary."""
    llama = library()
    parameters = llama.llama_model_default_params()
    parameters.vocab_only = True
    parameters.load_mode = _LOAD_MODE_NONE
    overrides = _overrides(llama, name)
    parameters.kv_overrides = overrides
    model = llama.llama_model_load_from_file(os.fsencode(path), parameters)
    if not model:
        return None
    try:
        vocabulary = llama.llama_model_get_vocab(model)
        return [_tokenize(llama, vocabulary, text.encode()) for text in texts]
    finally:
        llama.llama_model_free(model)


def _overrides(llama: Any, name: str) -> Any:
    """Return llama.cpp's list of overridden metadata; one with an empty key ends it."""
    overrides = (llama.llama_model_kv_override * 2)()
    overrides[0].tag = llama.LLAMA_KV_OVERRIDE_TYPE_STR
    overrides[0].key = b"tokenizer.ggml.pre"
    overrides[0].value.val_str = name.encode()
    return overrides


def _tokenize(llama: Any, vocabulary: Any, text: bytes) -> list[int]:
    capacity = len(text) + 8  # no token is shorter than a byte
    buffer = (ctypes.c_int32 * capacity)()
    count = llama.llama_tokenize(vocabulary, text, len(text), buffer, capacity, False, True)
    if count < 0:
        raise ToolchainError(f"llama_tokenize needs {-count} tokens for {len(text)} bytes")
    return list(buffer[:count])


if __name__ == "__main__":
    main()
