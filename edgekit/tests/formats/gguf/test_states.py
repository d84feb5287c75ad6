"""Texts that leave a state behind, in llama.cpp: read in pieces, one after another, for long.

And what is rounded of the decoders that have one: LFM2, Qwen 3.5, and Gemma 4 with them.
"""

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgekit import formats
from edgekit.formats import BuildRequest
from edgekit.formats.gguf import conversion, importance, layout
from edgekit.formats.gguf.runtime import GgufSession
from edgekit.model.checkpoint_protocol import Calibration
from edgekit.proof import transformers_logits
from edgekit.quant.damping import damped
from edgekit.source import opening
from edgekit.source.checkpoint import Checkpoint
from edgekit.tests.formats.gguf.test_families import Made, make, open_tiny
from edgekit.tests.formats.gguf.test_tensor_types import payload, quantize_with_llama_cpp
from edgekit.tests.needs import needs


pytestmark = [pytest.mark.toolchain, needs("torch", "tokenizers", "llama_cpp")]
np = pytest.importorskip("numpy")

RECIPES = formats.get("gguf").RECIPES
TAPS = {
    "lfm2": 3,
    "lfm2-five-taps": 5,
    "lfm2-moe": 3,
    "lfm2-moe-scaled": 5,
    "qwen3.5": 4,
    "qwen3.5-tied": 4,
    "gemma4": 2,
}
MAX_KL_NATS = 1e-6
STATUS = Path("/proc/self/status")


@pytest.fixture(scope="module", params=TAPS)
def made(request, tmp_path_factory) -> Made:
    return make(tmp_path_factory.mktemp("states"), request.param)


@pytest.fixture(scope="module")
def taps(made) -> int:
    return next((net.taps for it in made.checkpoint.spec.layers if (net := it.mixer)
                 and hasattr(net, "taps")), 2)  # fmt: skip


@pytest.fixture(scope="module")
def texts(made) -> list[list[int]]:
    random = np.random.default_rng(7)
    return [random.integers(0, made.checkpoint.spec.vocab_size, 130).tolist() for _ in range(2)]


@pytest.fixture(scope="module")
def expected(made, texts):
    return list(transformers_logits.logits(made.checkpoint, texts))


@pytest.fixture
def session(made) -> Iterator[GgufSession]:
    session = made.open()
    yield session
    session.close()


def kl(expected, said) -> float:
    """Return the mean over rows of logits, in nats."""
    p, q = (_log_softmax(np.atleast_2d(rows).astype(np.float64)) for rows in (expected, said))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def _log_softmax(rows):
    rows -= rows.max(-1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(-1, keepdims=True))


def test_a_text_cut_anywhere_says_what_it_says_whole(session, texts, expected, taps):
    cuts = sorted({1, taps - 1, taps, 7, 8, 9, 63, 64, 65})
    found = []
    for cut in cuts:
        session.reset()
        before = session.prefill(texts[0][:cut]).copy()
        after = session.prefill(texts[0][cut:]).copy()
        found.append(kl(expected[0][[cut - 1, -1]], np.stack([before, after])))
    assert len(found) >= 8
    assert max(found) <= MAX_KL_NATS


def test_a_text_read_token_by_token_says_what_it_says_whole(session, texts, expected):
    session.reset()
    said = [session.decode(token).copy() for token in texts[0]]
    assert kl(expected[0], np.stack(said)) <= MAX_KL_NATS


def test_texts_one_after_another_say_what_each_says_alone(session, texts, expected):
    said = []
    for text in (*texts, texts[0][:1], texts[1]):
        session.reset()
        said.append(session.prefill(text).copy())
    alone = np.stack([expected[0][-1], expected[1][-1], expected[0][0], expected[1][-1]])
    assert kl(alone, np.stack(said)) <= MAX_KL_NATS


def test_a_state_is_not_taken_back_and_a_cache_is(made, session, texts, expected):
    session.prefill(texts[0])
    assert session.rewind(20) != made.checkpoint.spec.has_states
    if made.checkpoint.spec.has_states:  # as whoever asks does then
        session.reset()
        session.prefill(texts[0][:20])
    assert kl(expected[0][20], session.decode(texts[0][20])) <= MAX_KL_NATS


def test_several_threads_say_what_one_says(made, texts, expected):
    session = GgufSession(made.path, context_tokens=256, threads=2, has_exact_cache=True)
    assert kl(expected[0], session.all_logits(texts[0])) <= MAX_KL_NATS
    session.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lfm2", "qwen3.5"])
def test_four_thousand_tokens_do_not_drift(name, tmp_path):
    made = make(tmp_path, name, max_position_embeddings=4096)
    random = np.random.default_rng(3)
    ids = random.integers(0, made.checkpoint.spec.vocab_size, 4000).tolist()
    (expected,) = transformers_logits.logits(made.checkpoint, [ids])
    session = made.open()
    said = session.all_logits(ids)
    assert kl(expected[:256], said[:256]) <= MAX_KL_NATS
    assert kl(expected[-256:], said[-256:]) <= MAX_KL_NATS
    session.prefill(ids[:3000])
    rest = [session.decode(token).copy() for token in ids[3000:]]
    assert kl(expected[-256:], np.stack(rest[-256:])) <= MAX_KL_NATS
    session.close()


