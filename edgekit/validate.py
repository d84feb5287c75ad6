"""Validate: measure a bundle on a device and judge it against the budget of a target."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

from edgekit import formats
from edgekit.browser.options import Limits, is_browser
from edgekit.bundle.manifest import Bundle
from edgekit.encodings.files import require_file
from edgekit.encodings.limits import SETTINGS_BYTES, check_size
from edgekit.errors import UsageError
from edgekit.measuring import measure
from edgekit.measuring.devices import connect
from edgekit.measuring.measure import DEFAULT_REPETITIONS, RepetitionProgress
from edgekit.measuring.measurement import Environment, Measurement, Workload
from edgekit.measuring.report import Result
from edgekit.measuring.verdict import judge
from edgekit.progress import Listener, Silent
from edgekit.runtime.processors import check_threads
from edgekit.target import Target
from edgekit.target import load as load_target


if TYPE_CHECKING:
    from edgekit.formats import ReadableRunning

UNJUDGED_TOKENS = 4  # of an answer whose speed says nothing
MOST_SAMPLES = 40  # of a time or a rate; what is inconclusive then stays unstable


def validate(  # noqa: PLR0913  # the options of the verb
    bundle_directory: str | Path,
    target: str | Path | Target,
    *,
    device: str = "this",
    repetitions: int = DEFAULT_REPETITIONS,
    threads: int | None = None,
    trusted: str | Path | None = None,
    progress: RepetitionProgress | None = None,
    listener: Listener | None = None,
) -> Result:
    """Return what a device did with a bundle, and the verdict.

    While more samples may decide between a pass and a fail, the number of repetitions is
    doubled, up to `MOST_SAMPLES` samples of each time.

    Args:
        bundle_directory: The bundle.
        target: Whose budget is enforced: a name, a TOML file, or a `Target`.
        device: ``"this"``, ``"browser"`` or ``"ssh://user@host"``, see
            `edgekit.measuring.devices.connect`.
        repetitions: Fresh processes to start with.
        threads: From 1 to the device's cores; None: the target's decode threads, or the device's
            cores if they are fewer.
        trusted: Public keys, or a list of allowed signers, one of whom must have signed the bundle
            (see `Bundle.load`); None: anybody may have made it.
        progress: Called with the repetitions done and to do.
        listener: Who is told what happens.

    Raises:
        BundleError: If the bundle is damaged, or not signed as it must be.
        UsageError: If no program of edgekit's can start the bundle (it names the device that can),
            or the device cannot run that many threads.
        MissingDependencyError: If the device lacks the runtime.
        ToolchainError: If the device cannot be reached or the runtime fails.
    """
    if repetitions < 1:
        raise UsageError(
            f"{repetitions} repetitions are too few to measure anything", hint="use 5 or more"
        )
    target, listener = load_target(target), listener or Silent()
    bundle = Bundle.load(bundle_directory, trusted=trusted)
    if is_browser(device):
        formats.browsing(bundle.artifact.format)
    else:
        _refuse_elsewhere(bundle, target)
    with connect(device, limits=_gpu_limits(target)) as place:

        def add(measurement: Measurement, count: int) -> Measurement:
            listener.say(f"not decided yet: {count} more repetitions")
            return measure.add_repetitions(
                measurement, bundle, place, count=count, progress=progress
            )

        listener.say(f"measuring on {place.label}: {repetitions} repetitions to start with")
        environment = measure.environment_of(bundle, place)
        measurement = measure.measure_bundle(
            bundle,
            place,
            plan_workload(bundle, target, environment, threads=threads),
            repetitions=repetitions,
            environment=environment,
            progress=progress,
        )
        measurement = _until_clear(measurement, bundle, target, add)
    verdict = judge(measurement, bundle, target)
    return Result(bundle=bundle, target=target, measurement=measurement, verdict=verdict)


def _gpu_limits(target: Target) -> Limits:
    """Return what a browser on the target grants, which one here is then held to."""
    granted = target.webgpu
    if granted is None:
        return Limits()
    return Limits(
        at_most={
            "maxBufferSize": granted.max_buffer_bytes,
            "maxStorageBufferBindingSize": granted.max_binding_bytes,
        },
        hidden=() if granted.has_shader_f16 else ("shader-f16",),
    )


def _refuse_elsewhere(bundle: Bundle, target: Target) -> None:
    """Name the device that a bundle needs where no program of edgekit's can start it."""
    artifact = bundle.artifact
    running = formats.running(artifact.format)
    if not running.is_run_here(artifact.variant):
        needed = cast("ReadableRunning", running).runs_on(artifact.variant)
        raise UsageError(
            f"{bundle.directory} is not executed by edgekit: it needs {needed}, and its budget is "
            f"that of {target.name} ({target.title})",
            hint="measure it in an app there, and pass what that writes with --measurement FILE",
        )


