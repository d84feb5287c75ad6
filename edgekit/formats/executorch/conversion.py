"""From a checkpoint to ``model.pte``: what it will hold, its size, and the writing of it."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from edgekit.decoder import DecoderSpec, LongRopeScaling
from edgekit.errors import ToolchainError, UsageError
from edgekit.formats import Layout, Placement, Progress
from edgekit.formats.executorch import handover, size, storage
from edgekit.recipe import Recipe, split_role
from edgekit.tokenizer_files import added_tokens


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgekit.checkpoint import Checkpoint
    from edgekit.formats.executorch.assembly import Coverage, File

    Rows = npt.NDArray[np.float32]


ENTRY = "model.pte"
COVERAGE = "delegates.json"
BLOCK_WEIGHTS = 2**22  # 16 MiB of float32 are read, rounded and written at once
PORTABLE, LLM = "portable", "llm-ops"
VARIANTS = (PORTABLE, LLM)


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One weight of the checkpoint, and what holds it."""

    role: str
    shape: tuple[int, ...]
    wanted: str  # the storage the recipe asked for
    stored: str

    @property
    def parts(self) -> tuple[storage.Part, ...]:
        """The bytes that hold it."""
        return tuple(storage.parts(self.role, self.shape, self.stored))

    @property
    def size_bytes(self) -> int:
        """How many they are."""
        return sum(part.size_bytes for part in self.parts)

    @property
    def is_led(self) -> bool:
        """Whether the inputs of a calibration lead its fit: in layers, not the head's."""
        return self.stored in storage.LED and split_role(self.role)[0] is not None


def weights(spec: DecoderSpec, recipe: Recipe) -> tuple[Weight, ...]:
    """Return what a recipe makes of every weight of a decoder."""
    found = []
    for role, shape in spec.weights():
        wanted = recipe.storage_for(role, spec)
        stored = storage.stored_as(wanted, shape[-1])
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
    if variant is None:
        return PORTABLE
    if variant not in VARIANTS:
        raise UsageError(
            f"ExecuTorch has no variant {variant!r}", hint=f"variants: {', '.join(VARIANTS)}"
        )
    if variant == LLM:
        _refuse_llm_operators(spec)
    return variant


def _refuse_llm_operators(spec: DecoderSpec) -> None:
    """Check that ExecuTorch's ``custom_sdpa`` computes the attention of a decoder."""
    lacks = None
    if spec.attention.score_cap is not None:
        lacks = "a cap on scores"
    elif any(layer.window_tokens is not None for layer in spec.layers):
        lacks = "windows"
    if lacks:
        raise UsageError(
            f"the custom_sdpa operator of ExecuTorch's LLM runners has no attention with {lacks}",
            hint="take --variant portable: any ExecuTorch runtime has its operators",
        )


