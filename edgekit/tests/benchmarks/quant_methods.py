"""Quality per byte: every recipe by every quant method, each kind of text by itself.

    python edgekit/tests/benchmarks/quant_methods.py [--seed N] [--methods M …] [FORMAT:RECIPE ...]

The model is the demo, dithered: moved at random between the codes it was once rounded to, since a
grid of the same kind would find those again. It is exported with each method and opened in its real
runtime. Texts are the gate's corpus, whose lines no calibration text has, and what lies on every
machine with Python: its source and its documentation. A document is some 100 tokens of one text,
read by itself. KL is that of next-token distributions, of the dithered model in float32 against the
artifact, in nats; an interval holds the middle 95 % of 2,000 means over documents drawn with
repetition. A method is called worse than importance weighting for a kind of text, or better, where
the interval of the difference, document by document, lies above 0, or below.
"""

import argparse
import contextlib
import inspect
import json
import os
import pydoc_data.topics
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit import formats
from edgekit.formats import BuildRequest
from edgekit.model.checkpoint_protocol import Tensor
from edgekit.model.shapes import Shape
from edgekit.progress import Silent
from edgekit.proof import calibration, interpreter
from edgekit.solver.methods import prepare
from edgekit.source import opening
from edgekit.source.checkpoint import Checkpoint
from edgekit.text import corpus


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Rows = npt.NDArray[np.float32]


DOCUMENT_TOKENS = 96
MOST_DOCUMENTS = 4  # of a kind
CONTEXT_TOKENS = 128
RESAMPLES = 2000


@dataclass(frozen=True)
class Dithered:
    """A tensor moved at random between the codes it was rounded to, blocks of 32 of a row."""

    tensor: Tensor
    seed: int

    @property
    def shape(self) -> Shape:
        """That of the tensor."""
        return self.tensor.shape

    @property
    def size_bytes(self) -> int:
        """That of the tensor."""
        return self.tensor.size_bytes

    def read(self, first_row: int = 0, rows: int | None = None) -> "Rows":
        """Return some rows, or all."""
        return self._all[first_row : None if rows is None else first_row + rows]

    @cached_property
    def _all(self) -> "Rows":
        import numpy as np

        whole = self.tensor.read()
        if whole.ndim < 2:
            return whole
        blocks = whole.reshape(-1, 32)
        steps = (blocks.max(1, keepdims=True) - blocks.min(1, keepdims=True)) / 15
        noise = np.random.default_rng(self.seed).random(blocks.shape, np.float32) - np.float32(0.5)
        moved: Rows = (blocks + noise * steps).reshape(whole.shape)
        return moved


