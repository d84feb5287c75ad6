"""What a compiled library is bound to, and the key under which it is kept."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from edgekit.errors import UsageError
from edgekit.formats.mlc import decoder_file, decoders, names, packing
from edgekit.formats.mlc.packing import PackedTensor, Scheme
from edgekit.model.shapes import Shape
from edgekit.model.spec import DecoderSpec


@dataclass(frozen=True, kw_only=True)
class StoredWeight:
    """A parameter of the model, and the tensors that hold it."""

    name: str
    shape: Shape
    tensor_type: str
    tensors: tuple[PackedTensor, ...]
    is_transposed: bool

    @property
    def groups(self) -> packing.Groups | None:
        """How it is packed, None if its numbers lie as they are."""
        return packing.GROUPS.get(self.tensor_type)


@dataclass(frozen=True, kw_only=True)
class LibraryShape:
    """A decoder and how it is stored: every fine-tune of the same shape shares a library."""

    architecture: str  # the one of MLC's models that names the weights
    spec: DecoderSpec  # as the library computes it
    scheme_name: str

    @classmethod
    def of(
        cls, architecture: str, spec: DecoderSpec, scheme_name: str, *, context_tokens: int
    ) -> "LibraryShape":
        """Return the shape of an artifact's library.

        Args:
            architecture: Which of MLC's models names the weights.
            spec: What the checkpoint computes.
            scheme_name: How the weights are stored.
            context_tokens: How long texts are at most: what none reaches is not in the shape.

        Raises:
            UsageError: If its layers look back by different lengths: the cache has room for one.
        """
        computed = decoders.computed(architecture, spec.within(context_tokens))
        windows = {layer.window_tokens for layer in computed.layers} - {None}
        if len(windows) > 1:
            raise UsageError(
                f"MLC's cache has one window for all layers, the decoder {len(windows)}",
                hint="another format has it: --format gguf",
            )
        return cls(
            architecture=architecture,
            spec=replace(computed, context_tokens=0),
            scheme_name=scheme_name,
        )

    @property
    def scheme(self) -> Scheme:
        """How its weights are stored."""
        return packing.SCHEMES[self.scheme_name]

    @property
    def dtype(self) -> str:
        """What it computes in."""
        return self.scheme.dtype

    @property
    def window_tokens(self) -> int | None:
        """How far its windowed layers look back; the cache has one such length."""
        windows = (layer.window_tokens for layer in self.spec.layers)
        return next(filter(None, windows), None)

    @cached_property
    def weights(self) -> Mapping[str, StoredWeight]:
        """By role; several roles may share one. A second copy of the embedding is not needed."""
        recipe, by_role = packing.RECIPES[self.scheme_name], dict[str, StoredWeight]()
        for parameter in names.parameters(self.architecture, self.spec).values():
            if parameter.is_copy:
                continue
            tensor_type = recipe.tensor_type_for(parameter.roles[0], self.spec)
            weight = StoredWeight(
                name=parameter.name,
                shape=parameter.shape,
                tensor_type=tensor_type,
                tensors=tuple(packing.tensors(parameter, tensor_type, self.scheme)),
                is_transposed=packing.is_transposed(parameter, tensor_type, self.scheme),
            )
            by_role |= dict.fromkeys(parameter.roles, weight)
        return by_role

    @cached_property
    def tensors(self) -> tuple[PackedTensor, ...]:
        """Every tensor, in the order in which the library takes them."""
        weights = {weight.name: weight for weight in self.weights.values()}
        return tuple(tensor for weight in weights.values() for tensor in weight.tensors)

    def key(self, *more: str) -> str:
        """Return a hash over all that a library depends on, with what else is named."""
        said = [self.architecture, self.scheme_name, decoder_file.fields(self.spec), *more]
        text = json.dumps(said, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()
