"""Recipes: which storage each weight gets. Nothing here knows a format or a device."""

import re
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Storage:
    """One way a format stores numbers, under the name its own tools use."""

    name: str
    block_weights: int  # a row's length must be a multiple of this
    block_bytes: int  # scales included

    @property
    def bits_per_weight(self) -> float:
        """What one weight costs, its share of the scales included."""
        return self.block_bytes * 8 / self.block_weights


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Weights whose role, without its layer, matches ``pattern`` get ``storage``."""

    pattern: str  # a regular expression for the whole role: "value|down"
    storage: str
    layers: Literal["all", "sensitive"] = "all"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Ordered rules; the first match wins, and what no rule names gets ``default``."""

    name: str
    default: str
    rules: tuple[Rule, ...] = ()

    def storage_for(self, role: str, *, depth: int) -> str:
        """Return the storage of one weight of a decoder of ``depth`` layers.

        >>> Recipe(name="x", default="Q4_K", rules=(Rule(pattern="down", storage="Q6_K"),)
        ...       ).storage_for("layers.3.down", depth=8)
        'Q6_K'
        """
        layer, part = split_role(role)
        for rule in self.rules:
            if rule.layers == "sensitive" and not (
                layer is not None and is_sensitive(layer, depth=depth)
            ):
                continue
            if re.fullmatch(rule.pattern, part):
                return rule.storage
        return self.default


def split_role(role: str) -> tuple[int | None, str]:
    """Split ``layers.3.down`` into ``(3, "down")`` and ``final_norm`` into ``(None, "final_norm")``."""
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
