"""Comparisons: plans of several models, targets and recipes side by side."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgekit import recipes
from edgekit.errors import UsageError
from edgekit.plan import Candidate, Choice, Estimate, candidates, first_fitting
from edgekit.progress import Listener
from edgekit.proof.calibration import announce
from edgekit.source import opening, published
from edgekit.source.checkpoint import Checkpoint
from edgekit.target import Budget, Target
from edgekit.target import load as load_target
from edgekit.units import format_bytes, format_duration, format_rate


@dataclass(frozen=True, kw_only=True)
class Row:
    """One recipe of one model for one target."""

    model: str
    parameters: int
    target: str
    format: str
    recipe: str
    context_tokens: int
    bits_per_weight: float
    demo_kl_nats: float | None  # what the recipe costs a small model; see `Recipe.demo_kl_nats`
    limits: Budget  # of the target
    estimate: Estimate | None  # None: the format cannot hold the model
    misses: tuple[str, ...]  # limits of the target that it most likely misses, or that reason
    fits: Literal["yes", "maybe", "no"]  # maybe: if the estimate is as far off as it may be
    is_chosen: bool  # whether a plan would take it

    @property
    def costs(self) -> tuple[str, str, str, str]:
        """Bytes to download, memory, decoding and the first token, for people."""
        if self.estimate is None:
            return "", "", "", ""
        shortest = next(iter(self.estimate.first_token_s.values()))
        return (
            format_bytes(self.estimate.artifact_bytes),
            format_bytes(self.estimate.memory.peak_bytes),
            format_rate(self.estimate.decode_tokens_per_s.likely),
            format_duration(shortest.likely),
        )

    @property
    def verdict(self) -> str:
        """Whether it fits, and what it misses."""
        return "; ".join((self.fits, *self.misses))


def compare(  # noqa: PLR0913 - the request, spelled out for Python users
    models: Sequence[str | Path],
    targets: Sequence[str | Path | Target],
    *,
    format: str | None = None,
    quant: str | None = None,
    context_tokens: int | None = None,
    every_recipe: bool = False,
    calibrate: bool = True,
    quant_method: str | None = None,
    listener: Listener | None = None,
) -> list[Row]:
    """Return what could be made of each model for each target; nothing is changed.

    Args:
        models: Each as `edgekit.plan` takes it, or a size: ``3b`` is every published model of about
            three billion parameters.
        targets: Names or files of target files.
        format: Consider only this one.
        quant: Consider only this recipe.
        context_tokens: How many the runner must hold; None: as many as the budget says.
        every_recipe: One row for each recipe of each format of the target; else one for each model
            and target: what a plan would choose or, where nothing fits, what takes least memory.
        calibrate: Whether an export would be calibrated.
        quant_method: How weights would find their codes; None: as an export chooses.
        listener: Who is told what takes long.

    Raises:
        UsageError: If a name is unknown, or a model is one that edgekit does not understand.
    """
    known = [load_target(target) for target in targets]
    choice = Choice(
        format=format, quant=quant, context_tokens=context_tokens, has_every_recipe=every_recipe
    )
    method = recipes.method(quant_method, calibrate=calibrate)
    rows: list[Row] = []
    for model in _of_sizes(models):
        checkpoint = opening.open_shape(model) or opening.open_checkpoint(model, listener=listener)
        checkpoint = announce(checkpoint, method=method)
        for target in known:
            rows += _rows(checkpoint, target, choice)
    return rows


def is_size(model: str | Path) -> bool:
    """Tell whether MODEL is a size that published models have: ``3b``."""
    return not Path(model).exists() and bool(published.of_size(str(model)))


def _of_sizes(models: Sequence[str | Path]) -> Iterator[str | Path]:
    """Yield models, those of a size by their names."""
    for model in models:
        if is_size(model):
            yield from (it.name for it in published.of_size(str(model)))
        else:
            yield model


def _rows(checkpoint: Checkpoint, target: Target, choice: Choice) -> Iterator[Row]:
    try:
        found = candidates(checkpoint, target, choice)
    except UsageError as error:
        yield Row(
            model=checkpoint.name, parameters=checkpoint.parameters, target=target.name,
            format=choice.format or "", recipe=choice.quant or "", context_tokens=0,
            bits_per_weight=0, demo_kl_nats=None, limits=target.budget, estimate=None,
            misses=(str(error),), fits="no", is_chosen=False,
        )  # fmt: skip
        return
    chosen = first_fitting([it for it in found if choice.quant or it.is_usual])
    shown = found if choice.has_every_recipe else [chosen or min(found, key=_memory_bytes)]
    for candidate in shown:
        yield Row(
            model=checkpoint.name,
            parameters=checkpoint.parameters,
            target=target.name,
            format=candidate.format,
            recipe=candidate.recipe.full_name,
            context_tokens=candidate.context.tokens,
            bits_per_weight=candidate.bits_per_weight,
            demo_kl_nats=candidate.recipe.demo_kl_nats,
            limits=target.budget,
            estimate=candidate.estimate,
            misses=candidate.misses,
            fits="no" if candidate.certain_misses else "maybe" if candidate.misses else "yes",
            is_chosen=candidate is chosen,
        )


def _memory_bytes(candidate: Candidate) -> float:
    return candidate.estimate.memory.peak_bytes if candidate.estimate else float("inf")
