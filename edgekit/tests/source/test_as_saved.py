"""Checkpoints as people really save them say what transformers says of them, in plan and proof."""

import json
import shutil
import warnings
from typing import Any

import pytest

from edgekit.errors import UsageError
from edgekit.proof import interpreter, transformers_logits
from edgekit.source import families
from edgekit.source.checkpoint import Checkpoint
from edgekit.source.writer import write_checkpoint
from edgekit.tests.tiny.checkpoints import write_tiny_checkpoint
from edgekit.tests.tiny.stored_names import rename


pytestmark = pytest.mark.toolchain

IDS = list(range(3, 60))
SEES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
# The wrapper, the case of `TINY` it wraps, and its vision tower.
WRAPPERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Gemma3": ("gemma3", {"model_type": "siglip_vision_model"}, {"mm_tokens_per_image": 4}),
    "Llava": ("llama", {"model_type": "clip_vision_model", "projection_dim": 16}, {}),
    "Mistral3": ("mistral", {"model_type": "pixtral", "head_dim": 8}, {}),
    "SmolVLM": ("llama", {"model_type": "smolvlm_vision"}, {}),
    "InternVL": ("qwen2", {"model_type": "internvl_vision"}, {}),
    "Ministral 3": ("ministral3", {"model_type": "pixtral", "head_dim": 8}, {}),
    "AyaVision": ("cohere2", {"model_type": "siglip_vision_model"}, {}),
    "Cohere2Vision": ("cohere2", {"model_type": "siglip_vision_model"}, {}),
    "Exaone4_5_": ("exaone4", {"model_type": "exaone4_5_vision"}, {}),
    "HyperCLOVAXVisionV2": ("hyperclovax", {}, {}),
    "Qwen3_5": ("qwen3.5", {"depth": 1, "out_hidden_size": 64, "num_heads": 2}, {}),
    "Gemma4": ("gemma4", {}, {}),
}
CLASSES = {"Ministral 3": "Mistral3"}
WITHOUT_LOGIT_SCALE = {"AyaVision", "Cohere2Vision"}  # which transformers 5.24 forgets in these
PREFIXES = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "torch.compile of each layer": lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
    "data parallelism": lambda name: f"module.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "PEFT": lambda name: f"base_model.model.{name}",
    "a model that sees, before transformers 5": lambda name: f"language_model.{name}",
    "a model that sees": lambda name: name.replace("model.", "model.language_model.", 1),
    "FSDP": lambda name: (
        f"_fsdp_wrapped_module.{name.replace('mlp.', '_fsdp_wrapped_module.mlp.')}"
    ),
    "checkpointed layers": lambda name: name.replace(
        "self_attn", "_checkpoint_wrapped_module.self_attn"
    ),
    "AutoModel": lambda name: name.removeprefix("model."),
    "a name of one's own": lambda name: f"policy.actor.{name}",
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A tied model, and what it says."""
    directory = write_tiny_checkpoint(tmp_path_factory.mktemp("plain") / "llama", "llama")
    return directory, reference(Checkpoint.open(directory))


@pytest.fixture
def copy(plain, tmp_path):
    return shutil.copytree(plain[0], tmp_path / "copy")


def reference(checkpoint):
    """What transformers says, which reads the directory itself."""
    return next(transformers_logits.logits(checkpoint, [IDS], fits_in_memory=True))


def distance(one, other):
    return float(abs(one - other).max())


def own(checkpoint):
    return next(interpreter.logits(checkpoint, [IDS]))


def wrapped_model(name, text_config):
    import torch
    import transformers

    _, tower, more = WRAPPERS[name]
    vision: dict[str, object] = {**SEES, **tower}
    if name == "InternVL":
        vision |= {"image_size": [28, 28], "patch_size": [14, 14]}
    prefix = CLASSES.get(name, name)
    config = getattr(transformers, f"{prefix}Config")(
        text_config=text_config, vision_config=vision, **more
    )
    torch.manual_seed(1)
    model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def write_wrapped(directory, name):
    """Write a random model that also sees, with its tokenizer; return it."""
    write_tiny_checkpoint(directory, WRAPPERS[name][0])
    model = wrapped_model(name, json.loads((directory / "config.json").read_text()))
    model.save_pretrained(directory)
    return model


def said_by(model):
    import torch

    with torch.inference_mode():
        return model(input_ids=torch.tensor([IDS])).logits[0].numpy()


@pytest.mark.parametrize("name", PREFIXES)
def test_a_prefix_changes_nothing_that_is_said(plain, copy, name):
    rename(copy / "model.safetensors", PREFIXES[name])
    checkpoint = Checkpoint.open(copy)
    assert distance(own(checkpoint), plain[1]) < 1e-4
    assert distance(reference(checkpoint), plain[1]) == 0
    assert len(checkpoint.notes) >= 1


@pytest.mark.parametrize("name", ["data parallelism", "PEFT", "both"])
def test_a_prefix_is_left_out_where_names_differ_in_memory_too(tmp_path, name):
    directory = write_tiny_checkpoint(tmp_path / "exaone", "exaone")
    expected = reference(Checkpoint.open(directory))
    rename(directory / "model.safetensors", PREFIXES[name])
    checkpoint = Checkpoint.open(directory)
    assert distance(own(checkpoint), expected) < 1e-4
    assert distance(reference(checkpoint), expected) == 0


def test_float64_is_read_as_float32(plain, tmp_path):
    import torch

    directory = write_tiny_checkpoint(tmp_path / "double", "llama", dtype=torch.float64)
    checkpoint = Checkpoint.open(directory)
    assert distance(own(checkpoint), plain[1]) < 1e-4
    assert distance(reference(checkpoint), plain[1]) < 1e-4
    assert "float64" in checkpoint.notes[0]
    assert distance(own(Checkpoint.open(write_checkpoint(checkpoint, tmp_path / "out"))),
                    plain[1]) < 1e-4  # fmt: skip


@pytest.mark.parametrize("pad", [99_999, -1])
def test_a_padding_token_without_a_row_changes_nothing_that_is_said(plain, copy, pad):
    config = json.loads((copy / "config.json").read_text()) | {"pad_token_id": pad}
    (copy / "config.json").write_text(json.dumps(config))
    assert distance(reference(Checkpoint.open(copy)), plain[1]) == 0


def test_the_usual_names_are_no_news(plain):
    assert Checkpoint.open(plain[0]).notes == ()


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_decoder_of_a_model_that_sees_is_what_that_says_to_text(tmp_path, name):
    expected = said_by(write_wrapped(tmp_path, name))
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.architecture in families.names()
    expected = expected[:, : checkpoint.spec.vocab_size]
    if name in WITHOUT_LOGIT_SCALE:
        expected *= checkpoint.spec.multipliers.logits
        assert any("forgets that" in note for note in checkpoint.notes)
    assert distance(own(checkpoint), expected) < 1e-4
    assert distance(reference(checkpoint), expected) < 1e-4
    (left_out,) = [note for note in checkpoint.notes if "alone is exported" in note]
    assert "vis" in left_out


def test_a_wrapper_that_looks_ahead_is_refused_by_name(plain, copy):
    path = copy / "config.json"
    text = json.loads(path.read_text())
    path.write_text(json.dumps({"model_type": "paligemma", "text_config": text}))
    with pytest.raises(UsageError, match=r"'paligemma' .* both directions"):
        Checkpoint.open(copy)


def test_a_wrapped_decoder_may_be_under_a_prefix_as_well(tmp_path):
    expected = said_by(write_wrapped(tmp_path, "Gemma3"))
    rename(tmp_path / "model.safetensors", lambda name: f"module.{name}")
    checkpoint = Checkpoint.open(tmp_path)
    expected = expected[:, : checkpoint.spec.vocab_size]
    assert distance(own(checkpoint), expected) < 1e-4
    assert distance(reference(checkpoint), expected) < 1e-4


def test_an_adapter_of_a_wrapped_model_is_merged_into_its_decoder(tmp_path):
    import peft

    from edgekit.source.opening import open_checkpoint

    base = tmp_path / "base"
    model = write_wrapped(base, "Gemma3")
    lora = peft.LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|down_proj)",
                           task_type="CAUSAL_LM", init_lora_weights=False)  # fmt: skip
    with warnings.catch_warnings():
        # peft asks models for a name that transformers 5 deprecates.
        warnings.simplefilter("ignore", FutureWarning)
        trained = peft.get_peft_model(model, lora)
    trained.save_pretrained(tmp_path / "adapter")
    checkpoint = open_checkpoint(base, adapters=[tmp_path / "adapter"])
    expected = said_by(trained)[:, : checkpoint.spec.vocab_size]
    assert distance(own(checkpoint), expected) < 1e-4
    assert distance(reference(checkpoint), expected) < 1e-4
    written = write_checkpoint(checkpoint, tmp_path / "merged")
    merged = Checkpoint.open(written)
    assert merged.wrapper is None
    assert distance(reference(merged), expected) < 1e-4


def test_a_size_that_a_wrapper_leaves_out_is_the_one_of_transformers():
    from transformers import AutoConfig

    assert families.names()
    for model_type in families.names():
        config = AutoConfig.for_model(model_type)
        sizes = families.get(model_type).SIZES
        assert sizes == {field: getattr(config, field) for field in sizes}, model_type


def test_another_head_than_a_config_ties_is_the_one_that_counts(plain, copy):
    import numpy as np
    from safetensors.numpy import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = np.ascontiguousarray(embedding[::-1])
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint.open(copy)
    assert not checkpoint.spec.is_tied
    assert any("that one counts" in note for note in checkpoint.notes)
    assert distance(own(checkpoint), reference(checkpoint)) < 1e-4
    assert distance(own(checkpoint), plain[1]) > 0.01


def test_a_tied_model_that_kept_its_head_alone_is_whole(plain, copy):
    names = {"model.embed_tokens.weight": "lm_head.weight"}
    rename(copy / "model.safetensors", lambda name: names.get(name, name))
    checkpoint = Checkpoint.open(copy)
    assert checkpoint.spec.is_tied
    assert distance(reference(checkpoint), plain[1]) == 0
    assert distance(own(checkpoint), plain[1]) < 1e-4


def test_shards_without_an_index_are_read(plain, tmp_path):
    directory = write_tiny_checkpoint(tmp_path / "sharded", "llama", shards=3)
    (directory / "model.safetensors.index.json").unlink()
    checkpoint = Checkpoint.open(directory)
    assert distance(own(checkpoint), plain[1]) < 1e-4
    assert distance(reference(checkpoint), plain[1]) == 0
    next(directory.glob("model-00002-of-*")).unlink()
    with pytest.raises(UsageError, match="and not model-00002-of-"):
        Checkpoint.open(directory)


def test_the_head_of_an_untied_model_may_be_under_a_prefix_of_its_own(tmp_path):
    """As transformers 5 names those of models that see."""
    directory = write_tiny_checkpoint(tmp_path / "untied", "qwen3", tie_word_embeddings=False)
    expected = reference(Checkpoint.open(directory))
    assert not Checkpoint.open(directory).spec.is_tied
    rename(
        directory / "model.safetensors",
        lambda name: name.replace("model.", "model.language_model.", 1),
    )
    checkpoint = Checkpoint.open(directory)
    assert distance(reference(checkpoint), expected) == 0
    assert distance(own(checkpoint), expected) < 1e-4


def test_a_section_that_says_little_is_what_transformers_makes_of_it():
    """As the 4B of Gemma 3 has it: the rest are defaults of its class."""
    import transformers

    from edgekit.source import wrapped
    from edgekit.source.config import Config

    little = {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
        "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }  # fmt: skip
    whole = transformers.Gemma3Config(text_config=dict(little)).to_dict()
    specs = []
    for section in (little, whole["text_config"]):
        config = {"model_type": "gemma3", "text_config": section}
        text = wrapped.text_model(config, origin="config.json")
        read = Config(text.fields, origin="config.json")
        specs.append(families.get("gemma3_text").describe(read))
        read.unread_strings()
        read.refuse_unread()
    assert specs[0] == specs[1]
    assert specs[0].vocab_size == 262_208
