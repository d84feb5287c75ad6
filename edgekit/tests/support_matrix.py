"""The support matrix, computed: every family through every format, never typed.

How many kinds each format takes stands in README.md, the table with its notes in docs/formats.md.
``python -m edgekit.tests.support_matrix --check`` fails where one of them says otherwise,
``--write`` mends it. Kinds are computed side by side, each in one process.
"""

import multiprocessing
import os
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

from edgekit import formats
from edgekit.errors import UsageError
from edgekit.formats import BuildRequest, ReadableRunning
from edgekit.model.spec import DecoderSpec
from edgekit.proof import transformers_logits
from edgekit.proof.fidelity import Comparison
from edgekit.proof.interpreter import InterpreterSession
from edgekit.runtime.session import Session
from edgekit.source import opening
from edgekit.source.checkpoint import Checkpoint
from edgekit.tests.tiny.checkpoints import TINY, write_tiny_checkpoint


if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt

    Row: TypeAlias = list[tuple[str, list[str]]]  # a word for each format, and what it needs
    Reference: TypeAlias = Callable[[list[int]], npt.NDArray[np.float32]]

ROOT = Path(__file__).resolve().parents[2]
TABLE, NOTES = ROOT / "README.md", ROOT / "docs" / "formats.md"
START, END = "<!-- support matrix: computed -->", "<!-- end of the support matrix -->"
EXACT_KL_NATS = 1e-5  # what attention in float16, as devices run it, leaves of float32 weights
HALF_KL_NATS = 1e-4  # what 16 bits leave
TOKENS = 256


def main(words: list[str]) -> int:
    """Check both pages, or write them."""
    status = 0
    for page, part in zip((TABLE, NOTES), matrix(), strict=True):
        text = page.read_text(encoding="utf-8")
        computed = _with_part(text, part, name=page.name)
        if computed == text:
            continue
        if words == ["--write"]:
            page.write_text(computed, encoding="utf-8")
        else:
            print(f"{page.name} has another support matrix; mend it with --write\n{part}")  # noqa: T201
            status = 1
    return status


def _with_part(text: str, part: str, *, name: str) -> str:
    """Return a page with ``part`` between its marks."""
    before, _, rest = text.partition(START)
    _, found, after = rest.partition(END)
    if not found:
        sys.exit(f"{name} has no {START} … {END}")
    return f"{before}{START}\n{part}{END}{after}"


def matrix() -> tuple[str, str]:
    """Return how many kinds each format takes, and the table with its notes, as Markdown."""
    names = formats.names()
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        rows = dict(zip(TINY, pool.map(_row, TINY, chunksize=1), strict=True))
    heading = f"{' | '.join(names)} |\n{'|---' * (len(names) + 1)}|\n"
    return (
        f"| of {len(TINY)} kinds | {heading}{_summary(rows)}",
        f"| model | {heading}{_table(rows)}",
    )


def _summary(rows: "dict[str, Row]") -> str:
    """Return a line for each word, with how often each format has it."""
    counts = [Counter(word for word, _ in column) for column in zip(*rows.values(), strict=True)]
    words = sorted({word for count in counts for word in count})
    lines = (f"| {word} | {' | '.join(str(count[word]) for count in counts)} |" for word in words)
    return "\n".join(lines) + "\n"


def _table(rows: "dict[str, Row]") -> str:
    """Return a line for each kind, and the notes they refer to."""
    notes = list(dict.fromkeys(note for row in rows.values() for _, told in row for note in told))
    lines = [
        f"| {case} | {' | '.join(_cell(word, told, notes) for word, told in row)} |"
        for case, row in rows.items()
    ]
    footnotes = [f"<sup>{index}</sup> {note}  " for index, note in enumerate(notes, 1)]
    return "\n".join([*lines, "", *footnotes]) + "\n"


def _cell(word: str, told: list[str], notes: list[str]) -> str:
    numbers = ", ".join(str(notes.index(note) + 1) for note in told)
    return f"{word}<sup>{numbers}</sup>" if told else word


def _row(case: str) -> "Row":
    """Prove one kind in every format against one reference, computed once for each length."""
    _quiet()
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = opening.open_checkpoint(write_tiny_checkpoint(Path(directory) / case, case))
        known: dict[int, npt.NDArray[np.float32]] = {}

        def reference(ids: list[int]) -> "npt.NDArray[np.float32]":
            if len(ids) not in known:
                known[len(ids)] = next(transformers_logits.logits(checkpoint, [ids]))
            return known[len(ids)]

        return [_prove_any(checkpoint, format, reference) for format in formats.names()]


def _prove_any(
    checkpoint: Checkpoint, format: str, reference: "Reference"
) -> tuple[str, list[str]]:
    """Take the usual variant of a format, or where that refuses the model, the first that does not.

    Returns:
        A word, and what a reader must know to understand it.
    """
    refusals: list[str] = []
    for variant in formats.get(format).VARIANTS or (None,):
        with tempfile.TemporaryDirectory() as directory:
            try:
                word, told = _prove(checkpoint, format, variant, reference, Path(directory))
            except UsageError as error:
                refusals.append(str(error))
                continue
        refused = [f"Only as variant {variant}: {refusals[0]}."] if refusals else []
        return word, [*refused, *told]
    return "refused", refusals[:1]


def _prove(
    checkpoint: Checkpoint,
    format: str,
    variant: str | None,
    reference: "Reference",
    directory: Path,
) -> tuple[str, list[str]]:
    """Export one tiny model as faithfully as the format can and compare it with transformers."""
    import numpy as np

    writing, recipe = formats.writing(format), next(iter(formats.get(format).RECIPES.values()))
    limit, request = writing.context_limit(checkpoint), BuildRequest(recipe=recipe, variant=variant)
    layout = writing.lay_out(checkpoint, request)
    entry = writing.convert(checkpoint, request, directory, progress=lambda _: None)
    tokens = min(TOKENS, limit.tokens)
    ids = np.random.default_rng(0).integers(0, checkpoint.spec.vocab_size, tokens)
    path = directory / entry
    session = _open(format, variant, path, checkpoint.spec, context_tokens=limit.tokens)
    comparison = Comparison()
    comparison.add(reference(ids.tolist()), session.all_logits(ids.tolist()), ids)
    session.close()
    allowed = EXACT_KL_NATS if recipe.default == "F32" else HALF_KL_NATS
    if comparison.result().mean_kl_nats > allowed:
        return ("differs", [f"{layout.notes[0]}."]) if layout.notes else ("WRONG", [])
    if limit.tokens < checkpoint.spec.context_tokens:
        return "exact", [f"Up to {limit.tokens} tokens: {limit.reason}."]
    return "exact", []


def _open(
    format: str, variant: str | None, path: Path, spec: DecoderSpec, *, context_tokens: int
) -> Session:
    running = formats.running(format)
    if running.is_run_here(variant):
        return running.load(path, context_tokens=context_tokens, threads=1)
    read = cast("ReadableRunning", running).read_back(path, spec)
    return InterpreterSession(read, context_tokens=context_tokens)


def _quiet() -> None:
    warnings.simplefilter("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


if __name__ == "__main__":
    _quiet()
    sys.exit(main(sys.argv[1:]))
