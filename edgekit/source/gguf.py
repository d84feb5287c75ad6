"""A GGUF file as an ordinary checkpoint, so that a model found as GGUF can go to every format."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit import scratch
from edgekit.errors import UsageError
from edgekit.formats.gguf import hyperparameters, layout, parts, value_heads
from edgekit.formats.gguf.architectures import Architecture
from edgekit.formats.gguf.facts import Facts
from edgekit.formats.gguf.layout import GgufFile, TensorInfo
from edgekit.formats.gguf.value_heads import ValueHeads
from edgekit.model.checkpoint_protocol import Tensor
from edgekit.model.mixers import Attention
from edgekit.model.shapes import Shape
from edgekit.model.spec import DecoderSpec
from edgekit.model.tokenizer_files import TokenizerFiles
from edgekit.progress import Listener
from edgekit.quant.recipe import split_role
from edgekit.source import families
from edgekit.source.checkpoint import Checkpoint
from edgekit.source.config import Config
from edgekit.source.gguf_tokenizer import write_tokenizer
from edgekit.source.made_tensors import PairOrder
from edgekit.source.writer import write_checkpoint, written_bytes


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Rows = npt.NDArray[np.float32]


_SMALL = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_LAYER = re.compile(r"blk\.(\d+)\.")
_COMPUTED = (*_SMALL, "attn_rot_embd.weight")  # tables made from the metadata


def write_from_gguf(file: Path, directory: Path, *, listener: Listener) -> None:
    """Decode a GGUF file into a checkpoint directory in float32, which loses nothing.

    Raises:
        UsageError: If the file is damaged, or of an architecture or tokenizer edgekit does not
            know; nothing is written then.
    """
    with scratch.directory("gguf") as text_directory:
        checkpoint = _checkpoint(layout.read(file), directory.name, text_directory)
        total = written_bytes(checkpoint, "f32")
        with listener.track(f"decode {file.name}", total) as advance:
            write_checkpoint(checkpoint, directory, precision="f32", advance=advance)


def _checkpoint(file: GgufFile, name: str, text_directory: Path) -> Checkpoint:
    facts = _facts(file)
    spec = hyperparameters.read(facts)
    architecture = _family_for(spec, facts.architecture)
    write_tokenizer(file.metadata, text_directory)
    return Checkpoint(
        directory=text_directory / name,  # has no files of its own
        architecture=architecture,
        spec=spec,
        tensors=_tensors(file, facts, spec, architecture),
        text=TokenizerFiles.open(text_directory, config={}),
        licence=file.metadata.get("general.license"),
    )


def _facts(file: GgufFile) -> Facts:
    infos = {info.name: info for info in file.tensors}
    if "token_embd.weight" not in infos:
        raise UsageError(
            f"{file.path} has no token_embd.weight: it holds no decoder",
            hint="a vocabulary alone, or another part of a model? Pass the file with its weights",
        )
    return Facts(
        metadata=file.metadata,
        tensors=frozenset(infos),
        vocab_size=infos["token_embd.weight"].shape[0],
        rope_factors={
            name: layout.read_tensor(file, infos[name]).tolist() for name in _SMALL if name in infos
        },
    )


def _family_for(spec: DecoderSpec, graph: Architecture) -> str:
    """Return the first family whose config can say exactly this decoder, those of the graph first.

    Raises:
        UsageError: If none can.
    """
    usual = [name for name in graph.model_types if name in families.names()]
    for name in dict.fromkeys([*usual, *families.names()]):
        try:
            family = families.get(name)  # one from another package may be broken
            config = Config(family.config(spec), origin="the GGUF file")
            if family.describe(config) == spec:
                return name
        except UsageError:
            continue
    raise UsageError(
        f"no family's config can say what this {graph.name} file is",
        hint=f"families: {', '.join(families.names())}",
    )


@dataclass(frozen=True, kw_only=True)
class RoleTensor:
    """One weight of a decoder inside a GGUF file, in the checkpoint's order and scale."""

    file: GgufFile
    info: TensorInfo
    shape: Shape
    first_row: int  # where it starts in a fused tensor
    restore: Callable[["Rows"], "Rows"]

    @property
    def size_bytes(self) -> int:
        """What it will take in float32."""
        return 4 * math.prod(self.shape)

    def read(self, first_row: int = 0, rows: int | None = None) -> "Rows":
        """Return some rows, or all, in float32."""
        rows = self.shape[0] - first_row if rows is None else rows
        stored = layout.read_tensor(
            self.file, self.info, first_row=self.first_row + first_row, rows=rows
        )
        return self.restore(stored.reshape(rows, *self.shape[1:]))


