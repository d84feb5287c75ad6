"""Models as they were published: what their config.json says, and how many numbers they are.

Written down from memory of the model cards on the Hugging Face hub, not downloaded: whole counts
are the hub's sums over the safetensors files, others are as rounded there. Where what a config
computes agrees with such a sum to the digit, that confirms both.
"""

from dataclasses import dataclass, field
from typing import Any


_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Published:
    """A model on the hub."""

    model_type: str
    parameters: str  # "1,235,814,400", or "1.24B" where that is what is said
    sizes: tuple[int, ...]  # vocabulary, hidden, MLP, layers, heads, kv heads, context
    fields: dict[str, Any] = field(default_factory=dict)
    wrapper: str | None = None  # the model_type around it

    @property
    def config(self) -> dict[str, Any]:
        """The fields of its decoder."""
        sizes = zip(_SIZES, self.sizes, strict=True)
        renamed = {_SPELLED.get((self.model_type, name), name): value for name, value in sizes}
        return {"model_type": self.model_type, **renamed, **self.fields}

    def has(self, parameters: int) -> bool:
        """Tell whether that many numbers are as many as its makers say."""
        if self.parameters[-1].isdigit():
            return parameters == int(self.parameters.replace(",", ""))
        _, _, decimals = self.parameters[:-1].partition(".")
        return f"{parameters / 1e9:.{len(decimals)}f}B" == self.parameters


_SPELLED = {("exaone", "num_hidden_layers"): "num_layers"}
_TIED, _UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
_THETA_1M, _THETA_500K = {"rope_theta": 1_000_000.0}, {"rope_theta": 500_000.0}


def _llama3(factor: float, original: int = 8192) -> dict[str, Any]:
    return {"rope_scaling": {
        "factor": factor, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": original, "rope_type": "llama3",
    }}  # fmt: skip


def _mup(embedding: float, attention: float, residual: float, logits: float) -> dict[str, Any]:
    return {
        "embedding_multiplier": embedding, "attention_multiplier": attention,
        "residual_multiplier": residual, "logits_scaling": logits,
    }  # fmt: skip


def _granite4(layers: int, width: int, *, attention: float, **more: Any) -> dict[str, Any]:
    return _TIED | _mup(12, attention, 0.22, 10) | {
        "init_method": "mup", "layer_types": ["attention"] * layers, "mamba_chunk_size": 256,
        "mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_state": 256, "mamba_expand": 2,
        "mamba_n_groups": 1, "normalization_function": "rmsnorm", "num_experts_per_tok": 0,
        "num_local_experts": 0, "position_embedding_type": "rope", "rms_norm_eps": 1e-05,
        "rope_theta": 10_000_000, "router_aux_loss_coef": 0.01, "shared_intermediate_size": width,
        **more,
    }  # fmt: skip


