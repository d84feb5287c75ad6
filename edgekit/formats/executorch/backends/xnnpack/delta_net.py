"""The gated delta rule for some tokens at once, out of operators that XNNPACK has.

What a token writes depends on what those before it have written: a triangular system of equations,
as long as there are tokens. Its inverse is put together from those of its halves, which are right
to the last digits whatever the keys; repeated squaring, which is shorter, loses all of them past 16
tokens where keys are alike. A call of the program reads at most `CALL_TOKENS`: products grow with
the cube of that.

Source of the rule: Yang et al. 2024, "Gated Delta Networks", section 3.3.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

# This is the workstation's half: nothing that runs on a device imports it.
import torch  # noqa: TID253
from torch import Tensor  # noqa: TID253
from torch.nn import functional  # noqa: TID253

from edgekit.formats.executorch.backends.xnnpack.limits import CALL_TOKENS, MASKS
from edgekit.model.mixers import DELTA_EPSILON, DeltaNet


_UP_TO, _SEEN, _AFTER, _HALVES = 0, 1, 2, 3  # which of `masks` is what


def masks() -> Tensor:
    """Return zeros and ones that say which tokens of a call have to do with which.

    There is a token more than a call has: of a slice that may be the whole, torch exports no
    program for every length.

    Returns:
        ``(MASKS, CALL_TOKENS + 1, CALL_TOKENS + 1)``: whether the first token is no later than the
        second, no earlier, and later; then for blocks of 1, 2, 4 ... tokens, whether the first is
        in the second of two neighbouring blocks and the second in the first.
    """
    places = torch.arange(CALL_TOKENS + 1)
    first, second = places[:, None], places[None]
    found = [first <= second, first >= second, first > second]
    block = 1
    while block < CALL_TOKENS:
        is_pair = first // (2 * block) == second // (2 * block)
        found.append(is_pair & (first // block > second // block))
        block *= 2
    return torch.stack(found).to(torch.float32)


def numbers(net: DeltaNet) -> Iterator[float]:
    """Yield the numbers that a segment with this mixer multiplies with or adds."""
    yield from (0.0, 1.0, DELTA_EPSILON / net.key_head_dim)
    yield from (net.key_head_dim**-0.5, 1 / net.key_head_dim)


def log_decay(step: Tensor, rate: Tensor, number: Callable[[float], Tensor]) -> Tensor:
    """Return ``-exp(rate) * softplus(step)``.

    With e = exp(-|x|), softplus(x) is max(x, 0) + log(1 + e). What rounding 1 + e leaves out is
    added to the logarithm: a state that hardly decays is where it counts.
    """
    positive = torch.relu(step)
    small = torch.exp(step - positive - positive)
    rounded = small + number(1.0)
    soft = positive + torch.log(rounded) + (small - (rounded - number(1.0)))
    return (number(0.0) - torch.exp(rate)) * soft


@dataclass(frozen=True, kw_only=True)
class DeltaRule:
    """What of a segment the rule is computed with."""

    net: DeltaNet
    number: Callable[[float], Tensor]
    mean: Tensor  # ``(1, key head width)``, all 1 / key head width
    ones: Tensor  # ``(1, values per key, 1, 1)``

    def read(
        self, mixed: Tensor, log_decay: Tensor, beta: Tensor, masks: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what is read, ``(tokens, value heads, value head width)``, and the state after it.

        Args:
            mixed: Queries, keys and values, ``(tokens, channels)``.
            log_decay: ``(tokens, value heads)``, none above 0.
            beta: ``(tokens, value heads)``, how much of a value is written.
            masks: Those of `masks`, as far as there are tokens.
            state: ``(value heads, key head width, value head width)``.
        """
        net, width = self.net, self.net.key_width
        query = self._keys(mixed[:, :width], 1 / net.key_head_dim)
        key = self._keys(mixed[:, width : 2 * width], net.key_head_dim**-0.5)
        value = mixed[:, 2 * width :].view(-1, net.value_heads, net.value_head_dim)
        value = value.permute(1, 0, 2)
        beta = beta.permute(1, 0).reshape(net.value_heads, -1, 1)
        steps = log_decay.permute(1, 0).reshape(1, net.value_heads, -1)
        total = torch.bmm(steps, masks[_UP_TO : _UP_TO + 1])  # (1, heads, tokens), of all so far
        later = torch.bmm(steps, masks[_AFTER : _AFTER + 1]).view(net.value_heads, -1, 1)
        row, column = (total.view(net.value_heads, *axes) for axes in ((-1, 1), (1, -1)))
        # Kept from overflow before exp; above the diagonal it is 1 then.
        between = torch.exp(torch.minimum(row - column, self.number(0.0)))
        between = between * masks[_SEEN : _SEEN + 1]
        weighted, seen, keys = key * beta, torch.exp(row), key.permute(0, 2, 1)
        wanted = value * beta - torch.bmm(weighted * seen, state)
        onto = torch.bmm(weighted, keys) * between
        written = torch.bmm(self._inverse(onto, masks), wanted)
        read = torch.bmm(query * seen, state)
        read = read + torch.bmm(torch.bmm(query, keys) * between, written)
        left = (key * torch.exp(later)).permute(0, 2, 1)
        whole = torch.exp((row + later)[:, :1])  # the same for every token
        return read.permute(1, 0, 2), state * whole + torch.bmm(left, written)

    def _keys(self, x: Tensor, scale: float) -> Tensor:
        """Return queries or keys by value head, ``(value heads, tokens, width)``, each a unit."""
        net = self.net
        x = x.view(-1, net.key_heads, net.key_head_dim)
        mean = functional.linear(x * x, self.mean)
        x = x * torch.rsqrt(mean + self.number(DELTA_EPSILON / net.key_head_dim))
        x = (x * self.number(scale)).permute(1, 0, 2)
        if net.values_per_key == 1:
            return x
        shared = x.reshape(net.key_heads, 1, -1, net.key_head_dim) * self.ones
        return shared.reshape(net.value_heads, -1, net.key_head_dim)

    def _inverse(self, onto: Tensor, masks: Tensor) -> Tensor:
        """Return the inverse of a unit matrix plus what is below its diagonal, ``(heads, n, n)``.

        That of a block is those of its halves, and below the first
        ``-inverse(second) below inverse(first)``.
        """
        unit = masks[_SEEN : _SEEN + 1] - masks[_AFTER : _AFTER + 1]
        made = unit - onto * masks[_HALVES : _HALVES + 1]
        for level in range(_HALVES + 1, MASKS):
            below = onto * masks[level : level + 1]
            made = made - torch.bmm(torch.bmm(made, below), made)
        return made
