"""The proof passes for what is right, and each sabotage is caught by its own gate."""

import json
import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from edgekit import formats
from edgekit.bundle.goldens import Goldens
from edgekit.bundle.manifest import Bundle
from edgekit.errors import BundleError, DisagreementError, UsageError
from edgekit.export import export
from edgekit.formats.gguf import conversion, layout, parts, pretokenizers, running, writing
from edgekit.model.spec import DecoderSpec
from edgekit.model.tokenizer_files import TokenizerFiles
from edgekit.proof import transformers_logits
from edgekit.quant.recipe import Rule
from edgekit.runtime import processors
from edgekit.source import opening
from edgekit.tests.needs import needs
from edgekit.tests.tiny.checkpoints import write_tiny_checkpoint
from edgekit.text import corpus
from edgekit.text.tokenizer import Text
from edgekit.verify import verify


pytestmark = [pytest.mark.toolchain, needs("torch", "llama_cpp")]

GGUF = formats.get("gguf")
TARGET = "raspberry-pi-5-8gb"
GATES = ["runs", "stops", "logits", "token ids", "chat template", "tensor types", "size"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processors, "performance_cores", lambda: 1)
        yield
    torch.set_num_threads(before)


def gate(agreement, name):
    return next(gate for gate in agreement.gates if gate.name == name)


