"""Who computes the attention of a layer: the LLM runners' ``custom_sdpa``, or plain operators.

``custom_sdpa`` masks what comes later and caps no scores. It takes a mask of one's own too, but in
a program one for every prompt would be set aside for the longest, and take the square of the
context; a delegate's is as long as it must.
"""

from edgekit.model.mixers import Attention
from edgekit.model.spec import DecoderSpec


def attention(spec: DecoderSpec, index: int) -> Attention:
    """Return how a layer attends, which must be one that does."""
    mixer = spec.mixer(index)
    assert isinstance(mixer, Attention)  # noqa: S101 - others are refused
    return mixer


def mixed_here(spec: DecoderSpec, *, uses_llm_operators: bool) -> tuple[bool | None, ...]:
    """Return for each layer whether plain operators compute its attention; None: it has none."""
    found: list[bool | None] = [None] * len(spec.layers)
    for index, layer, a in spec.attentions():
        has_operator = layer.window_tokens is None and a.attn_logit_softcap is None
        found[index] = not (uses_llm_operators and has_operator)
    return tuple(found)


def note(spec: DecoderSpec) -> str | None:
    """Return what to know of a program with ``custom_sdpa`` about layers that go without it."""
    count = mixed_here(spec, uses_llm_operators=True).count(True)
    if not count:
        return None
    has_cap = any(a.attn_logit_softcap is not None for _, _, a in spec.attentions())
    lacks = "a cap on scores" if has_cap else "a window"
    return (
        f"{count} of {len(spec.layers)} layers compute attention with plain operators: "
        f"ExecuTorch's custom_sdpa has none with {lacks}"
    )
