"""How far is a plan from what phones were measured at, and what do its constants fit best?

pocketpal_cpu.csv holds published cells of three phones: tokens a second and megabytes of eight
models in GGUF. Each cell is planned from the model's config alone. Printed are the errors of the
plans, model by model; what a fit to all cells makes of the cost of a byte of each tensor type, of
the work that the coarsest types and capped logits take, and of each phone's bandwidth; and
how far a fit that has not seen a model is from that model.

Where a phone ran out of memory, nothing is predicted of its speed. The source names no such cells,
but its phones of 8 GB could not load what another loads: of what such a phone did load, the cell
with the largest working set (`is_out_of_memory`) is set apart, whatever it was measured at.

    python edgekit/tests/benchmarks/planner_error.py

Source of the cells: PocketPal, e2e/baselines, May 2026, llama.rn 0.12-rc9, a prompt of 256 tokens
and an answer of 64 in a context of 2,048 (https://github.com/a-ghorbani/pocketpal-ai/pull/722).
"""

import argparse
import csv
import math
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgekit import formats
from edgekit.formats import BuildRequest
from edgekit.model.spec import DecoderSpec
from edgekit.plan import TOKEN_OVERHEAD_S, Estimate, estimate
from edgekit.source import published
from edgekit.source.checkpoint import Checkpoint
from edgekit.target import Target
from edgekit.target import load as load_target
from edgekit.tests.source.test_published import write_headers
from edgekit.tests.tiny.checkpoints import write_text_files


CELLS = Path(__file__).with_name("pocketpal_cpu.csv")
CONTEXT_TOKENS, PROMPT_TOKENS, ANSWER_TOKENS = 2048, 256, 64
MODELS = {  # the published name of each, and the voice of a tokenizer that it takes
    "deepseek-r1-distill-qwen-1.5b": ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "qwen2"),
    "gemma-4-e2b": ("google/gemma-4-E2B", "gemma"),
    "lfm2.5-1.2b-instruct": ("LiquidAI/LFM2.5-1.2B-Instruct", "llama3"),
    "phi-3.5-mini": ("microsoft/Phi-3-mini-4k-instruct", "phi3"),
    "phi-4-mini": ("microsoft/Phi-4-mini-instruct", "phi4"),
    "qwen3-1.7b": ("Qwen/Qwen3-1.7B", "qwen3"),
    "qwen3.5-0.8b": ("Qwen/Qwen3.5-0.8B", "qwen3"),
    "smollm2-1.7b": ("HuggingFaceTB/SmolLM2-1.7B", "smollm"),
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement, and what a plan says of it."""

    target: Target
    model: str
    quant: str
    decode_tokens_per_s: float
    memory_bytes: float
    overhead_bytes: int
    streamed: Mapping[str, int]  # bytes of weights, by tensor type
    unpacked: Mapping[str, int]  # what takes arithmetic: weights by tensor type, and capped logits
    planned: Estimate

    @property
    def decode_error(self) -> float:
        """How much faster the plan is, as a share of what was measured."""
        return self.planned.decode_tokens_per_s.likely / self.decode_tokens_per_s - 1

    @property
    def memory_error(self) -> float:
        """How much more the plan holds, likewise; the cells leave out the app itself."""
        memory = self.planned.memory
        return (memory.peak_bytes - memory.runtime_bytes) / self.memory_bytes - 1

    @property
    def other_bytes(self) -> float:
        """What is read for a token beside weights."""
        filled = (PROMPT_TOKENS + ANSWER_TOKENS // 2) / CONTEXT_TOKENS
        return self.planned.memory.cache_bytes * filled + self.overhead_bytes


def main() -> None:
    """Print three tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    every = list(cells())
    measured = [cell for cell in every if not is_out_of_memory(cell, every)]
    for cell in every:
        if cell not in measured:
            print(f"out of memory: {cell.model} {cell.quant}, {cell.target.name}, "
                  f"planned {cell.decode_error:+.0%}")  # fmt: skip
    print("errors of the plans: decode median, worst; memory lowest, highest")
    for name, some in _by(measured, lambda cell: f"{cell.model}, {cell.target.name}"):
        print(f"  {name}: {_summary(some)}")
    print(f"  all {len(measured)}: {_summary(measured)}")
    fitted = Fit.to(measured)
    print("fitted cost of a byte, beside Q4_0:",
          ", ".join(f"{name} {cost:.2f}" for name, cost in fitted.costs.items()))  # fmt: skip
    print("fitted work, FLOP of a weight and ns of a logit:",
          ", ".join(f"{name} {work:.1f}" for name, work in fitted.work.items()))  # fmt: skip
    print("fitted bandwidth, GB/s:",
          ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in fitted.rates.items()))  # fmt: skip
    print("decode error of a fit that has not seen the model: median, worst")
    for model, held_out in _by(measured, lambda cell: cell.model):
        fit = Fit.to([cell for cell in measured if cell.model != model])
        errors = [abs(fit.error(cell)) for cell in held_out]
        print(f"  {model}: {statistics.median(errors):.0%}, {max(errors):.0%}")


