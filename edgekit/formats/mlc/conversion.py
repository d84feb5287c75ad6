"""From a checkpoint to MLC's weights: what the files will hold, and the writing of them.

Shards and tensor cache are made from headers alone, so a plan knows them to the byte; converting
writes the same and holds one block of rows at a time.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.errors import UsageError
from edgekit.formats import BuildRequest, GpuBuffer, Layout
from edgekit.formats.mlc import decoders, names, packing, shards
from edgekit.formats.mlc.names import Parameter
from edgekit.formats.mlc.packing import PackedTensor, Scheme
from edgekit.formats.mlc.shards import Record, Shard
from edgekit.progress import Advance
from edgekit.quant import rounding
from edgekit.quant.planned import PlannedWeight, calibration_sha256, importance_of, solved_of
from edgekit.quant.recipe import Recipe


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgekit.model.checkpoint_protocol import CheckpointProtocol
    from edgekit.model.spec import DecoderSpec

    Rows = npt.NDArray[np.float32]
    Stored = npt.NDArray[np.generic]


@dataclass(frozen=True, kw_only=True)
class MlcWeight:
    """A parameter of MLC's model, how it is stored, and the tensors that hold it."""

    parameter: Parameter
    tensor_type: str
    tensors: tuple[PackedTensor, ...]
    is_transposed: bool
    is_raw: bool  # MLC's model adds itself what the norms of the checkpoint add
    placements: Mapping[str, PlannedWeight]  # by role: several share a fused parameter


@dataclass(frozen=True, kw_only=True)
class MlcPlan:
    """An artifact before its weights are written."""

    weights: tuple[MlcWeight, ...]
    shards: tuple[Shard, ...]
    placements: tuple[PlannedWeight, ...]  # in the order of the spec
    parameters: int  # of the checkpoint's files, as the tensor cache counts them

    @property
    def size_bytes(self) -> int:
        """All files together."""
        texts = shards.caches(self.shards, parameters=self.parameters)
        return sum(shard.size_bytes for shard in self.shards) + sum(map(len, texts.values()))


def scheme_of(recipe: Recipe) -> Scheme:
    """Return the scheme that a recipe is.

    Raises:
        UsageError: If it is none of MLC's.
    """
    if recipe.name not in packing.SCHEMES:
        raise UsageError(
            f"MLC has no scheme named {recipe.name!r}", hint=f"{', '.join(packing.SCHEMES)}"
        )
    return packing.SCHEMES[recipe.name]


def plan(checkpoint: "CheckpointProtocol", recipe: Recipe) -> MlcPlan:
    """Return the files of the weights, down to the place of every tensor."""
    scheme, spec = scheme_of(recipe), checkpoint.spec
    name = decoders.model_type(checkpoint.architecture, spec)
    adds_one = decoders.MODELS[name].adds_one
    weights = tuple(
        _weight(parameter, recipe, scheme, spec, adds_one=adds_one)
        for parameter in names.in_file_order(checkpoint)
    )
    return MlcPlan(
        weights=weights,
        placements=tuple(_placements(spec, weights)),
        shards=tuple(shards.place([tensor for weight in weights for tensor in weight.tensors])),
        parameters=_stored_parameters(checkpoint),
    )


def _placements(spec: "DecoderSpec", weights: Iterable[MlcWeight]) -> Iterator[PlannedWeight]:
    """Yield how each weight is stored, the embedding perhaps twice."""
    found: dict[str, list[PlannedWeight]] = {role: [] for role, _ in spec.weights()}
    for weight in weights:
        for role, placed in weight.placements.items():
            found[role].append(placed)
    for held in found.values():
        yield replace(held[0], size_bytes=sum(placed.size_bytes for placed in held))