def write_lora(directory: Path, base: Path, *, seed=0) -> Path:
    """Write an adapter of random numbers, as PEFT saves it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    names = ["q_proj", "v_proj", "down_proj"]
    settings = LoraConfig(r=4, target_modules=names, use_rslora=True, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained = get_peft_model(model, settings)
    numbers = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in trained.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.3, generator=numbers)
    trained.save_pretrained(directory)
    return directory


# What is right passes


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny", "mistral")


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory):
    return export(model, TARGET, quant="F32", out=tmp_path_factory.mktemp("proven") / "out")


def test_an_exported_bundle_carries_its_proof(bundle):
    agreement = Bundle.load(bundle.directory).agreement
    assert agreement is not None
    assert agreement.passed
    assert [gate.name for gate in agreement.gates] == GATES
    assert agreement.positions >= 2000
    assert agreement.mean_kl_nats <= 1e-6
    assert agreement.same_top_token >= 0.99
    assert agreement.perplexity_ratio == pytest.approx(1, abs=1e-3)


def test_the_proof_can_be_repeated_and_finds_the_same(bundle, model):
    assert verify(bundle.directory, model) == bundle.agreement


def test_a_bundle_is_not_verified_against_another_checkpoint(bundle, tmp_path):
    other = write_tiny_checkpoint(tmp_path / "other", "mistral", seed=1)
    with pytest.raises(UsageError, match="made from another checkpoint") as refusal:
        verify(bundle.directory, other)
    assert "tiny" in refusal.value.hint


def test_memory_that_runs_short_while_it_proves_changes_nothing(bundle, model, monkeypatch):
    """Which way the checkpoint is asked is settled once: both sides must read the same pieces."""
    asked = iter([True])
    monkeypatch.setattr(transformers_logits, "holds", lambda _: next(asked, False))
    assert verify(bundle.directory, model).positions == bundle.agreement.positions


def test_a_model_too_large_for_transformers_is_proven_layer_by_layer(bundle, model, monkeypatch):
    monkeypatch.setattr(transformers_logits, "holds", lambda _: False)
    monkeypatch.setattr(transformers_logits, "_transformers_logits", None)
    agreement = verify(bundle.directory, model)
    assert agreement.passed
    assert 0 < agreement.positions <= 512


def test_goldens_hold_what_the_artifact_said(bundle, model):
    goldens = Goldens.load(bundle.directory)
    checkpoint = opening.open_checkpoint(model)
    tokenizer = transformers_logits.tokenizer(checkpoint)
    assert [golden.text for golden in goldens.texts] == corpus.lines()
    for golden in goldens.texts:
        assert list(golden.ids) == transformers_logits.ids(tokenizer, golden.text)
    assert goldens.chats
    for chat in goldens.chats:
        assert list(chat.ids) == transformers_logits.ids(tokenizer, chat.rendered)
    (expected,) = transformers_logits.logits(checkpoint, [goldens.logits[0].ids])
    assert goldens.logits[0].mean_kl_nats(expected) < 1e-4
    assert goldens.answer_ids
    assert list(goldens.answer_prompt_ids) == list(goldens.chats[0].ids)


@pytest.mark.parametrize(("name", "quant"), [("llama3-rope-tied", "Q8_0"), ("gemma2", "F16")])
def test_other_families_pass_in_fewer_bits(name, quant, tmp_path):
    model = write_tiny_checkpoint(tmp_path / "tiny", name)
    agreement = export(model, TARGET, quant=quant, out=tmp_path / "out").agreement
    assert agreement is not None
    assert agreement.passed


def test_a_line_that_needs_composing_is_told_and_does_not_fail(tmp_path):
    model = write_tiny_checkpoint(tmp_path / "tiny", "qwen3")
    agreement = export(model, TARGET, quant="F32", out=tmp_path / "out").agreement
    finding = gate(agreement, "token ids").finding
    assert re.search(
        r"79 lines give the checkpoint's ids .* 1 of them need composing \(NFC\) first", finding
    )


def llama2_like(directory):
    """A model whose tokenizer transformers rebuilds, as it does Llama 2's and TinyLlama's."""
    model = write_tiny_checkpoint(directory, "tinyllama-spm")
    path = model / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "LlamaTokenizer", "legacy": False}
    path.write_text(json.dumps(settings))
    return model


def test_a_tokenizer_that_transformers_rebuilds_is_proven_by_its_file(tmp_path):
    out = export(llama2_like(tmp_path / "tiny"), TARGET, quant="F32", out=tmp_path / "out")
    found = gate(out.agreement, "token ids")
    assert found.passed
    assert re.search(r"79 lines give .*; AutoTokenizer reads \d+ of them otherwise", found.finding)


def test_a_directory_saved_again_by_transformers_is_proven_with_its_other_spaces(tmp_path):
    from transformers import AutoTokenizer

    model = llama2_like(tmp_path / "tiny")
    AutoTokenizer.from_pretrained(model).save_pretrained(model)
    out = export(model, TARGET, quant="F32", out=tmp_path / "out")
    finding = gate(out.agreement, "token ids").finding
    assert re.search(r"puts another space in front of \d+ of them, none of them a chat", finding)
    assert "AutoTokenizer" not in finding


def test_transformers_reading_is_proven_and_verified_as_such(tmp_path):
    from transformers import AutoTokenizer

    model = llama2_like(tmp_path / "tiny")
    out = export(model, TARGET, quant="F32", tokenizer="transformers", out=tmp_path / "out")
    text = Bundle.load(out.directory).text
    ids = Text.open(out.directory, text).encode("  two spaces", adds_bos=False)
    assert ids == AutoTokenizer.from_pretrained(model).encode(
        "  two spaces", add_special_tokens=False
    )
    assert verify(out.directory, model, tokenizer="transformers").passed
    assert not gate(verify(out.directory, model), "token ids").passed


def test_a_chat_prompt_with_another_space_is_not_let_pass(tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    model = llama2_like(tmp_path / "tiny")
    AutoTokenizer.from_pretrained(model).save_pretrained(model)
    monkeypatch.setattr(running, "own_template", lambda path: None)  # which opens with the space
    assert refused(model, tmp_path).gates == ["token ids"]


def test_an_adapter_is_proven_beside_its_base(model, tmp_path):
    adapter = write_lora(tmp_path / "lora", model)
    bundle = export(model, TARGET, adapters=[adapter], quant="F32", out=tmp_path / "out")
    assert bundle.agreement is not None
    assert [gate.name for gate in bundle.agreement.gates] == [*GATES, "adapter"]
    assert bundle.agreement.passed
    plain = opening.open_checkpoint(model)
    (base,) = transformers_logits.logits(plain, [list(range(32))])
    (both,) = transformers_logits.logits(
        opening.open_checkpoint(model, adapters=[adapter]), [list(range(32))]
    )
    assert abs(base - both).max() > 0.1  # it does change something


def write_slow_tokenizer(directory: Path, base: Path, new: str) -> None:
    """Write the base's vocabulary as version 4 of transformers did, with a token after it."""
    fields = json.loads((base / "tokenizer.json").read_text())
    merges = [it if isinstance(it, str) else " ".join(it) for it in fields["model"]["merges"]]
    added = {str(it.pop("id")): it for it in fields["added_tokens"]}
    ids = {**fields["model"]["vocab"], **{it["content"]: int(id) for id, it in added.items()}}
    added[str(max(ids.values()) + 1)] = {"content": new, "special": False, "normalized": False}
    (directory / "vocab.json").write_text(json.dumps(fields["model"]["vocab"]))
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": added})
    )


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """A model with more rows than its tokenizer has tokens, and an adapter that uses one."""
    place = tmp_path_factory.mktemp("padded")
    model = write_tiny_checkpoint(place / "model", "odd-sizes")
    adapter = write_lora(place / "lora", model)
    write_slow_tokenizer(adapter, model, "<call>")
    return model, adapter


