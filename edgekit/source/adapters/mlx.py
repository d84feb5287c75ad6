"""Adapters of mlx-lm, brought into the form of PEFT's.

mlx-lm multiplies from the left, so its factors are PEFT's transposed: ``lora_a`` is (columns, rank)
and ``lora_b`` (rank, rows). It trains the last ``num_layers`` layers, and multiplies the product
with ``scale`` as it is.

Source: tuner/lora.py, tuner/dora.py and tuner/utils.py of mlx-lm 0.28.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.encodings.files import is_file
from edgekit.encodings.json_files import read_object, read_object_if_there
from edgekit.errors import UsageError
from edgekit.model.checkpoint_protocol import Tensor
from edgekit.source.adapters.adapter_config import AdapterSettings
from edgekit.source.config import Config
from edgekit.source.made_tensors import Transposed


WEIGHTS = "adapters.safetensors"
_CONFIG = "adapter_config.json"
_OWN_FIELDS = ("fine_tune_type", "lora_parameters", "lora_layers", "num_layers")
_KINDS = {"lora_a": "lora_A", "lora_b": "lora_B", "m": "lora_magnitude_vector"}
_TYPES = ("lora", "dora", "full")


@dataclass(frozen=True, kw_only=True)
class MlxAdapter:
    """What a directory of mlx-lm says, without its tensors."""

    origin: str
    base_model: str
    kind: str  # lora, dora; full: whole weights of some layers
    rank: int
    scale: float
    layers: int | None  # how many of the last ones were trained; None: all of them
    keys: tuple[str, ...]  # of a layer, or of the whole model; none: unknown


def is_one(directory: Path) -> bool:
    """Tell whether a directory holds an adapter of mlx-lm."""
    fields = read_object_if_there(directory / _CONFIG)
    return "peft_type" not in fields and any(name in fields for name in _OWN_FIELDS)


def read(directory: Path) -> MlxAdapter:
    """Read the config of an adapter of mlx-lm; what it says about the training is passed over.

    Raises:
        UsageError: If there are no weights next to it, or a field that changes them is missing or
            of another kind.
    """
    path = directory / _CONFIG
    if not is_file(directory / WEIGHTS):
        raise UsageError(
            f"{path} is of mlx-lm, and {directory} has no {WEIGHTS}",
            hint="pass the directory given to mlx_lm.lora as --adapter-path",
        )
    config = Config(read_object(path), origin=str(path))
    usual = "dora" if config.get("use_dora", default=False) else "lora"
    kind = config.get("fine_tune_type", usual)
    if kind not in _TYPES:
        raise UsageError(f"{path}: fine_tune_type = {kind!r}, expected {' or '.join(_TYPES)}")
    count = config.get("num_layers", config.get("lora_layers", -1))
    common: dict[str, Any] = {
        "origin": str(path),
        "base_model": config.get("model", ""),
        "kind": kind,
        "layers": count if count > 0 else None,
    }
    if kind == "full":
        return MlxAdapter(rank=1, scale=1.0, keys=(), **common)
    how = config.section("lora_parameters")
    if "alpha" in how:
        raise UsageError(
            f"{path}: lora_parameters has an alpha, which mlx-lm no longer multiplies with",
            hint="write what it was trained with as scale (scale * alpha / rank then), without it",
        )
    how.ignore("dropout")
    keys = how.get("keys", list[Any]())
    if not all(isinstance(key, str) for key in keys):
        raise UsageError(f"{path}: keys = {keys!r}, expected names of modules")
    adapter = MlxAdapter(
        rank=how.integer("rank"), scale=how.number("scale"), keys=tuple(keys), **common
    )
    how.refuse_unread()
    return adapter


def split(key: str, path: Path) -> tuple[str, str]:
    """Split a name of the file into the module and what of it this is, as PEFT calls it.

    Raises:
        UsageError: If it is no part of an adapter.
    """
    module, _, last = key.rpartition(".")
    kind = _KINDS.get(last, last)
    if not module or kind not in (*_KINDS.values(), "weight", "bias"):
        raise UsageError(
            f"{path} holds {key}, which is not part of an adapter of mlx-lm",
            hint="fuse it there: mlx_lm.fuse --model BASE --adapter-path DIR",
        )
    return module, kind


def in_peft_form(kind: str, tensor: Tensor, *, is_embedding: bool) -> tuple[str, Tensor]:
    """Return the name and the tensor that PEFT would have stored instead."""
    if kind not in ("lora_A", "lora_B"):
        return kind, tensor
    name = kind.replace("lora_", "lora_embedding_") if is_embedding else kind
    return name, Transposed(tensor)


def settings(adapter: MlxAdapter, parts: Mapping[str, Mapping[str, Tensor]]) -> AdapterSettings:
    """Return the settings of PEFT that say the same."""
    updated = [name for name, kinds in parts.items() if any(it.startswith("lora_") for it in kinds)]
    return AdapterSettings(
        origin=adapter.origin,
        base_model=adapter.base_model,
        rank=adapter.rank,
        alpha=adapter.scale * adapter.rank,
        rank_pattern={},
        alpha_pattern={},
        target_modules=tuple(updated),
        exclude_modules=(),
        layers=(),
        layers_pattern=(),
        modules_to_save=(),
        token_ids={},
        is_rank_stabilized=False,
        has_magnitudes=adapter.kind == "dora",
        has_lora_bias=False,
        keeps_tie=True,
        is_of_mlx=True,
    )


def refuse_other_layers(adapter: MlxAdapter, modules: list[str], *, depth: int, path: Path) -> None:
    """Check that the file holds the last layers of a base of this depth, and every key of them.

    Raises:
        UsageError: If the base has another depth, or a module is missing.
    """
    by_layer: dict[int, set[str]] = {}
    for module in modules:
        if match := re.search(r"\.layers\.(\d+)\.(.+)", module):
            by_layer.setdefault(int(match[1]), set()).add(match[2])
    if not by_layer:
        return
    if max(by_layer) + 1 != depth:
        raise UsageError(
            f"{path} is for {max(by_layer) + 1} layers, the base has {depth}",
            hint=f"the adapter was made for {adapter.base_model!r}",
        )
    first = depth - min(adapter.layers or depth, depth)
    names = set().union(*by_layer.values())
    wanted = [key for key in adapter.keys if key in names] or sorted(names)
    for layer in range(first, depth):
        if missing := sorted(set(wanted) - by_layer.get(layer, set())):
            raise UsageError(
                f"{path} lacks {missing[0]} of layer {layer}, which {adapter.origin} trains",
                hint="the adapter was saved incompletely",
            )
