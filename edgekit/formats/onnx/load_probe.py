"""Open a model in ONNX Runtime in a process of its own, which may die over it.

``python -m edgekit.formats.onnx.load_probe model.onnx 4096`` loads it and asks for one token.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

from edgekit.errors import EdgekitError, ToolchainError
from edgekit.formats.onnx.runtime import OnnxSession


TIMEOUT_S = 900  # reading 8 GB from a memory card takes three minutes
LOG_CHARACTERS = 4000


def probe(path: Path, *, context_tokens: int) -> None:
    """Load a model and ask for one token, without risk to this process.

    Raises:
        ToolchainError: If ONNX Runtime refuses it, or dies over it; the log has its last words.
    """
    command = [sys.executable, "-P", "-m", __name__, str(path), str(context_tokens)]
    paths = [str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    try:
        result = subprocess.run(
            command, env=environment, capture_output=True, check=False, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise ToolchainError(
            f"ONNX Runtime did not say one token from {path} in {TIMEOUT_S} s",
            log=_tail(error.stderr or b""),
        ) from error
    if result.returncode != 0:
        raise ToolchainError(
            f"ONNX Runtime {_how_it_ended(result.returncode)} over {path}",
            hint="no bundle was written; report the model, with the log",
            log=_tail(result.stderr),
        )


def _how_it_ended(status: int) -> str:
    if status > 0:
        return "failed"
    names = {number.value: number.name for number in signal.Signals}
    return f"died with {names.get(-status, f'signal {-status}')}"


def _tail(output: bytes) -> str:
    return output.decode("utf-8", errors="replace").strip()[-LOG_CHARACTERS:]


def main(path: Path, context_tokens: int) -> None:
    """Do what `probe` has a child do."""
    try:
        session = OnnxSession(path, context_tokens=context_tokens)
        session.prefill([0])
        session.close()
    except EdgekitError as error:
        said = error.log if isinstance(error, ToolchainError) else ""
        sys.exit(f"{error}\n{said}".strip())


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
