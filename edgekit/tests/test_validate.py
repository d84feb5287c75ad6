import dataclasses

import pytest

from edgekit.cli import main
from edgekit.errors import BundleError, UsageError
from edgekit.measuring import measure
from edgekit.measuring.devices import ThisMachine
from edgekit.target import FirstTokenLimit
from edgekit.tests.tiny import pretend_format
from edgekit.tests.tiny.measurements import ENVIRONMENT, STEADY_S, make_measurement
from edgekit.validate import judge_document, plan_workload, validate


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    pretend_format.use(tmp_path / "place", monkeypatch)
    return pretend_format.make_bundle(tmp_path / "bundle")


@pytest.mark.toolchain
def test_a_bundle_that_misses_its_budget_fails(bundle):
    target = pretend_format.make_target(artifact_bytes=1000)

    result = validate(bundle.directory, target, repetitions=1)

    assert result.verdict.outcome == "fail"
    assert result.measurement.artifact_sha256 == measure.artifact_sha256(bundle.artifact)
    assert result.measurement.workload.prompt_lengths_tokens == (8,)


@pytest.mark.toolchain
def test_a_device_without_enough_memory_fails_and_is_measured_no_further(bundle, monkeypatch):
    monkeypatch.setenv("PRETEND_MOOD", "no memory")

    result = validate(bundle.directory, pretend_format.make_target(), repetitions=2)

    assert result.verdict.outcome == "fail"
    assert len(result.measurement.deaths) == 1


@pytest.mark.toolchain
def test_a_device_is_asked_once_what_it_is(bundle, monkeypatch):
    started = []

    def run_module(self, module, arguments, real=ThisMachine.run_module):
        started.append(next(word for word in arguments if word.startswith("--")))
        return real(self, module, arguments)

    monkeypatch.setattr(ThisMachine, "run_module", run_module)
    target = pretend_format.make_target(artifact_bytes=1000)
    validate(bundle.directory, target, repetitions=2)
    assert started == ["--environment", "--workload", "--workload", "--workload"]


def test_a_damaged_bundle_is_refused_before_anything_is_measured(bundle):
    bundle.artifact_path.write_bytes(b"!" * bundle.artifact.size_bytes)

    with pytest.raises(BundleError, match="SHA-256"):
        validate(bundle.directory, pretend_format.make_target())


def test_no_repetitions_are_refused(bundle):
    with pytest.raises(UsageError, match="0 repetitions"):
        validate(bundle.directory, pretend_format.make_target(), repetitions=0)


@pytest.fixture
def samples_s():
    return STEADY_S * 4


@pytest.fixture
def counted(monkeypatch, samples_s):
    """Replaces the slow part by made-up repetitions; counts how many were asked for."""
    asked = []

    def add(measurement, bundle, device, *, count, progress=None):
        asked.append(count)
        total = len(measurement.repetitions) + count
        samples = samples_s[: 2 * total]
        made = make_measurement(first_token_s=samples, token_s=samples)
        return dataclasses.replace(measurement, repetitions=made.repetitions)

    monkeypatch.setattr(measure, "environment_of", lambda *_: ENVIRONMENT)
    monkeypatch.setattr(measure, "_start_cold", lambda measurement, *_: measurement)
    monkeypatch.setattr(measure, "add_repetitions", add)
    return asked


def test_what_is_clear_is_not_measured_again(bundle, counted):
    result = validate(bundle.directory, pretend_format.make_target())

    assert counted == [5]
    assert result.verdict.outcome == "pass"


@pytest.mark.parametrize("samples_s", [(0.0995, 0.1005) * 20])
def test_what_chance_left_open_is_measured_again_up_to_forty_samples(bundle, counted):
    """Half of the samples stay on each side of the limit, however many there are."""
    limit = FirstTokenLimit(prompt_tokens=8, limit_s=0.1)

    result = validate(bundle.directory, pretend_format.make_target(first_token=(limit,)))

    assert counted == [5, 5, 10]
    assert result.verdict.outcome == "unstable"


def test_too_few_repetitions_are_topped_up(bundle, counted):
    result = validate(bundle.directory, pretend_format.make_target(), repetitions=1)

    assert counted == [1, 1, 2, 4]
    assert result.verdict.outcome == "pass"


