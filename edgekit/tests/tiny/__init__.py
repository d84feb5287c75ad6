"""Tiny real things that tests are about: checkpoints, tokenizers, adapters, vocabularies."""
