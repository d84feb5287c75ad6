import warnings

import pytest

from edgekit.errors import ToolchainError, UsageError
from edgekit.runtime.generate import (
    PromptTooLongError,
    Sampling,
    candidates,
    generate,
    largest_of,
    most_likely,
)
from edgekit.tests.witnesses.tiny_runner import NgramSession


np = pytest.importorskip("numpy")

COUNT = list(range(10))  # the session knows how to count to nine
GREEDY = Sampling()


@pytest.fixture
def session():
    return NgramSession([COUNT], vocabulary_tokens=16, context_tokens=12)


def answer(session, prompt, *, max_tokens=None, stop_ids=(), sampling=GREEDY, cached_ids=None):
    generation = generate(
        session,
        prompt,
        max_tokens=max_tokens,
        stop_ids=stop_ids,
        sampling=sampling,
        cached_ids=cached_ids,
    )
    return list(generation), generation.finish_reason


# Ending


def test_a_stop_id_ends_the_answer_and_is_not_part_of_it(session):
    assert answer(session, [0, 1], stop_ids=[6, 4]) == ([2, 3], "stop")


def test_max_tokens_ends_the_answer_and_reads_nothing_more(session):
    assert answer(session, [0, 1], max_tokens=3) == ([2, 3, 4], "length")
    assert session.cached == [0, 1, 2, 3]


def test_a_full_context_ends_the_answer_without_an_error(session):
    tokens, reason = answer(session, COUNT)
    assert (len(tokens), reason) == (3, "context")
    assert len(session.cached) == session.context_tokens


def test_a_prompt_that_fills_the_context_gets_one_token(session):
    assert answer(session, [3] * 11 + [4]) == ([5], "context")


def test_a_prompt_longer_than_the_context_is_refused_before_anything_runs(session):
    with pytest.raises(PromptTooLongError, match="13 tokens, the context holds 12"):
        generate(session, [1] * 13, max_tokens=1, stop_ids=(), sampling=GREEDY)
    assert session.reads == []


@pytest.mark.parametrize(("prompt", "max_tokens"), [([], 1), ([1], 0)])
def test_an_impossible_request_is_refused(session, prompt, max_tokens):
    with pytest.raises(UsageError):
        generate(session, prompt, max_tokens=max_tokens, stop_ids=(), sampling=GREEDY)


# The cache


def test_only_what_is_new_is_read(session):
    cached: list[int] = []
    answer(session, [0, 1], max_tokens=3, cached_ids=cached)
    assert cached == [0, 1, 2, 3]
    session.reads.clear()
    assert answer(session, [0, 1, 2, 3, 4, 5], max_tokens=1, cached_ids=cached) == ([6], "length")
    assert session.reads == [2]
    assert session.cached == cached == [0, 1, 2, 3, 4, 5]


OTHERS = ([0, 2], [0, 1], [0, 1, 2], [0, 1, 3, 4], [0])


@pytest.mark.parametrize("prompt", OTHERS)
def test_where_a_prompt_is_another_text_it_is_read_again(session, prompt):
    cached: list[int] = []
    answer(session, [0, 1], max_tokens=2, cached_ids=cached)
    assert cached == [0, 1, 2]
    answer(session, prompt, max_tokens=1, cached_ids=cached)
    assert session.cached == cached == prompt
    assert session.reads[-1] == max(1, len(prompt) - 2)  # its last token in any case


@pytest.mark.parametrize("prompt", OTHERS)
def test_a_session_that_cannot_go_back_reads_another_text_whole(prompt):
    session = NgramSession([COUNT], vocabulary_tokens=16, rewinds=False)
    cached: list[int] = []
    answer(session, [0, 1], max_tokens=2, cached_ids=cached)
    answer(session, prompt, max_tokens=1, cached_ids=cached)
    assert session.cached == cached == prompt
    assert session.reads[-1] == len(prompt)
    answer(session, [*prompt, 9], max_tokens=1, cached_ids=cached)
    assert session.reads[-1] == 1  # going on is no going back


def test_a_text_that_shares_nothing_is_read_whole(session):
    cached: list[int] = []
    answer(session, [0, 1], max_tokens=2, cached_ids=cached)
    answer(session, [5, 1, 2], max_tokens=1, cached_ids=cached)
    assert session.reads[-1] == 3
    assert session.cached == cached == [5, 1, 2]


def test_a_failed_step_leaves_no_cache_to_build_on(session):
    cached: list[int] = []
    generation = generate(
        session, [0], max_tokens=None, stop_ids=(), sampling=GREEDY, cached_ids=cached
    )
    next(generation)
    # From here on, reading fails.
    generation.session = NgramSession([COUNT], vocabulary_tokens=16, context_tokens=0)
    with pytest.raises(UsageError):
        next(generation)
    assert cached == []


# Choosing


def test_greedy_takes_the_largest_logit_without_touching_it():
    logits = np.array([0, 3, 9, 9], dtype=np.float32)
    logits.flags.writeable = False
    assert most_likely(logits) == 2


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1)])
def test_logits_that_are_no_numbers_are_an_error(session, value, sampling):
    session._logits = lambda: np.full(16, value, dtype=np.float32)
    with pytest.raises(ToolchainError, match="not numbers"):
        answer(session, [1], sampling=sampling)


