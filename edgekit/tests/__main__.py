"""Everything that must hold before a change lands: style, types, contracts, tests, examples."""

import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(sysconfig.get_path("scripts"))
STEPS: dict[str, list[str | Path]] = {
    "format": [SCRIPTS / "ruff", "format", "--check"],
    "lint": [SCRIPTS / "ruff", "check"],
    "types": [SCRIPTS / "mypy"],
    "contracts": [SCRIPTS / "lint-imports"],
    "support matrix": [sys.executable, "-m", "edgekit.tests.support_matrix", "--check"],
    "unit tests": [sys.executable, "-m", "pytest", "-q", "-m", "not toolchain and not slow"],
    "real runtimes": [sys.executable, "-m", "pytest", "-q", "-m", "toolchain or slow"],
}


def main() -> int:
    """Run the steps in order, stop at the first that fails, and return its status."""
    for name, command in STEPS.items():
        print(f"=== {name}", flush=True)  # noqa: T201 - the program's output
        started = time.monotonic()
        status = subprocess.run(command, cwd=ROOT, env=os.environ, check=False)
        print(f"=== {name}: {time.monotonic() - started:.0f} s", flush=True)  # noqa: T201
        if status.returncode:
            return status.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