@dataclass(frozen=True)
class ConcatenatedTensor:
    """Tensors one after another along the rows, as fused projections are stored."""

    parts: tuple[Tensor, ...]

    @property
    def shape(self) -> Shape:
        """All rows together."""
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    @property
    def size_bytes(self) -> int:
        """All parts together."""
        return sum(part.size_bytes for part in self.parts)

    def read(self, first_row: int = 0, rows: int | None = None) -> "Rows":
        """Return some rows, or all, in float32."""
        import numpy as np

        last_row = self.shape[0] if rows is None else first_row + rows
        found, start = [], 0
        for part in self.parts:
            low, high = max(first_row, start), min(last_row, start + part.shape[0])
            if low < high:
                found.append(part.read(low - start, high - low))
            start += part.shape[0]
        return np.concatenate(found)


@dataclass(frozen=True)
class GroupedHeads:
    """A weight whose value heads follow each other as in a checkpoint, by the key head they read.

    Whatever the tensor type: the blocks of the file are decoded before anything changes places.
    """

    base: Tensor
    heads: ValueHeads

    @property
    def shape(self) -> Shape:
        """That of the base."""
        return self.base.shape

    @property
    def size_bytes(self) -> int:
        """That of the base."""
        return self.base.size_bytes

    def read(self, first_row: int = 0, rows: int | None = None) -> "Rows":
        """Return some rows, or all, in float32."""
        import numpy as np

        rows = self.shape[0] - first_row if rows is None else rows
        if self.heads.axis == 1:
            return self.heads.columns(self.base.read(first_row, rows), "checkpoint")
        runs = self.heads.runs(first_row, rows, "checkpoint")
        return np.concatenate([self.base.read(*run) for run in runs])


@dataclass(frozen=True)
class DepthwiseTaps:
    """Taps by channel with the axis that a checkpoint has between: the one input channel."""

    base: Tensor  # (channels, taps)

    @property
    def shape(self) -> Shape:
        """Channels, one, taps."""
        channels, taps = self.base.shape
        return channels, 1, taps

    @property
    def size_bytes(self) -> int:
        """That of the base."""
        return self.base.size_bytes

    def read(self, first_row: int = 0, rows: int | None = None) -> "Rows":
        """Return some channels, or all, in float32."""
        return self.base.read(first_row, rows)[:, None]


@dataclass(frozen=True)
class RowTensor:
    """One row of a tensor, as a tensor of its own."""

    whole: Tensor
    row: int

    @property
    def shape(self) -> Shape:
        """The dimensions of the row."""
        return self.whole.shape[1:]

    @property
    def size_bytes(self) -> int:
        """What it will take in float32."""
        return 4 * math.prod(self.shape)

    def read(self, first_row: int = 0, rows: int | None = None) -> "Rows":
        """Return some of its items, or all, in float32."""
        last = None if rows is None else first_row + rows
        whole: Rows = self.whole.read(self.row, 1)[0]
        return whole[first_row:last]


@dataclass(frozen=True)
class KeyTensor:
    """A weight of one number that a GGUF file has in its metadata."""

    value: float
    shape: Shape = (1,)
    size_bytes: int = 4

    def read(self, first_row: int = 0, rows: int | None = None) -> "Rows":
        """Return the number, or nothing of it, in float32."""
        import numpy as np

        last = None if rows is None else first_row + rows
        return np.array([self.value], np.float32)[first_row:last]


def _tensors(
    file: GgufFile, facts: Facts, spec: DecoderSpec, family_name: str
) -> Mapping[str, Tensor]:
    """Return the file's weights under the names a checkpoint of that family gives them."""
    infos, graph = {info.name: info for info in file.tensors}, facts.architecture
    family = families.get(family_name)
    _refuse_unused(file, infos, spec, graph)
    _refuse_sinks(file, infos, graph, depth=len(spec.layers))
    pieces: dict[str, list[tuple[int, Tensor]]] = {}
    for role, shape in spec.weights():
        layer, part = split_role(role)
        tensor: Tensor
        if layer is not None and part in parts.KEYS:
            tensor = KeyTensor(facts.each_layer(parts.KEYS[part])[layer])
        elif part == "layer_scale" and _place(infos, role, spec, graph).name not in infos:
            tensor = KeyTensor(1.0)  # llama.cpp does without
        else:
            tensor = _role_tensor(file, infos, role, shape, spec, graph)
        source = family.source(role, spec)
        if source.is_depthwise:
            tensor = DepthwiseTaps(tensor)
        if source.neighbours:
            tensor = PairOrder(base=tensor, pairs=source.neighbours, to="neighbours")
        if source.siblings:
            for row, name in enumerate(source.tensors):
                pieces[name] = [(0, RowTensor(tensor, row))]
        else:
            pieces.setdefault(source.tensor, []).append((source.first_row, tensor))
    return {name: _joined(found) for name, found in pieces.items()}


