"""Export to four-bit ONNX next to ONNX Runtime GenAI's own model builder: time and memory.

    python edgekit/tests/benchmarks/onnx_export.py [--model demo|1b] [--runs N] [--quant RECIPE]

Every run is a whole process, in turn: start, imports, reading, rounding, writing. Peak memory is
its VmHWM. The builder (which needs onnx-ir) rounds to nearest, `-p int4 -e cpu`; edgekit is run
with what it does by default, which measures the model's inputs first, and without. Neither run is
proven here: the builder proves nothing. ``1b`` is a random checkpoint of Llama-3.2-1B's shape in
bfloat16, and held against the size of that checkpoint alone; one run is enough.

Goals: wall and memory at most half of the builder's; 60 % of the 1b checkpoint.
"""

import argparse
import os
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgekit.source import opening
from edgekit.tests.benchmarks.gguf_export import big, memory_bytes


TARGET = "raspberry-pi-5-8gb"
CONTEXT_TOKENS = 2048


@dataclass(frozen=True)
class Sample:
    """One export, as the user of a shell sees it."""

    wall_s: float
    cpu_s: float
    peak_bytes: int
    written_bytes: int


def main() -> None:
    """Measure, and print a line for each way and the ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=["demo", "1b"], default="demo")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--quant", default="UINT4")
    options = parser.parse_args()
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.2f}, model {options.model}")
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as directory:
        work = Path(directory)
        model = opening.open_checkpoint("demo").directory if options.model == "demo" else big(work)
        ways = {
            "edgekit": [options.quant, "calibrated"],
            "edgekit, not calibrated": [options.quant, "plain"],
        }
        if options.model == "demo":
            ways["ONNX Runtime GenAI"] = []
        report(measure(ways, model, work, runs=options.runs), model)


def measure(
    ways: Mapping[str, Sequence[str]], model: Path, work: Path, *, runs: int
) -> dict[str, list[Sample]]:
    """Export in every way, in turn."""
    found: dict[str, list[Sample]] = {way: [] for way in ways}
    for _ in range(runs):
        for way, words in ways.items():
            found[way].append(run_fresh(model, work / "out", words))
    return found


def report(found: Mapping[str, Sequence[Sample]], model: Path) -> None:
    """Print medians, every sample, and what each is of the last way."""
    checkpoint_bytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    walls = {way: statistics.median(s.wall_s for s in samples) for way, samples in found.items()}
    cpus = {way: statistics.median(s.cpu_s for s in samples) for way, samples in found.items()}
    peaks = {way: max(s.peak_bytes for s in samples) for way, samples in found.items()}
    theirs = list(found)[-1]
    for way, samples in found.items():
        print(
            f"{way:<26}{walls[way]:6.2f} s, processors {cpus[way]:.2f} s, "
            f"peak {peaks[way] / 2**20:.0f} MiB "
            f"({peaks[way] / checkpoint_bytes:.0%} of the checkpoint), "
            f"{samples[0].written_bytes / 1e6:.1f} MB; "
            f"{' '.join(f'{sample.wall_s:.2f}' for sample in samples)}"
        )
    for way in list(found)[:-1] if theirs.startswith("ONNX") else ():
        wall, cpu, peak = (of[way] / of[theirs] for of in (walls, cpus, peaks))
        print(
            f"{way}: wall {wall:.2f}, peak {peak:.2f} of {theirs}'s (goal: <= 0.50); "
            f"processors {cpu:.2f}"
        )


def run_fresh(model: Path, out: Path, words: Sequence[str]) -> Sample:
    """Export in a process of its own."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, __file__, "--child", str(model), str(out), *words],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    wall_s = time.perf_counter() - started
    written_bytes = sum(path.stat().st_size for path in out.rglob("*.onnx*"))
    shutil.rmtree(out)
    cpu_s, peak_bytes = done.stdout.split()[-2:]
    return Sample(wall_s, float(cpu_s), int(peak_bytes), written_bytes)


def child(model: str, out: str, quant: str = "", calibration: str = "") -> None:
    """Export, then print the seconds of processors it took and the most memory it held."""
    if quant:
        from edgekit.export import export

        export(model, TARGET, format="onnx", quant=quant, context_tokens=CONTEXT_TOKENS,
               calibrate=calibration == "calibrated", out=Path(out), verify=False)  # fmt: skip
    else:
        sys.argv[1:] = ["-i", model, "-o", out, "-p", "int4", "-e", "cpu", "-c", f"{out}/cache"]
        runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__", alter_sys=True)
    print(time.process_time(), memory_bytes("VmHWM"))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
