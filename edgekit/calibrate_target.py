"""A target file fitted to a device: what it measured, in place of what was assumed of its kind.

Plans predict speeds from two figures of a target: the bandwidth of decoding and the arithmetic of
prompts. A report of `edgekit validate` has what a plan predicted next to what was measured, so it
says what the figures would have to be. A fit takes the median of several.
"""

import datetime as dt
import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgekit import scratch
from edgekit.encodings.json_files import read_object
from edgekit.encodings.typed_json import FieldReader
from edgekit.errors import UsageError
from edgekit.measuring.measurement import Measurement
from edgekit.measuring.verdict import decode_rates
from edgekit.target import Target, path_of
from edgekit.units import format_quantity


_FIRST = "first_token_s_after_"  # then the length of the prompt
# Where prompts are read token by token they say nothing of arithmetic: a plan then expects a first
# token about as late as an answer of that length.
_BY_TOKEN = 0.9


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """What one bundle was predicted and measured at, on one device."""

    bundle: str  # "SmolLM2-135M gguf Q8_0"
    target: str  # the name of the one it was planned and measured for
    predicted_token_s: float
    measured_token_s: float
    predicted_first_s: Mapping[int, float]  # by prompt length
    measured_first_s: Mapping[int, float]

    def bandwidth_share(self) -> float:
        """Return how many times its assumed bandwidth the device reaches."""
        return self.predicted_token_s / self.measured_token_s

    def arithmetic_shares(self) -> list[float]:
        """Return the same of arithmetic for each prompt length that says something of it."""
        return [
            (predicted_s - self.predicted_token_s)
            / (self.measured_first_s[tokens] - self.measured_token_s)
            for tokens, predicted_s in self.predicted_first_s.items()
            if predicted_s < _BY_TOKEN * tokens * self.predicted_token_s
            and self.measured_first_s.get(tokens, 0) > self.measured_token_s
        ]


@dataclass(frozen=True, kw_only=True)
class _Predicted:
    figures: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A target file, and how far its plans are from what it was fitted to."""

    text: str  # TOML
    decode_errors: Mapping[str, float]  # by bundle: how much faster the plan is, as a share


def calibrate_target(
    reports: Sequence[str | Path], *, target: str | Path | None = None, title: str | None = None
) -> Fit:
    """Return the text of a target file whose speeds are those that a device was measured at.

    Args:
        reports: Files that ``edgekit validate --json`` printed, all on one device and for one
            target: of several bundles, best of different sizes and recipes.
        target: That target, if it is a file of one's own.
        title: What the device is called; None: as the target that it was measured as.

    Raises:
        UsageError: If there is no report, a file is none, a bundle was made for another target
            than it was measured for, or what was measured contradicts the target's other figures.
    """
    found = [_read(Path(report)) for report in reports]
    if not found:
        raise UsageError("a fit needs reports", hint="edgekit validate BUNDLE --json > report.json")
    names = sorted({speeds.target for speeds in found})
    if len(names) > 1:
        raise UsageError(f"the reports are of different targets: {', '.join(names)}")
    path = path_of(target or names[0])
    before, text = Target.from_file(path), path.read_text(encoding="utf-8")
    if before.name != names[0]:
        raise UsageError(f"the reports are of the target {names[0]}, and not of {before.name}")
    bundles = ", ".join(dict.fromkeys(speeds.bundle for speeds in found))
    share = statistics.median(speeds.bandwidth_share() for speeds in found)
    bandwidth = before.decode_bandwidth_bytes_per_s * share
    text = _with_figure(text, "decode_bandwidth", format_quantity(bandwidth, "bytes/s"), bundles)
    if shares := [it for speeds in found for it in speeds.arithmetic_shares()]:
        arithmetic = before.prefill_flop_per_s * statistics.median(shares)
        text = _with_figure(text, "prefill_compute", format_quantity(arithmetic, "FLOP/s"), bundles)
    text = re.sub(r"(?m)^aliases = .*\n", "", text)  # they are those of the shipped one
    if title is not None:
        text = _replaced(text, r"(?m)^title = .*$", f"title = {_quoted(title)}")
    _refuse_contradictions(text)
    errors = {speeds.bundle: share / speeds.bandwidth_share() - 1 for speeds in found}
    return Fit(text=text, decode_errors=errors)


def _read(path: Path) -> Speeds:
    document = read_object(path)
    try:
        bundle, target = document["bundle"], document["target"]["name"]
        measurement = document["measurement"]
        name = f"{bundle['model']} {bundle['format']} {bundle['recipe']}"
        predicted, planned_for = bundle["predicted"], bundle["target"]
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is no report of `edgekit validate`: it has no {error}",
            hint="edgekit validate BUNDLE --json > report.json",
        ) from error
    if planned_for != target:
        raise UsageError(
            f"{path}: the bundle was made for {planned_for} and measured as {target}, so that "
            "nothing was predicted of what was measured",
            hint=f"export it for {target}, or validate without --target",
        )
    figures = FieldReader(origin=path).read(_Predicted, {"figures": predicted}).figures
    measured = Measurement.from_json(json.dumps(measurement), origin=str(path))
    lengths = measured.prompt_lengths_tokens
    rates = decode_rates(measured.generations(lengths[0])) if lengths else ()
    if not rates or not figures.get("decode_tokens_per_s"):
        raise UsageError(f"{path}: no rate of decoding was both predicted and measured")
    return Speeds(
        bundle=name,
        target=target,
        predicted_token_s=1 / figures["decode_tokens_per_s"],
        measured_token_s=1 / statistics.median(rates),
        predicted_first_s={
            tokens: figures[key] for tokens in lengths if (key := f"{_FIRST}{tokens}") in figures
        },
        measured_first_s={
            tokens: statistics.median(it.first_token_s for it in measured.generations(tokens))
            for tokens in lengths
        },
    )


def _with_figure(text: str, key: str, value: str, bundles: str) -> str:
    """Return a target file with another value of a figure, and where that comes from."""
    fields = {
        "value": value, "basis": "measured", "source": "edgekit validate",
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(), "note": f"fitted to {bundles}",
    }  # fmt: skip
    table = ", ".join(f"{name} = {_quoted(field)}" for name, field in fields.items())
    return _replaced(text, rf"(?m)^{key} = \{{.*$", f"{key} = {{ {table} }}")


def _replaced(text: str, pattern: str, line: str) -> str:
    literal: Callable[[re.Match[str]], str] = lambda _: line  # noqa: E731 - no escapes
    return re.sub(pattern, literal, text, count=1)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _refuse_contradictions(text: str) -> None:
    """Check what a target file checks."""
    with scratch.directory("target") as work:
        path = work / "fitted.toml"
        path.write_text(text, encoding="utf-8")
        try:
            Target.from_file(path)
        except UsageError as error:
            reason = str(error).removeprefix(f"{path}: ")
            raise UsageError(
                f"what was measured contradicts the target: {reason}",
                hint="copy the target's file and change that figure first",
            ) from error
