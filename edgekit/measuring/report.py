"""Reports: one measurement and its verdict as a table, as JSON, as JUnit XML and as a page.

The page is one file: no network, no script, and plots drawn here. Names in it come from other
people's models, so every text is escaped.
"""

import dataclasses
import html
import json
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any
from xml.etree import ElementTree as ET

from edgekit import versions
from edgekit.bundle.manifest import Bundle
from edgekit.encodings.visible import visible, visible_lines
from edgekit.measuring import plot
from edgekit.measuring.measurement import SCHEMA_VERSION as MEASUREMENT_VERSION
from edgekit.measuring.measurement import Generation, Measurement
from edgekit.measuring.statistics import coefficient_of_variation, quantile
from edgekit.measuring.verdict import (
    Check,
    CheckOutcome,
    Outcome,
    Unit,
    Verdict,
    counted,
    decode_rates,
    faults_per_token,
    foreign_features,
    judged_metric,
    throttling_in_words,
)
from edgekit.target import Target
from edgekit.units import format_bytes, format_duration, format_quantity


SCHEMA_VERSION = 1

_TEMPLATE = Path(__file__).with_name("report_template.html")
_SIGNS: dict[Outcome, str] = {"pass": "✓", "fail": "✗", "unstable": "≈"}
_WORDS: dict[CheckOutcome, str] = {
    "pass": "✓ pass", "fail": "✗ fail", "inconclusive": "≈ inconclusive",
}  # fmt: skip
_STYLES = ("one", "two", "three")  # of prompt lengths, in the page's CSS


@dataclass(frozen=True, kw_only=True)
class Result:
    """What `edgekit validate` found."""

    bundle: Bundle
    target: Target
    measurement: Measurement
    verdict: Verdict


def as_text(result: Result) -> str:
    """Return the verdict as lines for a terminal, columns aligned."""
    head = ("check", "measured", "judged", "limit", "budget used", "outcome")
    rows = [head, *(_cells(check) for check in result.verdict.checks)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(_pad(row, widths)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    unclear = [check for check in result.verdict.checks if check.outcome == "inconclusive"]
    unclear = [check for check in unclear if not check.is_void]
    lines += [""] if unclear or result.verdict.doubts or result.verdict.notes else []
    lines += [f"{check.name}: {check.basis}" for check in unclear]
    lines += [f"doubt: {doubt}" for doubt in result.verdict.doubts]
    lines += [f"note: {note}" for note in result.verdict.notes]
    lines += ["", f"{result.verdict.outcome.upper()}: {summarize(result)}"]
    return "\n".join(map(visible, lines))


def as_json(result: Result) -> str:
    """Return everything as one JSON document; ``measurement`` follows its own schema."""
    bundle, verdict = result.bundle, result.verdict
    measurement = json.loads(result.measurement.to_json())
    document = {
        "schema_version": SCHEMA_VERSION,
        "edgekit": versions.EDGEKIT,
        "outcome": verdict.outcome,
        "checks": [
            {**dataclasses.asdict(check), "statistics": _statistics(check.samples)}
            for check in verdict.checks
        ],
        "doubts": verdict.doubts,
        "notes": verdict.notes,
        "bundle": {
            "model": bundle.model.name,
            "format": bundle.artifact.format,
            "recipe": bundle.artifact.recipe,
            "target": bundle.target,
            "predicted": bundle.predicted,
        },
        "target": {"name": result.target.name, "budget": dataclasses.asdict(result.target.budget)},
        "measurement": {"schema_version": MEASUREMENT_VERSION, **measurement},
    }
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)


def _statistics(samples: Sequence[float]) -> dict[str, float] | None:
    if not samples:
        return None
    return {
        "samples": len(samples),
        "median": statistics.median(samples),
        "p10": quantile(samples, 0.1),
        "p90": quantile(samples, 0.9),
        "min": min(samples),
        "max": max(samples),
        "coefficient_of_variation": coefficient_of_variation(samples),
    }


def as_junit(result: Result) -> str:
    """Return JUnit XML: one test case for each check, and one for the measurement itself.

    A check that is unclear, or a doubt, is a failure of type ``unstable``: a pipeline must not
    turn green on it.
    """
    checks = result.verdict.checks
    unclear = sum(check.outcome != "pass" for check in checks) + bool(result.verdict.doubts)
    suite = ET.Element(
        "testsuite",
        name=_printable(f"edgekit validate {result.bundle.model.name}"),
        tests=str(len(checks) + 1),
        failures=str(unclear),
        errors="0",
        skipped="0",
    )
    group = f"edgekit.{result.target.name}"
    for check in checks:
        case = ET.SubElement(suite, "testcase", classname=group, name=check.name)
        if check.outcome != "pass":
            _add_failure(case, check.outcome, _sentence(check))
    case = ET.SubElement(suite, "testcase", classname=group, name="trustworthy measurement")
    if result.verdict.doubts:
        _add_failure(case, "inconclusive", "; ".join(result.verdict.doubts))
    if result.verdict.notes:
        ET.SubElement(case, "system-out").text = _printable("\n".join(result.verdict.notes))
    suites = ET.Element("testsuites")
    suites.append(suite)
    ET.indent(suites)
    return ET.tostring(suites, encoding="unicode", xml_declaration=True)


def as_html(result: Result) -> str:
    """Return one self-contained page."""
    outcome = result.verdict.outcome
    model, target = escape(result.bundle.model.name), escape(result.target.title)
    artifact = result.bundle.artifact
    environment = result.measurement.environment
    board = environment.model or environment.cpu or environment.system
    subtitle = (
        f"{artifact.format} {artifact.recipe}, {result.bundle.model.parameters / 1e6:,.0f} M "
        f"parameters; measured on {result.measurement.device} ({board}), "
        f"{len(result.measurement.repetitions)} processes"
    )
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        outcome=outcome,
        outcome_word=outcome.upper(),
        sign=_SIGNS[outcome],
        model=model,
        target=target,
        summary=escape(summarize(result)),
        subtitle=escape(subtitle),
        remarks="".join(_remarks_html(result.verdict)),
        checks="\n".join(_check_html(check) for check in result.verdict.checks),
        plots="\n".join(_plots_html(result)),
        environment=_rows_html(_describe_device(result.measurement)),
        bundle=_rows_html(_describe_bundle(result)),
        prediction=_prediction_html(result),
        proof=_proof_html(result.bundle),
        footer=escape(
            f"edgekit {versions.EDGEKIT}; artifact {result.measurement.artifact_sha256[:16]}…; "
            f"every sample is in the JSON report."
        ),
    )


