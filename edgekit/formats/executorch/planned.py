"""What a program shall hold: the weights of a checkpoint, each as a recipe has it, row by row."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekit.errors import UsageError
from edgekit.formats import Progress
from edgekit.formats.executorch import storage
from edgekit.quant.recipe import split_role


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgekit.model.checkpoint_protocol import CheckpointProtocol
    from edgekit.model.spec import DecoderSpec

    Rows = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One weight of the checkpoint, and what holds it."""

    role: str
    shape: tuple[int, ...]
    wanted: str  # the storage the recipe asked for
    stored: str

    @property
    def parts(self) -> tuple[storage.Part, ...]:
        """The bytes that hold it."""
        return tuple(storage.parts(self.role, self.shape, self.stored))

    @property
    def size_bytes(self) -> int:
        """How many they are."""
        return sum(part.size_bytes for part in self.parts)

    @property
    def is_led(self) -> bool:
        """Whether the inputs of a calibration lead its fit: in layers, not the head's."""
        return self.stored in storage.LED and split_role(self.role)[0] is not None


@dataclass(frozen=True, kw_only=True)
class Job:
    """A program to be written."""

    checkpoint: "CheckpointProtocol"
    variant: str
    recipe: str
    weights: tuple[Weight, ...]
    context_tokens: int
    constants: Mapping[str, Any]  # what methods without arguments return, by name
    progress: Progress  # to be told how many weights were just read

    @property
    def spec(self) -> "DecoderSpec":
        """The decoder."""
        return self.checkpoint.spec

    @property
    def storages(self) -> dict[str, str]:
        """How each weight is stored, by role."""
        return {weight.role: weight.stored for weight in self.weights}

    def blocks(self, weight: Weight) -> "Iterator[tuple[int, Rows]]":
        """Yield a weight as `Checkpoint.blocks` does, and tell the progress."""
        for first, rows in self.checkpoint.blocks(weight.role):
            yield first, rows
            self.progress(rows.size)

    def encoded(self, weight: Weight) -> "Iterator[tuple[int, list[npt.NDArray[np.generic]]]]":
        """Yield blocks as `storage.encode` has them, an array for each of the weight's parts."""
        importance = self._importance(weight)
        for first, rows in self.blocks(weight):
            try:
                yield first, storage.encode(rows, weight.stored, importance=importance)
            except UsageError as error:
                raise UsageError(f"{weight.role}: {error}", hint=error.hint) from error

    def _importance(self, weight: Weight) -> "Rows | None":
        calibration = self.checkpoint.calibration
        return calibration.of(weight.role) if calibration and weight.is_led else None
