"""From a checkpoint to GGUF: what the files will hold, how large they get, and the writing of them.

The list of parts is made from headers alone, so that a plan knows the file to the byte; converting
walks the same list and holds one block of rows at a time.
"""

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.formats import Layout, Placement, Progress
from edgekit.formats.gguf import (
    architectures,
    hyperparameters,
    importance,
    pretokenizers,
    provenance,
    split,
    storage,
    vocabulary,
)
from edgekit.formats.gguf.architectures import Architecture
from edgekit.formats.gguf.layout import TensorEntry, Value
from edgekit.formats.gguf.split import FilesWriter, PlannedFile
from edgekit.model.spec import DecoderSpec, Shape
from edgekit.quant.recipe import Recipe, split_role


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgekit.model.checkpoint_protocol import CheckpointProtocol
    from edgekit.model.tokenizer_files import TokenizerFiles

    Rows = npt.NDArray[np.float32]
    Block = tuple[str, Rows, str]  # tensor, some of its rows, storage


STEM = "model"
ENTRY = f"{STEM}.gguf"  # of an artifact that is one file

TENSOR_NAMES = {
    "token_embedding": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "final_norm_bias": "output_norm.bias",
    "output_head": "output.weight",
}
LAYER_TENSOR_NAMES = {
    "attention_norm": "attn_norm.weight",
    "attention_norm_bias": "attn_norm.bias",
    "query": "attn_q.weight",
    "query_bias": "attn_q.bias",
    "key": "attn_k.weight",
    "key_bias": "attn_k.bias",
    "value": "attn_v.weight",
    "value_bias": "attn_v.bias",
    "query_norm": "attn_q_norm.weight",
    "key_norm": "attn_k_norm.weight",
    "attention_output": "attn_output.weight",
    "attention_output_bias": "attn_output.bias",
    "attention_post_norm": "post_attention_norm.weight",
    "mlp_norm": "ffn_norm.weight",
    "mlp_norm_bias": "ffn_norm.bias",
    "gate": "ffn_gate.weight",
    "gate_bias": "ffn_gate.bias",
    "up": "ffn_up.weight",
    "up_bias": "ffn_up.bias",
    "down": "ffn_down.weight",
    "down_bias": "ffn_down.bias",
    "mlp_post_norm": "post_ffw_norm.weight",
}


