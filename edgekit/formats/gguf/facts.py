"""What a GGUF file says about its decoder, key by key, checked."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from edgekit.errors import UsageError
from edgekit.formats.gguf import architectures
from edgekit.formats.gguf.architectures import Architecture


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a GGUF file says about its decoder, without the weights themselves."""

    metadata: Mapping[str, Any]
    tensors: Collection[str]
    vocab_size: int
    rope_factors: Mapping[
        str, Sequence[float]
    ]  # the small tensors named by `hyperparameters.made_tensors`

    @property
    def architecture(self) -> Architecture:
        """The graph it was written for."""
        return architectures.get(str(self.metadata.get("general.architecture")))

    def value(self, key: str, default: Any) -> Any:
        """Return a key of the architecture."""
        return self.metadata.get(f"{self.architecture.name}.{key}", default)

    def number(self, key: str, default: float | None = None) -> Any:
        """Return a number; a float32 as the shortest decimal that rounds to it.

        Raises:
            UsageError: If it is missing, or not one number.
        """
        value = self.value(key, default)
        if value is None:
            raise UsageError(f"the GGUF file lacks {self.architecture.name}.{key}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UsageError(
                f"{self.architecture.name}.{key} = {value!r} in the GGUF file, expected one number"
            )
        return shortest(value) if isinstance(value, float) else value

    def count(self, key: str, default: int | None = None, *, most: int = 2**31 - 1) -> int:
        """Return how many there are of something: at least one, in every layer alike.

        Raises:
            UsageError: If it is missing, not an integer, or not between 1 and ``most``.
        """
        each = self.value(key, default)
        is_alike = isinstance(each, list) and len(set(each)) == 1
        value = each[0] if is_alike else self.number(key, default)
        if not isinstance(value, int) or not 0 < value <= most:
            raise UsageError(
                f"{self.architecture.name}.{key} = {value!r} in the GGUF file, "
                f"expected a count up to {most}"
            )
        return value

    def each_layer(self, key: str) -> list[float]:
        """Return a number for each layer, of a key of no architecture; a file may give one for all.

        Raises:
            UsageError: If it is missing, or not as many numbers.
        """
        depth = self.depth
        value = self.metadata.get(key)
        values: list[Any] = value if isinstance(value, list) else [value] * depth
        if len(values) < depth or not all(isinstance(each, int | float) for each in values):
            raise UsageError(f"{key} = {value!r} in the GGUF file, expected {depth} numbers")
        return values[:depth]

    def counts(self, key: str, default: int | None = None, *, least: int = 1) -> list[int]:
        """Return how many there are of something in each layer; a file may give one for all.

        Raises:
            UsageError: If it is missing, or not a count for every layer.
        """
        each = self.value(key, default)
        values = each if isinstance(each, list) else [self.number(key, default)] * self.depth
        values = values[: self.depth]
        if len(values) < self.depth or not all(
            isinstance(value, int) and least <= value < 2**31 for value in values
        ):
            raise UsageError(
                f"{self.architecture.name}.{key} = {each!r} in the GGUF file, "
                f"expected {self.depth} counts"
            )
        return values

    def flags(self, key: str) -> list[bool] | None:
        """Return what is so in each layer, None where the file does not say.

        Raises:
            UsageError: If it does not say it of every layer.
        """
        pattern = self.value(key, None)
        if pattern is None:
            return None
        if not isinstance(pattern, list) or len(pattern) < self.depth:
            raise UsageError(f"the GGUF file's {key} = {pattern!r}, expected {self.depth} layers")
        return [bool(flag) for flag in pattern[: self.depth]]

    @cached_property
    def depth(self) -> int:
        """How many layers there are; those that draft tokens come after them.

        Raises:
            UsageError: If it is missing, or there are more than tensors: each layer has its own.
        """
        layers = self.count("block_count", most=len(self.tensors))
        drafting = self.value("nextn_predict_layers", 0)
        return layers - drafting if isinstance(drafting, int) and 0 <= drafting < layers else layers

    def has_tensor(self, part: str) -> bool:
        """Whether a layer has such a tensor."""
        return any(f"blk.{layer}.{part}" in self.tensors for layer in range(self.depth))


def shortest(value: float) -> float:
    """Return the shortest decimal that rounds to the same float32: 9.99999975e-06 is 1e-05."""
    import numpy as np

    return float(str(np.float32(value)))
