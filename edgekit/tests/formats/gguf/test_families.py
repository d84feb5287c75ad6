"""Every family through a GGUF file in llama.cpp, against transformers in float32."""

import json
import struct
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from edgekit import formats
from edgekit.errors import UsageError
from edgekit.formats import BuildRequest, ContextLimit
from edgekit.formats.gguf import (
    architectures,
    conversion,
    layout,
    running,
    runtime,
    writing,
)
from edgekit.formats.gguf.parts import tensor_name
from edgekit.formats.gguf.runtime import GgufSession
from edgekit.proof import transformers_logits
from edgekit.proof.fidelity import Comparison, Fidelity
from edgekit.proof.gates import max_logit_kl_nats
from edgekit.source import opening
from edgekit.source.checkpoint import Checkpoint
from edgekit.tests.formats.gguf.test_architectures import HAVE_NO_GRAPH, as_the_graph_sees_it
from edgekit.tests.formats.gguf.test_tensor_types import payload, quantize_with_llama_cpp
from edgekit.tests.needs import needs
from edgekit.tests.tiny.checkpoints import (
    CONTEXT_TOKENS,
    TINY,
    WINDOW_TOKENS,
    YARN,
    write_tiny_checkpoint,
)
from edgekit.text import corpus
from edgekit.text.corpus import CONVERSATIONS
from edgekit.text.tokenizer import Text


pytestmark = [pytest.mark.toolchain, needs("torch", "tokenizers", "llama_cpp")]
np = pytest.importorskip("numpy")

GGUF = formats.get("gguf")
F32 = GGUF.RECIPES["F32"]
MIN_POSITIONS = 500


@dataclass(frozen=True, kw_only=True)
class Case:
    """A tiny checkpoint, and what its config says otherwise than the one in `TINY`."""

    tiny: str
    fields: Mapping[str, Any] = field(default_factory=dict)


HAS_NO_DECODER = {*HAVE_NO_GRAPH, "phi3-longrope"}
CASES = {
    **{name: Case(tiny=name) for name in TINY if name not in HAS_NO_DECODER},
    "llama-untied": Case(tiny="llama", fields={"tie_word_embeddings": False}),
    "qwen2-odd-head-width": Case(tiny="qwen2", fields={"head_dim": 24}),
    "qwen2-untied": Case(tiny="qwen2", fields={"tie_word_embeddings": False}),
    "gemma3-untied": Case(tiny="gemma3", fields={"tie_word_embeddings": False}),
    "mistral-tied": Case(tiny="mistral", fields={"tie_word_embeddings": True}),
    "phi3-tied": Case(tiny="phi3", fields={"tie_word_embeddings": True}),
    "stablelm-tied": Case(
        tiny="stablelm-1.6b", fields={"tie_word_embeddings": True, "use_qkv_bias": False}
    ),
    "gemma3-logit-cap": Case(tiny="gemma3", fields={"final_logit_softcapping": 6.0}),
    "glm": Case(tiny="glm", fields={"head_dim": 16}),
    "nemotron": Case(tiny="nemotron", fields={"head_dim": 16}),
    "exaone4-windows": Case(tiny="exaone4-windows", fields={"num_hidden_layers": 64}),
    "cohere-norms": Case(
        tiny="cohere",
        fields={"num_hidden_layers": 64, "max_position_embeddings": 64, "use_qk_norm": True},
    ),
    "gemma2-without-caps": Case(
        tiny="gemma2", fields={"attn_logit_softcapping": None, "final_logit_softcapping": None}
    ),
    "qwen3.5-pattern": Case(tiny="qwen3.5-pattern", fields={"rms_norm_eps": 1e-6}),
    "gemma4-donors": Case(
        tiny="gemma4-other-donors",
        fields={"layer_types": [*["sliding_attention"] * 4, *["full_attention"] * 3]},
    ),
    # The score's scale is not that of the head, and llama.cpp tells by the depth.
    "gemma2-27b": Case(
        tiny="gemma2-wide-heads",
        fields={"num_hidden_layers": 46, "max_position_embeddings": 64},
    ),
}


