"""Adapters: what PEFT saves, merged into a base one tensor at a time."""
