"""How long edgekit takes to say something: medians of whole processes.

    python edgekit/tests/benchmarks/startup.py

Prints the time of ``edgekit --help``, and of ``import edgekit`` beyond the bare interpreter.
"""

import argparse
import statistics
import subprocess
import sys
import time


RUNS = 15


def median_s(*words: str) -> float:
    """Return the median wall time of a process."""
    times = []
    for _ in range(RUNS):
        started = time.perf_counter()
        subprocess.run([sys.executable, *words], check=True, capture_output=True)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    """Print both."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    bare_s = median_s("-c", "pass")
    print(f"bare interpreter      {bare_s * 1e3:6.1f} ms")
    imported_s = median_s("-c", "import edgekit")
    print(f"import edgekit        {(imported_s - bare_s) * 1e3:6.1f} ms above it (goal: <= 30)")
    help_s = median_s("-m", "edgekit", "--help")
    print(f"edgekit --help        {help_s * 1e3:6.1f} ms (goal: <= 150)")


if __name__ == "__main__":
    main()
