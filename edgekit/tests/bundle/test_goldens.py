import json

import pytest

from edgekit.bundle.goldens import GOLDENS, TOP_TOKENS, ChatGolden, Goldens, LogitGolden, TextGolden
from edgekit.errors import BundleError
from edgekit.proof.fidelity import Comparison


np = pytest.importorskip("numpy")


def logits(*, tokens=6, vocabulary=200, seed=0):
    random = np.random.default_rng(seed)
    return random.normal(0, 3, (tokens, vocabulary)).astype(np.float32)


def full_kl(reference, candidate):
    comparison = Comparison()
    comparison.add(reference, candidate, np.zeros(len(reference), np.int64))
    return comparison.result().mean_kl_nats


@pytest.fixture
def goldens():
    message = {"role": "user", "content": "안녕 🌊"}
    return Goldens(
        texts=(TextGolden(text="high\ntide \u2028 🌊", ids=(1, 2, 3)), TextGolden(text="", ids=())),
        chats=(ChatGolden(messages=(message,), rendered="<|user|>안녕 🌊", ids=(7, 8)),),
        logits=(LogitGolden.of([4, 5, 6, 7, 8, 9], logits()),),
        answer_prompt_ids=(7, 8),
        answer_ids=(3, 1, 2),
    )


def test_goldens_come_back_as_they_were(goldens, tmp_path):
    goldens.save(tmp_path)
    assert Goldens.load(tmp_path) == goldens


def test_they_are_small_and_readable(goldens, tmp_path):
    goldens.save(tmp_path)
    text = (tmp_path / GOLDENS).read_text(encoding="utf-8")
    assert "안녕 🌊" in text
    assert len(text) < 40 * TOP_TOKENS * 6


def test_an_unproven_bundle_has_none(tmp_path):
    with pytest.raises(BundleError, match="has no goldens") as refusal:
        Goldens.load(tmp_path)
    assert "--no-verify" in refusal.value.hint


@pytest.mark.parametrize("text", ["{", "[]", '{"texts": []}', '{"texts": [1]}', "\udcff"])
def test_damaged_goldens_are_refused(tmp_path, text):
    (tmp_path / GOLDENS).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(BundleError, match=r"goldens\.json"):
        Goldens.load(tmp_path)


def edit(goldens, directory, change):
    goldens.save(directory)
    fields = json.loads((directory / GOLDENS).read_text(encoding="utf-8"))
    change(fields["logits"][0])
    (directory / GOLDENS).write_text(json.dumps(fields), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda row: row["ids"].pop(), "has 5 ids, 6 rows of top ids and 6 of logarithms"),
        (lambda row: row["top_ids"].pop(), "has 6 ids, 5 rows"),
        (lambda row: row["top_log_probabilities"].append([]), "and 7 of logarithms"),
        (lambda row: row["top_ids"][2].pop(), r"has rows of \[15, 16\] tokens"),
        (lambda row: row["top_log_probabilities"][5].append(0), r"has rows of \[16, 17\] tokens"),
        (lambda row: row.update({name: [] for name in row}), "has 0 ids"),
        (lambda row: row["top_log_probabilities"][0].__setitem__(0, 1e308), "above 1"),
    ],
)
def test_rows_of_other_lengths_are_refused(goldens, tmp_path, change, reason):
    edit(goldens, tmp_path, change)
    with pytest.raises(BundleError, match=rf"goldens\.json: logits\[0\] .*{reason}"):
        Goldens.load(tmp_path)


def test_a_token_beyond_the_vocabulary_is_refused():
    golden = LogitGolden.of(range(6), logits())
    with pytest.raises(BundleError, match="beyond the vocabulary of 20"):
        golden.mean_kl_nats(logits(vocabulary=20))


def test_the_likeliest_tokens_are_kept_best_first():
    found = logits()
    golden = LogitGolden.of(range(6), found)
    assert len(golden.top_ids) == 6
    for row, top, values in zip(found, golden.top_ids, golden.top_log_probabilities, strict=True):
        assert len(top) == TOP_TOKENS
        assert top[0] == row.argmax()
        assert set(top) == set(np.argsort(row)[-TOP_TOKENS:])
        log_sum = np.log(np.exp(row.astype(np.float64)).sum())
        assert values == pytest.approx(row[list(top)] - log_sum, abs=1e-5)


def test_a_vocabulary_may_be_smaller_than_what_is_kept():
    found = logits(vocabulary=5)
    golden = LogitGolden.of(range(6), found)
    assert {len(top) for top in golden.top_ids} == {5}
    assert golden.mean_kl_nats(found) == pytest.approx(0, abs=1e-3)  # the rest is only rounding


def test_the_same_logits_are_no_distance_apart():
    golden = LogitGolden.of(range(6), logits())
    assert golden.mean_kl_nats(logits()) == pytest.approx(0, abs=2e-5)
    shifted = logits().astype(np.float64) + 11
    assert golden.mean_kl_nats(shifted) == pytest.approx(0, abs=2e-5)


@pytest.mark.parametrize("noise", [0.05, 0.5, 3.0])
@pytest.mark.parametrize("seed", range(5))
def test_others_are_and_never_farther_than_in_full(noise, seed):
    reference = logits(seed=seed)
    random = np.random.default_rng(100 + seed)
    other = reference + random.normal(0, noise, reference.shape).astype(np.float32)
    found, full = LogitGolden.of(range(6), reference).mean_kl_nats(other), full_kl(reference, other)
    assert 0.1 * full < found < full + 2e-5


def test_a_device_that_is_sure_of_something_else_is_far_away():
    reference = logits()
    golden = LogitGolden.of(range(6), reference)
    wrong = reference[:, ::-1] * 10
    assert golden.mean_kl_nats(wrong) > 5


def test_goldens_survive_the_file_without_losing_precision(goldens, tmp_path):
    goldens.save(tmp_path)
    (loaded,) = Goldens.load(tmp_path).logits
    assert loaded.mean_kl_nats(logits()) == goldens.logits[0].mean_kl_nats(logits())
