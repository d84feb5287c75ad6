import dataclasses
from types import SimpleNamespace

import pytest

from edgekit import formats
from edgekit.browser.gpu import Gpu
from edgekit.formats import BrowserMemory, GpuBuffer
from edgekit.measuring.measurement import Answers, BrowserEnvironment, BrowserRun, Conditions
from edgekit.measuring.verdict import judge
from edgekit.target import FirstTokenLimit
from edgekit.tests.tiny.measurements import ENVIRONMENT, QUIET, STEADY_S, make_measurement
from edgekit.tests.tiny.pretend_format import make_bundle, make_target


LIMITS = {
    "first_token": (FirstTokenLimit(prompt_tokens=8, limit_s=0.2),),
    "decode_tokens_per_s": 5.0,
}


@pytest.fixture
def bundle(tmp_path):
    return make_bundle(tmp_path / "bundle")


def verdict_of(bundle, measurement=None, **limits):
    return judge(measurement or make_measurement(), bundle, make_target(**(LIMITS | limits)))


def check(verdict, name):
    return next(check for check in verdict.checks if check.name.startswith(name))


def test_a_steady_measurement_inside_the_budget_passes(bundle):
    verdict = verdict_of(bundle)

    assert verdict.outcome == "pass"
    assert verdict.exit_status == 0
    assert check(verdict, "decoding").measured == pytest.approx(10)


def test_the_artifact_is_judged_to_the_byte(bundle):
    size = bundle.artifact.size_bytes

    assert verdict_of(bundle, artifact_bytes=size).outcome == "pass"
    assert verdict_of(bundle, artifact_bytes=size - 1).outcome == "fail"


def test_one_process_above_the_memory_budget_is_a_miss(bundle):
    measurement = make_measurement()
    first = measurement.repetitions[0]
    greedy = dataclasses.replace(first, memory_peaks_bytes={"working_set": 10**8 + 1})
    measurement = dataclasses.replace(
        measurement, repetitions=(greedy, *measurement.repetitions[1:])
    )

    assert verdict_of(bundle, measurement, peak_memory_bytes=10**8).outcome == "fail"
    assert verdict_of(bundle, measurement, peak_memory_bytes=10**8 + 1).outcome == "pass"


def test_two_processes_are_too_few_for_a_peak_but_more_may_help(bundle):
    few = make_measurement(first_token_s=STEADY_S[:4], token_s=STEADY_S[:4])

    verdict = verdict_of(bundle, few)

    assert check(verdict, "peak memory").outcome == "inconclusive"
    assert verdict.more_samples_may_help


@pytest.mark.parametrize("metric", ["phys_footprint", "total_pss", "process_tree_pss"])
def test_a_phone_or_a_browser_is_judged_by_its_own_metric(bundle, metric):
    verdict = verdict_of(bundle, make_measurement(metric=metric))

    assert check(verdict, "peak memory").outcome == "pass"
    assert metric.replace("_", " ") in check(verdict, "peak memory").basis


def test_private_memory_alone_is_no_peak(bundle):
    verdict = verdict_of(bundle, make_measurement(metric="unreclaimable"))

    assert verdict.outcome == "unstable"


def test_weights_that_do_not_stay_in_memory_are_a_miss(bundle):
    thrashing = verdict_of(bundle, make_measurement(major_faults=7))
    now_and_then = verdict_of(bundle, make_measurement(major_faults=1))

    assert check(thrashing, "peak memory").outcome == "fail"
    assert check(now_and_then, "peak memory").outcome == "inconclusive"
    assert not now_and_then.more_samples_may_help


def test_a_process_that_was_killed_is_a_miss(bundle):
    verdict = verdict_of(bundle, make_measurement(deaths=("repetition 1 was killed",)))

    assert verdict.outcome == "fail"
    assert "was killed" in check(verdict, "peak memory").basis


def test_a_miss_is_a_miss_even_if_noisy(bundle):
    noisy = [0.3, 0.9, 0.4, 0.8, 0.3, 0.9, 0.4, 0.8, 0.3, 0.9]

    verdict = verdict_of(bundle, make_measurement(token_s=noisy))

    assert check(verdict, "decoding").outcome == "fail"
    assert verdict.exit_status == 3


def test_a_noisy_pass_is_no_pass(bundle):
    noisy = [0.10, 0.12, 0.10, 0.12, 0.10, 0.12, 0.10, 0.12, 0.10, 0.12]

    verdict = verdict_of(bundle, make_measurement(token_s=noisy))

    assert verdict.outcome == "unstable"
    assert verdict.exit_status == 4
    assert "varies by" in check(verdict, "decoding").basis
    assert not verdict.more_samples_may_help


