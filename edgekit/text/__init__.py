"""Text: how a model reads and speaks, without transformers."""
