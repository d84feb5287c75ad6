"""What MLC's models compute, and which decoders that is true of.

A decoder needs no model of its own name: Granite and EXAONE are Llamas, once a checkpoint has
folded what muP multiplies with into their weights. What counts is what is computed.

Read in mlc_llm/model/*/*_model.py of mlc-llm 79d603f085 and in TVM 0.26
(src/runtime/vm/paged_kv_cache.cc, python/tvm/relax/frontend/nn/llm/position_embedding.py).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from edgekit.errors import UsageError
from edgekit.formats import ContextLimit
from edgekit.model.mixers import Attention, DeltaNet, ShortConv
from edgekit.model.norm import Norm
from edgekit.model.rope import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ProportionalScaling,
    Rope,
    RopeScaling,
    YarnScaling,
)
from edgekit.model.spec import Activation, DecoderSpec


@dataclass(frozen=True, kw_only=True)
class MlcModel:
    """What one of MLC's model definitions computes, and can be told."""

    scaling: type[RopeScaling] | None = None  # of the rope, where one is known
    rotates_in_part: bool = False  # whether a part of a head may rotate
    can_be_tied: bool = True
    can_be_untied: bool = True
    copies_head: bool = False  # a head that is the embedding is stored once more
    norm: Literal["rms", "layer"] = "rms"
    has_norm_bias: bool = False
    adds_one: bool = False  # to the weights of its norms; other models are given the sum
    has_pre_norms: bool = True
    has_post_norms: bool = False
    query_key_norm: Literal["alike", "together"] | None = None
    activation: Activation = "silu"
    is_gated: bool = True
    residual: Literal["serial", "parallel"] = "serial"
    scales_embedding: bool = False  # by the root of the hidden width
    caps: bool = False  # logits, where it is told to; scores, it should
    # None: either way, but all that are None in the same.
    qkv_biases: bool | None = False
    output_bias: bool | None = False
    mlp_biases: bool | None = False
    has_head_bias: bool = False
    has_square_heads: bool = False  # all heads together are as wide as the hidden state
    # Whether every n-th layer attends, with a gate on what a head has mixed; the others are delta
    # nets.
    has_delta_nets: bool = False
    widens_norms: bool = False  # mlc_llm adds Gemma's 1 in float32, not in the checkpoint's type
    is_bound_to_vocabulary: bool = True  # whether a compiled library has the number of rows in it
    # Whether memory for the logits of a whole chunk is planned: their width is known when compiled.
    plans_logits: bool = True
    lacks: str = ""  # what it computes otherwise in any case


_ANY_VOCABULARY = MlcModel(is_bound_to_vocabulary=False, plans_logits=False)
_GEMMA = replace(
    _ANY_VOCABULARY, can_be_untied=False, activation="gelu_tanh", scales_embedding=True
)
MODELS = {
    "llama": replace(_ANY_VOCABULARY, scaling=Llama3Scaling),
    "mistral": replace(_ANY_VOCABULARY, can_be_tied=False),
    "qwen2": MlcModel(qkv_biases=True, has_square_heads=True),
    "qwen3": MlcModel(qkv_biases=None, output_bias=None, query_key_norm="alike"),
    "qwen3_5_text": MlcModel(
        rotates_in_part=True, qkv_biases=None, output_bias=None, query_key_norm="alike",
        has_delta_nets=True, widens_norms=True,
    ),
    "phi3": MlcModel(scaling=LongRopeScaling, rotates_in_part=True, has_square_heads=True),
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA, has_post_norms=True, caps=True),
    "gemma3_text": replace(
        _GEMMA, has_post_norms=True, query_key_norm="alike",
        lacks="has one rope for all layers in a browser, the checkpoint has two",
    ),
    "olmo2": MlcModel(
        scaling=Llama3Scaling, has_pre_norms=False, has_post_norms=True, query_key_norm="together"
    ),
    "stablelm": MlcModel(
        rotates_in_part=True, can_be_tied=False, norm="layer", has_norm_bias=True, qkv_biases=None,
        has_square_heads=True,
    ),
    "phi": MlcModel(
        rotates_in_part=True, can_be_tied=False, norm="layer", has_norm_bias=True,
        activation="gelu_tanh", is_gated=False, residual="parallel", qkv_biases=True,
        output_bias=True, mlp_biases=True, has_head_bias=True, has_square_heads=True,
        plans_logits=False,
    ),
    "nemotron": replace(
        _ANY_VOCABULARY, scaling=Llama3Scaling, rotates_in_part=True, norm="layer",
        has_norm_bias=True, adds_one=True, activation="relu2", is_gated=False,
        has_square_heads=True,
    ),
    "cohere": replace(
        _ANY_VOCABULARY, can_be_untied=False, norm="layer", residual="parallel",
        has_square_heads=True,
    ),
    "starcoder2": MlcModel(
        copies_head=True, norm="layer", has_norm_bias=True, activation="gelu_tanh", is_gated=False,
        qkv_biases=None, output_bias=None, mlp_biases=None, has_square_heads=True,
    ),
}  # fmt: skip
_HINT = "another format has it: --format gguf"


