"""What every family reads out of a config. A new family is a new case, with a config here."""

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

import edgekit
from edgekit.errors import UsageError
from edgekit.model.norm import Norm
from edgekit.model.rope import LinearScaling, Llama3Scaling, LongRopeScaling, Rope, YarnScaling
from edgekit.source import families
from edgekit.source.config import Config
from edgekit.source.families import _rope
from edgekit.tests.tiny.checkpoints import TINY, write_tiny_checkpoint


SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 6,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
# As their makers published them, in the layout of transformers 4, sizes apart.
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama": SIZES | {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 8,
        "hidden_act": "silu", "initializer_range": 0.02, "mlp_bias": False, "model_type": "llama",
        "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 16, "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0", "use_cache": True,
    },
    "mistral": SIZES | {
        "hidden_act": "silu", "model_type": "mistral", "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0, "sliding_window": 16, "tie_word_embeddings": False,
    },
    "qwen2": SIZES | {
        "hidden_act": "silu", "max_window_layers": 4, "model_type": "qwen2", "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 32, "tie_word_embeddings": True,
        "use_mrope": False, "use_sliding_window": False,
    },
    "qwen3": SIZES | {
        "attention_bias": False, "head_dim": 16, "hidden_act": "silu", "max_window_layers": 6,
        "model_type": "qwen3", "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
    "phi3": SIZES | {
        "attention_bias": False, "embd_pdrop": 0.0, "hidden_act": "silu", "model_type": "phi3",
        "original_max_position_embeddings": 16, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
        "rope_scaling": {"long_factor": [1.5, 2.0, 4.0, 8.0], "short_factor": [1.0, 1.0, 1.1, 1.2],
                         "type": "longrope"},
        "rope_theta": 10000.0, "sliding_window": 48, "tie_word_embeddings": False,
    },
    "gemma2": SIZES | {
        "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0, "head_dim": 16, "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "model_type": "gemma2",
        "query_pre_attn_scalar": 16, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
        "sliding_window": 8,
    },
    "gemma3_text": SIZES | {
        "attention_bias": False, "attn_logit_softcapping": None, "cache_implementation": "hybrid",
        "final_logit_softcapping": None, "head_dim": 16,
        "hidden_activation": "gelu_pytorch_tanh", "model_type": "gemma3_text",
        "query_pre_attn_scalar": 16, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 8,
        "sliding_window_pattern": 6,
    },
    "stablelm": SIZES | {
        "hidden_act": "silu", "hidden_dropout": 0.0, "layer_norm_eps": 1e-05,
        "model_type": "stablelm", "partial_rotary_factor": 0.25, "qk_layernorm": True,
        "rope_scaling": None, "rope_theta": 10000, "tie_word_embeddings": False,
        "use_parallel_residual": True, "use_qkv_bias": False,
    },
    "smollm3": SIZES | {
        "attention_bias": False, "hidden_act": "silu", "layer_types": ["full_attention"] * 6,
        "max_window_layers": 28, "mlp_bias": False, "model_type": "smollm3",
        "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0, 1, 1], "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None,
        "use_sliding_window": False,
    },
    "gemma": SIZES | {
        "attention_bias": False, "head_dim": 16, "hidden_act": "gelu", "hidden_activation": None,
        "model_type": "gemma", "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000.0,
    },
    "granite": SIZES | {
        "attention_bias": False, "attention_multiplier": 0.015625, "embedding_multiplier": 12.0,
        "hidden_act": "silu", "logits_scaling": 8.0, "mlp_bias": False, "model_type": "granite",
        "residual_multiplier": 0.22, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "rope_theta": 10000000.0, "tie_word_embeddings": True,
    },
    "granitemoehybrid": SIZES | {
        "attention_bias": False, "attention_multiplier": 0.0078125, "embedding_multiplier": 12,
        "hidden_act": "silu", "init_method": "mup", "layer_types": ["attention"] * 6,
        "logits_scaling": 10, "mamba_chunk_size": 256, "mamba_conv_bias": True, "mamba_d_conv": 4,
        "mamba_d_head": 64, "mamba_d_state": 256, "mamba_expand": 2, "mamba_n_groups": 1,
        "mamba_n_heads": 128, "mamba_proj_bias": False, "model_type": "granitemoehybrid",
        "normalization_function": "rmsnorm", "num_experts_per_tok": 0, "num_local_experts": 0,
        "output_router_logits": False, "position_embedding_type": "rope",
        "residual_multiplier": 0.22, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "rope_theta": 10000000, "router_aux_loss_coef": 0.01, "shared_intermediate_size": 72,
        "tie_word_embeddings": True,
    },
    "exaone": {k: v for k, v in SIZES.items() if k != "num_hidden_layers"} | {
        "activation_function": "silu", "embed_dropout": 0.0, "head_dim": 8,
        "layer_norm_epsilon": 1e-05, "model_type": "exaone", "num_layers": 6,
        "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 16, "rope_type": "llama3"},
        "rope_theta": 1000000.0, "tie_word_embeddings": True,
    },
    "olmo2": SIZES | {
        "attention_bias": False, "hidden_act": "silu", "model_type": "olmo2", "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 500000, "tie_word_embeddings": False,
    },
    "olmo3": SIZES | {
        "attention_bias": False, "hidden_act": "silu", "model_type": "olmo3", "rms_norm_eps": 1e-06,
        "layer_types": (["sliding_attention"] * 3 + ["full_attention"] * 3),
        "rope_scaling": {"attention_factor": 1.2079441541679836, "beta_fast": 32.0,
                         "beta_slow": 1.0, "factor": 8.0, "original_max_position_embeddings": 16,
                         "rope_type": "yarn"},
        "rope_theta": 500000, "sliding_window": 8, "tie_word_embeddings": False,
    },
    "hyperclovax": SIZES | {
        "attention_bias": False, "attention_multiplier": 0.0078125, "embedding_multiplier": 10.0,
        "head_dim": 8, "hidden_act": "silu", "logits_scaling": 0.125, "mlp_bias": False,
        "model_type": "hyperclovax", "residual_multiplier": 1.0, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "rope_theta": 100000000, "tie_word_embeddings": False,
        "use_post_norm": True,
    },
    "exaone4": SIZES | {
        "head_dim": 8, "hidden_act": "silu", "layer_types": ["sliding_attention"] * 3
        + ["full_attention"] + ["sliding_attention"] * 2, "model_type": "exaone4",
        "rms_norm_eps": 1e-05, "rope_theta": 1000000, "sliding_window": 8,
        "rope_scaling": {"factor": 16.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 16, "rope_type": "llama3"},
        "sliding_window_pattern": "LLLG", "tie_word_embeddings": False,
    },
    "hunyuan_v1_dense": SIZES | {
        "add_classification_head": False, "attention_bias": False, "attention_head_dim": 16,
        "cla_share_factor": 2, "class_num": 0, "dense_list": [48, 0], "head_dim": 16,
        "hidden_act": "silu", "im_end_id": 5, "im_newline_id": 11, "im_start_id": 4,
        "mask_init_id": 12, "mlp_bias": False, "norm_type": "rms", "org_vocab_size": 96,
        "pad_id": 9, "pool_type": "last", "text_end_id": 7, "text_start_id": 6,
        "use_rotary_pos_emb": True, "model_type": "hunyuan_v1_dense", "rms_norm_eps": 1e-05,
        "rope_scaling": {"alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0,
                         "mscale": 1.0, "mscale_all_dim": 1.0, "type": "dynamic"},
        "rope_theta": 10000.0, "tie_word_embeddings": True, "use_cla": False, "use_qk_norm": True,
    },
    "ernie4_5": SIZES | {
        "head_dim": 16, "hidden_act": "silu", "model_type": "ernie4_5", "rms_norm_eps": 1e-05,
        "rope_scaling": None, "rope_theta": 500000, "tie_word_embeddings": True, "use_bias": False,
    },
    "glm": SIZES | {
        "attention_bias": True, "head_dim": 16, "hidden_act": "silu", "model_type": "glm",
        "partial_rotary_factor": 0.5, "rms_norm_eps": 1.5625e-07, "rope_theta": 10000.0,
    },
    "glm4": SIZES | {
        "attention_bias": True, "head_dim": 16, "hidden_act": "silu", "model_type": "glm4",
        "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
    },
    "cohere": SIZES | {
        "attention_bias": False, "hidden_act": "silu", "layer_norm_eps": 1e-05,
        "logit_scale": 0.0625, "model_type": "cohere", "rope_theta": 8000000.0,
        "use_qk_norm": False,
    },
    "cohere2": SIZES | {
        "attention_bias": False, "cache_implementation": "hybrid", "head_dim": 8,
        "hidden_act": "silu", "layer_norm_eps": 1e-05, "layer_switch": 4, "logit_scale": 0.25,
        "model_type": "cohere2", "order_of_interleaved_layers": "local_attn_first",
        "position_embedding_type": "rope_gptj", "rope_scaling": None, "rope_theta": 50000,
        "rotary_pct": 1.0, "sliding_window": 8, "sliding_window_pattern": 4,
        "use_embedding_sharing": True, "use_gated_activation": True, "use_parallel_block": True,
        "use_parallel_embedding": False,
    },
    "phi": SIZES | {
        "embd_pdrop": 0.0, "hidden_act": "gelu_new", "layer_norm_eps": 1e-05, "model_type": "phi",
        "partial_rotary_factor": 0.5, "qk_layernorm": False, "resid_pdrop": 0.1,
        "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False,
    },
    "starcoder2": SIZES | {
        "activation_function": "gelu", "attention_softmax_in_fp32": True, "embedding_dropout": 0.1,
        "hidden_act": "gelu_pytorch_tanh", "layer_norm_epsilon": 1e-05, "mlp_type": "default",
        "model_type": "starcoder2", "norm_epsilon": 1e-05, "norm_type": "layer_norm",
        "residual_dropout": 0.1, "rope_theta": 999999.4420358813,
        "scale_attention_softmax_in_fp32": True, "scale_attn_weights": True, "sliding_window": 8,
        "use_bias": True,
    },
    "nemotron": SIZES | {
        "attention_bias": False, "head_dim": 16, "hidden_act": "relu2", "mlp_bias": False,
        "model_type": "nemotron", "norm_eps": 1e-05, "partial_rotary_factor": 0.5,
        "rope_theta": 10000.0, "tie_word_embeddings": False,
    },
    "jais2": SIZES | {
        "attention_bias": True, "hidden_act": "relu2", "layer_norm_eps": 1e-05, "mlp_bias": True,
        "model_type": "jais2", "rope_theta": 500000.0, "tie_word_embeddings": False,
    },
    "arcee": SIZES | {
        "attention_bias": False, "head_dim": 8, "hidden_act": "relu2", "mlp_bias": False,
        "model_type": "arcee", "rms_norm_eps": 1e-05, "rope_scaling": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 20.0, "mscale": 1.0,
            "original_max_position_embeddings": 16, "rope_type": "yarn", "type": "yarn",
        },
        "rope_theta": 10000.0, "tie_word_embeddings": False,
    },
    "apertus": SIZES | {
        "attention_bias": False, "hidden_act": "xielu", "mlp_bias": False, "model_type": "apertus",
        "post_norm": False, "qk_norm": True, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 16, "rope_type": "llama3"},
        "rope_theta": 12000000, "tie_word_embeddings": False,
    },
    "helium": SIZES | {
        "attention_bias": False, "head_dim": 8, "hidden_act": "silu", "mlp_bias": False,
        "model_type": "helium", "rms_norm_eps": 1e-08, "rope_theta": 20000.0,
        "tie_word_embeddings": False,
    },
    "ministral3": SIZES | {
        "head_dim": 16, "hidden_act": "silu", "model_type": "ministral3", "rms_norm_eps": 1e-05,
        "rope_parameters": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0,
                            "llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0,
                            "original_max_position_embeddings": 16, "rope_theta": 1000000.0,
                            "rope_type": "yarn", "type": "yarn"},
        "sliding_window": None, "tie_word_embeddings": True,
    },
    "ministral": SIZES | {
        "head_dim": 16, "hidden_act": "silu", "model_type": "ministral", "rms_norm_eps": 1e-05,
        "layer_types": ["full_attention"] + ["sliding_attention"] * 5,
        "rope_theta": 100000000.0, "sliding_window": 16, "tie_word_embeddings": False,
    },
    "internlm3": SIZES | {
        "bias": False, "head_dim": 16, "hidden_act": "silu", "model_type": "internlm3",
        "qkv_bias": False, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 6.0, "rope_type": "dynamic"}, "rope_theta": 50000000,
        "tie_word_embeddings": False,
    },
    "seed_oss": SIZES | {
        "attention_bias": True, "attention_dropout": 0.1, "attention_out_bias": False,
        "head_dim": 16, "hidden_act": "silu", "mlp_bias": False, "model_type": "seed_oss",
        "residual_dropout": 0.1, "rms_norm_eps": 1e-06, "rope_scaling": {"rope_type": "default"},
        "rope_theta": 10000000.0, "tie_word_embeddings": False,
    },
    "vaultgemma": SIZES | {
        "attention_bias": False, "attn_logit_softcapping": None, "final_logit_softcapping": None,
        "head_dim": 16, "hidden_activation": "gelu_pytorch_tanh", "model_type": "vaultgemma",
        "layer_types": ["sliding_attention", "full_attention"] * 3, "query_pre_attn_scalar": 16,
        "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 8,
    },
    "lfm2": SIZES | {
        "architectures": ["Lfm2ForCausalLM"], "block_auto_adjust_ff_dim": True, "block_dim": 48,
        "block_ff_dim": 120, "block_ffn_dim_multiplier": 1.0, "block_mlp_init_scale": 1.0,
        "block_multiple_of": 16, "block_norm_eps": 1e-05, "block_out_init_scale": 1.0,
        "block_use_swiglu": True, "block_use_xavier_init": True, "bos_token_id": 1,
        "conv_L_cache": 3, "conv_bias": False, "conv_dim": 48, "conv_dim_out": 48,
        "conv_use_xavier_init": True, "eos_token_id": 7, "full_attn_idxs": [2, 5],
        "hidden_act": "silu", "intermediate_size": 120, "model_type": "lfm2", "norm_eps": 1e-05,
        "num_heads": 6, "pad_token_id": 0, "rope_theta": 1000000.0, "theta": 1000000.0,
        "tie_embedding": True, "use_cache": True, "use_pos_enc": True,
    },
    "lfm2_moe": SIZES | {
        "architectures": ["Lfm2MoeForCausalLM"], "bos_token_id": 1, "conv_L_cache": 3,
        "conv_bias": False, "eos_token_id": 7, "hidden_act": "silu", "initializer_range": 0.02,
        "layer_types": ["conv", "conv", "full_attention", "conv", "conv", "full_attention"],
        "model_type": "lfm2_moe", "moe_intermediate_size": 24, "norm_eps": 1e-05,
        "norm_topk_prob": True, "num_dense_layers": 2, "num_experts": 8,
        "num_experts_per_tok": 4, "output_router_logits": False, "pad_token_id": 0,
        "rope_theta": 1000000.0, "routed_scaling_factor": 1.0, "tie_embedding": True,
        "use_cache": True, "use_expert_bias": True,
    },
    "lfm3": SIZES | {
        "attention_bias": False, "attention_dropout": 0.0, "conv_L_cache": 7, "conv_bias": False,
        "head_dim": 8, "hidden_act": "silu", "model_type": "lfm3", "norm_eps": 1e-05,
        "layer_types": ["conv", "conv", "full_attention", "conv", "sliding_attention", "conv"],
        "rope_parameters": {
            "full_attention": {"partial_rotary_factor": 0.5, "rope_theta": 1000000.0,
                               "rope_type": "proportional"},
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "sliding_window": 8, "tie_word_embeddings": True, "use_attention_gate": True,
        "use_sandwich_norm": True,
    },
    "qwen3_5_text": SIZES | {
        "attention_bias": False, "attention_dropout": 0.0, "attn_output_gate": True,
        "full_attention_interval": 4, "head_dim": 16, "hidden_act": "silu",
        "layer_types": [*["linear_attention"] * 3, "full_attention", *["linear_attention"] * 2],
        "linear_conv_kernel_dim": 4, "linear_key_head_dim": 8, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_value_head_dim": 8, "mamba_ssm_dtype": "float32",
        "mlp_only_layers": [], "model_type": "qwen3_5_text", "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False, "rms_norm_eps": 1e-06,
        "rope_parameters": {"mrope_interleaved": True, "mrope_section": [1, 1, 0],
                            "partial_rotary_factor": 0.25, "rope_theta": 10000000,
                            "rope_type": "default"},
        "tie_word_embeddings": True,
    },
    "gemma4_text": SIZES | {
        "attention_bias": False, "attention_dropout": 0.0, "attention_k_eq_v": False,
        "enable_moe_block": False, "final_logit_softcapping": 30.0, "global_head_dim": 32,
        "head_dim": 16, "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size_per_layer_input": 8,
        "layer_types": [*["sliding_attention"] * 2, "full_attention"] * 2,
        "model_type": "gemma4_text", "moe_intermediate_size": None, "num_experts": None,
        "num_global_key_value_heads": None, "num_kv_shared_layers": 2, "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0,
                               "rope_type": "proportional"},
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "sliding_window": 8, "tie_word_embeddings": True, "top_k_experts": None,
        "use_bidirectional_attention": None, "use_double_wide_mlp": True,
        "vocab_size_per_layer_input": 96,
    },
}  # fmt: skip
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("llama", {"head_dim": 24}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-untied": ("llama", {"tie_word_embeddings": False}),
    "llama-linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 2}}),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
    "qwen2-windows": ("qwen2", {"use_sliding_window": True}),
    "qwen3-bias": ("qwen3", {"attention_bias": True}),
    "phi3-no-scaling": ("phi3", {"rope_scaling": None, "sliding_window": None}),
    "phi4-mini": ("phi3", {
        "hidden_size": 96, "partial_rotary_factor": 0.5, "tie_word_embeddings": True,
        "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False,
    }),
    "gemma2-27b": ("gemma2", {"query_pre_attn_scalar": 144}),
    "gemma2-no-caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma2-bias": ("gemma2", {"attention_bias": True}),
    "gemma3-4b": ("gemma3_text", {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}),
    "stablelm-1.6b": ("stablelm", {
        "qk_layernorm": False, "use_parallel_residual": False, "use_qkv_bias": True,
    }),
    "granite4-nope": ("granitemoehybrid", {"position_embedding_type": "nope"}),
    "hyperclovax-pre-norms": ("hyperclovax", {"use_post_norm": False}),
    "exaone4-no-window": ("exaone4", {"layer_types": None, "sliding_window": None}),
    "cohere-norms": ("cohere", {"attention_bias": True, "use_qk_norm": True}),
    "phi-2": ("phi", {"partial_rotary_factor": 0.25}),
    "apertus-no-rope": ("apertus", {"rope_scaling": None, "rope_theta": None}),
    "ministral3-no-rope": ("ministral3", {"rope_parameters": None}),
    "ernie4.5-bias": ("ernie4_5", {"use_bias": True}),
    "lfm2-all-attention": ("lfm2", {"full_attn_idxs": None, "block_auto_adjust_ff_dim": False}),
    "lfm2-bias": ("lfm2", {"conv_bias": True, "conv_L_cache": 5, "tie_embedding": False}),
    "lfm2-moe-without-bias": ("lfm2_moe", {
        "use_expert_bias": False, "norm_topk_prob": False, "routed_scaling_factor": 2.5,
        "num_dense_layers": 0, "tie_embedding": False,
    }),
    "lfm3-plain": ("lfm3", {
        "use_attention_gate": False, "use_sandwich_norm": False, "attention_bias": True,
        "rope_parameters": None, "layer_types": None,
    }),
    "qwen3.5-bias": ("qwen3_5_text", {"attention_bias": True, "layer_types": None}),
    "gemma4-values-are-keys": ("gemma4_text", {
        "attention_k_eq_v": True, "num_global_key_value_heads": 1, "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0, "use_double_wide_mlp": False, "global_head_dim": 16,
    }),
    "gemma4-plain-ropes": ("gemma4_text", {
        "rope_parameters": None, "attention_bias": True, "use_bidirectional_attention": "vision",
        "layer_types": None, "num_kv_shared_layers": 0,
    }),
    "smollm3-windows": ("smollm3", {
        "use_sliding_window": True, "sliding_window": 8, "layer_types": None,
    }),
}  # fmt: skip
CASES = {name: (name, fields) for name, fields in PUBLISHED.items()} | {
    name: (model_type, PUBLISHED[model_type] | fields)
    for name, (model_type, fields) in VARIANTS.items()
}


