"""Models that are said no to: by name, and with what of theirs nothing here computes."""

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest

from edgekit.errors import UsageError
from edgekit.source import unsupported
from edgekit.source.checkpoint import Checkpoint


REASONS: dict[str, tuple[dict[str, Any], str]] = {
    "bitnet": ({}, "three values"),
    "mixtral": ({"num_local_experts": 8, "num_experts_per_tok": 2}, "num_local_experts = 8"),
    "dbrx": ({"ffn_config": {"moe_num_experts": 16}}, "moe_num_experts = 16"),
    "minicpm3": ({"kv_lora_rank": 256, "q_lora_rank": 768}, "compressed (kv_lora_rank = 256)"),
    "gemma3n_text": (
        {"altup_num_inputs": 4, "hidden_size_per_layer_input": 256},
        "several copies of its states (altup_num_inputs = 4)",
    ),
    "gemma5_text": (
        {"num_experts": None, "hidden_size_per_layer_input": 256},
        "embeddings of their own (hidden_size_per_layer_input = 256)",
    ),
    "qwen3_moe": ({"num_experts": 128, "layer_types": ["conv"]}, "(num_experts = 128)"),
    "qwen3_next": ({"linear_num_key_heads": 16, "num_experts": 512}, "(num_experts = 512)"),
    "bamba": ({"mamba_n_heads": 128}, "attention (mamba_n_heads = 128)"),
    "t5": ({"is_encoder_decoder": True}, "it has an encoder"),
}


@pytest.mark.parametrize("model_type", REASONS)
def test_a_model_is_refused_by_name_and_with_the_field_that_says_why(model_type, tmp_path):
    fields, expected = REASONS[model_type]
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": model_type, **fields}))
    with pytest.raises(UsageError) as refusal:
        Checkpoint.open(tmp_path)
    assert f"{path}: models of type {model_type!r} are not supported: " in str(refusal.value)
    assert expected in str(refusal.value)
    path.write_text(json.dumps({"model_type": "x", "text_config": json.loads(path.read_text())}))
    with pytest.raises(UsageError) as wrapped:
        Checkpoint.open(tmp_path)
    assert f"text_config, in a 'x': models of type {model_type!r}" in str(wrapped.value)
    assert expected in str(wrapped.value)


def test_one_expert_is_no_choice():
    fields = {"num_experts": 1, "num_experts_per_tok": 1, "is_encoder_decoder": False}
    assert str(unsupported.refusal("x", fields, origin="c")) == (
        "c: models of type 'x' are not supported"
    )


@pytest.mark.parametrize(
    "value", [None, True, -1, 10**400, 0.5, float("nan"), "", "x", [], [None], [[1]], {"x": [{}]}]
)
def test_whatever_a_field_holds_the_refusal_is_one_sentence(value):
    names = ("num_experts", "kv_lora_rank", "altup_num_inputs", "layer_types", "mamba_x",
             "is_encoder_decoder", "is_moe", "ffn_config")  # fmt: skip
    for name in names:
        message = str(unsupported.refusal("x", {name: value}, origin="c"))
        assert message.startswith("c: models of type 'x' are not supported")
        assert "\n" not in message


# Which have one expert, or none, where their config is silent.
DENSE_BY_DEFAULT = {"doge", "dots1", "gemma4", "gemma4_text", "hunyuan_v1_moe"}
WITHOUT_DEFAULTS = {"gemma4_assistant", "gemma4_unified_assistant"}


@pytest.mark.toolchain
def test_transformers_models_of_experts_are_told_from_their_configs():
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    told = {}
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - DENSE_BY_DEFAULT - WITHOUT_DEFAULTS
    for model_type in sorted(names):
        config = AutoConfig.for_model(model_type)
        place = Path(inspect.getfile(type(config))).parent
        source = "".join(path.read_text("utf-8") for path in place.glob("modeling_*.py"))
        if not re.search(r"class \w*(Experts|SparseMoe)\w*\(", source):
            continue
        fields = config.get_text_config().to_dict()
        told[model_type] = str(unsupported.refusal(model_type, fields, origin="c"))
    assert len(told) > 30
    assert [it for it, message in told.items() if "among experts" not in message] == []
