"""Plans: what to make for a target, decided by arithmetic before anything slow starts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from edgekit import formats, recipes
from edgekit.errors import BudgetError, UsageError
from edgekit.formats import BuildRequest, ContextLimit, Layout, MemoryUse, ReadableRunning
from edgekit.model.checkpoint_protocol import QuantMethod
from edgekit.model.spec import DecoderSpec
from edgekit.progress import Listener
from edgekit.proof.calibration import announce
from edgekit.quant.planned import PlannedWeight
from edgekit.quant.recipe import Recipe, TensorType
from edgekit.source import opening
from edgekit.source.checkpoint import Checkpoint
from edgekit.target import Target
from edgekit.target import load as load_target
from edgekit.units import format_bytes, format_duration, format_rate


# How far an uncalibrated estimate may be off. Six published rows of one phone and runtime lie
# within 9 % of one effective bandwidth, four boards within 35 %.
SPEED_UNCERTAINTY = 0.35
_SPEED_FIGURES = {
    "decode_bandwidth_bytes_per_s": "the bandwidth of decoding",
    "prefill_flop_per_s": "the arithmetic of prompts",
}
_FOUR_BITS = 4.0
TOKEN_OVERHEAD_S = 0.0002  # sampling and text, per token


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a user chose; None leaves it to the plan."""

    format: str | None = None  # consider only this one
    quant: str | None = None  # consider only this recipe, even if it is not a default one
    context_tokens: int | None = None  # how many the runner must hold; None: the budget's
    split_bytes: int | None = None  # the most that one file may take; None: one file
    variant: str | None = None  # consider only formats with this build
    has_every_recipe: bool = False  # consider those too that a plan does not take by itself
    compiles: bool | None = None  # see `BuildRequest.compiles`


FREE_CHOICE = Choice()


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A guess and how far it may be off."""

    low: float
    likely: float
    high: float

    @classmethod
    def around(cls, likely: float) -> "Interval":
        """Return ``likely`` give or take `SPEED_UNCERTAINTY`."""
        return cls(
            low=likely * (1 - SPEED_UNCERTAINTY),
            likely=likely,
            high=likely * (1 + SPEED_UNCERTAINTY),
        )


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What an artifact will cost on a target."""

    artifact_bytes: int
    memory: MemoryUse
    decode_tokens_per_s: Interval
    first_token_s: dict[int, Interval]  # by prompt length


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One recipe in one format, and why it falls, if it does."""

    format: str
    request: BuildRequest
    context: ContextLimit  # what it would hold, and the format's reason if that is little
    layout: Layout | None
    estimate: Estimate | None
    misses: tuple[str, ...]  # limits it most likely misses
    certain_misses: tuple[
        str, ...
    ]  # those it misses even if the estimate is as far off as it may be
    refusal: UsageError | None = None  # why the format cannot hold the model at all

    @property
    def recipe(self) -> Recipe:
        """How the weights would be stored."""
        return self.request.recipe

    @property
    def name(self) -> str:
        """``gguf Q4_K_M``."""
        return f"{self.format} {self.recipe.full_name}"

    @property
    def is_usual(self) -> bool:
        """Whether a plan considers the recipe without being asked for it."""
        return self.recipe.name in formats.get(self.format).DEFAULT_RECIPES

    @property
    def bits_per_weight(self) -> float:
        """How many bits of the artifact are for one weight, on average; 0 without a layout."""
        placements = self.layout.placements if self.layout else ()
        parameters = sum(placement.parameters for placement in placements)
        return 8 * sum(placement.size_bytes for placement in placements) / max(1, parameters)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One choice, and why the others fell."""

    format: str
    request: BuildRequest
    context_tokens: int
    layout: Layout
    estimate: Estimate
    rejected: tuple[Candidate, ...]
    four_bit: Candidate | None = None  # what else fits, for what it saves
    notes: tuple[str, ...] = ()  # what a user should know: a shortened context, substitutions
    quant_method: QuantMethod | None = None  # None: no weight is coarse enough for one

    @property
    def recipe(self) -> Recipe:
        """How the weights are stored."""
        return self.request.recipe

    @property
    def split_bytes(self) -> int | None:
        """The most that one file of the artifact may take."""
        return self.request.split_bytes

    @property
    def variant(self) -> str | None:
        """Which build of the format it is, where there are several."""
        return self.layout.variant


