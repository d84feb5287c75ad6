"""Open an artifact in its runtime in a process of its own: where native code aborts, that ends.

``python -m edgekit.proof.load_probe gguf model.gguf 4096`` loads the file and asks for one token.
"""

import subprocess
import sys
from pathlib import Path

from edgekit import formats
from edgekit.errors import EdgekitError, ToolchainError
from edgekit.runtime.child import death_of, environment, shell_status


TIMEOUT_S = 900  # reading 8 GB from a memory card takes three minutes
LOG_LINES = 20


def probe(format: str, path: Path, *, context_tokens: int) -> None:
    """Load an artifact and ask for one token, without risk to this process.

    Raises:
        ToolchainError: If its runtime refuses it, or dies over it; the log has its last words.
    """
    runtime = formats.get(format).RUNTIME
    command = [sys.executable, "-P", "-m", __name__, format, str(path), str(context_tokens)]
    try:
        result = subprocess.run(
            command, env=environment(), capture_output=True, check=False, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise ToolchainError(
            f"{runtime} did not say one token from {path} in {TIMEOUT_S} s",
            log=_tail(error.stderr or b""),
        ) from error
    if result.returncode != 0:
        end = death_of(shell_status(result.returncode)) or "failed"
        raise ToolchainError(
            f"{runtime} {end}; it was given {path}",
            hint="no bundle was written; report the model, with the log",
            log=_tail(result.stderr),
        )


def _tail(output: bytes) -> str:
    lines = output.decode("utf-8", errors="replace").strip().splitlines()
    return "\n".join(lines[-LOG_LINES:])


def main(format: str, path: Path, context_tokens: int) -> None:
    """Do what `probe` has a child do."""
    try:
        session = formats.running(format).load(path, context_tokens=context_tokens)
        session.prefill([0])
        session.close()
    except EdgekitError as error:
        said = error.log if isinstance(error, ToolchainError) else ""
        sys.exit(f"{error}\n{said}".strip())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