@dataclass(frozen=True, kw_only=True)
class Made:
    """A checkpoint and the file made of it."""

    checkpoint: Checkpoint
    path: Path
    limit: ContextLimit

    @property
    def max_mean_kl_nats(self) -> float:
        """What the gate allows; ggml looks GELU up in a float16 table."""
        return max_logit_kl_nats(F32, writing.lay_out(self.checkpoint, BuildRequest(recipe=F32)))

    def open(self, *, has_exact_cache: bool = True) -> GgufSession:
        return GgufSession(
            self.path,
            context_tokens=self.limit.tokens,
            threads=1,
            has_exact_cache=has_exact_cache,
        )

    def chunks(self) -> Iterator[list[int]]:
        """Yield random texts until there are enough positions, the first as long as can be."""
        random, left = np.random.default_rng(0), MIN_POSITIONS
        while left > 0:
            ids = random.integers(0, self.checkpoint.spec.vocab_size, self.limit.tokens)
            left -= len(ids)
            yield ids.tolist()

    def fidelity(self) -> Fidelity:
        chunks, comparison, session = list(self.chunks()), Comparison(), self.open()
        for ids, expected in zip(
            chunks, transformers_logits.logits(self.checkpoint, chunks), strict=True
        ):
            comparison.add(expected, session.all_logits(ids), np.array(ids))
        session.close()
        return comparison.result()

    def text(self) -> Text:
        rules = self.checkpoint.text.rules()
        return Text.open(self.checkpoint.directory, rules)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def open_tiny(directory: Path, name: str, **fields: Any) -> Checkpoint:
    return opening.open_checkpoint(write_tiny_checkpoint(directory / "model", name, **fields))


def make(directory: Path, name: str, **fields: Any) -> Made:
    return convert(open_tiny(directory, name, **fields), directory)


def convert(checkpoint: Checkpoint, directory: Path) -> Made:
    entry = writing.convert(
        checkpoint, BuildRequest(recipe=F32), directory, progress=lambda _: None
    )
    limit = writing.context_limit(checkpoint)
    return Made(checkpoint=checkpoint, path=directory / entry, limit=limit)


@pytest.fixture(scope="module", params=CASES)
def made(request, tmp_path_factory):
    case = CASES[request.param]
    return make(tmp_path_factory.mktemp("gguf"), case.tiny, **case.fields)


# Every family, every shape


def test_logits_are_those_of_transformers_as_far_as_the_context_goes(made):
    found = made.fidelity()
    assert found.positions >= MIN_POSITIONS
    assert found.mean_kl_nats <= made.max_mean_kl_nats
    assert found.same_top_token >= 0.99


def test_only_where_ggmls_own_kernels_round_is_more_allowed(made):
    spec = made.checkpoint.spec
    of_layer = {"gelu_tanh": 1e-6 if spec.is_gated else 4e-6}.get(spec.activation, 0)
    assert made.max_mean_kl_nats == pytest.approx(1e-6 + of_layer * len(spec.layers))


def test_a_gemma_to_which_the_table_adds_more_than_a_millionth_is_no_false_alarm(tmp_path):
    """Wide, and its embedding so small that the layers decide what is said."""
    from safetensors.torch import load_file, save_file

    path = write_tiny_checkpoint(
        tmp_path / "model", "gemma3", hidden_size=512, num_hidden_layers=4, layer_types=None,
        tie_word_embeddings=False,
    )  # fmt: skip
    weights = load_file(path / "model.safetensors")
    small = {
        name: weight * (0.1 if weight.ndim == 2 and "lm_head" not in name else 1)
        for name, weight in weights.items()
    }
    save_file(small, path / "model.safetensors", metadata={"format": "pt"})
    made = convert(opening.open_checkpoint(path), tmp_path)
    assert 1e-6 < made.fidelity().mean_kl_nats <= made.max_mean_kl_nats


