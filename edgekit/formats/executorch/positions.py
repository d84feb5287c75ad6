"""What positions do to queries and keys, as a module of torch."""

# This is the workstation's half: nothing that runs on a device imports it.
import torch  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253

from edgekit.formats.executorch.arithmetic import query_growth, ropes
from edgekit.model.rope import Rope
from edgekit.model.spec import DecoderSpec


class Positions(nn.Module):  # type: ignore[misc]  # it is Any here
    """How queries and keys rotate, and queries grow, with their positions: once for all layers."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.query_growth = query_growth(spec)
        self.ropes = ropes(spec)
        for number, rope in enumerate(self.ropes):
            self._keep(f"frequencies_{number}", frequencies(rope, text_tokens=1))
            border = rope.original_max_position_embeddings
            if border is not None:
                self._keep(f"long_frequencies_{number}", frequencies(rope, text_tokens=border + 1))

    def _keep(self, name: str, values: Tensor) -> None:
        self.register_buffer(name, values, persistent=False)

    def rotations(self, input_pos: Tensor) -> dict[Rope, tuple[Tensor, Tensor]]:
        """Return for each rope cosine and sine, of shape ``(tokens, 1, width)``."""
        return {
            rope: (torch.cat((cosine, cosine), -1), torch.cat((-sine, sine), -1))
            for rope, (cosine, sine) in self.waves(input_pos).items()
        }

    def waves(self, input_pos: Tensor) -> dict[Rope, tuple[Tensor, Tensor]]:
        """Return for each rope cosine and sine, of shape ``(tokens, 1, half its width)``."""
        found: dict[Rope, tuple[Tensor, Tensor]] = {}
        positions = input_pos.to(torch.float32)[:, None, None]
        for number, rope in enumerate(self.ropes):
            angles = positions * self._frequencies(number, rope, input_pos)
            waves = (angles.cos(), angles.sin())
            cosine, sine = (wave * rope.attention_factor for wave in waves)
            found[rope] = cosine, sine
        return found

    def growth(self, input_pos: Tensor) -> Tensor | None:
        """Return what queries are multiplied with, of shape ``(tokens, 1, 1)``; None: nothing."""
        grown = self.query_growth
        if grown is None:
            return None
        steps = torch.div(input_pos, grown.step_tokens, rounding_mode="floor")
        return 1 + grown.rate * torch.log(1 + steps.to(torch.float32))[:, None, None]

    def _frequencies(self, number: int, rope: Rope, input_pos: Tensor) -> Tensor:
        usual = self.get_buffer(f"frequencies_{number}")
        border = rope.original_max_position_embeddings
        if border is None:
            return usual
        # All positions take the long factors once the last is past the border.
        is_long = input_pos[-1:] >= border
        return torch.where(is_long, self.get_buffer(f"long_frequencies_{number}"), usual)


def frequencies(rope: Rope, *, text_tokens: int) -> Tensor:
    """Return the angle of one token's step, for each pair of channels, as transformers does."""
    exponents = torch.arange(0, rope.width, 2, dtype=torch.float32) / rope.width
    divisors = torch.tensor(rope.divisors(text_tokens), dtype=torch.float32)
    return 1.0 / (divisors * rope.theta**exponents)
