"""Conversion to GGUF next to llama.cpp's own tools: time, memory, and the same bytes.

    python edgekit/tests/benchmarks/gguf_export.py [--model demo|1b] [--adapter] [RECIPE ...]

Ours reads the checkpoint, merges the adapter if there is one, converts, quantizes and writes; what
it does before that, opening the model, turning its tokenizer into metadata and trying that out in
llama.cpp, is told apart.
llama.cpp's quantizer reads the same weights from a GGUF file in the checkpoint's own precision
(which its converter would have had to write before; that is not counted) and writes. Each run is
a fresh process, in turn. Clocks start after the imports. Peak memory is VmHWM less what the process
held then; llama.cpp maps its source, so the pages it read count. ``1b`` is a random checkpoint of
Llama-3.2-1B's shape in bfloat16.
"""

import argparse
import ctypes
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit import formats
from edgekit.formats import BuildRequest
from edgekit.formats.gguf import conversion, layout, pretokenizers, tensor_types, writing
from edgekit.model.mixers import Attention
from edgekit.model.norm import Norm
from edgekit.model.rope import Llama3Scaling, Rope
from edgekit.model.shapes import Shape
from edgekit.model.spec import DecoderSpec, Layer
from edgekit.source import opening
from edgekit.source.checkpoint import Checkpoint
from edgekit.source.families import llama
from edgekit.source.writer import write_checkpoint
from edgekit.text import corpus


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


ONE_BILLION = DecoderSpec(  # Llama-3.2-1B
    vocab_size=128_256,
    hidden_size=2048,
    intermediate_size=8192,
    context_tokens=8192,
    layers=(
        Layer(rope=Rope(width=64, theta=500_000.0, scaling=Llama3Scaling(
            factor=32.0, low_frequency_factor=1.0, high_frequency_factor=4.0,
            original_context_tokens=8192,
        ))),
    ) * 16,
    attention=Attention(heads=32, num_kv_heads=8, head_dim=64, softmax_scale=0.125),
    norm=Norm(kind="rms", epsilon=1e-5),
    is_tied=True,
)  # fmt: skip


def main() -> None:
    """Measure, and print a block for each recipe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="*", default=["Q8_0", "Q4_0", "Q4_K_M"])
    parser.add_argument("--model", choices=["demo", "1b"], default="demo")
    parser.add_argument("--adapter", action="store_true", help="merge a random LoRA of rank 16 too")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.2f}, model {options.model}")
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as directory:
        work = Path(directory)
        model = opening.open_checkpoint("demo").directory if options.model == "demo" else big(work)
        adapter = random_adapter(work, model) if options.adapter else None
        native = native_source(work, model, adapter)
        for recipe in options.recipes:
            compare(model, adapter, native, recipe, runs=options.runs)


def compare(model: Path, adapter: Path | None, native: Path, recipe: str, *, runs: int) -> None:
    """Run both in turn; print medians, every sample, and the ratio."""
    ours, theirs = [], []
    for _ in range(runs):
        ours.append(run_fresh("ours", model, adapter, native.with_name("ours.gguf"), recipe))
        theirs.append(run_fresh("theirs", native, None, native.with_name("theirs.gguf"), recipe))
    wall, cpu = (
        statistics.median(s[clock] for s in ours) / statistics.median(s[clock] for s in theirs)
        for clock in ("wall_s", "cpu_s")
    )
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    before_s = statistics.median(s["before_s"] for s in ours)
    print(
        f"{recipe}: wall {wall:.2f}, processors {cpu:.2f} (ours / llama.cpp, medians); "
        f"{before_s:.2f} s before that"
    )
    for who, found in (("ours", ours), ("theirs", theirs)):
        times = " ".join(f"{s['wall_s']:.2f}" for s in found)
        peak = max(s["peak_bytes"] - s["imported_bytes"] for s in found)
        print(
            f"  {who:7}{times} s, peak {peak / 2**20:.0f} MiB above the imports, "
            f"{peak / weights:.0%} of the checkpoint"
        )
    same = hashes(native.with_name("ours.gguf")) == hashes(native.with_name("theirs.gguf"))
    print(f"  tensors are {'the same' if same else 'DIFFERENT'}")


def run_fresh(
    who: str, model: Path, adapter: Path | None, out: Path, recipe: str
) -> dict[str, float]:
    """Convert in a process of its own; return its seconds and bytes."""
    out.unlink(missing_ok=True)
    words = ["--child", who, str(model), str(adapter or ""), str(out), recipe]
    done = subprocess.run(
        [sys.executable, __file__, *words], check=True, capture_output=True, text=True
    )
    sample: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return sample


def child(who: str, model: Path, adapter: Path | None, out: Path, recipe: str) -> None:
    """Import, then convert under the clock, and print the sample."""
    import gguf  # noqa: F401 - part of what both hold before they start
    import llama_cpp

    imported_bytes = memory_bytes("VmRSS")
    opened = time.perf_counter()
    checkpoint = opened_checkpoint(model, adapter, recipe) if who == "ours" else None
    started, started_cpu = time.perf_counter(), time.process_time()
    if checkpoint:
        convert(checkpoint, out, recipe)
    else:
        quantize(llama_cpp, model, out, recipe)
    sample = {
        "before_s": started - opened,
        "wall_s": time.perf_counter() - started,
        "cpu_s": time.process_time() - started_cpu,
        "imported_bytes": imported_bytes,
        "peak_bytes": memory_bytes("VmHWM"),
    }
    print(json.dumps(sample))


def opened_checkpoint(model: Path, adapter: Path | None, recipe: str) -> Checkpoint:
    """Do what `edgekit export` does up to the plan."""
    checkpoint = opening.open_checkpoint(model, adapters=[adapter] if adapter else [])
    fmt = formats.get("gguf")
    writing.lay_out(checkpoint, BuildRequest(recipe=fmt.RECIPES[recipe]))
    pretokenizers.find_pre(checkpoint.text, corpus=corpus.lines())
    return checkpoint


def convert(checkpoint: Checkpoint, out: Path, recipe: str) -> None:
    """Read, merge, quantize and write, as `edgekit export` does."""
    pre = conversion.pre_of(checkpoint.text)
    with tempfile.TemporaryDirectory(dir=out.parent) as work:
        entry = conversion.convert(
            checkpoint,
            BuildRequest(recipe=tensor_types.RECIPES[recipe]),
            Path(work),
            pre=pre,
            progress=lambda _: None,
        )
        (Path(work) / entry).rename(out)


def quantize(llama: Any, model: Path, out: Path, recipe: str) -> None:
    """Run llama.cpp's quantizer with all processors."""
    parameters = llama.llama_model_quantize_default_params()
    parameters.ftype = tensor_types.FILE_TYPES[recipe]
    parameters.nthread = os.cpu_count()
    if llama.llama_model_quantize(str(model).encode(), str(out).encode(), ctypes.byref(parameters)):
        raise SystemExit(f"llama.cpp refused {model}")


