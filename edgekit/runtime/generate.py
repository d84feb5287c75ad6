"""Generation: from a prompt's token ids to an answer's, one at a time, over any session.

It knows ids and logits and no text. The order of the filters is the one of transformers:
repetition penalty, temperature, top-k, top-p, min-p.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self

from edgekit.errors import ToolchainError, UsageError
from edgekit.runtime.session import Session


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgekit.runtime.session import Logits


# Why an answer ended: at a stop id, at max_tokens, or because the model's context is full.
FinishReason = Literal["stop", "length", "context"]


_BLOCK = 64  # values of which one maximum is taken


class PromptTooLongError(UsageError):
    """The prompt alone is longer than the context."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen; temperature 0 takes the most likely one.

    Raises:
        UsageError: If a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0  # only the k most likely tokens; 0: all
    top_p: float = 1.0  # the fewest tokens that together have this probability
    min_p: float = 0.0  # no token less likely than this share of the most likely one
    repetition_penalty: float = 1.0  # divides the logits of what was said already; 1: none
    seed: int | None = None  # None: other tokens every time

    def __post_init__(self) -> None:
        """Check every value."""
        _check_range("temperature", self.temperature, 0, 100)
        _check_range("top_k", self.top_k, 0, math.inf)
        _check_range("top_p", self.top_p, 0, 1, is_open=True)
        _check_range("min_p", self.min_p, 0, 1)
        _check_range("repetition_penalty", self.repetition_penalty, 0, 100, is_open=True)
        if self.seed is not None:
            _check_range("seed", self.seed, -(2**63), 2**64 - 1)

    @property
    def is_greedy(self) -> bool:
        """Whether the token is the one with the largest logit, as the model gave it."""
        return self.temperature == 0 and self.repetition_penalty == 1


def _check_range(name: str, value: float, low: float, high: float, is_open: bool = False) -> None:
    if not low <= value <= high or (is_open and value == low):
        below = "<" if is_open else "<="
        raise UsageError(
            f"{name} = {value} is out of range", hint=f"{low} {below} {name} <= {high}"
        )


@dataclass(kw_only=True, eq=False)
class TokenStream(Iterator[int]):
    """The tokens of an answer, as they are made; afterwards, why it ended."""

    session: Session
    prompt_ids: list[int]
    max_tokens: int | None
    stop_ids: frozenset[int]
    sampling: Sampling
    cached_ids: list[int]  # what the session has read
    finish_reason: FinishReason | None = field(default=None, init=False)  # None: not yet
    reused_tokens: int = field(default=0, init=False)  # of the prompt, read before
    decoded_tokens: int = field(default=0, init=False)  # of the answer, read by the session

    def __post_init__(self) -> None:
        """Prepare to read the prompt; nothing runs before the first token is asked for."""
        self._tokens = self._generate()

    def __iter__(self) -> Self:
        """Return itself."""
        return self

    def __next__(self) -> int:
        """Return the next token of the answer."""
        return next(self._tokens)

    def _generate(self) -> Iterator[int]:
        logits = self._read_prompt()
        choose = _chooser(self.sampling, self.prompt_ids)
        given = 0
        while True:
            token = choose(logits)
            if token in self.stop_ids:
                self.finish_reason = "stop"
                return
            given += 1
            yield token
            if given == self.max_tokens:
                self.finish_reason = "length"
                return
            if len(self.cached_ids) == self.session.context_tokens:
                self.finish_reason = "context"
                return
            logits = self._read(token)

    def _read(self, token: int) -> "Logits":
        try:
            logits = self.session.decode(token)
            self.cached_ids.append(token)
        except BaseException:  # Ctrl-C included: whether the session has read it is unknown
            self.cached_ids.clear()
            raise
        self.decoded_tokens += 1
        return logits

    def _read_prompt(self) -> "Logits":
        """Let the session read what it has not read yet: from where the prompt is another text.

        A template may leave out of an earlier answer what was thought, or write it otherwise. There
        is at least one token to read, whose logits are wanted.
        """
        cached, ids = self.cached_ids, self.prompt_ids
        count = _shared_tokens(cached, ids[:-1])
        if count < len(cached) and not (count and self.session.rewind(count)):
            count = 0
        if count == 0:
            self.session.reset()
        self.reused_tokens = count
        cached.clear()  # should the session fail, what it holds is unknown
        logits = self.session.prefill(ids[count:])
        cached.extend(ids)
        return logits


