"""Read and decode through `edgekit run` against ExecuTorch's own runner: same program and threads.

The runner is the wheel's ``TextLLMRunner``, the C++ loop of Android's LlmModule and iOS'
TextRunner, with its own tokenizer and sampler; it takes its times itself, in whole milliseconds.
Both live in one process, on one thread pool, and take turns, each the first to be opened in every
other turn. The ratios are medians over the pairs (goal: >= 0.97). Then a fresh process without
torch says its peak memory, besides the plan's.

    python edgekit/tests/benchmarks/executorch_decode.py BUNDLE [THREADS [ROUNDS]]
"""

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.bundle.manifest import Bundle
from edgekit.formats.executorch.tokenizer import RUNNER_COPY
from edgekit.run import Answer, Runner
from edgekit.runtime.child import environment
from edgekit.text.tokenizer import Text


LONG_PROMPT = "The keeper of the lighthouse fed a gull while the tide came in. " * 16  # 250 tokens
PROMPT = "Tell a long story about a lighthouse keeper and a gull."
TOKENS = 96
ROUNDS = 7
PEAK = """
import re, sys
from pathlib import Path
from edgekit.run import Runner
runner = Runner.open(Path(sys.argv[1]), threads=int(sys.argv[2]))
"".join(runner.ask([{"role": "user", "content": sys.argv[3]}], max_tokens=16))
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What one turn reached."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float


def main() -> None:
    """Print both rates of both, their ratios, and the peak memory."""
    bundle, threads = Path(sys.argv[1]), int(sys.argv[2]) if sys.argv[2:] else 1
    rounds = int(sys.argv[3]) if sys.argv[3:] else ROUNDS
    pairs = [turn(bundle, threads, is_stock_first=bool(index % 2)) for index in range(rounds + 1)]
    report(pairs[1:])  # the first turn warms caches
    report_memory(bundle, threads)


def turn(bundle: Path, threads: int, *, is_stock_first: bool) -> tuple[Rates, Rates]:
    """Open both again and measure both; what is opened first is the slower by some per cent."""
    stock = open_stock(bundle) if is_stock_first else None
    with Runner.open(bundle, threads=threads, check_hashes=False) as runner:
        stock = stock or open_stock(bundle)
        edgekit_answer(runner, PROMPT, tokens=2)
        return edgekit_rates(runner), stock_rates(stock, runner.text)


def edgekit_rates(runner: Runner) -> Rates:
    """Read a long prompt, stream a long answer as text, and return `edgekit run`'s own figures."""
    read, told = edgekit_answer(runner, LONG_PROMPT, tokens=1), edgekit_answer(runner, PROMPT)
    return Rates(
        prefill_tokens_per_s=read.prompt_tokens / read.time_to_first_token_s,
        decode_tokens_per_s=told.decode_tokens_per_s or 0.0,
    )


def edgekit_answer(runner: Runner, prompt: str, *, tokens: int = TOKENS) -> Answer:
    """Return what `edgekit run` says, with nothing of the prompt read before."""
    runner._cached_ids.clear()
    reply = runner.ask([{"role": "user", "content": prompt}], max_tokens=tokens)
    "".join(reply)
    return reply.answer


def open_stock(bundle: Path) -> Any:
    """Load ExecuTorch's runner, on the thread pool that the first session of the process sets."""
    import executorch.kernels.quantized  # noqa: F401 - registers what phones link
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    runner = TextLLMRunner(str(bundle / "model.pte"), str(bundle / RUNNER_COPY))
    with without_output():  # it loads when it is first asked
        runner.generate("a", GenerationConfig(echo=False, temperature=0.0, max_new_tokens=2))
    return runner


def stock_rates(runner: Any, text: Text) -> Rates:
    """Let the stock runner read and answer the same, and return what it says of itself."""
    read = stock_times(runner, text, LONG_PROMPT, tokens=2)
    told = stock_times(runner, text, PROMPT)
    return Rates(
        prefill_tokens_per_s=1000 * read["prompt_tokens"]
        / (read["prompt_eval_end_ms"] - read["inference_start_ms"]),
        decode_tokens_per_s=1000 * told["generated_tokens"]
        / (told["inference_end_ms"] - told["prompt_eval_end_ms"]),
    )  # fmt: skip


def stock_times(
    runner: Any, text: Text, prompt: str, *, tokens: int = TOKENS
) -> Mapping[str, float]:
    """Return the stock runner's statistics of one answer."""
    from executorch.extension.llm.runner import GenerationConfig

    config = GenerationConfig(echo=False, temperature=0.0, max_new_tokens=tokens)
    rendered = text.render([{"role": "user", "content": prompt}])
    found: list[Mapping[str, float]] = []
    runner.reset()
    with without_output():
        runner.generate(
            rendered, config, None, lambda it: found.append(json.loads(it.to_json_string()))
        )
    return found[0]


@contextmanager
def without_output() -> Iterator[None]:
    """Send what C++ prints to nowhere."""
    kept = os.dup(1), os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    sys.stdout.flush()
    os.dup2(null, 1)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)
        for descriptor in (*kept, null):
            os.close(descriptor)


def report(pairs: list[tuple[Rates, Rates]]) -> None:
    """Print the samples, their medians, and the medians of the pairs' ratios."""
    for name in ("prefill", "decode"):
        field = f"{name}_tokens_per_s"
        ours = [getattr(our, field) for our, _ in pairs]
        theirs = [getattr(their, field) for _, their in pairs]
        for who, rates in (("edgekit run", ours), ("stock runner", theirs)):
            samples = [round(rate, 1) for rate in rates]
            print(f"{name:8}{who:13}{statistics.median(rates):8.2f} tokens/s  {samples}")
        ratio = statistics.median(our / their for our, their in zip(ours, theirs, strict=True))
        print(f"{name:8}{'ratio':13}{ratio:8.3f}")


def report_memory(bundle: Path, threads: int) -> None:
    """Print the peak of a process that answers once, and what the plan predicted."""
    words = [sys.executable, "-c", PEAK, str(bundle), str(threads), LONG_PROMPT]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment())
    peak_bytes = 1024 * int(re.findall(r"\d+", done.stdout)[-1])
    predicted = Bundle.load(bundle, check_hashes=False).predicted["peak_memory_bytes"]
    print(f"peak    {peak_bytes / 2**20:.0f} MiB, the plan says {predicted / 2**20:.0f} MiB")


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"took    {time.perf_counter() - started:.0f} s")
