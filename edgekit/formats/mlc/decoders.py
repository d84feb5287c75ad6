"""What MLC's models compute, and which decoders that is true of.

Read in mlc_llm/model/*/*_model.py of mlc-llm 79d603f085 and in TVM 0.26
(src/runtime/vm/paged_kv_cache.cc, python/tvm/relax/frontend/nn/llm/position_embedding.py).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from edgekit.errors import UsageError
from edgekit.formats import ContextLimit
from edgekit.model.spec import (
    Attention,
    DecoderSpec,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    RopeScaling,
    YarnScaling,
)


@dataclass(frozen=True, kw_only=True)
class MlcModel:
    """What one of MLC's model definitions can be told."""

    scaling: type[RopeScaling] | None = None  # of the rope, where one is known
    rotates_in_part: bool = False  # whether a part of a head may rotate
    can_be_tied: bool = True
    can_be_untied: bool = True
    qkv_biases: bool | None = False  # None: either way
    output_bias: bool | None = False
    has_square_heads: bool = False  # all heads together are as wide as the hidden state
    is_bound_to_vocabulary: bool = True  # whether a compiled library has the number of rows in it
    # Whether memory for the logits of a whole chunk is planned: their width is known when compiled.
    plans_logits: bool = True


_ANY_VOCABULARY = MlcModel(is_bound_to_vocabulary=False, plans_logits=False)
MODELS = {
    "llama": replace(_ANY_VOCABULARY, scaling=Llama3Scaling),
    "mistral": replace(_ANY_VOCABULARY, can_be_tied=False),
    "qwen2": MlcModel(qkv_biases=True, has_square_heads=True),
    "qwen3": MlcModel(qkv_biases=None, output_bias=None),
    "phi3": MlcModel(scaling=LongRopeScaling, rotates_in_part=True, has_square_heads=True),
    "gemma2": replace(_ANY_VOCABULARY, can_be_untied=False),
    "stablelm": MlcModel(
        rotates_in_part=True, can_be_tied=False, qkv_biases=None, has_square_heads=True
    ),
}
_ABSENT = {
    "gemma3_text": "MLC's Gemma 3 has one rope for all layers in a browser, the checkpoint has two",
    "smollm3": "MLC has no model with layers that have no positions, as SmolLM3's",
}


def model_of(architecture: str) -> MlcModel:
    """Return what MLC's model of this type can be told.

    Raises:
        UsageError: If there is none that computes it.
    """
    if architecture not in MODELS:
        raise UsageError(
            _ABSENT.get(architecture, f"MLC has no model of type {architecture!r}"),
            hint="another format has it: --format gguf",
        )
    return MODELS[architecture]


def refuse(architecture: str, spec: DecoderSpec) -> None:
    """Check that MLC computes what the decoder says, within its `context_limit`.

    Raises:
        UsageError: If it does not; the message says what it would compute.
    """
    for problem in _problems(model_of(architecture), architecture, spec):
        raise UsageError(
            f"MLC's {architecture} model {problem}", hint="another format has it: --format gguf"
        )


def _problems(model: MlcModel, architecture: str, spec: DecoderSpec) -> Iterator[str]:
    ropes = {layer.rope for layer in spec.layers}
    rope, *others = ropes
    if rope is None or others:
        yield "rotates every layer alike, the checkpoint does not"
        return
    yield from _rope_problems(model, spec, rope)
    yield from _attention_problems(model, architecture, spec.attention)
    if spec.is_tied and not model.can_be_tied:
        yield "has an output head of its own, the checkpoint takes the embedding"
    if not spec.is_tied and not model.can_be_untied:
        yield "takes the embedding as output head, the checkpoint has one of its own"
    if spec.has_mlp_bias:
        yield "has no biases in the MLP, the checkpoint has"
    if spec.residual == "parallel":
        yield "adds attention before the MLP reads, the checkpoint runs both in parallel"
    width, heads = spec.attention.query_width, spec.attention.heads
    if (model.has_square_heads and width != spec.hidden_size) or spec.hidden_size % heads:
        yield (
            f"splits a hidden width of {spec.hidden_size} among {heads} heads, the checkpoint's "
            f"are {spec.attention.head_dim} wide"
        )


