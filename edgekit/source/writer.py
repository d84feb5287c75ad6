"""Write an ordinary checkpoint: what transformers loads, one tensor in memory at a time.

Whatever satisfies `Checkpoint` can be written: a base with adapters merged in, or a GGUF file.
"""

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from edgekit.bundle.workdir import new_directory, refuse_existing
from edgekit.encodings.files import is_file
from edgekit.encodings.json_files import read_object, read_object_if_there
from edgekit.errors import EdgekitError, UsageError
from edgekit.model import chat_templates
from edgekit.model.card import generation_settings
from edgekit.model.checkpoint_protocol import Tensor, row_chunks
from edgekit.model.tokenizer_files import added_tokens, common_settings
from edgekit.progress import Advance
from edgekit.quant.rounding import bfloat16
from edgekit.source import families
from edgekit.source.checkpoint import Checkpoint
from edgekit.source.config import Config
from edgekit.source.made_tensors import Number, stored_dtype


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


StoredPrecision = Literal["bf16", "f16", "f32"]
SHARD_BYTES = 4_000_000_000  # a file on a memory card with FAT32 holds 4 GiB less one byte
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A tensor on its way into a file."""

    name: str
    tensor: Tensor
    dtype: str  # F32, F16 or BF16

    @property
    def size_bytes(self) -> int:
        return math.prod(self.tensor.shape) * _ITEM_BYTES[self.dtype]


def write_checkpoint(
    checkpoint: Checkpoint,
    out: Path,
    *,
    precision: StoredPrecision | None = None,
    shard_bytes: int = SHARD_BYTES,
    advance: Advance = lambda _: None,
) -> Path:
    """Write a directory that `Checkpoint.open` and transformers read; it is whole or not there.

    Args:
        checkpoint: Its tensors are read in float32 and rounded once.
        out: Must not exist.
        precision: None keeps the type that each tensor is stored in.
        shard_bytes: How much goes into one file; a larger tensor still gets one of its own.
        advance: Called with the number of written bytes just done, `written_bytes` in all.

    Raises:
        UsageError: If ``out`` exists, a tensor holds NaN or infinity, or a value is too large for
            ``precision``; the message names the tensor.
        EdgekitError: If the disk is too small; nothing is left behind.
    """
    refuse_existing(out)
    entries = _entries(checkpoint, precision)
    _refuse_full_disk(out, sum(entry.size_bytes for entry in entries))
    with new_directory(out) as work:
        _write_weights(entries, work, shard_bytes=shard_bytes, advance=advance)
        _write_json(work / "config.json", _config_of(checkpoint, _main_dtype(entries)))
        _write_text(checkpoint, work)
        _write_card(checkpoint, work, name=out.name)
        _refuse_difference(checkpoint, work)
    return out


def written_bytes(checkpoint: Checkpoint, precision: StoredPrecision | None = None) -> int:
    """Return how many bytes of weights `write_checkpoint` would write."""
    return sum(entry.size_bytes for entry in _entries(checkpoint, precision))


def _entries(checkpoint: Checkpoint, precision: StoredPrecision | None) -> list[_Entry]:
    """Return every tensor the decoder reads, once, in the order of use."""
    family, spec = families.get(checkpoint.architecture), checkpoint.spec
    names = dict.fromkeys(
        name for role, _ in spec.weights() for name in family.source(role, spec).tensors
    )
    entries = [
        _Entry(
            name=families.stored_name(checkpoint.architecture, name),
            tensor=checkpoint.tensors[name],
            dtype=precision.upper() if precision else stored_dtype(checkpoint.tensors[name]),
        )
        for name in names
    ]
    dtype = _main_dtype(entries)
    constants = families.constants(checkpoint.architecture, spec).items()
    return entries + [_Entry(name=name, tensor=Number(it), dtype=dtype) for name, it in constants]


def _main_dtype(entries: Sequence[_Entry]) -> str:
    sizes: Counter[str] = Counter()
    for entry in entries:
        sizes[entry.dtype] += entry.size_bytes
    return sizes.most_common(1)[0][0]


def _refuse_full_disk(out: Path, needed_bytes: int) -> None:
    place = next(path for path in out.absolute().parents if path.exists())
    free_bytes = shutil.disk_usage(place).free
    if free_bytes < needed_bytes:
        raise EdgekitError(
            f"{place} has {free_bytes} bytes free, the weights take {needed_bytes}",
            hint="free some space, or choose another place with -o",
        )


def _write_weights(
    entries: Sequence[_Entry], directory: Path, *, shard_bytes: int, advance: Advance
) -> None:
    shards = list(_shards(entries, shard_bytes))
    if len(shards) == 1:
        return _write_shard(directory / "model.safetensors", shards[0], advance)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(directory / name, shard, advance)
        weight_map |= {entry.name: name for entry in shard}
    total = sum(entry.size_bytes for entry in entries)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return _write_json(directory / "model.safetensors.index.json", index)


def _shards(entries: Sequence[_Entry], shard_bytes: int) -> Iterator[list[_Entry]]:
    shard: list[_Entry] = []
    filled = 0
    for entry in entries:
        if shard and filled + entry.size_bytes > shard_bytes:
            yield shard
            shard, filled = [], 0
        shard.append(entry)
        filled += entry.size_bytes
    yield shard


def _write_shard(path: Path, entries: Sequence[_Entry], advance: Advance) -> None:
    with path.open("wb") as file:
        file.write(_header(entries))
        for entry in entries:
            _write_tensor(file, entry, advance)


def _header(entries: Sequence[_Entry]) -> bytes:
    """Return the first bytes of a safetensors file.

    Source: https://github.com/huggingface/safetensors#format. Loaders of transformers ask for the
    ``format``; spaces keep the data aligned to 8 bytes.
    """
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        offsets = [end, end + entry.size_bytes]
        fields[entry.name] = {
            "dtype": entry.dtype, "shape": list(entry.tensor.shape), "data_offsets": offsets,
        }  # fmt: skip
        end = offsets[1]
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(file: BinaryIO, entry: _Entry, advance: Advance) -> None:
    import numpy as np

    for first_row, rows in row_chunks(entry.tensor.shape):
        values = entry.tensor.read(first_row, rows)
        if not np.isfinite(values).all():
            raise UsageError(
                f"{entry.name} holds NaN or infinity",
                hint="the training diverged, or a file was damaged; take an earlier checkpoint",
            )
        stored = _rounded(values, entry)
        file.write(stored.data)
        advance(stored.nbytes)


def _rounded(values: "npt.NDArray[np.float32]", entry: _Entry) -> "npt.NDArray[Any]":
    import numpy as np

    values = np.ascontiguousarray(values, dtype="<f4")
    if entry.dtype == "F32":
        return values
    if entry.dtype == "BF16":
        stored = bfloat16(values)
        is_finite = bool(((stored & 0x7F80) != 0x7F80).all())
    else:
        with np.errstate(over="ignore"):
            stored = values.astype("<f2")
        is_finite = bool(np.isfinite(stored).all())
    if not is_finite:
        largest = float(np.abs(values).max())
        raise UsageError(
            f"{entry.name} holds {largest:g}, too large for {_TORCH_NAMES[entry.dtype]}",
            hint="write it in bf16 or f32",
        )
    return stored


def _config_of(checkpoint: Checkpoint, dtype: str) -> dict[str, Any]:
    """Return a config that reads as the checkpoint's spec: its own where that can say it."""
    family, spec = families.get(checkpoint.architecture), checkpoint.spec
    if checkpoint.config:
        own = dict(checkpoint.config)
        own.pop("quantization_config", None)  # what is written is what reading de-quantized
        changed = {"vocab_size": spec.vocab_size, "tie_word_embeddings": spec.is_tied}
        candidates = [own | changed, own | family.config(spec)]
    else:
        candidates = [family.config(spec) | _token_ids(checkpoint)]
    for fields in candidates:
        if _describes(fields, checkpoint):
            fields.pop("torch_dtype", None)  # the older name of the same
            return fields | {"dtype": _TORCH_NAMES[dtype]}
    raise UsageError(
        f"no {checkpoint.architecture} config can say what {checkpoint.name} is",
        hint="report the model",
    )