def lay_out(
    checkpoint: "Checkpoint",
    recipe: Recipe,
    *,
    split_bytes: int | None = None,
    variant: str | None = None,
) -> Layout:
    """Return what the file will hold and about how large it gets, from headers alone."""
    spec = checkpoint.spec
    variant = variant_of(spec, variant, split_bytes)
    planned = weights(spec, recipe)
    said = handover.note(checkpoint)
    return Layout(
        placements=tuple(_placement(weight) for weight in planned),
        artifact_bytes=size.file_bytes(
            spec,
            [part for weight in planned for part in weight.parts],
            uses_llm_operators=variant == LLM,
        ),
        is_exact=False,
        notes=(said,) if said else (),
        calibration=_calibration(checkpoint, planned),
        variant=variant,
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


def border_tokens(spec: DecoderSpec) -> int | None:
    """Return the context past which every position turns otherwise, if there is one."""
    found = {
        layer.rope.scaling.original_context_tokens
        for layer in spec.layers
        if layer.rope and isinstance(layer.rope.scaling, LongRopeScaling)
    }
    return min(found, default=None)


def _calibration(checkpoint: "Checkpoint", planned: Iterable[Weight]) -> str | None:
    announced = checkpoint.calibration
    return announced.text_sha256 if announced and any(w.is_led for w in planned) else None


def convert(  # noqa: PLR0913 - the parameters of `Format.convert`
    checkpoint: "Checkpoint",
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
    from edgekit.formats.executorch import assembly, lowering

    planned = weights(checkpoint.spec, recipe)
    lowered = lowering.lower(
        checkpoint.spec,
        {weight.role: weight.stored for weight in planned},
        context_tokens=context_tokens,
        uses_llm_operators=variant == LLM,
        constants=metadata(checkpoint, context_tokens, variant),
    )
    report = coverage(lowered.coverage, planned)
    parts = [part for weight in planned for part in weight.parts]
    file = assembly.assemble(lowered, parts)
    with (directory / ENTRY).open("wb") as stream:
        _write(checkpoint, planned, file, stream, progress)
    (directory / COVERAGE).write_text(json.dumps(report, indent=2) + "\n")
    return ENTRY


def metadata(checkpoint: "Checkpoint", context_tokens: int, variant: str) -> dict[str, Any]:
    """Return what ExecuTorch's runners ask a program for."""
    text, border = checkpoint.text, border_tokens(checkpoint.spec)
    bos = text.special_tokens.get("bos_token", "")
    found: dict[str, Any] = {
        "get_max_seq_len": context_tokens,
        "get_max_context_len": context_tokens,
        "get_vocab_size": checkpoint.spec.vocabulary,
        "get_bos_id": added_tokens(text.tokenizer_json).get(bos, -1),
        "get_eos_ids": list(text.declared_stop_ids),
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": variant == LLM,
        "enable_dynamic_shape": True,
        "get_n_layers": len(checkpoint.spec.layers),
    }
    return found if border is None else found | {"get_rope_border_tokens": border}


def _write(
    checkpoint: "Checkpoint",
    planned: Iterable[Weight],
    file: "File",
    stream: BinaryIO,
    progress: Progress,
) -> None:
    stream.truncate(file.size_bytes)
    for offset, content in file.pieces:
        stream.seek(offset)
        stream.write(content)
    for weight in planned:
        importance = _importance(checkpoint, weight)
        for first, rows in _blocks(checkpoint, weight):
            encoded = _encode(weight, rows, importance)
            for part, values in zip(weight.parts, encoded, strict=True):
                row_bytes = part.size_bytes // weight.shape[0]
                stream.seek(file.places[part.key] + first * row_bytes)
                stream.write(values.tobytes())
            progress(rows.size)


def _encode(
    weight: Weight, rows: "Rows", importance: "Rows | None"
) -> "list[npt.NDArray[np.generic]]":
    try:
        return storage.encode(rows, weight.stored, importance=importance)
    except UsageError as error:
        raise UsageError(f"{weight.role}: {error}", hint=error.hint) from error


def _importance(checkpoint: "Checkpoint", weight: Weight) -> "Rows | None":
    calibration = checkpoint.calibration
    return calibration.of(weight.role) if calibration and weight.is_led else None


def _blocks(checkpoint: "Checkpoint", weight: Weight) -> "Iterator[tuple[int, Rows]]":
    """Yield the rows of a weight, some million numbers at a time, with the number of the first."""
    if len(weight.shape) == 1:
        rows = checkpoint.weight(weight.role)
        yield 0, rows + 1 if checkpoint.spec.adds_one(weight.role) else rows
        return
    step = max(1, BLOCK_WEIGHTS // weight.shape[1])
    for first in range(0, weight.shape[0], step):
        yield first, checkpoint.weight(weight.role, first, min(step, weight.shape[0] - first))


def coverage(found: "Coverage", planned: Iterable[Weight]) -> dict[str, Any]:
    """Return how much of the work XNNPACK does, for whoever wonders about speed.

    Raises:
        ToolchainError: If ExecuTorch's own kernels are to multiply by a matrix: they are slow.
    """
    inside = [weight for weight in planned if weight.role in found.delegated_weights]
    outside = [weight for weight in planned if weight.role not in found.delegated_weights]
    multiplied = [w.role for w in outside if len(w.shape) > 1 and w.role != "token_embedding"]
    if multiplied:
        raise ToolchainError(f"XNNPACK does not multiply by {', '.join(multiplied)}")
    return {
        "backend": "XnnpackBackend",
        "matrices_in_backend": sum(len(weight.shape) > 1 for weight in inside),
        "matrices_outside": multiplied,
        "weight_bytes_in_backend": sum(weight.size_bytes for weight in inside),
        "weight_bytes_outside": sum(weight.size_bytes for weight in outside),
        "operators_in_backend": found.delegated_operators,
        "operator_calls_outside": dict(found.portable_operators),
    }