NEW_IN_VERSION_5 = {"lfm3", "qwen3_5_text", "gemma4_text"}


def describe(model_type, fields):
    config = Config(json.loads(json.dumps(fields)), origin="config.json")
    spec = families.get(model_type).describe(config)
    config.refuse_unread()
    return spec


def published(model_type, **changes):
    return describe(model_type, PUBLISHED[model_type] | changes)


def without(model_type, *names):
    return {name: value for name, value in PUBLISHED[model_type].items() if name not in names}


@pytest.mark.parametrize("model_type", families.names())
def test_every_family_has_a_published_config_here(model_type):
    assert model_type in PUBLISHED
    published(model_type)


def test_the_page_of_models_lists_every_family():
    page = Path(edgekit.__file__).parents[1] / "docs" / "models.md"
    if not page.is_file():
        pytest.skip("edgekit is installed without its pages")
    _, rest = page.read_text(encoding="utf-8").split("| `model_type` | models |")
    rows = re.findall(r"^\| (`.+?) \|", rest.split("\n\n")[0], re.MULTILINE)
    assert families.names()
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == families.names()


@pytest.mark.parametrize("name", CASES)
def test_every_weight_has_a_source_and_fused_rows_do_not_overlap(name):
    model_type, fields = CASES[name]
    spec = describe(model_type, fields)
    taken: dict[str, set[int]] = {}
    assert len(dict(spec.weights())) > 10
    for role, shape in spec.weights():
        source = families.get(model_type).source(role, spec)
        count = len(source.tensors) if source.siblings else (source.rows or shape[0])
        assert count == shape[0], role
        rows = {0} if source.siblings else set(range(source.first_row, source.first_row + count))
        for tensor in source.tensors:
            assert not taken.get(tensor, set()) & rows, role
            taken.setdefault(tensor, set()).update(rows)


