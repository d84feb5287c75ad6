"""What MLC calls the weights of a decoder: which are one tensor there, and in which order.

Source: mlc_llm/model/*/*_loader.py of mlc-llm 79d603f085.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.encodings.files import is_file
from edgekit.encodings.json_files import read_object
from edgekit.errors import UsageError
from edgekit.formats.mlc.decoders import MODELS, model_type
from edgekit.model.shapes import Shape


if TYPE_CHECKING:
    from edgekit.model.checkpoint_protocol import CheckpointProtocol
    from edgekit.model.spec import DecoderSpec


# What transformers calls the weights of a decoder, on which both names and order of MLC's depend.
_OUTER = {
    "token_embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "final_norm_bias": "model.norm.bias",
    "output_head": "lm_head.weight",
}
_LAYER = {
    "attention_norm": "input_layernorm.weight",
    "attention_norm_bias": "input_layernorm.bias",
    "query": "self_attn.q_proj.weight",
    "key": "self_attn.k_proj.weight",
    "value": "self_attn.v_proj.weight",
    "attention_output": "self_attn.o_proj.weight",
    "query_bias": "self_attn.q_proj.bias",
    "key_bias": "self_attn.k_proj.bias",
    "value_bias": "self_attn.v_proj.bias",
    "attention_output_bias": "self_attn.o_proj.bias",
    "query_norm": "self_attn.q_norm.weight",
    "key_norm": "self_attn.k_norm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "mlp_norm_bias": "post_attention_layernorm.bias",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
_POST_NORMS = {
    "attention_post_norm": "post_attention_layernorm.weight",
    "mlp_post_norm": "post_feedforward_layernorm.weight",
}
_GEMMA = _POST_NORMS | {"mlp_norm": "pre_feedforward_layernorm.weight"}


def _ungated(up: str, down: str) -> dict[str, str]:
    """Return the names of an MLP without a gate, which has biases."""
    return {
        f"{part}{ending}": f"{module}.{kind}"
        for part, module in (("up", up), ("down", down))
        for ending, kind in (("", "weight"), ("_bias", "bias"))
    }


_PHI3 = {
    **dict.fromkeys(("query", "key", "value"), "self_attn.qkv_proj.weight"),
    **dict.fromkeys(("gate", "up"), "mlp.gate_up_proj.weight"),
}
_OTHERWISE: dict[str, dict[str, str]] = {
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "olmo2": _POST_NORMS,
    "phi": _ungated("mlp.fc1", "mlp.fc2")
    | {
        "attention_output": "self_attn.dense.weight",
        "attention_output_bias": "self_attn.dense.bias",
    },
    "phi3": _PHI3,
    "qwen3_5_text": {
        "delta_qkv": "linear_attn.in_proj_qkv.weight",
        "delta_gate": "linear_attn.in_proj_z.weight",
        "delta_beta": "linear_attn.in_proj_b.weight",
        "delta_alpha": "linear_attn.in_proj_a.weight",
        "delta_taps": "linear_attn.conv1d.weight",
        "delta_decay": "linear_attn.A_log",
        "delta_decay_bias": "linear_attn.dt_bias",
        "delta_norm": "linear_attn.norm.weight",
        "delta_output": "linear_attn.out_proj.weight",
    },
    "starcoder2": _ungated("mlp.c_fc", "mlp.c_proj"),
}
_OTHERWISE_OUTER = {
    "phi": {
        "final_norm": "model.final_layernorm.weight",
        "final_norm_bias": "model.final_layernorm.bias",
        "output_head_bias": "lm_head.bias",
    }
}

# Queries, keys and values are one tensor of this name; in a family that is absent they are three,
# or one already.
_QUERY_KEY_VALUE = {
    **dict.fromkeys(
        ("llama", "mistral", "stablelm", "gemma", "gemma2", "olmo2", "nemotron", "cohere"),
        "qkv_proj",
    ),
    **dict.fromkeys(("qwen2", "qwen3", "qwen3_5_text"), "c_attn"),
    "phi": "Wqkv",
    "starcoder2": "wqkv_pack",
}
_SEPARATE_GATE = frozenset({"cohere", "nemotron"})  # from what the MLP multiplies it with, or none
_PREFIX = {"gemma3_text": "language_model."}
_PHI_MODULES = (
    ("model.embed_tokens", "transformer.embd"),
    ("model.layers", "transformer.h"),
    ("input_layernorm", "ln"),
)
_MODULES = {
    "cohere": (("self_attn.o_proj", "self_attn.out_proj"),),
    "phi": (
        *_PHI_MODULES,
        ("self_attn.dense", "mixer.out_proj"),
        ("self_attn.Wqkv", "mixer.Wqkv"),
        ("lm_head", "lm_head.linear"),
        ("model.final_layernorm", "lm_head.ln"),
    ),
    "phi3": (
        *_PHI_MODULES,
        ("model.norm", "transformer.norm"),
        ("self_attn.o_proj", "mixer.out_proj"),
        ("self_attn.qkv_proj", "mixer.qkv_proj"),
    ),
    "qwen3_5_text": (("conv1d.weight", "conv1d_weight"),),
}
_HEAD = "lm_head.weight"


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One tensor of MLC's model: the rows of one weight, or of several after each other."""

    name: str  # "model.layers.0.self_attn.qkv_proj.weight"
    roles: tuple[str, ...]
    rows: tuple[int, ...]  # of each role
    columns: int | None  # None: a vector
    is_depthwise: bool = False  # taps by channel, with an axis of one input channel between

    @property
    def shape(self) -> Shape:
        """Its dimensions before it is packed."""
        rows, *columns = self.part_shape(sum(self.rows))
        return (rows, 1, *columns) if self.is_depthwise else (rows, *columns)

    def part_shape(self, rows: int) -> Shape:
        """Return the dimensions of a weight that is so many rows of it."""
        return (rows,) if self.columns is None else (rows, self.columns)

    @property
    def is_matrix(self) -> bool:
        """Whether a scheme may quantize it."""
        return self.columns is not None and not self.is_depthwise

    @property
    def is_embedding(self) -> bool:
        """Whether it is looked up by row, which no scheme transposes."""
        return self.roles == ("token_embedding",) and not self.is_copy

    @property
    def is_copy(self) -> bool:
        """Whether it is the embedding once more, for the output head."""
        return self.roles == ("token_embedding",) and self.name == _HEAD

    def parts(self) -> Iterator[tuple[str, int, int]]:
        """Yield each role with its first row here and how many it has."""
        first = 0
        for role, rows in zip(self.roles, self.rows, strict=True):
            yield role, first, rows
            first += rows