@pytest.mark.parametrize(
    ("cores", "asked", "threads"), [(2, None, 2), (8, None, 4), (None, None, 4), (3, 3, 3)]
)
def test_threads_are_the_targets_but_no_more_than_cores(bundle, cores, asked, threads):
    environment = dataclasses.replace(ENVIRONMENT, cores=cores)
    target = pretend_format.make_target()
    assert target.decode_threads == 4

    workload = plan_workload(bundle, target, environment, threads=asked)

    assert workload.threads == threads


@pytest.mark.parametrize("asked", [-5, 0, 3, 100_000])
def test_threads_beyond_the_devices_cores_are_refused(bundle, asked):
    environment = dataclasses.replace(ENVIRONMENT, cores=2)

    with pytest.raises(UsageError, match=f"^{asked} threads are not possible on 2 cores"):
        plan_workload(bundle, pretend_format.make_target(), environment, threads=asked)


def test_prompts_that_do_not_fit_the_context_are_left_out(bundle):
    limits = tuple(FirstTokenLimit(prompt_tokens=n, limit_s=1.0) for n in (8, 56, 57))

    workload = plan_workload(bundle, pretend_format.make_target(first_token=limits), ENVIRONMENT)

    assert workload.prompt_lengths_tokens == (8, 56)


def test_a_context_that_holds_no_prompt_is_refused(bundle):
    target = pretend_format.make_target(answer_tokens=60)

    with pytest.raises(UsageError, match="is too short for the budget") as caught:
        plan_workload(bundle, target, ENVIRONMENT)
    assert "--context 64" in caught.value.hint


def test_a_phone_measures_and_edgekit_judges(bundle, tmp_path):
    sha256 = measure.artifact_sha256(bundle.artifact)
    document = tmp_path / "phone.json"
    document.write_text(make_measurement(artifact_sha256=sha256, device="iPhone 16").to_json())

    result = judge_document(bundle.directory, pretend_format.make_target(), document)

    assert result.verdict.outcome == "pass"
    assert result.measurement.device == "iPhone 16"


def test_the_command_judges_what_a_phone_measured(bundle, tmp_path, capsys):
    sha256 = measure.artifact_sha256(bundle.artifact)
    document = tmp_path / "phone.json"
    document.write_text(make_measurement(artifact_sha256=sha256, device="iPhone 16").to_json())

    with pytest.raises(SystemExit) as ended:
        main(["validate", str(bundle.directory), "--target", "iphone-8gb",
              "--measurement", str(document)])  # fmt: skip

    assert ended.value.code == 3  # over budget
    assert "FAIL: 2 checks are over budget: context and decoding" in capsys.readouterr().out


def test_a_measurement_of_another_artifact_is_refused(bundle, tmp_path):
    document = tmp_path / "phone.json"
    document.write_text(make_measurement().to_json())

    with pytest.raises(UsageError, match="another artifact"):
        judge_document(bundle.directory, pretend_format.make_target(), document)


def test_a_measurement_that_is_not_there_is_refused(bundle, tmp_path):
    with pytest.raises(UsageError, match="is missing"):
        judge_document(bundle.directory, pretend_format.make_target(), tmp_path / "none.json")


@pytest.mark.toolchain
def test_a_real_artifact_is_measured_in_its_real_runtime(tmp_path):
    pytest.importorskip("llama_cpp")
    from edgekit.export import export
    from edgekit.tests.tiny.checkpoints import write_tiny_checkpoint

    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint", "llama")
    target = pretend_format.make_target()
    bundle = export(
        checkpoint, target, quant="Q8_0", context_tokens=64, out=tmp_path / "out", verify=False
    )

    result = validate(bundle.directory, target, repetitions=1, threads=1)

    assert result.verdict.outcome == "unstable"
    assert any("without verification" in doubt for doubt in result.verdict.doubts)
    assert len(result.measurement.generations(8)) == 2
    assert [check.outcome for check in result.verdict.checks[:2]] == ["pass"] * 2
    assert min(result.measurement.memory_peaks_bytes("working_set")) > bundle.artifact.size_bytes
