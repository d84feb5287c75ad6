"""Who computes the attention of a layer: the LLM runners' ``custom_sdpa``, or plain operators.

``custom_sdpa`` masks what comes later and caps no scores. It takes a mask of one's own too, but in
a program one for every prompt would be set aside for the longest, and take the square of the
context; a delegate's is as long as it must.
"""

from edgekit.model.spec import DecoderSpec


def mixed_here(spec: DecoderSpec, *, uses_llm_operators: bool) -> tuple[bool, ...]:
    """Return for each layer whether plain operators compute its attention."""
    if not uses_llm_operators or spec.attention.attn_logit_softcap is not None:
        return (True,) * len(spec.layers)
    return tuple(layer.window_tokens is not None for layer in spec.layers)


def note(spec: DecoderSpec) -> str | None:
    """Return what to know of a program with ``custom_sdpa`` about layers that go without it."""
    count = sum(mixed_here(spec, uses_llm_operators=True))
    if not count:
        return None
    lacks = "a cap on scores" if spec.attention.attn_logit_softcap is not None else "a window"
    return (
        f"{count} of {len(spec.layers)} layers compute attention with plain operators: "
        f"ExecuTorch's custom_sdpa has none with {lacks}"
    )
