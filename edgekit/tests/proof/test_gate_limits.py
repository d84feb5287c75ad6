"""Each gate's limit to the digit, without torch: what just holds passes, what just misses fails."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import edgekit
from edgekit import formats
from edgekit.bundle.goldens import LogitGolden
from edgekit.proof import gates, transformers_logits
from edgekit.proof.gates import Subject, _Findings
from edgekit.source.opening import open_checkpoint
from edgekit.source.writer import write_checkpoint
from edgekit.tests.tiny.random_checkpoints import random_checkpoint
from edgekit.tests.witnesses.tiny_runner import CHATML, NgramSession
from edgekit.text import corpus
from edgekit.text.template import ChatTemplate


np = pytest.importorskip("numpy")

TARGET = "raspberry-pi-5-8gb"


def gate(check, subject: Any, *rest):
    """Return what one gate found."""
    found = _Findings()
    check(subject, *rest, found)
    [only] = found.gates
    return only


# Logits


def rows(count, shift=0.0):
    """Return logits of two tokens, the second of which is more likely the larger the shift."""
    return np.tile(np.array([1.0, shift], np.float32), (count, 1))


def kl_nats(first, second):
    """Return how far one distribution of `rows` is from another."""
    p, q = (1 / (1 + math.exp(shift - 1)) for shift in (first, second))
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def shift_with(distance, wanted):
    """Return the shift below the likelier token's logit whose distance is as wanted."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if distance(middle) < wanted else (low, middle)
    return low


def said_at(wanted):
    """Return what is this far from `rows` without a shift."""
    return shift_with(lambda shift: kl_nats(0, shift), wanted)


def logits_gate(
    said, goldens=(), *, max_mean_kl_nats=0.01, min_same_top_token=0.9, kernel_kl_nats=0.0
):
    """Compare chunks of four tokens with what the checkpoint says to them."""
    recipe = replace(
        formats.get("gguf").RECIPES["F32"],
        max_mean_kl_nats=max_mean_kl_nats,
        min_same_top_token=min_same_top_token,
    )
    ids = np.zeros(4, np.int64)
    pairs = [(ids, rows(4), chunk) for chunk in said]
    goldens = [LogitGolden.of([0, 0], golden) for golden in goldens or [said[0][:2]]]
    layout = SimpleNamespace(kernel_kl_nats=kernel_kl_nats)
    subject = SimpleNamespace(recipe=recipe, layout=layout)
    return gate(gates._check_logits, subject, iter(pairs), goldens)


@pytest.mark.parametrize(("distance", "passed"), [(0.0099, True), (0.0101, False)])
def test_the_mean_kl_is_held_against_the_recipes(distance, passed):
    assert logits_gate([rows(4, said_at(distance))]).passed is passed


@pytest.mark.parametrize(("distance", "passed"), [(0.0199, True), (0.0201, False)])
def test_what_the_runtimes_own_kernels_add_is_allowed_on_top(distance, passed):
    assert logits_gate([rows(4, said_at(distance))], kernel_kl_nats=0.01).passed is passed


def test_it_is_the_mean_over_all_positions_that_counts():
    said = [rows(4, said_at(0.018)), rows(4)]
    assert logits_gate(said).passed
    assert not logits_gate(said[:1]).passed


@pytest.mark.parametrize(("share", "passed"), [(0.75, True), (0.76, False)])
def test_the_share_of_equal_top_tokens_is_held_against_the_recipes(share, passed):
    said = rows(4)
    said[3] = [1, 1.001]
    found = logits_gate([said], max_mean_kl_nats=1.0, min_same_top_token=share)
    assert found.passed is passed
    assert "same top token 75.0%" in found.finding


@pytest.mark.parametrize(
    ("distance", "max_mean_kl_nats", "passed"),
    [(0.9e-3, 1e-6, True), (1.1e-3, 1e-6, False), (0.045, 0.05, True), (0.055, 0.05, False)],
)
def test_a_devices_cache_may_add_a_thousandth_or_as_much_as_the_weights(
    distance, max_mean_kl_nats, passed
):
    """The worst chunk counts, whichever it is."""
    exact = [rows(4), rows(4)]
    on_a_device = [rows(2, shift_with(lambda shift: kl_nats(shift, 0), distance)), rows(2)]
    assert logits_gate(exact, on_a_device, max_mean_kl_nats=max_mean_kl_nats).passed is passed
    assert logits_gate(exact, on_a_device[::-1], max_mean_kl_nats=max_mean_kl_nats).passed is passed


# Where an answer ends


class Fickle(NgramSession):
    """Says something else once it was emptied."""

    def reset(self):
        super().reset()
        self.sequences = [[0, 1, 3, 4]]


