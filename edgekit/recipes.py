"""What ``--quant`` and ``--quant-method`` name: a recipe, and how weights find their codes.

A recipe is one of a format's, with what is changed of it, role by role:
``Q4_K_M,delta_output=Q8_0,value=Q6_K`` is Q4_K_M but for two roles in every layer.
"""

import difflib
from collections.abc import Iterable
from dataclasses import replace
from typing import get_args

from edgekit import formats
from edgekit.errors import UsageError
from edgekit.model.checkpoint_protocol import QuantMethod
from edgekit.model.spec import DecoderSpec
from edgekit.quant.recipe import Change, Recipe, split_role


def find(format_name: str, text: str) -> Recipe:
    """Return a recipe of a format by its name, in letters of any case, with its changes.

    Raises:
        UsageError: If the format has no such recipe or tensor type, or a change is malformed.
    """
    name, *changes = text.split(",")
    fmt = formats.get(format_name)
    recipe = fmt.RECIPES[_spelled(name, fmt.RECIPES, f"{format_name} has no quant named")]
    if changes and not fmt.MIXES_TENSOR_TYPES:
        raise UsageError(
            f"{format_name} has one tensor type for each recipe, so no role can have another",
            hint=f"--quant {recipe.name}",
        )
    changed = tuple(_change(format_name, change) for change in changes)
    return replace(recipe, changes=changed, demo_kl_nats=None) if changed else recipe


def method(name: str | None, *, calibrate: bool = True) -> QuantMethod:
    """Return how weights find their codes.

    Args:
        name: What a user asks for; None takes ``weighted``, or what needs no calibration.
        calibrate: Whether a calibration is wanted.

    Raises:
        UsageError: If there is no such method, or it needs the calibration that is not wanted.
    """
    methods: tuple[QuantMethod, ...] = get_args(QuantMethod)
    if name is None:
        return "weighted" if calibrate else "native"
    for known in methods:
        if name == known:
            if known != "native" and not calibrate:
                raise UsageError(
                    f"--no-calibration and --quant-method {name} exclude each other",
                    hint=f"{name} needs a calibration",
                )
            return known
    raise UsageError(f"no quant method {name!r}", hint=f"methods: {', '.join(methods)}")


def has(format_name: str, text: str) -> bool:
    """Tell whether a format has a recipe of this name."""
    names = {name.lower() for name in formats.get(format_name).RECIPES}
    return text.partition(",")[0].lower() in names


def refuse_misfits(recipe: Recipe, spec: DecoderSpec, *, format: str) -> None:
    """Check that every change of a recipe is about a matrix of this decoder that can be rounded.

    Raises:
        UsageError: If there is no such role, or no recipe of the format rounds it.
    """
    shapes = {split_role(role)[1]: (role, shape) for role, shape in spec.weights()}
    for change in recipe.changes:
        if change.role not in shapes:
            raise UsageError(
                f"no weight of this model has the role {change.role!r}, which --quant changes",
                hint=_near(change.role, shapes) or f"its roles: {', '.join(shapes)}",
            )
        role, shape = shapes[change.role]
        others = formats.get(format).RECIPES.values()
        stored = {other.tensor_type_for(role, spec) for other in others}
        if len(shape) < 2 or stored <= _EXACT:
            raise UsageError(
                f"no recipe rounds {change.role}: it is small, and computed with exactly",
                hint=f"leave {change.role}={change.tensor_type} out of --quant",
            )


_EXACT = {"F32", "F16", "BF16"}


def _change(format_name: str, text: str) -> Change:
    role, equals, wanted = (part.strip() for part in text.partition("="))
    if not role or not equals or not wanted:
        raise UsageError(
            f"--quant has {text!r}, expected ROLE=TYPE after the recipe", hint="down=Q6_K"
        )
    types = formats.get(format_name).TENSOR_TYPES
    spelled = _spelled(wanted, types, f"{format_name} has no tensor type named")
    return Change(role=role, tensor_type=spelled)


def _spelled(text: str, names: Iterable[str], refusal: str) -> str:
    by_lower = {name.lower(): name for name in names}
    if text.lower() not in by_lower:
        near = _near(text, by_lower.values()) or f"did you mean {', '.join(by_lower.values())}?"
        raise UsageError(f"{refusal} {text!r}", hint=near)
    return by_lower[text.lower()]


def _near(text: str, names: Iterable[str]) -> str:
    by_lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(text.lower(), by_lower, n=3, cutoff=0.5)
    return f"did you mean {', '.join(by_lower[name] for name in near)}?" if near else ""
