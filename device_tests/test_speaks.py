"""The artifact loads in its runtime and says on the device what it said on the workstation."""

import math
from collections.abc import Callable

import pytest

from edgekit.bundle.goldens import Goldens
from edgekit.bundle.manifest import Bundle
from edgekit.measuring.measure import prompt_ids
from edgekit.run import GREEDY, Runner
from edgekit.runtime.generate import generate


Record = Callable[[str, object], None]


def test_it_loads_and_predicts(runner: Runner, bundle: Bundle):
    session = runner.session
    assert session.context_tokens == bundle.context_tokens, (
        f"the context holds {session.context_tokens} tokens, expected {bundle.context_tokens}"
    )
    session.reset()
    logits = session.prefill(prompt_ids(session.vocabulary_tokens, 4))
    assert logits.shape == (session.vocabulary_tokens,), (
        f"logits of shape {logits.shape}, expected ({session.vocabulary_tokens},)"
    )
    largest = float(abs(logits).max())
    assert math.isfinite(largest), f"the largest logit is {largest}, expected a finite number"


def test_its_vocabulary_holds_every_token_of_its_tokenizer(runner: Runner):
    tokens, logits = runner.text.tokenizer.get_vocab_size(), runner.session.vocabulary_tokens
    assert logits >= tokens, f"{logits} logits, expected at least one for each of {tokens} tokens"


def test_its_logits_are_those_that_were_proven(
    runner: Runner, goldens: Goldens, mean_kl_limit_nats: float, record_property: Record
):
    assert goldens.logits, "found no logits in the goldens, expected some"
    for number, golden in enumerate(goldens.logits, start=1):
        said = runner.session.all_logits(golden.ids)
        kl = golden.mean_kl_nats(said)
        same = _share(said.argmax(axis=1).tolist(), [top[0] for top in golden.top_ids])
        finding = f"mean KL {kl:.1e} nats (<= {mean_kl_limit_nats:g}), same top token {same:.0%}"
        assert kl <= mean_kl_limit_nats, f"text {number} of the goldens: {finding}"
        record_property(f"logits of text {number}", finding)


def _share(found: list[int], expected: list[int]) -> float:
    pairs = list(zip(found, expected, strict=True))
    return sum(a == b for a, b in pairs) / len(pairs)


def test_its_greedy_answer_is_the_workstations(
    runner: Runner, goldens: Goldens, record_property: Record
):
    """Reported, not asserted: a near tie may fall otherwise where sums are rounded otherwise."""
    expected = goldens.answer_ids
    tokens = generate(
        runner.session,
        goldens.answer_prompt_ids,
        max_tokens=len(expected),
        stop_ids=(),
        sampling=GREEDY,
    )
    found = tuple(tokens)
    assert len(found) == len(expected), f"{len(found)} tokens, expected {len(expected)}"
    said = runner.text.decode(found)
    if found != expected:
        pytest.skip(
            f"it says {said!r}, the workstation's said {runner.text.decode(expected)!r}; "
            f"on another processor the logits are the criterion, not the words"
        )
    record_property("greedy answer", f"{said!r}, as on the workstation")