def _rope_problems(model: MlcModel, spec: DecoderSpec, rope: Rope) -> Iterator[str]:
    if rope.width != spec.attention.head_dim and not model.rotates_in_part:
        yield f"rotates whole heads, the checkpoint {rope.width} channels of them"
    scaling = rope.scaling
    if scaling is not None and not (model.scaling and isinstance(scaling, model.scaling)):
        yield f"has no {_kind(scaling)} rope, the checkpoint has"
    if isinstance(scaling, LongRopeScaling):
        computed = _attention_factor(spec.context_tokens, scaling.original_context_tokens)
        if not math.isclose(scaling.attention_factor, computed, rel_tol=1e-5):
            yield (
                f"takes an attention factor of {computed:.4f}, the checkpoint "
                f"{scaling.attention_factor:.4f}"
            )


def _kind(scaling: RopeScaling) -> str:
    kinds = {LinearScaling: "linear", Llama3Scaling: "llama3", LongRopeScaling: "longrope",
             YarnScaling: "YaRN"}  # fmt: skip
    return kinds[type(scaling)]


def _attention_factor(context_tokens: int, original_tokens: int) -> float:
    """Return what `rope_freq_longrope` multiplies sine and cosine with."""
    stretch = context_tokens / original_tokens
    return math.sqrt(1 + math.log(stretch) / math.log(original_tokens)) if stretch > 1 else 1.0


def _attention_problems(model: MlcModel, architecture: str, attention: Attention) -> Iterator[str]:
    for name, has, may_have in (
        ("on queries, keys and values", attention.has_qkv_bias, model.qkv_biases),
        ("on the output of attention", attention.has_output_bias, model.output_bias),
    ):
        if may_have is not None and has != may_have:
            yield f"has {'' if may_have else 'no '}biases {name}, the checkpoint is otherwise"
    is_paired = model.qkv_biases is None and model.output_bias is None
    if is_paired and attention.has_qkv_bias != attention.has_output_bias:
        yield "has all biases of attention or none, the checkpoint some"
    scale = attention.head_dim**-0.5
    if not math.isclose(attention.softmax_scale, scale, rel_tol=1e-6):
        yield (f"multiplies scores by {scale:.4f}, the checkpoint by {attention.softmax_scale:.4f}")
    if (attention.query_key_norm is not None) != (architecture == "qwen3"):
        yield "differs from the checkpoint in norms on queries and keys"


def computed(spec: DecoderSpec) -> DecoderSpec:
    """Return what MLC computes with the weights of an artifact.

    A norm's weights are stored with the 1 that Gemma adds, and scores are not capped.
    """
    plain = spec.without_unit_offsets()
    return replace(plain, attention=replace(plain.attention, attn_logit_softcap=None))


def notes(spec: DecoderSpec) -> Iterator[str]:
    """Yield what a user should know about how MLC computes a decoder it takes."""
    if spec.attention.attn_logit_softcap is not None:
        yield (
            f"MLC leaves out the cap of {spec.attention.attn_logit_softcap:g} on attention scores; "
            "the proof computes without it too, so that its figures count the difference"
        )


def context_limit(architecture: str, spec: DecoderSpec) -> ContextLimit:
    """Return how far MLC computes what the checkpoint says."""
    limit = ContextLimit(tokens=spec.context_tokens, reason="the model was made for no more")
    windows = [layer.window_tokens for layer in spec.layers if layer.window_tokens is not None]
    if windows and min(windows) < limit.tokens:
        limit = ContextLimit(
            tokens=min(windows), reason=f"MLC's {architecture} model leaves the window out"
        )
    rope = spec.layers[0].rope
    scaling = rope.scaling if rope else None
    if isinstance(scaling, LongRopeScaling) and scaling.original_context_tokens < limit.tokens:
        limit = ContextLimit(
            tokens=scaling.original_context_tokens,
            reason="MLC takes the short factors of longrope for every text read in chunks",
        )
    return limit


def plans_logits(architecture: str, spec: DecoderSpec) -> bool:
    """Tell whether a library keeps memory for the logits of a whole chunk."""
    if architecture == "phi3":  # its embedding has a fixed size, its own head has not
        return spec.is_tied
    return MODELS[architecture].plans_logits