def stops_gate(rules, declared, *, session_type=NgramSession):
    session = session_type([[0, 1, 2, 3, 4, 5]], vocabulary_tokens=6)
    prompt = [0, 1]
    session.prefill(prompt)
    for token in (2, 3):
        session.decode(token)
    files = SimpleNamespace(stop_ids_by_file={"config.json": declared})
    subject = SimpleNamespace(
        rules=SimpleNamespace(stop_ids=rules), checkpoint=SimpleNamespace(text=files)
    )
    return gate(gates._check_stops, subject, session, prompt, [2, 3, 4])


@pytest.mark.parametrize(
    ("rules", "declared", "passed"),
    [((4, 5), (5, 4), True), ((4,), (4, 5), False), ((4, 5), (4,), False), ((), (), False)],
)
def test_the_stops_of_a_bundle_are_those_that_the_checkpoint_declares(rules, declared, passed):
    found = stops_gate(rules, declared)
    assert found.passed is passed
    assert f"at {list(rules)}" in found.finding


def test_a_generation_that_does_not_end_where_it_is_told_fails_the_stops():
    assert not stops_gate((4,), (4,), session_type=Fickle).passed


# Files


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    """Return a real ONNX artifact of random weights, as the proof sees it."""
    pytest.importorskip("tokenizers")
    pytest.importorskip("jinja2")
    home = tmp_path_factory.mktemp("gates")
    model = write_checkpoint(random_checkpoint(home / "made"), home / "model", precision="f32")
    (model / "chat_template.jinja").write_text(
        CHATML.replace("<|im_start|>", "").replace("<|im_end|>", "<|end|>")
    )
    settings: dict[str, Any] = {"format": "onnx", "quant": "F32"}
    bundle = edgekit.export(
        str(model), TARGET, out=home / "bundle", verify=False, calibrate=False, **settings
    )
    planned = edgekit.plan(str(model), TARGET, calibrate=False, **settings)
    return Subject(
        checkpoint=open_checkpoint(model),
        directory=bundle.directory,
        entry=bundle.artifact.entry,
        format="onnx",
        recipe=planned.recipe,
        layout=planned.layout,
        rules=bundle.text,
        context_tokens=bundle.context_tokens,
    )


def test_what_is_stored_as_planned_passes(subject):
    assert gate(gates._check_tensor_types, subject).passed
    assert gate(gates._check_size, subject).passed


def test_one_tensor_stored_otherwise_fails_the_storages(subject):
    first, *rest = subject.layout.placements
    layout = replace(subject.layout, placements=(replace(first, tensor_type="F16"), *rest))
    found = gate(gates._check_tensor_types, replace(subject, layout=layout))
    assert not found.passed
    assert f"planned 1 more of {first.parameters} weights in F16" in found.finding


def test_one_tensor_that_was_planned_and_is_not_there_fails_the_storages(subject):
    placements = (*subject.layout.placements, subject.layout.placements[-1])
    layout = replace(subject.layout, placements=placements)
    assert not gate(gates._check_tensor_types, replace(subject, layout=layout)).passed


@pytest.mark.parametrize(
    ("is_exact", "more", "passed"),
    [(True, 64, True), (True, 65, False), (True, -64, True), (True, -65, False),
     (False, 990, True), (False, 1020, False)],
)  # fmt: skip
def test_a_size_is_predicted_to_64_bytes_or_to_a_hundredth(subject, is_exact, more, passed):
    written = sum(file.stat().st_size for file in subject.running.files(subject.path))
    predicted = written + (more if is_exact else round(more * written / 100_000))
    layout = replace(subject.layout, artifact_bytes=predicted, is_exact=is_exact)
    found = gate(gates._check_size, replace(subject, layout=layout))
    assert found.passed is passed
    assert found.finding == f"{written} bytes, predicted {predicted}"


# Text


class Witness:
    """Reads and renders as transformers would, from the same files."""

    def __init__(self, text, *, loses="", adds=""):
        self.text = text
        self.loses = loses
        self.adds = adds

    def __call__(self, line, *, add_special_tokens):
        ids = self.text.encode(line, adds_bos=add_special_tokens)
        return {"input_ids": ids[:-1] if line == self.loses else ids}

    def apply_chat_template(self, messages, **_):
        return self.text.render(messages) + self.adds


def read_by(subject, monkeypatch, **faults):
    witness = Witness(subject.text, **faults)
    monkeypatch.setattr(transformers_logits, "tokenizer", lambda _: witness)
    monkeypatch.setattr(
        transformers_logits,
        "file_ids",
        lambda _, lines: [witness(line, add_special_tokens=False)["input_ids"] for line in lines],
    )
    return replace(subject)  # which has asked nobody yet