def cells() -> Iterable[Cell]:
    """Yield every cell of a model that the format can hold."""
    with CELLS.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    writing, types = formats.writing("gguf"), formats.get("gguf").RECIPES
    with tempfile.TemporaryDirectory() as directory:
        checkpoints = {name: _checkpoint(Path(directory) / name, name) for name in MODELS}
        for row in rows:
            checkpoint = checkpoints[row["model"]]
            layout = writing.lay_out(checkpoint, BuildRequest(recipe=types[row["quant"]]))
            target = _as_measured(load_target(row["target"]))
            streamed: Counter[str] = Counter()
            unpacked = Counter({CAPPED_LOGIT: _capped_logits(checkpoint.spec)})
            for it in layout.placements:
                if it.role not in checkpoint.spec.looked_up:
                    streamed[it.tensor_type] += it.size_bytes
                    if formats.get("gguf").TENSOR_TYPES[it.tensor_type].decode_flop:
                        unpacked[it.tensor_type] += it.parameters
            yield Cell(
                target=target,
                model=row["model"],
                quant=row["quant"],
                decode_tokens_per_s=float(row["decode_tokens_per_s"]),
                memory_bytes=2**20 * sum(
                    float(row[f"{part}_mib"]) for part in ("weights", "cache", "compute")
                ),
                overhead_bytes=layout.overhead_bytes,
                streamed=streamed,
                unpacked=unpacked,
                planned=estimate(
                    checkpoint, layout, target, format="gguf", context_tokens=CONTEXT_TOKENS
                ),
            )  # fmt: skip


def is_out_of_memory(cell: Cell, measured: Sequence[Cell]) -> bool:
    """Tell whether a cell is the largest of a phone that could not load what another loads."""
    largest: dict[str, float] = {}
    for it in measured:
        name = it.target.name
        largest[name] = max(largest.get(name, 0.0), it.memory_bytes)
    here = largest[cell.target.name]
    return cell.memory_bytes == here < max(largest.values())


def _capped_logits(spec: DecoderSpec) -> int:
    return spec.vocab_size if spec.final_logit_softcap is not None else 0


def _checkpoint(directory: Path, name: str) -> Checkpoint:
    """Return a published model as its config and the headers of its files."""
    model, voice = MODELS[name]
    directory.mkdir()
    write_headers(directory, published.models()[model])
    write_text_files(directory, voice)
    return Checkpoint.open(directory)


def _as_measured(target: Target) -> Target:
    """Return a target whose workload is that of the cells."""
    limit = replace(target.budget.first_token[0], prompt_tokens=PROMPT_TOKENS)
    budget = replace(target.budget, first_token=(limit,), answer_tokens=ANSWER_TOKENS)
    return replace(target, budget=budget)


CAPPED_LOGIT = "capped logit"


@dataclass(frozen=True)
class Fit:
    """Constants that make the time of a token fit, by the least squares of its logarithm."""

    costs: Mapping[str, float]  # of a byte, by tensor type; 1 for Q4_0
    work: Mapping[str, float]  # FLOP of a weight, by tensor type; nanoseconds of a capped logit
    rates: Mapping[str, float]  # bytes of Q4_0 a second, by target

    @classmethod
    def to(cls, measured: Sequence[Cell]) -> "Fit":
        """Fit by Gauss-Newton; cells that are twice off count little.

        What no cell has stays unknown: without a model that caps its logits, they cost nothing.
        """
        import numpy as np

        work = {name for cell in measured for name, count in cell.unpacked.items() if count}
        types = {name for cell in measured for name in cell.streamed}
        targets = sorted({cell.target.name for cell in measured})
        costs = sorted(types - work - {"F32", "F16", "Q4_0"})
        found = cls(
            dict.fromkeys(["Q4_0", *costs], 1.0),
            dict.fromkeys(sorted(work), 20.0) | {CAPPED_LOGIT: 20.0 * (CAPPED_LOGIT in work)},
            dict.fromkeys(targets, 25e9),
        )
        free = [*costs, *sorted(work)]
        for _ in range(50):
            errors = np.array([found.log_error(cell) for cell in measured])
            rows = [
                [
                    *(found.share(cell, name) for name in free),
                    *(-found.bytes_s(cell) / found.seconds(cell) * (cell.target.name == name)
                      for name in targets),
                ]
                for cell in measured
            ]  # fmt: skip
            weights = 1 / np.sqrt(1 + (errors / 0.1) ** 2) ** 0.5
            jacobian = np.array(rows) * weights[:, None]
            step, *_ = np.linalg.lstsq(jacobian, -errors * weights, rcond=None)
            steps = dict(zip([*free, *targets], np.clip(step, -0.5, 0.5), strict=True))
            found = cls(*(
                {name: value * math.exp(steps.get(name, 0)) for name, value in constants.items()}
                for constants in (found.costs, found.work, found.rates)
            ))  # fmt: skip
        return found

    def seconds(self, cell: Cell) -> float:
        """Return the time of a token."""
        work_s = sum(self._work_s(cell, name) for name in cell.unpacked)
        return self.bytes_s(cell) + work_s + TOKEN_OVERHEAD_S

    def bytes_s(self, cell: Cell) -> float:
        """Return how long of that bytes take: weights that need little unpacking, and the rest."""
        costs = sum(self._cost(cell, name) for name in cell.streamed.keys() - self.work.keys())
        return (costs + cell.other_bytes) / self.rates[cell.target.name]

    def share(self, cell: Cell, name: str) -> float:
        """Return how much of that a tensor type, or the capping of logits, takes."""
        if name in self.work:
            return self._work_s(cell, name) / self.seconds(cell)
        return self._cost(cell, name) / self.rates[cell.target.name] / self.seconds(cell)

    def _cost(self, cell: Cell, name: str) -> float:
        return cell.streamed.get(name, 0) * self.costs.get(name, 0.8)

    def _work_s(self, cell: Cell, name: str) -> float:
        rate = 1e9 if name == CAPPED_LOGIT else cell.target.prefill_flop_per_s
        return cell.unpacked[name] * self.work.get(name, 0) / rate

    def log_error(self, cell: Cell) -> float:
        """Return the logarithm of the time over what was measured."""
        return math.log(self.seconds(cell) * cell.decode_tokens_per_s)

    def error(self, cell: Cell) -> float:
        """Return how much faster the fit is, as a share of what was measured."""
        return math.exp(-self.log_error(cell)) - 1


def _by(
    measured: Iterable[Cell], key: Callable[[Cell], str]
) -> Sequence[tuple[str, Sequence[Cell]]]:
    groups: dict[str, list[Cell]] = {}
    for cell in measured:
        groups.setdefault(key(cell), []).append(cell)
    return sorted(groups.items())


def _summary(some: Sequence[Cell]) -> str:
    decode = sorted((abs(cell.decode_error), cell.decode_error, cell.quant) for cell in some)
    memory = [cell.memory_error for cell in some]
    _, worst, quant = decode[-1]
    return (
        f"{statistics.median(it for it, _, _ in decode):.0%}, {worst:+.0%} ({quant}); "
        f"{min(memory):+.0%}, {max(memory):+.0%}"
    )


if __name__ == "__main__":
    main()
