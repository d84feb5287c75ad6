"""What a program holds: the weights of a checkpoint, each as a recipe has it, row by row."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from edgekit.errors import UsageError
from edgekit.formats.executorch import slopes, tensor_types
from edgekit.model.shapes import Shape
from edgekit.progress import Advance
from edgekit.quant.planned import PlannedWeight, importance_of, solved_of


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgekit.model.checkpoint_protocol import CheckpointProtocol
    from edgekit.model.spec import DecoderSpec

    Rows = npt.NDArray[np.float32]


# What tokens are looked up in, by role; no back-end need have them.
TABLES = ("token_embedding", "layer_embedding")


def shapes(spec: "DecoderSpec") -> Iterator[tuple[str, Shape]]:
    """Yield every weight by role, in the shape that programs hold it in.

    That of the checkpoint, but for the embeddings of layers: a row of theirs is one layer's, for
    one token. It can be looked up when the layer is there, and no token's rows for all layers need
    be kept.
    """
    for role, shape in spec.weights():
        if role == "layer_embedding" and spec.layer_embedding:
            yield role, (shape[0] * len(spec.layers), spec.layer_embedding.width)
        else:
            yield role, shape


@dataclass(frozen=True, kw_only=True)
class ProgramWeight(PlannedWeight):
    """One weight of the checkpoint, and what holds it."""

    @classmethod
    def of(cls, role: str, shape: Shape, *, wanted: str, stored: str) -> Self:
        """Return a weight as it is stored."""
        sizes = (part.size_bytes for part in tensor_types.parts(role, shape, stored))
        return cls(
            role=role,
            shape=shape,
            wanted=wanted,
            tensor_type=stored,
            size_bytes=sum(sizes),
            is_coarse=stored in tensor_types.COARSE,
            lattice=tensor_types.lattice(stored),
        )

    @property
    def parts(self) -> tuple[tensor_types.Part, ...]:
        """The bytes that hold it."""
        return tuple(tensor_types.parts(self.role, self.shape, self.tensor_type))


@dataclass(frozen=True, kw_only=True)
class Job:
    """A program to be written."""

    checkpoint: "CheckpointProtocol"
    variant: str
    recipe: str
    weights: tuple[ProgramWeight, ...]
    context_tokens: int
    constants: Mapping[str, Any]  # what methods without arguments return, by name
    progress: Advance  # to be told how many weights were just read

    @property
    def spec(self) -> "DecoderSpec":
        """The decoder, as far as texts go."""
        return self.checkpoint.spec.within(self.context_tokens)

    @property
    def tensor_types(self) -> dict[str, str]:
        """How each weight is stored, by role."""
        return {weight.role: weight.tensor_type for weight in self.weights}

    def blocks(self, weight: ProgramWeight) -> "Iterator[tuple[int, Rows]]":
        """Yield first rows and float32 ``(rows, …)`` as programs hold them; tell the progress."""
        for first, rows in self.checkpoint.blocks(weight.role):
            held = rows.reshape(-1, *weight.shape[1:])
            yield first * (len(held) // len(rows)), slopes.to_slopes(weight.role, held)
            self.progress(rows.size)

    def encoded(
        self, weight: ProgramWeight
    ) -> "Iterator[tuple[int, list[npt.NDArray[np.generic]]]]":
        """Yield first rows and the encoded ones, an array ``(rows, …)`` for each part.

        Raises:
            UsageError: If a weight is too large for its tensor type; it is named.
        """
        solved = solved_of(self.checkpoint.calibration, weight.role)
        if solved is not None:
            yield 0, [*solved]
            self.progress(weight.parameters)
            return
        importance = importance_of(self.checkpoint.calibration, weight)
        for first, rows in self.blocks(weight):
            try:
                yield first, tensor_types.encode(rows, weight.tensor_type, importance=importance)
            except UsageError as error:
                raise UsageError(f"{weight.role}: {error}", hint=error.hint) from error
