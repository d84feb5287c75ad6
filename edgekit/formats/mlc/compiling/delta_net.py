"""What a delta net computes between its matrices, as expressions of TVM, all of it in float32.

Its states are those of `DeltaNet.states`, given to a function and given back by it.
"""

from collections.abc import Callable
from typing import Any

from edgekit.model.mixers import DELTA_EPSILON, DeltaNet


def convolved(net: DeltaNet) -> Callable[..., Any]:
    """Return what writes the activated convolution ``(tokens, channels)`` and its next state."""

    def write(x: Any, taps: Any, state: Any) -> tuple[Any, Any]:
        from tvm import te, tirx

        tokens, kept = x.shape[1], net.taps - 1

        def at(place: Any, channel: Any) -> Any:
            """Return an input, counted from the first that is kept."""
            new = x(0, tirx.max(place - kept, 0), channel).astype("float32")
            return tirx.if_then_else(place < kept, state(channel, tirx.min(place, kept - 1)), new)

        tap = te.reduce_axis((0, net.taps), name="tap")
        total = te.compute(
            (tokens, net.channels),
            lambda t, c: te.sum(at(t + tap, c) * taps(c, 0, tap).astype("float32"), axis=tap),
            name="convolved",
        )
        activated = te.compute(
            total.shape, lambda t, c: total(t, c) * te.sigmoid(total(t, c)), name="activated"
        )
        return activated, te.compute(
            (net.channels, kept), lambda c, place: at(place + tokens, c), name="conv_state"
        )

    return write


def queries_and_keys(net: DeltaNet) -> Callable[..., Any]:
    """Return what writes both as ``(tokens, key_heads, key_head_dim)``, divided by their length."""
    width = net.key_head_dim

    def write(x: Any) -> tuple[Any, Any]:
        from tvm import te

        k = te.reduce_axis((0, width), name="k")
        square = te.compute(
            (x.shape[0], 2 * net.key_heads),
            lambda t, h: te.sum(x(t, h * width + k) * x(t, h * width + k), axis=k),
            name="square",
        )

        def scaled(first: int, scale: float, name: str) -> Any:
            return te.compute(
                (x.shape[0], net.key_heads, width),
                lambda t, h, i: (
                    x(t, (first + h) * width + i)
                    * te.rsqrt(square(t, first + h) + DELTA_EPSILON)
                    * scale
                ),
                name=name,
            )

        return scaled(0, width**-0.5, "query"), scaled(net.key_heads, 1.0, "key")

    return write


def values(net: DeltaNet) -> Callable[..., Any]:
    """Return what writes them as ``(tokens, value_heads, value_head_dim)``."""
    first, width = 2 * net.key_width, net.value_head_dim

    def write(x: Any) -> Any:
        from tvm import te

        shape = (x.shape[0], net.value_heads, width)
        return te.compute(shape, lambda t, h, i: x(t, first + h * width + i), name="value")

    return write


def decay(alpha: Any, rate: Any, bias: Any) -> Any:
    """Write what is left of each state after a token, ``(tokens, value_heads)``."""
    from tvm import te, tirx

    def left(t: Any, h: Any) -> Any:
        x = alpha(0, t, h).astype("float32") + bias(h)
        softplus = tirx.max(x, 0.0) + te.log(1.0 + te.exp(-tirx.abs(x)))
        return te.exp(-te.exp(rate(h)) * softplus)

    return te.compute(alpha.shape[1:], left, name="decay")


def strength(beta: Any) -> Any:
    """Write how much of each token is kept, ``(tokens, value_heads)``."""
    from tvm import te

    return te.compute(
        beta.shape[1:], lambda t, h: te.sigmoid(beta(0, t, h).astype("float32")), name="strength"
    )


def gated(net: DeltaNet, dtype: str) -> Callable[..., Any]:
    """Return what normalizes what was read from the states, and gates it."""
    width = net.value_head_dim

    def write(read: Any, gate: Any, scale: Any) -> Any:
        from tvm import te

        k = te.reduce_axis((0, width), name="k")
        square = te.compute(
            read.shape[:2], lambda t, h: te.sum(read(t, h, k) * read(t, h, k), axis=k)
        )

        def value(_: Any, t: Any, c: Any) -> Any:
            z = gate(0, t, c).astype("float32")
            normed = read(t, c // width, c % width) * te.rsqrt(
                square(t, c // width) / width + net.norm.epsilon
            )
            return (normed * scale(c % width).astype("float32") * z * te.sigmoid(z)).astype(dtype)

        return te.compute((1, read.shape[0], net.value_width), value, name="gated")

    return write