def model_type(architecture: str, spec: DecoderSpec) -> str:
    """Return which of MLC's models a decoder becomes: its own, or another that computes it.

    What none computes becomes the one whose weights are named alike, or else the one that comes
    nearest; `refuse` says what that has otherwise.
    """
    own = [architecture] if architecture in MODELS else []
    for name in (*own, *MODELS):
        if not any(_problems(name, spec)):
            return name
    for name in (*own, *MODELS):
        if not any(_problems(name, _as_stored(spec), has_own=True)):
            return name
    return _nearest(architecture, spec)


def _nearest(architecture: str, spec: DecoderSpec) -> str:
    if architecture in MODELS:
        return architecture
    return min(MODELS, key=lambda name: len([*_problems(name, spec)]))


def refuse(architecture: str, spec: DecoderSpec, *, has_own: bool = False) -> None:
    """Check that MLC computes what the decoder says, within its `context_limit`.

    Args:
        architecture: The checkpoint's model type.
        spec: What it computes.
        has_own: Whether a library is compiled for it. It computes what the decoder says, so that
            one of MLC's models has to name its weights, and no more.

    Raises:
        UsageError: If it does not; the message says what it would compute.
    """
    in_any_case = [*_beyond_all(architecture, spec), *_named_otherwise(architecture, spec)]
    problems = in_any_case if has_own else _found(architecture, spec)
    for problem in problems:
        hint = _HINT if in_any_case else f"--compile, or {_HINT}"
        raise UsageError(f"MLC{problem}", hint=hint)


def is_computed(architecture: str, spec: DecoderSpec) -> bool:
    """Tell whether one of MLC's own models computes what the decoder says."""
    return not any(_found(architecture, spec))


def _found(architecture: str, spec: DecoderSpec) -> Iterator[str]:
    """Yield what MLC's own models compute otherwise."""
    yield from _beyond_all(architecture, spec)
    yield from _beyond_prebuilt(spec)
    name = model_type(architecture, spec)
    if any(_problems(name, spec)):
        name = _nearest(architecture, spec)
    for problem in _problems(name, spec):
        yield _of(name, architecture, problem)


def _named_otherwise(architecture: str, spec: DecoderSpec) -> Iterator[str]:
    """Yield why none of MLC's models has the weights, however they are computed with."""
    name = model_type(architecture, spec)
    for problem in _problems(name, _as_stored(spec), has_own=True):
        yield _of(name, architecture, problem)


def _of(name: str, architecture: str, problem: str) -> str:
    nearest = "" if name == architecture else f", the nearest to {architecture},"
    return f"'s {name} model{nearest} {problem}"


def _as_stored(spec: DecoderSpec) -> DecoderSpec:
    """Return a decoder with the same weights, all of whose layers attend in the simplest way."""
    plain = Rope(width=spec.attention.head_dim, theta=10_000.0)
    return replace(
        spec,
        attention=replace(spec.attention, normalizes_after_rope=False),
        layers=tuple(
            layer if layer.mixer else replace(layer, rope=plain, window_tokens=None)
            for layer in spec.layers
        ),
    )


def _beyond_all(architecture: str, spec: DecoderSpec) -> Iterator[str]:
    """Yield what no model of MLC's computes."""
    if any(isinstance(layer.mixer, ShortConv) for layer in spec.layers):
        yield f" has no model of {architecture}: none has short convolutions"
    if (
        any(isinstance(layer.mixer, Attention) or layer.mlp for layer in spec.layers)
        or spec.layer_embedding
        or spec.has_layer_scales
    ):
        yield (
            f" has no model of {architecture} whose weights can be written: none has layers of "
            "different shapes, and WebLLM's Gemma 4 takes tensors that only its library names"
        )
    if not set(_ropes(spec)):
        yield " has no model without attention"
    if spec.activation == "xielu":
        yield " has no model whose MLP computes xIELU"
    if spec.attention.has_head_gate:
        yield " has no model with one gate for all channels of a head"


def _beyond_prebuilt(spec: DecoderSpec) -> Iterator[str]:
    """Yield what no model of MLC's computes, and a library of the model's own does."""
    ropes = set(_ropes(spec))
    if None in ropes:
        yield " has no model with layers that have no positions"
    elif len(ropes) > 1:
        yield f" has one rope for all layers in a browser, the checkpoint has {len(ropes)}"
    if any(rope and isinstance(rope.scaling, YarnScaling) for rope in ropes):
        # rope_freq_yarn counts the frequencies of the second half of a head on from the first.
        yield " rotates the two halves of a head by different angles where YaRN stretches the rope"
    if spec.attention.normalizes_after_rope:
        yield " has no model that normalizes queries and keys after their rotation"