def summarize(result: Result) -> str:
    """Return the verdict in one sentence."""
    checks, doubts = result.verdict.checks, result.verdict.doubts
    missed = [check.name for check in checks if check.outcome == "fail"]
    unclear = [check.name for check in checks if check.outcome == "inconclusive"]
    if missed:
        verb = "is" if len(missed) == 1 else "are"
        return f"{counted(len(missed), 'check')} {verb} over budget: {_listed(missed)}."
    if not unclear and not doubts:
        return f"All {len(checks)} checks are within budget and stable."
    reasons = [f"{counted(len(unclear), 'check')} inconclusive"] if unclear else []
    reasons += [f"{counted(len(doubts), 'doubt')} about the measurement"] if doubts else []
    return f"No check is over budget, but this is not a pass: {' and '.join(reasons)}."


def format_value(value: float | None, unit: Unit) -> str:
    """Return a measured number or a limit for people."""
    if value is None:
        return "n/a"
    match unit:
        case "s":
            return format_duration(value)
        case "nats":
            return f"{value:.1e} nats"
        case "features":
            return "yes" if value else "no"
        case _:
            return format_quantity(value, unit)


def budget_used(check: Check, value: float | None) -> float | None:
    """Return which share of the budget a value uses: above 1 is a miss, in either direction."""
    if value is None or min(value, check.limit) <= 0:
        return None
    return value / check.limit if check.direction == "at most" else check.limit / value


def _cells(check: Check) -> tuple[str, ...]:
    used = budget_used(check, check.judged)
    return (
        check.name,
        format_value(check.measured, check.unit),
        format_value(check.judged, check.unit),
        f"{'<=' if check.direction == 'at most' else '>='} {format_value(check.limit, check.unit)}",
        "n/a" if used is None else f"{used:.0%}",
        check.outcome,
    )


