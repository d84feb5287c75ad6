"""What every part of a decoder does in torch: weights by role, norms, caps."""

from typing import TYPE_CHECKING, TypeAlias

from edgekit.formats import DecoderWeights
from edgekit.model.norm import Norm


if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    Observer: TypeAlias = Callable[[str, torch.Tensor], None]


class Weights:
    """Weights of one layer by role, read when first asked for and then kept."""

    def __init__(
        self, model: DecoderWeights, *, prefix: str, observe: "Observer | None" = None
    ) -> None:
        self._model = model
        self._prefix = prefix
        self._observe = observe
        self._kept: dict[str, torch.Tensor] = {}

    def __getitem__(self, role: str) -> "torch.Tensor":
        import torch

        if role not in self._kept:
            self._kept[role] = torch.from_numpy(self._model.weight(self._prefix + role))
        return self._kept[role]

    def project(
        self, role: str, x: "torch.Tensor", *, has_bias: bool = False, expert: int | None = None
    ) -> "torch.Tensor":
        """Multiply with a matrix, and add its bias.

        Args:
            role: Of the matrix, without its layer.
            x: Float32 ``(tokens, columns)``.
            has_bias: Whether there is one.
            expert: Which of several matrices, where a layer has experts.

        Returns:
            Of shape ``(tokens, rows)``, float32.
        """
        from torch.nn import functional

        if self._observe:
            self._observe(self._prefix + role, x)
        matrix = self[role] if expert is None else self[role][expert]
        return functional.linear(x, matrix, self[f"{role}_bias"] if has_bias else None)


def normalize(norm: Norm, weights: Weights, role: str, x: "torch.Tensor") -> "torch.Tensor":
    """Normalize the last axis of a float32 array; the result has its shape.

    A weight of two dimensions is one row for each head.
    """
    if norm.kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x * (x.square().mean(-1, keepdim=True) + norm.epsilon).rsqrt()
    weight = weights[role]
    x = x * (1 + weight if norm.unit_offset else weight)
    return x + weights[f"{role}_bias"] if norm.has_bias else x


def soften(x: "torch.Tensor", cap: float) -> "torch.Tensor":
    """Return a float32 array of the same shape, softly kept within a cap."""
    return cap * (x / cap).tanh()
