"""MLC on the device: TVM's virtual machine where it is installed, else weights are read back."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit import versions
from edgekit.formats.mlc import reading, shards
from edgekit.formats.mlc.compiling import tools
from edgekit.formats.mlc.runtime import MlcSession


if TYPE_CHECKING:
    from edgekit.formats.mlc.reading import MlcWeights
    from edgekit.model.spec import DecoderSpec


def is_run_here(variant: str | None) -> bool:
    """Tell whether TVM and a compiler are here; else only a browser or a phone runs it."""
    del variant
    return tools.are_here()


def runtime_state() -> str:
    """Return what runs the artifacts: TVM on this machine, and WebLLM in a browser."""
    if is_run_here(None):
        return f"TVM {versions.APACHE_TVM}, with libraries compiled on this machine"
    return (
        "WebLLM, in a browser with WebGPU, or MLC's engine on a phone; on this machine with "
        f"`pip install 'edgekit[{tools.EXTRA}]'`"
    )


def load(
    path: Path, *, context_tokens: int, threads: int | None = None, has_exact_cache: bool = False
) -> MlcSession:
    """Open an artifact with a library of its shape, compiled for this machine's processor."""
    del has_exact_cache  # the cache is as exact as the scheme computes
    tools.require(f"running {path} outside a browser")
    return MlcSession(path, context_tokens=context_tokens, threads=threads)


def read_back(path: Path, spec: "DecoderSpec") -> "MlcWeights":
    """Return the weights as MLC multiplies with them, every hash checked."""
    return reading.open_weights(path, spec)


def runs_on(variant: str | None) -> str:
    """Return what is needed to run the artifacts."""
    del variant
    return "a browser with WebGPU, or MLC's engine on a phone"


def runtime_ids(path: Path, texts: Sequence[str]) -> None:
    """Return None: WebLLM's tokenizer is the one edgekit reads text with, compiled for browsers."""
    del path, texts


def own_template(path: Path) -> None:
    """Return None: WebLLM reads a conversation template, which `mlc-chat-config.json` holds."""
    del path


def files(path: Path) -> list[Path]:
    """Return the tensor cache, its twin for older loaders, and the shards."""
    return list(shards.files(path))


def contents(path: Path) -> list[tuple[str, tuple[int, ...], str]]:
    """Return role, shape and tensor type of every weight, whatever tensors hold it."""
    return reading.contents(path)
