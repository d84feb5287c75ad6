import dataclasses
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import pytest

from edgekit.measuring import plot, report
from edgekit.measuring.measurement import Measurement
from edgekit.measuring.report import Result
from edgekit.measuring.verdict import judge
from edgekit.tests.tiny.measurements import STEADY_S, make_measurement
from edgekit.tests.tiny.pretend_format import make_bundle, make_target
from edgekit.tests.witnesses import javascript_clients


HOSTILE = "</title><script>alert('ü & \x07\u202e')</script>"


@pytest.fixture
def bundle(tmp_path):
    return make_bundle(tmp_path / "bundle")


def result_of(bundle, measurement=None, **limits):
    measurement, target = measurement or make_measurement(), make_target(**limits)
    verdict = judge(measurement, bundle, target)
    return Result(bundle=bundle, target=target, measurement=measurement, verdict=verdict)


def test_the_table_says_what_was_measured_and_what_is_allowed(bundle):
    lines = report.as_text(result_of(bundle, decode_tokens_per_s=4.0)).splitlines()

    row = next(line for line in lines if line.startswith("decoding after 8"))
    assert row.split() == [
        "decoding", "after", "8", "10", "tokens/s", "9.9", "tokens/s", ">=", "4", "tokens/s",
        "40%", "pass",
    ]  # fmt: skip
    assert lines[-1] == "PASS: All 6 checks are within budget and stable."


def test_the_table_ends_with_doubts_and_the_outcome(bundle):
    measurement = make_measurement(doubts=("it was too warm",))

    text = report.as_text(result_of(bundle, measurement))

    assert "doubt: it was too warm" in text
    assert text.splitlines()[-1].startswith("UNSTABLE: No check is over budget, but")


def test_a_miss_is_named(bundle):
    result = result_of(bundle, artifact_bytes=1, load_s=0.001)

    assert report.summarize(result) == "2 checks are over budget: artifact and load."


def test_the_json_holds_the_verdict_and_the_whole_measurement(bundle):
    result = result_of(bundle)

    document = json.loads(report.as_json(result))

    assert document["schema_version"] == 1
    assert document["outcome"] == "pass"
    assert [check["name"] for check in document["checks"]][:3] == [
        "artifact", "context", "peak memory",
    ]  # fmt: skip
    assert document["checks"][-1]["statistics"]["p90"] == pytest.approx(1 / 0.099)
    assert document["checks"][0]["statistics"] is None
    again = Measurement.from_json(json.dumps(document["measurement"]))
    assert again == result.measurement


def suite_of(result):
    return ET.fromstring(report.as_junit(result))[0]  # noqa: S314  # our own


def failures_of(suite, name):
    return [failure.get("type") for failure in suite.iterfind(f"testcase[@name='{name}']/failure")]


def test_junit_has_a_case_for_each_check_and_no_green_for_an_unclear_one(bundle):
    noisy = [0.1, 0.2] * 5
    result = result_of(
        bundle, make_measurement(token_s=noisy), artifact_bytes=1, decode_tokens_per_s=4.0
    )

    suite = suite_of(result)

    assert failures_of(suite, "artifact") == ["fail"]
    assert failures_of(suite, "decoding after 8") == ["unstable"]
    assert failures_of(suite, "peak memory") == []
    assert suite.get("tests") == str(len(suite)) == "7"
    assert suite.get("failures") == "2"


def test_junit_shows_doubts_as_a_failure(bundle):
    result = result_of(bundle, make_measurement(doubts=("too warm",)))

    suite = suite_of(result)

    assert failures_of(suite, "trustworthy measurement") == ["unstable"]
    assert [failure.get("message") for failure in suite.iter("failure")] == ["too warm"]


@pytest.fixture
def short(bundle):
    """Two samples of a time and one process, and a doubt."""
    two = STEADY_S[:2]
    return result_of(bundle, make_measurement(doubts=("too warm",), first_token_s=two, token_s=two))


def test_what_was_measured_too_rarely_is_told_and_not_called_nothing(short):
    page = report.as_html(short)

    assert "nothing measured" not in page
    assert "median 100 ms, 2 samples; too few for a confidence bound" in page
    messages = [failure.get("message") for failure in suite_of(short).iter("failure")]
    assert len(messages) == 5
    assert not any("n/a" in message for message in messages)
    assert any(message.startswith("first token after 8: median 100 ms") for message in messages)


def test_where_nothing_was_measured_that_is_said(bundle):
    nothing = make_measurement(first_token_s=(), token_s=())

    assert "nothing measured" in report.as_html(result_of(bundle, nothing))
    assert "load: nothing measured" in report.as_junit(result_of(bundle, nothing))


ELSEWHERE = "measured on another kind of device"


def test_a_prediction_is_not_compared_with_another_machine_without_a_remark(bundle):
    result = result_of(bundle)
    board = dataclasses.replace(result.target, cpu_features=("asimd",))
    server = dataclasses.replace(result.measurement.environment, cpu_features=("avx2",))
    measurement = make_measurement(environment=server)

    here = report.as_html(dataclasses.replace(result, target=board))
    there = report.as_html(dataclasses.replace(result, target=board, measurement=measurement))

    assert ELSEWHERE not in here
    assert there.count(ELSEWHERE) == 1  # of the memory; the size of the artifact is the same


