import dataclasses
import json
import typing
from importlib import resources

import jsonschema
import pytest

from edgekit import installed
from edgekit.errors import BundleError, MissingDependencyError, ToolchainError, UsageError
from edgekit.measuring import measure, measurement
from edgekit.measuring.devices import Finished, ThisMachine
from edgekit.measuring.machine import Machine
from edgekit.measuring.measure import measure_bundle, prompt_ids
from edgekit.measuring.measurement import Measurement, Workload
from edgekit.tests.tiny import pretend_format
from edgekit.tests.tiny.measurements import make_measurement


WORKLOAD = Workload(
    prompt_lengths_tokens=(4, 8), answer_tokens=6, context_tokens=64, generations=3, threads=1
)


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    """A bundle of the pretend format, which every new process on this machine can open."""
    pretend_format.use(tmp_path / "place", monkeypatch)
    return pretend_format.make_bundle(tmp_path / "bundle")


@pytest.fixture(scope="module")
def schema():
    text = (resources.files("edgekit") / "schemas/measurement.schema.json").read_text("utf-8")
    return json.loads(text)


@pytest.mark.toolchain
def test_every_repetition_is_a_fresh_process_and_every_sample_is_kept(bundle, schema):
    steps = []

    found = measure_bundle(
        bundle,
        ThisMachine(),
        WORKLOAD,
        repetitions=2,
        progress=lambda done, total: steps.append((done, total)),
    )

    assert steps == [(0, 2), (0, 2), (1, 2), (2, 2)]
    assert len(found.load_s) == 2
    for length in (4, 8):
        generations = found.generations(length)
        assert len(generations) == 2 * 3
        assert all(len(g.decode_s) == len(g.decode_cpu_s or ()) == 6 - 1 for g in generations)
    assert found.cold_start is not None
    assert found.cold_start.load_s > 0
    assert min(found.memory_peaks_bytes("working_set")) > 2**20
    assert Measurement.from_json(found.to_json()) == found
    jsonschema.validate(json.loads(found.to_json()), schema)


@pytest.mark.toolchain
def test_a_device_without_the_runtime_names_the_line_to_run_there(bundle, monkeypatch):
    monkeypatch.setenv("PRETEND_MOOD", "no runtime")

    with pytest.raises(MissingDependencyError, match="this machine: pretend_runtime") as caught:
        measure_bundle(bundle, ThisMachine(), WORKLOAD)

    assert "-m pip install '" in caught.value.hint


@pytest.mark.toolchain
def test_a_process_killed_for_want_of_memory_is_a_finding_and_the_last(bundle, monkeypatch):
    monkeypatch.setenv("PRETEND_MOOD", "no memory")

    found = measure_bundle(bundle, ThisMachine(), WORKLOAD, repetitions=3)

    assert found.repetitions == ()
    assert found.deaths == (
        "the cold start was killed, as the system does when memory runs out",
    )  # fmt: skip


@pytest.mark.toolchain
@pytest.mark.parametrize(
    ("mood", "words", "log"),
    [("old processor", "illegal instruction", ""), ("crash", "status 1", "a foreign bug")],
)
def test_a_process_that_dies_otherwise_is_an_error_with_its_log(
    bundle, monkeypatch, mood, words, log
):
    monkeypatch.setenv("PRETEND_MOOD", mood)

    with pytest.raises(ToolchainError, match=words) as caught:
        measure_bundle(bundle, ThisMachine(), WORKLOAD)

    assert log in caught.value.log


@pytest.mark.toolchain
def test_one_repetition_can_be_run_by_hand(bundle, capsys):
    workload = json.dumps(dataclasses.asdict(WORKLOAD))

    status = measure.main([str(bundle.directory), "--workload", workload])

    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert status == 0
    assert len(answer["repetition"]["generations"]) == 2 * 3


def test_a_refusal_on_the_device_is_one_line_of_json(tmp_path, capsys):
    status = measure.main([str(tmp_path), "--environment"])

    error = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert status == error["exit_status"] == BundleError.exit_status
    assert "is not a bundle" in error["message"]


def test_a_bundle_with_a_changed_byte_is_found_by_check(bundle, capsys):
    assert measure.main([str(bundle.directory), "--check"]) == 0

    weights = bundle.artifact_path.read_bytes()
    bundle.artifact_path.write_bytes(b"!" + weights[1:])

    assert measure.main([str(bundle.directory), "--check"]) == BundleError.exit_status
    assert "SHA-256" in capsys.readouterr().out


def test_a_device_that_says_nothing_is_an_error(bundle):
    class Mute(ThisMachine):
        def run_module(self, *_):
            return Finished(status=0, output="hello\n", log="")

    with pytest.raises(ToolchainError, match="ended with status 0"):
        measure_bundle(bundle, Mute(), WORKLOAD)