@pytest.mark.parametrize("name", CASES)
def test_a_config_written_from_a_decoder_reads_as_that_decoder(name):
    model_type, fields = CASES[name]
    spec = describe(model_type, fields)
    assert describe(model_type, families.get(model_type).config(spec)) == spec


@pytest.mark.parametrize("model_type", families.names())
def test_a_field_nobody_knows_is_refused(model_type):
    with pytest.raises(UsageError, match="mystery_scale"):
        published(model_type, mystery_scale=2.0)


@pytest.mark.parametrize("model_type", families.names())
def test_a_rope_parameter_nobody_knows_is_refused(model_type):
    rope = {"rope_type": "default", "rope_theta": 1e4, "mystery_factor": 2.0}
    if model_type in {"gemma3_text", "gemma4_text", "lfm3", "olmo3"}:
        rope = {"full_attention": rope}
    fields = without(model_type, "rope_scaling", "rope_theta", "rope_local_base_freq")
    with pytest.raises(UsageError, match="mystery_factor"):
        describe(model_type, fields | {"rope_parameters": rope})


@pytest.mark.parametrize("model_type", families.names())
@pytest.mark.parametrize(
    ("name", "value"),
    [("num_attention_heads", 0), ("vocab_size", -3), ("hidden_size", 2**40),
     ("num_hidden_layers", 10**9), ("intermediate_size", "many"), ("rope_theta", float("nan")),
     ("rope_theta", 10**400), ("num_key_value_heads", 4), ("max_position_embeddings", None)],
)  # fmt: skip
def test_an_absurd_size_is_refused_by_the_name_of_its_field(model_type, name, value):
    with pytest.raises(UsageError, match=r"config\.json") as refusal:
        published(model_type, **{name: value})
    assert name.removeprefix("num_").split("_")[0] in str(refusal.value)