def kept(logits, **settings):
    tokens, chances = candidates(np.log(np.array(logits, dtype=np.float32)), Sampling(**settings))
    return tokens.tolist(), chances


def test_temperature_sharpens_and_flattens():
    assert kept([0.2, 0.8], temperature=1.0)[1] == pytest.approx([0.2, 0.8])
    assert kept([0.2, 0.8], temperature=0.5)[1] == pytest.approx([0.04 / 0.68, 0.64 / 0.68])


def test_top_k_keeps_the_k_most_likely():
    tokens, chances = kept([0.1, 0.4, 0.2, 0.3], temperature=1, top_k=2)
    assert dict(zip(tokens, chances, strict=True)) == pytest.approx({1: 4 / 7, 3: 3 / 7})


def test_top_p_keeps_the_token_that_reaches_it():
    assert kept([0.1, 0.5, 0.3, 0.1], temperature=1, top_p=0.6)[0] == [1, 2]
    assert kept([0.1, 0.5, 0.3, 0.1], temperature=1, top_p=0.001)[0] == [1]


@pytest.mark.parametrize("k", [1, 5, 40, 500, 1000])
def test_the_largest_values_are_found_in_any_vocabulary(k):
    for length in (1, 63, 700, 6500):
        values = np.random.default_rng(length).permutation(length).astype(np.float32)
        assert sorted(values[largest_of(values, k)]) == list(range(max(0, length - k), length))


def test_top_p_of_a_flat_distribution_keeps_its_share_of_the_whole_vocabulary():
    tokens, chances = kept([1.0] * 1000, temperature=1, top_p=0.7501)
    assert len(tokens) == 751
    assert chances == pytest.approx([1 / 751] * 751)


def test_min_p_is_a_share_of_the_most_likely():
    assert kept([0.1, 0.5, 0.26, 0.14], temperature=1, min_p=0.5)[0] == [1, 2]


def test_a_tiny_temperature_is_greedy_and_warns_of_nothing():
    with warnings.catch_warnings(action="error"):
        assert kept([0.3, 0.4, 0.3], temperature=1e-300)[1].tolist() == [0, 1, 0]


def test_the_same_seed_gives_the_same_answer_and_another_one_another(session):
    wild = NgramSession([], vocabulary_tokens=16, context_tokens=64)
    answers = [
        answer(wild, [1], max_tokens=40, sampling=Sampling(temperature=1, seed=seed))[0]
        for seed in (1, 1, 2, -1, 2**64 - 1, 2**32 + 1)
    ]
    assert answers[0] == answers[1] != answers[2]
    assert answers[5] != answers[0]  # all 64 bits count
    assert answers[3] == answers[4]  # a negative seed is taken modulo 2 ** 64


def test_chances_are_those_of_the_distribution(monkeypatch):
    logits = np.log(np.array([0.5, 0.3, 0.2], dtype=np.float32))
    session = NgramSession([], vocabulary_tokens=3, context_tokens=4001)
    monkeypatch.setattr(session, "_logits", lambda: logits)
    tokens, _ = answer(session, [1], sampling=Sampling(temperature=1, seed=5))
    assert np.bincount(tokens) / len(tokens) == pytest.approx([0.5, 0.3, 0.2], abs=0.03)


def test_a_repetition_penalty_leads_out_of_a_loop(monkeypatch):
    loop = NgramSession([[1, 2, 1, 2, 1]], vocabulary_tokens=4, context_tokens=40)
    assert answer(loop, [1], max_tokens=4)[0] == [2, 1, 2, 1]
    logits = np.array([-3, 4, 4.4, 3.5], dtype=np.float32)
    monkeypatch.setattr(loop, "_logits", lambda: logits)
    chosen = answer(loop, [1], max_tokens=2, sampling=Sampling(repetition_penalty=1.3))[0]
    assert chosen == [2, 3]


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"seed": 2**64},
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(setting):
    with pytest.raises(UsageError, match=next(iter(setting))):
        Sampling(**setting)


@pytest.mark.toolchain
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7, "top_k": 11},
        {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    ],
)
def test_the_filters_keep_what_those_of_transformers_keep(settings):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    logits = np.random.default_rng(3).normal(size=50).astype(np.float32) * 2
    scores = torch.from_numpy(logits)[None] / settings["temperature"]
    for name, warper in (
        ("top_k", transformers.TopKLogitsWarper),
        ("top_p", transformers.TopPLogitsWarper),
        ("min_p", transformers.MinPLogitsWarper),
    ):
        if name in settings:
            scores = warper(settings[name])(None, scores)
    expected = scores.softmax(-1)[0].numpy()
    tokens, chances = candidates(logits, Sampling(**settings))
    assert expected[tokens] == pytest.approx(chances, rel=1e-5)
    assert (expected > 0).sum() == len(tokens)