def test_both_tokenizers_make_the_ids_of_transformers(made):
    from tokenizers.normalizers import NFC

    reference, text = transformers_logits.tokenizer(made.checkpoint), made.text()
    added = [f"one{token}two {token} three" for token in reference.get_added_vocab()]
    lines = corpus.lines() + added
    expected = [transformers_logits.ids(reference, line) for line in lines]
    assert [text.encode(line, adds_bos=False) for line in lines] == expected
    if isinstance(text.tokenizer.normalizer, NFC):  # llama.cpp composes no letters
        lines = [unicodedata.normalize("NFC", line) for line in lines]
    assert running.runtime_ids(made.path, lines) == expected


def test_conversations_render_to_the_bytes_of_transformers_and_the_file_holds_the_template(made):
    template = made.checkpoint.text.chat_template
    assert template is not None
    reference, text = transformers_logits.tokenizer(made.checkpoint), made.text()
    for turns in CONVERSATIONS:
        assert text.render(turns) == transformers_logits.rendered(
            reference, turns, template=template
        )
    assert layout.read(made.path).metadata["tokenizer.chat_template"] == template


def test_llama_cpp_ends_an_answer_at_every_stop_id(made):
    stops = made.checkpoint.text.declared_stop_ids
    config = json.loads((made.checkpoint.directory / "generation_config.json").read_text())
    assert set(stops) >= set(config["eos_token_id"])
    llama, model = runtime.library(), runtime.open_model(made.path, vocabulary_only=True)
    table = llama.llama_model_get_vocab(model)
    ends = {id for id in range(made.checkpoint.spec.vocab_size)
            if llama.llama_vocab_is_eog(table, id)}  # fmt: skip
    llama.llama_model_free(model)
    assert ends >= set(stops)
    assert len(ends) < 6  # not everything ends one


def test_the_file_is_as_planned(made):
    planned = writing.lay_out(made.checkpoint, BuildRequest(recipe=F32))
    assert made.path.stat().st_size == planned.artifact_bytes
    assert {tensor_type for _, _, tensor_type in running.contents(made.path)} == {"F32"}
    assert not planned.substituted


def test_read_back_the_file_is_a_checkpoint_of_the_same_weights_and_ids(
    made, tmp_path, monkeypatch
):
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path))
    read, original = opening.open_checkpoint(made.path), made.checkpoint
    graph = architectures.choose(original.spec, family=original.architecture)
    assert replace(read.spec, is_tied=original.spec.is_tied) == as_the_graph_sees_it(
        original.spec, graph
    )
    for role, shape in original.spec.weights():
        stored, kept = read.weight(role), shape
        if role == "layer_embedding":  # the file has a row for each token, and no more
            kept = (original.spec.vocab_size, *shape[1:])
        assert stored.shape == kept
        expected = original.weight(role)[: kept[0]] * graph.multiplier(role, original.spec)
        np.testing.assert_allclose(stored, expected, rtol=0, atol=2e-7)
    ours, theirs = transformers_logits.tokenizer(read), transformers_logits.tokenizer(original)
    assert all(
        transformers_logits.ids(ours, line) == transformers_logits.ids(theirs, line)
        for line in corpus.lines()
    )
    assert set(read.text.declared_stop_ids) >= set(original.text.declared_stop_ids)


def test_what_llama_cpp_passes_over_in_a_gemma_4_is_no_reason_to_refuse_it(tmp_path, monkeypatch):
    """Keys that nothing reads, as older checkpoints hold them; and no scales, which are then 1."""
    made = make(tmp_path, "gemma4")
    file = layout.read(made.path)
    kept = {it.name: layout.read_tensor(file, it) for it in file.tensors
            if not it.name.endswith("layer_output_scale.weight")}  # fmt: skip
    kept |= {f"blk.7.{part}.weight": kept[f"blk.4.{part}.weight"] for part in ("attn_k", "attn_v")}
    keys = conversion.metadata(made.checkpoint, F32, architectures.get("gemma4"), (), pre="gemma4")
    entries = [layout.TensorEntry(name=name, shape=values.shape, tensor_type="F32")
               for name, values in kept.items()]  # fmt: skip
    with layout.Writer(tmp_path / "other.gguf", keys, entries) as writer:
        for name, values in kept.items():
            writer.write(name, values.tobytes())
    runtime.library().llama_model_free(runtime.open_model(tmp_path / "other.gguf"))
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    read = opening.open_checkpoint(tmp_path / "other.gguf")
    assert read.weight("layers.7.layer_scale") == [1.0]
    assert "layers.7.key" not in dict(read.spec.weights())


