"""The support matrix of the README, computed: every family through every format, never typed.

``python -m edgekit.tests.support_matrix --check`` fails where the README says otherwise,
``--write`` mends it.
"""

import os
import sys
import tempfile
import warnings
from pathlib import Path

from edgekit import formats, oracle, source
from edgekit.errors import UsageError
from edgekit.fidelity import Comparison
from edgekit.tests.tiny_checkpoints import TINY, write_tiny_checkpoint


README = Path(__file__).resolve().parents[2] / "README.md"
START, END = "<!-- support matrix: computed -->", "<!-- end of the support matrix -->"
EXACT_KL_NATS = 1e-5  # what attention in float16, as devices run it, leaves of float32 weights
TOKENS = 256


def main(words: list[str]) -> int:
    """Check the README, or write it."""
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, found, after = rest.partition(END)
    if not found:
        sys.exit(f"{README.name} has no {START} … {END}")
    computed = f"{before}{START}\n{matrix()}{END}{after}"
    if computed == text:
        return 0
    if words == ["--write"]:
        README.write_text(computed, encoding="utf-8")
        return 0
    print(f"{README.name} has another support matrix; mend it with --write\n{matrix()}")  # noqa: T201
    return 1


def matrix() -> str:
    """Return the table and its footnotes as Markdown."""
    names = formats.names()
    notes: list[str] = []
    lines = [f"| model | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for case in TINY:
        cells = [_cell(case, name, notes) for name in names]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    footnotes = [f"<sup>{index}</sup> {note}  " for index, note in enumerate(notes, 1)]
    return "\n".join([*lines, "", *footnotes]).rstrip("\n") + "\n"


def _cell(case: str, format_name: str, notes: list[str]) -> str:
    with tempfile.TemporaryDirectory() as directory:
        try:
            word, note = _prove(case, format_name, Path(directory))
        except UsageError as error:
            word, note = "refused", str(error)
    if note is None:
        return word
    if note not in notes:
        notes.append(note)
    return f"{word}<sup>{notes.index(note) + 1}</sup>"


def _prove(case: str, format_name: str, directory: Path) -> tuple[str, str | None]:
    """Export one tiny model in float32 and compare it with transformers."""
    import numpy as np

    fmt = formats.get(format_name)
    checkpoint = source.open_checkpoint(write_tiny_checkpoint(directory / case, case))
    limit = fmt.context_limit(checkpoint)
    recipe = next(iter(fmt.RECIPES.values()))
    entry = fmt.convert(checkpoint, recipe, directory, progress=lambda _: None)
    tokens = min(TOKENS, limit.tokens)
    ids = np.random.default_rng(0).integers(0, checkpoint.spec.vocabulary, tokens)
    session = fmt.load(directory / entry, context_tokens=limit.tokens, threads=1)
    comparison = Comparison()
    expected = next(oracle.logits(checkpoint, [ids.tolist()]))
    comparison.add(expected, session.all_logits(ids.tolist()), ids)
    session.close()
    word = "exact" if comparison.result().mean_kl_nats <= EXACT_KL_NATS else "WRONG"
    if limit.tokens < checkpoint.spec.context_tokens:
        return word, f"Up to {limit.tokens} tokens: {limit.reason}."
    return word, None


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main(sys.argv[1:]))
