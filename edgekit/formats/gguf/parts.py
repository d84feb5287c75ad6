"""The parts of a GGUF file that are made from weights: llama.cpp's names, and what each holds."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from edgekit.formats.gguf import tensor_types
from edgekit.formats.gguf.architectures import Architecture
from edgekit.formats.gguf.lattices import LATTICES
from edgekit.formats.gguf.layout import TensorEntry
from edgekit.formats.gguf.value_heads import value_heads
from edgekit.model.shapes import Shape
from edgekit.model.spec import DecoderSpec
from edgekit.quant.planned import PlannedWeight
from edgekit.quant.recipe import Recipe, split_role


TENSOR_NAMES = {
    "token_embedding": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "final_norm_bias": "output_norm.bias",
    "output_head": "output.weight",
    "output_head_bias": "output.bias",
    "layer_embedding": "per_layer_token_embd.weight",
    "layer_embedding_projection": "per_layer_model_proj.weight",
    "layer_embedding_norm": "per_layer_proj_norm.weight",
}
LAYER_TENSOR_NAMES = {
    "attention_norm": "attn_norm.weight",
    "attention_norm_bias": "attn_norm.bias",
    "query": "attn_q.weight",
    "query_bias": "attn_q.bias",
    "key": "attn_k.weight",
    "key_bias": "attn_k.bias",
    "value": "attn_v.weight",
    "value_bias": "attn_v.bias",
    "query_norm": "attn_q_norm.weight",
    "key_norm": "attn_k_norm.weight",
    "attention_output": "attn_output.weight",
    "attention_output_bias": "attn_output.bias",
    "attention_post_norm": "post_attention_norm.weight",
    "mlp_norm": "ffn_norm.weight",
    "mlp_norm_bias": "ffn_norm.bias",
    "gate": "ffn_gate.weight",
    "gate_bias": "ffn_gate.bias",
    "up": "ffn_up.weight",
    "up_bias": "ffn_up.bias",
    "down": "ffn_down.weight",
    "down_bias": "ffn_down.bias",
    "router": "ffn_gate_inp.weight",
    "expert_bias": "exp_probs_b.bias",
    "expert_gate": "ffn_gate_exps.weight",
    "expert_up": "ffn_up_exps.weight",
    "expert_down": "ffn_down_exps.weight",
    "mlp_post_norm": "post_ffw_norm.weight",
    "conv_in": "shortconv.in_proj.weight",
    "conv_taps": "shortconv.conv.weight",
    "conv_output": "shortconv.out_proj.weight",
    "delta_qkv": "attn_qkv.weight",
    "delta_taps": "ssm_conv1d.weight",
    "delta_beta": "ssm_beta.weight",
    "delta_alpha": "ssm_alpha.weight",
    "delta_decay": "ssm_a",
    "delta_decay_bias": "ssm_dt.bias",
    "delta_gate": "attn_gate.weight",
    "delta_norm": "ssm_norm.weight",
    "delta_output": "ssm_out.weight",
    "layer_gate": "inp_gate.weight",
    "layer_output": "proj.weight",
    "layer_norm": "post_norm.weight",
    "layer_scale": "layer_output_scale.weight",
}
# Weights that are no tensors but numbers in an array with one for each layer, by its key.
KEYS = {"xielu_positive": "xielu.alpha_p", "xielu_negative": "xielu.alpha_n"}


def tensor_name(role: str, architecture: Architecture) -> str:
    """Return llama.cpp's name of a weight."""
    layer, part = split_role(role)
    if layer is None:
        return architecture.tensor_names.get(part, TENSOR_NAMES[part])
    return f"blk.{layer}.{architecture.tensor_names.get(part, LAYER_TENSOR_NAMES[part])}"