def plan(  # noqa: PLR0913 - the request, spelled out for Python users
    model: str | Path,
    target_name: str | Path | Target,
    *,
    adapters: Sequence[str | Path] = (),
    format: str | None = None,
    quant: str | None = None,
    context_tokens: int | None = None,
    split_bytes: int | None = None,
    variant: str | None = None,
    compile: bool | None = None,
    chat_template: str | Path | None = None,
    template_variables: Mapping[str, Any] | None = None,
    calibrate: bool = True,
    quant_method: str | None = None,
    tokenizer: str = "file",
    listener: Listener | None = None,
) -> Plan:
    """Return what `edgekit export` would make of a model; nothing is changed.

    The arguments and errors are those of `edgekit.export`, but that the model may also be a
    directory with a config.json and no weights, or the name of a published model. Such a model is
    planned as it is, so that adapters and what is said about its text are refused.

    Raises:
        UsageError: As `edgekit.export`, and if a model without weights is given one of those.
        BudgetError: If nothing fits.
    """
    target = load_target(target_name)
    method = recipes.method(quant_method, calibrate=calibrate)
    checkpoint = opening.open_shape(model)
    if checkpoint is None:
        checkpoint = opening.open_checkpoint(
            model,
            adapters=adapters,
            chat_template=chat_template,
            template_variables=template_variables,
            tokenizer=tokenizer,
            listener=listener,
        )
    elif adapters or chat_template or template_variables or tokenizer != "file":
        raise UsageError(
            f"there are no weights of {checkpoint.name}: a plan of its shape takes neither "
            "adapters nor anything about its text",
            hint="a LoRA adapter that is merged changes nothing in a plan: leave it out",
        )
    checkpoint = announce(checkpoint, method=method)
    choice = Choice(
        format=format, quant=quant, context_tokens=context_tokens, split_bytes=split_bytes,
        variant=variant, compiles=compile,
    )  # fmt: skip
    made = make(checkpoint, target, choice)
    if checkpoint.has_weights:
        return made
    return replace(made, layout=replace(made.layout, is_exact=False))


def make(checkpoint: Checkpoint, target: Target, choice: Choice = FREE_CHOICE) -> Plan:
    """Return the most faithful recipe that fits, in the first format of the target that has one.

    The largest counts as the most faithful. Which of two is larger depends on the model: rows that
    do not fill blocks of 256 make Q3_K_M larger than Q4_0.

    Args:
        checkpoint: The model, adapter included.
        target: The device class and its budget.
        choice: What the user wants otherwise than the plan would choose.

    Raises:
        UsageError: If a name is unknown, the context is longer than the model or runtime can, or
            the model itself cannot be converted, whatever the recipe.
        BudgetError: If nothing fits; the message lists every candidate with its numbers.
    """
    found = candidates(checkpoint, target, choice)
    chosen = first_fitting(found)
    if chosen is None:
        _refuse_bad_input(found)
        raise BudgetError(
            f"{checkpoint.name} does not fit {target.title}\n"
            + "\n".join(f"  {c.name}: {'; '.join(c.misses)}" for c in found),
            hint="take a smaller model, a shorter --context, or a target file with a wider budget",
        )
    made = _plan(chosen, found, target, notes=checkpoint.remarks)
    return replace(made, quant_method=_quant_method(checkpoint, made.layout))


