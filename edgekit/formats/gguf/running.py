"""GGUF on the device: llama.cpp, its tokenizer, and what a file really holds."""

from collections.abc import Sequence
from pathlib import Path

from edgekit.formats.gguf import runtime, split


def is_run_here(variant: str | None) -> bool:
    """Return True: the runtime is a program of this machine."""
    del variant  # there is none
    return True


def runtime_state() -> str:
    """Start llama.cpp and say which it is."""
    return f"llama.cpp, as llama-cpp-python {runtime.library().__version__} brings it"


def load(
    path: Path, *, context_tokens: int, threads: int | None = None, has_exact_cache: bool = False
) -> runtime.GgufSession:
    """Open a file in llama.cpp."""
    return runtime.GgufSession(
        path, context_tokens=context_tokens, threads=threads, has_exact_cache=has_exact_cache
    )


def runtime_ids(path: Path, texts: Sequence[str]) -> list[list[int]]:
    """Return what llama.cpp's own tokenizer makes of ``texts``, special tokens parsed."""
    return runtime.runtime_ids(path, texts)


def own_template(path: Path) -> str | None:
    """Return the chat template in a file, by which other programs write prompts."""
    found = split.read(path).metadata.get("tokenizer.chat_template")
    return None if found is None else str(found)


def files(path: Path) -> list[Path]:
    """Return the parts of a file that was split, or the file itself."""
    return split.paths(path)


def contents(path: Path) -> list[tuple[str, tuple[int, ...], str]]:
    """Return name, shape and tensor type of everything in a file, and in the parts after it."""
    return [(info.name, info.shape, info.tensor_type) for info in split.read_tensors(path)]
