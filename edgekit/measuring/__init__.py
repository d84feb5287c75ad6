"""Measuring: how a device is reached, what it did, and what follows from that."""
