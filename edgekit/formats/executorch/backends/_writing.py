"""What a back-end decides about the programs written for it; most of it is the same for all."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.formats import Layout, MemoryUse
from edgekit.formats.executorch import tensor_types
from edgekit.formats.executorch.backends import Backend


if TYPE_CHECKING:
    from edgekit.formats.executorch.planned import Job, ProgramWeight
    from edgekit.model.shapes import Shape
    from edgekit.model.spec import DecoderSpec


class BackendWriting(ABC):
    """How programs for one back-end are planned and written."""

    backend: Backend

    def refuse(  # noqa: B027 - most refuse nothing
        self, spec: "DecoderSpec", variant: str, *, context_tokens: int
    ) -> None:
        """Check that the back-end computes this decoder in texts this long.

        Raises:
            UsageError: If not; the message names the difference, the hint a variant that does.
        """

    def notes(self, spec: "DecoderSpec", variant: str) -> Iterable[str]:
        """Return what a user should know of how this decoder is computed."""
        del spec, variant
        return ()

    def meant_by(self, wanted: str, *, recipe: str) -> str:
        """Return the back-end's own tensor type for one that a recipe asks for."""
        del recipe
        return wanted

    def stored_as(self, wanted: str, shape: "Shape", *, recipe: str) -> str:
        """Return the tensor type that a weight really gets where ``wanted`` is meant."""
        del recipe
        return tensor_types.stored_as(wanted, shape[-1])

    def constants(
        self, spec: "DecoderSpec", variant: str, *, context_tokens: int
    ) -> Mapping[str, Any]:
        """Return what runners are told otherwise than by `conversion.metadata`."""
        del spec, context_tokens
        return self.backend.builds[variant].constants

    @abstractmethod
    def file_bytes(
        self, spec: "DecoderSpec", planned: tuple["ProgramWeight", ...], variant: str
    ) -> int:
        """Return about how large the program gets: within a hundredth."""

    @abstractmethod
    def memory_use(self, spec: "DecoderSpec", layout: Layout, *, context_tokens: int) -> MemoryUse:
        """Return what a runtime will hold."""

    @abstractmethod
    def write(self, job: "Job", path: Path) -> Mapping[str, Any]:
        """Write the program, and return how much of the work the back-end does.

        Raises:
            ToolchainError: If ExecuTorch's own kernels would have to multiply by a matrix.
        """