def _pad(cells: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    for column, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        yield cell.rjust(width) if 0 < column < 5 else cell.ljust(width)


def _sentence(check: Check) -> str:
    limit = format_value(check.limit, check.unit)
    return f"{check.name}: {_found(check)}, {check.direction} {limit} allowed ({check.basis})"


def _found(check: Check) -> str:
    """Return what is judged; where there are too few samples to judge, what was measured."""
    if check.judged is not None:
        return format_value(check.judged, check.unit)
    if check.measured is not None:
        return f"median {format_value(check.measured, check.unit)}"
    return "nothing measured"


def escape(text: str) -> str:
    """Return text for the page: no tags, and nothing that turns the order of letters around."""
    return html.escape(visible_lines(text))


def _add_failure(case: ET.Element, outcome: CheckOutcome, message: str) -> None:
    kind = "fail" if outcome == "fail" else "unstable"
    ET.SubElement(case, "failure", type=kind, message=_printable(message))


def _printable(text: str) -> str:
    """Drop control characters, which XML cannot hold even escaped."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _remarks_html(verdict: Verdict) -> Iterator[str]:
    for title, tone, remarks in (
        ("Doubts", "unstable", verdict.doubts),
        ("Notes", "", verdict.notes),
    ):
        if remarks:
            items = "".join(f"<li>{escape(remark)}</li>" for remark in remarks)
            yield f'<section class="remarks {tone}"><h2>{title}</h2><ul>{items}</ul></section>'


def _check_html(check: Check) -> str:
    used = budget_used(check, check.measured if check.judged is None else check.judged)
    shares = [budget_used(check, sample) for sample in check.samples]
    share = "" if used is None else f"{used:.0%} of the budget: "
    text = f"{share}{_found(check)}"
    graph = plot.bar(used or 0, [s for s in shares if s is not None], check.outcome, text)
    sign = "≤" if check.direction == "at most" else "≥"
    return (
        f'<div class="check {check.outcome}"><strong>{escape(check.name)}</strong>'
        f'<span class="end">{format_value(check.measured, check.unit)}</span>'
        f'<span class="graph">{graph}</span>'
        f'<span class="end">{sign} {format_value(check.limit, check.unit)}</span>'
        f'<span class="end"><span class="chip">{_WORDS[check.outcome]}</span></span>'
        f'<span class="why">{text}, {escape(check.basis)}{_spread_in_words(check)}</span></div>'
    )


def _spread_in_words(check: Check) -> str:
    if len(check.samples) < 2 or "varies by" in check.basis:
        return ""
    return f"; varies by {coefficient_of_variation(check.samples):.1%}"


def _plots_html(result: Result) -> Iterator[str]:
    measurement = result.measurement
    if measurement.repetitions:
        yield _first_token_html(result)
        yield _decoding_html(result)
        yield _memory_html(result)
        yield _order_html(result)


def _card(title: str, caption: str, graph: str, legend: str = "") -> str:
    return (
        f'<section><h2>{title}</h2><p class="soft small">{caption}</p>{graph}'
        f'<div class="legend">{legend}</div></section>'
    )


def _key(style: str, name: str) -> str:
    return f'<span><span class="key {style}"></span>{escape(name)}</span>'


def _first_token_html(result: Result) -> str:
    measurement, cold = result.measurement, result.measurement.cold_start
    limits_s = {limit.prompt_tokens: limit.limit_s for limit in result.target.budget.first_token}
    rows = []
    for length in measurement.prompt_lengths_tokens:
        firsts = tuple(g.first_token_s for g in measurement.generations(length))
        apart = (cold.first_token_s,) if cold and cold.prompt_tokens == length else ()
        label, limit = f"{length} tokens", limits_s.get(length)
        rows.append(plot.Row(label=label, samples=firsts, apart=apart, limit=limit))
    limits = ", ".join(f"{format_duration(s)} after {length}" for length, s in limits_s.items())
    graph = plot.dots(rows, plot.Frame(format=format_duration, title="Time to the first token"))
    legend = _key("one", "a generation") + _key("mark", "median")
    legend += _key("ring", "after a cold start, not judged") if cold else ""
    return _card("First token", f"by prompt length; limits: {limits}", graph, legend)


def _decoding_html(result: Result) -> str:
    measurement, limit = result.measurement, 1 / result.target.budget.decode_tokens_per_s
    series: list[plot.Line] = []
    legend = ""
    for length, style in zip(measurement.prompt_lengths_tokens, _STYLES, strict=False):
        name = f"after {length} tokens"
        series += _decode_lines(measurement.generations(length), name, style)
        legend += _key(style, name)
    graph = plot.lines(
        series,
        plot.Frame(
            format=format_duration,
            title="Time of each token",
            across="token of the answer",
            limit=limit,
        ),
    )
    caption = (
        f"median of all answers, and the band that holds 80&nbsp;% of them; the budget allows "
        f"{format_duration(limit)} a token"
    )
    return _card("Decoding, token by token", caption, graph, legend)


def _decode_lines(generations: Sequence[Generation], name: str, style: str) -> list[plot.Line]:
    columns = list(zip(*(g.decode_s for g in generations if g.decode_s), strict=False))
    high = [(index + 2, quantile(column, 0.9)) for index, column in enumerate(columns)]
    low = tuple(quantile(column, 0.1) for column in columns)
    middle = [(index + 2, statistics.median(column)) for index, column in enumerate(columns)]
    return [
        plot.Line(name=name, points=tuple(high), style=f"band-{style}", lower=low),
        plot.Line(name=name, points=tuple(middle), style=style),
    ]


def _memory_html(result: Result) -> str:
    series = []
    for index, repetition in enumerate(result.measurement.repetitions):
        points = repetition.memory_over_time
        faint = "" if index == 0 else "faint-"
        resident = tuple((point.time_s, point.resident_bytes) for point in points)
        kept = tuple((point.time_s, point.unreclaimable_bytes) for point in points)
        number = f"process {index + 1}"
        series.append(plot.Line(name=f"resident, {number}", points=resident, style=f"{faint}one"))
        series.append(plot.Line(name=f"private, {number}", points=kept, style=f"{faint}two"))
    limit = result.target.budget.peak_memory_bytes
    graph = plot.lines(
        series,
        plot.Frame(
            format=format_bytes,
            title="Memory over time",
            across="time since the process started",
            format_across=format_duration,
            limit=limit,
            unit=2**20,
        ),
    )
    legend = _key("one", "resident: what is judged, including the weights")
    legend += _key("two", "private: the part that only the process can free")
    caption = f"one line for each process; the budget allows {format_bytes(limit)}"
    return _card("Memory over time", caption, graph, legend)


def _order_html(result: Result) -> str:
    measurement = result.measurement
    series, legend = [], ""
    for length, style in zip(measurement.prompt_lengths_tokens, _STYLES, strict=False):
        rates = decode_rates(measurement.generations(length))
        spread = coefficient_of_variation(rates)
        points = tuple((float(index), rate) for index, rate in enumerate(rates, start=1))
        name = f"after {length} tokens, varies by {spread:.1%}"
        series.append(plot.Line(name=name, points=points, style=style))
        legend += _key(style, name)
    graph = plot.lines(
        series,
        plot.Frame(
            format=lambda value: f"{value:g}",
            title="Decode rate of each answer",
            across="answer, in order of time",
            limit=result.target.budget.decode_tokens_per_s,
        ),
    )
    caption = "tokens per second; a slope means a device that heats up or runs out of memory"
    return _card("Does the speed last?", caption, graph, legend)


def _rows_html(rows: Sequence[tuple[str, str]]) -> str:
    return "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>"
                   for name, value in rows if value)  # fmt: skip


def _describe_device(measurement: Measurement) -> list[tuple[str, str]]:
    environment = measurement.environment
    memory, page = environment.memory_bytes, environment.page_bytes
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items())
    return [
        ("device", measurement.device),
        ("model", environment.model or ""),
        ("processor", environment.cpu or ""),
        ("cores", str(environment.cores or "")),
        ("threads", str(measurement.workload.threads or "the runtime's choice")),
        ("memory", format_bytes(memory) if memory else ""),
        ("system", environment.system),
        ("page size", format_bytes(page) if page else ""),
        ("governor", environment.governor or ""),
        ("Python", environment.python or ""),
        ("packages", versions),
        *_describe_conditions(measurement),
    ]


def _describe_conditions(measurement: Measurement) -> list[tuple[str, str]]:
    conditions = [repetition.conditions for repetition in measurement.repetitions]
    delays = [c.run_delay_share for c in conditions if c.run_delay_share is not None]
    degrees = [c.temperature_max_c for c in conditions if c.temperature_max_c is not None]
    bits = [c.throttled_during for c in conditions if c.throttled_during is not None]
    faults = faults_per_token(measurement)
    merged = 0
    for each in bits:
        merged |= each & 0xF
    return [
        ("waiting for a core", f"{max(delays):.1%} at most" if delays else ""),
        ("major faults", "" if faults is None else f"{faults:.3g} per token after the warm-up"),
        ("highest temperature", f"{max(degrees):.0f} °C" if degrees else ""),
        ("throttling", (throttling_in_words(merged) or "none") if bits else ""),
    ]


def _describe_bundle(result: Result) -> list[tuple[str, str]]:
    bundle, cold = result.bundle, result.measurement.cold_start
    artifact = bundle.artifact
    rows = [
        ("model", bundle.model.name),
        ("adapter", bundle.model.adapter or ""),
        ("architecture", bundle.model.architecture),
        ("licence", bundle.model.licence or ""),
        ("format", f"{artifact.format}, {artifact.recipe}"),
        ("files", ", ".join(artifact.files)),
        ("size", f"{format_bytes(artifact.size_bytes)} ({artifact.size_bytes:,} bytes)"),
        ("context", f"{bundle.context_tokens} tokens"),
        ("exported for", bundle.target),
        ("artifact hash", result.measurement.artifact_sha256),
    ]
    if cold:
        share = cold.cached_before_load
        cached = "" if share is None else f", {share:.0%} of it cached"
        rows.append(("cold start", f"loads in {format_duration(cold.load_s)}{cached}"))
    return rows


def _prediction_html(result: Result) -> str:
    rows = [
        f"<tr><th>{escape(name)}</th><td class=end>{escape(predicted)}</td>"
        f"<td class=end>{escape(measured)}</td><td class=end>{escape(ratio)}</td></tr>"
        for name, predicted, measured, ratio in _predictions(result)
    ]
    if not rows:
        return ""
    return (
        "<section><h2>Prediction and measurement</h2>"
        f'<p class="soft small">what the plan estimated for {escape(_predicted_for(result))} '
        "before anything was converted</p><table><thead><tr><th></th>"
        "<th class=end>predicted</th>"
        "<th class=end>measured</th><th class=end>measured / predicted</th></tr></thead>"
        f"{''.join(rows)}</table></section>"
    )


def _predicted_for(result: Result) -> str:
    bundle, target = result.bundle, result.target
    return target.title if bundle.target == target.name else bundle.target


def _is_comparable(result: Result) -> bool:
    """Whether the machine that was measured may be one of those that the plan was made for."""
    is_same_target = result.bundle.target == result.target.name
    return is_same_target and not foreign_features(result.measurement, result.target)


def _predictions(result: Result) -> Iterator[tuple[str, str, str, str]]:
    """Yield name, prediction, measurement and their ratio, for people."""
    predictions, measured = result.bundle.predicted, measured_by_name(result)
    is_comparable = _is_comparable(result)
    for name, predicted in predictions.items():
        words, unit = _words_and_unit(name)
        if unit is None or name.endswith(("_low", "_high")):
            continue
        value = measured.get(name)
        ratio = f"{value / predicted:.2f}" if value is not None and predicted else ""
        if ratio and name != "artifact_bytes" and not is_comparable:
            ratio += ", measured on another kind of device"
        expected = format_value(predicted, unit)
        if (low := predictions.get(f"{name}_low")) and (high := predictions.get(f"{name}_high")):
            expected += f" ({format_value(low, unit)} to {format_value(high, unit)})"
        yield words, expected, "" if value is None else format_value(value, unit), ratio


def measured_by_name(result: Result) -> dict[str, float]:
    """Return what was measured under the names that a plan predicts."""
    measurement = result.measurement
    metric = judged_metric(measurement)
    peaks = measurement.memory_peaks_bytes(metric) if metric else ()
    values: dict[str, Any] = {
        "artifact_bytes": result.bundle.artifact.size_bytes,
        "peak_memory_bytes": max(peaks, default=None),
        "load_s": statistics.median(measurement.load_s) if measurement.load_s else None,
    }
    for length in reversed(measurement.prompt_lengths_tokens):  # the shortest gives the rate
        done = measurement.generations(length)
        rates, firsts = decode_rates(done), [g.first_token_s for g in done]
        values["decode_tokens_per_s"] = statistics.median(rates) if rates else None
        values[f"first_token_s_after_{length}"] = statistics.median(firsts) if firsts else None
    return {name: float(value) for name, value in values.items() if value is not None}


def _words_and_unit(name: str) -> tuple[str, Unit | None]:
    """Split ``"first_token_s_after_128"`` into words and its unit; None if it names no unit."""
    units: dict[str, Unit] = {
        "tokens_per_s": "tokens/s", "bytes": "bytes", "tokens": "tokens", "s": "s",
    }  # fmt: skip
    parts = re.fullmatch(r"(.+?)_(tokens_per_s|bytes|tokens|s)(_.+)?", name)
    if parts is None:
        return name, None
    return f"{parts[1]}{parts[3] or ''}".replace("_", " "), units[parts[2]]


def _proof_html(bundle: Bundle) -> str:
    if bundle.agreement is None:
        return ""
    rows = [
        f'<tr class="{"pass" if gate.passed else "fail"}"><th>{escape(gate.name)}</th>'
        f'<td>{escape(gate.finding)}</td><td class=end><span class="chip">'
        f"{_WORDS['pass' if gate.passed else 'fail']}</span></td></tr>"
        for gate in bundle.agreement.gates
    ]
    return (
        "<section><h2>Proof against the checkpoint</h2>"
        '<p class="soft small">made when the bundle was exported, in its real runtime</p>'
        f"<table>{''.join(rows)}</table></section>"
    )