def _refuse_unused(
    file: GgufFile, infos: Mapping[str, TensorInfo], spec: DecoderSpec, graph: Architecture
) -> None:
    """Check that every tensor is one the decoder needs: what is left out would be missed."""
    used = {
        _place(infos, role, spec, graph).name
        for role, _ in spec.weights()
        if split_role(role)[1] not in parts.KEYS
    }
    if graph.has_sinks:
        used |= {hyperparameters.sinks_name(layer) for layer in range(len(spec.layers))}
    used |= _leftovers(infos, spec)
    unused = sorted(name for name in infos.keys() - used if not name.endswith(_COMPUTED))
    if unused:
        raise UsageError(
            f"{file.path} holds {unused[0]}, which no {graph.name} decoder of edgekit uses",
            hint="a mixture of experts, or another kind of model under the same name?",
        )


def _leftovers(infos: Mapping[str, TensorInfo], spec: DecoderSpec) -> set[str]:
    """Return what llama.cpp passes over: keys and values that nothing reads, layers that draft."""
    unread = {
        f"blk.{layer}.{part}"
        for layer, _, attention in spec.attentions()
        if not attention.has_cache
        for part in ("attn_k.weight", "attn_v.weight", "attn_k_norm.weight")
    }
    drafting = {
        name
        for name in infos
        if (found := _LAYER.match(name)) and int(found[1]) >= len(spec.layers)
    }
    return unread | drafting


def _refuse_sinks(
    file: GgufFile, infos: Mapping[str, TensorInfo], graph: Architecture, *, depth: int
) -> None:
    """Check that the scores that belong to no token draw nothing from the others."""
    for layer in range(depth if graph.has_sinks else 0):
        name = hyperparameters.sinks_name(layer)
        if name not in infos:
            raise UsageError(f"{file.path} lacks the tensor {name}")
        if layout.read_tensor(file, infos[name]).max() > hyperparameters.NO_SINK / 2:
            raise UsageError(
                f"{file.path}: {name} holds attention sinks, which no decoder of edgekit has"
            )


def _joined(found: list[tuple[int, Tensor]]) -> Tensor:
    parts = tuple(tensor for _, tensor in sorted(found, key=lambda item: item[0]))
    return parts[0] if len(parts) == 1 else ConcatenatedTensor(parts)


def _role_tensor(  # noqa: PLR0913, PLR0917 - the file, the weight, and the two descriptions between them
    file: GgufFile,
    infos: Mapping[str, TensorInfo],
    role: str,
    shape: Shape,
    spec: DecoderSpec,
    graph: Architecture,
) -> Tensor:
    place = _place(infos, role, spec, graph)
    if place.name not in infos:
        raise UsageError(f"{file.path} lacks the tensor {place.name}")
    info, expected = infos[place.name], (place.rows or shape[0], *shape[1:])
    if info.shape != expected:
        raise UsageError(
            f"{file.path}: {place.name} has shape {list(info.shape)}, expected {list(expected)}"
        )
    tensor = RoleTensor(
        file=file,
        info=info,
        shape=shape,
        first_row=place.first_row,
        restore=_restore(role, spec),
    )
    if heads := value_heads.value_heads(role, spec):
        return GroupedHeads(tensor, heads)
    pairs = spec.rotated_pairs(role) if graph.rope_pairs == "neighbours" else None
    return PairOrder(base=tensor, pairs=pairs, to="halves") if pairs else tensor


@dataclass(frozen=True)
class _Place:
    """The tensor that holds a weight; if it is a fused one, where, and all of its rows."""

    name: str
    first_row: int = 0
    rows: int | None = None


def _place(
    infos: Mapping[str, TensorInfo], role: str, spec: DecoderSpec, graph: Architecture
) -> _Place:
    layer, part = split_role(role)
    name = parts.tensor_name(role, graph)
    kind, _, bias = part.partition("_")
    fused = parts.qkv_name(layer, is_bias=bias == "bias")
    if kind in {"query", "key", "value"} and bias in {"", "bias"} and fused in infos:
        mixer = spec.attention if layer is None else spec.mixer(layer)
        a = mixer if isinstance(mixer, Attention) else spec.attention
        queries, keys = a.query_rows, a.key_value_width
        first_row = {"query": 0, "key": queries, "value": queries + keys}[kind]
        return _Place(fused, first_row, queries + 2 * keys)
    if graph.fuses_mlp and part in {"gate", "up"}:
        first_row = 0 if part == "gate" else spec.intermediate_size
        return _Place(f"blk.{layer}.ffn_up.weight", first_row, 2 * spec.intermediate_size)
    return _Place(name)


def _restore(role: str, spec: DecoderSpec) -> Callable[["Rows"], "Rows"]:
    import numpy as np

    if spec.unit_offset(role):
        return lambda rows: rows - 1
    if split_role(role)[1] == "delta_decay":
        return lambda rows: np.log(-rows)
    return lambda rows: rows
