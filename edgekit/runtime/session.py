"""What a runtime must offer so that edgekit can prove, run and measure what it loaded."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Logits: TypeAlias = npt.NDArray[np.float32]


class Session(Protocol):
    """A loaded model with a cache of what it has read: token ids in, float32 logits out.

    It knows nothing of text, chat templates, sampling or stop ids; those live above it, once.
    Every method raises `UsageError` when the cache would grow past ``context_tokens`` and
    `ToolchainError` when the runtime fails.
    """

    vocabulary_tokens: int  # the width of the logits
    context_tokens: int  # how many tokens the cache holds

    def prefill(self, ids: Sequence[int]) -> "Logits":
        """Read ``ids`` after what is cached; return the logits after the last one.

        The array has shape ``(vocabulary_tokens,)`` and may be overwritten by the next call.
        """
        ...

    def decode(self, token: int) -> "Logits":
        """Read one token after what is cached; return float32 ``(vocabulary_tokens,)`` logits."""
        ...

    def all_logits(self, ids: Sequence[int]) -> "Logits":
        """Empty the cache, read ``ids``, and return the logits after each of them.

        The array has shape ``(len(ids), vocabulary_tokens)`` and belongs to the caller.
        """
        ...

    def rewind(self, tokens: int) -> bool:
        """Forget what is cached after so many tokens; return whether that was possible.

        The state of a recurrent layer cannot go back, and a window may have let go of what it would
        need. What is cached is unknown then: `reset` it.
        """
        ...

    def reset(self) -> None:
        """Empty the cache."""
        ...

    def close(self) -> None:
        """Give memory back; the session cannot be used afterwards."""
        ...
