"""Shapes of weights: matrices are ``(rows out, columns in)``, as a checkpoint stores them."""

from collections.abc import Iterator


Shape = tuple[int, ...]


def linear_weights(
    role: str, rows: int, columns: int, has_bias: bool
) -> Iterator[tuple[str, Shape]]:
    """Yield a matrix and its bias."""
    yield role, (rows, columns)
    if has_bias:
        yield f"{role}_bias", (rows,)