@pytest.mark.parametrize(
    ("name", "fields"),
    [("llama", {}), ("llama", {"attention_factor": 0.9}), ("llama", {"truncate": False}),
     ("granite", {"beta_fast": 8, "beta_slow": 0.5}),
     ("ministral3", {"beta_fast": 8, "llama_4_scaling_beta": 0.3}), ("qwen2", {}), ("qwen3", {}),
     ("smollm3", {}), ("stablelm-1.6b", {"partial_rotary_factor": 0.25})],
)  # fmt: skip
def test_yarn_is_computed_past_its_original_context_and_read_back(
    name, fields, tmp_path, monkeypatch
):
    made = make(tmp_path, name, rope_parameters=YARN | fields)
    assert made.limit.tokens == CONTEXT_TOKENS > YARN["original_max_position_embeddings"]
    assert made.fidelity().mean_kl_nats <= 1e-9
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    read = opening.open_checkpoint(made.path).spec.layers[0].rope
    rope = made.checkpoint.spec.layers[0].rope
    assert read
    assert rope
    assert read.attention_factor == pytest.approx(rope.attention_factor)
    assert read.divisors(1) == pytest.approx(rope.divisors(1))


# Texts longer than what a test above could hold


@pytest.mark.parametrize("name", ["llama3-rope-tied", "gemma2", "gemma3", "gemma4", "qwen3.5"])
def test_a_text_of_several_batches_and_many_windows_is_read_alike(name, tmp_path):
    made = make(tmp_path, name, max_position_embeddings=600)
    assert runtime.BATCH_TOKENS < made.limit.tokens == 600
    assert made.fidelity().mean_kl_nats <= 1e-6


def test_reading_token_by_token_past_the_window_says_what_reading_at_once_says(tmp_path):
    made = make(tmp_path, "gemma3")
    ids, session = next(made.chunks())[: 4 * WINDOW_TOKENS], made.open()
    (expected,) = transformers_logits.logits(made.checkpoint, [ids])
    said = [session.prefill(ids[:20]).copy(), *(session.decode(id).copy() for id in ids[20:])]
    session.close()
    comparison = Comparison()
    comparison.add(expected[19:], np.stack(said), np.array(ids[19:]))
    assert comparison.result().mean_kl_nats <= 1e-6


# What llama.cpp gets wrong


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("qwen3", {"attention_bias": True}, "a bias after attention"),
        ("qwen3.5", {"attention_bias": True}, "a bias after attention"),
        ("qwen3.5", {"rms_norm_eps": 1e-5}, "to which this model adds 1e-06"),
        ("qwen3.5", {"linear_value_head_dim": 32}, "keys are 16 wide and whose values 32"),
        ("lfm2-bias", {}, "short convolutions with bias"),
        ("gemma4-other-donors", {}, "keys and values shared otherwise than from layer 3"),
        ("gemma4", {"attention_bias": True}, "a bias after attention"),
        ("phi3-longrope", {}, "made for 64"),
        ("qwen3", {"rope_parameters": YARN | {"truncate": False}}, "turns without truncation"),
        ("qwen3", {"rope_parameters": YARN | {"beta_fast": 8}}, "YaRN's ramp from 8 to 1 turns"),
    ],
)
def test_what_no_graph_computes_is_refused_in_one_sentence(name, fields, reason, tmp_path):
    checkpoint = open_tiny(tmp_path, name, **fields)
    with pytest.raises(UsageError) as refusal:
        writing.lay_out(checkpoint, BuildRequest(recipe=F32))
    assert reason in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert refusal.value.hint


