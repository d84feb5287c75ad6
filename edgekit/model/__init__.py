"""Models: what a decoder is, as data."""