def candidates(
    checkpoint: Checkpoint, target: Target, choice: Choice = FREE_CHOICE
) -> list[Candidate]:
    """Return everything that could be made, best first: by format, then by size.

    The arguments are those of `make`.

    Raises:
        UsageError: As `make`.
    """
    checkpoint.text.refuse_unreadable()
    found: list[Candidate] = []
    for name in _format_names(target, choice):
        limit = formats.writing(name).context_limit(checkpoint, compiles=choice.compiles)
        context = _context(limit, target, asked=choice.context_tokens)
        held = ContextLimit(tokens=context, reason=limit.reason if context == limit.tokens else "")
        requests = (
            BuildRequest(
                recipe=recipe,
                context_tokens=context,
                split_bytes=choice.split_bytes,
                variant=choice.variant or next(iter(target.variants.get(name, ())), None),
                compiles=choice.compiles,
            )
            for recipe in _recipes(name, choice, checkpoint.spec)
        )
        assessed = [
            assess(checkpoint, request, target, format=name, held=held) for request in requests
        ]
        found += sorted(assessed, key=_faithful_first)
    return found


def _quant_method(checkpoint: Checkpoint, layout: Layout) -> QuantMethod | None:
    """Return how coarse weights of layers find their codes; None if there are none."""
    if not any(weight.is_calibrated for weight in layout.placements):
        return None
    return checkpoint.calibration.method if checkpoint.calibration else "native"


def _faithful_first(candidate: Candidate) -> tuple[int, int]:
    """Order by falling size of the weights, and where that is equal, by memory."""
    if candidate.layout is None or candidate.estimate is None:
        return 0, 0
    return -_weights_bytes(candidate), candidate.estimate.memory.peak_bytes


def _weights_bytes(candidate: Candidate) -> int:
    placements = candidate.layout.placements if candidate.layout else ()
    return sum(placement.size_bytes for placement in placements)


def first_fitting(candidates: Sequence[Candidate]) -> Candidate | None:
    """Return the first that most likely fits, or else the first that may.

    One that runs as it is comes before one for which a user has to compile something.
    """
    likely = [candidate for candidate in candidates if not candidate.misses]
    possible = [candidate for candidate in candidates if not candidate.certain_misses]
    for fitting in (likely, possible):
        ready = (it for it in fitting if it.layout and not it.layout.lacks_library)
        for candidate in (*ready, *fitting):
            return candidate
    return None


def _plan(
    chosen: Candidate, candidates: Sequence[Candidate], target: Target, *, notes: tuple[str, ...]
) -> Plan:
    assert chosen.layout is not None  # noqa: S101 - what has none misses
    assert chosen.estimate is not None  # noqa: S101
    return Plan(
        format=chosen.format,
        request=chosen.request,
        context_tokens=chosen.context.tokens,
        layout=chosen.layout,
        estimate=chosen.estimate,
        rejected=tuple(_passed_over(candidates[: candidates.index(chosen)])),
        four_bit=_four_bit(chosen, candidates),
        notes=(*notes, *_notes(chosen, target)),
    )


def _four_bit(chosen: Candidate, candidates: Sequence[Candidate]) -> Candidate | None:
    """Return the smallest recipe of 4 bits and more that fits, if that is a smaller one."""
    after = candidates[candidates.index(chosen) + 1 :]
    fitting = [it for it in after if it.format == chosen.format and not it.misses]
    types = formats.get(chosen.format).TENSOR_TYPES
    bits = [types[it.recipe.default].bits_per_weight for it in fitting]
    four_bit = (it for it, wanted in zip(fitting, bits, strict=True) if wanted >= _FOUR_BITS)
    return min(four_bit, key=_weights_bytes, default=None)


def _passed_over(candidates: Sequence[Candidate]) -> Iterator[Candidate]:
    """Yield what another was preferred to, with the reason where it fits."""
    for candidate in candidates:
        if candidate.misses:
            yield candidate
        else:
            yield replace(candidate, misses=("nothing runs it before a library is compiled",))


def _refuse_bad_input(rejected: Sequence[Candidate]) -> None:
    """Where all candidates fell for one reason that is not a size, say that, with its way out."""
    reasons = {candidate.misses for candidate in rejected}
    refusal = rejected[0].refusal
    if len(reasons) == 1 and refusal is not None:
        raise refusal