def tensor_name(role: str) -> str:
    """Return llama.cpp's name of a weight."""
    layer, part = split_role(role)
    return TENSOR_NAMES[part] if layer is None else f"blk.{layer}.{LAYER_TENSOR_NAMES[part]}"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One tensor of the file, and the weights of the checkpoint that fill it, one after another."""

    entry: TensorEntry
    roles: tuple[str, ...]
    wanted: str  # the storage the recipe asked for


def parts(checkpoint: "CheckpointProtocol", recipe: Recipe) -> list[Part]:
    """Return every tensor made from weights, in the order of the file.

    Raises:
        UsageError: If no graph of llama.cpp computes this decoder.
    """
    spec, architecture = checkpoint.spec, architectures.choose(checkpoint.spec)
    found = [_part(roles, shape, recipe, spec) for roles, shape in _stacked(spec, architecture)]
    if architecture.ties == "never" and spec.is_tied:
        embedding = ("token_embedding",)
        head = _part(embedding, (spec.vocabulary, spec.hidden_width), recipe, spec)
        entry = TensorEntry(
            name=tensor_name("output_head"), shape=head.entry.shape, storage=head.entry.storage
        )
        found.append(Part(entry=entry, roles=embedding, wanted=head.wanted))
    return found


def _stacked(
    spec: DecoderSpec, architecture: Architecture
) -> Iterator[tuple[tuple[str, ...], Shape]]:
    """Yield weights with their shape; where the graph wants gate and up in one, both together."""
    for role, shape in spec.weights():
        prefix, _, part = role.rpartition(".")
        if architecture.fuses_gate_and_up and part == "gate":
            continue
        if architecture.fuses_gate_and_up and part == "up":
            yield (f"{prefix}.gate", role), (2 * shape[0], shape[1])
        else:
            yield (role,), shape


def _part(roles: tuple[str, ...], shape: Shape, recipe: Recipe, spec: DecoderSpec) -> Part:
    wanted = recipe.storage_for(roles[-1], spec)
    entry = TensorEntry(
        name=tensor_name(roles[-1]), shape=shape, storage=storage.stored_as(wanted, shape[-1])
    )
    return Part(entry=entry, roles=roles, wanted=wanted)


def lay_out(
    checkpoint: "CheckpointProtocol", recipe: Recipe, *, split_bytes: int | None = None
) -> Layout:
    """Return what the files will hold and their exact size, from headers alone."""
    found = parts(checkpoint, recipe)
    placements = tuple(
        Placement(
            role=part.roles[-1],
            parameters=part.entry.shape[0] * (part.entry.shape[1] if part.entry.shape[1:] else 1),
            storage=part.entry.storage,
            wanted=part.wanted,
            size_bytes=part.entry.size_bytes,
        )
        for part in found
    )
    keys = metadata(checkpoint, recipe, pre=likely_pre(checkpoint.text))
    files = _files(checkpoint, keys, found, split_bytes)
    return Layout(
        placements=placements,
        artifact_bytes=sum(file.size_bytes for file in files),
        is_exact=True,
        notes=(f"{len(files)} files; Ollama takes one only, so there is no Modelfile",)
        if len(files) > 1
        else (),
        calibration=importance.text_sha256(checkpoint.calibration, found),
    )


def _files(
    checkpoint: "CheckpointProtocol",
    keys: Mapping[str, Value],
    found: list[Part],
    split_bytes: int | None,
) -> list[PlannedFile]:
    entries = _entries(checkpoint, found)
    return split.plan_files(STEM, keys, entries, split_bytes=split_bytes)


@functools.lru_cache(maxsize=1)
def likely_pre(text: "TokenizerFiles") -> str:
    """Return the name under which llama.cpp most likely cuts text as this tokenizer does."""
    return pretokenizers.likely_pre(text)


def _entries(checkpoint: "CheckpointProtocol", found: list[Part]) -> list[TensorEntry]:
    ropes = hyperparameters.rope_tensors(checkpoint.spec)
    factors = [
        TensorEntry(name=name, shape=(len(values),), storage="F32")
        for name, values in ropes.items()
    ]
    return [*factors, *(part.entry for part in found)]


def metadata(checkpoint: "CheckpointProtocol", recipe: Recipe, *, pre: str) -> dict[str, Value]:
    """Return every key of the file: what it is, the decoder, the tokenizer."""
    architecture = architectures.choose(checkpoint.spec)
    keys: dict[str, Value] = {
        "general.architecture": ("string", architecture.name),
        "general.type": ("string", "model"),
        "general.name": ("string", vocabulary.model_name(checkpoint.text, checkpoint.name)),
        "general.size_label": ("string", size_label(checkpoint.parameters)),
        "general.file_type": ("uint32", storage.FILE_TYPES[recipe.name]),
        "general.quantization_version": ("uint32", storage.QUANTIZATION_VERSION),
    }
    keys |= provenance.write(checkpoint)
    keys |= importance.keys(checkpoint.calibration, parts(checkpoint, recipe))
    keys |= hyperparameters.write(checkpoint.spec, architecture)
    keys |= _vocabulary(checkpoint.text, checkpoint.spec.vocabulary, pre)
    return keys


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


def convert(  # noqa: PLR0913 - the parameters of `Format.convert`
    checkpoint: "CheckpointProtocol",
    recipe: Recipe,
    directory: Path,
    *,
    pre: str,
    progress: Progress,
    split_bytes: int | None = None,
) -> str:
    """Write ``model.gguf`` or its parts, one block of rows in memory at a time.

    Returns:
        The name of the file to open, the first of several.
    """
    found = parts(checkpoint, recipe)
    keys = metadata(checkpoint, recipe, pre=pre)
    architecture = architectures.choose(checkpoint.spec)
    files = _files(checkpoint, keys, found, split_bytes)
    with FilesWriter(directory, files) as writer:
        _write_ropes(writer, checkpoint.spec)
        blocks = (
            (part.entry.name, block, part.entry.storage)
            for part in found
            for block in _blocks(checkpoint, part, architecture)
        )
        weights = importance.weights(checkpoint.calibration, found)
        encoding = storage.quantise_each(counted(blocks, progress), importance=weights)
        for name, encoded in encoding:
            writer.write(name, encoded)
    return files[0].name


def counted(blocks: "Iterator[Block]", progress: Progress) -> "Iterator[Block]":
    """Tell the progress as blocks are taken."""
    for block in blocks:
        yield block
        progress(block[1].size)


def _write_ropes(writer: FilesWriter, spec: DecoderSpec) -> None:
    import numpy as np

    for name, values in hyperparameters.rope_tensors(spec).items():
        writer.write(name, np.asarray(values, np.float32).tobytes())


def _blocks(
    checkpoint: "CheckpointProtocol", part: Part, architecture: Architecture
) -> Iterator["Rows"]:
    """Yield the rows of a part as llama.cpp wants them, some million weights at a time."""
    width = checkpoint.spec.attention.head_width
    for role in part.roles:
        turns = re.fullmatch("(query|key)(_bias)?", split_role(role)[1])
        if turns and architecture.rope_pairs == "neighbours":
            for _, rows in checkpoint.blocks(role, row_multiple=width):
                yield interleave_halves(rows, width)
        else:
            yield from (rows for _, rows in checkpoint.blocks(role))


def interleave_halves(rows: "Rows", head_width: int) -> "Rows":
    """Reorder the rows of each head so that ggml rotates neighbours where others rotate halves.

    Args:
        rows: float32, shape ``(heads * head_width, …)``: in each head first the real halves of
            all pairs, then the imaginary ones.
        head_width: Rows of one head.

    Returns:
        The same shape, each pair side by side.
    """
    heads = rows.shape[0] // head_width
    pairs = rows.reshape(heads, 2, head_width // 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def separate_halves(rows: "Rows", head_width: int) -> "Rows":
    """Undo `interleave_halves`."""
    heads = rows.shape[0] // head_width
    pairs = rows.reshape(heads, head_width // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
