"""From a checkpoint to GGUF: what the files will hold, how large they get, and the writing of them.

The list of parts is made from headers alone, so that a plan knows the file to the byte; converting
walks the same list and holds one block of rows at a time.
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit import installed
from edgekit.formats import BuildRequest, Layout
from edgekit.formats.gguf import (
    architectures,
    hyperparameters,
    importance,
    parts,
    pretokenizers,
    provenance,
    speed,
    split,
    tensor_types,
    value_heads,
    vocabulary,
)
from edgekit.formats.gguf.architectures import Architecture
from edgekit.formats.gguf.layout import TensorEntry, Value
from edgekit.formats.gguf.parts import FileTensor
from edgekit.formats.gguf.split import FilesWriter, PlannedFile
from edgekit.formats.gguf.value_heads import ValueHeads
from edgekit.model.checkpoint_protocol import row_chunks
from edgekit.model.spec import DecoderSpec, Pairs
from edgekit.progress import Advance
from edgekit.quant.planned import calibration_sha256, solved_of
from edgekit.quant.recipe import Recipe, split_role
from edgekit.text import corpus


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgekit.model.checkpoint_protocol import CheckpointProtocol
    from edgekit.model.tokenizer_files import TokenizerFiles

    Rows = npt.NDArray[np.float32]
    Encoded = npt.NDArray[np.generic]
    Block = tuple[str, Rows | Encoded, str]  # tensor, some of its rows, tensor type


STEM = "model"
ENTRY = f"{STEM}.gguf"  # of an artifact that is one file


@dataclass(frozen=True, kw_only=True)
class GgufPlan:
    """A file, or several, before weights are written."""

    architecture: Architecture
    parts: tuple[FileTensor, ...]
    files: tuple[PlannedFile, ...]


def plan(checkpoint: "CheckpointProtocol", request: BuildRequest, *, pre: str) -> GgufPlan:
    """Return what the files will hold, from headers alone.

    Args:
        checkpoint: The model.
        request: How it is stored, and how large a file may get.
        pre: The name under which llama.cpp cuts text as this tokenizer does.

    Raises:
        UsageError: If no graph of llama.cpp computes this decoder, or a file would be too small.
    """
    architecture = architectures.choose(checkpoint.spec, family=checkpoint.architecture)
    found = tuple(parts.of(checkpoint.spec, request.recipe, architecture))
    keys = metadata(checkpoint, request.recipe, architecture, found, pre=pre)
    entries = _entries(checkpoint.spec, architecture, found)
    files = split.plan_files(STEM, keys, entries, split_bytes=request.split_bytes)
    return GgufPlan(architecture=architecture, parts=found, files=tuple(files))


def lay_out(checkpoint: "CheckpointProtocol", request: BuildRequest) -> Layout:
    """Return what the files will hold and their exact size, from headers alone."""
    planned = plan(checkpoint, request, pre=pre_of(checkpoint.text))
    count = len(planned.files)
    split_note = f"{count} files; Ollama takes one only, so there is no Modelfile"
    return Layout(
        placements=planned.parts,
        artifact_bytes=sum(file.size_bytes for file in planned.files),
        is_exact=True,
        notes=(
            *([split_note] if count > 1 else []),
            *([planned.architecture.note] if planned.architecture.note else []),
            *tensor_types.notes(request.recipe, checkpoint.spec),
            *_differences(checkpoint.text),
        ),
        calibration=calibration_sha256(checkpoint.calibration, planned.parts),
        kernel_kl_nats=_kernel_kl_nats(checkpoint.spec),
        overhead_bytes=speed.overhead_bytes(checkpoint.spec),
        overhead_s=speed.overhead_s(checkpoint.spec),
    )


# ggml looks GELU up in a table of float16. Most that it added to a random Gemma 2 or 3, of 1 to 16
# layers and 64 to 1,024 columns, heads of three spreads, tied and untied: 6.9e-7 a layer. Without a
# gate, in a random StarCoder 2 or Phi of 1 to 4 layers and 64 or 256 columns: 1.9e-6.
_GELU_TABLE_KL_NATS = 1e-6  # for each layer
_UNGATED_GELU_TABLE_KL_NATS = 4e-6


def _kernel_kl_nats(spec: DecoderSpec) -> float:
    if spec.activation != "gelu_tanh":
        return 0.0
    of_layer = _GELU_TABLE_KL_NATS if spec.is_gated else _UNGATED_GELU_TABLE_KL_NATS
    return of_layer * len(spec.layers)


@functools.lru_cache(maxsize=1)
def pre_of(text: "TokenizerFiles") -> str:
    """Return the name under which llama.cpp cuts text as this tokenizer does.

    Where llama.cpp is not installed, so that a plan needs none, it is the likeliest.

    Raises:
        UsageError: If llama.cpp reads text or chat prompts otherwise, whatever the name.
    """
    if installed.missing("llama_cpp", "tokenizers"):
        return pretokenizers.likely_pre(text)
    return pretokenizers.find_pre(text, corpus=corpus.lines())


@functools.lru_cache(maxsize=1)
def _differences(text: "TokenizerFiles") -> tuple[str, ...]:
    """Return where other programs that open the file read text otherwise than `edgekit run`."""
    return tuple(
        f"llama.cpp's own tokenizer differs from the checkpoint's, which edgekit run uses: {found}"
        for found in vocabulary.known_differences(text)
    )


def _entries(
    spec: DecoderSpec, architecture: Architecture, found: Sequence[FileTensor]
) -> list[TensorEntry]:
    made = [
        TensorEntry(name=name, shape=(len(values),), tensor_type="F32")
        for name, values in hyperparameters.made_tensors(spec, architecture).items()
    ]
    return [*made, *(part.entry for part in found)]


def metadata(
    checkpoint: "CheckpointProtocol",
    recipe: Recipe,
    architecture: Architecture,
    found: Sequence[FileTensor],
    *,
    pre: str,
) -> dict[str, Value]:
    """Return every key of the file: what it is, the decoder, the tokenizer."""
    keys: dict[str, Value] = {
        "general.architecture": ("string", architecture.name),
        "general.type": ("string", "model"),
        "general.name": ("string", vocabulary.model_name(checkpoint.text, checkpoint.name)),
        "general.size_label": ("string", size_label(checkpoint.parameters)),
        "general.file_type": ("uint32", tensor_types.FILE_TYPES[recipe.name]),
        "general.quantization_version": ("uint32", tensor_types.QUANTIZATION_VERSION),
    }
    keys |= provenance.write(checkpoint)
    keys |= importance.keys(checkpoint.calibration, found)
    keys |= hyperparameters.write(checkpoint.spec, architecture)
    keys |= _weights_that_are_keys(checkpoint)
    keys |= _vocabulary(checkpoint.text, checkpoint.spec.vocab_size, pre)
    return keys


def _weights_that_are_keys(checkpoint: "CheckpointProtocol") -> dict[str, Value]:
    """Return arrays of one number for each layer, by their key."""
    values: dict[str, list[float]] = {}
    for role, _ in checkpoint.spec.weights():
        key = parts.KEYS.get(split_role(role)[1])
        if key is not None:
            (_, (value,)) = next(iter(checkpoint.blocks(role)))
            values.setdefault(key, []).append(float(value))
    return {key: ("array[float32]", numbers) for key, numbers in values.items()}


@functools.lru_cache(maxsize=1)
def _vocabulary(text: "TokenizerFiles", tokens: int, pre: str) -> Mapping[str, Value]:
    """Return the tokenizer's keys: half a second for a large one, and every recipe has the same."""
    return vocabulary.read_vocabulary(text, vocabulary_tokens=tokens, pre=pre)