def test_the_same_ids_and_the_same_bytes_pass(subject, monkeypatch):
    read = read_by(subject, monkeypatch)
    assert gate(gates._check_ids, read).passed
    found = gate(gates._check_template, read)
    assert found.passed
    assert found.finding == "3 conversations render to the same bytes"


def test_one_id_of_one_line_fails_the_token_ids(subject, monkeypatch):
    line = corpus.lines()[7]
    found = gate(gates._check_ids, read_by(subject, monkeypatch, loses=line))
    assert not found.passed
    assert found.finding.startswith(f"edgekit run: {line!r} becomes [")


def test_a_conversation_that_holds_the_day_is_no_golden(subject, monkeypatch):
    """The device's own day is another one tomorrow."""
    assert len(gates._goldens(subject, [], [1], [2]).chats) == len(subject.conversations) > 0
    text = subject.text
    dated = "{{ strftime_now('%Y') if messages | length == 1 }}{{ messages[0].content }}"
    monkeypatch.setitem(vars(subject), "text", replace(text, template=ChatTemplate.compile(dated)))
    chats = gates._goldens(subject, [], [1], [2]).chats
    assert [len(chat.messages) for chat in chats] == [
        len(turns) for turns in subject.conversations if len(turns) > 1
    ]


def test_one_blank_fails_the_chat_template(subject, monkeypatch):
    assert not gate(gates._check_template, read_by(subject, monkeypatch, adds=" ")).passed


def test_a_template_that_can_say_nothing_fails_its_gate(subject, monkeypatch):
    read = read_by(subject, monkeypatch)
    monkeypatch.setattr(Subject, "_can_render", lambda *_: False)
    found = gate(gates._check_template, read)
    assert (found.passed, found.finding) == (False, "0 conversations render to the same bytes")


# Memory


def test_transformers_may_hold_what_takes_half_of_the_free_memory(subject, monkeypatch):
    needed = 2 * 4 * subject.checkpoint.parameters
    for free, fits_in_memory in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(transformers_logits, "_free_memory_bytes", lambda free=free: free)
        assert transformers_logits.holds(subject.checkpoint) is fits_in_memory
        assert replace(subject).fits_in_memory is fits_in_memory


@pytest.mark.skipif(not Path("/proc/meminfo").is_file(), reason="only Linux says what is free")
def test_free_memory_is_what_linux_calls_available():
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    [available] = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    assert transformers_logits._free_memory_bytes() == pytest.approx(1024 * available, rel=0.2)


@pytest.mark.parametrize(
    ("fits_in_memory", "least", "most"), [(True, 2048, 2700), (False, 400, 512)]
)
def test_a_model_that_is_not_held_is_asked_for_fewer_positions(
    subject, monkeypatch, fits_in_memory, least, most
):
    monkeypatch.setattr(transformers_logits, "holds", lambda _: fits_in_memory)
    chunks = replace(subject, context_tokens=64).chunks
    longest = 64 if fits_in_memory else 512 // len(list(corpus.texts()))
    assert max(map(len, chunks)) == longest
    assert least <= sum(map(len, chunks)) <= most


# Adapters


def adapter_gate(largest, difference, *, fits_in_memory=True, adapter="tide"):
    beside = np.array([[0, -largest]], np.float32)
    subject = SimpleNamespace(
        checkpoint=SimpleNamespace(adapter=adapter and SimpleNamespace(name=adapter)),
        chunks=[[1]],
        fits_in_memory=fits_in_memory,
    )
    found = _Findings()
    with pytest.MonkeyPatch.context() as patch:
        merged = beside + np.array([[difference, 0]], np.float32)
        patch.setattr(gates, "interpreter", SimpleNamespace(logits=lambda *_: iter([merged])))
        gates._check_adapter(subject, beside, found)  # type: ignore[arg-type]  # what it reads
    return found.gates


@pytest.mark.parametrize(
    ("largest", "difference", "passed"),
    [(0.5, 0.99e-4, True), (0.5, 1.01e-4, False), (3.0, 2.99e-4, True), (3.0, -3.01e-4, False)],
)
def test_merged_logits_differ_by_a_ten_thousandth_of_the_largest(largest, difference, passed):
    [found] = adapter_gate(largest, difference)
    assert (found.name, found.passed) == ("adapter", passed)


def test_an_adapter_beside_a_base_that_is_not_held_is_told_and_not_failed():
    [found] = adapter_gate(1.0, 1.0, fits_in_memory=False)
    assert found.passed
    assert "too large here" in found.finding


def test_without_an_adapter_there_is_no_such_gate():
    assert adapter_gate(1.0, 1.0, adapter=None) == []