def _shared_tokens(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two texts share at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def generate(  # noqa: PLR0913 - a request in full
    session: Session,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int | None,
    stop_ids: Collection[int],
    sampling: Sampling,
    cached_ids: list[int] | None = None,
) -> TokenStream:
    """Answer a prompt, token by token.

    Args:
        session: What reads and predicts.
        prompt_ids: The prompt, at least one token.
        max_tokens: The length of the answer at most; None goes on to the end of the context.
        stop_ids: Any of these ends the answer and is not part of it.
        sampling: How to choose.
        cached_ids: What ``session`` has read; kept up to date, so that the same list can be passed
            with the next prompt, of which only what is new is then read, where the session can go
            back to what both begin with. None reads everything.

    Raises:
        PromptTooLongError: If the prompt is longer than the context, before anything runs.
        UsageError: If the prompt is empty, or max_tokens is less than one.
    """
    if not prompt_ids:
        raise UsageError("the prompt has no tokens")
    if len(prompt_ids) > session.context_tokens:
        raise PromptTooLongError(
            f"the prompt has {len(prompt_ids)} tokens, the context holds {session.context_tokens}",
            hint="shorten the prompt, or load the bundle with a longer context",
        )
    if max_tokens is not None and max_tokens < 1:
        raise UsageError(f"max_tokens = {max_tokens}, expected at least 1")
    return TokenStream(
        session=session,
        prompt_ids=list(prompt_ids),
        max_tokens=max_tokens,
        stop_ids=frozenset(stop_ids),
        sampling=sampling,
        cached_ids=[] if cached_ids is None else cached_ids,
    )


def _chooser(sampling: Sampling, prompt_ids: Sequence[int]) -> Any:
    return most_likely if sampling.is_greedy else _Sampler(sampling, prompt_ids)


def most_likely(logits: "Logits") -> int:
    """Return the token with the largest logit.

    Raises:
        ToolchainError: If a logit is not a number; it would otherwise be taken for the largest.
    """
    token = int(logits.argmax())
    _check_finite(logits[token])
    return token


def _check_finite(largest: float) -> None:
    if not math.isfinite(largest):
        raise ToolchainError(
            "the runtime returned logits that are not numbers",
            hint="`edgekit verify` shows whether the artifact or this machine is at fault",
        )


class _Sampler:
    """Chooses by chance, the same way for the same seed."""

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int]) -> None:
        import numpy as np

        seed = None if sampling.seed is None else sampling.seed % 2**64
        self._sampling = sampling
        self._random = np.random.default_rng(seed)
        self._seen = set(prompt_ids)

    def __call__(self, logits: "Logits") -> int:
        """Return the next token."""
        if self._sampling.repetition_penalty != 1:
            logits = _penalised(logits, self._seen, self._sampling.repetition_penalty)
        if self._sampling.temperature == 0:
            token = most_likely(logits)
        else:
            tokens, probabilities = candidates(logits, self._sampling)
            at = probabilities.cumsum().searchsorted(self._random.random(), side="right")
            token = int(tokens[min(int(at), len(tokens) - 1)])
        self._seen.add(token)
        return token


def _penalised(logits: "Logits", seen: set[int], penalty: float) -> "Logits":
    import numpy as np

    ids = np.fromiter(seen, dtype=np.int64)
    values = logits[ids]
    logits = logits.copy()  # the array is the session's
    logits[ids] = np.where(values > 0, values / penalty, values * penalty)
    return logits


def candidates(
    logits: "Logits", sampling: Sampling
) -> tuple["npt.NDArray[np.int64]", "npt.NDArray[np.float64]"]:
    """Return the tokens that may come next, and their probabilities.

    int64 and float64, both of shape ``(tokens,)``, in no order.

    Raises:
        ToolchainError: If a logit is not a number.
    """
    import numpy as np

    largest = logits.max()
    _check_finite(largest)
    tokens = largest_of(logits, sampling.top_k or len(logits))
    with np.errstate(over="ignore"):  # a tiny temperature: all but the first become impossible
        weights = np.exp((logits[tokens].astype(np.float64) - largest) / sampling.temperature)
    probabilities = weights / weights.sum()
    if sampling.top_p < 1:
        kept = _nucleus(probabilities, sampling.top_p)
        tokens, probabilities = tokens[kept], probabilities[kept]
    if sampling.min_p > 0:
        is_kept = probabilities >= sampling.min_p * probabilities.max()
        tokens, probabilities = tokens[is_kept], probabilities[is_kept]
    return tokens, probabilities / probabilities.sum()


def _nucleus(probabilities: "npt.NDArray[np.float64]", top_p: float) -> "npt.NDArray[np.int64]":
    """Return the fewest indices whose sum reaches ``top_p``, the one that reaches it included."""
    # Sorting a whole vocabulary takes longer than many a model; a few hundred tokens mostly do.
    best = _sorted_largest(probabilities, 256)
    if probabilities[best].sum() < top_p:
        best = _sorted_largest(probabilities, len(probabilities))
    return best[: int((probabilities[best].cumsum() < top_p).sum()) + 1]


def _sorted_largest(values: "npt.NDArray[np.float64]", k: int) -> "npt.NDArray[np.int64]":
    best = largest_of(values, k)
    return best[(-values[best]).argsort(kind="stable")]


def largest_of(values: "npt.NDArray[Any]", k: int) -> "npt.NDArray[np.int64]":
    """Return the indices of the ``k`` largest values, in no order: int64, shape ``(k,)``."""
    import numpy as np

    if k >= len(values):
        return np.arange(len(values))
    indices = _best_blocks(values, k)
    chosen = values[indices].argpartition(len(indices) - k)[len(indices) - k :]
    best: npt.NDArray[np.int64] = indices[chosen]
    return best


def _best_blocks(values: "npt.NDArray[Any]", k: int) -> "npt.NDArray[np.int64]":
    """Return the indices of the blocks that hold the ``k`` largest values, and of the rest.

    They lie in the ``k`` blocks with the largest maxima, and a maximum is ten times faster than a
    partition.
    """
    import numpy as np

    blocks = len(values) // _BLOCK
    if k >= blocks:
        return np.arange(len(values))
    maxima = values[: blocks * _BLOCK].reshape(blocks, _BLOCK).max(axis=1)
    best = maxima.argpartition(blocks - k)[blocks - k :]
    inside = (best[:, None] * _BLOCK + np.arange(_BLOCK)).ravel()
    return np.concatenate([inside, np.arange(blocks * _BLOCK, len(values))])
