"""The decoder next to an artifact, from which a library is compiled.

MLC's own ``mlc-chat-config.json`` names a model, and leaves out what that model has anyway.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekit.encodings.json_files import read_object
from edgekit.encodings.typed_json import FieldReader, check_version
from edgekit.errors import BundleError
from edgekit.model import rope as ropes
from edgekit.model.rope import Rope, RopeScaling
from edgekit.model.spec import DecoderSpec, Layer


NAME = "decoder.json"
SCHEMA = 1
_HINT = "export it again"
_SCALINGS: dict[str, type[RopeScaling]] = {
    scaling.__name__.removesuffix("Scaling").lower(): scaling
    for scaling in (
        ropes.LinearScaling, ropes.Llama3Scaling, ropes.LongRopeScaling, ropes.YarnScaling
    )
}  # fmt: skip


def fields(spec: DecoderSpec) -> dict[str, Any]:
    """Return a decoder as JSON holds it; layers that are alike are written once."""
    kinds = list(dict.fromkeys(spec.layers))
    return {
        **dataclasses.asdict(dataclasses.replace(spec, layers=())),
        "layers": {
            "kinds": [_layer(kind) for kind in kinds],
            "kind_of_each": [kinds.index(layer) for layer in spec.layers],
        },
    }


def _layer(layer: Layer) -> dict[str, Any]:
    rope, found = layer.rope, dataclasses.asdict(layer)
    if rope and rope.scaling:
        found["rope"]["scaling"]["kind"] = next(
            name for name, scaling in _SCALINGS.items() if isinstance(rope.scaling, scaling)
        )
    return found


def write(directory: Path, spec: DecoderSpec) -> None:
    """Write a decoder next to its weights."""
    text = json.dumps({"schema": SCHEMA, **fields(spec)}, indent=2) + "\n"
    (directory / NAME).write_text(text, encoding="utf-8")


def read(path: Path) -> DecoderSpec:
    """Return the decoder in a file.

    Raises:
        BundleError: If it is missing, damaged, or of another version.
    """
    found = read_object(path, refusal=BundleError, hint=_HINT)
    check_version(found.pop("schema", None), SCHEMA, origin=path, refusal=BundleError)
    reader = FieldReader(origin=path, refusal=BundleError, hint=_HINT)
    layers = reader.read(_Layers, found.pop("layers", None))
    kinds = [_read_layer(reader, kind) for kind in layers.kinds]
    if not all(0 <= index < len(kinds) for index in layers.kind_of_each):
        raise BundleError(f"{path}: layers names a kind that is not there", hint=_HINT)
    return reader.read(
        DecoderSpec, found, layers=tuple(kinds[index] for index in layers.kind_of_each)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Layers:
    kinds: tuple[dict[str, Any], ...]
    kind_of_each: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Kind:
    rope: dict[str, Any] | None
    window_tokens: int | None


def _read_layer(reader: FieldReader, found: Mapping[str, Any]) -> Layer:
    kind = reader.read(_Kind, dict(found))
    if kind.rope is None:
        return Layer(rope=None, window_tokens=kind.window_tokens)
    rope = dict(kind.rope)
    scaling = _read_scaling(reader, rope.pop("scaling", None))
    return Layer(rope=reader.read(Rope, rope, scaling=scaling), window_tokens=kind.window_tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Scaled:
    scaling: dict[str, Any] | None


def _read_scaling(reader: FieldReader, found: object) -> RopeScaling | None:
    scaling = reader.read(_Scaled, {"scaling": found}).scaling
    if scaling is None:
        return None
    name = scaling.pop("kind", None)
    if name not in _SCALINGS:
        raise BundleError(f"{reader.origin}: no rope is scaled as {name!r}", hint=_HINT)
    read: RopeScaling = reader.read(_SCALINGS[name], scaling)
    return read