@pytest.mark.parametrize("model_type", PUBLISHED)
@pytest.mark.parametrize("value", [1e17, 1e3, 1.5])
def test_an_epsilon_that_drowns_what_it_is_added_to_is_refused(model_type, value):
    # StarCoder 2's config has the epsilon of its ancestor's code too, which nothing reads.
    *_, name = [name for name in PUBLISHED[model_type] if "eps" in name]
    with pytest.raises(UsageError, match=r"the epsilon of a norm is .*, expected a number from 0"):
        published(model_type, **{name: value})


@pytest.mark.parametrize("value", [1.0001, 1e17, 2**31 - 1])
def test_no_more_of_a_head_rotates_than_there_is(value):
    with pytest.raises(UsageError, match=r"partial_rotary_factor = .* to 1$"):
        published("stablelm", partial_rotary_factor=value)


ODD_VALUES = [None, True, 0, -1, 1, 3, 2**40, 10**400, 0.5, math.nan, math.inf, "", "x", [], {},
              [None], ["x"], [1] * 6, {"x": 1}, {"rope_type": "longrope"}, {"rope_type": 3},
              {"full_attention": 1}]  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_whatever_a_field_holds_is_read_or_refused(name):
    model_type, fields = CASES[name]
    for changed in [*fields, "rope_parameters", "layer_types", "original_max_position_embeddings"]:
        for value in ODD_VALUES:
            odd = fields | {changed: value}
            try:
                spec = families.get(model_type).describe(Config(odd, origin="config.json"))
            except UsageError:
                continue
            assert len(list(spec.weights())) > len(spec.layers), (changed, value)