@pytest.mark.parametrize(
    ("features", "max_spread", "outcome"),
    [((), 0.05, "inconclusive"), ((), 0.10, "pass"), (("sve2",), 0.05, "pass")],
)  # fmt: skip
def test_another_machine_than_the_targets_may_vary_by_a_tenth_or_as_much_as_that(
    bundle, features, max_spread, outcome
):
    varying = [0.110, 0.125, 0.110, 0.125, 0.110] * 2  # by 6.6 %
    target = dataclasses.replace(
        make_target(**LIMITS), cpu_features=features, max_spread=max_spread
    )

    verdict = judge(make_measurement(first_token_s=varying), bundle, target)

    assert check(verdict, "first token").outcome == outcome


def test_a_target_whose_own_kind_varies_more_allows_it_elsewhere_too(bundle):
    varying = [0.105, 0.145, 0.105, 0.145, 0.105] * 2  # by 17 %
    target = dataclasses.replace(make_target(**LIMITS), cpu_features=("sve2",), max_spread=0.2)

    verdict = judge(make_measurement(first_token_s=varying), bundle, target)

    assert check(verdict, "first token").outcome == "pass"


def test_noise_far_inside_the_limit_hides_no_miss(bundle):
    noisy = [0.010, 0.012, 0.010, 0.012, 0.010, 0.012, 0.010, 0.012, 0.010, 0.020]

    verdict = verdict_of(bundle, make_measurement(token_s=noisy))

    assert check(verdict, "decoding").outcome == "pass"
    assert "within the limit by a factor of" in check(verdict, "decoding").basis


@pytest.mark.parametrize(("worst_s", "outcome"), [(0.1, "pass"), (0.1001, "inconclusive")])
def test_far_inside_is_half_the_limit(bundle, worst_s, outcome):
    noisy = [0.05, worst_s] * 5

    verdict = verdict_of(bundle, make_measurement(first_token_s=noisy))

    assert check(verdict, "first token").outcome == outcome


@pytest.mark.parametrize(
    ("first_s", "second_s", "change"), [(0.100, 0.106, "+6.0%"), (0.106, 0.100, "-5.7%")]
)
def test_a_pass_that_slows_down_or_speeds_up_is_no_pass(bundle, first_s, second_s, change):
    drifting = [first_s] * 5 + [second_s] * 5

    verdict = verdict_of(bundle, make_measurement(first_token_s=drifting))

    assert check(verdict, "first token").outcome == "inconclusive"
    assert change in check(verdict, "first token").basis


@pytest.mark.parametrize(
    ("limit_s", "outcome"), [(0.102, "pass"), (0.1, "inconclusive"), (0.0985, "fail")]
)
def test_a_limit_between_the_bounds_is_unclear(bundle, limit_s, outcome):
    """The bounds of ``STEADY_S`` are 0.099 and 0.101 s."""
    limit = FirstTokenLimit(prompt_tokens=8, limit_s=limit_s)

    verdict = verdict_of(bundle, first_token=(limit,))

    assert check(verdict, "first token").outcome == outcome
    assert verdict.more_samples_may_help == (outcome == "inconclusive")


@pytest.mark.parametrize("bits", [0x1, 0x2, 0x4, 0x8, 0x40000])
def test_a_board_that_was_throttled_is_not_judged_on_speed(bundle, bits):
    throttled = Conditions(throttled_before=0, throttled_during=bits)
    slow = make_measurement(token_s=[9.0] * 10, conditions=throttled)

    verdict = verdict_of(bundle, slow)

    assert verdict.outcome == "unstable"
    assert "throttled" in verdict.doubts[0]
    assert check(verdict, "peak memory").outcome == "pass"


def test_throttling_before_the_measurement_is_only_noted(bundle):
    earlier = Conditions(throttled_before=0x50000, throttled_during=0x50000)

    verdict = verdict_of(bundle, make_measurement(conditions=earlier))

    assert verdict.outcome == "pass"
    assert "under-voltage, throttled" in verdict.notes[0]


@pytest.mark.parametrize(
    ("conditions", "outcome"),
    [
        (Conditions(run_delay_share=0.04, cpu_pressure_share=0.9), "pass"),
        (Conditions(run_delay_share=0.06), "unstable"),
        (Conditions(cpu_pressure_share=0.2), "pass"),
        (Conditions(cpu_pressure_share=0.3), "unstable"),
        (Conditions(memory_pressure_share=0.02), "unstable"),
        (Conditions(), "pass"),
    ],
)
def test_a_device_that_others_used_at_the_same_time_is_no_evidence(bundle, conditions, outcome):
    assert verdict_of(bundle, make_measurement(conditions=conditions)).outcome == outcome


def test_a_bundle_without_proof_is_never_a_pass(tmp_path):
    unproven = make_bundle(tmp_path / "unproven", is_proven=False)

    verdict = verdict_of(unproven)

    assert verdict.outcome == "unstable"
    assert "without verification" in verdict.doubts[0]
    assert not verdict.more_samples_may_help


def test_doubts_of_the_runner_forbid_a_pass(bundle):
    verdict = verdict_of(bundle, make_measurement(doubts=("the app left the foreground",)))

    assert verdict.outcome == "unstable"


