"""From a checkpoint to ONNX: what the files will hold, how large they get, and the writing of them.

The graph and the place of every weight are made from headers alone, so a plan knows the files to
the byte; converting writes the same and holds one block of rows at a time.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from edgekit.errors import UsageError
from edgekit.formats import BuildRequest, GpuBuffer, Layout
from edgekit.formats.onnx import clients, experts, graph, model, tensor_types
from edgekit.formats.onnx.model import External
from edgekit.formats.onnx.tensor_types import GraphBuild
from edgekit.model.rope import Rope
from edgekit.model.spec import EXPERT_MATRICES, DecoderSpec
from edgekit.progress import Advance
from edgekit.quant.planned import PlannedWeight, calibration_sha256, importance_of, solved_of
from edgekit.quant.recipe import Recipe
from edgekit.units import format_bytes


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgekit.model.checkpoint_protocol import CheckpointProtocol

    Rows = npt.NDArray[np.float32]


DIRECTORY = "onnx"  # where Optimum and transformers.js look
MIN_SPLIT_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class OnnxWeight(PlannedWeight):
    """One weight of the checkpoint, and the tensors that hold it: those of each of its tables."""

    table_columns: tuple[int, ...]
    tensors: tuple[External, ...]

    @property
    def tables(self) -> "Iterator[tuple[slice, tuple[External, ...]]]":
        """Yield which columns each table holds, and in which tensors."""
        count, first = len(self.tensors) // len(self.table_columns), 0
        for number, columns in enumerate(self.table_columns):
            held = self.tensors[number * count : (number + 1) * count]
            yield slice(first, first := first + columns), held


@dataclass(frozen=True, kw_only=True)
class OnnxPlan:
    """An artifact before its weights are written."""

    how: GraphBuild
    weights: tuple[OnnxWeight, ...]
    frequencies: tuple[External, ...]
    model: bytes  # the model file
    calibration: str | None  # SHA-256 of the calibration text, where one is used

    @property
    def entry(self) -> str:
        """The model file, in the bundle."""
        return f"{DIRECTORY}/{self.how.file}"

    @property
    def tensors(self) -> list[External]:
        """Everything in the data files."""
        return [*self.frequencies, *(tensor for w in self.weights for tensor in w.tensors)]


def plan(checkpoint: "CheckpointProtocol", request: BuildRequest) -> OnnxPlan:
    """Return the files of an artifact, down to the place of every weight."""
    spec, recipe = checkpoint.spec, request.recipe
    refuse(spec)
    weights = tuple(_weights(spec, recipe))
    how = tensor_types.BUILDS[recipe.name]
    if spec.has_experts:
        _refuse_experts(spec, weights, is_half=how.is_half)
    frequencies = tuple(_frequency_tensors(spec))
    loose = [*frequencies, *(tensor for weight in weights for tensor in weight.tensors)]
    _refuse_split(loose, request.split_bytes)
    placing = model.place(loose, stem=f"{how.file}_data", split_bytes=request.split_bytes)
    placed = {tensor.name: tensor for tensor in placing}
    stored = {weight.role: weight.tensor_type for weight in weights}
    metadata = {"edgekit.recipe": recipe.name}
    calibration = calibration_sha256(checkpoint.calibration, weights)
    if calibration:
        metadata["edgekit.calibration"] = calibration
    made = graph.build(spec, stored, how, metadata=metadata)
    return OnnxPlan(
        how=how,
        calibration=calibration,
        weights=tuple(_with_places(weight, placed) for weight in weights),
        frequencies=tuple(placed[tensor.name] for tensor in frequencies),
        model=model.encode(made, list(placed.values())),
    )


def _with_places(weight: OnnxWeight, placed: Mapping[str, External]) -> OnnxWeight:
    return replace(weight, tensors=tuple(placed[tensor.name] for tensor in weight.tensors))


def refuse(spec: DecoderSpec) -> None:
    """Check that ONNX Runtime's operators compute a decoder.

    Raises:
        UsageError: If they do not; the message says what they lack.
    """
    borders = graph.borders(spec)
    if len(borders) > 1:
        raise UsageError(f"longrope with several original contexts: {sorted(borders)}")


def _refuse_experts(spec: DecoderSpec, weights: Sequence[OnnxWeight], *, is_half: bool) -> None:
    """Check that the operators of experts take them as they are stored.

    Raises:
        UsageError: If they do not; the message says why.
    """
    if spec.activation != "silu":
        raise UsageError(f"ONNX Runtime has no experts with the activation {spec.activation}")
    if is_half:
        raise UsageError(
            "experts are computed in float32, on a CPU: edgekit writes none in float16",
            hint="take --quant INT4 or F16",
        )
    for index in range(len(spec.layers)):
        roles = {f"layers.{index}.{part}" for part in EXPERT_MATRICES}
        found = [it.tensor_type for it in weights if it.role in roles]
        if len(set(found)) > 1:
            raise UsageError(
                f"the experts of layer {index} have several tensor types, "
                f"{', '.join(dict.fromkeys(found))}, and their operator takes one",
                hint=f"give {', '.join(EXPERT_MATRICES)} the same",
            )


def _weights(spec: DecoderSpec, recipe: Recipe) -> Iterator[OnnxWeight]:
    for role, shape in spec.weights():
        wanted = recipe.tensor_type_for(role, spec)
        parted = tensor_types.part_columns(role, shape, spec)
        stored = tensor_types.stored_as(wanted, experts.stored_columns(role, spec, columns=parted))
        tables = tensor_types.tables(role, shape, stored, part_columns=parted)
        tensors = tuple(
            tensor
            for name, columns in tables.items()
            for tensor in tensor_types.tensors(name, (*shape[:-1], columns), stored)
        )
        blocks = tensor_types.BLOCKS.get(stored)
        yield OnnxWeight(
            role=role,
            shape=shape,
            wanted=wanted,
            tensor_type=stored,
            size_bytes=sum(tensor.size_bytes for tensor in tensors),
            is_coarse=blocks is not None and blocks.is_coarse,
            lattice=tensor_types.lattice(stored),
            table_columns=tuple(tables.values()),
            tensors=tensors,
        )


def _frequency_tensors(spec: DecoderSpec) -> Iterator[External]:
    for number, rope in enumerate(graph.ropes(spec)):
        for is_long in (False, True) if rope.original_max_position_embeddings else (False,):
            name = graph.frequencies_name(number, is_long=is_long)
            yield External(name=name, dtype="float32", shape=(rope.width // 2,))


def frequencies(rope: Rope, text_tokens: int) -> "Rows":
    """Return the angle of one token's step, for each pair of channels, in float32 throughout.

    transformers computes them so, and an angle after 100,000 steps shows how they were rounded.
    """
    import numpy as np

    exponents = np.arange(0, rope.width, 2, dtype=np.float32) / np.float32(rope.width)
    divisors = np.array(rope.divisors(text_tokens), np.float32)
    found: Rows = np.reciprocal(divisors * np.float32(rope.theta) ** exponents)
    return found


def _refuse_split(tensors: list[External], split_bytes: int | None) -> None:
    if split_bytes is None:
        return
    largest = max(tensors, key=lambda tensor: tensor.size_bytes)
    smallest = max(largest.size_bytes, MIN_SPLIT_BYTES)
    if split_bytes < smallest:
        raise UsageError(
            f"files of {split_bytes} bytes are too small: {largest.name} alone takes "
            f"{largest.size_bytes}",
            hint=f"split into files of {smallest} bytes or more",
        )


def lay_out(checkpoint: "CheckpointProtocol", request: BuildRequest) -> Layout:
    """Return what the files will hold and their exact size, from headers alone."""
    planned = plan(checkpoint, request)
    sizes = model.file_sizes(planned.tensors)
    return Layout(
        placements=planned.weights,
        artifact_bytes=len(planned.model) + sum(sizes.values()),
        is_exact=True,
        notes=tuple(_notes(checkpoint, planned)),
        calibration=planned.calibration,
        not_on_webgpu=clients.not_on_webgpu(checkpoint.spec),
        largest_buffer=_largest_buffer(checkpoint.spec, planned),
        needs_shader_f16=any(tensor.dtype == "float16" for tensor in planned.tensors),
        is_half=planned.how.is_half,
    )


def _notes(checkpoint: "CheckpointProtocol", planned: OnnxPlan) -> Iterator[str]:
    yield from clients.notes(checkpoint)
    if checkpoint.spec.has_experts:
        stored = {weight.role: weight.tensor_type for weight in planned.weights}
        yield (
            "experts are computed on processors only, by operators of ONNX Runtime "
            f"{experts.needed_version(checkpoint.spec, stored)} and later"
        )
    if tensor_types.spares_delta_nets(planned.weights):
        yield tensor_types.DELTA_NOTE
    if any(weight.tensor_type in tensor_types.BLOCKS for weight in planned.weights):
        yield tensor_types.ACTIVATIONS_NOTE
    yield from (_table_note(it) for it in planned.weights if it.role == "layer_embedding")


def _table_note(weight: OnnxWeight) -> str:
    rows, count = weight.shape[0], len(weight.table_columns)
    tables = "one table" if count == 1 else f"{count} tables, so that no GPU must bind it whole"
    return (
        f"the embeddings for all layers take {format_bytes(weight.size_bytes)} as "
        f"{weight.tensor_type}, of which a token reads {format_bytes(weight.size_bytes / rows)}; "
        f"they are in {tables}"
    )


def _largest_buffer(spec: DecoderSpec, planned: OnnxPlan) -> GpuBuffer:
    """Return the largest tensor on a GPU; one converted to float32 at load is as large as that."""
    sizes = {tensor.name: tensor.size_bytes for tensor in planned.frequencies}
    for weight in planned.weights:
        is_converted = not planned.how.is_half and weight.role not in spec.looked_up
        for tensor in weight.tensors:
            grown = 2 if is_converted and tensor.dtype == "float16" else 1
            sizes[tensor.name] = grown * tensor.size_bytes
    name = max(sizes, key=lambda name: sizes[name])
    return GpuBuffer(name=name, size_bytes=sizes[name])


def convert(
    checkpoint: "CheckpointProtocol",
    request: BuildRequest,
    directory: Path,
    *,
    progress: Advance,
) -> str:
    """Write the model file and its data files, one block of rows in memory at a time.

    Returns:
        The name of the model file, relative to ``directory``.
    """
    planned = plan(checkpoint, request)
    path = directory / planned.entry
    path.parent.mkdir(exist_ok=True)
    with ExitStack() as stack:
        files: dict[str, BinaryIO] = {}
        for name, size_bytes in model.file_sizes(planned.tensors).items():
            files[name] = stack.enter_context(path.with_name(name).open("wb"))
            files[name].truncate(size_bytes)
        _write_frequencies(checkpoint.spec, planned, files)
        for weight in planned.weights:
            solved = solved_of(checkpoint.calibration, weight.role)
            if solved is not None:
                _write_tensors(files, weight.tensors, 0, solved)
                progress(weight.parameters)
                continue
            importance = importance_of(checkpoint.calibration, weight)
            for first, rows in checkpoint.blocks(weight.role):
                _write_rows(files, weight, first, rows, importance)
                progress(rows.size)
    path.write_bytes(planned.model)
    return planned.entry


def _write_frequencies(spec: DecoderSpec, planned: OnnxPlan, files: Mapping[str, BinaryIO]) -> None:
    by_name = {tensor.name: tensor for tensor in planned.frequencies}
    for number, rope in enumerate(graph.ropes(spec)):
        border = rope.original_max_position_embeddings
        for is_long in (False, True) if border else (False,):
            tensor = by_name[graph.frequencies_name(number, is_long=is_long)]
            values = frequencies(rope, (border or 0) + 1 if is_long else 1)
            _write(files[tensor.file], tensor.offset, values.astype("<f4"))


def _write_rows(
    files: Mapping[str, BinaryIO],
    weight: OnnxWeight,
    first: int,
    rows: "Rows",
    importance: "Rows | None",
) -> None:
    for columns, tensors in weight.tables:
        try:
            encoded = tensor_types.encode(
                rows[..., columns], weight.tensor_type, importance=importance
            )
        except UsageError as error:
            raise UsageError(f"{weight.role}: {error}", hint=error.hint) from error
        _write_tensors(files, tensors, first, encoded)


def _write_tensors(
    files: Mapping[str, BinaryIO],
    tensors: Sequence[External],
    first: int,
    encoded: "Sequence[npt.NDArray[np.generic]]",
) -> None:
    for tensor, part in zip(tensors, encoded, strict=True):
        row_bytes = tensor.size_bytes // tensor.shape[0]
        _write(files[tensor.file], tensor.offset + first * row_bytes, part)


def _write(file: BinaryIO, offset: int, values: "npt.NDArray[np.generic]") -> None:
    file.seek(offset)
    file.write(values.tobytes())