@pytest.mark.parametrize("model_type", families.names())
def test_an_unknown_activation_is_refused(model_type):
    names = {"hidden_act", "hidden_activation", "activation_function"}
    (name, *_) = sorted(names & PUBLISHED[model_type].keys(), reverse=True)
    with pytest.raises(UsageError, match=f"{name} = 'mish'"):
        published(model_type, **{name: "mish"})


# What would change the result and is not computed, in fields of one family.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a clip": ("olmo2", {"clip_qkv": 8.0}, "clip_qkv = 8.0"),
    "norms of heads": ("phi", {"qk_layernorm": True}, "qk_layernorm = True"),
    "another norm": ("starcoder2", {"norm_type": "rms"}, "norm_type = 'rms'"),
    "biases on some": ("internlm3", {"bias": True}, "qkv_bias = False and bias = True"),
    "narrow heads": ("helium", {"head_dim": 6}, "head_dim = 6 are not hidden_size = 48"),
    "wide heads": ("cohere2", {"head_dim": 16}, "head_dim = 16"),
    "serial blocks": ("cohere", {"use_parallel_block": False}, "use_parallel_block = False"),
    "two numbers of layers": ("exaone", {"num_hidden_layers": 5}, "num_layers = 6 are the same"),
    "two activations": ("exaone", {"hidden_act": "relu"}, "activation_function = 'silu' are the"),
    "experts": ("granitemoehybrid", {"num_local_experts": 62}, "num_local_experts = 62"),
    "experts by default": ("granitemoehybrid", {"num_local_experts": None}, "experts = 8"),
    "Mamba": (
        "granitemoehybrid", {"layer_types": ["mamba"] * 5 + ["attention"]}, "'mamba' in 5 of 6"
    ),
    "Mamba by default": ("granitemoehybrid", {"layer_types": None}, "'mamba' in 6 of 6"),
    "learned positions": (
        "granitemoehybrid", {"position_embedding_type": "learned"}, "embedding_type = 'learned'"
    ),
    "another pattern": ("exaone4", {"sliding_window_pattern": "LXG"}, "pattern = 'LXG'"),
    "windows of no length": ("olmo3", {"sliding_window": None}, "there is no window"),
    "a growth from nowhere": (
        "ministral3",
        {"rope_parameters": {"rope_type": "default", "llama_4_scaling_beta": 0.1}},
        "original_max_position_embeddings = None",
    ),
    "an alpha of another rope": (
        "hunyuan_v1_dense", {"rope_scaling": {"type": "linear", "factor": 2.0, "alpha": 9.0}},
        "alpha",
    ),
    "a ramp that transformers overlooks": (
        "olmo3", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}},
        "truncate = False",
    ),
    "a theta that transformers overlooks": (
        "apertus", {"rope_scaling": None, "rope_theta": 500000}, "rope_theta = 500000"
    ),
    "shared keys": ("hunyuan_v1_dense", {"use_cla": True}, "use_cla = True"),
    "two widths of a head": (
        "hunyuan_v1_dense", {"attention_head_dim": 8}, "attention_head_dim = 8"
    ),
    "no gate": ("cohere2", {"use_gated_activation": False}, "use_gated_activation = False"),
    "another beginning": ("cohere2", {"layer_switch": 3}, "layer_switch = 3"),
    "a layer nobody knows": (
        "lfm2", {"layer_types": ["conv"] * 5 + ["mamba"]}, "layer_types has 'mamba'"
    ),
    "a convolution of one token": ("lfm2", {"conv_L_cache": 1}, "conv_L_cache = 1"),
    "one expert": ("lfm2_moe", {"num_experts": 1}, "num_experts = 1, expected 2 or more"),
    "more than there are": (
        "lfm2_moe", {"num_experts_per_tok": 9}, "num_experts_per_tok = 9, expected 1 to num_experts"
    ),
    "no gate in the MLP": ("lfm2", {"block_use_swiglu": False}, "block_use_swiglu = False"),
    "another gate": ("qwen3_5_text", {"output_gate_type": "relu"}, "output_gate_type = 'relu'"),
    "a layer of another model": (
        "qwen3_5_text", {"layer_types": ["conv"] * 6}, "layer_types has 'conv'"
    ),
    "heads that do not fit": (
        "qwen3_5_text", {"linear_num_value_heads": 3}, "3 value heads (linear_num_value_heads)"
    ),
    "experts next to an MLP": (
        "gemma4_text", {"enable_moe_block": True}, "enable_moe_block = True"
    ),
    "both directions": (
        "gemma4_text", {"use_bidirectional_attention": "all"}, "attention = 'all'"
    ),
    "layers that all read others": (
        "gemma4_text", {"num_kv_shared_layers": 6}, "num_kv_shared_layers = 6"
    ),
    "nobody to read from": (
        "gemma4_text", {"num_kv_shared_layers": 4}, "none of the first 2 is of type full_attention"
    ),
    "a short table": (
        "gemma4_text", {"vocab_size_per_layer_input": 95}, "vocab_size_per_layer_input = 95"
    ),
    "heads of many shapes": (
        "gemma4_text", {"per_layer_config": {"2": {"head_dim": 32}, "5": {"head_dim": 64}}},
        "heads of different shapes",
    ),
    "other heads in windows": (
        "gemma4_text", {"per_layer_config": {"0": {"head_dim": 8}}}, "heads of different shapes"
    ),
    "an override nobody knows": (
        "gemma4_text", {"per_layer_config": {"2": {"sliding_window": 4}}}, "sliding_window = 4"
    ),
    "nothing to divide by": ("granite", {"logits_scaling": 0}, "logits_scaling = 0"),
}  # fmt: skip