def _format_names(target: Target, choice: Choice) -> list[str]:
    format, quant, variant = choice.format, choice.quant, choice.variant
    if format is not None:
        formats.get(format)  # refuses an unknown name
        named = _taken(target, _with_variant([format], variant), variant)
        return _compiled(named) if choice.compiles else named
    usable: list[str] = [name for name in target.formats if name in formats.names()]
    usable = _taken(target, _with_variant(usable, variant), variant)
    if choice.compiles:
        usable = _compiled(usable)
    if quant is not None:
        with_recipe = [name for name in usable if recipes.has(name, quant)]
        usable = with_recipe or usable[:1]  # which then says what it has
    if not usable:
        raise UsageError(
            f"{target.name} takes {', '.join(target.formats)}; "
            f"this edgekit writes {', '.join(formats.names())}",
            hint="choose one with --format",
        )
    return usable


def _compiled(names: list[str]) -> list[str]:
    """Return the formats that have something to compile."""
    found = [name for name in names if formats.get(name).COMPILES]
    if not found:
        known = [f"{name} has {fmt.COMPILES}" for name, fmt in formats.get_all() if fmt.COMPILES]
        raise UsageError(
            f"nothing is compiled for {' or '.join(names)}",
            hint=f"leave out --compile: {'; '.join(known)}",
        )
    return found


def _with_variant(names: list[str], variant: str | None) -> list[str]:
    """Return the formats that have a build of this name; all of them if none was asked for."""
    found = [name for name in names if variant in (None, *formats.get(name).VARIANTS)]
    if names and not found:
        known = [f"{name}: {', '.join(fmt.VARIANTS)}" for name, fmt in formats.get_all()
                 if fmt.VARIANTS]  # fmt: skip
        raise UsageError(
            f"{' and '.join(names)} {'has' if len(names) == 1 else 'have'} no variant {variant!r}",
            hint=f"variants: {'; '.join(known)}",
        )
    return found


def _taken(target: Target, names: list[str], variant: str | None) -> list[str]:
    """Return the formats whose build of this name the target's programs take."""
    taken = {name: target.variants.get(name) or (variant,) for name in names}
    found = [name for name in names if variant is None or variant in taken[name]]
    if names and not found:
        raise UsageError(
            f"no program on {target.title} takes the variant {variant!r} of {' or '.join(names)}",
            hint="; ".join(f"{name}: {', '.join(target.variants[name])}" for name in names),
        )
    return found


def _recipes(format_name: str, choice: Choice, spec: DecoderSpec) -> list[Recipe]:
    fmt = formats.get(format_name)
    if choice.quant is None:
        usual = fmt.RECIPES if choice.has_every_recipe else fmt.DEFAULT_RECIPES
        return [fmt.RECIPES[name] for name in usual]
    found = recipes.find(format_name, choice.quant)
    recipes.refuse_misfits(found, spec, format=format_name)
    return [found]


def _context(limit: ContextLimit, target: Target, *, asked: int | None) -> int:
    if asked is None:
        return min(target.budget.context_tokens, limit.tokens)
    if not 0 < asked <= limit.tokens:
        raise UsageError(
            f"a context of {asked} tokens is not possible: at most {limit.tokens}, "
            f"since {limit.reason}",
            hint=f"--context {limit.tokens}",
        )
    return asked


def assess(
    checkpoint: Checkpoint,
    request: BuildRequest,
    target: Target,
    *,
    format: str,
    held: ContextLimit,
) -> Candidate:
    """Return what one recipe would cost and which limits of the target it would miss."""
    try:
        layout = formats.writing(format).lay_out(checkpoint, request)
    except UsageError as error:
        return Candidate(
            format=format, request=request, context=held, layout=None, estimate=None,
            misses=(str(error),), certain_misses=(str(error),), refusal=error,
        )  # fmt: skip
    estimated = estimate(checkpoint, layout, target, format=format, context_tokens=held.tokens)
    return Candidate(
        format=format,
        request=request,
        context=held,
        layout=layout,
        estimate=estimated,
        misses=(*_beyond_gpu(layout, target), *_misses(estimated, target)),
        certain_misses=(
            *_beyond_gpu(layout, target),
            *_misses(estimated, target, is_optimistic=True),
        ),
    )


