"""What a browser says of its GPU."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A WebGPU adapter."""

    vendor: str
    architecture: str
    device: str
    description: str
    is_software: bool  # computed by the processor: its speed is nobody's
    features: tuple[str, ...]
    limits: dict[str, int]

    @property
    def name(self) -> str:
        """``WebGPU (google swiftshader)``."""
        return f"WebGPU ({' '.join(filter(None, (self.vendor, self.architecture))) or 'unnamed'})"

    @classmethod
    def read(cls, fields: Mapping[str, Any] | None) -> Self | None:
        """Return what ``gpu.mjs`` describes; None where there is no adapter."""
        if fields is None:
            return None
        return cls(
            vendor=fields["vendor"],
            architecture=fields["architecture"],
            device=fields["device"],
            description=fields["description"],
            is_software=fields["is_software"],
            features=tuple(fields["features"]),
            limits={name: int(value) for name, value in fields["limits"].items()},
        )