_LFM2 = {"block_auto_adjust_ff_dim": True, "conv_L_cache": 3, "norm_eps": 1e-05, "theta": 1e6}
_SIX_ATTEND = [2, 5, 8, 10, 12, 14]
_QWEN3_5 = {
    "full_attention_interval": 4, "head_dim": 256, "linear_key_head_dim": 128,
    "linear_num_key_heads": 16, "linear_value_head_dim": 128,
}  # fmt: skip
_GEMMA = {"head_dim": 256, "rms_norm_eps": 1e-06, "query_pre_attn_scalar": 256}
_TANH = {"hidden_activation": "gelu_pytorch_tanh"}
_GEMMA3 = _GEMMA | _TANH | {
    "rope_local_base_freq": 10_000, "rope_theta": 1_000_000, "sliding_window": 512,
    "sliding_window_pattern": 6,
}  # fmt: skip
_HUNYUAN = _TIED | {
    "add_classification_head": False, "attention_bias": False, "attention_head_dim": 128,
    "cla_share_factor": 2, "class_num": 0, "head_dim": 128, "im_end_id": 5, "im_newline_id": 11,
    "im_start_id": 4, "mask_init_id": 12, "mlp_bias": False, "norm_type": "rms",
    "pool_type": "last", "text_end_id": 7, "text_start_id": 6, "use_rotary_pos_emb": True,
    "rope_scaling": {"alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0,
                     "mscale_all_dim": 1.0, "type": "dynamic"},
    "use_cla": False, "use_qk_norm": True,
}  # fmt: skip
_QWEN2 = {"max_window_layers": 28, "sliding_window": 32_768, "use_sliding_window": False}
_EXAONE = {"activation_function": "silu", "embed_dropout": 0.0, "layer_norm_epsilon": 1e-05}
_STARCODER2 = {
    "activation_function": "gelu", "attention_softmax_in_fp32": True, "layer_norm_epsilon": 1e-05,
    "mlp_type": "default", "norm_type": "layer_norm", "rope_theta": 1_000_000,
    "scale_attention_softmax_in_fp32": True, "scale_attn_weights": True, "sliding_window": 4096,
    "use_bias": True,
}  # fmt: skip
_MINISTRAL3_ROPE = {
    "beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0, "llama_4_scaling_beta": 0.1, "mscale": 1.0,
    "mscale_all_dim": 1.0, "original_max_position_embeddings": 16_384, "rope_theta": 1_000_000.0,
    "rope_type": "yarn", "type": "yarn",
}  # fmt: skip

