"""Adapters of other kinds than LoRA: what was merged says what PEFT says unmerged."""

from typing import Any

import pytest

from edgekit import installed
from edgekit.errors import MissingDependencyError, UsageError
from edgekit.proof import transformers_logits
from edgekit.source.adapters import by_peft, merging
from edgekit.source.checkpoint import Checkpoint
from edgekit.source.writer import write_checkpoint
from edgekit.tests.tiny import adapters as tiny


np = pytest.importorskip("numpy")

SOME = ["q_proj", "v_proj", "down_proj"]
# kind: (PEFT's class, what it is asked for)
TRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "ADALORA": ("AdaLoraConfig", {"init_r": 6, "target_r": 4, "total_step": 10}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 4}),
    "C3A": ("C3AConfig", {"block_size": 8}),
    "DEFT": ("DeftConfig", {}),
    "DELORA": ("DeloraConfig", {"r": 4}),
    "FOURIERFT": ("FourierFTConfig", {"n_frequency": 20}),
    "GLORA": ("GloraConfig", {"r": 4}),
    "GRALORA": ("GraloraConfig", {"r": 4, "gralora_k": 2}),
    "HIRA": ("HiraConfig", {"r": 4}),
    "HRA": ("HRAConfig", {"r": 4, "apply_GS": True}),
    "IA3": ("IA3Config", {"feedforward_modules": ["down_proj"]}),
    "LN_TUNING": ("LNTuningConfig", {"target_modules": ["input_layernorm", "norm"]}),
    "LOHA": ("LoHaConfig", {"r": 4}),
    "LOKR": ("LoKrConfig", {"r": 4}),
    "MISS": ("MissConfig", {"r": 4}),
    "OFT": ("OFTConfig", {"r": 2, "oft_block_size": 0}),
    "PEANUT": ("PeanutConfig", {"r": 4}),
    "PVERA": ("PveraConfig", {"r": 4}),
    "RANDLORA": ("RandLoraConfig", {"r": 4}),
    "ROAD": ("RoadConfig", {"group_size": 8}),
    "SHIRA": ("ShiraConfig", {"r": 4}),
    "SUPERTUNING": ("SupertuningConfig", {}),
    "TINYLORA": ("TinyLoraConfig", {"r": 2}),
    "UNILORA": ("UniLoraConfig", {"r": 4}),
    "VBLORA": ("VBLoRAConfig", {"r": 4, "num_vectors": 8, "vector_length": 8, "topk": 2}),
    "VERA": ("VeraConfig", {"r": 4, "save_projection": False}),
    "WAVEFT": ("WaveFTConfig", {"n_frequency": 20}),
    "TRAINABLE_TOKENS": ("TrainableTokensConfig", {"token_indices": [7, 3]}),
}
QWEN2 = {"model_type": "qwen2", "tie_word_embeddings": True}


def settings_of(kind):
    name, asked = TRAINED[kind]
    return {
        "config": name,
        **({} if kind == "TRAINABLE_TOKENS" else {"target_modules": SOME}),
        **asked,
    }


def test_every_kind_that_peft_merges_is_tried():
    assert TRAINED.keys() - {"TRAINABLE_TOKENS"} == by_peft.KINDS.keys()


@pytest.mark.toolchain
@pytest.mark.parametrize("kind", TRAINED)
def test_merged_says_what_peft_says_unmerged(tmp_path, kind):
    made = tiny.train_with_peft(tmp_path, base=QWEN2, **settings_of(kind))
    merged = merging.merge(Checkpoint.open(made.base), made.adapter)
    assert merged.spec.is_tied
    write_checkpoint(merged, tmp_path / "merged", precision="f32")
    found = tiny.logits_of(tiny.load(tmp_path / "merged"))
    assert np.abs(found - made.logits).max() <= 1e-4
    assert np.abs(made.logits - made.base_logits).max() > 0.02
    (said,) = transformers_logits.logits(merged, tiny.IDS, fits_in_memory=True)
    assert np.abs(said - made.logits).max() <= 1e-5


@pytest.mark.toolchain
def test_it_is_stacked_and_named_in_wrappers(tmp_path):
    made = tiny.train_with_peft(tmp_path, base=QWEN2, **settings_of("LOHA"))
    weights = made.adapter / "adapter_model.safetensors"
    named = {f"module.{key}": it.numpy() for key, it in tiny.load_tensors(weights).items()}
    tiny.write_safetensors(weights, named)
    lora = tiny.write_adapter(tmp_path / "lora", tiny.q_proj_updates())
    merged = merging.merge(merging.merge(Checkpoint.open(made.base), lora), made.adapter)
    (said,) = transformers_logits.logits(merged, tiny.IDS, fits_in_memory=True)
    write_checkpoint(merged, tmp_path / "merged", precision="f32")
    found = tiny.logits_of(tiny.load(tmp_path / "merged"))
    assert np.abs(found - said).max() <= 1e-4
    assert np.abs(found - made.logits).max() > 0.02


@pytest.mark.toolchain
def test_saved_modules_come_along(tmp_path):
    asked = settings_of("LOKR") | {"modules_to_save": ["norm"]}
    made = tiny.train_with_peft(tmp_path, base={}, **asked)
    merged = merging.merge(Checkpoint.open(made.base), made.adapter)
    write_checkpoint(merged, tmp_path / "merged", precision="f32")
    found = tiny.logits_of(tiny.load(tmp_path / "merged"))
    assert np.abs(found - made.logits).max() <= 1e-4


@pytest.mark.toolchain
def test_the_modules_that_peft_gets_take_no_memory(base):
    parameters = list(by_peft._skeleton(base.directory).parameters())
    assert len(parameters) > 20
    stored = sum(parameter.untyped_storage().nbytes() for parameter in parameters)
    assert stored == 4 * len(parameters)


def vera(*layers):
    found = {f"model.layers.{n}.self_attn.q_proj.vera_lambda_{it}": np.ones(16)
             for n in layers for it in "bd"}  # fmt: skip
    return found | {"vera_A": np.ones((4, 16)), "vera_B": np.ones((16, 4))}


@pytest.mark.parametrize(
    ("layers", "config", "words"),
    [
        ([0], {}, "is for 1 layers, .* has 2"),
        ([0, 1, 2], {}, r"changes model\.layers\.2\.self_attn\.q_proj.* does not have"),
        ([0, 1], {"target_modules": ["q_proj", "v_proj"]}, "lacks the update of .*v_proj"),
        ([0, 1], {"target_modules": ["v_proj"]}, "v_proj"),
        ([0, 1], {"modules_to_save": ["lm_head"]}, "lists 'lm_head' in modules_to_save"),
        ([0, 1], {"task_type": "SEQ_CLS"}, "task_type = 'SEQ_CLS'"),
    ],
)
def test_what_does_not_fit_is_refused_from_headers(base, tmp_path, layers, config, words):
    directory = tiny.write_adapter(tmp_path / "a", vera(*layers), peft_type="VERA", **config)
    with pytest.raises(UsageError, match=words):
        merging.merge(base, directory)


@pytest.mark.parametrize("spelling", ["VERA", "vera", "PeftType.VERA"])
def test_without_peft_it_is_refused_at_once(base, tmp_path, monkeypatch, spelling):
    monkeypatch.setattr(installed, "missing", lambda *packages: ["peft"])
    directory = tiny.write_adapter(tmp_path / "a", vera(0, 1), peft_type=spelling)
    with pytest.raises(MissingDependencyError, match="adapter of kind 'VeRA' needs peft"):
        merging.merge(base, directory)