def estimate(
    checkpoint: Checkpoint, layout: Layout, target: Target, *, format: str, context_tokens: int
) -> Estimate:
    """Return the cost of an artifact on a target, without loading a weight."""
    memory = formats.writing(format).memory_use(
        checkpoint, layout, context_tokens=context_tokens, by_app=target.by_app
    )
    types = formats.get(format).TENSOR_TYPES
    weights_s = sum(
        checkpoint.spec.share_read(placement.role)
        * _weight_s(placement, types[placement.tensor_type], target)
        for placement in layout.placements
    )
    token_s = (
        weights_s
        + _overhead_bytes(checkpoint.spec, layout) / target.decode_bandwidth_bytes_per_s
        + layout.overhead_s
        + _cache_s(memory, target, context_tokens=context_tokens)
        + TOKEN_OVERHEAD_S
    )
    flop = 2 * sum(
        checkpoint.spec.share_read(p.role) * p.parameters
        for p in layout.placements
        if p.role != "token_embedding"
    )
    read_s = token_s if layout.reads_by_token else flop / target.prefill_flop_per_s
    return Estimate(
        artifact_bytes=layout.artifact_bytes,
        memory=memory,
        decode_tokens_per_s=Interval.around(1 / token_s),
        first_token_s={
            limit.prompt_tokens: Interval.around(limit.prompt_tokens * read_s + token_s)
            for limit in target.budget.first_token
        },
    )


def _overhead_bytes(spec: DecoderSpec, layout: Layout) -> int:
    """Return what a token takes besides weights: what the format knows, or states, both ways."""
    return layout.overhead_bytes or 2 * spec.states_bytes


def _weight_s(weight: PlannedWeight, stored_as: TensorType, target: Target) -> float:
    """Return the time a token takes for one weight: to read it, or to unpack it if that is more."""
    read_s = weight.size_bytes * stored_as.decode_cost / target.decode_bandwidth_bytes_per_s
    return max(read_s, weight.parameters * stored_as.decode_flop / target.prefill_flop_per_s)


