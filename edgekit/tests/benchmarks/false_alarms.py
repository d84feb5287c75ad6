"""Does a gate refuse a good export? Every tiny model, with many seeds, against its gate's limits.

Each is exported in float32, or in RECIPE, and what its runtime says is compared with transformers
as the gate "logits" does. Models that a format cannot hold are left out. Goal: no alarm.

    python edgekit/tests/benchmarks/false_alarms.py [--format FORMAT] [--quant RECIPE] [--seeds N]
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

from edgekit import formats
from edgekit.errors import UsageError
from edgekit.formats import BuildRequest
from edgekit.proof import transformers_logits
from edgekit.proof.fidelity import Comparison, Fidelity
from edgekit.proof.gates import max_logit_kl_nats
from edgekit.source import opening
from edgekit.source.checkpoint import Checkpoint
from edgekit.tests.tiny.checkpoints import TINY, write_tiny_checkpoint


TEXT_TOKENS = 128
TEXTS = 4


def main() -> None:
    """Print the worst of each kind next to its limit, and how many alarms there were."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--format", default="gguf", metavar="FORMAT")
    parser.add_argument("--quant", default="F32", metavar="RECIPE")
    parser.add_argument("--seeds", type=int, default=20, metavar="N")
    options = parser.parse_args()
    alarms = exports = 0
    for kind in TINY:
        found = list(shares(kind, options.format, options.quant, seeds=options.seeds))
        alarms, exports = alarms + sum(share > 1 for share in found), exports + len(found)
        worst = f"{max(found):.1e} of its limit" if found else "not held by the format"
        print(f"{kind}: {worst}", flush=True)
    print(f"{alarms} false alarms in {exports} exports")


def shares(kind: str, format: str, quant: str, *, seeds: int) -> Iterator[float]:
    """Yield what share of its limit each seed's export takes; above 1 is an alarm."""
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as directory:
            path = write_tiny_checkpoint(Path(directory) / "model", kind, seed=seed)
            checkpoint = opening.open_checkpoint(path)
            try:
                yield share(checkpoint, format, quant, Path(directory), seed=seed)
            except UsageError:
                return


def share(checkpoint: Checkpoint, format: str, quant: str, directory: Path, *, seed: int) -> float:
    """Return the larger of both measures of the gate, each as a share of its limit."""
    writing, recipe = formats.writing(format), formats.get(format).RECIPES[quant]
    context = min(TEXT_TOKENS, writing.context_limit(checkpoint).tokens)
    request = BuildRequest(recipe=recipe, context_tokens=context)
    layout = writing.lay_out(checkpoint, request)
    entry = writing.convert(checkpoint, request, directory, progress=lambda _: None)
    found = fidelity(checkpoint, format, directory / entry, context_tokens=context, seed=seed)
    return max(
        found.mean_kl_nats / max_logit_kl_nats(recipe, layout),
        (1 - found.same_top_token) / (1 - recipe.min_same_top_token),
    )


def fidelity(
    checkpoint: Checkpoint, format: str, path: Path, *, context_tokens: int, seed: int
) -> Fidelity:
    """Compare what an artifact says to random texts with what transformers says."""
    import numpy as np

    random, comparison = np.random.default_rng(seed), Comparison()
    texts = random.integers(0, checkpoint.spec.vocab_size, (TEXTS, context_tokens))
    session = formats.running(format).load(
        path, context_tokens=context_tokens, threads=1, has_exact_cache=True
    )
    expected = transformers_logits.logits(checkpoint, texts.tolist())
    for ids, rows in zip(texts, expected, strict=True):
        said = session.all_logits(ids.tolist())[:, : checkpoint.spec.vocab_size]
        comparison.add(rows, said, ids)
    session.close()
    return comparison.result()


if __name__ == "__main__":
    main()
