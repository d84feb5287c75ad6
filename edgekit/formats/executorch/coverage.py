"""How much of a program's work a back-end does, for whoever wonders about speed."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekit.errors import ToolchainError
from edgekit.formats.executorch.planned import TABLES


if TYPE_CHECKING:
    from edgekit.formats.executorch.planned import ProgramWeight


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Who does the work of a program."""

    delegated_operators: int  # in the back-end, all delegates together
    delegated_weights: frozenset[str]  # by role
    portable_operators: Mapping[str, int]  # how often ExecuTorch's own kernels are called


def report(
    found: Coverage, planned: Iterable["ProgramWeight"], *, id: str, name: str
) -> dict[str, Any]:
    """Return it for a file that people read.

    Args:
        found: Who does the work.
        planned: The weights of the program.
        id: The back-end, as programs write it.
        name: And as people do.

    Raises:
        ToolchainError: If ExecuTorch's own kernels are to multiply by a matrix: they are slow.
    """
    inside = [weight for weight in planned if weight.role in found.delegated_weights]
    outside = [weight for weight in planned if weight.role not in found.delegated_weights]
    multiplied = [w.role for w in outside if len(w.shape) > 1 and w.role not in TABLES]
    if multiplied:
        raise ToolchainError(f"{name} does not multiply by {', '.join(multiplied)}")
    return {
        "backend": id,
        "matrices_in_backend": sum(len(weight.shape) > 1 for weight in inside),
        "matrices_outside": multiplied,
        "weight_bytes_in_backend": sum(weight.size_bytes for weight in inside),
        "weight_bytes_outside": sum(weight.size_bytes for weight in outside),
        "operators_in_backend": found.delegated_operators,
        "operator_calls_outside": dict(found.portable_operators),
    }