def parameters(architecture: str, spec: "DecoderSpec") -> dict[str, Parameter]:
    """Return what MLC's model is made of, by name, in the decoder's own order."""
    roles: dict[str, list[tuple[str, Shape]]] = {}
    for role, shape in spec.weights():
        tensor = _tensor(architecture, role)
        for name in _mlc_names(architecture, tensor, is_tied=spec.is_tied):
            roles.setdefault(name, []).append((role, shape))
    return {name: _parameter(name, weights) for name, weights in roles.items()}


def _tensor(architecture: str, role: str) -> str:
    """Return the tensor that a weight is, or is a part of, in a checkpoint of transformers.

    Raises:
        UsageError: If MLC's model of this type has no such weight.
    """
    layer, _, part = role.rpartition(".")
    known, otherwise = (_LAYER, _OTHERWISE) if layer else (_OUTER, _OTHERWISE_OUTER)
    known = known | otherwise.get(architecture, {})
    if part not in known:
        raise UsageError(f"MLC's {architecture} model has no {part.replace('_', ' ')}")
    return f"model.{layer}.{known[part]}" if layer else known[part]


def _parameter(name: str, weights: list[tuple[str, Shape]]) -> Parameter:
    role, shape = weights[0]
    return Parameter(
        name=name,
        roles=tuple(role for role, _ in weights),
        rows=tuple(shape[0] for _, shape in weights),
        columns=shape[1] if shape[1:] else None,
        is_depthwise=role.endswith(".delta_taps"),
    )


def _mlc_names(architecture: str, tensor: str, *, is_tied: bool) -> list[str]:
    """Return the parameters that a tensor of the checkpoint becomes, or becomes part of."""
    is_head = is_tied and tensor == _OUTER["token_embedding"] and MODELS[architecture].copies_head
    return [*[_HEAD] * is_head, _mlc_name(architecture, tensor)]


def _mlc_name(architecture: str, tensor: str) -> str:
    fused = _QUERY_KEY_VALUE.get(architecture)
    if fused:
        tensor = re.sub(r"self_attn\.[qkv]_proj\.", f"self_attn.{fused}.", tensor)
    if architecture not in _SEPARATE_GATE:
        tensor = re.sub(r"mlp\.(gate|up)_proj\.", "mlp.gate_up_proj.", tensor)
    for theirs, ours in _MODULES.get(architecture, ()):
        tensor = tensor.replace(theirs, ours)
    return _PREFIX.get(architecture, "") + tensor


def in_file_order(checkpoint: "CheckpointProtocol") -> list[Parameter]:
    """Return the parameters as mlc_llm writes them: as their first tensor comes in the checkpoint.

    That is the order of its index, or of the names where it has none.
    """
    spec = checkpoint.spec
    architecture = model_type(checkpoint.architecture, spec)
    found = parameters(architecture, spec)
    tensors = {_tensor(architecture, role) for role, _ in spec.weights()}
    index = _index(checkpoint.directory / "model.safetensors.index.json")
    order = [name for name in index if name in tensors] if tensors <= index.keys() else None
    names = (
        name
        for tensor in order or sorted(tensors)
        for name in _mlc_names(architecture, tensor, is_tied=spec.is_tied)
    )
    return [found[name] for name in dict.fromkeys(names)]


def _index(path: Path) -> Mapping[str, str]:
    """Return which tensor is in which file; nothing if there is no index."""
    if not is_file(path):
        return {}
    places = read_object(path).get("weight_map")
    if not isinstance(places, dict):
        raise UsageError(f"{path} has no weight_map")
    return places
