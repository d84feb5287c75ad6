"""ExecuTorch on the device: its runtime, its tokenizer, and what a program really holds."""

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.errors import BundleError
from edgekit.formats import DecoderWeights
from edgekit.formats.executorch import backends, program, runtime, shim_build, tokenizer


if TYPE_CHECKING:
    from edgekit.model.spec import DecoderSpec


def is_run_here(variant: str | None) -> bool:
    """Tell whether the runtime of this machine has the back-end of a variant."""
    return backends.of(variant).device is None


def runtime_state() -> str:
    """Build what ExecuTorch is called through, and say which it is."""
    shim_build.load()
    elsewhere = " and ".join(f"{b.name} on {b.device}" for b in backends.get_all() if b.device)
    return (
        f"ExecuTorch {shim_build.installed_version()}, on the CPU with XNNPACK; makes programs for "
        f"{elsewhere}, which are not executed here; QNN and MediaTek are not offered: their "
        "compilers are not part of ExecuTorch's wheel"
    )


def load(
    path: Path, *, context_tokens: int, threads: int | None = None, has_exact_cache: bool = False
) -> runtime.ExecutorchSession:
    """Open a program in ExecuTorch."""
    del has_exact_cache  # it is float32 anyway
    return runtime.ExecutorchSession(path, context_tokens=context_tokens, threads=threads)


def runs_on(variant: str | None) -> str:
    """Return what runs a variant that this machine does not."""
    return backends.of(variant).device or "this machine"


def read_back(path: Path, spec: "DecoderSpec") -> DecoderWeights:
    """Return the weights as the back-end multiplies with them, where it is not on this machine.

    Raises:
        BundleError: If the program is damaged, or for another back-end.
    """
    backend = backends.of_program(program.read(path))
    if backend is None or not backend.device:
        raise BundleError(f"{path} is for no back-end whose weights edgekit reads back")
    try:
        return backend.reading.read_back(path, spec)
    except (struct.error, UnicodeDecodeError, IndexError) as error:
        raise _damage(path, error) from error


def runtime_ids(path: Path, texts: Sequence[str]) -> list[list[int]] | None:
    """Return what ExecuTorch's tokenizer makes of texts; None if it cannot read the model's."""
    return tokenizer.runtime_ids(path, texts)


def own_template(path: Path) -> None:
    """Return None: an app renders prompts with the chat template next to the program."""
    del path


def files(path: Path) -> list[Path]:
    """Return the one file there is."""
    return [path]


def contents(path: Path) -> list[tuple[str, tuple[int, ...], str]]:
    """Return name, shape and tensor type of every weight, as the runtime will read them.

    Raises:
        BundleError: If the program is damaged, or for another back-end.
    """
    head = program.read(path)
    backend = backends.of_program(head)
    if backend is None:
        raise BundleError(f"{path} has no delegate for a back-end that edgekit writes for")
    try:
        return backend.reading.contents(path, head)
    except (struct.error, UnicodeDecodeError, IndexError) as error:
        raise _damage(path, error) from error


def _damage(path: Path, error: Exception) -> BundleError:
    return BundleError(
        f"{path} is damaged: {error}", hint="copy the bundle again, or export it again"
    )
