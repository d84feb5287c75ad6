"""The main job: from a checkpoint to a bundle that fits a target, proven to say the same."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekit import formats, installed, recipes, target
from edgekit.browser import web_page
from edgekit.bundle import workdir
from edgekit.bundle.manifest import MANIFEST, Agreement, Artifact, Bundle, ModelRecord
from edgekit.bundle.signature import require_signing
from edgekit.errors import UsageError
from edgekit.model.checkpoint_protocol import QuantMethod
from edgekit.plan import FREE_CHOICE, Choice, Plan, remarks, substitutions
from edgekit.plan import make as make_plan
from edgekit.progress import Listener, Silent
from edgekit.proof import calibration, qlora, transformers_logits
from edgekit.proof.gates import Subject, check
from edgekit.solver.methods import prepare
from edgekit.source import opening
from edgekit.source.checkpoint import Checkpoint
from edgekit.target import Target
from edgekit.units import format_bytes, format_rate


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a user asked for."""

    model: str | Path
    target: Target
    adapters: tuple[Path, ...] = ()
    choice: Choice = FREE_CHOICE
    chat_template: str | Path | None = None
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    trained_on: Path | None = None
    calibration: Path | None = None
    quant_method: QuantMethod = "weighted"
    tokenizer: str = "file"
    out: Path | None = None
    replaces: bool = False
    key: Path | None = None
    is_verified: bool = True


def export(  # noqa: PLR0913 - the request, spelled out for Python users
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
    trained_on: str | Path | None = None,
    calibration: str | Path | None = None,
    calibrate: bool = True,
    quant_method: str | None = None,
    tokenizer: str = "file",
    out: str | Path | None = None,
    replace: bool = False,
    verify: bool = True,
    sign: str | Path | None = None,
    listener: Listener | None = None,
) -> Bundle:
    """Export a model for a target and return the bundle on disk.

    Args:
        model: A Hugging Face directory, a GGUF file, or ``"demo"``.
        target_name: A name from `edgekit targets`, a TOML file, or a `Target`.
        adapters: PEFT adapters, merged in this order.
        format: None takes the target's best that fits.
        quant: None takes the most faithful that fits.
        context_tokens: How much the runner must hold; None takes the target's.
        split_bytes: The most that one file of the artifact may take; None makes one file.
        variant: Which build of the format, where it has several for different programs on the
            device; None takes the one the target's program reads.
        compile: Whether to compile what the format's runtime wants besides weights: for MLC, the
            library that WebLLM runs. None does where none is prebuilt and the tools are here.
        chat_template: The name of one of the model's templates, or a file; None: the default one.
        template_variables: What the template reads, by name, fixed in the bundle: JSON values, as
            ``{"enable_thinking": False}``.
        trained_on: The four-bit base the adapters were trained on (QLoRA), to compare with. None
            takes the one an adapter names, if it is a directory here.
        calibration: A text like those the model will be used on, to join edgekit's own.
        calibrate: False rounds weights with an error in every column counting the same. Otherwise
            one pass of a text through the model measures how large the inputs of each column are.
        quant_method: How coarse weights find their codes: ``"native"`` as the format's own tool
            rounds, which is ``calibrate=False``; ``"weighted"`` with errors weighted by the size of
            the inputs; ``"feedback"`` so that codes make up for each other's errors, the slowest.
            None takes ``"weighted"``.
        tokenizer: ``"file"`` reads text as tokenizer.json says, ``"transformers"`` as AutoTokenizer
            does, which rebuilds some tokenizers: for a model that was trained with that.
        out: The bundle directory to create; None names it after model, target and recipe.
        replace: Whether ``out`` may be a bundle already, which is then replaced at the very end.
        verify: False skips the proof; such a bundle never passes `validate`.
        sign: The private key of OpenSSH that signs the bundle, or the public one of a key that an
            agent holds; None leaves it unsigned.
        listener: Who is told what happens.

    Raises:
        BudgetError: If nothing fits, before anything slow has started.
        UsageError: If ``out`` exists, or an input is not what it should be.
        DisagreementError: If the artifact does not say what the checkpoint says.
        MissingDependencyError: If a package is missing, or ssh-keygen for ``sign``.
    """
    request = Request(
        model=model,
        target=target.load(target_name),
        adapters=opening.adapter_directories(adapters),
        choice=Choice(
            format=format,
            quant=quant,
            context_tokens=context_tokens,
            split_bytes=split_bytes,
            variant=variant,
            compiles=compile,
        ),
        chat_template=chat_template,
        template_variables=template_variables or {},
        trained_on=None if trained_on is None else Path(trained_on),
        calibration=None if calibration is None else Path(calibration),
        quant_method=recipes.method(quant_method, calibrate=calibrate),
        tokenizer=tokenizer,
        out=None if out is None else Path(out),
        replaces=replace,
        is_verified=verify,
        key=None if sign is None else Path(sign),
    )
    return make(request, listener=listener or Silent())


