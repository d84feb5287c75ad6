import math

import pytest

from edgekit.proof import fidelity
from edgekit.proof.fidelity import Comparison


np = pytest.importorskip("numpy")
VOCABULARY = 50


def made_up(tokens, *, seed=0, noise=0.3):
    """Return reference logits, candidate logits, and the ids that were read."""
    random = np.random.default_rng(seed)
    reference = random.normal(0, 3, (tokens, VOCABULARY)).astype(np.float32)
    candidate = reference + random.normal(0, noise, reference.shape).astype(np.float32)
    return reference, candidate, random.integers(0, VOCABULARY, tokens)


def compare(reference, candidate, ids):
    comparison = Comparison()
    comparison.add(reference, candidate, ids)
    return comparison.result()


def probabilities(row):
    """Return a row's distribution by the definition, one number at a time."""
    powers = [math.exp(float(value)) for value in row]
    return [power / math.fsum(powers) for power in powers]


def divergence(reference, candidate):
    p, q = probabilities(reference), probabilities(candidate)
    return math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


def test_equal_models_agree_perfectly():
    reference, _, ids = made_up(20)
    found = compare(reference, reference.copy(), ids)
    assert (found.mean_kl_nats, found.p99_kl_nats, found.max_kl_nats) == (0, 0, 0)
    assert (found.same_top_token, found.perplexity_ratio, found.max_logit_difference) == (1, 1, 0)
    assert found.positions == 20


def test_a_pair_known_by_hand():
    reference = np.log(np.array([[0.5, 0.25, 0.25]], np.float32))
    candidate = np.log(np.array([[0.25, 0.5, 0.25]], np.float32))
    found = compare(
        np.repeat(reference, 2, axis=0), np.repeat(candidate, 2, axis=0), np.array([2, 0])
    )
    assert found.mean_kl_nats == pytest.approx(0.25 * math.log(2), rel=1e-6)
    assert found.same_top_token == 0
    assert found.perplexity_ratio == pytest.approx(2, rel=1e-6)  # token 0: 1/2 against 1/4
    assert found.max_logit_difference == pytest.approx(math.log(2), rel=1e-6)


def test_the_divergence_is_that_of_the_definition():
    reference, candidate, ids = made_up(30)
    expected = [divergence(p, q) for p, q in zip(reference, candidate, strict=True)]
    found = compare(reference, candidate, ids)
    assert found.mean_kl_nats == pytest.approx(np.mean(expected), rel=1e-12)
    assert found.max_kl_nats == pytest.approx(max(expected), rel=1e-12)
    assert found.p99_kl_nats == pytest.approx(np.quantile(expected, 0.99), rel=1e-12)


def test_it_is_measured_from_the_reference_to_the_candidate():
    reference, candidate, ids = made_up(5, noise=2)
    there, back = compare(reference, candidate, ids), compare(candidate, reference, ids)
    assert there.mean_kl_nats != pytest.approx(back.mean_kl_nats, rel=1e-3)
    assert there.perplexity_ratio == pytest.approx(1 / back.perplexity_ratio)


def test_the_perplexity_is_that_of_the_texts_own_next_tokens():
    reference, candidate, ids = made_up(12)

    def perplexity(logits):
        losses = [-math.log(probabilities(logits[i])[ids[i + 1]]) for i in range(11)]
        return math.exp(math.fsum(losses) / 11)

    found = compare(reference, candidate, ids)
    assert found.perplexity_ratio == pytest.approx(perplexity(candidate) / perplexity(reference))


@pytest.mark.parametrize(("lead", "share"), [(5e-5, 1), (2e-4, 0)])
def test_another_token_is_the_same_where_float32_cannot_tell_them_apart(lead, share):
    reference = np.array([[10, 10 - lead, 3]] * 2, np.float32)
    candidate = np.array([[10 - lead, 10, 3]] * 2, np.float32)
    assert compare(reference, candidate, np.array([0, 1])).same_top_token == share


def test_adding_a_constant_to_a_row_changes_no_distribution():
    reference, candidate, ids = made_up(10)
    moved = candidate.astype(np.float64) + np.arange(10)[:, None] * 7.0
    found, expected = compare(reference, moved, ids), compare(reference, candidate, ids)
    assert found.mean_kl_nats == pytest.approx(expected.mean_kl_nats, rel=1e-9)
    assert found.perplexity_ratio == pytest.approx(expected.perplexity_ratio, rel=1e-9)
    assert found.same_top_token == expected.same_top_token
    assert found.max_logit_difference > 60


def test_one_bad_position_in_fifty_shows_in_the_99th_percentile_and_not_in_the_median():
    reference, _, ids = made_up(100)
    candidate = reference.copy()
    candidate[[3, 70]] = candidate[[3, 70], ::-1]
    found = compare(reference, candidate, ids)
    assert found.p99_kl_nats > 1
    assert found.same_top_token == 0.98


@pytest.mark.parametrize("block_rows", [1, 7, 64, 1000])
def test_the_size_of_the_blocks_changes_nothing(monkeypatch, block_rows):
    inputs = made_up(150)
    expected = compare(*inputs)
    monkeypatch.setattr(fidelity, "_BLOCK_ROWS", block_rows)
    found = compare(*inputs)
    assert found.positions == expected.positions == 150
    for name in ("mean_kl_nats", "p99_kl_nats", "perplexity_ratio", "max_logit_difference"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-12)


def test_texts_add_up_and_do_not_run_into_each_other():
    first, second = made_up(9, seed=1), made_up(4, seed=2)
    both = Comparison()
    both.add(*first)
    both.add(*second)
    found, a, b = both.result(), compare(*first), compare(*second)
    assert found.positions == 13
    assert found.mean_kl_nats == pytest.approx((9 * a.mean_kl_nats + 4 * b.mean_kl_nats) / 13)
    # The last token of the first text does not predict the first one of the second.
    losses = 8 * math.log(a.perplexity_ratio) + 3 * math.log(b.perplexity_ratio)
    assert found.perplexity_ratio == pytest.approx(math.exp(losses / 11))


def test_logits_far_from_zero_do_not_overflow():
    reference = np.array([[0, 1e4], [1e4, 0]], np.float32)
    found = compare(reference, reference * 0.5, np.array([0, 1]))
    assert found.mean_kl_nats == 0
    assert found.same_top_token == 1


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_broken_candidate_never_looks_close():
    reference, candidate, ids = made_up(70)
    candidate[2, 5] = np.nan
    found = compare(reference, candidate, ids)
    assert not found.mean_kl_nats <= 1e9
    assert not found.max_logit_difference <= 1e9