@dataclass(frozen=True, kw_only=True)
class FileTensor(PlannedWeight):
    """One tensor of the file, and the weights of the checkpoint that fill it, one after another."""

    name: str  # llama.cpp's
    roles: tuple[str, ...]  # the last is the one that counts for the recipe

    @property
    def entry(self) -> TensorEntry:
        """What the file's header says of it."""
        return TensorEntry(name=self.name, shape=self.shape, tensor_type=self.tensor_type)


def of(spec: DecoderSpec, recipe: Recipe, architecture: Architecture) -> Iterator[FileTensor]:
    """Yield every tensor made from weights, in the order of the file."""
    for roles, shape in _stacked(spec, architecture):
        part = _part(_stacked_name(roles, architecture), roles, shape, recipe, spec)
        is_kept = all(_keeps_columns(role, spec, architecture) for role in roles)
        yield replace(part, lattice=LATTICES.get(part.tensor_type)) if is_kept else part
    if architecture.ties == "never" and spec.is_tied:
        shape = (spec.vocab_size, spec.hidden_size)
        name = tensor_name("output_head", architecture)
        yield _part(name, ("token_embedding",), shape, recipe, spec)


def _keeps_columns(role: str, spec: DecoderSpec, architecture: Architecture) -> bool:
    """Tell whether a weight is in the file as a decoder multiplies with it, but for its rows."""
    pairs, heads = spec.rotated_pairs(role), value_heads(role, spec)
    return (
        architecture.multiplier(role, spec) == 1
        and (pairs is None or pairs.axis == 0)
        and heads is None
    )


def _stacked(
    spec: DecoderSpec, architecture: Architecture
) -> Iterator[tuple[tuple[str, ...], Shape]]:
    """Yield weights with their shape, where they share a tensor all of it together."""
    shapes = dict(spec.weights())
    if spec.layer_embedding:  # llama.cpp reads as many rows of it as there are tokens
        shapes["layer_embedding"] = (spec.vocab_size, shapes["layer_embedding"][1])
    stacks = {stack[-1]: stack for stack in _stacks(architecture)}
    stacked = {part for stack in stacks.values() for part in stack}
    for role, shape in shapes.items():
        prefix, _, part = role.rpartition(".")
        if part in stacks:
            roles = tuple(f"{prefix}.{each}" for each in stacks[part])
            yield roles, (sum(shapes[each][0] for each in roles), *shape[1:])
        elif part not in stacked and part not in KEYS:
            yield (role,), shape


def _stacks(architecture: Architecture) -> Iterator[tuple[str, ...]]:
    """Yield what a graph multiplies at once.

    llama-quantize takes the whole for values, or for up, which are last here.
    """
    if architecture.fuses_attention:
        yield from (("query", "key", "value"), ("query_bias", "key_bias", "value_bias"))
    if architecture.fuses_mlp:
        yield ("gate", "up")


def qkv_name(layer: int | None, *, is_bias: bool = False) -> str:
    """Return llama.cpp's name of the tensor that holds queries, keys and values."""
    return f"blk.{layer}.attn_qkv.{'bias' if is_bias else 'weight'}"


def _stacked_name(roles: tuple[str, ...], architecture: Architecture) -> str:
    layer, part = split_role(roles[-1])
    if len(roles) > 1 and part.startswith("value"):
        return qkv_name(layer, is_bias=part.endswith("bias"))
    return tensor_name(roles[-1], architecture)


def _part(
    name: str, roles: tuple[str, ...], shape: Shape, recipe: Recipe, spec: DecoderSpec
) -> FileTensor:
    wanted = recipe.tensor_type_for(roles[-1], spec)
    stored = tensor_types.stored_as(wanted, shape[-1])
    return FileTensor(
        name=name,
        role=roles[-1],
        roles=roles,
        shape=shape,
        wanted=wanted,
        tensor_type=stored,
        size_bytes=TensorEntry(name=name, shape=shape, tensor_type=stored).size_bytes,
        is_coarse=stored in tensor_types.WEIGHTED,
    )