def make(request: Request, *, listener: Listener) -> Bundle:
    """Do the job, step by step."""
    replaces = MANIFEST if request.replaces else None
    if request.out:
        workdir.refuse_existing(request.out, replaces=replaces)
    if request.key:
        require_signing(request.key)
    own_text = _own_text(request)
    if request.is_verified:
        transformers_logits.require()
    checkpoint = opening.open_checkpoint(
        request.model,
        adapters=request.adapters,
        chat_template=request.chat_template,
        template_variables=request.template_variables,
        tokenizer=request.tokenizer,
        listener=listener,
    )
    if request.is_verified:
        transformers_logits.require_for(checkpoint)
    checkpoint = calibration.announce(checkpoint, own_text=own_text, method=request.quant_method)
    chosen = make_plan(checkpoint, request.target, request.choice)
    _refuse_unused(request, chosen)
    out = request.out or default_out(checkpoint, chosen, request.target)
    workdir.refuse_existing(out, replaces=replaces)
    checkpoint = qlora.with_score(
        checkpoint, request.adapters, trained_on=request.trained_on, listener=listener
    )
    for line in describe(checkpoint, chosen, request.target):
        listener.say(line)
    short = calibration.note(checkpoint, own_text)
    if short:
        listener.say(f"note: {short}")
    if chosen.layout.calibration:
        checkpoint = prepare(
            checkpoint, chosen.layout.placements, own_text=own_text, listener=listener
        )
    with workdir.new_directory(out, replaces=replaces) as work:
        bundle = _fill(work, checkpoint, chosen, request, listener)
        bundle.save()
        if request.key:
            bundle.sign(request.key)
    return Bundle.load(out, check_hashes=False)


def _own_text(request: Request) -> str | None:
    if request.calibration is None:
        return None
    if request.quant_method == "native":
        raise UsageError(
            "--calibration and --no-calibration, or --quant-method native, exclude each other"
        )
    return calibration.read_own_text(request.calibration)


def _refuse_unused(request: Request, chosen: Plan) -> None:
    if chosen.layout.calibration:
        calibration.require()
    elif request.calibration is not None:
        raise UsageError(
            f"--calibration has no effect on {chosen.recipe.name}, which rounds finely",
            hint="leave out the text, or choose a coarser --quant",
        )
    elif request.quant_method == "feedback":
        raise UsageError(
            f"--quant-method feedback has no effect on {chosen.recipe.name}, which rounds finely",
            hint="leave it out, or choose a coarser --quant",
        )


def _fill(
    work: Path, checkpoint: Checkpoint, chosen: Plan, request: Request, listener: Listener
) -> Bundle:
    """Write everything but the manifest into ``work`` and return what describes it."""
    rules = checkpoint.text.copy_into(work)
    with listener.track(f"convert to {chosen.recipe.name}", checkpoint.parameters) as advance:
        writing = formats.writing(chosen.format)
        entry = writing.convert(checkpoint, chosen.request, work, progress=advance)
    agreement = None
    if request.is_verified:
        subject = Subject(
            checkpoint=checkpoint,
            directory=work,
            entry=entry,
            format=chosen.format,
            recipe=chosen.recipe,
            layout=chosen.layout,
            rules=rules,
            context_tokens=chosen.context_tokens,
        )
        agreement = _prove(subject, listener)
    if request.target.webgpu:
        web_page.write(
            work, entry, chosen.format, context_tokens=chosen.context_tokens,
            stop_ids=rules.stop_ids,
        )  # fmt: skip
    bundle = Bundle(
        directory=work,
        model=_record(checkpoint),
        target=request.target.name,
        context_tokens=chosen.context_tokens,
        text=rules,
        artifact=_artifact(work, entry, chosen),
        agreement=None,
        predicted=_predicted(chosen),
        tools=_tools(chosen.format),
    )
    return bundle.with_agreement(agreement) if agreement else bundle


