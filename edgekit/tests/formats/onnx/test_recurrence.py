"""Convolutions and delta nets through ONNX Runtime: their states, cut by cut, text by text."""

import itertools

import pytest

from edgekit.errors import MissingDependencyError, UsageError
from edgekit.formats import BuildRequest
from edgekit.formats.onnx import conversion, memory, tensor_types, writing
from edgekit.proof import transformers_logits
from edgekit.source import opening
from edgekit.tests.formats.onnx.test_families import MAX_KL_NATS, compare, decoded, make
from edgekit.tests.needs import needs
from edgekit.tests.tiny.checkpoints import write_tiny_checkpoint


pytestmark = [pytest.mark.toolchain, needs("torch", "onnxruntime")]
np = pytest.importorskip("numpy")

# Five taps, and three with one key head for four value heads, in uneven orders of layers; and
# experts, which keep nothing of a token.
KINDS = ("lfm2-five-taps", "qwen3.5-pattern", "lfm2-moe")
TAPS = {"lfm2-five-taps": 5, "qwen3.5-pattern": 3, "lfm2-moe": 3}
TEXT_TOKENS = 90
LONG_TOKENS = 4000


@pytest.fixture(scope="module", params=KINDS)
def read(request, tmp_path_factory):
    """Return a model, two texts, and what transformers says of them."""
    made = make(tmp_path_factory.mktemp("states"), request.param)
    texts = list(itertools.islice(made.chunks(tokens=TEXT_TOKENS), 2))
    return made, texts, list(transformers_logits.logits(made.checkpoint, texts)), request.param


def check(expected, said, ids):
    found = compare(np.stack(expected), np.stack(said), ids)
    assert found.mean_kl_nats <= MAX_KL_NATS
    assert found.same_top_token == 1


def test_a_text_may_be_cut_anywhere(read):
    made, (ids, _), (expected, _), kind = read
    session, cuts = made.open(), [1, TAPS[kind] - 1, TAPS[kind], 7, 8, 9, 63, 64, 65]
    for cut in cuts:
        said = [session.prefill(ids[:cut]).copy(), session.prefill(ids[cut:]).copy()]
        check([expected[cut - 1], expected[-1]], said, [ids[cut], 0])
        session.reset()
    session.close()


def test_a_text_after_another_is_read_as_if_alone(read):
    made, texts, expected, _ = read
    session = made.open()
    check(expected[0], decoded(session, texts[0]), texts[0])
    session.reset()
    check(expected[1], decoded(session, texts[1]), texts[1])
    check(expected[0], session.all_logits(texts[0]), texts[0])
    said = session.prefill(texts[1]).copy()  # `all_logits` has emptied the cache
    check(expected[1][[-1, -1]], [said, said], [0, 0])
    session.close()


def test_what_is_refused_is_not_in_the_state(read):
    made, (ids, _), (expected, _), _ = read
    session = made.open()
    session.prefill(ids[:20])
    with pytest.raises(UsageError, match="there is no token id -1"):
        session.prefill([ids[20], -1])
    check(expected[20:], decoded(session, ids[20:]), ids[20:])
    session.close()


def test_a_state_goes_back_to_the_begin_only(read):
    made, (ids, _), (expected, _), _ = read
    session = made.open()
    session.prefill(ids[:20])
    assert session.rewind(20)
    assert not session.rewind(19)
    session.reset()
    said = session.prefill(ids).copy()
    check(expected[[-1, -1]], [said, said], [0, 0])
    session.close()


@pytest.mark.parametrize("kind", KINDS[:2])
def test_nothing_drifts_in_four_thousand_tokens(kind, tmp_path):
    made = make(tmp_path, kind, max_position_embeddings=LONG_TOKENS)
    ids = np.random.default_rng(5).integers(0, made.checkpoint.spec.vocab_size, LONG_TOKENS)
    (expected,) = transformers_logits.logits(made.checkpoint, [ids.tolist()])
    session = made.open()
    check(expected, decoded(session, ids.tolist()), ids)
    session.close()


def test_an_older_runtime_is_refused_by_the_version_that_has_the_operators(read, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", "1.25.0")
    with pytest.raises(MissingDependencyError, match=r"1\.25\.0 lacks .* 1\.25\.1 has them"):
        read[0].open()


@pytest.mark.parametrize("version", ["1.25.1", "1.26.0.dev20260914", "1.32.0+cu13"])
def test_a_runtime_that_has_them_is_not(version, read, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", version)
    read[0].open().close()


def test_memory_holds_keys_and_values_where_layers_attend_and_states_elsewhere(read):
    made, session = read[0], read[0].open()
    spec, tokens = made.checkpoint.spec, made.checkpoint.spec.context_tokens
    kept = sum(values.nbytes for values in session._cache)
    states = sum(state.nbytes for step in session._steps for state in step.past_states)
    assert min(kept, states) > 0
    assert memory.cache_bytes(spec, context_tokens=tokens, is_half=False) == kept + states
    session.close()


@pytest.mark.parametrize("recipe", tensor_types.RECIPES)
def test_every_recipe_computes_states_in_float32(recipe, read, tmp_path):
    made, (ids, _), _, _ = read
    if made.checkpoint.spec.has_experts and tensor_types.BUILDS[recipe].is_half:
        pytest.skip("experts are refused there")
    request = BuildRequest(recipe=tensor_types.RECIPES[recipe])
    entry = conversion.convert(made.checkpoint, request, tmp_path, progress=lambda _: None)
    held = {name: kind for name, _, kind in tensor_types.contents(tmp_path / entry)}
    fine = ("conv_taps", "delta_taps", "delta_beta", "delta_alpha", "delta_decay", "delta_norm",
            "delta_decay_bias")  # fmt: skip
    kinds = {kind for name, kind in held.items() if name.endswith(fine)}
    assert kinds == {"F32"}
    session = type(made.open())(tmp_path / entry, context_tokens=TEXT_TOKENS, threads=1)
    assert {state.dtype for state in session._steps[0].past_states} == {np.dtype(np.float32)}
    rows = session.all_logits(ids)
    # Activations are rounded to 8 bits in blocks; a last digit may fall otherwise.
    found = compare(rows, decoded(session, ids), ids)
    assert found.mean_kl_nats <= 2e-3
    session.close()


def test_four_bits_leave_eight_to_the_matrices_of_delta_nets_and_say_so(tmp_path):
    sizes = {"hidden_size": 128, "linear_value_head_dim": 64}
    checkpoint = opening.open_checkpoint(write_tiny_checkpoint(tmp_path, "qwen3.5", **sizes))
    told = []
    for recipe in ("INT8", "UINT4", "UINT4_ALL"):
        request = BuildRequest(recipe=tensor_types.RECIPES[recipe])
        layout = writing.lay_out(checkpoint, request)
        told.append(any("delta_output have 8 bits" in note for note in layout.notes))
        kinds = {
            w.tensor_type for w in layout.placements
            if w.role.endswith(("delta_qkv", "delta_gate", "delta_output"))
        }  # fmt: skip
        assert kinds == {"UINT4" if recipe == "UINT4_ALL" else "INT8"}
    assert told == [False, True, False]
