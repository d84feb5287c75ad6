"""How far a merge is from what was trained, where QLoRA trained on four-bit weights.

Such an adapter has seen the errors of those weights, and undoes some of them. In the 16-bit base
those errors are absent, so the merge says something else than what was trained and evaluated; how
much else is measured here, on a small text and with the weights streamed.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from edgekit import installed
from edgekit.encodings.files import is_file
from edgekit.encodings.json_files import read_object
from edgekit.errors import MissingDependencyError, UsageError
from edgekit.progress import Advance, Listener
from edgekit.proof import interpreter
from edgekit.proof.fidelity import Comparison, Fidelity
from edgekit.source import bitsandbytes_tensors
from edgekit.source.adapters import adapter_config, merging
from edgekit.source.checkpoint import Checkpoint
from edgekit.text import corpus
from edgekit.text.tokenizer import open_tokenizer


PIECE_TOKENS = 64  # of every text of the corpus


def with_score(
    checkpoint: Checkpoint, adapters: Sequence[Path], *, trained_on: Path | None, listener: Listener
) -> Checkpoint:
    """Return the same checkpoint, with the score among the notes of its adapter.

    Args:
        checkpoint: A base with ``adapters`` merged in.
        adapters: The same, for the base they were trained on.
        trained_on: That base, as bitsandbytes quantized it. None takes the one an adapter's config
            names, if that is a directory with such weights, and otherwise scores nothing.
        listener: Is shown the progress.

    Raises:
        UsageError: If ``trained_on`` is given and is no such base, or not of this model.
        MissingDependencyError: If it is given and torch is not installed.
    """
    if trained_on is not None:
        if not adapters:
            raise UsageError(
                f"{trained_on} cannot be what an adapter was trained on: there is none",
                hint="name the adapter with --adapter",
            )
        return _scored(checkpoint, adapters, trained_on, listener)
    named = _named_base(adapters)
    if named is None:
        return checkpoint
    try:
        return _scored(checkpoint, adapters, named, listener)
    except (UsageError, MissingDependencyError) as error:  # nobody asked for it
        note = f"the merge is not compared with {named}, which the adapter was trained on: {error}"
        return _with_notes(checkpoint, note)


def _named_base(adapters: Sequence[Path]) -> Path | None:
    """Return the quantized model on this disk that an adapter says it was trained on."""
    for directory in adapters:
        base = adapter_config.base_model_of(directory)
        path = Path(base) / "config.json"
        with suppress(UsageError):  # something odd has that name: nobody asked for it
            if base and is_file(path) and bitsandbytes_tensors.FIELD in read_object(path):
                return path.parent
    return None


def _scored(
    checkpoint: Checkpoint, adapters: Sequence[Path], trained_on: Path, listener: Listener
) -> Checkpoint:
    if trained_on.resolve() == checkpoint.directory.resolve():
        return checkpoint  # the merge is what was trained
    base, quantized = Checkpoint.open(checkpoint.directory), Checkpoint.open(trained_on)
    _refuse_other_base(base, quantized)
    trained = quantized
    for directory in adapters:
        trained = merging.merge(trained, directory)
    pieces = _pieces(base)
    with listener.track("compare with what was trained", 2 * sum(map(len, pieces))) as advance:
        merged, alone = (
            _compare(said, then, pieces, advance)
            for said, then in ((trained, checkpoint), (quantized, base))
        )
    return _with_notes(checkpoint, *_sentences(merged, alone, quantized))


def _refuse_other_base(base: Checkpoint, quantized: Checkpoint) -> None:
    if quantized.quantization is None:
        raise UsageError(
            f"{quantized.directory} is not quantized, so no adapter was trained on four bits of it",
            hint="pass it as MODEL",
        )
    if quantized.spec != base.spec:
        raise UsageError(
            f"{quantized.directory} is not {base.directory} in four bits: their configs describe "
            "different decoders"
        )
    installed.require("torch", purpose="comparing two models", extra="gguf")


def _pieces(base: Checkpoint) -> list[list[int]]:
    """Return the beginning of every text of the corpus, as ids."""
    tokenizer = open_tokenizer(base.text.tokenizer_json)
    length = min(PIECE_TOKENS, base.spec.context_tokens)
    pieces = (tokenizer.encode(text).ids[:length] for _, text in corpus.texts())
    return [ids for ids in pieces if len(ids) > 1]


def _compare(
    trained: Checkpoint, merged: Checkpoint, pieces: list[list[int]], advance: Advance
) -> Fidelity:
    import numpy as np

    comparison = Comparison()
    both = zip(interpreter.logits(trained, pieces), interpreter.logits(merged, pieces), strict=True)
    for ids, (expected, said) in zip(pieces, both, strict=True):
        comparison.add(expected, said, np.array(ids))
        advance(len(ids))
    return comparison.result()


def _sentences(merged: Fidelity, alone: Fidelity, quantized: Checkpoint) -> Iterator[str]:
    yield (
        f"against the {quantized.quantization} base {quantized.name!r} with the adapter, as it was "
        f"trained, this merge has {_in_words(merged)} over {merged.positions} positions; the two "
        f"bases alone have {_in_words(alone)}"
    )
    yield f"a merge into {quantized.name!r} instead says what was trained"


def _in_words(found: Fidelity) -> str:
    return (
        f"mean KL {found.mean_kl_nats:.2e} nats and the same top token {found.same_top_token:.1%}"
    )


def _with_notes(checkpoint: Checkpoint, *notes: str) -> Checkpoint:
    record = checkpoint.adapter
    if record is None:
        return checkpoint
    return replace(checkpoint, adapter=replace(record, notes=(*record.notes, *notes)))
