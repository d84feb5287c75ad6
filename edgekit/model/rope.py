"""Rotary positions: which channels of a head turn, how fast, and how that is scaled."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Every frequency divided by the same factor."""

    factor: float


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Slow frequencies divided by ``factor``, fast ones kept, a ramp between (Llama 3.1)."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_context_tokens: int

    def divisor(self, wave_tokens: float) -> float:
        """Return what divides the frequency whose full turn takes ``wave_tokens``."""
        turns = self.original_context_tokens / wave_tokens
        low, high = self.low_frequency_factor, self.high_frequency_factor
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        return 1 / ((1 - kept) / self.factor + kept)


@dataclass(frozen=True, kw_only=True)
class LongRopeScaling:
    """One divisor per frequency, another set once the text outgrows the original context."""

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_context_tokens: int
    attention_factor: float


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """Slow frequencies divided by ``factor``, fast ones kept, and a ramp by their number between.

    Source: Peng et al. 2023, and ``_compute_yarn_parameters`` of transformers 5.
    """

    factor: float
    fast_turns: float  # in the original context: a frequency that makes more is kept
    slow_turns: float  # one that makes fewer is divided
    original_context_tokens: int
    attention_factor: float
    is_truncated: bool  # whether the ramp begins and ends at whole numbers of frequencies

    def divisors(self, width: int, theta: float) -> tuple[float, ...]:
        """Return what divides each frequency."""
        low, high = (self._index(turns, width, theta) for turns in self._turns)
        if self.is_truncated:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        ramp = 0.001 if low == high else high - low
        shares = (min(max((i - low) / ramp, 0.0), 1.0) for i in range(width // 2))
        return tuple(1 / (share / self.factor + 1 - share) for share in shares)

    @property
    def _turns(self) -> tuple[float, float]:
        return self.fast_turns, self.slow_turns

    def _index(self, turns: float, width: int, theta: float) -> float:
        """Return which frequency makes so many turns in the original context."""
        wave_tokens = self.original_context_tokens / (turns * 2 * math.pi)
        return width * math.log(wave_tokens) / (2 * math.log(theta))


def yarn_attention_factor(factor: float, weight: float = 1.0) -> float:
    """Return what YaRN multiplies sine and cosine with where a model does not say."""
    return 1.0 if factor <= 1 else 1 + 0.1 * weight * math.log(factor)


@dataclass(frozen=True, kw_only=True)
class ProportionalScaling:
    """Fast frequencies divided by ``factor``, slow ones left out: their channels do not turn.

    Unlike a rope on a part of the head, the two channels of a pair are half a head apart, and the
    frequencies those of a whole head (Gemma 4; ``_compute_proportional_rope_parameters``,
    transformers 5).
    """

    factor: float
    rotated_pairs: int


RopeScaling = LinearScaling | Llama3Scaling | LongRopeScaling | YarnScaling | ProportionalScaling


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions on the first ``width`` channels of every head, halves rotated together."""

    width: int
    theta: float
    scaling: RopeScaling | None = None

    @property
    def attention_factor(self) -> float:
        """What multiplies sine and cosine."""
        scaling = self.scaling
        if isinstance(scaling, LongRopeScaling | YarnScaling):
            return scaling.attention_factor
        return 1.0

    @property
    def original_max_position_embeddings(self) -> int | None:
        """The longest text before every position is rotated differently; None: any."""
        scaling = self.scaling
        return scaling.original_context_tokens if isinstance(scaling, LongRopeScaling) else None

    def divisors(self, text_tokens: int) -> tuple[float, ...]:
        """Return what divides each frequency ``theta ** (-2 i / width)`` in a text of this length.

        Only longrope looks at the length: past the original context, *every* position of the text
        takes the long factors.
        """
        match self.scaling:
            case None:
                return (1.0,) * (self.width // 2)
            case LinearScaling(factor=factor):
                return (factor,) * (self.width // 2)
            case Llama3Scaling() as scaling:
                waves = (
                    2 * math.pi * self.theta ** (2 * i / self.width) for i in range(self.width // 2)
                )
                return tuple(scaling.divisor(wave) for wave in waves)
            case YarnScaling() as scaling:
                return scaling.divisors(self.width, self.theta)
            case ProportionalScaling(factor=factor, rotated_pairs=turned):
                return (factor,) * turned + (math.inf,) * (self.width // 2 - turned)
            case LongRopeScaling() as scaling:
                is_long = text_tokens > scaling.original_context_tokens
                return scaling.long_factors if is_long else scaling.short_factors