def _cache_s(memory: MemoryUse, target: Target, *, context_tokens: int) -> float:
    """Return the time a token takes to read the cache, in the middle of an answer."""
    budget = target.budget
    filled = min(context_tokens, budget.first_token[0].prompt_tokens + budget.answer_tokens // 2)
    return memory.cache_bytes * filled / context_tokens / target.decode_bandwidth_bytes_per_s


def _beyond_gpu(layout: Layout, target: Target) -> Iterator[str]:
    """Yield what a browser on this target does not grant."""
    limits, buffer = target.webgpu, layout.largest_buffer
    if limits is None:
        return
    if layout.not_on_webgpu:
        yield layout.not_on_webgpu
    if layout.needs_shader_f16 and not limits.has_shader_f16:
        yield "computes in float16, which WebGPU there need not offer (shader-f16)"
    if buffer is None:
        return
    for limit, granted_bytes in (
        ("maxStorageBufferBindingSize", limits.max_binding_bytes),
        ("maxBufferSize", limits.max_buffer_bytes),
    ):
        if buffer.size_bytes > granted_bytes:
            yield (
                f"{buffer.name} takes {format_bytes(buffer.size_bytes)} > "
                f"{format_bytes(granted_bytes)} ({limit})"
            )
            return


def _misses(estimate: Estimate, target: Target, *, is_optimistic: bool = False) -> Iterator[str]:
    """Yield the limits that are missed: most likely, or even at the hopeful end of each interval.

    Bytes are known; only speed is guessed.
    """
    budget = target.budget
    if estimate.artifact_bytes > budget.artifact_bytes:
        yield (
            f"{format_bytes(estimate.artifact_bytes)} > {format_bytes(budget.artifact_bytes)} "
            "to download"
        )
    if estimate.memory.peak_bytes > budget.peak_memory_bytes:
        yield (
            f"{format_bytes(estimate.memory.peak_bytes)} > "
            f"{format_bytes(budget.peak_memory_bytes)} of memory"
        )
    decode = estimate.decode_tokens_per_s
    rate = decode.high if is_optimistic else decode.likely
    if rate < budget.decode_tokens_per_s:
        yield f"{format_rate(rate)} < {format_rate(budget.decode_tokens_per_s)}"
    for limit in budget.first_token:
        first = estimate.first_token_s[limit.prompt_tokens]
        first_s = first.low if is_optimistic else first.likely
        if first_s > limit.limit_s:
            yield (
                f"first token after {format_duration(first_s)} > {format_duration(limit.limit_s)} "
                f"for {limit.prompt_tokens} tokens"
            )


def _notes(candidate: Candidate, target: Target) -> Iterator[str]:
    if candidate.misses:
        yield f"may miss a limit, only measuring will tell: {'; '.join(candidate.misses)}"
    if candidate.context.reason and candidate.context.tokens < target.budget.context_tokens:
        yield f"context is {candidate.context.tokens} tokens, since {candidate.context.reason}"
    if candidate.layout:
        yield from _elsewhere(candidate.format, candidate.layout.variant)
        yield from candidate.layout.notes
        yield from substitutions(candidate.layout)


def _elsewhere(format: str, variant: str | None) -> Iterator[str]:
    running = formats.running(format)
    if not running.is_run_here(variant):
        needed = cast("ReadableRunning", running).runs_on(variant)
        yield f"not executed here: it needs {needed}; speeds are guessed from the target's figures"


def grounds(target: Target) -> str:
    """Say what the speeds of a plan rest on, and how far they may be off."""
    parts = []
    for name, meaning in _SPEED_FIGURES.items():
        origin = target.origins[name]
        parts.append(f"{meaning} is {origin.basis} ({origin.source}, {origin.date})")
    return f"speeds may be {SPEED_UNCERTAINTY:.0%} off: {'; '.join(parts)}"


def remarks(made: Plan) -> Iterator[str]:
    """Yield what a person should know besides the choice: what was rejected, and why; notes."""
    yield from (f"rejected {c.name}: {'; '.join(c.misses)}" for c in made.rejected)
    if made.four_bit and made.four_bit.estimate:
        yield f"or {made.four_bit.name}: {_savings(made.estimate, made.four_bit.estimate)}"
    yield from (f"note: {note}" for note in made.notes)


def _savings(now: Estimate, then: Estimate) -> str:
    """Say what another recipe would take, and what it would change."""
    faster = then.decode_tokens_per_s.likely / now.decode_tokens_per_s.likely
    return (
        f"{format_bytes(then.artifact_bytes)} instead of {format_bytes(now.artifact_bytes)}, "
        f"{format_bytes(then.memory.peak_bytes)} of memory instead of "
        f"{format_bytes(now.memory.peak_bytes)}, {faster:.2g} times as fast, less faithful"
    )


def substitutions(layout: Layout) -> Iterator[str]:
    """Yield what is stored otherwise than the recipe asked, kind by kind, with its cost."""
    kinds: dict[tuple[str, str], list[int]] = {}
    for placement in layout.substituted:
        kinds.setdefault((placement.wanted, placement.tensor_type), []).append(placement.size_bytes)
    for (wanted, stored), sizes in sorted(kinds.items()):
        yield (
            f"{len(sizes)} tensor{' is' if len(sizes) == 1 else 's are'} {stored} "
            f"instead of {wanted} "
            f"({format_bytes(sum(sizes))}): their rows do not fill blocks of {wanted}"
        )
