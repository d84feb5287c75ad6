"""How much of a text a program for XNNPACK reads at once."""

from edgekit.model.mixers import DeltaNet
from edgekit.model.spec import DecoderSpec


CALL_TOKENS = 64  # where there is a delta net, whose products grow with the cube of it


def call_tokens(spec: DecoderSpec, *, context_tokens: int) -> int:
    """Return how many tokens a call may have."""
    has_nets = any(isinstance(spec.mixer(index), DeltaNet) for index in range(len(spec.layers)))
    return min(CALL_TOKENS, context_tokens) if has_nets else context_tokens
