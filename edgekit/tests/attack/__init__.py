"""Hostile and broken input by the thousand, and a count of what edgekit did with it.

``python -m edgekit.tests.attack --seconds N`` runs every attack in `kinds` in a process of its own
and prints a table. A module put there is found; nothing lists them.
"""
