"""The back-ends of ExecuTorch, a package each: who computes a program, and where.

To add one, put a package here. Its ``__init__`` names a `Backend`, its module ``reading`` has the
functions of `BackendReading`, and its module ``writing`` names a subclass of ``_writing.Writing``.
"""

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from edgekit.errors import UsageError
from edgekit.formats import DecoderWeights


if TYPE_CHECKING:
    from edgekit.formats.executorch.backends._writing import BackendWriting
    from edgekit.formats.executorch.program import Program
    from edgekit.model.shapes import Shape
    from edgekit.model.spec import DecoderSpec


@dataclass(frozen=True, kw_only=True)
class Build:
    """One variant, for whoever puts it into an app."""

    kind: str  # what it needs of a runtime
    android: str | None = None  # the sentence that says what to link there; None: it is not for it
    ios: tuple[str, ...] = ()  # the products to link there; none: it is not for it
    constants: Mapping[str, Any] = field(default_factory=dict)  # what runners are told, by name


class BackendReading(Protocol):
    """What the module ``reading`` of a back-end offers; a device needs no more."""

    def contents(self, path: Path, head: "Program") -> list[tuple[str, "Shape", str]]:
        """Return ``(role, shape, tensor type)`` of every weight.

        Raises:
            struct.error, IndexError, UnicodeDecodeError: If the file is damaged.
        """
        ...

    def read_back(self, path: Path, spec: "DecoderSpec") -> DecoderWeights:
        """Return the weights as the back-end multiplies with them.

        Asked only of one with a `Backend.device`, whose programs cannot be run here.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Backend:
    """What there is to know of a back-end without a program at hand."""

    package: str  # where its modules are
    id: str  # as programs and runtimes name it: ``XnnpackBackend``
    name: str  # as people do
    device: str | None = None  # what has it where edgekit's machine has not; None: it runs here
    builds: Mapping[str, Build]  # by the name of the variant, the usual one first
    recipes: tuple[str, ...]  # those it can hold
    half_recipes: frozenset[str] = frozenset()  # those it computes, and caches, in float16
    notes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # for a user, by recipe
    reads_by_token: bool = False  # whether a prompt takes a call for each token

    @property
    def reading(self) -> BackendReading:
        """What tells the contents of its programs."""
        return cast("BackendReading", importlib.import_module(f"{self.package}.reading"))

    @property
    def writing(self) -> "BackendWriting":
        """What writes its programs, with torch."""
        module = importlib.import_module(f"{self.package}.writing")
        return cast("BackendWriting", module.WRITING)


def get_all() -> Iterator[Backend]:
    """Yield every back-end, those that run here first."""
    packages = (module.name for module in pkgutil.iter_modules(__path__) if module.ispkg)
    modules = (importlib.import_module(f"{__name__}.{name}") for name in packages)
    known = [cast("Backend", module.BACKEND) for module in modules]
    yield from sorted(known, key=lambda backend: (backend.device is not None, backend.name))


def variants() -> tuple[str, ...]:
    """Return the names of all variants, the usual one first."""
    return tuple(variant for backend in get_all() for variant in backend.builds)


def of(variant: str | None) -> Backend:
    """Return the back-end of a variant; None takes the usual one.

    Raises:
        UsageError: If there is no such variant.
    """
    for backend in get_all():
        if variant is None or variant in backend.builds:
            return backend
    raise UsageError(
        f"ExecuTorch has no variant {variant!r}", hint=f"variants: {', '.join(variants())}"
    )


def of_program(head: "Program") -> Backend | None:
    """Return the back-end that a program's delegates are for, None if edgekit has none for it."""
    ids = {name for method in head.methods for name in method.backends}
    return next((backend for backend in get_all() if backend.id in ids), None)