@pytest.mark.parametrize("spelling", ["{}", "{:02}"])
def test_heads_are_those_of_a_layer_however_its_number_is_written(spelling):
    """As ``Gemma4TextConfig(num_hidden_layers=12).to_dict()`` of transformers 5.24 has it: 02."""
    full = [index for index in range(12) if index % 3 == 2]
    overrides = {
        spelling.format(index): {"head_dim": 48, "num_key_value_heads": 1} for index in full
    }
    spec = published(
        "gemma4_text", num_hidden_layers=12, global_head_dim=None, per_layer_config=overrides,
        layer_types=[*["sliding_attention"] * 2, "full_attention"] * 4,
    )  # fmt: skip
    found = [(a.head_dim, a.num_kv_heads) for _, _, a in spec.attentions()]
    usual = spec.attention.head_dim, spec.attention.num_kv_heads
    assert found == [(48, 1) if index in full else usual for index in range(12)]
    assert usual != (48, 1)


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_family_does_not_compute_is_refused_by_field_and_value(name):
    model_type, fields, expected = REFUSED[name]
    with pytest.raises(UsageError) as refusal:
        published(model_type, **fields)
    assert expected in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_an_unsupported_model_type_names_the_supported_ones():
    with pytest.raises(UsageError) as refusal:
        families.get("mamba9")
    assert "llama" in refusal.value.hint
    assert "_common" not in refusal.value.hint


def test_what_families_share_is_no_family():
    with pytest.raises(UsageError, match="'_rope'"):
        families.get("_rope")


def test_a_null_is_an_absent_field():
    assert published("llama", quantization_config=None) == published("llama")
    with pytest.raises(UsageError, match="quantization_config"):
        published("llama", quantization_config={"quant_method": "fp8"})


def test_llama_rope_scaling_is_read_in_both_layouts():
    older = published("llama")
    rope = PUBLISHED["llama"]["rope_scaling"] | {"rope_theta": 500000.0}
    fields = without("llama", "rope_scaling", "rope_theta", "torch_dtype")
    newer = describe("llama", fields | {"rope_parameters": rope, "dtype": "bfloat16"})
    assert newer == older
    assert older.layers[0].rope == Rope(
        width=8,
        theta=500000.0,
        scaling=Llama3Scaling(
            factor=32.0,
            low_frequency_factor=1.0,
            high_frequency_factor=4.0,
            original_context_tokens=16,
        ),
    )


def test_yarn_is_read_in_both_layouts():
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    older = published("qwen2", rope_scaling=scaling)
    assert older == published("qwen2", rope_scaling=scaling | {"finetuned": True})
    rope = scaling | {"rope_type": "yarn", "rope_theta": 1000000.0}
    del rope["type"]
    assert describe("qwen2", without("qwen2", "rope_theta") | {"rope_parameters": rope}) == older
    assert older.layers[0].rope == Rope(
        width=8,
        theta=1000000.0,
        scaling=YarnScaling(
            factor=4.0,
            fast_turns=32.0,
            slow_turns=1.0,
            original_context_tokens=16,
            attention_factor=0.1 * math.log(4.0) + 1,
            is_truncated=True,
        ),
    )
    written = families.get("qwen2").config(older)
    assert families.get("qwen2").describe(Config(written, origin="ours")) == older


@pytest.mark.toolchain
@pytest.mark.parametrize(
    "fields",
    [
        {}, {"factor": 1.0}, {"attention_factor": 0.9}, {"attention_factor": None},
        {"mscale": 0.7, "mscale_all_dim": 1.3}, {"mscale": 0.7}, {"beta_fast": 8, "beta_slow": 2},
        {"truncate": False}, {"original_max_position_embeddings": 4096}, {"factor": 40},
    ],
    ids=str,
)  # fmt: skip
def test_yarn_turns_as_in_transformers(fields):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    asked = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
             "original_max_position_embeddings": 256} | fields  # fmt: skip
    config = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=1, max_position_embeddings=1024,
        rope_parameters=dict(asked),
    )  # fmt: skip
    expected, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](config, device="cpu")
    rope = _rope.read_fields(
        Config(asked, origin="config.json"), width=64, theta=1e4, context_tokens=1024
    )
    found = [1 / (by * 1e4 ** (2 * i / 64)) for i, by in enumerate(rope.divisors(1))]
    assert found == pytest.approx(expected.tolist(), rel=1e-5)
    assert rope.attention_factor == pytest.approx(attention_factor)


def test_a_dynamic_rope_is_a_plain_one_as_far_as_the_context_goes():
    scaling = {"type": "dynamic", "factor": 4.0}
    assert published("qwen2", rope_scaling=scaling) == published("qwen2")
    with pytest.raises(UsageError, match="factor"):
        published("qwen2", rope_scaling={"type": "dynamic"})


def test_yarn_in_a_phi3_is_refused_since_transformers_takes_it_for_longrope():
    scaling = {"type": "yarn", "factor": 4.0}
    with pytest.raises(UsageError, match="without long_factor"):
        published("phi3", rope_scaling=scaling)


def test_a_rope_nobody_implements_is_refused():
    with pytest.raises(UsageError, match="partial_rotary_factor"):
        published("llama", rope_scaling={"rope_type": "proportional", "partial_rotary_factor": 0.5})
    with pytest.raises(UsageError, match="'ntk'"):
        published("qwen2", rope_scaling={"type": "ntk", "factor": 4.0})


def test_an_incomplete_rope_says_what_it_lacks():
    with pytest.raises(UsageError, match="rope_scaling: factor = None"):
        published("llama", rope_scaling={"rope_type": "linear"})


def test_a_llama_that_turns_part_of_its_heads_is_refused():
    """transformers ignores the field for Llama; other readers do not."""
    with pytest.raises(UsageError, match="partial_rotary_factor"):
        published("llama", partial_rotary_factor=0.5)


def test_an_odd_head_width_is_refused():
    with pytest.raises(UsageError, match="rotates 7 channels"):
        published("llama", head_dim=7)


def test_head_width_comes_from_the_config_before_the_division():
    assert published("llama", head_dim=24).attention.head_dim == 24
    assert describe("llama", without("llama", "head_dim")).attention.head_dim == 8
    assert published("llama", head_dim=24).attention.softmax_scale == 24**-0.5
    with pytest.raises(UsageError, match="not a multiple of 6 heads"):
        describe("llama", without("llama", "head_dim") | {"hidden_size": 50})


def test_an_absent_number_of_kv_heads_is_what_transformers_fills_in():
    fields = without("llama", "num_key_value_heads")
    assert describe("llama", fields).attention.num_kv_heads == 6
    assert published("qwen2", num_key_value_heads=None).attention.num_kv_heads == 6
    wide = {"num_attention_heads": 16, "head_dim": 8}
    fields = without("mistral", "num_key_value_heads") | wide
    assert describe("mistral", fields).attention.num_kv_heads == 8