def _problems(name: str, spec: DecoderSpec, *, has_own: bool = False) -> Iterator[str]:
    """Yield what one of MLC's models has otherwise; ``has_own`` counts the weights alone."""
    model, ropes = MODELS[name], set(_ropes(spec))
    if model.lacks and not has_own:
        yield model.lacks
    rope = ropes.pop() if len(ropes) == 1 else None
    if rope is None:
        yield "rotates every layer alike, the checkpoint does not"
        return
    yield from _mixer_problems(model, spec)
    yield from _rope_problems(model, spec, rope)
    yield from _block_problems(model, spec)
    yield from _mlp_problems(model, spec)
    yield from _attention_problems(model, spec.attention)
    yield from _bias_problems(model, spec)
    yield from _end_problems(model, spec)
    width, heads = spec.attention.query_width, spec.attention.heads
    if (model.has_square_heads and width != spec.hidden_size) or spec.hidden_size % heads:
        yield (
            f"splits a hidden width of {spec.hidden_size} among {heads} heads, the checkpoint's "
            f"are {spec.attention.head_dim} wide"
        )


def _ropes(spec: DecoderSpec) -> Iterator[Rope | None]:
    return (layer.rope for _, layer, _ in spec.attentions())


def _mixer_problems(model: MlcModel, spec: DecoderSpec) -> Iterator[str]:
    nets = {layer.mixer for layer in spec.layers if isinstance(layer.mixer, DeltaNet)}
    attends = [index for index, _, _ in spec.attentions()]
    if model.has_delta_nets != bool(nets):
        yield f"has {'' if model.has_delta_nets else 'no '}delta nets, the checkpoint is otherwise"
    elif nets:
        interval = full_attention_interval(spec)
        if attends != list(range(interval - 1, len(spec.layers), interval)):
            yield (
                f"attends in every n-th layer, the checkpoint in {', '.join(map(str, attends))} of "
                f"0 to {len(spec.layers) - 1}"
            )
    if len(nets) > 1:
        yield "has delta nets of one shape, the checkpoint of several"
    if model.has_delta_nets != spec.attention.has_output_gate:
        yield (
            f"has {'a' if model.has_delta_nets else 'no'} gate on what attention has mixed, the "
            "checkpoint is otherwise"
        )


def full_attention_interval(spec: DecoderSpec) -> int:
    """Return n where every n-th layer attends, and there are layers that do."""
    return next(index for index, _, _ in spec.attentions()) + 1


def _block_problems(model: MlcModel, spec: DecoderSpec) -> Iterator[str]:
    if spec.residual != model.residual:
        how = {"serial": "adds attention before the MLP reads", "parallel": "runs both in parallel"}
        yield f"{how[model.residual]}, the checkpoint {how[spec.residual]}"
    theirs, norms = _norms(model.norm, has_bias=model.has_norm_bias), [spec.norm]
    ours = _norms(spec.norm.kind, has_bias=spec.norm.has_bias)
    if theirs != ours:
        yield f"has {theirs}, the checkpoint {ours}"
    if model.adds_one and not spec.norm.unit_offset:
        yield "adds 1 to the weights of its norms, the checkpoint does not"
    norms += [spec.attention.query_key_norm] if spec.attention.query_key_norm else []
    norms += [layer.mixer.norm for layer in spec.layers if isinstance(layer.mixer, DeltaNet)]
    if len({norm.epsilon for norm in norms}) > 1:
        yield "has one epsilon for all norms, the checkpoint has two"
    for what, has, may_have in (
        ("read", spec.has_pre_norms, model.has_pre_norms),
        ("add", spec.has_post_norms, model.has_post_norms),
    ):
        if has != may_have:
            yield (
                f"{'normalizes' if may_have else 'does not normalize'} what attention and the MLP "
                f"{what}, the checkpoint is otherwise"
            )


def _norms(kind: str, *, has_bias: bool) -> str:
    return f"{'RMS' if kind == 'rms' else 'layer'} norms with{'' if has_bias else 'out'} biases"


def _mlp_problems(model: MlcModel, spec: DecoderSpec) -> Iterator[str]:
    found, known = ((it.activation, it.is_gated) for it in (spec, model))
    if found != known:
        words = [
            f"{name} {'with' if gated else 'without'} a gate" for name, gated in (known, found)
        ]
        yield f"computes {words[0]} in the MLP, the checkpoint {words[1]}"


