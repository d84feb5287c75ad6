"""Tiny bases and adapters, written without torch, and what PEFT makes of them, with it."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edgekit.quant.rounding import bfloat16
from edgekit.source import families
from edgekit.source.config import Config


np = pytest.importorskip("numpy")

WORDS = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(37))]
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}
IDS = [[1, 5, 7, 3, 20, 39, 4, 11, 38, 2, 9]]


class Given:
    """An array as a tensor of a checkpoint."""

    def __init__(self, values):
        self._values = np.asarray(values, dtype=np.float32)
        self.shape = self._values.shape
        self.size_bytes = self._values.nbytes

    def read(self, first_row=0, rows=None):
        return self._values[first_row : None if rows is None else first_row + rows]


def write_safetensors(path, tensors: Mapping[str, Any], *, dtype="F32"):
    header, data = {}, b""
    for name, given in tensors.items():
        values = np.ascontiguousarray(given, dtype=np.float64 if dtype == "F64" else np.float32)
        stored = (bfloat16(values) if dtype == "BF16" else values).tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(np.shape(given)),
            "data_offsets": [len(data), len(data) + len(stored)],
        }
        data += stored
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_tokenizer(directory, *, words=WORDS, template="{{ messages[0].content }}"):
    tokens = [{"id": i, "content": words[i], "special": True, "single_word": False,
               "lstrip": False, "rstrip": False, "normalized": False}
              for i in (0, 1, 2, *range(len(WORDS), len(words)))]  # fmt: skip
    fields = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": tokens,
        "normalizer": None, "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(words)},
                  "unk_token": "<unk>"},
    }  # fmt: skip
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        "unk_token": "<unk>", "chat_template": template,
    }  # fmt: skip
    (directory / "tokenizer.json").write_text(json.dumps(fields))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def write_base(directory: Path, *, seed=0, dtype="F32", **config: Any) -> Path:
    directory.mkdir(parents=True)
    fields = CONFIG | config
    family = families.get(fields["model_type"])
    spec = family.describe(Config(dict(fields), origin="test"))
    random = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {}
    for role, shape in spec.weights():
        source = family.source(role, spec)
        stored = shape[1:] if source.siblings else shape
        if source.is_depthwise:
            stored = (stored[0], 1, *stored[1:])
        for name in source.tensors:
            rows = shapes[name][0] if name in shapes else 0
            shapes[name] = (rows + stored[0], *stored[1:])
    tensors = {
        families.stored_name(fields["model_type"], name): random.normal(
            1.0 if "norm" in name else 0.0, 0.3, shape
        )
        for name, shape in shapes.items()
    }
    tensors |= families.constants(fields["model_type"], spec)
    write_safetensors(directory / "model.safetensors", tensors, dtype=dtype)
    (directory / "config.json").write_text(json.dumps(fields))
    write_tokenizer(directory)
    return directory


def write_adapter(
    directory: Path, tensors: Mapping[str, Any], *, dtype: str = "F32", **config: Any
) -> Path:
    directory.mkdir(parents=True)
    fields = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "bias": "none",
        "target_modules": ["q_proj"], "base_model_name_or_path": "somewhere/base",
        "use_qalora": False, "arrow_config": None,
    }  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(fields | config))
    named = {f"base_model.model.{name}": values for name, values in tensors.items()}
    write_safetensors(directory / "adapter_model.safetensors", named, dtype=dtype)
    return directory


def q_proj_updates(*, layers=2, rank=4, hidden=16, rows=16, seed=1) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    updates = {}
    for layer in range(layers):
        module = f"model.layers.{layer}.self_attn.q_proj"
        updates[f"{module}.lora_A.weight"] = random.normal(0, 0.3, (rank, hidden))
        updates[f"{module}.lora_B.weight"] = random.normal(0, 0.3, (rows, rank))
    return {name: values.astype(np.float32) for name, values in updates.items()}


@dataclass(frozen=True, kw_only=True)
class Peft:
    """A trained adapter as PEFT made it, and what base and adapter say together."""

    base: Path
    adapter: Path
    base_logits: Any
    logits: Any  # float32, unmerged


def train_with_peft(directory: Path, *, grow_to=0, base: Mapping[str, Any], **lora: Any) -> Peft:
    """Make an adapter whose every trained number is random, and run it."""
    import torch

    source = write_base(directory / "base", **base)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return _train(source, directory / "adapter", grow_to, lora)


def _train(base: Path, adapter: Path, grow_to: int, lora: Mapping[str, Any]) -> Peft:
    import peft
    import torch
    from peft import PeftModel, get_peft_model

    torch.manual_seed(0)
    model = load(base)
    base_logits = logits_of(model)
    if grow_to:
        model.resize_token_embeddings(grow_to, mean_resizing=False)
    asked = {"config": "LoraConfig", **lora}
    config = getattr(peft, asked.pop("config"))
    usual = {"r": 4} if config is peft.LoraConfig else {}
    trained = get_peft_model(model, config(task_type="CAUSAL_LM", **usual | asked))
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    trained.save_pretrained(adapter)
    if grow_to:
        added = [f"<new{number}>" for number in range(grow_to - len(WORDS))]
        write_tokenizer(adapter, words=[*WORDS, *added])
    fresh = load(base)
    if grow_to:
        fresh.resize_token_embeddings(grow_to, mean_resizing=False)
    together = PeftModel.from_pretrained(fresh, adapter)
    return Peft(base=base, adapter=adapter, base_logits=base_logits, logits=logits_of(together))


def load(directory: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval()


def logits_of(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(torch.tensor(IDS)).logits[0].numpy()


def load_tensors(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(path))
