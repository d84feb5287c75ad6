"""ONNX on the device: ONNX Runtime, and what the files really hold."""

from collections.abc import Sequence
from pathlib import Path

from edgekit.formats.onnx import model, runtime, tensor_types


def is_run_here(variant: str | None) -> bool:
    """Return True: the runtime is a program of this machine."""
    del variant  # there is none
    return True


def runtime_state() -> str:
    """Start ONNX Runtime and say which it is and what it computes with."""
    return f"ONNX Runtime {runtime.library().__version__}, {runtime.processors()}"


def load(
    path: Path, *, context_tokens: int, threads: int | None = None, has_exact_cache: bool = False
) -> runtime.OnnxSession:
    """Open a model in ONNX Runtime."""
    del has_exact_cache  # it is float32 anyway
    return runtime.OnnxSession(path, context_tokens=context_tokens, threads=threads)


def runtime_ids(path: Path, texts: Sequence[str]) -> None:
    """Return None: ONNX Runtime reads no text."""
    del path, texts


def own_template(path: Path) -> None:
    """Return None: programs read the chat template next to the model."""
    del path


def files(path: Path) -> list[Path]:
    """Return the model file and the files of its weights."""
    return model.files(path)


def contents(path: Path) -> list[tuple[str, tuple[int, ...], str]]:
    """Return name, shape and tensor type of every weight, whatever tensors hold it."""
    return tensor_types.contents(path)
