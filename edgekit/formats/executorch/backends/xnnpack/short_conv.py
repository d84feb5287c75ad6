"""Convolutions over the last few tokens, channel by channel, and the columns they keep of a text.

What a convolution sees is needed once for each of its taps, from one token earlier each time. So it
leaves its delegate, joins what is kept of the tokens before, and enters the next as so many slices.
"""

from collections.abc import Sequence
from dataclasses import dataclass

# This is the workstation's half: nothing that runs on a device imports it.
import torch  # noqa: TID253
from torch import Tensor  # noqa: TID253


@dataclass(frozen=True, kw_only=True)
class Window:
    """What a convolution reads of some tokens, and what it keeps for those that follow."""

    slices: tuple[Tensor, ...]  # for each tap ``(tokens, channels)``; the last is what it sees
    kept: Tensor  # ``(taps - 1, channels)``


def window(earlier: Tensor, made: Tensor) -> Window:
    """Return what a convolution reads.

    Args:
        earlier: What it kept, ``(taps - 1, channels)``.
        made: What it sees of the tokens at hand, ``(tokens, channels)``.
    """
    tokens, taps = made.shape[0], earlier.shape[0] + 1
    known = torch.cat((earlier, made))
    slices = (known[tap : tap + tokens] for tap in range(taps - 1))
    return Window(slices=(*slices, made), kept=known[tokens:])


def convolve(taps: Tensor, slices: Sequence[Tensor]) -> Tensor:
    """Return the sum of the slices, each times its taps; XNNPACK has all of it.

    Args:
        taps: ``(channels, taps)``.
        slices: Those of a `Window`.
    """
    rows = taps.permute(1, 0)
    products = [it * rows[tap : tap + 1] for tap, it in enumerate(slices)]
    made = products[0]
    for product in products[1:]:
        made = made + product
    return made
