"""Checkpoints: a model on disk, known from its headers, read one tensor at a time.

Only safetensors is read: never a pickle, never code from the model's directory.
"""

import dataclasses
import functools
import math
import re
import struct
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from edgekit.encodings.files import is_file, readable, require_file
from edgekit.encodings.hashing import sha256_of_all
from edgekit.encodings.json_files import parse, read_object
from edgekit.encodings.limits import HEADER_BYTES, TENSORS, too_large
from edgekit.errors import UsageError
from edgekit.model import card as model_card
from edgekit.model.card import ModelCard, SamplingDefaults
from edgekit.model.checkpoint_protocol import BLOCK_WEIGHTS, Calibration, Tensor, row_chunks
from edgekit.model.shapes import Shape
from edgekit.model.spec import DecoderSpec, Source
from edgekit.model.tokenizer_files import TokenizerFiles
from edgekit.quant.rounding import from_bfloat16
from edgekit.source import (
    bitsandbytes_tensors,
    decoder_tensors,
    families,
    places,
    unsupported,
    wrapped,
)
from edgekit.source.config import Config
from edgekit.source.made_tensors import PairOrder, Taps, Zeros
from edgekit.source.names import USUAL, Naming, listed


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


FLOATS = ("F32", "F16", "BF16")
# Every type of safetensors 0.8 of whole bytes. A decoder is read in FLOATS; what lies beside it,
# a mask or a vision tower's table of positions, may be anything.
_ITEM_BYTES = {
    "F32": 4, "F16": 2, "BF16": 2, "U8": 1, "BOOL": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "F8_E8M0": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
_STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_SHARD = re.compile(r"(.*-)(\d{5})-of-(\d{5})\.safetensors")
_MOST_SHARDS = 1000
_ADAPTERS = ("adapter_model", "adapters")  # as PEFT and MLX call their files


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor in a safetensors file."""

    path: Path
    offset: int  # from the start of the file
    dtype: str  # F32, F16, BF16 or F64; integers are never read as numbers
    shape: Shape

    @property
    def size_bytes(self) -> int:
        """How many bytes it takes in the file."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]

    def read(self, first_row: int = 0, rows: int | None = None) -> "npt.NDArray[np.float32]":
        """Return some rows, or all, in float32; a number without dimensions is one row.

        Raises:
            UsageError: If the file became shorter.
        """
        import numpy as np

        rows = math.prod(self.shape[:1]) - first_row if rows is None else rows
        row_items = math.prod(self.shape[1:])
        stored = np.dtype(_STORED[self.dtype])
        with readable(self.path):
            values = np.fromfile(
                self.path,
                dtype=stored,
                count=rows * row_items,
                offset=self.offset + first_row * row_items * stored.itemsize,
            )
        if values.size != rows * row_items:
            raise UsageError(f"{self.path} became shorter while edgekit read it")
        if self.dtype == "BF16":
            return from_bfloat16(values).reshape(rows, *self.shape[1:])
        return values.astype(np.float32, copy=False).reshape(rows, *self.shape[1:])

    def read_bytes(self, first: int = 0, count: int | None = None) -> "npt.NDArray[np.uint8]":
        """Return some of its bytes, or all, as they are stored: uint8, shape ``(count,)``.

        Raises:
            UsageError: If the file became shorter.
        """
        import numpy as np

        count = self.size_bytes - first if count is None else count
        with readable(self.path):
            stored = np.fromfile(self.path, dtype=np.uint8, count=count, offset=self.offset + first)
        if stored.size != count:
            raise UsageError(f"{self.path} became shorter while edgekit read it")
        return stored


@dataclass(frozen=True)
class StackedTensors:
    """Tensors of one shape, each a row of the whole."""

    parts: tuple[Tensor, ...]

    @property
    def shape(self) -> Shape:
        """The number of parts, then the dimensions of one."""
        return (len(self.parts), *self.parts[0].shape)

    @property
    def size_bytes(self) -> int:
        """How much of the checkpoint they take together."""
        return sum(part.size_bytes for part in self.parts)

    def read(self, first_row: int = 0, rows: int | None = None) -> "npt.NDArray[np.float32]":
        """Return some parts, or all, in float32."""
        import numpy as np

        last_row = None if rows is None else first_row + rows
        return np.stack([part.read() for part in self.parts[first_row:last_row]])


@dataclass(frozen=True, kw_only=True)
class AdapterRecord:
    """An adapter whose deltas are part of a checkpoint's tensors."""

    directory: Path
    name: str
    sha256: str
    notes: tuple[str, ...] = ()  # what a user should know about the merge, one sentence each
    is_of_mlx: bool = False  # else of PEFT
    renamed: Mapping[str, str] | None = None  # PEFT's own names of tensors that have others
    changes: Mapping[str, Any] | None = None  # fields of its config, as they read with those names
    earlier: "AdapterRecord | None" = None  # the one that was merged before it


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model directory in the layout of transformers."""

    directory: Path
    architecture: str  # the model_type of its config
    spec: DecoderSpec
    tensors: Mapping[str, Tensor]
    text: TokenizerFiles
    licence: str | None = None
    adapter: AdapterRecord | None = None
    calibration: Calibration | None = None  # None: an error counts the same in every column
    quantization: str | None = None  # of the files, where reading de-quantizes: nf4, fp4
    # The decoder's part of config.json.
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    stored_names: Naming = USUAL  # how the names in the files differ from those of `tensors`
    wrapper: str | None = None  # the model_type of the model around the decoder
    notes: tuple[str, ...] = ()  # what was decided where the files disagree, one sentence each
    has_weights: bool = True  # False: only its shape is known, and every weight reads as zeros

    @classmethod
    def open(cls, directory: Path, *, has_weights: bool = True) -> Self:
        """Read the config, the tokenizer's files and the tensor headers; no weight is loaded.

        Args:
            directory: Of the model.
            has_weights: Whether they are there; else what the config asks for is taken for there,
                so that the model can be planned, and reading one gives zeros.

        Raises:
            UsageError: If this is not a checkpoint, is damaged, or is one edgekit does not know.
        """
        said = describe(_read_config(directory), origin=str(directory / "config.json"))
        text, architecture, spec = said.text, said.architecture, said.spec
        family = families.get(architecture)
        if has_weights:
            stored, quantization = _read_headers(directory, is_four_bit=said.is_four_bit)
        else:
            stored, quantization = dict(_asked_for(architecture, spec)), None
        decoder = decoder_tensors.find(
            stored, spec, architecture=architecture, directory=directory, wrapper=text.wrapper
        )
        checkpoint = cls(
            directory=directory,
            architecture=architecture,
            spec=decoder.spec,
            tensors=decoder.tensors,
            text=TokenizerFiles.open(directory, config=text.fields),
            config=text.fields | _architectures(text, family, spec),
            licence=model_card.read(directory).licence,
            quantization=quantization,
            stored_names=decoder.naming,
            wrapper=text.wrapper,
            has_weights=has_weights,
            notes=(*_family_notes(architecture, spec, text.wrapper), *said.unknown, *decoder.notes),
        )
        checkpoint.refuse_mismatch()
        return checkpoint

    @property
    def name(self) -> str:
        """The last part of the path: ``SmolLM2-135M-Instruct``.

        In the cache of the Hugging Face hub that is a hash, and the name stands further up.
        """
        path = self.directory.resolve()
        owner = path.parent.parent.name
        is_cached = path.parent.name == "snapshots" and owner.startswith("models--")
        return owner.rpartition("--")[2] if is_cached else path.name

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a user should know about how the files were read, one sentence each."""
        return (*self.notes, *self.text.notes, *(self.adapter.notes if self.adapter else ()))

    @property
    def parameters(self) -> int:
        """How many numbers the decoder has, tied ones once."""
        return sum(math.prod(shape) for _, shape in self.spec.weights())

    @cached_property
    def card(self) -> ModelCard:
        """What the model card says, and with an adapter what that adds to it."""
        own = model_card.read(self.directory)
        if self.adapter is None:
            return own
        return model_card.with_adapter(own, self.adapter.directory, base_name=self.name)

    @cached_property
    def sampling(self) -> SamplingDefaults:
        """How the makers of the model sample from it, or those of an adapter that says so."""
        path = self.text.beside("generation_config.json", otherwise=self.directory)
        return model_card.read_sampling(path.parent)

    @property
    def sha256(self) -> str:
        """A hash over the config and every weight file, in order of name."""
        paths = (self.directory / "config.json", *weight_files(self.directory))
        return _sha256_of(tuple((path, path.stat().st_mtime_ns) for path in paths))

    def weight(
        self, role: str, first_row: int = 0, rows: int | None = None
    ) -> "npt.NDArray[np.float32]":
        """Return one weight of ``spec.weights()``, or some rows of it, in float32.

        What the files keep is put in the order of `DecoderSpec` and multiplied with what the spec
        has for it: no other part of edgekit knows of either.

        Raises:
            UsageError: If it holds NaN or infinity; the message names the tensor.
        """
        import numpy as np

        source = families.get(self.architecture).source(role, self.spec)
        if rows is None and source.rows is not None:
            rows = source.rows - first_row
        values = self._tensor(source).read(source.first_row + first_row, rows)
        if not np.isfinite(values).all():
            raise UsageError(
                f"{source.tensor} in {self.directory} holds NaN or infinity",
                hint="the training diverged, or the file was damaged; take an earlier checkpoint",
            )
        multiplier = np.float32(self.spec.multiplier(role))
        if multiplier == 1:
            return values
        if self.spec.unit_offset(role):  # what the norm multiplies with is one more
            return (values + 1) * multiplier - 1
        return values * multiplier

    def blocks(
        self, role: str, *, row_multiple: int = 1
    ) -> Iterator[tuple[int, "npt.NDArray[np.float32]"]]:
        """Yield a weight some million numbers at a time, as a decoder multiplies with it.

        Args:
            role: One of ``spec.weights()``.
            row_multiple: What the number of rows of each block is a multiple of.

        Yields:
            The number of the first row, and float32 of shape ``(rows, columns)`` or ``(rows,)``;
            Gemma's norms with their one.

        Raises:
            UsageError: As `weight`.
        """
        chunks = row_chunks(self._shapes[role], weights=BLOCK_WEIGHTS, row_multiple=row_multiple)
        for first, count in chunks:
            rows = self.weight(role, first, count)
            yield first, rows + 1 if self.spec.unit_offset(role) else rows

    @cached_property
    def _shapes(self) -> dict[str, Shape]:
        return dict(self.spec.weights())

    def _tensor(self, source: Source) -> Tensor:
        tensor = self.tensors[source.tensor]
        if source.siblings:
            tensor = StackedTensors(tuple(self.tensors[name] for name in source.tensors))
        if source.is_depthwise:
            return Taps(base=tensor)
        if source.neighbours is None:
            return tensor
        return PairOrder(base=tensor, pairs=source.neighbours, to="halves")

    def refuse_mismatch(self) -> None:
        """Check that every weight is there in its shape and every tensor is used.

        Raises:
            UsageError: If a tensor is missing, of another shape, or one that nothing would read.
        """
        family = families.get(self.architecture)
        used_rows: Counter[str] = Counter()
        for role, shape in self.spec.weights():
            source = family.source(role, self.spec)
            for name in source.tensors:
                if name not in self.tensors:
                    raise UsageError(
                        f"{self.directory} lacks the tensor {name}",
                        hint=f"it holds {listed(self.tensors)}",
                    )
            self._refuse_shape(source, shape)
            for name in source.tensors:
                used_rows[name] += shape[1] if source.siblings else shape[0]
        self._refuse_unused(used_rows)

    def _refuse_shape(self, source: Source, shape: Shape) -> None:
        """Check that a weight of this shape is where it should be."""
        expected = shape[1:] if source.siblings else shape
        for name in source.tensors:
            tensor = self.tensors[name]
            if isinstance(tensor, StoredTensor) and tensor.dtype not in FLOATS:
                raise _other_dtype(tensor.path, name, tensor.dtype, FLOATS)
            found = whole = tensor.shape
            if 0 in whole:
                raise UsageError(
                    f"{name} in {self.directory} has shape {list(whole)}: DeepSpeed ZeRO-3 saves "
                    "such empty tensors where each process holds a part of the weights",
                    hint="consolidate them first: python zero_to_fp32.py CHECKPOINT OUTPUT "
                    "--safe_serialization, from the training run's directory",
                )
            if source.is_depthwise and len(whole) == 3 and whole[1] == 1:
                found = (whole[0], whole[2])
            if source.is_depthwise and whole == (expected[0], expected[1], 1) != (1, 1, 1):
                raise UsageError(
                    f"{name} in {self.directory} has shape {list(whole)}, as MLX stores it, the "
                    f"config asks for {[expected[0], 1, expected[1]]}",
                    hint="MLX also adds one to the norms of some models; take the checkpoint that "
                    "transformers wrote",
                )
            if source.rows is not None and whole and source.first_row + source.rows <= whole[0]:
                found = (source.rows, *whole[1:])
            if found != expected:
                raise UsageError(
                    f"{name} in {self.directory} has shape {list(whole)}, "
                    f"the config asks for {list(expected)}"
                )

    def _refuse_unused(self, used_rows: Mapping[str, int]) -> None:
        for name, tensor in self.tensors.items():
            if name not in used_rows:
                raise UsageError(
                    f"{self.directory} has a tensor that {self.architecture} does not use: {name}",
                    hint="a merged adapter, a vision tower or another architecture?",
                )
            if used_rows[name] != tensor.shape[0]:
                raise UsageError(
                    f"{name} in {self.directory} has {tensor.shape[0]} rows, "
                    f"the config uses {used_rows[name]}"
                )


@dataclass(frozen=True, kw_only=True)
class Described:
    """What a config.json says."""

    text: wrapped.TextModel
    architecture: str  # the model_type of the decoder
    spec: DecoderSpec
    is_four_bit: bool  # as bitsandbytes stores it
    unknown: tuple[str, ...]  # fields that nobody knows and that change nothing, one sentence each


def describe(fields: dict[str, Any], *, origin: str) -> Described:
    """Return what the fields of a config.json say.

    Raises:
        UsageError: If it is of a model that edgekit does not know.
    """
    text = wrapped.text_model(fields, origin=origin)
    origin = f"{origin}: {text.section}" if text.section else origin
    architecture = _architecture(text.fields, origin=origin)
    config = Config(text.fields, origin=origin)
    is_four_bit = bitsandbytes_tensors.is_four_bit(text.fields, origin=config.origin)
    config.ignore(bitsandbytes_tensors.FIELD)  # each tensor says it again, and more
    spec = families.get(architecture).describe(config)
    unknown = config.unread_strings()
    config.refuse_unread()
    return Described(
        text=text,
        architecture=architecture,
        spec=spec,
        is_four_bit=is_four_bit,
        unknown=unknown,
    )


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not is_file(path):
        raise UsageError(
            f"{directory} is not a checkpoint: it has no config.json",
            hint=places.hint_for_model(directory)
            or "pass a Hugging Face model directory, a GGUF file, or `demo`",
        )
    return read_object(path)


def _architectures(
    text: wrapped.TextModel, family: families.Family, spec: DecoderSpec
) -> dict[str, Any]:
    """Return the class of transformers that a wrapped decoder alone is."""
    return {"architectures": family.config(spec)["architectures"]} if text.wrapper else {}


def _family_notes(architecture: str, spec: DecoderSpec, wrapper: str | None) -> Iterator[str]:
    if maker := families.origin(architecture):
        yield (
            f"what models of type {architecture!r} compute is described by {maker}, which is not "
            "part of edgekit"
        )
    if wrapper and spec.multipliers.logits != 1:
        yield (
            f"logits are multiplied by {spec.multipliers.logits:g}, as the text model alone does; "
            f"transformers 5.24 forgets that in some models that see, so that {wrapper} may sample "
            "otherwise there"
        )


def _architecture(fields: Mapping[str, Any], *, origin: str) -> str:
    architecture = fields.get("model_type")
    if not isinstance(architecture, str):
        raise UsageError(
            f"{origin}: model_type = {architecture!r}, expected a name",
            hint=f"supported: {', '.join(families.names())}",
        )
    if architecture not in families.names():
        raise unsupported.refusal(architecture, fields, origin=origin)
    return architecture


@functools.lru_cache(maxsize=4)  # an export asks twice, of copies that differ in their notes
def _sha256_of(files: tuple[tuple[Path, int], ...]) -> str:
    """Return one hash over files, each with the time it was changed."""
    return sha256_of_all(path for path, _ in files)


def weight_files(directory: Path) -> list[Path]:
    """Return the files that hold a checkpoint's weights, as transformers chooses them.

    Raises:
        UsageError: If the index names no files, or a shard is missing.
    """
    single = directory / "model.safetensors"
    if is_file(single):
        return [single]  # before an index, as transformers does
    index = directory / "model.safetensors.index.json"
    if is_file(index):
        return [directory / shard for shard in _shards(index)]
    return _unindexed(directory)


def _unindexed(directory: Path) -> list[Path]:
    """Return the weight files of a directory that has no index: its shards, or else all there are.

    Raises:
        UsageError: If a shard is missing.
    """
    files = sorted(directory.glob("*.safetensors"))
    files = [path for path in files if not path.stem.endswith(_ADAPTERS)]
    shards = {path: match for path in files if (match := _SHARD.fullmatch(path.name))}
    sets = {(match[1], match[3]): path for path, match in reversed(shards.items())}
    for (beginning, count), first in sets.items():
        for number in range(1, min(int(count), _MOST_SHARDS) + 1):
            name = f"{beginning}{number:05}-of-{count}.safetensors"
            if not is_file(directory / name):
                raise UsageError(
                    f"{directory} holds {first.name} and not {name}",
                    hint="copy every shard of the model",
                )
    return list(shards) or files


def _shards(index: Path) -> list[str]:
    shards = read_object(index).get("weight_map")
    if not isinstance(shards, dict):
        raise UsageError(f"{index} has no weight_map")
    for shard in shards.values():
        is_name = isinstance(shard, str) and Path(shard).name == shard
        if not is_name or not shard.endswith(".safetensors"):
            raise UsageError(f"{index} names {shard!r}, which is not a file next to it")
    return sorted(set(shards.values()))


def _read_headers(directory: Path, *, is_four_bit: bool) -> tuple[Mapping[str, Tensor], str | None]:
    """Return the tensors and, if they are de-quantized when read, what they are stored as."""
    tensors: dict[str, StoredTensor] = {}
    files = weight_files(directory)
    if not files:
        pickles = [*directory.glob("*.bin"), *directory.glob("*.pt"), *directory.glob("*.pth")]
        raise UsageError(
            f"{directory} has no *.safetensors",
            hint="edgekit never opens pickles: save with `safe_serialization=True`"
            if pickles
            else places.hint_for_model(directory) or "is this a Hugging Face model directory?",
        )
    for path in files:
        for name, tensor in read_safetensors(path, dtypes=None):
            if name in tensors:
                raise UsageError(f"{directory} holds the tensor {name} twice")
            tensors[name] = tensor
        if len(tensors) > TENSORS:
            raise UsageError(f"{directory} holds more than {TENSORS} tensors")
    if is_four_bit:
        return bitsandbytes_tensors.dequantized(tensors, origin=directory)
    return tensors, None


def _asked_for(architecture: str, spec: DecoderSpec) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that a config asks for, by their stored names, as if they were there."""
    family = families.get(architecture)
    shapes: dict[str, Shape] = {}
    for role, shape in spec.weights():
        source = family.source(role, spec)
        for name in source.tensors:
            own = shape[1:] if source.siblings else shape
            rows = max(source.first_row + own[0], shapes.get(name, own)[0])
            shapes[name] = (rows, 1, *own[1:]) if source.is_depthwise else (rows, *own[1:])
    for name, shape in shapes.items():
        yield families.stored_name(architecture, name), Zeros(shape=shape, dtype="BF16")


def read_safetensors(
    path: Path, *, dtypes: Collection[str] | None = FLOATS
) -> Iterator[tuple[str, StoredTensor]]:
    """Yield the tensors of one file from its header: a few kilobytes, whatever its size.

    Args:
        path: The file.
        dtypes: The types that are expected; None: any.

    Raises:
        UsageError: If the file is missing, truncated, or its header contradicts itself; the
            message names the file and the field or offset.

    Source: https://github.com/huggingface/safetensors#format (8-byte little-endian length, then
    that many bytes of JSON, then the data, without holes or overlaps).
    """
    header, data_start, file_bytes = _read_header(path)
    dtypes = _ITEM_BYTES if dtypes is None else dtypes
    end = 0
    for name, field in _by_offset(path, header):
        tensor = _stored_tensor(path, name, field, data_start=data_start, dtypes=dtypes)
        first, last = field["data_offsets"]
        if first != end or last - first != tensor.size_bytes:
            raise UsageError(
                f"{path}: {name} claims bytes {first} to {last}, expected {end} to "
                f"{end + tensor.size_bytes}",
                hint="the file is damaged; download it again",
            )
        end = last
        yield name, tensor
    if data_start + end != file_bytes:
        raise UsageError(
            f"{path} has {file_bytes} bytes, its header describes {data_start + end}",
            hint="the file is truncated or damaged; download it again",
        )


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    require_file(path, hint="copy every shard of the model")
    try:
        file_bytes = path.stat().st_size
        with readable(path), path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if HEADER_BYTES < length <= file_bytes - 8:
                raise too_large(f"the header of {path}", length, HEADER_BYTES)
            if length > file_bytes - 8:
                raise UsageError(
                    f"{path}: the header claims {length} bytes, the file has {file_bytes}",
                    hint="the file is truncated or damaged; download it again",
                )
            header = parse(file.read(length))
    except (struct.error, ValueError) as error:
        raise UsageError(f"{path} is not a safetensors file: {error}") from error
    if not isinstance(header, dict):
        raise UsageError(f"{path}: the header is not a JSON object")
    header.pop("__metadata__", None)
    return header, 8 + length, file_bytes


def _by_offset(path: Path, header: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return the header's entries in the order of their data."""
    for name, field in header.items():
        offsets = field.get("data_offsets") if isinstance(field, dict) else None
        if not isinstance(offsets, list) or [type(offset) for offset in offsets] != [int, int]:
            raise UsageError(
                f"{path}: {name} has data_offsets {offsets!r}, expected two integers",
                hint="the file is damaged; download it again",
            )
    return sorted(header.items(), key=lambda item: tuple(item[1]["data_offsets"]))


def _stored_tensor(
    path: Path, name: str, field: Any, *, data_start: int, dtypes: Collection[str]
) -> StoredTensor:
    shape, dtype = field.get("shape"), field.get("dtype")
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise _other_dtype(path, name, dtype, dtypes)
    if not isinstance(shape, list) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise UsageError(f"{path}: {name} has shape {shape!r}")
    return StoredTensor(
        path=path,
        offset=data_start + field["data_offsets"][0],
        dtype=dtype,
        shape=tuple(shape),
    )


def _other_dtype(path: Path, name: str, dtype: Any, known: Collection[str]) -> UsageError:
    return UsageError(
        f"{path}: {name} has dtype {dtype!r}, expected one of {', '.join(known)}",
        hint="quantized models are read where bitsandbytes made them and their config.json "
        "says so; pass the 16-bit model",
    )
