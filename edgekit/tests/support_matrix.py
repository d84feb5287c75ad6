"""The support matrix, computed: every family through every format, never typed.

The table stands in README.md, its notes in docs/formats.md. ``python -m
edgekit.tests.support_matrix --check`` fails where one of them says otherwise, ``--write`` mends it.
"""

import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import cast

from edgekit import formats
from edgekit.errors import UsageError
from edgekit.formats import BuildRequest, ReadableRunning
from edgekit.model.spec import DecoderSpec
from edgekit.proof import transformers_logits
from edgekit.proof.fidelity import Comparison
from edgekit.proof.interpreter import InterpreterSession
from edgekit.runtime.session import Session
from edgekit.source import opening
from edgekit.tests.tiny.checkpoints import TINY, write_tiny_checkpoint


ROOT = Path(__file__).resolve().parents[2]
TABLE, NOTES = ROOT / "README.md", ROOT / "docs" / "formats.md"
START, END = "<!-- support matrix: computed -->", "<!-- end of the support matrix -->"
EXACT_KL_NATS = 1e-5  # what attention in float16, as devices run it, leaves of float32 weights
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
    """Return the table and its notes as Markdown."""
    names = formats.names()
    notes: list[str] = []
    lines = [f"| model | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for case in TINY:
        cells = [_cell(case, name, notes) for name in names]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    footnotes = [f"<sup>{index}</sup> {note}  " for index, note in enumerate(notes, 1)]
    return "\n".join(lines) + "\n", "\n".join(footnotes) + "\n"


def _cell(case: str, format_name: str, notes: list[str]) -> str:
    word, told = _prove_any(case, format_name)
    for note in told:
        if note not in notes:
            notes.append(note)
    numbers = ", ".join(str(notes.index(note) + 1) for note in told)
    return f"{word}<sup>{numbers}</sup>" if told else word


def _prove_any(case: str, format: str) -> tuple[str, list[str]]:
    """Take the usual variant of a format, or where that refuses the model, the first that does not.

    Returns:
        A word, and what a reader must know to understand it.
    """
    refusals: list[str] = []
    for variant in formats.get(format).VARIANTS or (None,):
        with tempfile.TemporaryDirectory() as directory:
            try:
                word, told = _prove(case, format, variant, Path(directory))
            except UsageError as error:
                refusals.append(str(error))
                continue
        refused = [f"Only as variant {variant}: {refusals[0]}."] if refusals else []
        return word, [*refused, *told]
    return "refused", refusals[:1]


def _prove(case: str, format: str, variant: str | None, directory: Path) -> tuple[str, list[str]]:
    """Export one tiny model as faithfully as the format can and compare it with transformers."""
    import numpy as np

    checkpoint = opening.open_checkpoint(write_tiny_checkpoint(directory / case, case))
    writing, recipe = formats.writing(format), next(iter(formats.get(format).RECIPES.values()))
    limit, request = writing.context_limit(checkpoint), BuildRequest(recipe=recipe, variant=variant)
    layout = writing.lay_out(checkpoint, request)
    entry = writing.convert(checkpoint, request, directory, progress=lambda _: None)
    tokens = min(TOKENS, limit.tokens)
    ids = np.random.default_rng(0).integers(0, checkpoint.spec.vocab_size, tokens)
    path = directory / entry
    session = _open(format, variant, path, checkpoint.spec, context_tokens=limit.tokens)
    comparison = Comparison()
    expected = next(transformers_logits.logits(checkpoint, [ids.tolist()]))
    comparison.add(expected, session.all_logits(ids.tolist()), ids)
    session.close()
    is_float32 = recipe.default == "F32"
    allowed = EXACT_KL_NATS if is_float32 else recipe.max_mean_kl_nats
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


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main(sys.argv[1:]))