def test_a_window_llama_cpp_ignores_and_long_factors_it_would_take_too_early_end_the_context(
    tmp_path,
):
    mistral = open_tiny(tmp_path / "mistral", "mistral-window")
    assert writing.context_limit(mistral).tokens == WINDOW_TOKENS
    assert "window" in writing.context_limit(mistral).reason
    phi = open_tiny(tmp_path / "phi", "phi3.5-longrope")
    assert writing.context_limit(phi).tokens == 256
    assert "long rope factors" in writing.context_limit(phi).reason
    gemma = open_tiny(tmp_path / "gemma", "gemma3")
    assert writing.context_limit(gemma).tokens == CONTEXT_TOKENS


@pytest.mark.parametrize("name", ["mistral-window", "phi3", "starcoder2-window"])
def test_past_an_ignored_window_llama_cpp_does_err(name, tmp_path):
    made = make(tmp_path, name)
    beyond = replace(made, limit=ContextLimit(tokens=made.limit.tokens + 32, reason=""))
    assert beyond.fidelity().mean_kl_nats > 1e-3


@pytest.mark.parametrize(
    ("name", "key", "other"),
    [
        # What llama.cpp's converter writes, and the YaRN that llama.cpp then takes.
        ("granite4-nope", "granite.rope.scaling.finetuned", struct.pack("<?", True)),
        ("ministral3", "mistral3.rope.scaling.attn_factor", struct.pack("<f", 1.0)),
    ],
)
def test_without_the_key_that_meets_a_trap_llama_cpp_errs(name, key, other, tmp_path):
    made = make(tmp_path, name)
    stored = bytearray(made.path.read_bytes())
    start = stored.index(key.encode()) + len(key) + 4  # a type stands between
    assert stored[start : start + len(other)] != other
    stored[start : start + len(other)] = other
    made.path.write_bytes(stored)
    assert made.fidelity().mean_kl_nats > 1e-3


def test_a_pattern_of_positions_of_its_own_takes_a_young_graph_and_a_plan_says_so(tmp_path):
    smollm3 = open_tiny(tmp_path, "smollm3", no_rope_layers=[1, 1, 0, 1, 1])
    (note,) = [note for note in writing.lay_out(smollm3, BuildRequest(recipe=F32)).notes
               if "granite_swa" in note]  # fmt: skip
    assert "older" in note
    assert convert(smollm3, tmp_path).fidelity().mean_kl_nats <= 1e-6


def test_in_a_larger_cache_llama_cpp_takes_long_rope_factors_for_a_short_text(tmp_path):
    made = make(tmp_path, "phi3.5-longrope")
    ids = next(made.chunks())[:100]
    larger = replace(made, limit=ContextLimit(tokens=made.limit.tokens + 1, reason=""))
    for asked, is_right in ((made, True), (larger, False)):
        session, comparison = asked.open(), Comparison()
        (expected,) = transformers_logits.logits(made.checkpoint, [ids])
        comparison.add(expected, session.all_logits(ids), np.array(ids))
        session.close()
        assert (comparison.result().mean_kl_nats < 1e-6) == is_right


# Configs of two generations, checkpoints of several kinds


def file_bytes(checkpoint: Checkpoint, directory: Path) -> bytes:
    entry = conversion.convert(
        checkpoint, BuildRequest(recipe=F32), directory, pre="default", progress=lambda _: None
    )
    return (directory / entry).read_bytes()


