"""ExecuTorch: programs for phones and boards, whose arithmetic a back-end does."""

import importlib.util
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from edgekit.errors import BundleError, MissingDependencyError
from edgekit.formats import ContextLimit, Layout, MemoryUse, Model, Progress
from edgekit.formats.executorch import (
    backends,
    conversion,
    handover,
    program,
    runtime,
    shim_build,
    storage,
    tokenizer,
)
from edgekit.quant.recipe import Recipe


if TYPE_CHECKING:
    from edgekit.formats.executorch.backends import ReadableBackend
    from edgekit.model.checkpoint_protocol import CheckpointProtocol
    from edgekit.model.spec import DecoderSpec


STORAGES, RECIPES = storage.STORAGES, storage.RECIPES
VARIANTS = backends.variants()
RUNTIME = "ExecuTorch"
EXTRA = "executorch"
RUN_EXTRA = "run-executorch"
ENDING = ".pte"
DEFAULT_RECIPES = ("8da8w", "8da4w", "8da4w_all")


def is_run_here(variant: str | None) -> bool:
    """Tell whether the runtime of this machine has the back-end of a variant."""
    return backends.of(variant).DEVICE is None


def runtime_state() -> str:
    """Build what ExecuTorch is called through, and say which it is."""
    shim_build.load()
    elsewhere = " and ".join(f"{b.NAME} on {b.DEVICE}" for b in backends.get_all() if b.DEVICE)
    return (
        f"ExecuTorch {shim_build.installed_version()}, on the CPU with XNNPACK; makes programs for "
        f"{elsewhere}, which are not executed here; QNN and MediaTek are not offered: their "
        "compilers are no part of ExecuTorch's wheel"
    )


def lay_out(
    checkpoint: "CheckpointProtocol",
    recipe: Recipe,
    *,
    split_bytes: int | None = None,
    variant: str | None = None,
) -> Layout:
    """Return what the file will hold and about how large it gets, from headers alone."""
    return conversion.lay_out(checkpoint, recipe, split_bytes=split_bytes, variant=variant)


def context_limit(checkpoint: "CheckpointProtocol") -> ContextLimit:
    """Return the model's own limit, or with a longrope where its other factors begin.

    A program has those too, and edgekit's session reads a text anew when it gets there; programs
    of others do not.
    """
    border = checkpoint.spec.border_tokens
    if border is not None and border < checkpoint.spec.context_tokens:
        return ContextLimit(
            tokens=border,
            reason="beyond, every position turns otherwise, and phones' runners read no text anew",
        )
    return ContextLimit(
        tokens=checkpoint.spec.context_tokens, reason="the model was made for no more"
    )


def memory_use(
    checkpoint: "CheckpointProtocol", layout: Layout, *, context_tokens: int, repacks: bool
) -> MemoryUse:
    """Return what ExecuTorch will hold."""
    del repacks  # XNNPACK packs weights on every processor
    backend = backends.of(layout.variant)
    return backend.memory_use(checkpoint.spec, layout, context_tokens=context_tokens)


def convert(  # noqa: PLR0913 - the parameters of `Format.convert`
    checkpoint: "CheckpointProtocol",
    recipe: Recipe,
    directory: Path,
    *,
    progress: Progress,
    context_tokens: int | None = None,
    split_bytes: int | None = None,
    variant: str | None = None,
) -> str:
    """Write ``model.pte`` and what the developer of an app wants beside it."""
    _require()
    variant = conversion.variant_of(checkpoint.spec, variant, split_bytes)
    context = context_tokens or context_limit(checkpoint).tokens
    entry = conversion.convert(
        checkpoint,
        recipe,
        directory,
        progress=progress,
        context_tokens=context,
        variant=variant,
    )
    handover.write(checkpoint, directory, entry, context_tokens=context, variant=variant)
    return entry


def _require() -> None:
    missing = [name for name in ("torch", "executorch") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"a program is made with {' and '.join(missing)}",
            hint=f"pip install 'edgekit[{EXTRA}]'",
        )


def load(
    path: Path, *, context_tokens: int, threads: int | None = None, has_exact_cache: bool = False
) -> runtime.ExecutorchSession:
    """Open a program in ExecuTorch."""
    del has_exact_cache  # it is float32 anyway
    return runtime.ExecutorchSession(path, context_tokens=context_tokens, threads=threads)


def runs_on(variant: str | None) -> str:
    """Return what runs a variant that this machine does not."""
    return backends.of(variant).DEVICE or "this machine"


def read_back(path: Path, spec: "DecoderSpec") -> Model:
    """Return the weights as the back-end multiplies with them, where it is not on this machine."""
    backend = backends.of_program(program.read(path))
    if backend is None or not backend.DEVICE:
        raise BundleError(f"{path} is for no back-end whose weights edgekit reads back")
    try:
        return cast("ReadableBackend", backend).read_back(path, spec)
    except (struct.error, UnicodeDecodeError, IndexError) as error:
        raise _damage(path, error) from error


def _damage(path: Path, error: Exception) -> BundleError:
    return BundleError(
        f"{path} is damaged: {error}", hint="copy the bundle again, or export it again"
    )


def runtime_ids(path: Path, texts: Sequence[str]) -> list[list[int]] | None:
    """Return what ExecuTorch's tokenizer makes of texts; None if it cannot read the model's."""
    return tokenizer.runtime_ids(path, texts)


def files(path: Path) -> list[Path]:
    """Return the one file there is."""
    return [path]


def contents(path: Path) -> list[tuple[str, tuple[int, ...], str]]:
    """Return name, shape and storage of every weight, as the runtime will read them."""
    head = program.read(path)
    backend = backends.of_program(head)
    if backend is None:
        raise BundleError(f"{path} has no delegate for a back-end that edgekit writes for")
    try:
        return backend.contents(path, head)
    except (struct.error, UnicodeDecodeError, IndexError) as error:
        raise _damage(path, error) from error
