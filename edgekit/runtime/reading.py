"""What every session does before it reads token ids: refuse some, and cut the rest into batches."""

from collections.abc import Iterator, Sequence

from edgekit.errors import UsageError
from edgekit.runtime.session import Session


def refuse_empty(ids: Sequence[int]) -> None:
    """Check that a prompt has a last token.

    Raises:
        UsageError: If there is none.
    """
    if not ids:
        raise UsageError("an empty prompt has no next token", hint="pass at least one token")


def refuse(session: Session, ids: Sequence[int], *, cached_tokens: int) -> None:
    """Check that a session can read ``ids`` after what is cached.

    Raises:
        UsageError: If the cache would grow past the context, or an id is not in the vocabulary: a
            negative one would count from the end, a large one would read past it.
    """
    if cached_tokens + len(ids) > session.context_tokens:
        raise UsageError(
            f"{cached_tokens} cached and {len(ids)} new tokens exceed the context of "
            f"{session.context_tokens}",
            hint="shorten the prompt, or export with a larger --context",
        )
    for id in ids:
        if not 0 <= id < session.vocabulary_tokens:
            raise UsageError(
                f"there is no token id {id}, the vocabulary has {session.vocabulary_tokens}"
            )


def batches(ids: Sequence[int], batch_tokens: int) -> Iterator[tuple[int, Sequence[int]]]:
    """Yield a prompt in parts of so many tokens, each with the index of its first."""
    for first in range(0, len(ids), batch_tokens):
        yield first, ids[first : first + batch_tokens]


def outgrows(original_tokens: int | None, *, cached_tokens: int, new_tokens: int) -> bool:
    """Tell whether a text grows past the original context of a longrope while it is read.

    Then every position is rotated differently, and what is cached must be read again, as
    transformers' ``generate`` does. None: there is no such border.
    """
    return (
        original_tokens is not None
        and 0 < cached_tokens <= original_tokens < cached_tokens + new_tokens
    )