@pytest.mark.parametrize("vocabulary_tokens", [64, 49152, 151936])
def test_prompt_ids_keep_away_from_both_ends_of_the_vocabulary(vocabulary_tokens):
    ids = prompt_ids(vocabulary_tokens, vocabulary_tokens // 2)

    assert min(ids) == vocabulary_tokens // 4
    assert max(ids) < 3 * vocabulary_tokens // 4
    assert len(set(ids)) == len(ids)
    assert ids[:10] == prompt_ids(vocabulary_tokens, 10)


def test_the_hash_of_an_artifact_covers_names_and_contents(bundle):
    artifact = bundle.artifact
    renamed = dataclasses.replace(artifact, files={"other.bin": artifact.files["model.bin"]})

    assert measure.artifact_sha256(artifact) != measure.artifact_sha256(renamed)
    assert len(measure.artifact_sha256(artifact)) == 64


def test_the_shipped_schema_knows_every_field_and_requires_the_same_ones(schema):
    for name, described in [("Measurement", schema), *schema["$defs"].items()]:
        fields = dataclasses.fields(getattr(measurement, name))
        required = {field.name for field in fields if field.default is dataclasses.MISSING}
        extra = {"schema_version"} if name == "Measurement" else set()
        assert set(described["properties"]) == {field.name for field in fields} | extra
        assert set(described["required"]) == required | extra
    metrics = schema["$defs"]["Repetition"]["properties"]["memory_peaks_bytes"]["properties"]
    assert tuple(metrics) == typing.get_args(measurement.MemoryMetric)
    assert schema["properties"]["schema_version"]["const"] == measurement.SCHEMA_VERSION


def test_a_runner_outside_linux_can_leave_out_what_it_does_not_know(schema):
    document = json.loads(make_measurement(metric="phys_footprint").to_json())
    document["environment"] |= dict.fromkeys(["model", "page_bytes", "governor", "python"])
    document["environment"] |= {"system": "iOS 18.5", "cpu_features": [], "versions": {}}
    for repetition in document["repetitions"]:
        repetition |= {"conditions": {}, "memory_over_time": [], "cached_before_load": None}
        for generation in repetition["generations"]:
            del generation["decode_cpu_s"], generation["major_faults"]
    document.pop("cold_start")

    jsonschema.validate(document, schema)
    assert Measurement.from_json(json.dumps(document)).environment.system == "iOS 18.5"


def _broken(**change):
    return json.loads(make_measurement().to_json()) | change


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (_broken(schema_version=2), "schema 2, this edgekit reads 1"),
        (_broken(device=7), "the measurement: device = 7, expected text"),
        (_broken(battery=1), "unknown field 'battery'"),
        (_broken(workload={"answer_tokens": 1}), "workload has no field 'context_tokens'"),
        (_broken(repetitions="none"), "repetitions = 'none', expected a list"),
        (_broken(cold_start={
            "load_s": -1, "first_token_s": 1, "prompt_tokens": 1, "cached_before_load": None,
        }), "load_s = -1, expected a finite number of at least 0"),
        ([], "holds a list, expected an object"),
    ],
)  # fmt: skip
def test_a_document_that_breaks_the_schema_is_refused_by_name(document, words):
    with pytest.raises(UsageError, match=words):
        Measurement.from_json(json.dumps(document))


def test_a_metric_that_nobody_defined_is_refused():
    document = json.loads(make_measurement().to_json())
    document["repetitions"][0]["memory_peaks_bytes"] = {"feeling": 1}

    with pytest.raises(UsageError, match=r"repetitions\[0\].memory_peaks_bytes .*'feeling'"):
        Measurement.from_json(json.dumps(document))


def test_frost_is_no_error():
    conditions = dataclasses.replace(
        make_measurement().repetitions[0].conditions, temperature_max_c=-5.0
    )
    cold = make_measurement(conditions=conditions)

    assert Measurement.from_json(cold.to_json()) == cold


@pytest.mark.parametrize("quote", ["'", '"'])
def test_requirements_of_an_extra_are_those_of_the_package(monkeypatch, quote):
    lines = ["click>=8", f"numpy>=1.26 ; extra == {quote}run-gguf{quote}", "x; extra == 'serve'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda _: lines)

    assert installed.requirements_of("run-gguf") == ["numpy>=1.26"]
    assert installed.requirements_of("run-onnx") == ["edgekit[run-onnx]"]


def test_the_environment_of_a_machine_names_the_versions_that_take_part(bundle):
    found = measure._describe(bundle.directory, Machine())

    assert set(found.versions) >= {"edgekit"}
    assert found.cores