def test_a_token_of_an_adapter_is_proven_as_its_own_files_say(padded, tmp_path):
    model, adapter = padded
    bundle = export(model, TARGET, adapters=[adapter], quant="F32", out=tmp_path / "out")
    assert bundle.agreement is not None
    assert bundle.agreement.passed
    settings = json.loads((adapter / "tokenizer_config.json").read_text())
    new = max(map(int, settings["added_tokens_decoder"]))
    ids = Text.open(tmp_path / "out", bundle.text).encode("<call>x<call>")
    assert (ids[0], ids[-1]) == (new, new)


# Sabotage


@dataclass(frozen=True, kw_only=True)
class Refused:
    """How an export ended."""

    error: DisagreementError

    @property
    def gates(self) -> list[str]:
        """Which gates did not hold."""
        return [line.strip().partition(":")[0] for line in str(self.error).splitlines()[1:]]


def refused(model: Path, directory: Path, *, quant="F32", **request: Any) -> Refused:
    """Export, and see it refused without a trace."""
    out = directory / "bundles" / "out"
    with pytest.raises(DisagreementError) as refusal:
        export(model, TARGET, quant=quant, out=out, **request)
    assert refusal.value.exit_status == 8
    assert list(out.parent.iterdir()) == []
    return Refused(error=refusal.value)


def after_conversion(monkeypatch, change):
    """Let ``change`` alter the file that a conversion wrote."""
    convert = writing.convert

    def convert_and_change(checkpoint, recipe, directory, **rest):
        entry = convert(checkpoint, recipe, directory, **rest)
        change(directory / entry)
        return entry

    monkeypatch.setattr(writing, "convert", convert_and_change)


def test_queries_and_keys_in_the_order_of_the_checkpoint_fail_the_logits(
    model, tmp_path, monkeypatch
):
    monkeypatch.setattr(conversion, "interleave_halves", lambda rows, head_dim: rows)
    assert refused(model, tmp_path).gates == ["logits"]


def test_gate_and_up_swapped_fail_the_logits(model, tmp_path, monkeypatch):
    names = parts.LAYER_TENSOR_NAMES
    monkeypatch.setitem(names, "gate", "ffn_up.weight")
    monkeypatch.setitem(names, "up", "ffn_gate.weight")
    assert refused(model, tmp_path).gates == ["logits"]


def test_norms_without_the_one_that_gemma_adds_fail_the_logits(tmp_path, monkeypatch):
    monkeypatch.setattr(DecoderSpec, "unit_offset", lambda spec, role: False)
    gemma = write_tiny_checkpoint(tmp_path / "tiny", "gemma2")
    assert refused(gemma, tmp_path).gates == ["logits"]


def test_one_weight_of_one_matrix_fails_the_logits(model, tmp_path, monkeypatch):
    def change(path):
        file = layout.read(path)
        info = next(info for info in file.tensors if info.name == "output.weight")
        with path.open("r+b") as stream:
            stream.seek(info.offset)
            stream.write(bytes.fromhex("0000803f"))  # 1.0

    after_conversion(monkeypatch, change)
    assert refused(model, tmp_path).gates == ["logits"]


def test_an_adapter_left_out_of_the_artifact_fails_the_logits(model, tmp_path, monkeypatch):
    adapter = write_lora(tmp_path / "lora", model)
    base, convert = opening.open_checkpoint(model), writing.convert
    monkeypatch.setattr(
        writing,
        "convert",
        lambda checkpoint, *rest, **kw: convert(
            replace(checkpoint, tensors=base.tensors), *rest, **kw
        ),
    )
    assert refused(model, tmp_path, adapters=[adapter]).gates == ["logits"]


def test_an_adapter_merged_with_another_scale_fails_the_logits_and_the_adapter(
    model, tmp_path, monkeypatch
):
    adapter = write_lora(tmp_path / "lora", model)
    config = json.loads((adapter / "adapter_config.json").read_text())
    other = write_lora(tmp_path / "other", model)
    (other / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 9}))
    good = opening.open_checkpoint(model, adapters=[adapter])
    wrong = opening.open_checkpoint(model, adapters=[other])
    monkeypatch.setattr(
        opening,
        "open_checkpoint",
        lambda *args, **kw: replace(good, tensors=wrong.tensors),
    )
    assert refused(model, tmp_path, adapters=[adapter]).gates == ["logits", "adapter"]


def test_a_token_of_an_adapter_that_is_left_out_fails_the_token_ids(padded, tmp_path, monkeypatch):
    model, adapter = padded
    merged = opening.open_checkpoint(model, adapters=[adapter])
    base = opening.open_checkpoint(model)
    monkeypatch.setattr(
        opening, "open_checkpoint", lambda *args, **kw: replace(merged, text=base.text)
    )
    assert refused(model, tmp_path, adapters=[adapter]).gates == ["token ids"]


