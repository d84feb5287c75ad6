"""A decoder among the tensors of a checkpoint: under which names, and with which head."""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from edgekit.errors import UsageError
from edgekit.model.checkpoint_protocol import Tensor, row_chunks
from edgekit.model.spec import DecoderSpec
from edgekit.source import families, names
from edgekit.source.made_tensors import narrow, stored_dtype
from edgekit.source.names import Naming


# Tables that older transformers stored next to the weights; they are computed, never read.
_COMPUTED_TENSORS = ("rotary_emb.inv_freq", "self_attn.bias", "self_attn.masked_bias")
_FLOATS = {"F64", "F32", "F16", "BF16"}
_EXTRA_HEADS = "mtp."  # multi-token prediction: a second, small decoder that drafts


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """The decoder's own tensors, under transformers' names, and what they say about its head."""

    spec: DecoderSpec
    tensors: Mapping[str, Tensor]
    naming: Naming
    notes: tuple[str, ...]


def find(
    stored: Mapping[str, Tensor],
    spec: DecoderSpec,
    *,
    architecture: str,
    directory: Path,
    wrapper: str | None,
) -> Decoder:
    """Find a decoder among what the files hold.

    Args:
        stored: Every tensor of the checkpoint, by its stored name.
        spec: What the config says.
        architecture: The decoder's family.
        directory: The checkpoint, for messages.
        wrapper: The model_type of the model around it; what belongs to that is left out.

    Raises:
        UsageError: If only a part of the decoder is under the prefix that the rest has.
    """
    family, untied = families.get(architecture), replace(spec, is_tied=False)
    embedding, head = ends_of(architecture, spec)
    stored = {families.own_name(architecture, name): it for name, it in stored.items()}
    sources = (family.source(role, untied) for role, _ in untied.weights())
    inner = {name for source in sources for name in source.tensors} - {head}
    # A tied decoder may be stored with its head alone.
    has_embedding = any(name.endswith(embedding.rpartition("model.")[2]) for name in stored)
    naming = names.find(
        stored,
        inner=inner if has_embedding or not spec.is_tied else inner - {embedding},
        head=head,
        origin=str(directory),
    )
    own: dict[str, Tensor] = {}
    beside: list[str] = []
    for name, tensor in stored.items():
        own_name = naming.own(name)
        if (own_name or name).endswith(_COMPUTED_TENSORS):
            continue
        if own_name is None and (wrapper or name.startswith(_EXTRA_HEADS)):
            beside.append(name)
        else:
            own[own_name or name] = tensor
    own = _without_constants(own, families.constants(architecture, spec), directory)
    unread = set(families.leftovers(architecture, spec)).intersection(own)
    own = {name: tensor for name, tensor in own.items() if name not in unread}
    own, wide_notes = _narrowed(own)
    spec, own, tied_notes = _with_head(spec, own, embedding=embedding, head=head)
    return Decoder(
        spec=spec,
        tensors=own,
        naming=naming,
        notes=(
            *(() if wrapper else names.notes(naming)),
            *_beside(beside, wrapper),
            *_unread(unread),
            *wide_notes,
            *tied_notes,
        ),
    )


def _without_constants(
    tensors: Mapping[str, Tensor], constants: Mapping[str, float], directory: Path
) -> dict[str, Tensor]:
    """Take away tensors of one number that the family's decoders have built in.

    Raises:
        UsageError: If one holds another number, not rounded to bfloat16 or float16 either.
    """
    rest = dict(tensors)
    for name, expected in constants.items():
        if (tensor := rest.pop(name, None)) is None:
            continue
        if math.prod(tensor.shape) != 1 or stored_dtype(tensor) not in _FLOATS:
            raise UsageError(
                f"{name} in {directory} has shape {list(tensor.shape)} and dtype "
                f"{stored_dtype(tensor)}, expected one number"
            )
        if not math.isclose(found := tensor.read().item(), expected, rel_tol=2**-8, abs_tol=2**-25):
            raise UsageError(f"{name} in {directory} holds {found:g}, expected {expected:g}")
    return rest


def ends_of(architecture: str, spec: DecoderSpec) -> tuple[str, str]:
    """Return the tensors that token ids look up and that give the logits, tied or not."""
    family, untied = families.get(architecture), replace(spec, is_tied=False)
    embedding, head = (
        family.source(role, untied).tensor for role in ("token_embedding", "output_head")
    )
    return embedding, head


def _narrowed(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Read float64 as float32, and say so."""
    read = {name: narrow(tensor) for name, tensor in tensors.items()}
    count = sum(read[name] is not tensor for name, tensor in tensors.items())
    note = f"{count} tensors are stored in float64 and read as float32"
    return read, (note,) if count else ()


def _unread(names: Collection[str]) -> Iterator[str]:
    if names:
        yield f"{len(names)} tensors are left out that the model does not read, {min(names)} first"


def _beside(left_out: Collection[str], wrapper: str | None) -> Iterator[str]:
    if left_out:
        around = f" of {wrapper}" if wrapper else ""
        yield (
            f"the text model{around} alone is exported, without {', '.join(names.groups(left_out))}"
        )


def _with_head(
    spec: DecoderSpec, tensors: dict[str, Tensor], *, embedding: str, head: str
) -> tuple[DecoderSpec, dict[str, Tensor], tuple[str, ...]]:
    """Return which matrix gives the logits where config and files disagree, as transformers 5.

    Source: ``tie_weights`` in modeling_utils.py of transformers 5.24.
    """
    if not spec.is_tied or head not in tensors:
        return spec, tensors, ()
    rest = {name: tensor for name, tensor in tensors.items() if name != head}
    if embedding not in tensors:
        note = f"the config ties {head} to {embedding}, and only {head} is stored: it is both"
        return spec, rest | {embedding: tensors[head]}, (note,)
    if _are_equal(tensors[embedding], tensors[head]):
        return spec, rest, ()
    note = (
        f"the config ties {head} to {embedding}, but another {head} is stored: that one counts, as "
        "in transformers"
    )
    return replace(spec, is_tied=False), tensors, (note,)


def _are_equal(one: Tensor, other: Tensor) -> bool:
    """Tell whether two matrices hold the same numbers; those that differ do so at once."""
    import numpy as np

    if one.shape != other.shape:
        return False
    return all(
        np.array_equal(one.read(first, count), other.read(first, count), equal_nan=True)
        for first, count in row_chunks(one.shape)
    )
