"""Turn a fine-tuned small language model into artifacts that fit a device, and prove that they do.

Read the package in the order of the main job: ``cli`` parses, ``export`` tells the story, ``plan``
decides, ``formats`` convert, ``verify`` proves, ``bundle`` keeps the result; on the device ``run``
answers and ``validate`` measures and judges.

Every verb is a function here too: ``edgekit.export("demo", "raspberry-pi-5-8gb")``. A verb's
function and its module share a name; as an attribute of the package it is the function.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from edgekit.bundle.manifest import Bundle as Bundle
    from edgekit.calibrate_target import calibrate_target as calibrate_target
    from edgekit.compare import compare as compare
    from edgekit.doctor import doctor as doctor
    from edgekit.errors import EdgekitError as EdgekitError
    from edgekit.export import export as export
    from edgekit.inspect import inspect as inspect
    from edgekit.merge import merge as merge
    from edgekit.plan import plan as plan
    from edgekit.run import Chat as Chat
    from edgekit.run import Runner as Runner
    from edgekit.run import run as run
    from edgekit.runtime.generate import Sampling as Sampling
    from edgekit.serve import serve as serve
    from edgekit.source.opening import open_checkpoint as open_checkpoint
    from edgekit.target import Target as Target
    from edgekit.target import load
    from edgekit.validate import validate as validate
    from edgekit.verify import verify as verify
    from edgekit.versions import EDGEKIT

    load_target = load
    __version__ = EDGEKIT

_PLACES = {
    "Bundle": "bundle.manifest", "Chat": "run", "EdgekitError": "errors", "Runner": "run",
    "Sampling": "runtime.generate", "Target": "target", "calibrate_target": "calibrate_target",
    "compare": "compare", "doctor": "doctor", "export": "export",
    "inspect": "inspect", "load_target": "target", "merge": "merge",
    "open_checkpoint": "source.opening", "plan": "plan", "run": "run", "serve": "serve",
    "validate": "validate", "verify": "verify", "__version__": "versions",
}  # fmt: skip
_OTHER_NAMES = {"load_target": "load", "__version__": "EDGEKIT"}

__all__ = [name for name in _PLACES if name != "__version__"]


class _Package(ModuleType):
    """Keeps the import of a verb's module from hiding the verb's function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _PLACES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: ``import edgekit`` stays cheap."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(
        importlib.import_module(f"{__name__}.{_PLACES[name]}"), _OTHER_NAMES.get(name, name)
    )
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, and nothing of how they are found."""
    return sorted(_PLACES)