def _weight(
    parameter: Parameter, recipe: Recipe, scheme: Scheme, spec: "DecoderSpec", *, adds_one: bool
) -> MlcWeight:
    tensor_type = recipe.tensor_type_for(parameter.roles[0], spec)
    tensors = tuple(packing.tensors(parameter, tensor_type, scheme))
    row_bytes = sum(tensor.size_bytes for tensor in tensors) // parameter.shape[0]
    return MlcWeight(
        parameter=parameter,
        tensor_type=tensor_type,
        tensors=tensors,
        is_transposed=packing.is_transposed(parameter, tensor_type, scheme),
        is_raw=adds_one and spec.unit_offset(parameter.roles[0]),
        placements={
            role: PlannedWeight(
                role=role,
                shape=parameter.part_shape(rows),
                wanted=recipe.tensor_type_for(role, spec),
                tensor_type=tensor_type,
                size_bytes=rows * row_bytes,
                is_coarse=tensor_type in packing.GROUPS,
                lattice=packing.lattice(tensor_type),
            )
            for role, _, rows in parameter.parts()
        },
    )


def _stored_parameters(checkpoint: "CheckpointProtocol") -> int:
    """Return how many numbers mlc_llm counts: a head that is tied but stored is one more."""
    spec = checkpoint.spec
    is_extra = spec.is_tied and "lm_head.weight" in checkpoint.tensors
    return checkpoint.parameters + (spec.vocab_size * spec.hidden_size if is_extra else 0)


def lay_out(
    checkpoint: "CheckpointProtocol", request: BuildRequest, *, has_own: bool = False
) -> Layout:
    """Return what the files will hold and their exact size, from headers alone.

    Args:
        checkpoint: The model.
        request: How it is stored.
        has_own: Whether a library is compiled for it.

    Raises:
        UsageError: If MLC has no model for this decoder, or files of a size were asked for.
    """
    decoders.refuse(checkpoint.architecture, checkpoint.spec, has_own=has_own)
    if request.split_bytes is not None:
        raise UsageError(
            f"MLC's files are {shards.SHARD_BYTES // 2**20} MiB each, or one tensor",
            hint="leave out the size to split at",
        )
    recipe = request.recipe
    planned = plan(checkpoint, recipe)
    largest = max(
        (tensor for weight in planned.weights for tensor in weight.tensors),
        key=lambda tensor: tensor.memory_bytes,
    )
    return Layout(
        placements=planned.placements,
        artifact_bytes=planned.size_bytes,
        is_exact=True,
        notes=(*decoders.notes(checkpoint.spec), *_notes(checkpoint, planned)),
        calibration=calibration_sha256(checkpoint.calibration, planned.placements),
        kernel_kl_nats=packing.library_kl_nats(request.recipe, checkpoint.spec),
        largest_buffer=GpuBuffer(name=largest.name, size_bytes=largest.memory_bytes),
        needs_shader_f16=scheme_of(recipe).dtype == "float16",
    )


def _notes(checkpoint: "CheckpointProtocol", planned: MlcPlan) -> Iterator[str]:
    spec = checkpoint.spec
    model = decoders.MODELS[decoders.model_type(checkpoint.architecture, spec)]
    is_bf16 = "BF16" in {getattr(tensor, "dtype", "") for tensor in checkpoint.tensors.values()}
    if spec.norm.unit_offset and is_bf16 and not model.widens_norms:
        yield (
            "norms are stored as 1 + w without rounding it to bfloat16, as mlc_llm does; they are "
            "closer to the checkpoint than its own converter's"
        )
    if any(it.is_coarse and it.role.endswith(".delta_alpha") for it in planned.placements):
        yield (
            "MLC's libraries take in_proj_a and in_proj_b, which decide what a delta net forgets "
            "and writes, as coarse as every other matrix; q0f16 and q0f32 keep them whole"
        )


