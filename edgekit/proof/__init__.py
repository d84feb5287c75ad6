"""Proof: that an artifact says what the checkpoint says."""
