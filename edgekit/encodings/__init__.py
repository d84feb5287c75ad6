"""Encodings: bytes of files, without a word about models."""
