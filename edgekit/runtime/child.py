"""Child processes of edgekit's own modules: what they import, start, and may die of."""

import os
from pathlib import Path


KILLED = 137  # 128 + SIGKILL
_DEATHS = {
    132: "stopped at an illegal instruction: it was built for a newer processor",
    134: "aborted",
    KILLED: "was killed, as the system does when memory runs out",
    139: "crashed with a segmentation fault",
}


def environment() -> dict[str, str]:
    """Let a child import this edgekit, installed or not; a ggml that aborts starts no debugger."""
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    joined = os.pathsep.join(filter(None, paths))
    return os.environ | {"PYTHONPATH": joined, "GGML_NO_BACKTRACE": "1"}


def shell_status(returncode: int) -> int:
    """Return the status that a shell gives: 128 and the signal's number for one that died."""
    return 128 - returncode if returncode < 0 else returncode


def death_of(status: int) -> str | None:
    """Return how a process died, by its `shell_status`; None if it ended by itself."""
    if status <= 128:
        return None
    return _DEATHS.get(status, f"was ended by signal {status - 128}")
