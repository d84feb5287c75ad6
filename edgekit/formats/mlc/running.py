"""MLC on the device: which is a browser or a phone, so weights are read back here, not run."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from edgekit.errors import UsageError
from edgekit.formats.mlc import reading, shards


if TYPE_CHECKING:
    from edgekit.formats.mlc.reading import MlcWeights
    from edgekit.model.spec import DecoderSpec


def is_run_here(variant: str | None) -> bool:
    """Return False: a browser or a phone runs it."""
    del variant
    return False


def runtime_state() -> str:
    """Return what runs the artifacts: nothing that could be started here."""
    return "WebLLM, in a browser with WebGPU, or MLC's engine on a phone; not on this machine"


def load(
    path: Path, *, context_tokens: int, threads: int | None = None, has_exact_cache: bool = False
) -> NoReturn:
    """Refuse: a browser runs it.

    Raises:
        UsageError: Always.
    """
    del context_tokens, threads, has_exact_cache
    raise UsageError(
        f"{path} runs in WebLLM, in a browser with WebGPU",
        hint=f"serve {path.parent} with `python -m http.server` and open its page",
    )


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