def judge_document(
    bundle_directory: str | Path,
    target: str | Path | Target,
    document: str | Path,
    *,
    trusted: str | Path | None = None,
) -> Result:
    """Return the verdict on a measurement that another runner wrote, a phone's or a browser's.

    Args:
        bundle_directory: The bundle that was measured.
        target: Whose budget is enforced.
        document: The measurement.
        trusted: As of `validate`.

    Raises:
        BundleError: If the bundle is damaged, or not signed as it must be.
        UsageError: If the document does not follow the schema, or measured another artifact.
    """
    bundle, target = Bundle.load(bundle_directory, trusted=trusted), load_target(target)
    require_file(Path(document))
    check_size(Path(document), SETTINGS_BYTES)
    try:
        measurement = Measurement.from_json(
            Path(document).read_text(encoding="utf-8"), origin=str(document)
        )
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {document}: {error}") from error
    expected = measure.artifact_sha256(bundle.artifact)
    if measurement.artifact_sha256 != expected:
        raise UsageError(
            f"{document} is a measurement of another artifact: "
            f"{measurement.artifact_sha256[:16]}…, this bundle's is {expected[:16]}…",
            hint="measure this bundle, or pass the bundle that was measured",
        )
    verdict = judge(measurement, bundle, target)
    return Result(bundle=bundle, target=target, measurement=measurement, verdict=verdict)


def plan_workload(
    bundle: Bundle, target: Target, environment: Environment, *, threads: int | None = None
) -> Workload:
    """Return the workload that the budget names, as far as the bundle's context holds it.

    Raises:
        UsageError: If not even the shortest prompt and its answer fit, or the device cannot run
            that many threads.
    """
    check_threads(threads, cores=environment.cores)
    budget = target.budget
    longest = bundle.context_tokens - budget.answer_tokens
    lengths = tuple(
        limit.prompt_tokens for limit in budget.first_token if limit.prompt_tokens <= longest
    )
    if not lengths:
        raise UsageError(
            f"the bundle's context of {bundle.context_tokens} tokens is too short for the budget",
            hint=f"export with --context {budget.context_tokens}",
        )
    is_slow = environment.browser is not None and environment.browser.is_software
    return Workload(
        prompt_lengths_tokens=lengths,
        # Speed is not judged there, and would take an hour.
        answer_tokens=min(budget.answer_tokens, UNJUDGED_TOKENS)
        if is_slow
        else budget.answer_tokens,
        generations=1 if is_slow else 2,
        context_tokens=bundle.context_tokens,
        threads=threads or min(target.decode_threads, environment.cores or target.decode_threads),
    )


def _until_clear(
    measurement: Measurement,
    bundle: Bundle,
    target: Target,
    add: Callable[[Measurement, int], Measurement],
) -> Measurement:
    """Double the repetitions with ``add`` as long as that may help, up to `MOST_SAMPLES`."""
    most = MOST_SAMPLES // measurement.workload.generations
    while judge(measurement, bundle, target).more_samples_may_help:
        more = min(len(measurement.repetitions), most - len(measurement.repetitions))
        if more <= 0:
            break
        measurement = add(measurement, more)
    return measurement
