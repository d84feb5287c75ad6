"""Bundles: what is handed over, how it is written at once, and what it must say on a device."""
