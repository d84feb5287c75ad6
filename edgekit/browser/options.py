"""How a browser is asked for on the command line: ``browser?backend=wasm&adapter=software``."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Self, cast, get_args
from urllib.parse import parse_qsl

from edgekit.errors import UsageError


Backend = Literal["webgpu", "wasm"]
Adapter = Literal["software"]
NAME = "browser"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """A GPU that the browser's own is held to."""

    at_most: Mapping[str, int] = field(default_factory=dict)  # by name of the limit
    hidden: tuple[str, ...] = ()  # features that it has not


@dataclass(frozen=True, kw_only=True)
class BrowserOptions:
    """What of a browser is not left to it."""

    backend: Backend | None = None  # None: WebGPU where it can, else WebAssembly
    adapter: Adapter | None = None  # None: the machine's GPU, or one of software where it has none
    limits: Limits = field(default_factory=Limits)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``browser?name=value&…``.

        Raises:
            UsageError: If a name or a value is unknown.
        """
        _, _, query = text.partition("?")
        known = {"backend": get_args(Backend), "adapter": get_args(Adapter)}
        found = dict(parse_qsl(query, keep_blank_values=True))
        for name, value in found.items():
            if value not in known.get(name, ()):
                ways = "&".join(f"{key}={'|'.join(values)}" for key, values in known.items())
                raise UsageError(
                    f"{text!r} is not a browser: {name}={value} is unknown",
                    hint=f"write {NAME}, or {NAME}?{ways}",
                )
        return cls(
            backend=cast("Backend | None", found.get("backend")),
            adapter=cast("Adapter | None", found.get("adapter")),
        )


def is_browser(device: str) -> bool:
    """Tell whether a device is named that is a browser."""
    return device.partition("?")[0] == NAME