@pytest.mark.parametrize(("name", "seed"), [("lfm2", 0), ("qwen3.5", 0), ("gemma4", 7)])
def test_a_chat_of_llama_cpp_python_goes_on_as_transformers_does(name, seed, tmp_path):
    """One ``Llama`` for all turns, which keeps what it can of the prompt before."""
    import llama_cpp
    from transformers import AutoModelForCausalLM

    made = make(tmp_path, name, seed=seed)
    tokenizer = transformers_logits.tokenizer(made.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(made.checkpoint.directory)
    chat = llama_cpp.Llama(str(made.path), n_ctx=256, n_threads=1, verbose=False)
    turns, expected, said = [], [], []
    for question in ("Name a colour.", "And another?", "Why?"):
        turns.append({"role": "user", "content": question})
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        tokens = model.generate(ids, do_sample=False, max_new_tokens=8)[0, ids.shape[1] :]
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        # llama-cpp-python leaves bytes out that make no letter.
        expected.append(text.replace("\ufffd", ""))
        answer = chat.create_chat_completion(turns, temperature=0, max_tokens=16)
        said.append(answer["choices"][0]["message"]["content"])
        turns.append({"role": "assistant", "content": text})
    chat.close()
    assert all(len(text) > 3 for text in expected)
    assert [found[: len(text)] for found, text in zip(said, expected, strict=True)] == expected


@pytest.mark.skipif(not STATUS.exists(), reason="memory is read from /proc")
def test_embeddings_of_the_layers_stay_on_disk_but_for_the_rows_that_are_read(tmp_path):
    made = make(tmp_path, "gemma4", hidden_size_per_layer_input=8192)
    (table,) = [it for it in layout.read(made.path).tensors if "per_layer_token" in it.name]
    before = held_bytes()
    session = GgufSession(made.path, context_tokens=256, threads=1)
    session.prefill([1, 2, 3])
    assert held_bytes() - before < table.size_bytes
    session.close()


def held_bytes() -> int:
    """Return what this process holds that is no part of a file."""
    (line,) = [it for it in STATUS.read_text().splitlines() if it.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024


# Rounded, in blocks of 256

WIDE = {
    "lfm2": {"hidden_size": 256, "block_auto_adjust_ff_dim": False, "intermediate_size": 512},
    "lfm2-moe": {"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 256},
    "qwen3.5": {  # two heads of 128 to a block of 256 columns, and they change places
        "hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
    },
    "gemma4": {
        "hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "global_head_dim": 128,
    },
}  # fmt: skip


def calibrated(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint of which some columns count more than others, at random."""
    random = np.random.default_rng(5)
    columns = {
        role: random.gamma(0.5, 1.0, shape[-1]).astype(np.float32)
        for role, shape in checkpoint.spec.weights()
        if len(shape) > 1
    }
    calibration = Calibration(text_sha256="0" * 64, importance=columns)
    return replace(checkpoint, calibration=calibration)


@pytest.mark.parametrize(
    ("name", "recipe"),
    [("lfm2", "Q4_K_M"), ("lfm2-moe", "Q4_K_M"), ("qwen3.5", "Q4_K_M"), ("qwen3.5", "Q4_0"),
     ("gemma4", "Q4_K_M")],
)  # fmt: skip
def test_a_rounded_file_says_in_llama_cpp_what_its_weights_say_in_transformers(
    name, recipe, tmp_path, monkeypatch
):
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    checkpoint = calibrated(open_tiny(tmp_path, name, **WIDE[name]))
    request = BuildRequest(recipe=RECIPES[recipe])
    planned = conversion.lay_out(checkpoint, request)
    entry = conversion.convert(
        checkpoint, request, tmp_path, pre="llama-bpe", progress=lambda _: None
    )
    assert (tmp_path / entry).stat().st_size == planned.artifact_bytes
    assert planned.calibration
    ids = np.random.default_rng(0).integers(0, checkpoint.spec.vocab_size, 200).tolist()
    session = GgufSession(tmp_path / entry, context_tokens=256, threads=1)
    said = session.all_logits(ids)
    session.close()
    decoded = opening.open_checkpoint(tmp_path / entry)
    (of_weights,) = transformers_logits.logits(decoded, [ids])
    # Measured: 2e-4 to 0.03, for what is multiplied is rounded to 8 bits, too.
    assert kl(of_weights, said) <= 0.06
    (exact,) = transformers_logits.logits(checkpoint, [ids])
    # Random matrices this wide lose more than trained ones: 0.4 to 1.4.
    assert kl(exact, said) <= 2


def test_the_columns_of_a_calibration_change_places_with_the_weights_they_are_for(tmp_path):
    """Of the matrix after a delta net, as llama-quantize rounds it with the columns of a file."""
    import llama_cpp

    made = make(tmp_path, "qwen3.5", **WIDE["qwen3.5"])
    checkpoint, request = calibrated(made.checkpoint), BuildRequest(recipe=RECIPES["Q5_K_M"])
    assert checkpoint.calibration
    assert checkpoint.calibration.importance
    columns = checkpoint.calibration.importance["layers.0.delta_output"]
    # Two value heads to each of two key heads; llama.cpp has the first of both, then the second.
    weighting = damped(columns.astype(np.float64), share=importance.DAMPING)
    assert weighting is not None
    weighting = np.ascontiguousarray(weighting.reshape(2, 2, 128).swapaxes(0, 1).ravel())
    row = llama_cpp.llama_cpp.llama_model_imatrix_data
    table = (row * 2)(
        row(b"blk.0.ssm_out.weight", weighting.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
            weighting.size)
    )  # fmt: skip
    theirs = quantize_with_llama_cpp(
        llama_cpp, made.path, tmp_path / "theirs.gguf", "Q5_K_M", imatrix=table
    )
    ours = tmp_path / "ours"
    ours.mkdir()
    entry = conversion.convert(checkpoint, request, ours, pre="x", progress=lambda _: None)
    file = layout.read(ours / entry)
    (own,) = [it for it in file.tensors if it.name == "blk.0.ssm_out.weight"]
    (other,) = [it for it in theirs.tensors if it.name == own.name]
    assert own.tensor_type == other.tensor_type == "Q5_K"
    assert payload(file, own) == payload(theirs, other)


# What is stored otherwise than llama-quantize would: what it leaves, or makes coarse.
FINER = {
    "lfm2": {},
    "lfm2-moe": {},
    "qwen3.5": {"ssm_alpha.weight": "F32", "ssm_beta.weight": "F32"},
    "gemma4": {"per_layer_model_proj.weight": "F16"},
}


@pytest.mark.parametrize(("name", "recipe"), [
    ("lfm2", "Q4_K_M"), ("lfm2", "Q3_K_M"), ("lfm2-moe", "Q4_K_M"), ("qwen3.5", "Q5_K_M"),
    ("gemma4", "Q4_K_M"),
])  # fmt: skip
def test_mixtures_are_those_of_llama_quantize_but_for_what_stays_fine(name, recipe, tmp_path):
    """A layer counts among those that have such a weight, as it does there."""
    import llama_cpp

    of_kinds: dict[str, dict[str, Any]] = {
        "lfm2": {"num_hidden_layers": 8, "layer_types": [
            "conv", "full_attention", *["conv", "full_attention", "full_attention"] * 2]},
        "lfm2-moe": {"num_hidden_layers": 16, "layer_types": ["conv", "full_attention"] * 8},
        "qwen3.5": {"num_hidden_layers": 8, "layer_types": None},
        "gemma4": {},
    }  # fmt: skip
    made = make(tmp_path, name, **WIDE[name], **of_kinds[name])
    theirs = quantize_with_llama_cpp(llama_cpp, made.path, tmp_path / "theirs.gguf", recipe)
    ours = tmp_path / "ours"
    ours.mkdir()
    request = BuildRequest(recipe=RECIPES[recipe])
    entry = conversion.convert(made.checkpoint, request, ours, pre="x", progress=lambda _: None)
    found = {info.name: info for info in theirs.tensors}
    file = layout.read(ours / entry)
    alike = [it for it in file.tensors if it.name.removeprefix("blk.").partition(".")[2]
             not in FINER[name] and it.name not in FINER[name]]  # fmt: skip
    assert len(alike) > 40
    assert {it.name: it.tensor_type for it in alike} == {
        it.name: found[it.name].tensor_type for it in alike
    }
    assert all(payload(file, it) == payload(theirs, found[it.name]) for it in alike)
    others = {it.name.split(".", 2)[-1] if it.name.startswith("blk.") else it.name: it.tensor_type
              for it in file.tensors if it not in alike}  # fmt: skip
    assert others == FINER[name]


@pytest.mark.parametrize(
    ("recipe", "finer", "others"),
    [("Q4_K_M", {"Q5_K", "Q6_K"}, {"Q4_K", "Q6_K"}), ("Q4_0", {"Q5_K"}, {"Q4_0"}),
     ("Q2_K", {"Q3_K"}, {"Q2_K", "Q3_K"})],
)  # fmt: skip
def test_beside_delta_nets_what_mixes_is_a_grade_finer_and_a_plan_says_so(
    recipe, finer, others, tmp_path
):
    checkpoint = open_tiny(tmp_path, "qwen3.5", **WIDE["qwen3.5"])
    planned = conversion.lay_out(checkpoint, BuildRequest(recipe=RECIPES[recipe]))
    types: dict[bool, set[str]] = {True: set(), False: set()}
    for it in planned.placements:
        part = it.role.rpartition(".")[2]
        if it.parameters > 10_000 and part not in {"token_embedding", "output_head"}:
            types[part not in {"gate", "up", "down"}].add(it.tensor_type)
    assert types == {True: finer, False: others}
    assert any("a grade finer" in note for note in planned.notes)
    assert any("ssm_alpha" in note for note in planned.notes)