def size_label(parameters: int) -> str:
    """Return a size for people, as model names carry it: ``135M``, ``1.2B``."""
    if parameters >= 999_500_000:
        return re.sub(r"\.0B$", "B", f"{parameters / 1e9:.1f}B")
    if parameters >= 999_500:
        return f"{parameters / 1e6:.0f}M"
    return f"{parameters / 1e3:.0f}K"


def convert(
    checkpoint: "CheckpointProtocol",
    request: BuildRequest,
    directory: Path,
    *,
    pre: str,
    progress: Advance,
) -> str:
    """Write ``model.gguf`` or its parts, one block of rows in memory at a time.

    Returns:
        The name of the file to open, the first of several.
    """
    planned = plan(checkpoint, request, pre=pre)
    weights = dict(importance.weights(checkpoint.calibration, planned.parts, checkpoint.spec))
    with FilesWriter(directory, planned.files) as writer:
        _write_made(writer, checkpoint.spec, planned.architecture)
        blocks = (
            (part.name, block, part.tensor_type)
            for part in planned.parts
            for block in _blocks(checkpoint, part, planned.architecture)
        )
        for name, encoded in tensor_types.quantize_each(
            counted(blocks, progress), importance=weights
        ):
            writer.write(name, encoded)
    return planned.files[0].name


