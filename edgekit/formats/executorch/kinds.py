"""What a decoder has beyond layers that are all alike and attend; not every back-end computes it.

Each is a phrase that ends the sentence of who has none.
"""

from collections.abc import Iterator

from edgekit.errors import UsageError
from edgekit.model.mixers import Attention, DeltaNet, ShortConv
from edgekit.model.spec import DecoderSpec


SHORT_CONVOLUTIONS = "gated short convolutions"
DELTA_NETS = "gated delta nets"
OUTPUT_GATES = "gates on what attention gives"
HEAD_GATES = "gates on heads"
OWN_ATTENTION = "layers whose attention has another shape than that of the others"
SHARED_CACHES = "layers that read the keys and values of an earlier one"
VALUE_NORMS = "norms of values"
KEYS_AS_VALUES = "values that are keys"
OWN_MLPS = "layers whose MLP is wider or narrower than that of the others"
LAYER_EMBEDDINGS = "embeddings for each layer"
LAYER_SCALES = "scales of layers"


def refuse(spec: DecoderSpec, name: str, *, hint: str) -> None:
    """Check that a decoder has nothing that only some back-ends compute.

    Args:
        spec: The decoder.
        name: Of the back-end, for people.
        hint: What else a user may do.

    Raises:
        UsageError: If it has; it names the first such kind, and a layer of it.
    """
    for kind, layer in kinds(spec):
        where = "" if layer is None else f" (the first is layer {layer})"
        raise UsageError(f"edgekit writes no {kind} for {name} in ExecuTorch{where}", hint=hint)


def refuse_experts(spec: DecoderSpec) -> None:
    """Check that no token chooses what computes it: no back-end has a product for that.

    Raises:
        UsageError: If one does.
    """
    for index in range(len(spec.layers)):
        if spec.mlp(index).experts:
            raise UsageError(
                "ExecuTorch 1.5 has no product that takes other matrices for each token: its "
                "kernels would copy all that a token takes, in float32, for every token of a "
                f"prompt; so edgekit writes no layers with experts (the first is layer {index})",
                hint="another format has them: --format gguf, or onnx",
            )


def kinds(spec: DecoderSpec) -> Iterator[tuple[str, int | None]]:
    """Yield what a decoder has, and the first layer that has it; None: all have."""
    found: dict[str, int] = {}
    for index in range(len(spec.layers)):
        for kind in _of_layer(spec, index):
            found.setdefault(kind, index)
    yield from found.items()
    if spec.layer_embedding is not None:
        yield LAYER_EMBEDDINGS, None
    if spec.has_layer_scales:
        yield LAYER_SCALES, None


def _of_layer(spec: DecoderSpec, index: int) -> Iterator[str]:
    mixer = spec.mixer(index)
    match mixer:
        case ShortConv():
            yield SHORT_CONVOLUTIONS
        case DeltaNet():
            yield DELTA_NETS
        case Attention():
            yield from _of_attention(spec, mixer)
    if spec.mlp(index) != spec.mlp(0):
        yield OWN_MLPS


def _of_attention(spec: DecoderSpec, mixer: Attention) -> Iterator[str]:
    if not mixer.has_cache:
        yield SHARED_CACHES
    if mixer.has_output_gate:
        yield OUTPUT_GATES
    if mixer.has_head_gate:
        yield HEAD_GATES
    if mixer.value_norm_epsilon is not None:
        yield VALUE_NORMS
    if mixer.values_are_keys:
        yield KEYS_AS_VALUES
    _, _, first = next(spec.attentions())
    if mixer.has_cache and mixer != first:
        yield OWN_ATTENTION
