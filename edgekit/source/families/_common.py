"""What the configs of all families have in common, as transformers 5 and 4 write it.

A field that is absent has the value transformers gives it, which differs by family: `Defaults`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from edgekit.errors import UsageError
from edgekit.model.mixers import Attention
from edgekit.model.norm import Norm
from edgekit.model.rope import Rope
from edgekit.model.spec import DecoderSpec, Layer, Source
from edgekit.source.config import Config


LayerKind = Literal["full_attention", "sliding_attention"]
K = TypeVar("K", bound=str)

MOST_LAYERS = 1024  # no small model comes near; a damaged config must not fill the memory


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What transformers assumes where a family's config is silent."""

    num_kv_heads: int | None = None  # None: as many as heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    is_tied: bool = False
    norm_epsilon: float = 1e-6


def sizes(  # noqa: PLR0913 - the fields of a config
    *,
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    layers: int,
    heads: int,
    context_tokens: int,
) -> dict[str, int]:
    """Return what transformers takes where the section of a wrapper leaves out a size.

    A config of its own must say them: there, silence is more likely a damaged file.
    """
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": context_tokens,
    }


def read_head_width(config: Config, defaults: Defaults) -> int:
    """Return how wide a head is.

    Raises:
        UsageError: If the config leaves it to a division with a remainder.
    """
    width = config.optional_integer("head_dim", absent=defaults.head_dim)
    if width is not None:
        return width
    heads, hidden = config.integer("num_attention_heads"), config.integer("hidden_size")
    if hidden % heads:
        raise UsageError(
            f"{config.origin}: hidden_size = {hidden} is not a multiple of {heads} heads"
        )
    return hidden // heads


def read_decoder(config: Config, defaults: Defaults, *, rope: Rope | None) -> DecoderSpec:
    """Read what every family spells alike: sizes, heads, RMS norms, tying; ``rope`` everywhere."""
    return DecoderSpec(
        vocab_size=config.integer("vocab_size"),
        hidden_size=config.integer("hidden_size"),
        intermediate_size=config.integer("intermediate_size"),
        context_tokens=config.integer("max_position_embeddings"),
        layers=(Layer(rope=rope),) * config.integer("num_hidden_layers", most=MOST_LAYERS),
        attention=_read_heads(config, defaults),
        norm=Norm(kind="rms", epsilon=config.number("rms_norm_eps", defaults.norm_epsilon)),
        is_tied=config.get("tie_word_embeddings", defaults.is_tied),
    )


def _read_heads(config: Config, defaults: Defaults) -> Attention:
    heads = config.integer("num_attention_heads")
    absent = defaults.num_kv_heads
    num_kv_heads = config.optional_integer("num_key_value_heads", absent=absent) or heads
    if heads % num_kv_heads:
        raise UsageError(
            f"{config.origin}: {heads} attention heads cannot share {num_kv_heads} "
            "key and value heads evenly"
        )
    width = read_head_width(config, defaults)
    return Attention(
        heads=heads, num_kv_heads=num_kv_heads, head_dim=width, softmax_scale=width**-0.5
    )


def every_nth_full(config: Config, n: int | None) -> list[LayerKind]:
    """Return the kinds of layers of which every n-th sees everything; None: all do."""
    return [
        "full_attention" if not n or (index + 1) % n == 0 else "sliding_attention"
        for index in range(config.integer("num_hidden_layers", most=MOST_LAYERS))
    ]


def read_layer_kinds(config: Config, otherwise: Sequence[LayerKind]) -> list[LayerKind]:
    """Return each layer's kind: of ``layer_types`` where it is there, else ``otherwise``.

    Raises:
        UsageError: As `read_kinds`.
    """
    return read_kinds(config, otherwise, known=("full_attention", "sliding_attention"))


def read_kinds(config: Config, otherwise: Sequence[K], *, known: Sequence[K]) -> list[K]:
    """Return each layer's kind: of ``layer_types`` where it is there, else ``otherwise``.

    Raises:
        UsageError: If a kind is not ``known``, or there are more or fewer kinds than layers.
    """
    kinds = config.get("layer_types", list[K]()) or list(otherwise)
    if len(kinds) != len(otherwise):
        raise UsageError(
            f"{config.origin}: layer_types names {len(kinds)} layers, the model has "
            f"{len(otherwise)}"
        )
    for kind in kinds:
        if kind not in known:
            raise UsageError(
                f"{config.origin}: layer_types has {kind!r}, and layers of that type are not "
                "supported",
                hint=f"supported: {', '.join(known)}",
            )
    return kinds


def with_windows(
    config: Config, layers: tuple[Layer, ...], kinds: Sequence[LayerKind], window: int | None
) -> tuple[Layer, ...]:
    """Return the layers with ``window`` on those of kind ``sliding_attention``.

    Raises:
        UsageError: If a layer slides and there is no window.
    """
    if window is None and "sliding_attention" in kinds:
        raise UsageError(f"{config.origin}: a layer has sliding attention, but there is no window")
    return tuple(
        replace(layer, window_tokens=window if kind == "sliding_attention" else None)
        for layer, kind in zip(layers, kinds, strict=True)
    )


def without_full_ropes(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """Return the layers with positions only where there is a window (EXAONE 4, Command R7B)."""
    return tuple(layer if layer.window_tokens else replace(layer, rope=None) for layer in layers)


def write_decoder(
    spec: DecoderSpec, *, model_type: str, architecture: str, epsilon: str = "rms_norm_eps"
) -> dict[str, Any]:
    """Return the fields that `read_decoder` reads; ``epsilon`` is the name of that of the norms.

    The special tokens are null until someone who has the tokenizer says otherwise: absent, they
    would be those of the family's first model.
    """
    return {
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": len(spec.layers),
        "num_attention_heads": spec.attention.heads,
        "num_key_value_heads": spec.attention.num_kv_heads,
        "head_dim": spec.attention.head_dim,
        "max_position_embeddings": spec.context_tokens,
        epsilon: spec.norm.epsilon,
        "tie_word_embeddings": spec.is_tied,
    }


def write_layer_kinds(spec: DecoderSpec) -> dict[str, Any]:
    """Return the fields that say which layers have a window, and which."""
    windows = [layer.window_tokens for layer in spec.layers]
    return {
        "sliding_window": next((window for window in windows if window is not None), None),
        "layer_types": [
            "full_attention" if window is None else "sliding_attention" for window in windows
        ],
    }


def shortest(guess: float, is_right: Callable[[float], bool]) -> float:
    """Return the shortest decimal near ``guess`` that is right; ``guess`` if none is.

    A config says 0.015625 where a decoder has what that makes of a head's width.
    """
    candidates = (float(f"{guess:.{digits}g}") for digits in range(1, 18))
    return next(filter(is_right, candidates), guess)


def side_by_side(source: Source, role: str, spec: DecoderSpec) -> Source:
    """Return a source of a family that rotates neighbouring channels together."""
    return replace(source, neighbours=spec.rotated_pairs(role))


def fused_mlp(role: str, spec: DecoderSpec, *, tensor: str) -> Source | None:
    """Return where gate and up live if both are in one ``tensor`` of a layer, gate first."""
    layer, _, part = role.rpartition(".")
    width = spec.intermediate_size
    first_rows = {"gate": 0, "up": width}
    if part not in first_rows:
        return None
    return Source(f"model.{layer}.{tensor}.weight", first_rows[part], width)