def test_a_context_too_short_for_the_budget_is_a_miss(bundle):
    verdict = verdict_of(bundle, answer_tokens=57)  # 8 + 57 > 64

    assert check(verdict, "context").outcome == "fail"


def test_another_processor_than_the_target_is_noted(bundle):
    target = dataclasses.replace(make_target(**LIMITS), cpu_features=("asimd", "i8mm"))

    verdict = judge(make_measurement(environment=ENVIRONMENT), bundle, target)

    assert verdict.outcome == "pass"
    assert "it lacks i8mm" in verdict.notes[0]


def test_a_governor_that_saves_power_is_noted(bundle):
    thrifty = dataclasses.replace(ENVIRONMENT, governor="ondemand")

    verdict = verdict_of(bundle, make_measurement(environment=thrifty, conditions=QUIET))

    assert any("'ondemand'" in note for note in verdict.notes)


# In a browser


GPU = Gpu(
    vendor="google", architecture="swiftshader", device="", description="", is_software=True,
    features=(), limits={"maxStorageBufferBindingSize": 128, "maxBufferSize": 256},
)  # fmt: skip


def in_browser(*, gpu=GPU, answers=None, needs=(), buffer_bytes=100, **run):
    """Return a steady measurement, as a page would give it."""
    found = make_measurement(metric="process_tree_pss")
    browser = BrowserEnvironment(
        agent="Chrome/1", runtime="Runtime 1", gpu=gpu, features_needed=needs,
        buffer_needed=GpuBuffer(name="embedding", size_bytes=buffer_bytes),
    )  # fmt: skip
    usual = BrowserRun(backend="webgpu", gpu_submits=9, threads=1)
    ran = dataclasses.replace(usual, **run)
    assert found.cold_start
    return dataclasses.replace(
        found,
        environment=dataclasses.replace(ENVIRONMENT, browser=browser),
        repetitions=tuple(dataclasses.replace(it, browser=ran) for it in found.repetitions),
        cold_start=dataclasses.replace(found.cold_start, answers=answers),
    )


@pytest.fixture
def browser_bundle(bundle, monkeypatch):
    """Of a format that a browser opens."""
    known = BrowserMemory(base_bytes=90_000_000, copies=0)
    face = SimpleNamespace(MEMORY={"webgpu": known, "wasm": known}, RECIPES={})
    monkeypatch.setattr(formats, "browsing", lambda _: face)
    monkeypatch.setattr(formats, "get", lambda _: face)
    return bundle


def test_speeds_on_a_software_adapter_are_not_judged_and_all_else_is(browser_bundle):
    verdict = verdict_of(browser_bundle, in_browser())
    assert verdict.outcome == "unstable"
    assert "speeds are not judged: software adapter" in verdict.doubts
    assert check(verdict, "decoding").is_void
    assert check(verdict, "peak memory").outcome == "pass"
    assert verdict_of(browser_bundle, in_browser(), peak_memory_bytes=1).outcome == "fail"


def test_speeds_of_a_gpu_and_of_webassembly_are_judged(browser_bundle):
    real = in_browser(gpu=dataclasses.replace(GPU, is_software=False))
    assert verdict_of(browser_bundle, real).outcome == "pass"
    assert verdict_of(browser_bundle, in_browser(backend="wasm")).outcome == "pass"


def test_a_fall_back_to_webassembly_forbids_a_pass_and_says_why(browser_bundle):
    fallen = in_browser(backend="wasm", fell_back="this GPU has no shader-f16")
    (doubt,) = verdict_of(browser_bundle, fallen).doubts
    assert doubt.endswith("in WebAssembly, not on the GPU: this GPU has no shader-f16")


@pytest.mark.parametrize(
    ("needs", "buffer_bytes", "missed"),
    [
        ((), 129, ["maxStorageBufferBindingSize"]),
        ((), 257, ["maxStorageBufferBindingSize", "maxBufferSize"]),
        (("shader-f16",), 128, ["shader-f16"]),
    ],
)
def test_what_a_gpu_does_not_grant_is_missed_by_name(browser_bundle, needs, buffer_bytes, missed):
    verdict = verdict_of(browser_bundle, in_browser(needs=needs, buffer_bytes=buffer_bytes))
    assert [each.name for each in verdict.checks if each.outcome == "fail"] == missed


@pytest.mark.parametrize(("kl", "outcome"), [(0.19, "pass"), (0.21, "fail")])
def test_answers_are_held_to_the_goldens(browser_bundle, kl, outcome):
    answers = Answers(positions=9, mean_kl_nats=kl, expected_ids=(1,), said_ids=(2,))
    verdict = verdict_of(browser_bundle, in_browser(answers=answers))
    assert check(verdict, "answers").outcome == outcome
    assert any("greedy answer is [2], the workstation's [1]" in note for note in verdict.notes)


def test_what_the_processes_were_to_hold_stands_next_to_what_they_held(browser_bundle):
    notes = verdict_of(browser_bundle, in_browser()).notes
    assert any("85.8 MiB of memory was predicted" in it and "1.11 of it" in it for it in notes)
