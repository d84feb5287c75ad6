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
from edgekit.model.mixers import Attention, DeltaNet, Mixer, ShortConv
from edgekit.model.rope import Rope, RopeScaling
from edgekit.model.spec import DecoderSpec, Layer, Mlp


NAME = "decoder.json"
SCHEMA = 1
_HINT = "export it again"
_SCALINGS: dict[str, type[RopeScaling]] = {
    scaling.__name__.removesuffix("Scaling").lower(): scaling
    for scaling in (
        ropes.LinearScaling, ropes.Llama3Scaling, ropes.LongRopeScaling, ropes.YarnScaling,
        ropes.ProportionalScaling,
    )
}  # fmt: skip
_MIXERS: dict[str, type[Mixer]] = {
    mixer.__name__.lower(): mixer for mixer in (Attention, ShortConv, DeltaNet)
}
_YOUNGER = frozenset(
    {"mixer", "mlp", "layer_embedding", "has_layer_scales"}
    | {"has_output_gate", "has_head_gate", "value_norm_epsilon", "values_are_keys", "cache_of"}
)


def fields(spec: DecoderSpec) -> dict[str, Any]:
    """Return a decoder as JSON holds it; layers that are alike are written once.

    What older decoders never have is left out where it is absent: they are written as before.
    """
    kinds = list(dict.fromkeys(spec.layers))
    found = _without_absent(dataclasses.asdict(dataclasses.replace(spec, layers=())))
    found["attention"] = _without_absent(found["attention"])
    found["layers"] = {
        "kinds": [_layer(kind) for kind in kinds],
        "kind_of_each": [kinds.index(layer) for layer in spec.layers],
    }
    return found


def _without_absent(found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in found.items()
        if name not in _YOUNGER or not (value is None or value is False)
    }


def _layer(layer: Layer) -> dict[str, Any]:
    rope, found = layer.rope, _without_absent(dataclasses.asdict(layer))
    if rope and rope.scaling:
        found["rope"]["scaling"]["kind"] = _kind(rope.scaling, _SCALINGS)
    if layer.mixer:
        found["mixer"]["kind"] = _kind(layer.mixer, _MIXERS)
    return found


def _kind(value: object, kinds: Mapping[str, type]) -> str:
    return next(name for name, kind in kinds.items() if isinstance(value, kind))


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
    mixer: dict[str, Any] | None = None
    mlp: Mlp | None = None


def _read_layer(reader: FieldReader, found: Mapping[str, Any]) -> Layer:
    kind = reader.read(_Kind, dict(found))
    return Layer(
        rope=None if kind.rope is None else _read_rope(reader, dict(kind.rope)),
        window_tokens=kind.window_tokens,
        mixer=None if kind.mixer is None else _read_mixer(reader, dict(kind.mixer)),
        mlp=kind.mlp,
    )


def _read_mixer(reader: FieldReader, found: dict[str, Any]) -> Mixer:
    name = found.pop("kind", None)
    if name not in _MIXERS:
        raise BundleError(f"{reader.origin}: no layer mixes tokens as {name!r}", hint=_HINT)
    read: Mixer = reader.read(_MIXERS[name], found)
    return read


def _read_rope(reader: FieldReader, found: dict[str, Any]) -> Rope:
    scaling = _read_scaling(reader, found.pop("scaling", None))
    return reader.read(Rope, found, scaling=scaling)


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