def _end_problems(model: MlcModel, spec: DecoderSpec) -> Iterator[str]:
    if spec.is_tied and not model.can_be_tied:
        yield "has an output head of its own, the checkpoint takes the embedding"
    if not spec.is_tied and not model.can_be_untied:
        yield "takes the embedding as output head, the checkpoint has one of its own"
    scale = math.sqrt(spec.hidden_size) if model.scales_embedding else 1.0
    if not math.isclose(spec.embedding_scale, scale, rel_tol=1e-6):
        yield f"multiplies embeddings by {scale:.4f}, the checkpoint by {spec.embedding_scale:.4f}"
    caps = (spec.final_logit_softcap, spec.attention.attn_logit_softcap)
    if not model.caps and caps != (None, None):
        yield "caps neither scores nor logits, the checkpoint does"


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
             YarnScaling: "YaRN", ProportionalScaling: "proportional"}  # fmt: skip
    return kinds[type(scaling)]


def _attention_factor(context_tokens: int, original_tokens: int) -> float:
    """Return what `rope_freq_longrope` multiplies sine and cosine with."""
    stretch = context_tokens / original_tokens
    return math.sqrt(1 + math.log(stretch) / math.log(original_tokens)) if stretch > 1 else 1.0


def _bias_problems(model: MlcModel, spec: DecoderSpec) -> Iterator[str]:
    attention, free = spec.attention, set()
    for name, has, may_have in (
        ("on queries, keys and values", attention.has_qkv_bias, model.qkv_biases),
        ("on the output of attention", attention.has_output_bias, model.output_bias),
        ("in the MLP", spec.has_mlp_bias, model.mlp_biases),
        ("on logits", spec.has_head_bias, model.has_head_bias),
    ):
        if may_have is None:
            free.add(has)
        elif has != may_have:
            yield f"has {'' if may_have else 'no '}biases {name}, the checkpoint is otherwise"
    if len(free) > 1:
        yield "has all of its biases or none, the checkpoint some"


def _attention_problems(model: MlcModel, attention: Attention) -> Iterator[str]:
    scale = attention.head_dim**-0.5
    if not math.isclose(attention.softmax_scale, scale, rel_tol=1e-6):
        yield f"multiplies scores by {scale:.4f}, the checkpoint by {attention.softmax_scale:.4f}"
    norm = attention.query_key_norm
    if _heads_of(norm, attention) != model.query_key_norm:
        yield "differs from the checkpoint in norms on queries and keys"


def _heads_of(norm: Norm | None, attention: Attention) -> str | None:
    """Return how a norm of queries and keys sees the heads, if it is of the kind MLC has."""
    if norm is None:
        return None
    return attention.head_norms if norm.kind == "rms" and not norm.has_bias else "otherwise"


def computed(name: str, spec: DecoderSpec) -> DecoderSpec:
    """Return what one of MLC's models computes with the weights of an artifact.

    A norm's weights are stored with the 1 that Gemma adds, and scores are not capped.
    """
    plain = spec if MODELS[name].adds_one else spec.without_unit_offsets()
    attention = replace(plain.attention, attn_logit_softcap=None, query_growth=None)
    return replace(plain, attention=attention)


def notes(spec: DecoderSpec) -> Iterator[str]:
    """Yield what a user should know about how MLC computes a decoder it takes."""
    if spec.attention.attn_logit_softcap is not None:
        yield (
            f"MLC leaves out the cap of {spec.attention.attn_logit_softcap:g} on attention scores; "
            "the proof computes without it too, so that its figures count the difference"
        )


def context_limit(architecture: str, spec: DecoderSpec, *, has_own: bool = False) -> ContextLimit:
    """Return how far MLC computes what the checkpoint says; a library of its own has windows."""
    limits = [ContextLimit(tokens=spec.context_tokens, reason="the model was made for no more")]
    name = model_type(architecture, spec)
    limits += [
        ContextLimit(tokens=layer.window_tokens, reason=f"MLC's {name} model leaves the window out")
        for layer in spec.layers
        if layer.window_tokens is not None and not has_own
    ]
    if growth := spec.attention.query_growth:
        limits.append(
            ContextLimit(
                tokens=growth.step_tokens, reason=f"MLC's {name} model lets no queries grow"
            )
        )
    border = spec.original_max_position_embeddings
    if border is not None:
        limits.append(
            ContextLimit(
                tokens=border,
                reason="MLC takes the short factors of longrope for every text read in chunks",
            )
        )
    return min(limits, key=lambda limit: limit.tokens)


def plans_logits(name: str, spec: DecoderSpec) -> bool:
    """Tell whether a library keeps memory for the logits of a whole chunk."""
    if name == "phi3":  # its embedding has a fixed size, its own head has not
        return spec.is_tied
    return MODELS[name].plans_logits
