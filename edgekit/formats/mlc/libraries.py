"""Model libraries: the compiled half of an MLC model, which a fine-tune can take from its base.

A library is bound to sizes, rope, tying and scheme, and where the embedding has a fixed size, to
the vocabulary. WebLLM notices a wrong one late and obscurely, or not at all.
"""

import functools
import hashlib
import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from edgekit.formats.mlc import decoders
from edgekit.model.mixers import DeltaNet
from edgekit.model.rope import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ProportionalScaling,
    Rope,
    YarnScaling,
)


if TYPE_CHECKING:
    from edgekit.model.checkpoint_protocol import CheckpointProtocol
    from edgekit.model.spec import DecoderSpec


TABLE = Path(__file__).with_name("libraries.toml")
OWN = "model-webgpu.wasm"  # a library compiled for the model, where the bundle's page looks for it
MOST_DIFFERENCES = 2  # with more, a library is not a near miss
PREFILL_CHUNK_TOKENS = 1024  # of the prebuilt libraries: the "cs1k" in their names


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is compiled into a library, besides the scheme."""

    architecture: str
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    num_kv_heads: int
    head_dim: int
    rope: str  # as `rope_text` says it
    norm_epsilon: float
    is_tied: bool
    has_qkv_bias: bool
    final_logit_softcap: float | None = None
    vocab_size: int | None = None  # None: any
    delta_nets: str | None = None  # as `delta_text` says them

    @classmethod
    def of(cls, architecture: str, spec: "DecoderSpec") -> Self:
        """Return the shape of a decoder."""
        is_bound = decoders.MODELS[architecture].is_bound_to_vocabulary
        rope = next(layer.rope for _, layer, _ in spec.attentions())
        return cls(
            architecture=architecture,
            hidden_size=spec.hidden_size,
            intermediate_size=spec.intermediate_size,
            layers=len(spec.layers),
            heads=spec.attention.heads,
            num_kv_heads=spec.attention.num_kv_heads,
            head_dim=spec.attention.head_dim,
            rope=rope_text(rope) if rope else "none",
            norm_epsilon=spec.norm.epsilon,
            is_tied=spec.is_tied,
            has_qkv_bias=spec.attention.has_qkv_bias,
            final_logit_softcap=spec.final_logit_softcap,
            vocab_size=spec.vocab_size if is_bound else None,
            delta_nets=delta_text(spec),
        )

    def differences(self, other: "Shape") -> Iterator[str]:
        """Yield where another shape differs, with both values."""
        for field in fields(self):
            ours, theirs = getattr(self, field.name), getattr(other, field.name)
            if ours != theirs:
                yield f"{field.name.removeprefix('is_').replace('_', ' ')} {theirs}, not {ours}"


def delta_text(spec: "DecoderSpec") -> str | None:
    """Return all that the delta nets of a decoder are, and where they are, on one line."""
    net = next((it.mixer for it in spec.layers if isinstance(it.mixer, DeltaNet)), None)
    return (
        f"{net.key_heads} keys of {net.key_head_dim}, {net.value_heads} values of "
        f"{net.value_head_dim}, {net.taps} taps, 1 of {decoders.full_attention_interval(spec)} "
        "attends"
        if net
        else None
    )


def rope_text(rope: Rope) -> str:
    """Return all that a rope is, on one line; long lists as a hash.

    >>> rope_text(Rope(width=64, theta=10000.0))
    '64 channels, theta 10000'
    """
    text = f"{rope.width} channels, theta {rope.theta:.12g}"
    match rope.scaling:
        case None:
            return text
        case LinearScaling(factor=factor):
            return f"{text}, linear {factor:g}"
        case Llama3Scaling() as scaling:
            return (
                f"{text}, llama3 {scaling.factor:g} ({scaling.low_frequency_factor:g} to "
                f"{scaling.high_frequency_factor:g}) from {scaling.original_context_tokens}"
            )
        case ProportionalScaling() as scaling:
            return f"{text}, proportional {scaling.factor:g} on {scaling.rotated_pairs} pairs"
        case YarnScaling() as scaling:
            return f"{text}, YaRN {scaling.factor:g} from {scaling.original_context_tokens}"
        case LongRopeScaling() as scaling:
            factors = json.dumps([scaling.short_factors, scaling.long_factors])
            digest = hashlib.sha256(factors.encode()).hexdigest()[:16]
            return f"{text}, longrope {digest} from {scaling.original_context_tokens}"


@dataclass(frozen=True, kw_only=True)
class Library:
    """One prebuilt library, as WebLLM lists it."""

    stem: str
    scheme: str
    shape: Shape
    webllm_version: str  # of the package that lists it, and that it works with
    directory_url: str
    prefill_chunk_tokens: int = PREFILL_CHUNK_TOKENS

    @property
    def name(self) -> str:
        """``Llama-3.2-1B-Instruct-q4f32_1_cs1k-webgpu.wasm``."""
        return f"{self.stem}-{self.scheme}_cs{self.prefill_chunk_tokens // 1024}k-webgpu.wasm"

    @property
    def url(self) -> str:
        """Where WebLLM loads it from."""
        return f"{self.directory_url}/{self.name}"


@functools.cache
def prebuilt() -> tuple[Library, ...]:
    """Return the libraries that are known."""
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    return tuple(
        Library(
            stem=entry["stem"],
            scheme=scheme,
            shape=_shape(entry),
            webllm_version=table["webllm_version"],
            directory_url=table["directory_url"],
        )
        for entry in table["library"]
        for scheme in entry["schemes"]
    )


def _shape(entry: Mapping[str, Any]) -> Shape:
    return Shape(**{f.name: entry[f.name] for f in fields(Shape) if f.name in entry})


def find(checkpoint: "CheckpointProtocol", scheme: str) -> Library | None:
    """Return the prebuilt library that runs a model as this scheme; None if there is none."""
    if not decoders.is_computed(checkpoint.architecture, checkpoint.spec):
        return None
    shape = _shape_of(checkpoint)
    fitting = (
        library for library in prebuilt() if (library.scheme, library.shape) == (scheme, shape)
    )
    return next(fitting, None)


def _shape_of(checkpoint: "CheckpointProtocol") -> Shape:
    spec = checkpoint.spec
    return Shape.of(decoders.model_type(checkpoint.architecture, spec), spec)


def missing(checkpoint: "CheckpointProtocol", scheme: str) -> str:
    """Return why no prebuilt library fits: what the nearest one has otherwise."""
    shape = _shape_of(checkpoint)
    same = [library for library in prebuilt() if library.shape == shape]
    if same:
        schemes = ", ".join(library.scheme for library in same)
        return f"no WebGPU library is prebuilt for {scheme}: {same[0].stem} has {schemes}"
    counted = [
        (list(shape.differences(other.shape)), other)
        for other in prebuilt()
        if other.scheme == scheme and other.shape.architecture == shape.architecture
    ]
    differences, nearest = min(counted, key=lambda pair: len(pair[0]), default=([], None))
    if nearest is None or len(differences) > MOST_DIFFERENCES:
        return f"no WebGPU library is prebuilt for a model of this shape as {scheme}"
    return (
        f"no WebGPU library is prebuilt for this shape: {nearest.name} has "
        f"{' and '.join(differences)}"
    )
