"""ExecuTorch: programs for phones and boards, whose arithmetic XNNPACK does."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.errors import MissingDependencyError
from edgekit.formats import ContextLimit, Layout, MemoryUse, Progress
from edgekit.formats.executorch import contents as _contents
from edgekit.formats.executorch import (
    conversion,
    handover,
    memory,
    runtime,
    shim_build,
    storage,
    tokenizer,
)
from edgekit.recipe import Recipe


if TYPE_CHECKING:
    from edgekit.checkpoint import Checkpoint


STORAGES, RECIPES = storage.STORAGES, storage.RECIPES
VARIANTS = conversion.VARIANTS
RUNTIME = "ExecuTorch"
EXTRA = "executorch"
RUN_EXTRA = "run-executorch"
ENDING = ".pte"
DEFAULT_RECIPES = ("8da8w", "8da4w", "8da4w_all")


def is_run_here(variant: str | None) -> bool:
    """Return True: the runtime is a program of this machine."""
    del variant  # each runs, where torch is installed
    return True


def runtime_state() -> str:
    """Build what ExecuTorch is called through, and say which it is."""
    shim_build.load()
    return f"ExecuTorch {shim_build.installed_version()}, on the CPU with XNNPACK"


def lay_out(
    checkpoint: "Checkpoint",
    recipe: Recipe,
    *,
    split_bytes: int | None = None,
    variant: str | None = None,
) -> Layout:
    """Return what the file will hold and about how large it gets, from headers alone."""
    return conversion.lay_out(checkpoint, recipe, split_bytes=split_bytes, variant=variant)


def context_limit(checkpoint: "Checkpoint") -> ContextLimit:
    """Return the model's own limit, or with a longrope where its other factors begin.

    A program has those too, and edgekit's session reads a text anew when it gets there; programs
    of others do not.
    """
    border = conversion.border_tokens(checkpoint.spec)
    if border is not None and border < checkpoint.spec.context_tokens:
        return ContextLimit(
            tokens=border,
            reason="beyond, every position turns otherwise, and phones' runners read no text anew",
        )
    return ContextLimit(
        tokens=checkpoint.spec.context_tokens, reason="the model was made for no more"
    )


def memory_use(
    checkpoint: "Checkpoint", layout: Layout, *, context_tokens: int, repacks: bool
) -> MemoryUse:
    """Return what ExecuTorch will hold."""
    del repacks  # XNNPACK packs weights on every processor
    return memory.use(checkpoint.spec, layout, context_tokens=context_tokens)


def convert(  # noqa: PLR0913 - the parameters of `Format.convert`
    checkpoint: "Checkpoint",
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


def runtime_ids(path: Path, texts: Sequence[str]) -> list[list[int]] | None:
    """Return what ExecuTorch's tokenizer makes of texts; None if it cannot read the model's."""
    return tokenizer.runtime_ids(path, texts)


def files(path: Path) -> list[Path]:
    """Return the one file there is."""
    return [path]


def contents(path: Path) -> list[tuple[str, tuple[int, ...], str]]:
    """Return name, shape and storage of every weight, as the runtime will read them."""
    return _contents.contents(path)