PUBLISHED: dict[str, Published] = {
    "meta-llama/Llama-3.2-1B": Published(
        model_type="llama",
        parameters="1,235,814,400",
        sizes=(128256, 2048, 8192, 16, 32, 8, 131072),
        fields=_TIED | _THETA_500K | _llama3(32.0) | {"head_dim": 64},
    ),
    "meta-llama/Llama-3.2-3B": Published(
        model_type="llama",
        parameters="3,212,749,824",
        sizes=(128256, 3072, 8192, 28, 24, 8, 131072),
        fields=_TIED | _THETA_500K | _llama3(32.0) | {"head_dim": 128},
    ),
    "meta-llama/Llama-3.1-8B": Published(
        model_type="llama",
        parameters="8,030,261,248",
        sizes=(128256, 4096, 14336, 32, 32, 8, 131072),
        fields=_UNTIED | _THETA_500K | _llama3(8.0),
    ),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": Published(
        model_type="llama",
        parameters="1,100,048,384",
        sizes=(32000, 2048, 5632, 22, 32, 4, 2048),
        fields=_UNTIED,
    ),
    "HuggingFaceTB/SmolLM2-135M": Published(
        model_type="llama",
        parameters="134,515,008",
        sizes=(49152, 576, 1536, 30, 9, 3, 8192),
        fields=_TIED | {"rope_interleaved": False, "rope_theta": 100_000},
    ),
    "HuggingFaceTB/SmolLM2-360M": Published(
        model_type="llama",
        parameters="361,821,120",
        sizes=(49152, 960, 2560, 32, 15, 5, 8192),
        fields=_TIED | {"rope_interleaved": False, "rope_theta": 100_000},
    ),
    "HuggingFaceTB/SmolLM2-1.7B": Published(
        model_type="llama",
        parameters="1,711,376,384",
        sizes=(49152, 2048, 8192, 24, 32, 32, 8192),
        fields=_TIED | {"rope_theta": 130_000},
    ),
    "01-ai/Yi-6B": Published(
        model_type="llama",
        parameters="6,061,035,520",
        sizes=(64000, 4096, 11008, 32, 32, 4, 4096),
        fields=_UNTIED | {"rope_theta": 5_000_000.0},
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": Published(
        model_type="llama",
        parameters="8,030,261,248",
        sizes=(128256, 4096, 14336, 32, 32, 8, 131072),
        fields=_UNTIED | _THETA_500K | _llama3(8.0),
    ),
    "tiiuae/Falcon3-1B-Instruct": Published(
        model_type="llama",
        parameters="1,669,408,768",
        sizes=(131072, 2048, 8192, 18, 8, 4, 8192),
        fields=_UNTIED | {"head_dim": 256, "rope_theta": 1_000_042},
    ),
    "tiiuae/Falcon3-3B-Instruct": Published(
        model_type="llama",
        parameters="3,227,655,168",
        sizes=(131072, 3072, 9216, 22, 12, 4, 32768),
        fields=_UNTIED | {"head_dim": 256, "rope_theta": 1_000_042},
    ),
    "tiiuae/Falcon3-7B-Instruct": Published(
        model_type="llama",
        parameters="7,455,550,464",
        sizes=(131072, 3072, 23040, 28, 12, 4, 32768),
        fields=_UNTIED | {"head_dim": 256, "rope_theta": 1_000_042},
    ),
    "mistralai/Mistral-7B-v0.1": Published(
        model_type="mistral",
        parameters="7,241,732,096",
        sizes=(32000, 4096, 14336, 32, 32, 8, 32768),
        fields=_UNTIED | {"sliding_window": 4096},
    ),
    "mistralai/Mistral-7B-Instruct-v0.3": Published(
        model_type="mistral",
        parameters="7,248,023,552",
        sizes=(32768, 4096, 14336, 32, 32, 8, 32768),
        fields=_UNTIED | _THETA_1M | {"sliding_window": None},
    ),
    "mistralai/Ministral-8B-Instruct-2410": Published(
        model_type="mistral",
        parameters="8,019,808,256",
        sizes=(131072, 4096, 12288, 36, 32, 8, 32768),
        fields=_UNTIED | {"head_dim": 128, "rope_theta": 100_000_000.0, "sliding_window": 32_768},
    ),
    "Qwen/Qwen2.5-0.5B": Published(
        model_type="qwen2",
        parameters="494,032,768",
        sizes=(151936, 896, 4864, 24, 14, 2, 32768),
        fields=_TIED | _THETA_1M | _QWEN2,
    ),
    "Qwen/Qwen2.5-1.5B": Published(
        model_type="qwen2",
        parameters="1,543,714,304",
        sizes=(151936, 1536, 8960, 28, 12, 2, 131072),
        fields=_TIED | _THETA_1M | _QWEN2,
    ),
    "Qwen/Qwen2.5-7B": Published(
        model_type="qwen2",
        parameters="7,615,616,512",
        sizes=(152064, 3584, 18944, 28, 28, 4, 131072),
        fields=_UNTIED | _THETA_1M | _QWEN2,
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": Published(
        model_type="qwen2",
        parameters="1,777,088,000",
        sizes=(151936, 1536, 8960, 28, 12, 2, 131072),
        fields=_UNTIED | _QWEN2 | {"rope_theta": 10_000},
    ),
    "Qwen/Qwen3-0.6B": Published(
        model_type="qwen3",
        parameters="596,049,920",
        sizes=(151936, 1024, 3072, 28, 16, 8, 40960),
        fields=_TIED | _THETA_1M | {"head_dim": 128},
    ),
    "Qwen/Qwen3-1.7B": Published(
        model_type="qwen3",
        parameters="1,720,574,976",
        sizes=(151936, 2048, 6144, 28, 16, 8, 40960),
        fields=_TIED | _THETA_1M | {"head_dim": 128},
    ),
    "Qwen/Qwen3-4B": Published(
        model_type="qwen3",
        parameters="4,022,468,096",
        sizes=(151936, 2560, 9728, 36, 32, 8, 40960),
        fields=_TIED | _THETA_1M | {"head_dim": 128},
    ),
    "microsoft/Phi-3-mini-4k-instruct": Published(
        model_type="phi3",
        parameters="3,821,079,552",
        sizes=(32064, 3072, 8192, 32, 32, 32, 4096),
        fields=_UNTIED | {"original_max_position_embeddings": 4096, "sliding_window": 2047},
    ),
    "google/gemma-2b": Published(
        model_type="gemma",
        parameters="2,506,172,416",
        sizes=(256000, 2048, 16384, 18, 8, 1, 8192),
        fields={"head_dim": 256, "hidden_act": "gelu", "rope_theta": 10_000.0},
    ),
    "google/gemma-7b": Published(
        model_type="gemma",
        parameters="8,537,680,896",
        sizes=(256000, 3072, 24576, 28, 16, 16, 8192),
        fields={"head_dim": 256, "hidden_act": "gelu", "hidden_activation": None},
    ),
    "google/gemma-2-2b": Published(
        model_type="gemma2",
        parameters="2,614,341,888",
        sizes=(256000, 2304, 9216, 26, 8, 4, 8192),
        fields=_GEMMA | _TANH | {"sliding_window": 4096},
    ),
    "google/gemma-3-270m": Published(
        model_type="gemma3_text",
        parameters="268,098,176",
        sizes=(262144, 640, 2048, 18, 4, 1, 32768),
        fields=_GEMMA3,
    ),
    "google/gemma-3-1b-it": Published(
        model_type="gemma3_text",
        parameters="999,885,952",
        sizes=(262144, 1152, 6912, 26, 4, 1, 32768),
        fields=_GEMMA3,
    ),
    "google/vaultgemma-1b": Published(
        model_type="vaultgemma",
        parameters="1,038,741,120",
        sizes=(256000, 1152, 6912, 26, 4, 4, 1024),
        fields=_GEMMA | _TANH | {"sliding_window": 512},
    ),
    "stabilityai/stablelm-2-zephyr-1_6b": Published(
        model_type="stablelm",
        parameters="1,644,515,328",
        sizes=(100352, 2048, 5632, 24, 32, 32, 4096),
        fields=_UNTIED | {"partial_rotary_factor": 0.25, "use_qkv_bias": True},
    ),
    "HuggingFaceTB/SmolLM3-3B": Published(
        model_type="smollm3",
        parameters="3,075,098,624",
        sizes=(128256, 2048, 11008, 36, 16, 4, 65536),
        fields=_TIED | {"no_rope_layer_interval": 4, "rope_theta": 5_000_000.0},
    ),
    "ibm-granite/granite-3.3-2b-instruct": Published(
        model_type="granite",
        parameters="2,533,539,840",
        sizes=(49159, 2048, 8192, 40, 32, 8, 131072),
        fields=_TIED | _mup(12.0, 0.015625, 0.22, 8.0) | {"rope_theta": 10_000_000.0},
    ),
    "ibm-granite/granite-3.0-8b-instruct": Published(
        model_type="granite",
        parameters="8,170,848,256",
        sizes=(49155, 4096, 12800, 40, 32, 8, 4096),
        fields=_TIED | _mup(12.0, 0.0078125, 0.22, 16.0),
    ),
    "ibm-granite/granite-4.0-micro": Published(
        model_type="granitemoehybrid",
        parameters="3,402,836,480",
        sizes=(100352, 2560, 8192, 40, 40, 8, 131072),
        fields=_granite4(40, 8192, attention=0.015625),
    ),
    "ibm-granite/granite-4.0-350m": Published(
        model_type="granitemoehybrid",
        parameters="0.35B",
        sizes=(100352, 1024, 2048, 28, 16, 4, 32768),
        fields=_granite4(28, 2048, attention=0.015625, logits_scaling=4),
    ),
    "ibm-granite/granite-4.0-1b": Published(
        model_type="granitemoehybrid",
        parameters="1.6B",
        sizes=(100352, 2048, 4096, 40, 16, 4, 131072),
        fields=_granite4(40, 4096, attention=0.0078125, logits_scaling=8),
    ),
    "LGAI-EXAONE/EXAONE-3.0-7.8B-Instruct": Published(
        model_type="exaone",
        parameters="7,818,448,896",
        sizes=(102400, 4096, 14336, 32, 32, 8, 4096),
        fields=_UNTIED | _THETA_500K | _EXAONE,
    ),
    "LGAI-EXAONE/EXAONE-3.5-2.4B-Instruct": Published(
        model_type="exaone",
        parameters="2,405,327,360",
        sizes=(102400, 2560, 7168, 30, 32, 8, 32768),
        fields=_TIED | _THETA_1M | _EXAONE | _llama3(8.0) | {"head_dim": 80},
    ),
    "LGAI-EXAONE/EXAONE-4.0-1.2B": Published(
        model_type="exaone4",
        parameters="1,279,391,488",
        sizes=(102400, 2048, 4096, 30, 32, 8, 65536),
        fields=_TIED
        | _THETA_1M
        | _llama3(16.0)
        | {"head_dim": 64, "sliding_window": None, "sliding_window_pattern": None},
    ),
    "LGAI-EXAONE/EXAONE-4.0-32B": Published(
        model_type="exaone4",
        parameters="32,003,216,384",
        sizes=(102400, 5120, 27392, 64, 40, 8, 131072),
        fields=_UNTIED
        | _THETA_1M
        | _llama3(16.0)
        | {"head_dim": 128, "sliding_window": 4096, "sliding_window_pattern": "LLLG"},
    ),
    "allenai/OLMo-2-0425-1B": Published(
        model_type="olmo2",
        parameters="1,484,916,736",
        sizes=(100352, 2048, 8192, 16, 16, 16, 4096),
        fields=_UNTIED | _THETA_500K | {"rms_norm_eps": 1e-06},
    ),
    "allenai/OLMo-2-1124-7B": Published(
        model_type="olmo2",
        parameters="7,298,617,344",
        sizes=(100352, 4096, 11008, 32, 32, 32, 4096),
        fields=_UNTIED | _THETA_500K | {"rms_norm_eps": 1e-06},
    ),
    "allenai/Olmo-3-7B-Instruct": Published(
        model_type="olmo3",
        parameters="7,298,011,136",
        sizes=(100278, 4096, 11008, 32, 32, 32, 65536),
        fields=_UNTIED
        | _THETA_500K
        | {
            "sliding_window": 4096,
            "rope_scaling": {
                "attention_factor": 1.2079441541679836,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 8.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "yarn",
            },
        },
    ),
    "tencent/Hunyuan-1.8B-Instruct": Published(
        model_type="hunyuan_v1_dense",
        parameters="1,791,080,448",
        sizes=(120818, 2048, 6144, 32, 16, 4, 262144),
        fields=_HUNYUAN,
    ),
    "baidu/ERNIE-4.5-0.3B-PT": Published(
        model_type="ernie4_5",
        parameters="360,748,032",
        sizes=(103424, 1024, 3072, 18, 16, 2, 131072),
        fields=_TIED | _THETA_500K | {"head_dim": 128, "use_bias": False},
    ),
    "zai-org/glm-4-9b-chat-hf": Published(
        model_type="glm",
        parameters="9,399,951,360",
        sizes=(151552, 4096, 13696, 40, 32, 2, 131072),
        fields=_UNTIED | {"attention_bias": True, "head_dim": 128, "partial_rotary_factor": 0.5},
    ),
    "zai-org/GLM-4-9B-0414": Published(
        model_type="glm4",
        parameters="9,400,279,040",
        sizes=(151552, 4096, 13696, 40, 32, 2, 32768),
        fields=_UNTIED | {"attention_bias": True, "head_dim": 128, "partial_rotary_factor": 0.5},
    ),
    "CohereLabs/aya-23-8B": Published(
        model_type="cohere",
        parameters="8,028,033,024",
        sizes=(256000, 4096, 14336, 32, 32, 8, 8192),
        fields={"logit_scale": 0.0625, "rope_theta": 10_000, "use_qk_norm": False},
    ),
    "CohereLabs/c4ai-command-r7b-12-2024": Published(
        model_type="cohere2",
        parameters="8,028,033,024",
        sizes=(256000, 4096, 14336, 32, 32, 8, 132096),
        fields={
            "head_dim": 128,
            "layer_switch": 4,
            "logit_scale": 0.25,
            "order_of_interleaved_layers": "local_attn_first",
            "position_embedding_type": "rope_gptj",
            "rope_theta": 50_000,
            "rotary_pct": 1.0,
            "sliding_window": 4096,
            "use_parallel_block": True,
        },
    ),
    "microsoft/phi-1_5": Published(
        model_type="phi",
        parameters="1,418,270,720",
        sizes=(51200, 2048, 8192, 24, 32, 32, 2048),
        fields=_UNTIED
        | {"hidden_act": "gelu_new", "partial_rotary_factor": 0.5, "qk_layernorm": False},
    ),
    "microsoft/phi-2": Published(
        model_type="phi",
        parameters="2,779,683,840",
        sizes=(51200, 2560, 10240, 32, 32, 32, 2048),
        fields=_UNTIED
        | {"hidden_act": "gelu_new", "partial_rotary_factor": 0.4, "qk_layernorm": False},
    ),
    "bigcode/starcoder2-3b": Published(
        model_type="starcoder2",
        parameters="3,030,371,328",
        sizes=(49152, 3072, 12288, 30, 24, 2, 16384),
        fields=_STARCODER2,
    ),
    "bigcode/starcoder2-7b": Published(
        model_type="starcoder2",
        parameters="7,173,923,840",
        sizes=(49152, 4608, 18432, 32, 36, 4, 16384),
        fields=_STARCODER2,
    ),
    "nvidia/Nemotron-Mini-4B-Instruct": Published(
        model_type="nemotron",
        parameters="4.19B",
        sizes=(256000, 3072, 9216, 32, 24, 8, 4096),
        fields=_UNTIED
        | {"head_dim": 128, "hidden_act": "relu2", "norm_eps": 1e-05, "partial_rotary_factor": 0.5},
    ),
    "inceptionai/Jais-2-8B-Chat": Published(
        model_type="jais2",
        parameters="8B",
        sizes=(150272, 3328, 26624, 32, 26, 26, 8192),
        fields=_UNTIED | {"hidden_act": "relu2"},
    ),
    "swiss-ai/Apertus-8B-2509": Published(
        model_type="apertus",
        parameters="8,053,338,176",
        sizes=(131072, 4096, 21504, 32, 32, 8, 65536),
        fields=_UNTIED
        | _llama3(8.0)
        | {"hidden_act": "xielu", "post_norm": False, "qk_norm": True, "rope_theta": 12_000_000},
    ),
    "kyutai/helium-1-preview-2b": Published(
        model_type="helium",
        parameters="2B",
        sizes=(48000, 2560, 7040, 24, 20, 20, 4096),
        fields=_UNTIED | {"head_dim": 128, "rms_norm_eps": 1e-08},
    ),
    "mistralai/Ministral-3-3B-Instruct-2512-BF16": Published(
        model_type="ministral3",
        parameters="3.4B",
        sizes=(131072, 3072, 9216, 26, 32, 8, 262144),
        fields=_TIED
        | {"head_dim": 128, "rope_parameters": _MINISTRAL3_ROPE, "sliding_window": None},
        wrapper="mistral3",
    ),
    "internlm/internlm3-8b-instruct": Published(
        model_type="internlm3",
        parameters="8,804,241,408",
        sizes=(128512, 4096, 10240, 48, 32, 2, 32768),
        fields=_UNTIED
        | {
            "bias": False,
            "head_dim": 128,
            "qkv_bias": False,
            "rope_scaling": {"factor": 6.0, "rope_type": "dynamic"},
            "rope_theta": 50_000_000,
        },
    ),
    "ByteDance-Seed/Seed-OSS-36B-Instruct": Published(
        model_type="seed_oss",
        parameters="36,151,104,512",
        sizes=(155136, 5120, 27648, 64, 80, 8, 524288),
        fields=_UNTIED
        | {
            "attention_bias": True,
            "attention_out_bias": False,
            "head_dim": 128,
            "residual_dropout": 0.1,
        },
    ),
    "naver-hyperclovax/HyperCLOVAX-SEED-Think-14B": Published(
        model_type="hyperclovax",
        parameters="14,748,112,896",
        sizes=(110592, 6144, 14336, 38, 48, 8, 131072),
        fields=_UNTIED | {"head_dim": 128, "rope_theta": 100_000_000, "use_post_norm": True},
    ),
    "LiquidAI/LFM2-350M": Published(
        model_type="lfm2",
        parameters="354,483,968",
        sizes=(65536, 1024, 6656, 16, 16, 8, 128000),
        fields=_LFM2 | {"full_attn_idxs": _SIX_ATTEND},
    ),
    "LiquidAI/LFM2-700M": Published(
        model_type="lfm2",
        parameters="742,489,344",
        sizes=(65536, 1536, 10240, 16, 24, 8, 128000),
        fields=_LFM2 | {"full_attn_idxs": _SIX_ATTEND},
    ),
    "LiquidAI/LFM2-8B-A1B": Published(
        model_type="lfm2_moe",
        parameters="8.3B",
        sizes=(65536, 2048, 7168, 24, 32, 8, 128000),
        fields={
            "conv_L_cache": 3,
            "layer_types": [
                "full_attention" if index in {2, 6, 10, 14, 18, 21} else "conv"
                for index in range(24)
            ],
            "moe_intermediate_size": 1792,
            "norm_eps": 1e-5,
            "num_dense_layers": 2,
            "num_experts": 32,
            "num_experts_per_tok": 4,
            "rope_theta": 1_000_000.0,
            "tie_embedding": True,
        },
    ),
    "LiquidAI/LFM2.5-1.2B-Instruct": Published(
        model_type="lfm2",
        parameters="1,170,340,608",
        sizes=(65536, 2048, 12288, 16, 32, 8, 128000),
        fields=_LFM2
        | {
            "layer_types": [
                "full_attention" if index in _SIX_ATTEND else "conv" for index in range(16)
            ]
        },
    ),
    "Qwen/Qwen3.5-0.8B": Published(
        model_type="qwen3_5_text",
        parameters="0.8B",
        sizes=(248320, 1024, 3584, 24, 8, 2, 262144),
        fields=_TIED | _QWEN3_5 | {"linear_num_value_heads": 16},
        wrapper="qwen3_5",
    ),
    "Qwen/Qwen3.5-2B": Published(
        model_type="qwen3_5_text",
        parameters="2B",
        sizes=(248320, 2048, 6144, 24, 8, 2, 262144),
        fields=_TIED | _QWEN3_5 | {"linear_num_value_heads": 16},
        wrapper="qwen3_5",
    ),
    "Qwen/Qwen3.5-4B": Published(
        model_type="qwen3_5_text",
        parameters="4B",
        sizes=(248320, 2560, 9216, 32, 16, 4, 262144),
        fields=_TIED | _QWEN3_5 | {"linear_num_value_heads": 32},
        wrapper="qwen3_5",
    ),
    "google/gemma-4-31B": Published(
        model_type="gemma4_text",
        parameters="30.7B",
        sizes=(262144, 5376, 21504, 60, 32, 16, 262144),
        fields=_TIED
        | _TANH
        | {
            "attention_k_eq_v": True,
            "head_dim": 256,
            "hidden_size_per_layer_input": 0,
            "num_global_key_value_heads": 4,
            "sliding_window": 1024,
        },
        wrapper="gemma4",
    ),
}