def write(
    checkpoint: "CheckpointProtocol",
    recipe: Recipe,
    directory: Path,
    *,
    progress: Advance,
    refuses_overflow: bool = True,
) -> str:
    """Write the shards and the tensor cache, one block of rows in memory at a time.

    Args:
        checkpoint: The model.
        recipe: One of MLC's schemes.
        directory: Where the files go.
        progress: Told how many weights were just read.
        refuses_overflow: False stores infinity where float16 holds no more, as mlc_llm does.

    Returns:
        The name of the tensor cache.

    Raises:
        UsageError: If a weight is beyond what the scheme can hold.
    """
    planned = plan(checkpoint, recipe)
    for shard in planned.shards:
        with (directory / shard.file).open("wb") as file:
            file.truncate(shard.size_bytes)
    is_half = scheme_of(recipe).dtype == "float16"
    writer = _Writer(
        directory=directory,
        places={r.tensor.name: r for shard in planned.shards for r in shard.records},
        largest=rounding.FLOAT16_OVERFLOW if is_half and refuses_overflow else math.inf,
    )
    for weight in planned.weights:
        writer.write(checkpoint, weight, progress)
    hashed = [replace(shard, md5=shards.md5_of(directory / shard.file)) for shard in planned.shards]
    for name, text in shards.caches(hashed, parameters=planned.parameters).items():
        (directory / name).write_text(text, encoding="utf-8")
    return shards.CACHE


@dataclass(frozen=True, kw_only=True)
class _Writer:
    """Files of the right size, to be filled."""

    directory: Path
    places: Mapping[str, Record]  # by name of the tensor
    largest: float  # no weight may be as large

    def write(self, checkpoint: "CheckpointProtocol", weight: MlcWeight, progress: Advance) -> None:
        """Write the tensors of a parameter."""
        whole: list[list[Stored]] = []
        for first, encoded in self._encoded(checkpoint, weight):
            if weight.is_transposed:
                whole.append(encoded)
            else:
                self._write_rows(weight, first, encoded)
            if not weight.parameter.is_copy:
                progress(len(encoded[0]) * math.prod(weight.parameter.shape[1:]))
        if whole:
            self._write_transposed(weight, whole)

    def _encoded(
        self, checkpoint: "CheckpointProtocol", weight: MlcWeight
    ) -> "Iterator[tuple[int, list[Stored]]]":
        """Yield some rows of a parameter as they are stored, and the number of the first."""
        for role, start, _ in weight.parameter.parts():
            solved = solved_of(checkpoint.calibration, role)
            if solved is not None:
                yield start, [*solved]
                continue
            importance = importance_of(checkpoint.calibration, weight.placements[role])
            blocks = [(0, checkpoint.weight(role))] if weight.is_raw else checkpoint.blocks(role)
            for first, values in blocks:
                self._refuse_overflow(weight, values)
                yield (
                    start + first,
                    packing.encode(
                        values,
                        weight.tensor_type,
                        is_calibrated=checkpoint.calibration is not None,
                        importance=importance,
                    ),
                )

    def _refuse_overflow(self, weight: MlcWeight, values: "Rows") -> None:
        found = max(float(values.max(initial=0)), -float(values.min(initial=0)))
        if found >= self.largest:
            raise UsageError(
                f"{weight.parameter.name} holds {found:g}, too large for float16",
                hint="take q4f32_1 or q0f32",
            )

    def _write_rows(self, weight: MlcWeight, first: int, encoded: "list[Stored]") -> None:
        for tensor, part in zip(weight.tensors, encoded, strict=True):
            row_bytes = tensor.size_bytes // tensor.shape[0]
            self._write_at(tensor, first * row_bytes, part)

    def _write_transposed(self, weight: MlcWeight, blocks: "list[list[Stored]]") -> None:
        """Write a packed matrix columns first, which needs all of it: 4.5 bits a weight."""
        import numpy as np

        for index, tensor in enumerate(weight.tensors):
            self._write_at(tensor, 0, np.concatenate([block[index] for block in blocks]).T)

    def _write_at(self, tensor: PackedTensor, offset: int, values: "Stored") -> None:
        place = self.places[tensor.name]
        with (self.directory / place.file).open("r+b") as file:
            file.seek(place.offset + offset)
            file.write(values.tobytes())
