"""The back-ends of ExecuTorch, a module or package each: who computes a program, and where.

To add one, put a module with the names of `Backend` here.
"""

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from edgekit.errors import UsageError
from edgekit.formats import Layout, MemoryUse, Model


if TYPE_CHECKING:
    from edgekit.formats.executorch.planned import Job, Weight
    from edgekit.formats.executorch.program import Program
    from edgekit.model.spec import DecoderSpec, Shape


@dataclass(frozen=True, kw_only=True)
class Build:
    """One variant, for whoever puts it into an app."""

    kind: str  # what it needs of a runtime
    android: str | None = None  # the sentence that says what to link there; None: it is not for it
    ios: tuple[str, ...] = ()  # the products to link there; none: it is not for it


class Backend(Protocol):
    """What a module offers; for a module, PEP 544 ignores ``self``."""

    ID: str  # as programs and runtimes spell it: ``XnnpackBackend``
    NAME: str  # as people do
    DEVICE: str | None  # what has it where edgekit's machine has not; None: it runs here
    BUILDS: Mapping[str, Build]  # by the name of the variant, the usual one first
    RECIPES: tuple[str, ...]  # those it can hold
    READS_BY_TOKEN: bool  # whether a prompt takes a call for each token

    def refuse(self, spec: "DecoderSpec", variant: str) -> None:
        """Check that the back-end computes this decoder.

        Raises:
            UsageError: If not; the message names the difference, the hint a variant that does.
        """
        ...

    def meant_by(self, wanted: str, *, recipe: str) -> str:
        """Return the back-end's own storage for one that a recipe asks for."""
        ...

    def stored_as(self, wanted: str, shape: "Shape", *, recipe: str) -> str:
        """Return the storage that a weight really gets where ``wanted`` is meant."""
        ...

    def file_bytes(self, spec: "DecoderSpec", planned: tuple["Weight", ...], variant: str) -> int:
        """Return about how large the program gets: within a hundredth."""
        ...

    def computes_half(self, recipe: str) -> bool:
        """Tell whether products are computed, and the cache is kept, in float16."""
        ...

    def notes(self, recipe: str) -> tuple[str, ...]:
        """Return what a user should know of this recipe on this back-end."""
        ...

    def memory_use(self, spec: "DecoderSpec", layout: Layout, *, context_tokens: int) -> MemoryUse:
        """Return what a runtime will hold."""
        ...

    def metadata(
        self, spec: "DecoderSpec", variant: str, *, context_tokens: int
    ) -> Mapping[str, Any]:
        """Return what runners are told otherwise than by `conversion.metadata`."""
        ...

    def write(self, job: "Job", path: Path) -> Mapping[str, Any]:
        """Write the program, and return how much of the work the back-end does.

        Raises:
            ToolchainError: If ExecuTorch's own kernels would have to multiply by a matrix.
        """
        ...

    def contents(self, path: Path, head: "Program") -> list[tuple[str, "Shape", str]]:
        """Return ``(role, shape, storage)`` of every weight.

        Raises:
            struct.error, IndexError, UnicodeDecodeError: If the file is damaged.
        """
        ...


class ReadableBackend(Backend, Protocol):
    """A back-end with a `Backend.DEVICE`, whose weights are read back for a proof."""

    def read_back(self, path: Path, spec: "DecoderSpec") -> Model:
        """Return the weights as the back-end multiplies with them."""
        ...


def get_all() -> Iterator[Backend]:
    """Yield every back-end, those that run here first."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    found = [cast("Backend", importlib.import_module(f"{__name__}.{name}")) for name in names]
    yield from sorted(found, key=lambda backend: (backend.DEVICE is not None, backend.NAME))


def variants() -> tuple[str, ...]:
    """Return the names of all variants, the usual one first."""
    return tuple(variant for backend in get_all() for variant in backend.BUILDS)


def of(variant: str | None) -> Backend:
    """Return the back-end of a variant; None takes the usual one.

    Raises:
        UsageError: If there is no such variant.
    """
    for backend in get_all():
        if variant is None or variant in backend.BUILDS:
            return backend
    raise UsageError(
        f"ExecuTorch has no variant {variant!r}", hint=f"variants: {', '.join(variants())}"
    )


def of_program(head: "Program") -> Backend | None:
    """Return the back-end that a program's delegates are for, None if edgekit has none for it."""
    found = {name for method in head.methods for name in method.backends}
    return next((backend for backend in get_all() if backend.ID in found), None)
