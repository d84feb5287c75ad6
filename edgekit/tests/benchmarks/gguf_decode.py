"""Decode through `edgekit run` against llama.cpp's own loop: same build, threads and prompt.

The native loop is llama.cpp's greedy sampler on its own logits, through the same binding and in
the same memory, with nothing between two tokens. Both run in turn, several times; the last line is
the ratio of medians (goal: >= 0.97).

    python edgekit/tests/benchmarks/gguf_decode.py [BUNDLE] [--threads N] [--rounds N]

Without BUNDLE, the demo is exported into a temporary directory first.
"""

import argparse
import ctypes
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from edgekit.export import export
from edgekit.run import Runner


PROMPT = "Tell a long story about a lighthouse keeper and a gull."
TOKENS = 96
TARGET = "raspberry-pi-5-8gb"


def main() -> None:
    """Print tokens per second of both, and the ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", nargs="?", type=Path, metavar="BUNDLE")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        bundle = options.bundle or exported_demo(Path(directory) / "bundle", format="gguf")
        measure(bundle, threads=options.threads, rounds=options.rounds)


def exported_demo(out: Path, *, format: str) -> Path:
    """Export the demo in a format, unproven: only its speed is of interest."""
    made = export("demo", TARGET, format=format, calibrate=False, out=out, verify=False)
    return made.directory


def measure(bundle: Path, *, threads: int, rounds: int) -> None:
    """Run both in turn and print their rates and the ratio."""
    with Runner.open(bundle, context_tokens=512, threads=threads) as runner:
        ids = runner.text.encode_chat([{"role": "user", "content": PROMPT}])
        ours, theirs = [], []
        for _ in range(rounds):
            ours.append(edgekit_rate(runner))
            theirs.append(native_rate(runner, ids))
    print(f"edgekit run   {statistics.median(ours):7.2f} tokens/s  {rounded(ours)}")
    print(f"llama.cpp     {statistics.median(theirs):7.2f} tokens/s  {rounded(theirs)}")
    print(f"ratio         {statistics.median(ours) / statistics.median(theirs):7.3f}")


def rounded(rates: list[float]) -> list[float]:
    """Return the samples for people."""
    return [round(rate, 1) for rate in rates]


def edgekit_rate(runner: Runner) -> float:
    """Stream an answer as text, as `edgekit run` does, and return its own figure."""
    runner._cached_ids.clear()
    reply = runner.ask([{"role": "user", "content": PROMPT}], max_tokens=TOKENS)
    "".join(reply)
    return reply.answer.decode_tokens_per_s or 0.0


def native_rate(runner: Runner, ids: list[int]) -> float:
    """Generate as many tokens with llama.cpp's own sampler, in the same memory."""
    session: Any = runner.session
    llama, context = session._llama, session._context  # the same build, bare
    runner._cached_ids.clear()
    session.reset()
    session.prefill(ids)
    sampler = llama.llama_sampler_init_greedy()
    token = (ctypes.c_int32 * 1)()
    batch = llama.llama_batch_get_one(token, 1)
    token[0] = llama.llama_sampler_sample(sampler, context, -1)
    started = time.perf_counter()
    for _ in range(TOKENS - 1):
        llama.llama_decode(context, batch)
        token[0] = llama.llama_sampler_sample(sampler, context, -1)
    elapsed_s = time.perf_counter() - started
    llama.llama_sampler_free(sampler)
    return (TOKENS - 1) / elapsed_s


if __name__ == "__main__":
    main()
