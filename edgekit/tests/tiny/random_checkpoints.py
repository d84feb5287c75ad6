"""Tiny checkpoints made without torch and transformers, for tests that ask no other program."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.doctor import _RandomTensor, _tiny_checkpoint
from edgekit.model.norm import Norm
from edgekit.model.spec import Layer
from edgekit.source import families
from edgekit.source.checkpoint import Checkpoint


if TYPE_CHECKING:
    from edgekit.model.spec import DecoderSpec


GEMMA2: dict[str, Any] = {
    "norm": Norm(kind="rms", epsilon=1e-6, unit_offset=True),
    "has_post_norms": True,
}


def random_checkpoint(
    directory: Path,
    architecture: str = "llama",
    *,
    layers: int | tuple[Layer, ...] = 2,
    **changes: Any,
) -> Checkpoint:
    """Return a decoder of random numbers, nothing of which but the tokenizer is a file.

    Args:
        directory: Gets the files of a tokenizer that reads single bytes.
        architecture: Whose tensor names it has.
        layers: Their number, if all are alike.
        changes: Of the fields of `DecoderSpec`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    plain = _tiny_checkpoint(directory)
    made = plain.spec.layers[:1] * layers if isinstance(layers, int) else layers
    spec: DecoderSpec = replace(plain.spec, layers=made, **changes)
    family = families.get(architecture)
    tensors: dict[str, Any] = {}
    for seed, (role, shape) in enumerate(spec.weights()):
        source = family.source(role, spec)
        stored = (shape[0], 1, *shape[1:]) if source.is_depthwise else shape
        tensors[source.tensor] = _RandomTensor(stored, seed)
    return replace(plain, architecture=architecture, spec=spec, tensors=tensors)
