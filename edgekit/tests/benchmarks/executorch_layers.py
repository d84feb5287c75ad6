"""Read a prompt through a delta net, a short convolution and attention of the same width.

    python edgekit/tests/benchmarks/executorch_layers.py [--tokens N] [--rounds N] [--recipe NAME]

Layers as Qwen 3.5 0.8B has them, hidden width 1024, and a convolution of LFM2's kind in their
place, with random weights. What one layer takes is the difference between programs of five layers
and of one, in ExecuTorch on one thread; the programs take turns, and the best of each counts. Goal:
a delta net takes at most twice what attention takes of 128 tokens.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from edgekit.formats import BuildRequest
from edgekit.formats.executorch import conversion, running, tensor_types
from edgekit.formats.executorch.backends import xnnpack
from edgekit.formats.executorch.runtime import ExecutorchSession
from edgekit.model.mixers import Attention, DeltaNet, Mixer, ShortConv
from edgekit.model.norm import Norm
from edgekit.model.rope import Rope
from edgekit.model.spec import Layer
from edgekit.source.checkpoint import Checkpoint
from edgekit.tests.tiny.random_checkpoints import random_checkpoint


HIDDEN, CONTEXT_TOKENS, MORE = 1024, 512, 4
NORM = Norm(kind="rms", epsilon=1e-6)
ATTENTION = Attention(
    heads=8, num_kv_heads=2, head_dim=256, softmax_scale=1 / 16, query_key_norm=NORM,
    has_output_gate=True,
)  # fmt: skip
DELTA_NET = DeltaNet(
    key_heads=16, value_heads=16, key_head_dim=128, value_head_dim=128, taps=4, norm=NORM
)
MIXERS: Mapping[str, tuple[str, Mixer]] = {
    "attention": ("qwen3_5_text", ATTENTION),
    "delta net": ("qwen3_5_text", DELTA_NET),
    "convolution": ("lfm2", ShortConv(taps=3)),
}
ONE = "one layer"


def main() -> None:
    """Print what a layer of each kind takes, and what of attention's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--recipe", default="8da8w")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as directory:
        programs = {ONE: program(Path(directory), "qwen3_5_text", (), options.recipe)}
        for name, (architecture, mixer) in MIXERS.items():
            rope = ROPE if isinstance(mixer, Attention) else None
            more = (Layer(mixer=mixer, rope=rope),) * MORE
            programs[name] = program(Path(directory) / name, architecture, more, options.recipe)
        sessions = {
            name: running.load(path, context_tokens=CONTEXT_TOKENS, threads=1)
            for name, path in programs.items()
        }
        for label, tokens in ((f"prompt of {options.tokens}", options.tokens), ("one token", 1)):
            report(label, measured(sessions, tokens, rounds=options.rounds))


ROPE = Rope(theta=10_000_000.0, width=64)


def program(directory: Path, architecture: str, more: tuple[Layer, ...], recipe: str) -> Path:
    """Write a program of one layer that attends, and of others after it."""
    request = BuildRequest(
        recipe=tensor_types.RECIPES[recipe], context_tokens=CONTEXT_TOKENS, variant=xnnpack.PORTABLE
    )
    checkpoint = decoder(directory, architecture, more)
    return directory / conversion.convert(checkpoint, request, directory, progress=lambda _: None)


def decoder(directory: Path, architecture: str, more: tuple[Layer, ...]) -> Checkpoint:
    """Return a random decoder of these layers."""
    attention = ATTENTION
    if architecture == "lfm2":  # it has no gates
        attention = replace(ATTENTION, has_output_gate=False)
    return random_checkpoint(
        directory, architecture, layers=(Layer(mixer=attention, rope=ROPE), *more),
        attention=attention, hidden_size=HIDDEN, intermediate_size=3584, norm=NORM,
        context_tokens=CONTEXT_TOKENS,
    )  # fmt: skip


def measured(
    sessions: Mapping[str, ExecutorchSession], tokens: int, *, rounds: int
) -> dict[str, float]:
    """Return the fewest seconds that each takes to read so many tokens."""
    found: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(rounds + 1):  # the first warms caches
        for name, session in sessions.items():
            session.reset()
            started = time.perf_counter()
            session.prefill([7] * tokens)
            found[name].append(time.perf_counter() - started)
    return {name: min(samples[1:]) for name, samples in found.items()}


def report(label: str, took_s: Mapping[str, float]) -> None:
    """Print a line for each kind of layer."""
    layer_s = {name: (took_s[name] - took_s[ONE]) / MORE for name in MIXERS}
    for name, seconds in layer_s.items():
        ratio = seconds / layer_s["attention"]
        print(f"{label:<14}{name:<12}{1000 * seconds:8.2f} ms a layer, {ratio:.2f} of attention's")


if __name__ == "__main__":
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.2f}")
    main()