def write_as_transformers_4(config: dict[str, Any]) -> dict[str, Any]:
    """Return the same config in the words of the version before."""
    older = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype")}
    older |= {"torch_dtype": config["dtype"], "transformers_version": "4.47.0"}
    rope = dict(config["rope_parameters"])
    if "full_attention" in rope:  # Gemma 3
        older["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = dict(rope["full_attention"])
    older["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        older["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    is_plain = rope.get("rope_type", "default") == "default"
    return older | {"rope_scaling": None if is_plain else rope}


@pytest.mark.parametrize(
    "name",
    [
        "llama3-rope-tied",
        "llama-linear-rope",
        "qwen2",
        "phi4-mini",
        "gemma3-linear-rope",
        "stablelm-12b",
    ],
)
def test_a_config_of_transformers_4_makes_the_same_file_as_one_of_5(name, tmp_path):
    newer = open_tiny(tmp_path, name)
    expected = file_bytes(newer, tmp_path)
    path = newer.directory / "config.json"
    config = json.loads(path.read_text())
    assert "rope_parameters" in config
    path.write_text(json.dumps(write_as_transformers_4(config)))
    assert file_bytes(opening.open_checkpoint(newer.directory), tmp_path) == expected


def test_weights_in_bfloat16_and_in_several_files_are_the_same_to_the_bit(tmp_path):
    import torch

    made = make(tmp_path, "llama-bias", dtype=torch.bfloat16, shards=3)
    assert len(list(made.checkpoint.directory.glob("*.safetensors"))) >= 3
    assert made.fidelity().mean_kl_nats <= 1e-6


# Mixtures


@pytest.mark.parametrize("name", ["glm4", "phi"])
def test_a_mixture_is_that_of_llama_quantize_whatever_the_graph(name, tmp_path):
    """Of a file with gate and up in one tensor, and of one without a gate."""
    import llama_cpp

    checkpoint = open_tiny(
        tmp_path, name, hidden_size=256, intermediate_size=256, num_attention_heads=4,
        num_key_value_heads=4, num_hidden_layers=8, **({"head_dim": 64} if name == "glm4" else {}),
    )  # fmt: skip
    theirs = quantize_with_llama_cpp(
        llama_cpp, convert(checkpoint, tmp_path).path, tmp_path / "theirs.gguf", "Q4_K_M"
    )
    ours = tmp_path / "ours"
    ours.mkdir()
    request = BuildRequest(recipe=GGUF.RECIPES["Q4_K_M"])
    entry = conversion.convert(checkpoint, request, ours, pre="gpt-2", progress=lambda _: None)
    found = {info.name: info for info in theirs.tensors}
    made = layout.read(ours / entry)
    assert {info.tensor_type for info in made.tensors} == {"F32", "Q4_K", "Q6_K"}
    assert {it.name: it.tensor_type for it in made.tensors} == {
        it.name: it.tensor_type for it in theirs.tensors
    }
    for info in made.tensors:
        assert payload(made, info) == payload(theirs, found[info.name]), info.name


# Widths that fill no block


@pytest.mark.parametrize("recipe", ["Q8_0", "Q4_K_M", "Q2_K"])
@pytest.mark.parametrize(
    ("name", "fields", "substitute"),
    [
        ("odd-sizes", {}, "F16"),  # 72 columns: no multiple of 32
        ("llama", {"hidden_size": 96, "intermediate_size": 160}, None),  # of 32, not of 256
    ],
)
def test_rows_that_fill_no_block_are_stored_otherwise_and_that_is_reported(
    name, fields, substitute, recipe, tmp_path
):
    checkpoint = open_tiny(tmp_path, name, **fields)
    chosen = GGUF.RECIPES[recipe]
    planned = writing.lay_out(checkpoint, BuildRequest(recipe=chosen))
    entry = conversion.convert(
        checkpoint, BuildRequest(recipe=chosen), tmp_path, pre="smollm", progress=lambda _: None
    )
    stored = {name: tensor_type for name, _, tensor_type in running.contents(tmp_path / entry)}
    graph = architectures.choose(checkpoint.spec, family=checkpoint.architecture)
    assert stored == {tensor_name(p.role, graph): p.tensor_type for p in planned.placements}
    matrices = [p for p in planned.placements if p.parameters > 1000]
    assert {p.tensor_type for p in matrices} & {substitute} == {substitute} - {None}
    is_whole = substitute is None and recipe == "Q8_0"
    assert bool(planned.substituted) != is_whole
    session = GgufSession(tmp_path / entry, context_tokens=32, threads=1)
    assert np.isfinite(session.all_logits([1, 2, 3])).all()
    session.close()
