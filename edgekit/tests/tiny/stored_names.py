"""Checkpoints under other names, as training tools leave them."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any


def edit_header(weights: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Write a safetensors file again with another header over the same data."""
    stored = weights.read_bytes()
    (length,) = struct.unpack("<Q", stored[:8])
    header = edit(json.loads(stored[8 : 8 + length]))
    text = json.dumps(header).encode()
    weights.write_bytes(struct.pack("<Q", len(text)) + text + stored[8 + length :])


def rename(weights: Path, new_name: Callable[[str], str]) -> None:
    """Give every tensor of a safetensors file another name."""
    edit_header(
        weights,
        lambda header: {
            name if name == "__metadata__" else new_name(name): field
            for name, field in header.items()
        },
    )