def native_source(work: Path, model: Path, adapter: Path | None) -> Path:
    """Write the same weights as GGUF, in the checkpoint's precision."""
    first = next(iter(opening.open_checkpoint(model).tensors.values()))
    recipe = {2: "BF16", 4: "F32"}[first.size_bytes // (first.shape[0] * first.shape[1])]
    recipe = "F32" if adapter else recipe
    convert(opened_checkpoint(model, adapter, recipe), work / "native.gguf", recipe)
    return work / "native.gguf"


@dataclass(frozen=True)
class RandomTensor:
    """Normal numbers, made when they are read."""

    shape: Shape
    seed: int

    @property
    def size_bytes(self) -> int:
        """As bfloat16."""
        return 2 * self.shape[0] * (self.shape[1] if self.shape[1:] else 1)

    def read(self, first_row: int = 0, rows: int | None = None) -> "npt.NDArray[np.float32]":
        """Return some rows."""
        import numpy as np

        rows = self.shape[0] - first_row if rows is None else rows
        random = np.random.default_rng((self.seed, first_row))
        return random.standard_normal((rows, *self.shape[1:]), np.float32) * np.float32(0.02)


def big(work: Path) -> Path:
    """Write a random checkpoint of a billion parameters."""
    text = opening.open_checkpoint("demo").text
    tensors = {
        llama.source(role, ONE_BILLION).tensor: RandomTensor(shape, seed)
        for seed, (role, shape) in enumerate(ONE_BILLION.weights())
    }
    checkpoint = Checkpoint(
        directory=work / "random-1b", architecture="llama", spec=ONE_BILLION, tensors=tensors,
        text=text,
    )  # fmt: skip
    return write_checkpoint(checkpoint, work / "random-1b-out", precision="bf16")


def random_adapter(work: Path, model: Path) -> Path:
    """Write a LoRA of rank 16 on every projection, as PEFT does."""
    import numpy as np
    from safetensors.numpy import save_file

    checkpoint, out = Checkpoint.open(model), work / "adapter"
    random, tensors = np.random.default_rng(0), {}
    for name, tensor in checkpoint.tensors.items():
        if name.endswith("_proj.weight"):
            base = f"base_model.model.{name.removesuffix('.weight')}"
            rows, columns = tensor.shape
            tensors[f"{base}.lora_A.weight"] = random.normal(0, 0.02, (16, columns))
            tensors[f"{base}.lora_B.weight"] = random.normal(0, 0.02, (rows, 16))
    out.mkdir()
    save_file({k: v.astype(np.float32) for k, v in tensors.items()},
              out / "adapter_model.safetensors")  # fmt: skip
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": names,
              "task_type": "CAUSAL_LM", "base_model_name_or_path": None}  # fmt: skip
    (out / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return out


def memory_bytes(field: str) -> int:
    """Return what this process holds, ``VmRSS``, or held at most, ``VmHWM``.

    Not ru_maxrss: it survives exec, so that a child starts with what its parent held.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def hashes(path: Path) -> dict[str, tuple[str, str]]:
    """Return tensor type and SHA-256 of every tensor of a file."""
    found = {}
    with path.open("rb") as stream:
        for info in layout.read(path).tensors:
            stream.seek(info.offset)
            found[info.name] = (
                info.tensor_type,
                hashlib.sha256(stream.read(info.size_bytes)).hexdigest(),
            )
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        words = sys.argv[2:]
        child(
            words[0], Path(words[1]), Path(words[2]) if words[2] else None, Path(words[3]), words[4]
        )
    else:
        main()
