"""MLC weights: time, memory, exact size, and how far planned GPU memory is from WebLLM's figures.

    python edgekit/tests/benchmarks/mlc_export.py [--model demo|1b] [SCHEME ...]

Each run is a fresh process. The clock starts after the imports and the opening of the checkpoint.
Peak memory is VmHWM of the whole process. ``1b`` is a random checkpoint of Llama-3.2-1B's shape in
bfloat16; the bound for it is a quarter of its file and 400 MiB.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from edgekit.formats.mlc import conversion
from edgekit.formats.mlc.packing import RECIPES
from edgekit.source import opening


SCHEMES = ["q4f16_1", "q4f32_1", "q0f16"]


def main() -> None:
    """Measure, and print a line for each scheme, then one for the plans."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("schemes", nargs="*", default=SCHEMES)
    parser.add_argument("--model", choices=["demo", "1b"], default="demo")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.2f}, model {options.model}")
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as directory:
        work = Path(directory)
        model = opening.open_checkpoint("demo").directory if options.model == "demo" else big(work)
        stored = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        for scheme in options.schemes:
            report(model, scheme, work, stored_bytes=stored, runs=options.runs)
    print(planned_memory())


def report(model: Path, scheme: str, work: Path, *, stored_bytes: int, runs: int) -> None:
    """Run one scheme some times; print every sample."""
    samples = [run_fresh(model, scheme, work / f"{scheme}-{run}") for run in range(runs)]
    times = " ".join(f"{sample['wall_s']:.2f}" for sample in samples)
    peak = max(sample["peak_bytes"] for sample in samples)
    bound = stored_bytes // 4 + 400 * 2**20
    print(
        f"{scheme}: {times} s (median {statistics.median(s['wall_s'] for s in samples):.2f}), "
        f"peak {peak / 2**20:.0f} MiB (a quarter of the checkpoint + 400 MiB: "
        f"{bound / 2**20:.0f}), files of {samples[0]['size_bytes']:.0f} bytes, "
        f"{samples[0]['size_bytes'] - samples[0]['planned_bytes']:+.0f} to the plan"
    )


def run_fresh(model: Path, scheme: str, out: Path) -> dict[str, float]:
    """Convert in a process of its own; return its seconds and bytes."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", str(model), scheme, str(out)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    sample: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return sample


def child(model: Path, scheme: str, out: Path) -> None:
    """Convert under the clock, and print the sample."""
    import numpy as np  # noqa: F401 - part of what a process holds before it starts

    checkpoint = opening.open_checkpoint(model)
    out.mkdir()
    start = time.perf_counter()
    conversion.write(checkpoint, RECIPES[scheme], out, progress=lambda _: None)
    wall_s = time.perf_counter() - start
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak_kib = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    sample = {
        "wall_s": wall_s,
        "peak_bytes": int(peak_kib) * 1024,
        "size_bytes": sum(path.stat().st_size for path in out.iterdir()),
        "planned_bytes": conversion.plan(checkpoint, RECIPES[scheme]).size_bytes,
    }
    print(json.dumps(sample))


def big(work: Path) -> Path:
    """Write a random checkpoint of a billion weights."""
    from edgekit.tests.benchmarks import gguf_export

    return gguf_export.big(work)


def planned_memory() -> str:
    """Return how many of WebLLM's published figures the plan meets."""
    from edgekit.tests.formats.mlc.test_memory import CASES, planned_mib

    errors = [
        abs(planned_mib(model, scheme, context, Path()) / mib - 1)
        for model, scheme, context, mib in CASES
    ]
    within = sum(error <= 0.05 for error in errors)
    return (
        f"GPU memory: {within} of {len(errors)} published figures within 5 %, "
        f"median error {statistics.median(errors):.2%}"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
    else:
        main()