def _describes(fields: dict[str, Any], checkpoint: Checkpoint) -> bool:
    config = Config(fields, origin="the config to be written")
    try:
        return families.get(checkpoint.architecture).describe(config) == checkpoint.spec
    except UsageError:
        return False


def _token_ids(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the ids a config must name, as transformers would assume others otherwise."""
    text = checkpoint.text
    bos = added_tokens(text.tokenizer_json).get(text.special_tokens.get("bos_token", ""))
    return {"bos_token_id": bos, "eos_token_id": text.eos_token_id}


def _write_text(checkpoint: Checkpoint, directory: Path) -> None:
    source = checkpoint.text.tokenizer_json.parent
    for name in _TOKENIZER_FILES:
        if is_file(source / name):
            shutil.copyfile(source / name, directory / name)
    settings = directory / "tokenizer_config.json"
    if is_file(settings) and (common := common_settings(read := read_object(settings))) != read:
        _write_json(settings, common)
    if checkpoint.text.template_source is not None:
        _write_template(checkpoint.text.template_source, directory)
        # A file of the default one hides whatever else tokenizer_config.json has.
        chat_templates.write_others(checkpoint.text.templates, directory)
    _write_json(directory / "generation_config.json", _generation_config(checkpoint))


def _generation_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the generation settings with every id that ends an answer, the template's too."""
    path = checkpoint.text.beside("generation_config.json", otherwise=checkpoint.directory)
    fields = generation_settings(read_object_if_there(path))
    ends = checkpoint.text.eos_token_id
    return fields if ends is None else fields | {"eos_token_id": ends}


def _write_template(template: str, directory: Path) -> None:
    """Write a chat template where it reads back as it is; a file of its own wins over the config.

    Whoever reads ``chat_template.jinja`` as text gets a newline for every line end.
    """
    if "\r" not in template:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")
        return
    path = directory / "tokenizer_config.json"
    settings = read_object(path) if is_file(path) else {}
    _write_json(path, settings | {"chat_template": template})


def _write_card(checkpoint: Checkpoint, directory: Path, *, name: str) -> None:
    """Write who made this from what, and carry the licence over."""
    for pattern in ("LICEN[CS]E*", "NOTICE*"):
        for path in checkpoint.directory.glob(pattern):
            if is_file(path):
                shutil.copyfile(path, directory / path.name)
    licence = f"license: {checkpoint.licence}\n" if checkpoint.licence else ""
    text = f"---\n{licence}base_model: {json.dumps(checkpoint.name)}\n---\n\n# {name}\n\n"
    text += f"Written by edgekit from {checkpoint.name}"
    if checkpoint.adapter:
        text += f" with the adapter {checkpoint.adapter.name} merged in"
        text += "".join(f".\n\n- {note}" for note in checkpoint.adapter.notes)
    (directory / "README.md").write_text(f"{text}.\n", encoding="utf-8")


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    text = json.dumps(fields, indent=2, ensure_ascii=False)
    path.write_text(f"{text}\n", encoding="utf-8")


def _refuse_difference(checkpoint: Checkpoint, directory: Path) -> None:
    """Open what was written, from headers, and compare."""
    written = Checkpoint.open(directory)
    if (
        written.spec != checkpoint.spec
        or written.text.chat_template != checkpoint.text.template_source
    ):
        raise EdgekitError(
            f"what was written does not read as {checkpoint.name}", hint="report the model"
        )
