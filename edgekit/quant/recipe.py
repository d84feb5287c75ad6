"""Recipes: which tensor type each weight gets. Nothing here knows a format or a device."""

import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, assert_never

from edgekit.model.spec import DecoderSpec


@dataclass(frozen=True, kw_only=True)
class TensorType:
    """One way a format stores numbers, under the name its own tools use."""

    name: str
    block_weights: int  # a row's length must be a multiple of this
    block_bytes: int  # scales included
    pads_rows: bool = False  # it need not: a last block that is not filled is stored whole
    decode_cost: float = 1.0  # time that a byte takes when decoding; 1: as in the usual 4-bit type
    # Unpacking a weight, in FLOP of reading a prompt, where that takes longer than its bytes.
    decode_flop: float = 0.0

    @property
    def bits_per_weight(self) -> float:
        """What one weight costs, its share of the scales included."""
        return self.block_bytes * 8 / self.block_weights


Layers = Literal["all", "sensitive", "first_two", "first_four", "first_eighth", "first_sixteenth"]
Decoders = Literal["all", "tied", "grouped", "delta"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Weights whose role, without its layer, matches ``pattern`` get ``tensor type``."""

    pattern: str  # a regular expression for the whole role: "value|down"
    tensor_type: str
    layers: Layers = "all"
    # tied: the head is the embedding; grouped: 4 or more queries a key; delta: with delta nets
    decoders: Decoders = "all"

    def applies_to(self, role: str, spec: DecoderSpec) -> bool:
        """Tell whether this rule is about one weight of a decoder."""
        layer, part = split_role(role)
        if not re.fullmatch(self.pattern, part) or not _is_meant(self.decoders, spec):
            return False
        if layer is None:  # the embedding, the head, the last norm
            return self.layers == "all"
        if self.layers == "all":
            return True
        layers = _layers_with(part, layer, spec)
        return _is_chosen(self.layers, layers.index(layer), depth=len(layers))


@dataclass(frozen=True, kw_only=True)
class Change:
    """A role that has, in every layer, another tensor type than a recipe gives it."""

    role: str
    tensor_type: str


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Ordered rules; the first match wins, and what no rule names gets ``default``."""

    name: str
    default: str
    rules: tuple[Rule, ...] = ()
    changes: tuple[Change, ...] = ()  # a user's, which come before all rules
    max_mean_kl_nats: float  # above, an artifact does not say what the checkpoint says
    min_same_top_token: float  # share of positions, 0 to 1
    # The mean KL that SmolLM2-135M-Instruct, on no grid, has as this recipe, rounded to nearest:
    # what it costs the smallest model that people ship. A calibration takes something off, in four
    # bits about half. None: not measured, or changed by a user.
    demo_kl_nats: float | None = None

    def tensor_type_for(self, role: str, spec: DecoderSpec) -> str:
        """Return the tensor type this recipe wants for one weight of a decoder."""
        part = split_role(role)[1]
        for change in self.changes:
            if change.role == part:
                return change.tensor_type
        for rule in self.rules:
            if rule.applies_to(role, spec):
                return rule.tensor_type
        return self.default

    @property
    def full_name(self) -> str:
        """As a user writes it: ``Q4_K_M,down=Q8_0``."""
        return ",".join([self.name, *(f"{it.role}={it.tensor_type}" for it in self.changes)])


def with_limits(
    limits: Mapping[str, tuple[float, float]], demo_kl_nats: Mapping[str, float], *always: Rule
) -> Callable[..., Recipe]:
    """Return what makes the recipes of a format.

    Args:
        limits: By the name of the recipe, the mean KL in nats that an artifact may have, and the
            share of equal top tokens that it must have.
        demo_kl_nats: By the name of the recipe, the mean KL that was measured.
        always: The first rules of each recipe.
    """

    def make(name: str, default: str, *rules: Rule) -> Recipe:
        mean_kl_nats, same_top_token = limits[name]
        return Recipe(
            name=name,
            default=default,
            rules=(*always, *rules),
            max_mean_kl_nats=mean_kl_nats,
            min_same_top_token=same_top_token,
            demo_kl_nats=demo_kl_nats.get(name),
        )

    return make


def _layers_with(part: str, layer: int, spec: DecoderSpec) -> Sequence[int]:
    """Return the layers that have such a weight; one that makes values is like any other."""
    every = range(len(spec.layers))
    if spec.is_uniform or not _has(spec, layer, {part}):  # of the MLP, which all have
        return every
    parts = _MAKE_VALUES if part in _MAKE_VALUES else {part}
    return [other for other in every if _has(spec, other, parts)]


_MAKE_VALUES = {"value", "delta_qkv"}


def _has(spec: DecoderSpec, layer: int, parts: Container[str]) -> bool:
    return any(part in parts for part, _ in spec.mixer(layer).weights(spec.hidden_size))


def _is_meant(decoders: Decoders, spec: DecoderSpec) -> bool:
    match decoders:
        case "all":
            return True
        case "tied":
            return spec.is_tied
        case "grouped":
            return spec.attention.heads // spec.attention.num_kv_heads >= 4
        case "delta":
            return spec.has_delta_nets
        case _:
            assert_never(decoders)


def _is_chosen(layers: Layers, layer: int, *, depth: int) -> bool:
    match layers:
        case "all":
            return True
        case "sensitive":
            return is_sensitive(layer, depth=depth)
        case "first_two":
            return layer < 2
        case "first_four":
            return layer < 4
        case "first_eighth":
            return layer < depth // 8
        case "first_sixteenth":
            return layer < depth // 16
        case _:
            assert_never(layers)


def split_role(role: str) -> tuple[int | None, str]:
    """Split ``layers.3.down`` into its layer and the rest; ``final_norm`` has no layer."""
    if role.startswith("layers."):
        _, layer, part = role.split(".")
        return int(layer), part
    return None, role


def is_sensitive(layer: int, *, depth: int) -> bool:
    """Tell whether a layer is of the first or last eighth, or every third one between.

    Source: ``use_more_bits`` in src/llama-quant.cpp of llama.cpp 0c1e57098; its authors found these
    layers to lose most by rounding.
    """
    eighth = depth // 8
    return layer < eighth or layer >= 7 * depth // 8 or (layer - eighth) % 3 == 2