def test_a_prediction_for_another_target_is_told_as_such(bundle):
    other = dataclasses.replace(bundle, target="iphone-8gb")

    page = report.as_html(result_of(other))

    assert "what the plan estimated for iphone-8gb before" in page
    assert ELSEWHERE in page


@pytest.mark.toolchain
def test_the_page_fits_a_phone(short, tmp_path):
    javascript_clients.need_browser()
    predicted = {"decode_tokens_per_s": 12.0, "decode_tokens_per_s_low": 8.0,
                 "decode_tokens_per_s_high": 15.0}  # fmt: skip
    bundle = dataclasses.replace(short.bundle, predicted=predicted)
    page = report.as_html(dataclasses.replace(short, bundle=bundle))
    (tmp_path / "report.html").write_text(page, encoding="utf-8")

    visit = javascript_clients.run_page("report_width.mjs", {"width": 390}, directory=tmp_path)

    assert visit.answer["wide"] == []
    assert visit.answer["scrollWidth"] <= 390


@pytest.fixture
def hostile(bundle):
    model = dataclasses.replace(bundle.model, name=HOSTILE, licence=HOSTILE)
    bundle = dataclasses.replace(bundle, model=model, target=HOSTILE)
    environment = dataclasses.replace(make_measurement().environment, cpu=HOSTILE, model=HOSTILE)
    measurement = make_measurement(
        doubts=(HOSTILE,), device=HOSTILE, environment=environment, deaths=(HOSTILE,)
    )
    return result_of(bundle, measurement)


def test_names_are_escaped_wherever_they_appear(hostile):
    page = report.as_html(hostile)

    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 6
    assert not {"\x07", "\u202e"} & {*page, *report.as_text(hostile)}
    assert len(suite_of(hostile)) == 7
    json.loads(report.as_json(hostile))


class _Balance(HTMLParser):
    """Checks that tags are closed in order, and remembers what they would fetch."""

    VOID = frozenset({"meta", "br"})

    def __init__(self):
        super().__init__()
        self.open, self.links = [], []

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in {"src", "href", "xlink:href"}]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_fetches_nothing(bundle):
    page = report.as_html(result_of(bundle))

    parser = _Balance()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    assert parser.links == []
    assert "url(" not in page
    assert "http" not in re.sub(r"http-equiv", "", page)
    assert page.count("<svg") == 4 + 6  # four plots, a bar for each check


def test_the_page_tells_the_outcome_the_limits_and_the_prediction(bundle):
    page = report.as_html(result_of(bundle))

    assert '<div class="seal pass">' in page
    assert "42.9 MiB" in page  # predicted peak, 45e6 bytes
    assert "mean KL 0.001" in page


def test_a_page_without_any_repetition_is_still_a_page(bundle):
    nothing = make_measurement(first_token_s=(), token_s=(), deaths=("the cold start was killed",))

    page = report.as_html(result_of(bundle, nothing))

    assert '<div class="seal fail">' in page
    assert "the cold start was killed" in page


def test_an_unproven_bundle_has_no_proof_on_its_page(tmp_path):
    page = report.as_html(result_of(make_bundle(tmp_path / "unproven", is_proven=False)))

    assert "Proof against the checkpoint" not in page
    assert "without verification" in page


@pytest.mark.parametrize(
    ("direction", "value", "used"), [("at most", 50.0, 0.5), ("at least", 200.0, 0.5)]
)
def test_the_share_of_a_budget_reads_alike_in_both_directions(bundle, direction, value, used):
    check = dataclasses.replace(
        result_of(bundle).verdict.checks[0], direction=direction, limit=100.0
    )

    assert report.budget_used(check, value) == used
    assert report.budget_used(check, None) is None


@pytest.mark.parametrize(
    ("high", "unit", "marks"),
    [
        (1.0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (73.0, 1, [0, 20, 40, 60, 80]),
        (4.1e-3, 1, [0, 1e-3, 2e-3, 3e-3, 4e-3, 5e-3]),
        (3 * 2**20, 2**20, [0, 2**20, 2 * 2**20, 3 * 2**20]),
    ],
)
def test_axis_marks_are_round_and_reach_the_highest_value(high, unit, marks):
    assert plot.ticks(0, high, unit=unit) == pytest.approx(marks)


def test_an_axis_for_nothing_but_zeros_has_two_ends():
    low, high = plot.ticks(0, 0)

    assert low == 0 < high


def test_a_limit_far_away_does_not_squeeze_the_samples():
    near, far = (
        plot.dots(
            [plot.Row(label="8", samples=STEADY_S, limit=limit)],
            plot.Frame(title="t", format="{:.2f}".format),
        )
        for limit in (0.24, 9.0)
    )

    assert 'class="limit"' in near
    assert ">0.25<" in near  # the axis goes that far
    assert 'class="limit"' not in far
    assert ">0.25<" not in far


def test_a_bar_that_misses_goes_past_the_line_and_stays_inside():
    graph = plot.bar(9.0, [9.0], "fail", "x")

    assert 'class="used fail" width="400.0"' in graph
    assert 'd="M300 ' in graph  # the line