def _prove(subject: Subject, listener: Listener) -> Agreement:
    """Put an artifact through all gates, and leave next to it what a device can be held to."""
    proof = check(subject, listener=listener)
    for gate in proof.agreement.gates:
        listener.say(gate.line)
    proof.goldens.save(subject.directory)
    return proof.agreement


def describe(checkpoint: Checkpoint, chosen: Plan, to: Target) -> list[str]:
    """Return the plan in a few lines, for a person."""
    estimate = chosen.estimate
    lines = [
        (
            f"{checkpoint.name}: {checkpoint.architecture}, "
            f"{checkpoint.parameters / 1e6:.0f} million parameters"
        ),
        (
            f"plan for {to.title}: {' '.join(_choice(chosen))}, "
            f"{format_bytes(estimate.artifact_bytes)}, {chosen.context_tokens} tokens of context"
        ),
        (
            f"expected there: {format_bytes(estimate.memory.peak_bytes)} of memory at most, "
            f"{format_rate(estimate.decode_tokens_per_s.low)} to "
            f"{format_rate(estimate.decode_tokens_per_s.high)}"
        ),
    ]
    if checkpoint.adapter:
        lines.insert(1, f"with the adapter {checkpoint.adapter.name} merged in")
    found_since = [note for note in checkpoint.remarks if note not in chosen.notes]
    return [*lines, *remarks(chosen), *(f"note: {note}" for note in found_since)]


def default_out(checkpoint: Checkpoint, chosen: Plan, to: Target) -> Path:
    """Return a name that says what is inside: ``bundles/SmolLM2-raspberry-pi-5-8gb-gguf-Q8_0``."""
    parts = [checkpoint.name, to.name, *_choice(chosen)]
    if checkpoint.adapter:
        parts.insert(1, checkpoint.adapter.name)
    return Path("bundles") / "-".join(parts)


def _choice(chosen: Plan) -> list[str]:
    return [*filter(None, (chosen.format, chosen.recipe.full_name, chosen.variant))]


def _artifact(work: Path, entry: str, chosen: Plan) -> Artifact:
    return Artifact.of_directory(
        work,
        entry,
        format=chosen.format,
        recipe=chosen.recipe.full_name,
        substitutions=tuple(substitutions(chosen.layout)),
        split_bytes=chosen.split_bytes,
        calibration=chosen.layout.calibration,
        variant=chosen.variant,
        quant_method=chosen.quant_method,
    )


def _record(checkpoint: Checkpoint) -> ModelRecord:
    adapter = checkpoint.adapter
    return ModelRecord(
        name=checkpoint.name,
        sha256=checkpoint.sha256,
        architecture=checkpoint.architecture,
        parameters=checkpoint.parameters,
        licence=checkpoint.licence,
        adapter=adapter.name if adapter else None,
        adapter_sha256=adapter.sha256 if adapter else None,
    )


def _predicted(chosen: Plan) -> dict[str, float]:
    estimate = chosen.estimate
    firsts = {
        f"first_token_s_after_{tokens}": interval.likely
        for tokens, interval in estimate.first_token_s.items()
    }
    return {
        "artifact_bytes": estimate.artifact_bytes,
        "peak_memory_bytes": estimate.memory.peak_bytes,
        "decode_tokens_per_s": estimate.decode_tokens_per_s.likely,
        "decode_tokens_per_s_low": estimate.decode_tokens_per_s.low,
        "decode_tokens_per_s_high": estimate.decode_tokens_per_s.high,
    } | firsts


def _tools(format: str) -> dict[str, str]:
    """Return the versions of edgekit and of what its extras for a format bring."""
    fmt, packages = formats.get(format), installed.extras()
    return installed.versions(
        ("edgekit", *packages.get(fmt.EXTRA, ()), *packages.get(fmt.RUN_EXTRA, ()))
    )
