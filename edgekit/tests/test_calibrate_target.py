"""A target file fitted to what a device measured."""

import json
from dataclasses import replace

import pytest

from edgekit import target
from edgekit.calibrate_target import calibrate_target
from edgekit.cli import main
from edgekit.errors import UsageError
from edgekit.export import _predicted
from edgekit.plan import Choice, make
from edgekit.source import opening
from edgekit.target import Target
from edgekit.tests.needs import needs
from edgekit.tests.tiny.measurements import make_measurement


PI = "raspberry-pi-5-8gb"
pytestmark = needs("tokenizers")


def plan_for(where, quant):
    shape = opening.open_shape("SmolLM2-135M")
    assert shape is not None
    return make(shape, where, Choice(format="gguf", quant=quant))


def report(path, *, quant, device):
    """Write what validate would of a bundle for a Pi on a device that keeps to its own plan."""
    planned, real = plan_for(target.load(PI), quant), plan_for(device, quant).estimate
    document = json.loads(make_measurement().to_json())
    lengths = sorted(real.first_token_s)
    document["workload"]["prompt_lengths_tokens"] = lengths
    for repetition in document["repetitions"]:
        for length, it in zip(lengths, repetition["generations"], strict=True):
            it["prompt_tokens"] = length
            it["decode_s"] = [1 / real.decode_tokens_per_s.likely] * len(it["decode_s"])
            it["first_token_s"] = real.first_token_s[length].likely
    path.write_text(
        json.dumps(
            {
                "bundle": {
                    "model": "SmolLM2-135M", "format": "gguf", "recipe": quant, "target": PI,
                    "predicted": _predicted(planned),
                },
                "target": {"name": PI},
                "measurement": document,
            }
        )
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def device():
    """A board of another speed than a Pi: decoding 1.4 times, prompts 0.6 times as fast."""
    pi = target.load(PI)
    return replace(
        pi,
        decode_bandwidth_bytes_per_s=1.4 * pi.decode_bandwidth_bytes_per_s,
        prefill_flop_per_s=0.6 * pi.prefill_flop_per_s,
    )


@pytest.fixture(scope="module")
def reports(device, tmp_path_factory):
    place = tmp_path_factory.mktemp("reports")
    return [report(place / f"{quant}.json", quant=quant, device=device) for quant in QUANTS]


QUANTS = ("Q8_0", "Q4_0")


def test_the_figures_of_a_device_are_found_again(reports, device, tmp_path):
    fit = calibrate_target(reports, title='My "board"')
    (tmp_path / "board.toml").write_text(fit.text)
    found = Target.from_file(tmp_path / "board.toml")
    assert found.decode_bandwidth_bytes_per_s == pytest.approx(
        device.decode_bandwidth_bytes_per_s, rel=0.02
    )
    assert found.prefill_flop_per_s == pytest.approx(device.prefill_flop_per_s, rel=0.02)
    assert found.title == 'My "board"'
    assert found.aliases == ()
    assert found.budget == target.load(PI).budget
    origin = found.origins["decode_bandwidth_bytes_per_s"]
    assert origin.basis == "measured"
    assert "SmolLM2-135M gguf Q4_0" in (origin.note or "")


def test_a_plan_with_the_fitted_file_says_what_the_device_did(reports, device, tmp_path):
    (tmp_path / "board.toml").write_text(calibrate_target(reports).text)
    board = Target.from_file(tmp_path / "board.toml")
    for quant in QUANTS:
        again, real = plan_for(board, quant).estimate, plan_for(device, quant).estimate
        assert again.decode_tokens_per_s.likely == pytest.approx(
            real.decode_tokens_per_s.likely, rel=0.03
        )


def test_how_far_the_fit_is_from_each_bundle_is_told(reports, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["calibrate-target", *map(str, reports)])
    said = capsys.readouterr()
    assert exit_.value.code == 0
    assert said.err.count("than what was measured") == len(reports)
    assert said.out.startswith("title = ") or "\ntitle = " in said.out


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda it: it.pop("bundle"), "no report of `edgekit validate`"),
        (lambda it: it["bundle"].update(target="raspberry-pi-4-4gb"), "made for raspberry-pi-4"),
        (lambda it: it["bundle"]["predicted"].clear(), "no rate of decoding"),
        (lambda it: it["bundle"].update(predicted={"decode_tokens_per_s": "fast"}), "a number"),
        (lambda it: it["measurement"].pop("repetitions"), "repetitions"),
        (lambda it: (it["target"].update(name="x"), it["bundle"].update(target="x")), "no target"),
    ],
)
def test_what_cannot_be_fitted_is_refused(change, reason, reports, tmp_path):
    document = json.loads(reports[0].read_text())
    change(document)
    (tmp_path / "bad.json").write_text(json.dumps(document))
    with pytest.raises(UsageError, match=reason):
        calibrate_target([tmp_path / "bad.json"])


def test_reports_of_two_targets_are_refused(reports, tmp_path):
    document = json.loads(reports[0].read_text())
    document["target"]["name"] = document["bundle"]["target"] = "raspberry-pi-4-4gb"
    (tmp_path / "other.json").write_text(json.dumps(document))
    with pytest.raises(UsageError, match="different targets"):
        calibrate_target([*reports, tmp_path / "other.json"])
    with pytest.raises(UsageError, match="needs reports"):
        calibrate_target([])


def test_a_device_faster_than_its_memory_is_a_contradiction(tmp_path):
    pi = target.load(PI)
    impossible = replace(pi, decode_bandwidth_bytes_per_s=9 * pi.memory_bandwidth_bytes_per_s)
    path = report(tmp_path / "r.json", quant="Q8_0", device=impossible)
    with pytest.raises(UsageError, match=r"contradicts the target: .*memory_bandwidth"):
        calibrate_target([path])


def test_a_file_of_ones_own_is_named(reports, tmp_path):
    text = target.path_of(PI).read_text()
    (tmp_path / f"{PI}.toml").write_text(text.replace("Raspberry Pi 5, 8 GB", "Mine"))
    fit = calibrate_target(reports, target=tmp_path / f"{PI}.toml")
    assert 'title = "Mine"' in fit.text
    (tmp_path / "other.toml").write_text(text)
    with pytest.raises(UsageError, match="and not of other"):
        calibrate_target(reports, target=tmp_path / "other.toml")
