"""What llama.cpp does for a token besides reading weights."""

from edgekit.model.spec import DecoderSpec


# A state is copied out of where it is kept, changed, and put back: each reads and writes.
_STATE_PASSES = 6
# One thread alone bends all logits. Fitted to Gemma 4's cells of three phones (docs/targets.md),
# the only model there that does: with whatever else it does beside other models.
CAPPED_LOGIT_S = 46e-9


def overhead_bytes(spec: DecoderSpec) -> int:
    """Return the bytes that states move for one token."""
    return _STATE_PASSES * spec.states_bytes


def overhead_s(spec: DecoderSpec) -> float:
    """Return the time of the rest."""
    return CAPPED_LOGIT_S * spec.vocab_size if spec.final_logit_softcap is not None else 0.0
