"""Child processes of edgekit's own modules: what they import, and what they must not start."""

import os
from pathlib import Path


def environment() -> dict[str, str]:
    """Let a child import this edgekit, installed or not; a ggml that aborts starts no debugger."""
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    joined = os.pathsep.join(filter(None, paths))
    return os.environ | {"PYTHONPATH": joined, "GGML_NO_BACKTRACE": "1"}
