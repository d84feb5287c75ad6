"""GGUF: what llama.cpp loads."""
