"""EXAONE 4: norms after attention and MLP and none before; positions only where windows are."""

from dataclasses import replace
from typing import Any

from edgekit.errors import UsageError
from edgekit.model.spec import DecoderSpec
from edgekit.source.config import Config
from edgekit.source.families import _common, gemma2, llama


DEFAULTS = _common.Defaults(num_kv_heads=32, norm_epsilon=1e-5)
SIZES = _common.sizes(
    vocab_size=102_400, hidden_size=4096, intermediate_size=16_384, layers=32, heads=32,
    context_tokens=2048,
)  # fmt: skip

source = gemma2.source  # calls the norms after attention and MLP the same


def describe(config: Config) -> DecoderSpec:
    """Read an EXAONE 4 config."""
    config.expect(attention_bias=False, mlp_bias=False)
    spec = llama.read(config, DEFAULTS)
    window = config.optional_integer("sliding_window", absent=4096)
    kinds = _read_kinds(config, window)
    layers = _common.with_windows(config, spec.layers, kinds, window)
    return replace(
        spec,
        attention=replace(spec.attention, query_key_norm=spec.norm),
        has_pre_norms=False,
        has_post_norms=True,
        # Without a window anywhere, every layer has positions.
        layers=spec.layers if window is None else _common.without_full_ropes(layers),
    )


def _read_kinds(config: Config, window: int | None) -> list[_common.LayerKind]:
    if window is None:
        config.ignore("sliding_window_pattern")  # saved as 0 then
        usual = _common.every_nth_full(config, None)
    elif letters := config.text("sliding_window_pattern"):
        usual = _spelled(config, letters)
    else:
        every = config.optional_integer("sliding_window_pattern", absent=4)
        usual = _common.every_nth_full(config, every)
    return _common.read_layer_kinds(config, usual)


def _spelled(config: Config, letters: str) -> list[_common.LayerKind]:
    """Return the kinds of a pattern as the first files spell it: LLLG."""
    config.ignore("sliding_window_pattern")
    kinds: dict[str, _common.LayerKind] = {"L": "sliding_attention", "G": "full_attention"}
    if not kinds.keys() >= set(letters):
        raise UsageError(
            f"{config.origin}: sliding_window_pattern = {letters!r}, expected a number, or "
            "letters L and G"
        )
    depth = config.integer("num_hidden_layers", most=_common.MOST_LAYERS)
    return [kinds[letters[index % len(letters)]] for index in range(depth)]


def config(spec: DecoderSpec) -> dict[str, Any]:
    """Return the EXAONE 4 config of a decoder."""
    fields = llama.write(spec, model_type="exaone4", architecture="Exaone4ForCausalLM")
    return fields | _common.write_layer_kinds(spec)
