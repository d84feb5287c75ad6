"""Where edgekit keeps what it would otherwise make again."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """Return where decoded models are kept: $EDGEKIT_CACHE, or the user's cache directory."""
    own = os.environ.get("EDGEKIT_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "edgekit"
