"""What a format may ask of a checkpoint: known from headers, read some rows at a time."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from edgekit.model.card import ModelCard, SamplingDefaults
from edgekit.model.shapes import Shape
from edgekit.model.spec import DecoderSpec
from edgekit.model.tokenizer_files import TokenizerFiles


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


# How coarse weights find their codes: as the format's own tool rounds, with errors weighted by the
# size of the inputs, or so that the codes of a matrix make up for each other's errors.
QuantMethod = Literal["native", "weighted", "feedback"]
BLOCK_WEIGHTS = 2**22  # 16 MiB of float32 are read, rounded and written at once


def row_chunks(
    shape: Shape, *, weights: int = BLOCK_WEIGHTS, row_multiple: int = 1
) -> Iterator[tuple[int, int]]:
    """Yield ``(first_row, rows)`` so that no read holds more than about so many weights.

    Args:
        shape: Of the tensor.
        weights: How many are read at once; one row at least.
        row_multiple: What the number of rows of each chunk but the last is a multiple of.
    """
    step = max(1, weights // max(1, math.prod(shape[1:])) // row_multiple) * row_multiple
    count = math.prod(shape[:1])  # a number without dimensions is one row
    for first in range(0, count, step):
        yield first, min(step, count - first)


class Tensor(Protocol):
    """One tensor of a checkpoint, or one made from several, not in memory until it is read."""

    @property
    def shape(self) -> Shape:
        """Its dimensions, slowest first."""
        ...

    @property
    def size_bytes(self) -> int:
        """How much of the checkpoint it takes."""
        ...

    def read(self, first_row: int = 0, rows: int | None = None) -> "npt.NDArray[np.float32]":
        """Return some rows, or all, in float32."""
        ...


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What leads the rounding of weights: what their inputs are like, on some text."""

    text_sha256: str
    method: QuantMethod = "weighted"
    # The mean of squares, by role, of shape (columns,); None until it is measured.
    importance: Mapping[str, "npt.NDArray[np.float32]"] | None = None

    # What an artifact stores of weights that are solved already, by role: the arrays of its own
    # encoding, rows first. Rows may change places on the way into a file, columns may not.
    solved: "Mapping[str, Sequence[npt.NDArray[np.generic]]]" = field(default_factory=dict)

    def of(self, role: str) -> "npt.NDArray[np.float32]":
        """Return how large the inputs of a weight of a layer are: float32, shape ``(columns,)``.

        Raises:
            ValueError: If that is announced, but not measured yet.
        """
        if self.importance is None:
            raise ValueError("the calibration is announced, but not measured")
        return self.importance[role]


class Named(Protocol):
    """An adapter, as far as a format writes down where weights came from."""

    @property
    def name(self) -> str:
        """The last part of its path."""
        ...


class CheckpointProtocol(Protocol):
    """A model to be exported, adapters included."""

    @property
    def directory(self) -> Path:
        """Where its files are, for settings that other programs take over as they are."""
        ...

    @property
    def name(self) -> str:
        """The last part of the path: ``SmolLM2-135M-Instruct``."""
        ...

    @property
    def architecture(self) -> str:
        """The ``model_type`` of its config."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """The fields of its config.json, of a wrapped decoder those of its section; or none."""
        ...

    @property
    def spec(self) -> DecoderSpec:
        """What it computes."""
        ...

    @property
    def parameters(self) -> int:
        """How many numbers the decoder has, tied ones once."""
        ...

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """What is stored, by the checkpoint's own names."""
        ...

    @property
    def text(self) -> TokenizerFiles:
        """Its tokenizer, chat template and stop ids."""
        ...

    @property
    def card(self) -> ModelCard:
        """What the model card says."""
        ...

    @property
    def licence(self) -> str | None:
        """The licence that the model card names."""
        ...

    @property
    def sampling(self) -> SamplingDefaults:
        """How the makers of the model sample from it."""
        ...

    @property
    def adapter(self) -> Named | None:
        """The adapter whose deltas are part of the weights, if any."""
        ...

    @property
    def calibration(self) -> Calibration | None:
        """What the fit of quantized weights is weighted with; None: all columns count alike."""
        ...

    def weight(
        self, role: str, first_row: int = 0, rows: int | None = None
    ) -> "npt.NDArray[np.float32]":
        """Return one weight, or some rows of it, in float32; Gemma's norms without their one.

        Raises:
            UsageError: If it holds NaN or infinity; the message names the tensor.
        """
        ...

    def blocks(
        self, role: str, *, row_multiple: int = 1
    ) -> Iterator[tuple[int, "npt.NDArray[np.float32]"]]:
        """Yield a weight some million numbers at a time, as a decoder multiplies with it.

        Args:
            role: One of ``spec.weights()``.
            row_multiple: What the number of rows of each block is a multiple of.

        Yields:
            The number of the first row, and float32 of shape ``(rows, columns)`` or ``(rows,)``;
            Gemma's norms with their one.

        Raises:
            UsageError: If it holds NaN or infinity; the message names the tensor.
        """
        ...
