"""How close two models are: their next-token distributions compared on the same text, as a stream.

Both logit streams pass through here chunk by chunk; only one number per position is kept.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Rows = npt.NDArray[np.float32]
    Ids = npt.NDArray[np.int64]


# Logits this close may change places in float32: exact runtimes are off by up to 3e-5 of about 10.
_TIE = 1e-4
_BLOCK_ROWS = 64  # float64 copies of this many rows are held at once


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """What a comparison found; KL in nats, from the reference to the candidate."""

    positions: int
    mean_kl_nats: float
    p99_kl_nats: float
    max_kl_nats: float
    same_top_token: float  # share of positions, 0 to 1
    perplexity_ratio: float  # candidate / reference on the text's own next tokens
    max_logit_difference: float


class Comparison:
    """Collects positions until `result` is asked for."""

    def __init__(self) -> None:
        self._kl: list[float] = []
        self._same_top = 0
        self._reference_loss: list[float] = []
        self._candidate_loss: list[float] = []
        self._max_difference = 0.0

    def add(self, reference: "Rows", candidate: "Rows", ids: "Ids") -> None:
        """Compare the logits after each of some tokens.

        Args:
            reference: float32, shape ``(tokens, vocabulary)``.
            candidate: The same shape.
            ids: int, shape ``(tokens,)``: the tokens read; row i predicts ``ids[i + 1]``.
        """
        for first in range(0, len(ids), _BLOCK_ROWS):
            block = slice(first, first + _BLOCK_ROWS)
            following = ids[first + 1 : first + _BLOCK_ROWS + 1]
            self._add_block(reference[block], candidate[block], following)

    def _add_block(self, reference: "Rows", candidate: "Rows", following: "Ids") -> None:
        import numpy as np

        log_p, log_q = _log_softmax(reference), _log_softmax(candidate)
        self._kl += (np.exp(log_p) * (log_p - log_q)).sum(axis=1).tolist()
        self._same_top += _same_top_tokens(reference, candidate)
        difference = np.abs(reference - candidate).max()
        self._max_difference = float(np.maximum(self._max_difference, difference))  # NaN stays
        rows = np.arange(len(following))
        self._reference_loss += (-log_p[rows, following]).tolist()
        self._candidate_loss += (-log_q[rows, following]).tolist()

    def result(self) -> Fidelity:
        """Return the statistics of everything added."""
        import numpy as np

        loss_difference = float(np.mean(self._candidate_loss) - np.mean(self._reference_loss))
        return Fidelity(
            positions=len(self._kl),
            mean_kl_nats=float(np.mean(self._kl)),
            p99_kl_nats=float(np.quantile(self._kl, 0.99)),
            max_kl_nats=float(np.max(self._kl)),
            same_top_token=self._same_top / len(self._kl),
            perplexity_ratio=float(np.exp(loss_difference)),
            max_logit_difference=self._max_difference,
        )


def _same_top_tokens(reference: "Rows", candidate: "Rows") -> int:
    """Count positions where the candidate's likeliest token is the reference's, or tied with it."""
    import numpy as np

    chosen = np.take_along_axis(reference, candidate.argmax(axis=1)[:, None], axis=1)[:, 0]
    return int((chosen >= reference.max(axis=1) - _TIE).sum())


def _log_softmax(logits: "Rows") -> "npt.NDArray[np.float64]":
    import numpy as np

    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted
