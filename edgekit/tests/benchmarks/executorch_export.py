"""Export to 8da4w for ExecuTorch next to transformers' own integration: time and memory.

    python edgekit/tests/benchmarks/executorch_export.py [--layers N] [--runs N] [--ours-only]

The other way is transformers' TorchExportableModuleForDecoderOnlyLM, torchao's rounding to nearest
and ExecuTorch's XnnpackPartitioner. Every run is a whole process, in turn: start, imports, reading,
rounding, lowering, writing. Peak memory is its VmHWM. ``--layers`` keeps only the first of the
model's 30: the other way takes many minutes for all of them.

Goals: wall and memory at most 0.7 of the other way's; at most three times the float32 weights; time
that grows with the layers, no faster.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.formats import BuildRequest
from edgekit.formats.executorch import writing
from edgekit.source import opening
from edgekit.tests.benchmarks.gguf_export import memory_bytes


CONTEXT_TOKENS = 512
RECIPE = "8da4w"
OURS, THEIRS = "edgekit", "transformers"


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
    parser.add_argument("--layers", type=int)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--ours-only", action="store_true")
    options = parser.parse_args()
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.2f}, layers {options.layers}")
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as directory:
        model = opening.open_checkpoint("demo").directory
        if options.layers:
            model = shortened(model, Path(directory) / "model", layers=options.layers)
        ways = [OURS] if options.ours_only else [OURS, THEIRS]
        found: dict[str, list[Sample]] = {way: [] for way in ways}
        for _ in range(options.runs):
            for way in ways:
                found[way].append(run_fresh(model, Path(directory) / "out", way))
        report(found, model)


def shortened(model: Path, directory: Path, *, layers: int) -> Path:
    """Write the first layers of a model as a checkpoint."""
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(model, num_hidden_layers=layers)
    whole.save_pretrained(directory)
    for path in model.glob("*token*"):
        shutil.copy(path, directory)
    return directory


def report(found: Mapping[str, Sequence[Sample]], model: Path) -> None:
    """Print medians and every sample, and what ours are of theirs."""
    weights_bytes = 4 * opening.open_checkpoint(model).parameters
    for way, samples in found.items():
        peak = max(sample.peak_bytes for sample in samples)
        print(
            f"{way:<14}{statistics.median(s.wall_s for s in samples):7.1f} s, processor "
            f"{statistics.median(s.cpu_s for s in samples):6.1f} s, peak {peak / 2**20:5.0f} MiB "
            f"({peak / weights_bytes:.2f} of the float32 weights), "
            f"{samples[0].written_bytes / 1e6:.1f} MB; "
            f"{' '.join(f'{sample.wall_s:.1f}' for sample in samples)}"
        )
    if THEIRS in found:
        ours, theirs = found[OURS], found[THEIRS]
        wall = statistics.median(s.wall_s for s in ours) / statistics.median(
            s.wall_s for s in theirs
        )
        peak_ratio = max(s.peak_bytes for s in ours) / max(s.peak_bytes for s in theirs)
        print(f"wall {wall:.3f}, peak {peak_ratio:.2f} of {THEIRS}' (goal: <= 0.70)")


def run_fresh(model: Path, out: Path, way: str) -> Sample:
    """Export in a process of its own."""
    out.mkdir()
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, __file__, "--child", str(model), str(out), way],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    wall_s = time.perf_counter() - started
    written_bytes = sum(path.stat().st_size for path in out.glob("*.pte"))
    shutil.rmtree(out)
    cpu_s, peak_bytes = done.stdout.split()[-2:]
    return Sample(wall_s, float(cpu_s), int(peak_bytes), written_bytes)


def child(model: str, out: str, way: str) -> None:
    """Export, then print what it took."""
    if way == OURS:
        from edgekit.formats import executorch

        writing.convert(
            opening.open_checkpoint(Path(model)),
            BuildRequest(recipe=executorch.RECIPES[RECIPE], context_tokens=CONTEXT_TOKENS),
            Path(out),
            progress=lambda _: None,
        )
    else:
        export_with_transformers(model, Path(out) / "model.pte")
    print(time.process_time(), memory_bytes("VmHWM"))


def export_with_transformers(model: str, path: Path) -> None:
    """Export as ExecuTorch's guide for models of transformers does."""
    import executorch.kernels.quantized  # noqa: F401 - operators
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
        XnnpackDynamicallyQuantizedPartitioner,
        XnnpackPartitioner,
    )
    from executorch.exir import (
        EdgeCompileConfig,
        ExecutorchBackendConfig,
        to_edge_transform_and_lower,
    )
    from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

    exportable = TorchExportableModuleForDecoderOnlyLM(quantized(model))
    exported = exportable.export(
        input_ids=torch.zeros(1, 8, dtype=torch.long),
        cache_position=torch.arange(8),
        dynamic_shapes={
            "input_ids": {1: torch.export.Dim("tokens", min=1, max=CONTEXT_TOKENS - 1)},
            "cache_position": {0: torch.export.Dim("tokens", min=1, max=CONTEXT_TOKENS - 1)},
        },
        strict=True,
    )
    edge = to_edge_transform_and_lower(
        exported,
        partitioner=[XnnpackDynamicallyQuantizedPartitioner(), XnnpackPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
    )
    made = edge.to_executorch(ExecutorchBackendConfig(do_quant_fusion_and_const_prop=True))
    with path.open("wb") as file:
        made.write_to_file(file)


def quantized(model: str) -> Any:
    """Return a model whose weights torchao rounds to nearest."""
    import torch
    from torchao.quantization import quantize_  # type: ignore[import-untyped]
    from torchao.quantization.granularity import (  # type: ignore[import-untyped]
        PerAxis,
        PerGroup,
    )
    from torchao.quantization.quant_api import (  # type: ignore[import-untyped]
        Int8DynamicActivationIntxWeightConfig,
        IntxWeightOnlyConfig,
    )
    from transformers import AutoModelForCausalLM, GenerationConfig

    found = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found.generation_config = GenerationConfig(
        use_cache=True, cache_implementation="static", max_length=CONTEXT_TOKENS,
        cache_config={"batch_size": 1, "max_cache_len": CONTEXT_TOKENS},
    )  # fmt: skip
    found.lm_head.weight = torch.nn.Parameter(found.lm_head.weight.clone())  # no longer tied
    quantize_(
        found.model.layers,
        Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4, weight_granularity=PerGroup(32)
        ),
    )
    quantize_(
        found,
        Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int8, weight_granularity=PerAxis(0)
        ),
        lambda _, name: name == "lm_head",
    )
    quantize_(
        found,
        IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0)),
        lambda module, _: isinstance(module, torch.nn.Embedding),
    )
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