def test_tying_is_what_the_family_assumes_where_the_config_is_silent():
    assert published("gemma2").is_tied
    assert published("smollm3").is_tied
    assert not published("gemma2", tie_word_embeddings=False).is_tied
    assert not describe("qwen2", without("qwen2", "tie_word_embeddings")).is_tied


def test_llama_attention_bias_is_on_all_four_projections_and_qwen2_on_three():
    llama, qwen2 = published("llama", attention_bias=True), published("qwen2")
    assert "layers.0.attention_output_bias" in dict(llama.weights())
    assert "layers.0.query_bias" in dict(qwen2.weights())
    assert "layers.0.attention_output_bias" not in dict(qwen2.weights())
    assert "layers.0.query_bias" not in dict(published("llama").weights())


def test_a_mistral_window_is_on_every_layer_unless_it_is_null():
    assert {layer.window_tokens for layer in published("mistral").layers} == {16}
    none = published("mistral", sliding_window=None)
    assert {layer.window_tokens for layer in none.layers} == {None}
    absent = describe("mistral", without("mistral", "sliding_window"))
    assert {layer.window_tokens for layer in absent.layers} == {4096}


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_a_qwen_window_counts_only_with_use_sliding_window(model_type):
    unused = published(model_type, sliding_window=16, use_sliding_window=False)
    assert {layer.window_tokens for layer in unused.layers} == {None}
    used = published(model_type, sliding_window=16, use_sliding_window=True, max_window_layers=4)
    assert [layer.window_tokens for layer in used.layers] == [None] * 4 + [16] * 2


def test_layer_types_win_over_the_number_of_the_first_windowed_layer():
    kinds = ["sliding_attention", "full_attention"] * 3
    spec = published("qwen2", use_sliding_window=True, sliding_window=16, layer_types=kinds)
    assert [layer.window_tokens for layer in spec.layers] == [16, None] * 3


@pytest.mark.parametrize("model_type", ["qwen2", "smollm3", "gemma2", "gemma3_text"])
def test_a_sliding_layer_without_a_window_is_refused(model_type):
    kinds = ["sliding_attention"] * 6
    with pytest.raises(UsageError, match="no window"):
        published(model_type, layer_types=kinds, sliding_window=None)


def test_layer_types_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="names 2 layers, the model has 6"):
        published("qwen2", layer_types=["full_attention"] * 2)
    with pytest.raises(UsageError, match="chunked_attention"):
        published("qwen2", layer_types=["chunked_attention"] * 6)


def test_qwen3_normalizes_queries_and_keys():
    spec = published("qwen3")
    assert spec.attention.query_key_norm == Norm(kind="rms", epsilon=1e-6)
    assert dict(spec.weights())["layers.5.key_norm"] == (16,)


def test_phi3_longrope_is_read_with_its_names_of_three_years():
    spec = published("phi3")
    assert spec.layers[0].rope == Rope(
        width=8,
        theta=10000.0,
        scaling=LongRopeScaling(
            short_factors=(1.0, 1.0, 1.1, 1.2),
            long_factors=(1.5, 2.0, 4.0, 8.0),
            original_context_tokens=16,
            attention_factor=math.sqrt(1 + math.log(4) / math.log(16)),
        ),
    )
    for older in ("su", "yarn"):
        scaling = PUBLISHED["phi3"]["rope_scaling"] | {"type": older}
        assert published("phi3", rope_scaling=scaling) == spec
    fields = without("phi3", "rope_scaling", "rope_theta")
    rope = PUBLISHED["phi3"]["rope_scaling"] | {"rope_type": "longrope", "rope_theta": 10000.0}
    rope |= {"partial_rotary_factor": 1.0, "original_max_position_embeddings": 16}
    assert describe("phi3", fields | {"rope_parameters": rope}) == spec


def test_phi3_longrope_needs_a_factor_for_each_frequency():
    scaling = PUBLISHED["phi3"]["rope_scaling"] | {"long_factor": [1.0, 2.0]}
    with pytest.raises(UsageError, match="long_factor has 2 numbers, expected 4"):
        published("phi3", rope_scaling=scaling)


def test_phi3_takes_its_queries_keys_and_values_from_one_tensor():
    spec, source = published("phi3"), families.get("phi3").source
    name = "model.layers.1.self_attn.qkv_proj.weight"
    found = [source(f"layers.1.{role}", spec) for role in ("query", "key", "value")]
    assert {part.tensor for part in found} == {name}
    assert [(part.first_row, part.rows) for part in found] == [(0, 48), (48, 16), (64, 16)]


def test_phi4_mini_turns_part_of_its_heads():
    _, fields = CASES["phi4-mini"]
    spec = describe("phi3", fields)
    assert spec.attention.head_dim == 16
    assert spec.layers[0].rope is not None
    assert spec.layers[0].rope.width == 8


def test_gemma2_alternates_windows_starting_with_one():
    layers = published("gemma2").layers
    assert [layer.window_tokens for layer in layers] == [8, None] * 3


def test_gemma2_scales_scores_by_its_scalar_and_not_by_the_head():
    assert published("gemma2", query_pre_attn_scalar=144).attention.softmax_scale == 1 / 12
    fields = without("gemma2", "query_pre_attn_scalar")
    assert describe("gemma2", fields).attention.softmax_scale == 1 / 16