def counted(blocks: "Iterator[Block]", progress: Advance) -> "Iterator[Block]":
    """Tell the progress as blocks are taken."""
    for name, rows, tensor_type in blocks:
        yield name, rows, tensor_type
        is_encoded = rows.dtype == "uint8"
        kind = tensor_types.TENSOR_TYPES[tensor_type]
        progress(rows.size // kind.block_bytes * kind.block_weights if is_encoded else rows.size)


def _write_made(writer: FilesWriter, spec: DecoderSpec, architecture: Architecture) -> None:
    import numpy as np

    for name, values in hyperparameters.made_tensors(spec, architecture).items():
        writer.write(name, np.asarray(values, np.float32).tobytes())


def _blocks(
    checkpoint: "CheckpointProtocol", part: FileTensor, architecture: Architecture
) -> Iterator["Rows | Encoded"]:
    """Yield the rows of a part as llama.cpp wants them, some million weights at a time.

    Those that are solved already are bytes.
    """
    import numpy as np

    spec = checkpoint.spec
    for role in part.roles:
        solved = solved_of(checkpoint.calibration, role)
        if solved is not None:
            pairs = spec.rotated_pairs(role) if architecture.rope_pairs == "neighbours" else None
            (encoded,) = solved
            yield encoded.take(_order(pairs, len(encoded)), axis=0) if pairs else encoded
            continue
        heads = value_heads.value_heads(role, spec)
        if heads is not None or split_role(role)[1] == "delta_decay":
            yield from _delta_blocks(checkpoint, role, heads)
            continue
        pairs = spec.rotated_pairs(role) if architecture.rope_pairs == "neighbours" else None
        multiplier = np.float32(architecture.multiplier(role, spec))
        multiple = pairs.head_dim if pairs and pairs.axis == 0 else 1
        for first, rows in checkpoint.blocks(role, row_multiple=multiple):
            kept = rows[: part.shape[0] - first] if len(part.roles) == 1 else rows
            scaled = kept if multiplier == 1 else kept * multiplier
            if len(scaled):
                yield interleave_halves(scaled, pairs) if pairs else scaled


def _delta_blocks(
    checkpoint: "CheckpointProtocol", role: str, heads: ValueHeads | None
) -> Iterator["Rows"]:
    """Yield a weight of a delta net with its value heads where ggml looks for them."""
    import numpy as np

    is_gathered = heads is not None and heads.axis == 0
    blocks = (
        _gathered(checkpoint, role, heads)
        if heads and is_gathered
        else (rows for _, rows in checkpoint.blocks(role))
    )
    for rows in blocks:
        moved = heads.columns(rows, "file") if heads and not is_gathered else rows
        yield -np.exp(moved) if split_role(role)[1] == "delta_decay" else moved


def _gathered(checkpoint: "CheckpointProtocol", role: str, heads: ValueHeads) -> Iterator["Rows"]:
    """Yield rows from where they stand in a checkpoint, some million weights at a time."""
    import numpy as np

    shape = dict(checkpoint.spec.weights())[role]
    for first, count in row_chunks(shape):
        runs = heads.runs(first, count, "file")
        yield np.concatenate([checkpoint.weight(role, *run) for run in runs])


def interleave_halves(rows: "Rows", pairs: Pairs) -> "Rows":
    """Reorder the channels of each head so that ggml rotates neighbours where others rotate halves.

    Args:
        rows: float32, whole heads along the axis of ``pairs``: in each head first the real halves
            of all pairs, then the imaginary ones, then what is not rotated.
        pairs: How wide a head is, and how much of it is rotated.

    Returns:
        The same shape, the two of each pair side by side.
    """
    ordered: Rows = rows.take(_order(pairs, rows.shape[pairs.axis]), axis=pairs.axis)
    return ordered


def _order(pairs: Pairs, channels: int) -> "npt.NDArray[np.intp]":
    """Return where each channel of a file stands in a checkpoint."""
    import numpy as np

    starts = np.arange(channels // pairs.head_dim)[:, None] * pairs.head_dim
    found: npt.NDArray[np.intp] = (starts + np.array(pairs.order("neighbours"))).ravel()
    return found
