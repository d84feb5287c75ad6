"""How much of a text a program for XNNPACK reads at once."""

from edgekit.model.spec import DecoderSpec


CALL_TOKENS = 64  # where there is a delta net, whose products grow with the cube of it
MASKS = 3 + (CALL_TOKENS - 1).bit_length()  # that say which tokens of a call see which, and halves


def call_tokens(spec: DecoderSpec, *, context_tokens: int) -> int:
    """Return how many tokens a call may have."""
    return min(CALL_TOKENS, context_tokens) if spec.has_delta_nets else context_tokens


def masks_bytes(spec: DecoderSpec) -> int:
    """Return what a program's masks take, which it has where there is a delta net."""
    return 4 * MASKS * (CALL_TOKENS + 1) ** 2 if spec.has_delta_nets else 0
