"""From a checkpoint to ``model.pte``: what it will hold, its size, and the writing of it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.errors import UsageError
from edgekit.formats import BuildRequest, Layout
from edgekit.formats.executorch import app_kit, backends, kinds
from edgekit.formats.executorch.backends import Backend
from edgekit.formats.executorch.planned import Job, ProgramWeight, shapes
from edgekit.model.spec import DecoderSpec
from edgekit.model.tokenizer_files import added_tokens
from edgekit.progress import Advance
from edgekit.quant.planned import calibration_sha256
from edgekit.quant.recipe import Recipe


if TYPE_CHECKING:
    from edgekit.model.checkpoint_protocol import CheckpointProtocol


ENTRY = "model.pte"
COVERAGE = "delegates.json"


def weights(spec: DecoderSpec, recipe: Recipe, backend: Backend) -> tuple[ProgramWeight, ...]:
    """Return what a recipe makes of every weight of a decoder.

    Raises:
        UsageError: If the back-end does not have this recipe.
    """
    if recipe.name not in backend.recipes:
        raise UsageError(
            f"{backend.name} in ExecuTorch has no recipe {recipe.name}",
            hint=f"its recipes: {', '.join(backend.recipes)}",
        )
    found = []
    for role, shape in shapes(spec):
        wanted = backend.writing.meant_by(recipe.tensor_type_for(role, spec), recipe=recipe.name)
        stored = backend.writing.stored_as(wanted, shape, recipe=recipe.name)
        found.append(ProgramWeight.of(role, shape, wanted=wanted, stored=stored))
    return tuple(found)


def variant_of(spec: DecoderSpec, request: BuildRequest) -> str:
    """Return the variant that was asked for, or the first.

    Raises:
        UsageError: If there is none of that name, it cannot express the decoder or hold the
            context, or the program is to be split.
    """
    if request.split_bytes is not None:
        raise UsageError("an ExecuTorch program is one file, it cannot be split")
    kinds.refuse_experts(spec)
    backend = backends.of(request.variant)
    variant = request.variant or next(iter(backend.builds))
    context = request.context_tokens or spec.context_tokens
    backend.writing.refuse(spec.within(context), variant, context_tokens=context)
    return variant


def lay_out(checkpoint: "CheckpointProtocol", request: BuildRequest) -> Layout:
    """Return what the file will hold and about how large it gets, from headers alone."""
    spec, recipe = checkpoint.spec, request.recipe
    spec = spec.within(request.context_tokens or spec.context_tokens)
    variant = variant_of(spec, request)
    backend = backends.of(variant)
    planned = weights(spec, recipe, backend)
    note = app_kit.note(checkpoint)
    return Layout(
        placements=planned,
        artifact_bytes=backend.writing.file_bytes(spec, planned, variant),
        is_exact=False,
        notes=(
            *backend.notes.get(recipe.name, ()),
            *backend.writing.notes(spec, variant),
            *((note,) if note else ()),
        ),
        calibration=calibration_sha256(checkpoint.calibration, planned),
        variant=variant,
        is_half=recipe.name in backend.half_recipes,
        reads_by_token=backend.reads_by_token,
    )


def convert(
    checkpoint: "CheckpointProtocol",
    request: BuildRequest,
    directory: Path,
    *,
    progress: Advance,
) -> str:
    """Write ``model.pte``, one block of rows in memory at a time.

    Args:
        checkpoint: The model.
        request: With its context, which may not be None.
        directory: Where the program goes.
        progress: Told how many weights were just read.

    Returns:
        The name of the program.
    """
    variant, context_tokens = variant_of(checkpoint.spec, request), request.context_tokens
    assert context_tokens is not None  # noqa: S101 - see above
    backend = backends.of(variant)
    job = Job(
        checkpoint=checkpoint,
        variant=variant,
        recipe=request.recipe.name,
        weights=weights(checkpoint.spec, request.recipe, backend),
        context_tokens=context_tokens,
        constants=metadata(checkpoint, context_tokens, variant),
        progress=progress,
    )
    report = backend.writing.write(job, directory / ENTRY)
    (directory / COVERAGE).write_text(json.dumps(report, indent=2) + "\n")
    return ENTRY


def metadata(checkpoint: "CheckpointProtocol", context_tokens: int, variant: str) -> dict[str, Any]:
    """Return what ExecuTorch's runners ask a program for."""
    text, border = checkpoint.text, checkpoint.spec.original_max_position_embeddings
    bos = text.special_tokens.get("bos_token", "")
    found: dict[str, Any] = {
        "get_max_seq_len": context_tokens,
        "get_max_context_len": context_tokens,
        "get_vocab_size": checkpoint.spec.vocab_size,
        "get_bos_id": added_tokens(text.tokenizer_json).get(bos, -1),
        "get_eos_ids": list(text.declared_stop_ids),
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": False,
        "enable_dynamic_shape": True,
        "get_n_layers": len(checkpoint.spec.layers),
    }
    found |= {} if border is None else {"get_rope_border_tokens": border}
    writing = backends.of(variant).writing
    own = writing.constants(checkpoint.spec, variant, context_tokens=context_tokens)
    return found | dict(own)
