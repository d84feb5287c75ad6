"""What llama.cpp's decoder graphs compute, as data; a `DecoderSpec` is matched against them.

Nothing here knows a family: a decoder that a graph computes exactly can be stored under that
graph's name, and one that no graph computes is refused with the difference.

Source: src/models/*.cpp, src/llama-arch.cpp and src/llama-model.cpp of llama.cpp 0c1e57098, the
commit inside llama-cpp-python 0.3.36.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from edgekit.errors import UsageError
from edgekit.formats import ContextLimit
from edgekit.model.spec import (
    DecoderSpec,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Norm,
    RopeScaling,
    YarnScaling,
)


MAX_LAYERS = 512  # LLAMA_MAX_LAYERS in llama-hparams.h; more make it abort
CONTEXT_PADDING_TOKENS = 256  # n_ctx is rounded up to this: llama_context in llama-context.cpp


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One graph of llama.cpp: what it computes, and what it cannot."""

    name: str
    rope_pairs: Literal["neighbours", "halves"] = "halves"
    scalings: tuple[type[RopeScaling], ...] = (LinearScaling,)
    has_partial_rope: bool = False
    skips_rope_every: int | None = None  # every n-th layer has no positions
    norm: Literal["rms", "layer"] = "rms"
    norm_adds_one: bool = False  # Gemma: stored with the 1 already added
    query_key_norm: Literal["none", "per width", "per head, optional"] = "none"
    needs_qkv_bias: bool = False  # by custom; the graph does without, but then llama is the name
    has_output_bias: bool = False
    has_mlp_bias: bool = False
    has_windows: bool = False
    local_rope_scaling: Literal["none", "shared"] = "none"  # of the layers with a window
    caps_scores: bool = False
    caps_logits: Literal["never", "optional", "always"] = "never"
    has_post_norms: bool = False
    scales_embedding: bool = False
    can_be_parallel: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    scales_scores_by_hidden_at: int | None = None  # at this depth, 27B, the scale is another
    head_width_is_free: bool = False  # else heads x head width must be the hidden width
    fuses_projections: bool = False  # queries, keys and values in one tensor; gate and up too
    ties: Literal["optional", "always", "never"] = "optional"

    def refusals(self, spec: DecoderSpec) -> Iterator[str]:
        """Yield what this graph would compute otherwise than ``spec`` asks."""
        yield from self._refuse_norms(spec)
        yield from self._refuse_query_key_norms(spec)
        yield from self._refuse_attention(spec)
        yield from self._refuse_ropes(spec)
        yield from self._refuse_rest(spec)

    def _refuse_norms(self, spec: DecoderSpec) -> Iterator[str]:
        if spec.norm.kind != self.norm or spec.norm.unit_offset != self.norm_adds_one:
            yield f"normalization {_norm_name(spec.norm)}"
        if spec.norm.kind == "layer" and not spec.norm.has_bias:
            yield "layer normalization without bias"
        if spec.has_post_norms != self.has_post_norms:
            yield "norms after attention and MLP" if spec.has_post_norms else "no post norms"

    def _refuse_query_key_norms(self, spec: DecoderSpec) -> Iterator[str]:
        norm = spec.attention.query_key_norm
        match self.query_key_norm:
            case "none":
                if norm:
                    yield "norms on queries and keys"
            case "per width":
                if not norm or spec.attention.head_norms != "alike" or norm.kind != "rms":
                    yield "no RMS norms shared by all heads on queries and keys"
            case "per head, optional":
                if norm and (spec.attention.head_norms != "apart" or norm.has_bias):
                    yield "norms on queries and keys that all heads share"
        if norm and norm.epsilon != spec.norm.epsilon:
            yield "another epsilon in the norms of queries and keys"

    def _refuse_attention(self, spec: DecoderSpec) -> Iterator[str]:
        a = spec.attention
        if not self.head_width_is_free and a.query_width != spec.hidden_size:
            yield f"{a.heads} heads of width {a.head_dim} in {spec.hidden_size} columns"
        if self.needs_qkv_bias and not a.has_qkv_bias:
            yield "no bias on queries, keys and values"
        if a.has_output_bias and not self.has_output_bias:
            yield "a bias after attention"
        if not math.isclose(a.softmax_scale, self._score_scale(spec), rel_tol=1e-6):
            yield f"a score scale of {a.softmax_scale:g}"
        if (a.attn_logit_softcap is not None) != self.caps_scores:
            yield "a cap on the scores" if a.attn_logit_softcap else "no cap on the scores"
        windows = {layer.window_tokens for layer in spec.layers} - {None}
        if len(windows) > 1:
            yield "windows of several lengths"

    def _score_scale(self, spec: DecoderSpec) -> float:
        if len(spec.layers) == self.scales_scores_by_hidden_at:
            return float((spec.hidden_size // spec.attention.heads) ** -0.5)
        return float(spec.attention.head_dim**-0.5)

    def _refuse_ropes(self, spec: DecoderSpec) -> Iterator[str]:
        for index, layer in enumerate(spec.layers):
            skips = self.skips_rope_every is not None and (index + 1) % self.skips_rope_every == 0
            if (layer.rope is None) != skips:
                yield f"layer {index} {'without' if layer.rope is None else 'with'} positions"
                return
        ropes = {layer.rope for layer in spec.layers if layer.rope}
        if len(ropes) > 1 and not self._has_two_ropes(spec):
            yield "ropes that differ between layers"
        if self.has_windows and not self._scales_windows_alike(spec):
            yield "other rope scaling in the layers with a window"
        for rope in ropes:
            if rope.width != spec.attention.head_dim and not self.has_partial_rope:
                yield f"rope on {rope.width} of {spec.attention.head_dim} channels"
            if rope.scaling is not None and not isinstance(rope.scaling, self.scalings):
                yield f"rope with {_scaling_name(rope.scaling)} scaling"
            elif isinstance(rope.scaling, YarnScaling):
                yield from _yarn_refusals(rope.scaling)

    def _has_two_ropes(self, spec: DecoderSpec) -> bool:
        """Whether layers with a window may have one rope and the others another (Gemma 3)."""
        pairs = {(layer.window_tokens is not None, layer.rope) for layer in spec.layers}
        return self.has_windows and len(pairs) == 2 == len({is_local for is_local, _ in pairs})

    def _scales_windows_alike(self, spec: DecoderSpec) -> bool:
        """Whether layers with a window are scaled as the graph fixes it: it has one key for all."""
        ropes = [(layer.rope, layer.window_tokens) for layer in spec.layers]
        scalings = {rope.scaling for rope, _ in ropes if rope}
        local = {rope.scaling for rope, window in ropes if rope and window is not None}
        return len(scalings) <= 1 if self.local_rope_scaling == "shared" else local <= {None}

    def _refuse_rest(self, spec: DecoderSpec) -> Iterator[str]:
        scale = math.sqrt(spec.hidden_size) if self.scales_embedding else 1.0
        if not math.isclose(spec.embedding_scale, scale, rel_tol=1e-6):
            yield f"an embedding scale of {spec.embedding_scale:g}"
        if spec.activation != self.activation:
            yield f"activation {spec.activation}"
        if spec.has_mlp_bias and not self.has_mlp_bias:
            yield "biases in the MLP"
        if spec.residual == "parallel" and not self.can_be_parallel:
            yield "parallel residuals"
        if spec.final_logit_softcap is not None and self.caps_logits == "never":
            yield "a cap on the logits"
        if spec.final_logit_softcap is None and self.caps_logits == "always":
            yield "no cap on the logits"
        if self.ties == "always" and not spec.is_tied:
            yield "an output head of its own"


ARCHITECTURES = (  # of several that fit, the first is taken
    Architecture(name="qwen2", needs_qkv_bias=True, scalings=(LinearScaling, YarnScaling)),
    Architecture(
        name="llama",
        rope_pairs="neighbours",
        scalings=(LinearScaling, Llama3Scaling, YarnScaling),
        has_output_bias=True,
        has_mlp_bias=True,
        head_width_is_free=True,
    ),
    Architecture(
        name="qwen3",
        scalings=(LinearScaling, YarnScaling),
        query_key_norm="per width",
        head_width_is_free=True,
    ),
    Architecture(
        name="smollm3",
        rope_pairs="neighbours",
        scalings=(LinearScaling, YarnScaling),
        skips_rope_every=4,
        head_width_is_free=True,
    ),
    Architecture(
        name="phi3",
        scalings=(LinearScaling, LongRopeScaling),
        has_partial_rope=True,
        fuses_projections=True,
    ),
    Architecture(
        name="gemma2",
        norm_adds_one=True,
        has_windows=True,
        local_rope_scaling="shared",
        caps_scores=True,
        caps_logits="always",
        has_post_norms=True,
        scales_embedding=True,
        activation="gelu_tanh",
        scales_scores_by_hidden_at=46,
        head_width_is_free=True,
        ties="always",
    ),
    Architecture(
        name="gemma3",
        norm_adds_one=True,
        query_key_norm="per width",
        has_windows=True,
        caps_logits="optional",
        has_post_norms=True,
        scales_embedding=True,
        activation="gelu_tanh",
        scales_scores_by_hidden_at=62,
        head_width_is_free=True,
    ),
    Architecture(
        name="stablelm",
        scalings=(LinearScaling, YarnScaling),
        norm="layer",
        has_partial_rope=True,
        query_key_norm="per head, optional",
        can_be_parallel=True,
        ties="never",
    ),
)


def choose(spec: DecoderSpec, *, family: str = "") -> Architecture:
    """Return the graph that computes a decoder: its family's own, else the first of all.

    A Phi-3 without longrope is a Llama too, but then llama-quantize mixes it otherwise.

    Args:
        spec: The decoder.
        family: The ``model_type`` of its config.

    Raises:
        UsageError: If none does; the message says what the nearest one lacks.
    """
    if len(spec.layers) > MAX_LAYERS:
        raise UsageError(f"{len(spec.layers)} layers are more than llama.cpp's {MAX_LAYERS}")
    nearest: tuple[Sequence[str], str] | None = None
    for architecture in sorted(ARCHITECTURES, key=lambda graph: graph.name != family):
        refusals = list(architecture.refusals(spec))
        if not refusals:
            return architecture
        if nearest is None or len(refusals) < len(nearest[0]):
            nearest = (refusals, architecture.name)
    assert nearest is not None  # noqa: S101 - the table is not empty
    raise UsageError(
        f"llama.cpp has no decoder like this: its nearest, {nearest[1]}, cannot compute "
        f"{'; '.join(nearest[0])}",
        hint="another --format may; see `edgekit formats`",
    )


def get(name: str) -> Architecture:
    """Return the graph of that name.

    Raises:
        UsageError: If edgekit does not know it.
    """
    for architecture in ARCHITECTURES:
        if architecture.name == name:
            return architecture
    known = ", ".join(architecture.name for architecture in ARCHITECTURES)
    raise UsageError(f"GGUF files of architecture {name!r} are not read", hint=f"read: {known}")


def context_limit(spec: DecoderSpec) -> ContextLimit:
    """Return the longest context in which the chosen graph says what the checkpoint says."""
    limit = ContextLimit(tokens=spec.context_tokens, reason="the model was made for no more")
    windows = [layer.window_tokens for layer in spec.layers if layer.window_tokens]
    if windows and not choose(spec).has_windows and min(windows) < limit.tokens:
        limit = ContextLimit(
            tokens=min(windows),
            reason="llama.cpp ignores this model's attention window, which changes longer texts",
        )
    for scaling in (layer.rope.scaling for layer in spec.layers if layer.rope):
        if isinstance(scaling, LongRopeScaling):
            limit = _longrope_limit(scaling, limit)
    return limit


def _longrope_limit(scaling: LongRopeScaling, limit: ContextLimit) -> ContextLimit:
    """Return how far the short factors reach; a cache that is rounded up must not cross it."""
    original = scaling.original_context_tokens
    if original >= limit.tokens:
        return limit
    if original < CONTEXT_PADDING_TOKENS:
        raise UsageError(
            f"llama.cpp rounds a context up to {CONTEXT_PADDING_TOKENS} tokens, where it would "
            f"take the long rope factors of this model, made for {original}",
            hint="another --format may; see `edgekit formats`",
        )
    return ContextLimit(
        tokens=original // CONTEXT_PADDING_TOKENS * CONTEXT_PADDING_TOKENS,
        reason="llama.cpp chooses the long rope factors by the size of the cache, the checkpoint "
        "by the length of the text",
    )


def _norm_name(norm: Norm) -> str:
    return f"{norm.kind}{' with 1 added' if norm.unit_offset else ''}"


def _yarn_refusals(scaling: YarnScaling) -> Iterator[str]:
    """Yield what these graphs do not read: the ramp's ends are constants of theirs."""
    if (scaling.fast_turns, scaling.slow_turns) != (32, 1):
        yield f"YaRN's ramp from {scaling.fast_turns:g} to {scaling.slow_turns:g} turns"
    if not scaling.is_truncated:
        yield "YaRN without truncation"


def _scaling_name(scaling: RopeScaling) -> str:
    return type(scaling).__name__.removesuffix("Scaling").lower()