def test_a_wrong_pre_tokenizer_fails_the_token_ids(tmp_path, monkeypatch):
    monkeypatch.setattr(pretokenizers, "find_pre", lambda tokenizer, *, corpus: "gpt-2")
    llama = write_tiny_checkpoint(tmp_path / "tiny", "llama3-rope-tied")
    found = refused(llama, tmp_path)
    assert found.gates == ["token ids"]
    assert "the runtime's own tokenizer: " in str(found.error)


def test_a_tokenizer_that_composes_excuses_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(pretokenizers, "find_pre", lambda tokenizer, *, corpus: "gpt-2")
    qwen = write_tiny_checkpoint(tmp_path / "tiny", "qwen2")
    assert refused(qwen, tmp_path).gates == ["token ids"]


def test_a_runtime_that_mishandles_composed_letters_is_not_excused(model, tmp_path, monkeypatch):
    runtime_ids = running.runtime_ids

    def without_the_last_of_decomposed(path, texts):
        ids = runtime_ids(path, texts)
        assert ids is not None
        return [found[:-1] if "nai\u0308ve" in text else found
                for text, found in zip(texts, ids, strict=True)]  # fmt: skip

    monkeypatch.setattr(running, "runtime_ids", without_the_last_of_decomposed)
    # Mistral's tokenizer does not compose: to it, both forms are different texts.
    assert refused(model, tmp_path).gates == ["token ids"]


def test_another_tokenizer_json_fails_the_token_ids(model, tmp_path, monkeypatch):
    def drop_a_merge(directory):
        path = directory / "tokenizer.json"
        fields = json.loads(path.read_text())
        del fields["model"]["merges"][0]
        path.write_text(json.dumps(fields))

    after_copying(monkeypatch, drop_a_merge)
    found = refused(model, tmp_path)
    assert found.gates == ["token ids"]
    assert "edgekit run: " in str(found.error)


def after_copying(monkeypatch, change, **rules):
    copy_into = TokenizerFiles.copy_into

    def copy_and_change(self, directory):
        found = copy_into(self, directory)
        change(directory)
        return replace(found, **rules)

    monkeypatch.setattr(TokenizerFiles, "copy_into", copy_and_change)


def test_a_changed_chat_template_fails_its_gate(model, tmp_path, monkeypatch):
    copy_into = TokenizerFiles.copy_into
    monkeypatch.setattr(
        TokenizerFiles,
        "copy_into",
        lambda self, directory: copy_into(
            replace(self, chat_template=f"{self.chat_template} "), directory
        ),
    )
    assert refused(model, tmp_path).gates == ["chat template"]


def test_a_missing_stop_id_fails_the_stops(tmp_path, monkeypatch):
    llama = write_tiny_checkpoint(tmp_path / "tiny", "llama3-rope-tied")
    rules = opening.open_checkpoint(llama).text.rules()
    after_copying(monkeypatch, lambda directory: None, stop_ids=rules.stop_ids[1:])
    assert refused(llama, tmp_path).gates == ["stops"]


def test_tensors_stored_otherwise_than_planned_fail_even_if_as_many_are(
    model, tmp_path, monkeypatch
):
    exact, convert = GGUF.RECIPES["F32"], writing.convert
    planned = replace(exact, rules=(Rule(pattern="query", tensor_type="F16"),))
    made = replace(exact, rules=(Rule(pattern="value", tensor_type="F16"),))
    monkeypatch.setitem(GGUF.RECIPES, "F32", planned)
    monkeypatch.setattr(
        writing,
        "convert",
        lambda checkpoint, request, *rest, **kw: convert(
            checkpoint, replace(request, recipe=made), *rest, **kw
        ),
    )
    found = refused(model, tmp_path)
    assert {"tensor types", "size"} <= set(found.gates)
    assert "planned 3 more of 4096 weights in F16" in str(found.error)


def test_a_file_of_another_size_than_planned_fails_the_size(model, tmp_path, monkeypatch):
    lay_out = writing.lay_out

    def promise_less(checkpoint, recipe, **rest):
        planned = lay_out(checkpoint, recipe, **rest)
        return replace(planned, artifact_bytes=planned.artifact_bytes - 65)

    monkeypatch.setattr(writing, "lay_out", promise_less)
    assert refused(model, tmp_path).gates == ["size"]


def test_a_file_with_bytes_of_no_tensor_is_damaged(model, tmp_path, monkeypatch):
    def append(path):
        with path.open("ab") as file:
            file.write(bytes(256))

    after_conversion(monkeypatch, append)
    with pytest.raises(BundleError, match="is not part of any tensor"):
        export(model, TARGET, quant="F32", out=tmp_path / "bundles" / "out")
    assert list((tmp_path / "bundles").iterdir()) == []
