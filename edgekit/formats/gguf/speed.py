"""What llama.cpp does for a token besides reading weights, as the bytes that take as long."""

from edgekit.model.spec import DecoderSpec


# A state is copied out of where it is kept, changed, and put back: each reads and writes.
_STATE_PASSES = 6
# One thread alone bends all logits. Fitted to Gemma 4's cells of three phones (docs/targets.md).
_CAPPED_LOGIT_BYTES = 500


def overhead_bytes(spec: DecoderSpec) -> int:
    """Return them for one token."""
    capped = spec.vocab_size if spec.final_logit_softcap is not None else 0
    return _STATE_PASSES * spec.states_bytes + _CAPPED_LOGIT_BYTES * capped
