"""What convolutions and delta nets keep of a text, in ExecuTorch programs."""

import json
from contextlib import closing
from itertools import pairwise

import pytest

from edgekit.formats import BuildRequest
from edgekit.formats.executorch import (
    app_kit,
    conversion,
    memory,
    program,
    running,
    tensor_types,
    writing,
)
from edgekit.formats.executorch.backends import xnnpack
from edgekit.formats.executorch.backends.xnnpack import limits
from edgekit.proof import transformers_logits
from edgekit.source import opening
from edgekit.tests.formats.executorch.test_families import (
    agreement,
    eager,
    expected_logits,
    for_phones,
    max_kl_nats,
    texts,
)
from edgekit.tests.formats.executorch.test_runtime import ANSWER_TOKENS, printed, stock_answers
from edgekit.tests.needs import needs
from edgekit.tests.tiny.checkpoints import write_tiny_checkpoint
from edgekit.tests.tiny.executorch_artifacts import CONTEXT_TOKENS, greedy, tiny
from edgekit.text.tokenizer import open_tokenizer


np = pytest.importorskip("numpy")

pytestmark = [
    pytest.mark.toolchain,
    needs("torch", "transformers", "executorch"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]

# Taps with a bias, and a convolution in the last layer; nets of four values a key, one the last.
KINDS = ("lfm2-bias", "qwen3.5-pattern")
LONG_TOKENS = 4000
IDS = np.random.default_rng(3).integers(0, 500, 130).tolist()


@pytest.fixture(params=KINDS)
def path(request):
    return tiny(kind=request.param) / "model.pte"


@pytest.fixture
def session(path):
    session = running.load(path, context_tokens=CONTEXT_TOKENS, threads=1)
    yield session
    session.close()


@pytest.fixture
def checkpoint(path):
    return opening.open_checkpoint(path.parents[1] / "checkpoint")


def test_a_text_may_be_cut_anywhere(session, checkpoint):
    (expected,) = expected_logits(checkpoint, IDS)[None]
    for cut in (1, 2, 3, 7, 8, 9, 63, 64, 65):
        session.reset()
        rows = [session.prefill(IDS[:cut]).copy(), session.prefill(IDS[cut:]).copy()]
        found = agreement(expected, rows, [cut - 1, len(IDS) - 1], IDS)
        assert found.mean_kl_nats <= max_kl_nats(checkpoint.spec)
    said = session.all_logits(IDS)
    found = agreement(expected, list(said), range(len(IDS)), IDS)
    assert found.mean_kl_nats <= max_kl_nats(checkpoint.spec)


def test_a_text_says_after_another_what_it_says_alone(session):
    alone = session.prefill(IDS[:70]).copy()
    session.reset()
    session.prefill(IDS[::-1])
    session.reset()
    np.testing.assert_array_equal(session.prefill(IDS[:70]), alone)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_drifts_in_four_thousand_tokens(kind, tmp_path):
    path = write_tiny_checkpoint(tmp_path / "model", kind, max_position_embeddings=LONG_TOKENS)
    long = opening.open_checkpoint(path)
    request = BuildRequest(recipe=tensor_types.RECIPES["F32"], context_tokens=LONG_TOKENS)
    made = tmp_path / conversion.convert(long, request, tmp_path, progress=lambda _: None)
    ids = np.random.default_rng(5).integers(0, long.spec.vocab_size, LONG_TOKENS).tolist()
    (expected,) = transformers_logits.logits(long, [ids])
    half = LONG_TOKENS // 2
    with closing(running.load(made, context_tokens=LONG_TOKENS, threads=1)) as session:
        said = [session.prefill(ids[:half]).copy()]  # in blocks, the rest token by token
        said += [session.decode(id).copy() for id in ids[half:]]
    for first in range(half, LONG_TOKENS, half // 4):  # no part of it is further off
        rows = range(first, first + half // 4)
        found = agreement(expected, said[first - half + 1 :][: len(rows)], rows, ids)
        assert found.mean_kl_nats <= max_kl_nats(long.spec)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_that_memory_held_before_survives(kind, tmp_path):
    import torch

    module = eager(opening.open_checkpoint(write_tiny_checkpoint(tmp_path / "model", kind)))
    tokens, places = torch.tensor([IDS[:9]]), torch.arange(9)
    with torch.inference_mode():
        clean = module(tokens, places).numpy().copy()
        held = [it for name, it in module.states.named_buffers() if name != "masks"]
        assert held
        for buffer in held:
            buffer.fill_(torch.nan)
        np.testing.assert_array_equal(module(tokens, places).numpy(), clean)


@pytest.mark.parametrize(
    ("kind", "variant"), [("lfm2-bias", "llm-ops"), ("qwen3.5-pattern", "portable")]
)
def test_the_runner_of_phones_says_the_same_text_after_text(kind, variant):
    directory = tiny(variant, kind=kind)
    found = json.loads((directory / app_kit.PROMPTS).read_text())
    prompts = [entry["prompt"] for entry in found["prompts"]]
    assert len(prompts) > 1
    answers = stock_answers(directory, prompts, tokens=ANSWER_TOKENS)
    ours = open_tokenizer(directory / "tokenizer.json")
    session = running.load(directory / "model.pte", context_tokens=CONTEXT_TOKENS, threads=1)
    for entry, answer in zip(found["prompts"], answers, strict=True):
        ids = greedy(session, entry["ids"], ANSWER_TOKENS, vocabulary=ours.get_vocab_size())
        ends = [index for index, id in enumerate(ids) if id in found["stop_ids"]]
        said = printed(ours, ids[: ends[0] + 1] if ends else ids)
        assert answer == said + ("\n" if ends else "")  # a line begins where one was met
    session.close()


def test_the_operator_of_phones_runners_has_heads_of_256_with_a_gate(tmp_path):
    """As published: the tiny kinds have smaller heads."""
    path = write_tiny_checkpoint(
        tmp_path / "model", "qwen3.5", head_dim=256, num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    checkpoint = opening.open_checkpoint(path)
    session = running.load(
        for_phones(checkpoint, tmp_path, context_tokens=96), context_tokens=96, threads=1
    )
    ids = texts(checkpoint)[0][:96]
    rows = [session.prefill(ids[first:last]).copy() for first, last in pairwise((0, 70, 95, 96))]
    session.close()
    found = agreement(expected_logits(checkpoint, ids), rows, [69, 94, 95], ids)
    assert found.mean_kl_nats <= max_kl_nats(checkpoint.spec)


def test_any_runtime_has_the_operators(path):
    forward = program.read(path).method("forward")
    assert forward
    assert forward.operators
    assert not [
        name for name in forward.operators if not name.startswith(("aten::", "executorch_prim::"))
    ]


def test_what_is_set_aside_is_predicted(path, checkpoint):
    forward = program.read(path).method("forward")
    assert forward
    spec = checkpoint.spec
    most = limits.call_tokens(spec, context_tokens=CONTEXT_TOKENS)
    between = memory.planned_bytes(spec, context_tokens=CONTEXT_TOKENS, call_tokens=most)
    predicted = between + memory.cache_bytes(spec, context_tokens=CONTEXT_TOKENS)
    assert forward.planned_bytes == pytest.approx(predicted + limits.masks_bytes(spec), rel=0.25)


def test_four_bits_leave_delta_nets_eight_and_what_decays_exact(checkpoint):
    if not checkpoint.spec.has_delta_nets:
        pytest.skip("it has none")
    request = BuildRequest(recipe=tensor_types.RECIPES["8da4w"], variant=xnnpack.PORTABLE)
    layout = writing.lay_out(checkpoint, request)
    held = {placement.role: placement.tensor_type for placement in layout.placements}
    stored = {
        kind: {role.rpartition(".")[2] for role, it in held.items() if it == kind and "1." in role}
        for kind in ("F32", "INT8", "INT4_G32")
    }
    assert {"delta_taps", "delta_decay", "delta_alpha", "delta_beta"} <= stored["F32"]
    assert {"delta_qkv", "delta_gate", "delta_output"} <= stored["INT8"]
    assert {"gate", "up"} <= stored["INT4_G32"]
    assert any("delta nets are float32" in note for note in layout.notes)


def test_runners_are_told_how_much_a_call_may_read(checkpoint):
    found = conversion.metadata(checkpoint, CONTEXT_TOKENS, xnnpack.PORTABLE)
    has_nets = checkpoint.spec.has_delta_nets
    assert found["get_max_seq_len"] == (limits.CALL_TOKENS if has_nets else CONTEXT_TOKENS)
    assert found["get_max_context_len"] == CONTEXT_TOKENS


def recurrence(parts, log_decay, beta, state):
    """Return what one token after the other reads, in float64, and the last state."""
    query, key, value = parts
    read = []
    for at in range(len(query)):
        state = state * np.exp(log_decay[at])
        state = state + np.outer(key[at], beta[at] * (value[at] - key[at] @ state))
        read.append(query[at] @ state)
    return np.stack(read), state


@pytest.mark.parametrize(
    ("likeness", "decay", "beta"),
    [(0.0, 0.05, 0.5), (0.5, 1e-3, 0.9), (1.0, 1e-5, 0.99), (1.0, 3.0, 0.99), (0.5, 20.0, 0.9)],
)
def test_the_rule_is_exact_however_alike_keys_are(likeness, decay, beta):
    import torch

    from edgekit.formats.executorch.backends.xnnpack import delta_net
    from edgekit.model.mixers import DELTA_EPSILON, DeltaNet
    from edgekit.model.norm import Norm

    width, tokens, random = 32, limits.CALL_TOKENS, np.random.default_rng(4)
    net = DeltaNet(
        key_heads=1, value_heads=1, key_head_dim=width, value_head_dim=width, taps=4,
        norm=Norm(kind="rms", epsilon=1e-6),
    )  # fmt: skip
    rule = delta_net.DeltaRule(
        net=net, number=lambda value: torch.tensor([value]),
        mean=torch.full((1, width), 1 / width), ones=torch.ones(1, 1, 1, 1),
    )  # fmt: skip
    same = random.standard_normal((1, 3 * width))
    mixed = likeness * same + (1 - likeness) * random.standard_normal((tokens, 3 * width))
    steps = -decay * random.uniform(0.5, 1.5, (tokens, 1))
    betas, state = np.full((tokens, 1), beta), random.standard_normal((width, width)) * 0.3
    given = (mixed, steps, betas, delta_net.masks()[:, :tokens, :tokens], state[None])
    read, left = rule.read(*(torch.as_tensor(it, dtype=torch.float32) for it in given))
    query, key, value = np.split(mixed, 3, axis=1)
    query, key = (
        it / np.sqrt((it * it).sum(1, keepdims=True) + DELTA_EPSILON) for it in (query, key)
    )
    parts = query * width**-0.5, key, value
    expected, last = recurrence(parts, steps[:, 0], betas[:, 0], state)
    np.testing.assert_allclose(read[:, 0].numpy(), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(left[0].numpy(), last, rtol=0, atol=3e-5)
