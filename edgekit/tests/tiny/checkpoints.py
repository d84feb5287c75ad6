"""Tiny random checkpoints of every family, as transformers would save them.

Random weights are the harder test: every bias, norm and scale differs from its neutral value, so
whatever an export forgets shows in the logits.
"""

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.tests.tiny.tokenizers import VOICES, train


if TYPE_CHECKING:
    import torch

CONTEXT_TOKENS = 256
ORIGINAL_TOKENS = 64  # the context before a rope was stretched
WINDOW_TOKENS = 16
ALIKE = 0.9  # correlation of a delta net's queries and keys

_SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT_TOKENS,
    "tie_word_embeddings": False,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TinyCase:
    """A kind of model: its family, how it speaks, and what its config says beyond the sizes."""

    model_type: str
    voice: str
    fields: Mapping[str, Any] = field(default_factory=dict)


def _longrope(width: int, **fields: Any) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0 + 0.05 * i for i in range(width // 2)],
        "long_factor": [1.0 + 0.7 * i for i in range(width // 2)],
        **fields,
    }


_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": ORIGINAL_TOKENS,
}  # fmt: skip
YARN: dict[str, Any] = {
    "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0,
    "original_max_position_embeddings": ORIGINAL_TOKENS,
}  # fmt: skip
_TIED = {"tie_word_embeddings": True}
_STRETCHED = {"max_position_embeddings": 512, "original_max_position_embeddings": 256}
_GEMMA = _TIED | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW_TOKENS}

# Whose norms of queries learn what others divide scores by; without it no two runtimes agree, as
# every head sees one token alone.
_SCALES_NO_SCORES = {"gemma4_text"}
# Whose norms multiply by one more than they store.
_ADDS_ONE = {"gemma", "gemma2", "gemma3_text", "vaultgemma", "nemotron", "qwen3_5_text"}
_MUP = {
    "embedding_multiplier": 3.0, "attention_multiplier": 0.4, "residual_multiplier": 0.6,
}  # fmt: skip
_DENSE_GRANITE4 = _MUP | {
    "logits_scaling": 6.0, "shared_intermediate_size": 112, "num_local_experts": 0,
    "num_experts_per_tok": 0, "layer_types": ["full_attention"] * 3, "mamba_n_heads": 4,
}  # fmt: skip

_DELTA: dict[str, Any] = {
    "num_hidden_layers": 4, "head_dim": 32, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10_000_000.0, "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1], "mrope_interleaved": True,
    },
}  # fmt: skip
_FIVE_KINDS = [*["sliding_attention"] * 4, "full_attention"]
_GEMMA4 = _TIED | {
    "head_dim": 16, "global_head_dim": 32, "sliding_window": WINDOW_TOKENS,
    "vocab_size_per_layer_input": 704,  # the vocabulary has fewer
}  # fmt: skip

