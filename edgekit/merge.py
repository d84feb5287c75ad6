"""`edgekit merge`: a base and its adapters become an ordinary checkpoint."""

from collections.abc import Sequence
from pathlib import Path

from edgekit.bundle.workdir import refuse_existing
from edgekit.errors import UsageError
from edgekit.progress import Listener, Silent
from edgekit.proof import qlora
from edgekit.source import opening
from edgekit.source.writer import StoredPrecision, write_checkpoint, written_bytes


def merge(  # noqa: PLR0913 - the request, spelled out for Python users
    model: str | Path,
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    precision: StoredPrecision | None = None,
    trained_on: str | Path | None = None,
    chat_template: str | Path | None = None,
    tokenizer: str = "file",
    listener: Listener | None = None,
) -> Path:
    """Write ``model`` with ``adapters`` merged in, one after the other, to ``out``.

    Args:
        model: A Hugging Face model directory, a GGUF file, or ``"demo"``.
        adapters: PEFT directories; each sees the base with the earlier ones in it.
        out: Must not exist.
        precision: None keeps the type each tensor of the base has.
        trained_on: The four-bit base the adapters were trained on (QLoRA), to compare with.
            None takes the one an adapter names, if it is a directory here.
        chat_template: The template of what is written, a name or a file; None: the default one.
        tokenizer: ``"transformers"`` writes the tokenizer.json that AutoTokenizer makes of the
            files, ``"file"`` the one that is there.
        listener: Who is told what changes apart from the weights, and the progress.

    Returns:
        ``out``: weights, config, tokenizer and template, as transformers reads them.

    Raises:
        UsageError: If an adapter does not fit, or ``out`` exists.
        EdgekitError: If the disk is full.
    """
    listener = listener or Silent()
    out, adapters = Path(out), opening.adapter_directories(adapters)
    refuse_existing(out)
    if not adapters:
        raise UsageError("there is no adapter to merge", hint="name one with --adapter")
    checkpoint = opening.open_checkpoint(
        model,
        adapters=adapters,
        chat_template=chat_template,
        tokenizer=tokenizer,
        listener=listener,
    )
    checkpoint = qlora.with_score(
        checkpoint,
        adapters,
        trained_on=None if trained_on is None else Path(trained_on),
        listener=listener,
    )
    for note in checkpoint.remarks:
        listener.say(note)
    total = written_bytes(checkpoint, precision)
    with listener.track(f"merge into {checkpoint.name}", total) as advance:
        return write_checkpoint(checkpoint, out, precision=precision, advance=advance)
