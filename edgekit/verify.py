"""Verification: repeat the proof of a bundle against its checkpoint."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edgekit import formats, recipes
from edgekit.bundle.manifest import Agreement, Bundle
from edgekit.encodings.json_files import parse
from edgekit.errors import UsageError
from edgekit.formats import BuildRequest
from edgekit.model.checkpoint_protocol import Calibration
from edgekit.progress import Listener
from edgekit.proof.gates import Subject, check
from edgekit.source import opening


def verify(  # noqa: PLR0913 - the request, spelled out for Python users
    directory: str | Path,
    model: str | Path,
    *,
    adapters: Sequence[str | Path] = (),
    chat_template: str | Path | None = None,
    tokenizer: str = "file",
    trusted: str | Path | None = None,
    listener: Listener | None = None,
) -> Agreement:
    """Repeat the proof of a bundle against its checkpoint.

    Args:
        directory: The bundle.
        model: What it was made from.
        adapters: Those that were merged, in this order.
        chat_template: The template it was exported with, a name or a file; None: the default one.
            Variables of it that were fixed are read from the bundle.
        tokenizer: The reading it was exported with, ``"file"`` or ``"transformers"``.
        trusted: Public keys, or a list of allowed signers, one of whom must have signed the bundle
            (see `Bundle.load`); None: anybody may have made it.
        listener: Who is told what happens.

    Raises:
        BundleError: If the bundle is damaged, or not signed as it must be.
        UsageError: If this is not the checkpoint the bundle was made from.
    """
    bundle = Bundle.load(directory, trusted=trusted)
    checkpoint = opening.open_checkpoint(
        model,
        adapters=adapters,
        chat_template=chat_template,
        template_variables={
            name: parse(text) for name, text in bundle.text.template_variables.items()
        },
        tokenizer=tokenizer,
        listener=listener,
    )
    if checkpoint.sha256 != bundle.model.sha256:
        raise UsageError(
            f"{directory} was made from another checkpoint than {model}",
            hint=f"it was made from {bundle.model.name}",
        )
    if bundle.artifact.calibration:
        calibration = Calibration(text_sha256=bundle.artifact.calibration)
        checkpoint = replace(checkpoint, calibration=calibration)
    artifact = bundle.artifact
    request = BuildRequest(
        recipe=recipes.find(artifact.format, artifact.recipe),
        context_tokens=bundle.context_tokens,
        split_bytes=artifact.split_bytes,
        variant=artifact.variant,
    )
    subject = Subject(
        checkpoint=checkpoint,
        directory=bundle.directory,
        entry=artifact.entry,
        format=artifact.format,
        recipe=request.recipe,
        layout=formats.writing(artifact.format).lay_out(checkpoint, request),
        rules=bundle.text,
        context_tokens=bundle.context_tokens,
    )
    return check(subject, listener=listener).agreement