def main() -> None:
    """Export, judge, and print a block for each recipe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="*", default=["gguf:Q4_0"], metavar="FORMAT:RECIPE")
    parser.add_argument("--methods", nargs="+", default=["native", "weighted", "feedback"])
    parser.add_argument("--seed", type=int, default=5711, help="of the noise")
    parser.add_argument("--json", type=Path, help="write all numbers here, too")
    options = parser.parse_args()
    checkpoint = dithered_demo(options.seed)
    # What is kept of a checkpoint goes by its files, which know nothing of the noise.
    own_cache = tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR"))
    os.environ["EDGEKIT_CACHE"] = own_cache.name
    texts = documents(checkpoint)
    reference = {
        kind: [kept(log_softmax(rows)) for rows in interpreter.logits(checkpoint, ids)]
        for kind, ids in texts.items()
    }
    found = {}
    for name in options.recipes:
        format, _, recipe = name.partition(":")
        measured = {
            method: judged(checkpoint, format, recipe, method, texts, reference)
            for method in options.methods
        }
        found[name] = measured
        print("\n".join(table(name, measured)), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


def dithered_demo(seed: int) -> Checkpoint:
    """Return the demo model with noise in every matrix."""
    demo = opening.open_checkpoint("demo")
    tensors = {
        name: Dithered(tensor, seed + at) for at, (name, tensor) in enumerate(demo.tensors.items())
    }
    return replace(demo, tensors=tensors)


def documents(checkpoint: Checkpoint) -> dict[str, list[list[int]]]:
    """Return the documents of each kind of text as ids."""
    text = checkpoint.text.loaded()
    found = {}
    for kind, content in kinds():
        ids = text.encode(content)
        whole = [
            ids[first : first + DOCUMENT_TOKENS]
            for first in range(0, len(ids) - DOCUMENT_TOKENS // 2, DOCUMENT_TOKENS)
        ]
        step = max(1, len(whole) // MOST_DOCUMENTS)
        found[kind] = whole[::step][:MOST_DOCUMENTS]
    return {kind: parts for kind, parts in found.items() if len(parts) > 1}


def kinds() -> Iterator[tuple[str, str]]:
    """Yield the name of a kind of text, and all of it."""
    yield from corpus.texts()
    yield "Python source", inspect.getsource(tarfile)[9000:60000]
    topics = pydoc_data.topics.topics
    yield "Python docs", "".join(topics[name][:600] for name in sorted(topics)[::9])


def judged(  # noqa: PLR0917 - one cell of the table
    plain: Checkpoint,
    format: str,
    recipe: str,
    method: Any,
    texts: dict[str, list[list[int]]],
    reference: "dict[str, list[Any]]",
) -> dict[str, Any]:
    """Export with one method, and compare all documents in the real runtime."""
    import numpy as np

    checkpoint = calibration.announce(plain, method=method)
    writing, request = (
        formats.writing(format),
        BuildRequest(recipe=formats.get(format).RECIPES[recipe], context_tokens=CONTEXT_TOKENS),
    )
    started = time.perf_counter()
    layout = writing.lay_out(checkpoint, request)
    checkpoint = prepare(checkpoint, layout.placements, listener=Silent())
    solve_s = time.perf_counter() - started
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as directory:
        entry = writing.convert(checkpoint, request, Path(directory), progress=lambda _: None)
        size_bytes = sum(f.stat().st_size for f in Path(directory).rglob("*") if f.is_file())
        session = formats.running(format).load(
            Path(directory) / entry, context_tokens=CONTEXT_TOKENS, has_exact_cache=True
        )
        with contextlib.closing(session):
            kl: dict[str, list[float]] = {}
            top: dict[str, float] = {}
            for kind, parts in texts.items():
                kl[kind], same = [], []
                for ids, p in zip(parts, reference[kind], strict=True):
                    q = log_softmax(session.all_logits(ids))
                    kl[kind].append(float((np.exp(p) * (p - q)).sum(-1).mean()))
                    same.append((p.argmax(-1) == q.argmax(-1)).mean())
                top[kind] = float(np.mean(same))
    quantized = [it for it in layout.placements if it.is_calibrated]
    bits = (
        8 * sum(it.size_bytes for it in quantized) / max(1, sum(it.parameters for it in quantized))
    )
    return {"size_bytes": size_bytes, "bits_per_weight": bits, "solve_s": solve_s,
            "kl_nats": kl, "same_top": top}  # fmt: skip


def kept(values: "Rows") -> "Rows":
    """Return the same numbers, held by a file: those of all texts take more than a gigabyte."""
    import numpy as np

    with tempfile.TemporaryFile(dir=os.environ.get("TMPDIR")) as file:
        found: Rows = np.memmap(file, np.float32, "w+", shape=values.shape)
    found[...] = values
    return found


def log_softmax(logits: "Rows") -> "Rows":
    """Return log probabilities, float32."""
    import numpy as np

    shifted = logits - logits.max(-1, keepdims=True)
    found: Rows = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return found


def interval(values: list[float]) -> tuple[float, float]:
    """Return where the middle 95 % of resampled means lie."""
    import numpy as np

    drawn = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(np.array(values)[drawn].mean(1), [0.025, 0.975])
    return float(low), float(high)


def table(name: str, measured: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield lines in Markdown: a column for each method, a row for each kind."""
    import numpy as np

    first = next(iter(measured.values()))
    yield f"\n{name}: {first['size_bytes']} bytes, {first['bits_per_weight']:.2f} bits a weight"
    yield "| KL in nats, same top token | " + " | ".join(measured) + " |"
    yield "|---" * (len(measured) + 1) + "|"
    base = measured.get("weighted", first)
    for kind in first["kl_nats"]:
        cells = [
            f"{cell(found['kl_nats'][kind], base['kl_nats'][kind])}, {found['same_top'][kind]:.1%}"
            for found in measured.values()
        ]
        yield f"| {kind}, {len(first['kl_nats'][kind])} documents | " + " | ".join(cells) + " |"
    means = [np.mean([np.mean(v) for v in it["kl_nats"].values()]) for it in measured.values()]
    tops = [np.mean([*it["same_top"].values()]) for it in measured.values()]
    cells = [f"{kl:.3f}, {top:.1%}" for kl, top in zip(means, tops, strict=True)]
    yield "| mean of kinds | " + " | ".join(cells) + " |"
    of_all = [[kl for parts in it["kl_nats"].values() for kl in parts] for it in measured.values()]
    of_base = [kl for parts in base["kl_nats"].values() for kl in parts]
    cells = [cell(values, of_base) for values in of_all]
    yield f"| all {len(of_base)} documents | " + " | ".join(cells) + " |"
    yield "| seconds | " + " | ".join(f"{it['solve_s']:.0f}" for it in measured.values()) + " |"


def cell(values: list[float], base: list[float]) -> str:
    """Return a mean with its interval, and whether it is another than that of the base."""
    low, high = interval(values)
    behind = interval([a - b for a, b in zip(values, base, strict=True)])
    mark = " worse" if behind[0] > 0 else " better" if behind[1] < 0 else ""
    return f"{sum(values) / len(values):.3f} ({low:.3f}-{high:.3f}){mark}"


if __name__ == "__main__":
    main()