TINY: dict[str, TinyCase] = {
    "llama": TinyCase(model_type="llama", voice="smollm", fields=_TIED),
    "llama3-rope-tied": TinyCase(
        model_type="llama", voice="llama3", fields=_TIED | {"rope_parameters": _LLAMA3_ROPE}
    ),
    "llama-linear-rope": TinyCase(
        model_type="llama", voice="llama3",
        fields={"rope_parameters": {
            "rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0,
        }},
    ),
    "llama-bias": TinyCase(
        model_type="llama", voice="llama3", fields={"attention_bias": True, "mlp_bias": True}
    ),
    "tinyllama-spm": TinyCase(model_type="llama", voice="tinyllama"),
    "odd-head-width": TinyCase(model_type="llama", voice="smollm", fields={"head_dim": 24}),
    "odd-sizes": TinyCase(  # no multiple of 32 anywhere
        model_type="llama", voice="smollm",
        fields={"hidden_size": 72, "intermediate_size": 100, "vocab_size": 555},
    ),
    "one-kv-head": TinyCase(
        model_type="llama", voice="smollm", fields=_TIED | {"num_key_value_heads": 1}
    ),
    "mistral": TinyCase(model_type="mistral", voice="mistral", fields={"sliding_window": None}),
    "mistral-window": TinyCase(
        model_type="mistral", voice="mistral", fields={"sliding_window": WINDOW_TOKENS}
    ),
    "qwen2": TinyCase(model_type="qwen2", voice="qwen2", fields=_TIED),
    "qwen2-window": TinyCase(
        model_type="qwen2", voice="qwen2",
        fields={"use_sliding_window": True, "sliding_window": WINDOW_TOKENS,
                "max_window_layers": 1},
    ),
    "qwen3": TinyCase(model_type="qwen3", voice="qwen3", fields=_TIED | {"head_dim": 24}),
    "phi3": TinyCase(
        model_type="phi3", voice="phi3",
        fields={"sliding_window": WINDOW_TOKENS - 1, "num_key_value_heads": 4},
    ),
    "phi3-longrope": TinyCase(
        model_type="phi3", voice="phi3",
        fields={"original_max_position_embeddings": ORIGINAL_TOKENS,
                "rope_parameters": _longrope(16)},
    ),
    "phi3.5-longrope": TinyCase(  # an original context that a runtime's rounding leaves alone
        model_type="phi3", voice="phi3",
        fields=_STRETCHED | {"rope_parameters": _longrope(16)},
    ),
    "phi4-mini": TinyCase(
        model_type="phi3", voice="phi4",
        fields=_TIED | _STRETCHED | {
                        "num_attention_heads": 2, "num_key_value_heads": 1,
                        "rope_parameters": _longrope(24, partial_rotary_factor=0.75)},
    ),
    "gemma2": TinyCase(
        model_type="gemma2", voice="gemma",
        fields=_GEMMA | {"num_hidden_layers": 4, "attn_logit_softcapping": 4.0,
                         "final_logit_softcapping": 6.0},
    ),
    "gemma2-wide-heads": TinyCase(  # 27B: the score's scale is not that of the head
        model_type="gemma2", voice="gemma", fields=_GEMMA | {"head_dim": 32},
    ),
    "gemma3": TinyCase(model_type="gemma3_text", voice="gemma",
                       fields=_GEMMA | {"num_hidden_layers": 7}),
    "gemma3-linear-rope": TinyCase(  # 4B and up
        model_type="gemma3_text", voice="gemma",
        fields=_GEMMA | {"num_hidden_layers": 6, "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        }},
    ),
    "stablelm-1.6b": TinyCase(
        model_type="stablelm", voice="stablelm",
        fields={"use_qkv_bias": True, "num_key_value_heads": 4},
    ),
    "stablelm-12b": TinyCase(
        model_type="stablelm", voice="stablelm",
        fields={"qk_layernorm": True, "use_parallel_residual": True},
    ),
    "smollm3": TinyCase(
        model_type="smollm3", voice="smollm3", fields=_TIED | {"num_hidden_layers": 5}
    ),
    "smollm3-pattern": TinyCase(
        model_type="smollm3", voice="smollm3", fields=_TIED | {"no_rope_layers": [0, 1, 1]}
    ),
    "gemma-2b": TinyCase(
        model_type="gemma", voice="gemma",
        fields=_TIED | {"head_dim": 24, "num_key_value_heads": 1, "hidden_act": "gelu"},
    ),
    "gemma-7b": TinyCase(
        model_type="gemma", voice="gemma", fields=_TIED | {"head_dim": 16, "num_key_value_heads": 4}
    ),
    "granite": TinyCase(
        model_type="granite", voice="smollm",
        fields=_MUP | {"logits_scaling": 6.0, "attention_bias": True, "mlp_bias": True},
    ),
    "granite-tied": TinyCase(
        model_type="granite", voice="smollm",
        fields=_TIED | _MUP | {"logits_scaling": 6.0, "hidden_size": 72},
    ),
    "granite4": TinyCase(
        model_type="granitemoehybrid", voice="llama3",
        fields=_TIED | _DENSE_GRANITE4 | {"position_embedding_type": "rope"},
    ),
    "granite4-nope": TinyCase(
        model_type="granitemoehybrid", voice="llama3",
        fields=_DENSE_GRANITE4 | {"position_embedding_type": "nope"},
    ),
    "exaone": TinyCase(
        model_type="exaone", voice="llama3", fields={"rope_parameters": _LLAMA3_ROPE}
    ),
    "olmo2": TinyCase(model_type="olmo2", voice="llama3"),
    "olmo3": TinyCase(
        model_type="olmo3", voice="llama3",
        fields={"num_hidden_layers": 4, "sliding_window": WINDOW_TOKENS, "num_key_value_heads": 4},
    ),
    "olmo3-yarn": TinyCase(
        model_type="olmo3", voice="llama3",
        fields={"num_hidden_layers": 5, "sliding_window": WINDOW_TOKENS, "rope_parameters": {
            "full_attention": YARN | {"rope_theta": 500_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500_000.0},
        }},
    ),
    "hyperclovax": TinyCase(
        model_type="hyperclovax", voice="llama3", fields=_MUP | {"logits_scaling": 0.4}
    ),
    "hyperclovax-pre-norms": TinyCase(
        model_type="hyperclovax", voice="llama3",
        fields=_TIED | _MUP | {"logits_scaling": 0.4, "use_post_norm": False},
    ),
    "exaone4": TinyCase(
        model_type="exaone4", voice="llama3",
        fields=_TIED | {"sliding_window": None, "layer_types": ["full_attention"] * 3,
                        "rope_parameters": _LLAMA3_ROPE},
    ),
    "exaone4-windows": TinyCase(
        model_type="exaone4", voice="llama3",
        fields={"num_hidden_layers": 5, "sliding_window": WINDOW_TOKENS},
    ),
    "hunyuan": TinyCase(
        model_type="hunyuan_v1_dense", voice="llama3",
        fields=_TIED | {"head_dim": 24, "rope_parameters": {
            "rope_type": "dynamic", "rope_theta": 10_000.0, "alpha": 50.0, "factor": 1.0,
        }},
    ),
    "ernie4.5": TinyCase(model_type="ernie4_5", voice="tinyllama", fields={"head_dim": 24}),
    "ernie4.5-bias": TinyCase(
        model_type="ernie4_5", voice="tinyllama", fields=_TIED | {"head_dim": 16, "use_bias": True}
    ),
    "glm": TinyCase(model_type="glm", voice="llama3", fields={"head_dim": 24}),
    "glm-edge": TinyCase(
        model_type="glm", voice="llama3",
        fields=_TIED | {"head_dim": 16, "partial_rotary_factor": 1.0, "attention_bias": False},
    ),
    "glm4": TinyCase(model_type="glm4", voice="llama3", fields={"head_dim": 16}),
    "cohere": TinyCase(model_type="cohere", voice="smollm", fields=_TIED | {"logit_scale": 0.3}),
    "cohere-norms": TinyCase(
        model_type="cohere", voice="smollm",
        fields={"logit_scale": 0.3, "use_qk_norm": True, "attention_bias": True},
    ),
    "cohere2": TinyCase(
        model_type="cohere2", voice="smollm",
        fields=_TIED | {"num_hidden_layers": 5, "logit_scale": 0.3,
                        "sliding_window": WINDOW_TOKENS},
    ),
    "phi": TinyCase(model_type="phi", voice="smollm", fields={"num_key_value_heads": 4}),
    "starcoder2": TinyCase(model_type="starcoder2", voice="smollm", fields=_TIED),
    "starcoder2-window": TinyCase(
        model_type="starcoder2", voice="smollm", fields={"sliding_window": WINDOW_TOKENS}
    ),
    "nemotron": TinyCase(model_type="nemotron", voice="tinyllama", fields={"head_dim": 24}),
    "jais2": TinyCase(model_type="jais2", voice="smollm"),
    "arcee": TinyCase(model_type="arcee", voice="llama3", fields={"rope_parameters": YARN}),
    "apertus": TinyCase(
        model_type="apertus", voice="mistral",
        fields={"rope_parameters": _LLAMA3_ROPE | {"rope_theta": 12_000_000.0}},
    ),
    "helium": TinyCase(model_type="helium", voice="tinyllama", fields={"head_dim": 16}),
    "ministral3": TinyCase(
        model_type="ministral3", voice="mistral",
        fields=_TIED | {"head_dim": 24, "rope_parameters": YARN | {
            "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3,
        }},
    ),
    "ministral": TinyCase(
        model_type="ministral", voice="mistral",
        fields={"head_dim": 24, "sliding_window": WINDOW_TOKENS,
                "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
    ),
    "internlm3": TinyCase(
        model_type="internlm3", voice="tinyllama",
        fields={"head_dim": 16, "attention_bias": True, "mlp_bias": True},
    ),
    "seed-oss": TinyCase(model_type="seed_oss", voice="llama3", fields={"head_dim": 24}),
    "vaultgemma": TinyCase(
        model_type="vaultgemma", voice="gemma",
        fields=_GEMMA | {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 6.0},
    ),
    "lfm2": TinyCase(
        model_type="lfm2", voice="llama3",
        fields=_TIED | {"num_hidden_layers": 4, "block_multiple_of": 16, "intermediate_size": 150,
                        "layer_types": ["conv", "conv", "full_attention", "conv"]},
    ),
    "lfm2-five-taps": TinyCase(
        model_type="lfm2", voice="llama3",
        fields={"conv_L_cache": 5, "block_auto_adjust_ff_dim": False,
                "norm_eps": 1e-3, "tie_word_embeddings": False,
                "layer_types": ["full_attention", "conv", "full_attention"]},
    ),
    "lfm2-bias": TinyCase(
        model_type="lfm2", voice="llama3",
        fields=_TIED | {"conv_bias": True, "block_auto_adjust_ff_dim": False,
                        "layer_types": ["conv", "full_attention", "conv"]},
    ),
    "lfm2-moe": TinyCase(
        model_type="lfm2_moe", voice="llama3",
        fields=_TIED | {"num_hidden_layers": 5, "num_dense_layers": 2, "num_experts": 7,
                        "num_experts_per_tok": 3, "moe_intermediate_size": 48,
                        "layer_types": ["conv", "conv", "full_attention", "conv",
                                        "full_attention"]},
    ),
    "lfm2-moe-scaled": TinyCase(  # no bias to choose by, one dense layer, five taps, whole blocks
        model_type="lfm2_moe", voice="llama3",
        fields={"num_dense_layers": 1, "num_experts": 6, "num_experts_per_tok": 4,
                "moe_intermediate_size": 64, "use_expert_bias": False, "conv_L_cache": 5,
                "routed_scaling_factor": 1.75, "norm_eps": 1e-3, "tie_word_embeddings": False,
                "layer_types": ["full_attention", "conv", "full_attention"]},
    ),
    "lfm3": TinyCase(
        model_type="lfm3", voice="llama3",
        fields=_TIED | {"num_hidden_layers": 6, "head_dim": 24, "sliding_window": WINDOW_TOKENS,
                        "conv_L_cache": 7},
    ),
    "qwen3.5": TinyCase(  # 4B and 9B: two value heads to a key head
        model_type="qwen3_5_text", voice="qwen3",
        fields=_DELTA | {"linear_num_key_heads": 2, "linear_num_value_heads": 4},
    ),
    "qwen3.5-tied": TinyCase(  # 0.8B and 2B: as many of both
        model_type="qwen3_5_text", voice="qwen3",
        fields=_TIED | _DELTA | {"linear_num_key_heads": 2, "linear_num_value_heads": 2},
    ),
    "qwen3.5-pattern": TinyCase(
        model_type="qwen3_5_text", voice="qwen3",
        fields=_DELTA | {"linear_num_key_heads": 1, "linear_num_value_heads": 4,
                         "linear_conv_kernel_dim": 3, "rms_norm_eps": 1e-5,
                         "num_hidden_layers": 5, "layer_types": [
                             "full_attention", "linear_attention", "linear_attention",
                             "full_attention", "linear_attention"]},
    ),
    "gemma4": TinyCase(  # E2B: the last layers read keys and values of earlier ones
        model_type="gemma4_text", voice="gemma4",
        fields=_GEMMA4 | {"num_hidden_layers": 8, "num_kv_shared_layers": 3,
                          "use_double_wide_mlp": True, "hidden_size_per_layer_input": 32,
                          "final_logit_softcapping": 6.0,
                          "layer_types": [*_FIVE_KINDS, *_FIVE_KINDS[2:]]},
    ),
    "gemma4-other-donors": TinyCase(
        model_type="gemma4_text", voice="gemma4",
        fields=_GEMMA4 | {"num_hidden_layers": 7, "num_kv_shared_layers": 2,
                          "hidden_size_per_layer_input": 24,
                          "layer_types": [*_FIVE_KINDS[::-1], *_FIVE_KINDS[-2:]]},
    ),
    "gemma4-31b": TinyCase(  # values that are keys, and no embeddings for the layers
        model_type="gemma4_text", voice="gemma4",
        fields=_GEMMA4 | {"num_hidden_layers": 7, "attention_k_eq_v": True,
                          "num_global_key_value_heads": 1, "hidden_size_per_layer_input": 0},
    ),
}  # fmt: skip


def write_tiny_checkpoint(
    directory: Path,
    name: str,
    *,
    seed: int = 0,
    dtype: "torch.dtype | None" = None,
    shards: int = 1,
    **config_overrides: Any,
) -> Path:
    """Write a random checkpoint with its tokenizer, template and generation settings.

    Args:
        directory: Where it goes; made if it is not there.
        name: Of a case in `TINY`, or a ``model_type``, which means its first case.
        seed: Of the weights.
        dtype: What is stored; float32 if None.
        shards: At least into how many files the weights are split.
        config_overrides: Fields of the config.
    """
    import torch

    case = find_case(name)
    directory.mkdir(parents=True, exist_ok=True)
    stops = write_text_files(directory, case.voice)
    model = _build(case, seed=seed, stops=stops, overrides=config_overrides)
    model.to(dtype or torch.float32)
    stored_bytes = sum(weight.nbytes for weight in model.parameters())
    model.save_pretrained(directory, max_shard_size=-(-stored_bytes // shards))
    return directory


def find_case(name: str) -> TinyCase:
    """Return a case by its name, or the first of a ``model_type``."""
    if name in TINY:
        return TINY[name]
    return next(case for case in TINY.values() if case.model_type == name)


def _build(case: TinyCase, *, seed: int, stops: list[int], overrides: Mapping[str, Any]) -> Any:
    """Return the model with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    voice = VOICES[case.voice]
    ids = _token_ids(case.voice)
    special = {
        f"{kind}_token_id": ids[token]
        for kind, token in (("bos", voice.bos), ("eos", voice.eos), ("pad", voice.pad))
        if token
    }
    unset = {"bos_token_id": None, "pad_token_id": None}
    sizes = _SIZES | {"vocab_size": -(-len(ids) // 32) * 32}
    fields = sizes | unset | special | dict(case.fields) | dict(overrides)
    config = AutoConfig.for_model(case.model_type, **json.loads(json.dumps(fields)))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _randomize(model, case.model_type, seed=seed)
    model.generation_config = GenerationConfig(**(special | {"eos_token_id": stops}))
    return model.eval()


def _randomize(model: Any, model_type: str, *, seed: int) -> None:
    """Give every weight a value whose loss would be seen."""
    import torch

    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(std=_spread(name, weight), generator=source)
            is_norm = "norm" in name and name.endswith("weight")
            if is_norm and (
                model_type not in _ADDS_ONE or name.endswith("linear_attn.norm.weight")
            ):
                weight.add_(1.0)
            if name.endswith("A_log"):  # states that last for some tokens, and for many
                weight.uniform_(0.02, 3.0, generator=source).log_()
            _calm(name, weight, model.config)
        for name, scale in model.named_buffers():
            if name.endswith("layer_scalar"):
                scale.uniform_(0.5, 1.5, generator=source)
            if name.endswith("expert_bias"):
                scale.normal_(std=0.3, generator=source)


def _spread(name: str, weight: "torch.Tensor") -> float:
    if "embed" in name or "lm_head" in name:
        # Sharper logits than weights inside: then small errors inside move the answer.
        return 0.3
    if weight.ndim == 3 and "experts" not in name:  # taps, of which few are added up
        return 0.85 / math.sqrt(weight.shape[-1])
    return 0.3 if ".conv." in name else 0.15  # around convolutions three are multiplied


def _calm(name: str, weight: "torch.Tensor", config: Any) -> None:
    """Take away what makes random weights chaotic, and trained ones not.

    Scores that nothing makes small; what convolutions give, which is seldom near its mean, made
    loud by a norm; and what is read of a nearly empty state, which would be of either sign by
    chance, and which a norm makes as loud as any: so keys have something of the queries.
    """
    if name.endswith("q_norm.weight") and config.model_type in _SCALES_NO_SCORES:
        weight.div_(len(weight) ** 0.5)
    if name.endswith(("post_operator_norm.weight", "post_ffn_norm.weight")):
        weight.mul_(0.25)
    if name.endswith(("linear_attn.in_proj_qkv.weight", "linear_attn.conv1d.weight")):
        count = config.linear_num_key_heads * config.linear_key_head_dim
        query, key = weight[:count], weight[count : 2 * count]
        key.mul_((1 - ALIKE**2) ** 0.5).add_(query, alpha=ALIKE)


@functools.cache
def _token_ids(voice: str) -> Mapping[str, int]:
    from tokenizers import Tokenizer

    return dict(Tokenizer.from_str(train(voice)).get_vocab())


def write_text_files(directory: Path, name: str) -> list[int]:
    """Write what transformers' ``save_pretrained`` of a tokenizer writes; return the stop ids."""
    voice = VOICES[name]
    (directory / "tokenizer.json").write_text(train(name), encoding="utf-8")
    (directory / "chat_template.jinja").write_text(voice.template, encoding="utf-8")
    settings = {
        "backend": "tokenizers",
        "bos_token": voice.bos,
        "clean_up_tokenization_spaces": False,
        "eos_token": voice.eos,
        "model_max_length": CONTEXT_TOKENS,
        "pad_token": voice.pad,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": voice.unk,
    }
    text = json.dumps(settings, indent=2)
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return [_token_ids(name)[token] for token in voice.stops]