def test_gemma2_caps_unless_the_config_says_null():
    absent = without("gemma2", "attn_logit_softcapping", "final_logit_softcapping")
    spec = describe("gemma2", absent)
    assert (spec.attention.attn_logit_softcap, spec.final_logit_softcap) == (50.0, 30.0)
    null = published("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None)
    assert (null.attention.attn_logit_softcap, null.final_logit_softcap) == (None, None)


def test_gemma_reads_hidden_activation_and_not_hidden_act():
    assert published("gemma2", hidden_act="silu").activation == "gelu_tanh"
    with pytest.raises(UsageError, match="hidden_activation = 'silu'"):
        published("gemma2", hidden_activation="silu")


def test_gemma_that_looks_ahead_is_refused():
    with pytest.raises(UsageError, match="use_bidirectional_attention"):
        published("gemma3_text", use_bidirectional_attention=True)


def test_gemma3_turns_slowly_where_it_sees_everything():
    layers = published("gemma3_text").layers
    assert [layer.window_tokens for layer in layers] == [8] * 5 + [None]
    assert [layer.rope.theta for layer in layers if layer.rope] == [1e4] * 5 + [1e6]


def test_gemma3_scales_only_the_rope_of_its_full_layers():
    layers = describe(*CASES["gemma3-4b"]).layers
    scalings = [layer.rope.scaling for layer in layers if layer.rope]
    assert scalings == [None] * 5 + [LinearScaling(factor=8.0)]


def test_gemma3_names_its_pattern_in_four_ways():
    fields = without("gemma3_text", "sliding_window_pattern")
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    spellings = [
        fields | {"sliding_window_pattern": 3},
        fields | {"_sliding_window_pattern": 3},
        fields | {"layer_types": kinds},
        fields | {"layer_types": kinds, "_sliding_window_pattern": 6},
    ]
    found = {describe("gemma3_text", spelling) for spelling in spellings}
    assert len(found) == 1
    assert [layer.window_tokens for layer in found.pop().layers] == [8, 8, None] * 2


def test_stablelm_12b_keeps_one_norm_for_each_head():
    spec = published("stablelm")
    source = families.get("stablelm").source("layers.2.key_norm", spec)
    assert source.tensors == tuple(
        f"model.layers.2.self_attn.k_layernorm.norms.{head}.weight" for head in range(2)
    )
    assert dict(spec.weights())["layers.2.query_norm"] == (6, 8)
    assert "layers.2.mlp_norm" not in dict(spec.weights())


def test_stablelm_turns_a_quarter_of_each_head_where_the_config_is_silent():
    spec = describe("stablelm", without("stablelm", "partial_rotary_factor"))
    assert spec.layers[0].rope is not None
    assert spec.layers[0].rope.width == 2


def test_smollm3_leaves_positions_out_of_every_fourth_layer():
    listed = published("smollm3")
    assert [layer.rope is None for layer in listed.layers] == [False] * 3 + [True] + [False] * 2
    counted = describe("smollm3", without("smollm3", "no_rope_layers"))
    assert counted == listed
    other = describe(
        "smollm3", without("smollm3", "no_rope_layers") | {"no_rope_layer_interval": 2}
    )
    assert [layer.rope is None for layer in other.layers] == [False, True] * 3


def test_smollm3_with_too_few_layers_listed_is_refused():
    with pytest.raises(UsageError, match="no_rope_layers"):
        published("smollm3", no_rope_layers=[1, 0])


def test_longrope_takes_the_long_factors_when_the_text_outgrows_the_original_context():
    rope = published("phi3").layers[0].rope
    assert rope is not None
    assert rope.divisors(16) == (1.0, 1.0, 1.1, 1.2)
    assert rope.divisors(17) == (1.5, 2.0, 4.0, 8.0)


def test_llama3_divides_slow_frequencies_keeps_fast_ones_and_blends_between():
    rope = published("llama").layers[0].rope
    assert rope is not None
    fast, *_, slow = rope.divisors(1)
    assert slow == pytest.approx(32.0)
    assert 1 < fast < 32  # a full turn takes 6.28 tokens, between 16 / 4 and 16 / 1


def in_version_4(fields):
    """Return a config of transformers 5 as version 4 would have written it."""
    fields = copy.deepcopy(fields)
    fields["torch_dtype"] = fields.pop("dtype")
    rope = fields.pop("rope_parameters")
    if fields["model_type"] == "gemma3_text":
        fields["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        fields["sliding_window_pattern"] = 6
        del fields["layer_types"]
    rope = rope.get("full_attention", rope)
    fields["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        fields["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    scaling = rope if rope["rope_type"] != "default" else None
    if scaling and "long_factor" in scaling:
        scaling["type"] = scaling.pop("rope_type")
        del scaling["original_max_position_embeddings"]
    return fields | {"rope_scaling": scaling}


@pytest.mark.toolchain
@pytest.mark.parametrize(
    "name", [name for name, case in TINY.items() if case.model_type not in NEW_IN_VERSION_5]
)
def test_configs_of_both_versions_describe_one_decoder(name, tmp_path):
    from transformers import AutoConfig

    newer = json.loads((write_tiny_checkpoint(tmp_path, name) / "config.json").read_text())
    older = in_version_4(newer)
    model_type = newer["model_type"]
    assert describe(model_type, older) == describe(model_type, newer)

    (tmp_path / "config.json").write_text(json.dumps(older))
    understood = AutoConfig.from_pretrained(tmp_path).to_dict()["rope_parameters"]
    understood.pop("type", None)  # the older name of rope_type stays next to the newer one
    assert understood == newer["rope_parameters"]


@pytest.mark.toolchain
@pytest.mark.parametrize("name", TINY)
def test_transformers_reads_the_configs_that_families_write(name, tmp_path):
    """So a GGUF file becomes a checkpoint that other tools open."""
    from transformers import AutoConfig, AutoModelForCausalLM

    saved = json.loads((write_tiny_checkpoint(tmp_path, name) / "config.json").read_text())
    model_type = saved["model_type"]
    spec = describe(model_type, saved)
    (tmp_path / "config.json").write_text(json.dumps(families.get(model_type).config(spec)))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    expected = [math.prod(shape) for _, shape in spec.weights()]
    kept = ("layer_scalar", "expert_bias")
    scales = [it for name, it in model.named_buffers() if name.endswith(kept)]
    assert sum(it.numel() for it in [*model.parameters(), *scales]) == sum(expected)
    read_back = json.loads(model.config.to_json_string())
    assert describe(model_type, read_back) == spec


# What has to be said: else there were Mamba and experts, or heads as wide as nothing else.
SAID: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {
        "layer_types": ["full_attention"] * 6, "num_local_experts": 0, "mamba_n_heads": 1,
        "shared_intermediate_size": 80,
    },
    "helium": {"hidden_size": 2560, "num_attention_heads": 20, "head_dim": 128},
}  # fmt: skip


@pytest.mark.toolchain
@pytest.mark.parametrize("model_type", families.names())
def test_where_a_config_is_silent_it_is_as_transformers_fills_it_in(model_type):
    from transformers import AutoConfig

    # Heads are a multiple of every default number of kv heads.
    sizes = SIZES | {"hidden_size": 1280, "num_attention_heads": 160, "head_dim": 8}
    said = sizes | SAID.get(model_type, {})
    del said["num_key_value_heads"]
    filled = AutoConfig.for_model(model_type, **copy.deepcopy(said)).to_dict()
    full = json.loads(json.dumps(filled, default=str))
    silent = describe(model_type, said)
    assert describe(model_type, full) == silent
    del said["head_dim"]
    filled = AutoConfig.for_model(model_type, **copy.deepcopy(said)).to_dict()
    full = json.loads(json.dumps(filled, default=str))
    assert describe(model_type, full) == describe(model_type, said)
