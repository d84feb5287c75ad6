"""From a checkpoint to ``model.pte``: what it will hold, its size, and the writing of it."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.errors import UsageError
from edgekit.formats import Layout, Placement, Progress
from edgekit.formats.executorch import backends, handover
from edgekit.formats.executorch.backends import Backend
from edgekit.formats.executorch.planned import Job, Weight
from edgekit.model.spec import DecoderSpec
from edgekit.model.tokenizer_files import added_tokens
from edgekit.quant.recipe import Recipe


if TYPE_CHECKING:
    from edgekit.model.checkpoint_protocol import CheckpointProtocol


ENTRY = "model.pte"
COVERAGE = "delegates.json"


def weights(spec: DecoderSpec, recipe: Recipe, backend: Backend) -> tuple[Weight, ...]:
    """Return what a recipe makes of every weight of a decoder.

    Raises:
        UsageError: If the back-end does not have this recipe.
    """
    if recipe.name not in backend.RECIPES:
        raise UsageError(
            f"{backend.NAME} in ExecuTorch has no recipe {recipe.name}",
            hint=f"its recipes: {', '.join(backend.RECIPES)}",
        )
    found = []
    for role, shape in spec.weights():
        wanted = backend.meant_by(recipe.storage_for(role, spec), recipe=recipe.name)
        stored = backend.stored_as(wanted, shape, recipe=recipe.name)
        found.append(Weight(role=role, shape=shape, wanted=wanted, stored=stored))
    return tuple(found)


def variant_of(spec: DecoderSpec, variant: str | None, split_bytes: int | None) -> str:
    """Return the variant that was asked for, or the first.

    Raises:
        UsageError: If there is none of that name, it cannot express the decoder, or files shall be
            split.
    """
    if split_bytes is not None:
        raise UsageError("an ExecuTorch program is one file, it cannot be split")
    backend = backends.of(variant)
    variant = variant or next(iter(backend.BUILDS))
    backend.refuse(spec, variant)
    return variant


def lay_out(
    checkpoint: "CheckpointProtocol",
    recipe: Recipe,
    *,
    split_bytes: int | None = None,
    variant: str | None = None,
) -> Layout:
    """Return what the file will hold and about how large it gets, from headers alone."""
    spec = checkpoint.spec
    variant = variant_of(spec, variant, split_bytes)
    backend = backends.of(variant)
    planned = weights(spec, recipe, backend)
    said = handover.note(checkpoint)
    return Layout(
        placements=tuple(_placement(weight) for weight in planned),
        artifact_bytes=backend.file_bytes(spec, planned, variant),
        is_exact=False,
        notes=(*backend.notes(recipe.name), *((said,) if said else ())),
        calibration=_calibration(checkpoint, planned),
        variant=variant,
        is_half=backend.computes_half(recipe.name),
        reads_by_token=backend.READS_BY_TOKEN,
    )


def _placement(weight: Weight) -> Placement:
    rows, columns = weight.shape[0], weight.shape[1] if weight.shape[1:] else 1
    return Placement(
        role=weight.role,
        parameters=rows * columns,
        storage=weight.stored,
        wanted=weight.wanted,
        size_bytes=weight.size_bytes,
    )


def _calibration(checkpoint: "CheckpointProtocol", planned: Iterable[Weight]) -> str | None:
    announced = checkpoint.calibration
    return announced.text_sha256 if announced and any(w.is_led for w in planned) else None


def convert(  # noqa: PLR0913 - the parameters of `Format.convert`
    checkpoint: "CheckpointProtocol",
    recipe: Recipe,
    directory: Path,
    *,
    progress: Progress,
    context_tokens: int,
    variant: str,
) -> str:
    """Write ``model.pte``, one block of rows in memory at a time.

    Returns:
        Its name.
    """
    backend = backends.of(variant)
    job = Job(
        checkpoint=checkpoint,
        variant=variant,
        recipe=recipe.name,
        weights=weights(checkpoint.spec, recipe, backend),
        context_tokens=context_tokens,
        constants=metadata(checkpoint, context_tokens, variant),
        progress=progress,
    )
    report = backend.write(job, directory / ENTRY)
    (directory / COVERAGE).write_text(json.dumps(report, indent=2) + "\n")
    return ENTRY


def metadata(checkpoint: "CheckpointProtocol", context_tokens: int, variant: str) -> dict[str, Any]:
    """Return what ExecuTorch's runners ask a program for."""
    text, border = checkpoint.text, checkpoint.spec.border_tokens
    bos = text.special_tokens.get("bos_token", "")
    found: dict[str, Any] = {
        "get_max_seq_len": context_tokens,
        "get_max_context_len": context_tokens,
        "get_vocab_size": checkpoint.spec.vocabulary,
        "get_bos_id": added_tokens(text.tokenizer_json).get(bos, -1),
        "get_eos_ids": list(text.declared_stop_ids),
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": False,
        "enable_dynamic_shape": True,
        "get_n_layers": len(checkpoint.spec.layers),
    }
    found |= {} if border is None else {"get_rope_border_tokens": border}
    own = backends.of(variant).metadata(checkpoint.spec, variant, context_tokens=context_tokens)
    return found | dict(own)
