"""The quant methods, carried out: a checkpoint gets what leads the rounding of its weights.

``weighted`` needs the importance of every column. ``feedback`` solves what has a lattice, and
whatever has none is weighted.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import assert_never

from edgekit.progress import Listener
from edgekit.proof import calibration
from edgekit.quant.planned import PlannedWeight, lattices
from edgekit.solver.layers import solve_layers
from edgekit.source.checkpoint import Checkpoint


def prepare(
    checkpoint: Checkpoint,
    weights: Iterable[PlannedWeight],
    *,
    own_text: str | None = None,
    listener: Listener,
) -> Checkpoint:
    """Return the checkpoint with all that its announced calibration promised.

    Args:
        checkpoint: The model, its calibration announced.
        weights: How an artifact will hold each.
        own_text: What the model will be used on; it joins edgekit's own text.
        listener: Who is told how far it is.

    Raises:
        UsageError: If a weight, or what it is multiplied with, is NaN or infinite, or a weight is
            too large for its tensor type; the message names it.
        MissingDependencyError: If torch or tokenizers is not installed.
    """
    announced = checkpoint.calibration
    if announced is None or announced.method == "native":
        return checkpoint
    match announced.method:
        case "weighted":
            return calibration.measure(checkpoint, own_text=own_text, listener=listener)
        case "feedback":
            return _with_feedback(checkpoint, [*weights], own_text, listener)
        case _:
            assert_never(announced.method)


def _with_feedback(
    checkpoint: Checkpoint, weights: list[PlannedWeight], own_text: str | None, listener: Listener
) -> Checkpoint:
    calibration.require()
    solvable = lattices(weights)
    if any(it.is_calibrated and it.lattice is None for it in weights):
        checkpoint = calibration.measure(checkpoint, own_text=own_text, listener=listener)
    solved = solve_layers(
        checkpoint,
        calibration.pieces(checkpoint, own_text=own_text),
        solvable,
        reads_as=lambda role: calibration.reads_as(role, checkpoint.spec),
        listener=listener,
    )
    assert checkpoint.calibration is not None  # noqa: S101 - it was announced
    return replace(checkpoint, calibration=replace(checkpoint.calibration, solved=solved))
