"""Quantization: which tensor type each weight gets, and how numbers round."""
