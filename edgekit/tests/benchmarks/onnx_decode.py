"""Answers from ONNX: edgekit's session next to ONNX Runtime GenAI's own loop, and what both hold.

    python edgekit/tests/benchmarks/onnx_decode.py [--threads N] [--rounds N] [RECIPE ...]

Same files, threads, prompt and number of tokens, in one process and in turn; the ratio is the
median of each round's. GenAI cannot be told to leave out the logits of a prompt, edgekit's session
leaves them out. Memory is VmHWM of a process of its own that opens the bundle and fills its context
once; without prepacking, weights stay as they are in the file, and are packed again at every use.

Goals: decode and prefill at least 0.95 of GenAI's; the plan within 10 % of the peak.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgekit.bundle.manifest import Bundle
from edgekit.export import export
from edgekit.run import Runner
from edgekit.runtime.generate import Sampling, generate
from edgekit.tests.benchmarks.gguf_export import memory_bytes


TARGET = "raspberry-pi-5-8gb"
CONTEXT_TOKENS = 512
PROMPT_TOKENS = 256
ANSWER_TOKENS = 64
HOLDERS = ("edgekit", "edgekit, no prepacking", "ONNX Runtime GenAI")


def main() -> None:
    """Print a block for each recipe."""
    parser = argparse.ArgumentParser()
    parser.add_argument("recipes", nargs="*", default=["INT8", "UINT4"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.2f}, {options.threads} threads")
    with tempfile.TemporaryDirectory() as directory:
        for recipe in options.recipes:
            bundle = export(
                "demo", TARGET, format="onnx", quant=recipe, context_tokens=CONTEXT_TOKENS,
                calibrate=False, out=Path(directory) / recipe, verify=False,
            )  # fmt: skip
            print(f"{recipe}:")
            compare_speed(bundle, threads=options.threads, rounds=options.rounds)
            compare_memory(bundle, threads=options.threads)


def compare_speed(bundle: Bundle, *, threads: int, rounds: int) -> None:
    """Run both in turn; print medians, every sample, and the median of the ratios."""
    model = genai_model(bundle.directory, threads=threads)
    with Runner.open(bundle.directory, threads=threads) as runner:
        ids = prompt(runner)
        ways = (lambda: edgekit_rates(runner, ids), lambda: genai_rates(model, ids))
        found = []
        for number in range(rounds + 1):  # the first one warms up
            order = (0, 1) if number % 2 else (1, 0)
            measured = {which: ways[which]() for which in order}
            found.append((measured[0], measured[1]))
    for index, what in enumerate(("prefill", "decode")):
        pairs = [(ours[index], theirs[index]) for ours, theirs in found[1:]]
        ratio = statistics.median(a / b for a, b in pairs)
        print(
            f"  {what:<8}ratio {ratio:.3f} (goal: >= 0.95); "
            f"edgekit {listed(a for a, _ in pairs)}; GenAI {listed(b for _, b in pairs)} tokens/s"
        )


def listed(rates: Any) -> str:
    """Return samples for people, the median first."""
    rates = list(rates)
    return f"{statistics.median(rates):.1f} ({' '.join(f'{rate:.1f}' for rate in rates)})"


def prompt(runner: Runner) -> list[int]:
    """Return ids of ordinary text."""
    text = "The lighthouse keeper wrote down what the sea did, and what she thought of it. " * 40
    return runner.text.encode(text)[:PROMPT_TOKENS]


def edgekit_rates(runner: Runner, ids: Sequence[int]) -> tuple[float, float]:
    """Return tokens per second read and written, each up to the token that is chosen."""
    runner.session.reset()
    tokens = generate(
        runner.session, ids, max_tokens=ANSWER_TOKENS, stop_ids=(), sampling=Sampling()
    )
    started = time.perf_counter()
    next(tokens)
    answering = time.perf_counter()
    written = sum(1 for _ in tokens)
    return rates(len(ids), answering - started, written, time.perf_counter() - answering)


def genai_model(directory: Path, *, threads: int) -> Any:
    """Open a bundle in ONNX Runtime GenAI."""
    import onnxruntime_genai as genai

    config = genai.Config(str(directory))
    options = f'{{"session_options": {{"intra_op_num_threads": {threads}}}}}'
    config.overlay(f'{{"model": {{"decoder": {options}}}}}')
    return genai.Model(config)


def genai_rates(model: Any, ids: Sequence[int]) -> tuple[float, float]:
    """Return the same of ONNX Runtime GenAI."""
    generator = genai_generator(model, ids, tokens=ANSWER_TOKENS)
    started = time.perf_counter()
    append(generator, ids)
    generator.generate_next_token()
    answering = time.perf_counter()
    written = 0
    while not generator.is_done():
        generator.generate_next_token()
        written += 1
    return rates(len(ids), answering - started, written, time.perf_counter() - answering)


def genai_generator(model: Any, ids: Sequence[int], *, tokens: int) -> Any:
    """Return what writes so many tokens greedily, past any stop id."""
    import onnxruntime_genai as genai

    settings = genai.GeneratorParams(model)
    length = len(ids) + tokens
    settings.set_search_options(max_length=length, min_length=length, do_sample=False)
    return genai.Generator(model, settings)


def append(generator: Any, ids: Sequence[int]) -> None:
    """Let GenAI read a prompt."""
    import numpy as np

    generator.append_tokens(np.array([ids], np.int32))


def rates(read: int, reading_s: float, written: int, writing_s: float) -> tuple[float, float]:
    """Return both rates; the first token belongs to the prompt."""
    return read / reading_s, written / writing_s


def compare_memory(bundle: Bundle, *, threads: int) -> None:
    """Print what each holds at most, and how far the plan is off."""
    peaks: Mapping[str, tuple[int, int]] = {
        holder: run_fresh(holder, bundle.directory, threads=threads) for holder in HOLDERS
    }
    for holder, (loaded_bytes, peak_bytes) in peaks.items():
        print(
            f"  {holder:<24}{loaded_bytes / 2**20:4.0f} MiB at most while loading, "
            f"{peak_bytes / 2**20:4.0f} MiB with {CONTEXT_TOKENS} tokens"
        )
    planned = bundle.predicted["peak_memory_bytes"]
    error = planned / peaks["edgekit"][1] - 1
    print(f"  the plan said {planned / 2**20:.0f} MiB: {error:+.1%} (goal: within 10 %)")


def run_fresh(holder: str, directory: Path, *, threads: int) -> tuple[int, int]:
    """Return the peaks after loading and at the end, of a process of its own."""
    words = ["--child", holder, str(directory), str(threads)]
    done = subprocess.run(
        [sys.executable, __file__, *words], check=True, capture_output=True, text=True
    )
    loaded_bytes, peak_bytes = map(int, done.stdout.split()[-2:])
    return loaded_bytes, peak_bytes


def child(holder: str, directory: Path, threads: int) -> None:
    """Open a bundle, fill its context, and print both peaks."""
    if holder == "edgekit, no prepacking":
        leave_weights_unpacked()
    ids = [100 + index % 1000 for index in range(CONTEXT_TOKENS - 2)]
    if holder.startswith("edgekit"):
        with Runner.open(directory, threads=threads) as runner:
            print(memory_bytes("VmHWM"))
            runner.session.prefill(ids)
            runner.session.decode(ids[0])
    else:
        model = genai_model(directory, threads=threads)
        generator = genai_generator(model, ids, tokens=2)
        print(memory_bytes("VmHWM"))
        append(generator, ids)
        generator.generate_next_token()
        generator.generate_next_token()
    print(memory_bytes("VmHWM"))


def leave_weights_unpacked() -> None:
    """Let every session that ONNX Runtime makes from now on leave weights as they are stored."""
    import onnxruntime

    make = onnxruntime.SessionOptions

    def options() -> Any:
        made = make()
        made.add_session_config_entry("session.disable_prepacking", "1")
        return made

    onnxruntime.SessionOptions = options


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
