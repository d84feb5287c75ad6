"""Families: what makes each kind of model different, and nothing else.

The module's name is the ``model_type`` of ``config.json``: put ``mamba.py`` here and every format
has it, or refuses it in one sentence. A family that is another one plus a difference calls it;
modules with an underscore are what families share.

A package of somebody else adds its own by an entry point of the group `GROUP`, whose name is the
``model_type`` and whose object is such a module.
"""

import functools
import importlib
import importlib.metadata
import pkgutil
from collections.abc import Collection, Mapping
from importlib.metadata import EntryPoint
from typing import Any, Protocol, cast

from edgekit.errors import UsageError
from edgekit.model.spec import DecoderSpec, Source
from edgekit.source.config import Config


class Family(Protocol):
    """What a module in this package offers."""

    SIZES: Mapping[str, int]  # what transformers takes where a wrapper's section is silent
    # A module may also have STORED_NAMES, see `own_name`, `constants` and `leftovers`, see there.

    def describe(self, config: Config) -> DecoderSpec:
        """Read the whole config; whoever calls then calls ``config.refuse_unread``."""
        ...

    def source(self, role: str, spec: DecoderSpec) -> Source:
        """Return where a weight of `DecoderSpec.weights` lives in the checkpoint."""
        ...

    def config(self, spec: DecoderSpec) -> dict[str, Any]:
        """Return the config that `describe` reads as ``spec``, as far as the family can say it.

        The inverse is what lets a GGUF file become an ordinary checkpoint. A family that cannot
        express ``spec`` returns a config that `describe` reads otherwise; the caller compares.
        """
        ...


GROUP = "edgekit.families"
_PARTS = ("SIZES", "config", "describe", "source")


def names() -> list[str]:
    """Return every supported ``model_type``."""
    return sorted(_own().union(entry.name for entry in _from_outside()))


@functools.cache
def _own() -> frozenset[str]:
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return frozenset(name for name in modules if not name.startswith("_"))


@functools.cache
def _from_outside() -> tuple[EntryPoint, ...]:
    return tuple(importlib.metadata.entry_points(group=GROUP))


def origin(model_type: str) -> str | None:
    """Return which distribution brought a family, None if it is one of edgekit's own."""
    entries = _entries(model_type)
    return _distribution(entries[0]) if entries else None


def _entries(model_type: str) -> list[EntryPoint]:
    return [entry for entry in _from_outside() if entry.name == model_type]


def _distribution(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value


@functools.cache  # asked for every weight
def get(model_type: str) -> Family:
    """Import one family.

    Raises:
        UsageError: If there is no such family, more than one, or one that is none.
    """
    entries = _entries(model_type)
    makers = ["edgekit"] * (model_type in _own()) + [_distribution(entry) for entry in entries]
    if len(makers) > 1:
        raise UsageError(
            f"models of type {model_type!r} are described by {' and by '.join(makers)}",
            hint="uninstall all but one",
        )
    if entries:
        return _load(entries[0])
    if not makers:
        raise UsageError(
            f"models of type {model_type!r} are not supported",
            hint=f"supported: {', '.join(names())}",
        )
    return cast("Family", importlib.import_module(f"{__name__}.{model_type}"))


def _load(entry: EntryPoint) -> Family:
    try:
        module = entry.load()
    except Exception as error:
        raise UsageError(
            f"{_distribution(entry)}, which describes models of type {entry.name!r}, cannot be "
            f"loaded: {type(error).__name__}: {error}",
        ) from error
    if missing := [part for part in _PARTS if not hasattr(module, part)]:
        raise UsageError(
            f"{entry.value} of {_distribution(entry)} has no {', '.join(missing)}, which a family "
            "needs"
        )
    return cast("Family", module)


def own_name(model_type: str, stored: str) -> str:
    """Return what transformers calls a stored tensor, or a module, of a family.

    They differ where a family has ``STORED_NAMES``: parts of names in memory, and in files.
    """
    name = f"{stored}."
    for own, other in getattr(get(model_type), "STORED_NAMES", {}).items():
        name = name.replace(other, own)
    return name.removesuffix(".")


def stored_name(model_type: str, own: str) -> str:
    """Undo `own_name`."""
    name = f"{own}."
    for part, other in getattr(get(model_type), "STORED_NAMES", {}).items():
        name = name.replace(part, other)
    return name.removesuffix(".")


def constants(model_type: str, spec: DecoderSpec) -> Mapping[str, float]:
    """Return the stored tensors of one number that edgekit has built in, and that number.

    transformers leaves them to chance where a file lacks them, so who writes one writes them.
    """
    of_family = getattr(get(model_type), "constants", None)
    found: Mapping[str, float] = of_family(spec) if of_family else {}
    return found


def leftovers(model_type: str, spec: DecoderSpec) -> Collection[str]:
    """Return the tensors that files of a family may hold and that neither transformers reads."""
    of_family = getattr(get(model_type), "leftovers", None)
    found: Collection[str] = of_family(spec) if of_family else ()
    return found
