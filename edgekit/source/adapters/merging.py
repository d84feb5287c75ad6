"""Adapters: a base and a PEFT directory become a checkpoint of merged tensors.

Only headers are read here; a delta is computed when its tensor is read, for the rows that are
asked for. So an adapter that does not fit its base is refused at once, and nothing after this
module knows that there was one.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NoReturn

from edgekit.encodings.files import is_file
from edgekit.encodings.hashing import sha256_of_all
from edgekit.encodings.json_files import read_object_if_there
from edgekit.errors import UsageError
from edgekit.model.checkpoint_protocol import Tensor
from edgekit.model.shapes import Shape
from edgekit.model.spec import EXPERT_MATRICES, DecoderSpec
from edgekit.model.tokenizer_files import added_tokens
from edgekit.source import families
from edgekit.source.adapters import adapter_config, by_peft, mlx, names
from edgekit.source.adapters import text as adapter_text
from edgekit.source.adapters.adapter_config import AdapterSettings
from edgekit.source.adapters.text import AdapterText
from edgekit.source.checkpoint import FLOATS, AdapterRecord, Checkpoint, read_safetensors
from edgekit.source.config import Config
from edgekit.source.decoder_tensors import ends_of
from edgekit.source.made_tensors import (
    ColumnMagnitudes,
    EmbeddingUpdate,
    LowRankUpdate,
    ReplacedRows,
    RowMagnitudes,
    Sum,
    Twin,
    WithoutFirstColumns,
    WithoutPrincipal,
    Zeros,
    narrow,
    stored_dtype,
)
from edgekit.source.names import Naming, bare


WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT wraps the model twice
_LOW_RANK = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
_INDICES = ("I32", "I64")  # what sparse kinds store next to their values
_OTHER = "other"  # what only PEFT knows the meaning of
_ORIGINAL = "original_module."  # the base's own parameter, next to one that replaces it
_REPACKAGED = re.compile(
    r"(?:[-_.](?:unsloth|bnb|gptq|awq|hf|gguf|fp16|bf16|\d-?bit|int[48]|q\d\w*))+$", re.IGNORECASE
)
_QUANTIZED_BASE = re.compile(r"4bit|8bit|bnb|gptq|awq|int4|int8", re.IGNORECASE)

Parts = Mapping[str, Tensor]  # what the file holds for one module, by kind


@dataclass(frozen=True, kw_only=True)
class _Fit:
    """An adapter next to the base it is to be merged into."""

    base: Checkpoint
    settings: AdapterSettings
    path: Path  # of the adapter's weights
    parts: Mapping[str, Parts]  # by module
    keys: Mapping[str, str]  # PEFT's own names of the tensors in the file, by those they have
    others: tuple[str, ...]  # modules of what is not the decoder
    is_wide: bool  # some tensors are float64
    embedding: str  # the tensor that token ids look up
    head: str  # the tensor that gives the logits, also where the two are tied

    @property
    def name(self) -> str:
        return self.path.parent.resolve().name

    def is_embedding(self, module: str) -> bool:
        """Tell whether a module is the token embedding or the output head."""
        return f"{module}.weight" in (self.embedding, self.head)


def merge(base: Checkpoint, directory: Path) -> Checkpoint:
    """Return the checkpoint whose tensors are those of ``base`` with an adapter added.

    Merging twice stacks two adapters: the second sees the base with the first one in it.

    Raises:
        UsageError: If the adapter is damaged, of a kind edgekit does not merge, or made for
            another base; the message says what was found and what was expected.
    """
    fit = _open(base, directory)
    base = fit.base
    tensors: dict[str, Tensor] = dict(base.tensors)
    if base.spec.is_tied:
        tensors[fit.head] = tensors[fit.embedding]
    _refuse_other_targets(fit, tensors)
    _replace_whole(fit, tensors)
    _replace_token_rows(fit, tensors)
    _add_updates(fit, tensors)
    _merge_by_peft(fit, tensors)
    spec = _spec_of(fit, tensors)
    text = _text_of(fit, vocabulary=spec.vocab_size)
    record = _record_of(fit, spec, text)
    merged = replace(base, spec=spec, tensors=tensors, text=text.files, adapter=record)
    merged.refuse_mismatch()
    return merged


def _open(base: Checkpoint, directory: Path) -> _Fit:
    if mlx.is_one(directory):
        return _open_mlx(base, directory)
    settings = adapter_config.read(directory)
    base = _replicated(base, settings)
    path = directory / WEIGHTS
    if not is_file(path):
        raise UsageError(
            f"{directory} has no {WEIGHTS}",
            hint="edgekit never opens pickles: load it with PEFT and save_pretrained() it again"
            if (directory / "adapter_model.bin").exists()
            else "pass the directory that PEFT's save_pretrained wrote",
        )
    embedding, head = ends_of(base.architecture, base.spec)
    if settings.is_merged_by_peft:
        return _open_for_peft(base, settings, path)
    stored = _read_file(path)
    naming = _naming({_parse(key, path)[0] for key in stored}, base)
    keys = {key: _own_key(key, path, naming, base.architecture) for key in stored}
    named = {own: stored[key] for key, own in keys.items() if own is not None}
    if len(named) < sum(own is not None for own in keys.values()):
        raise UsageError(f"{path} holds a tensor twice, with and without a wrapper in its name")
    return _Fit(
        base=base,
        settings=replace(settings, naming=naming),
        path=path,
        parts=_parts(named, path),
        keys={key: own for key, own in keys.items() if own is not None},
        others=tuple(dict.fromkeys(_parse(key, path)[0] for key in keys if keys[key] is None)),
        is_wide=any(stored_dtype(it) == "F64" for it in stored.values()),
        embedding=embedding,
        head=head,
    )


def _replicated(base: Checkpoint, settings: AdapterSettings) -> Checkpoint:
    """Return a base with its layers in the order, and as often, as the adapter's config says."""
    if not settings.replicated:
        return base
    depth = len(base.spec.layers)
    order = [layer for first, end in settings.replicated for layer in range(first, end)]
    if max(order) >= depth:
        raise UsageError(
            f"{settings.origin}: layer_replication asks for layer {max(order)}, "
            f"{base.directory} has {depth}",
            hint=f"the adapter was made for {settings.base_model!r}",
        )
    tensors = {name: it for name, it in base.tensors.items() if _layer_of(name) is None}
    for layer, own in enumerate(order):
        tensors |= {
            name.replace(f".layers.{own}.", f".layers.{layer}."): tensor
            for name, tensor in base.tensors.items()
            if _layer_of(name) == own
        }
    layers = tuple(base.spec.layers[layer] for layer in order)
    return replace(base, spec=replace(base.spec, layers=layers), tensors=tensors)


def _open_for_peft(base: Checkpoint, settings: AdapterSettings, path: Path) -> _Fit:
    """Return an adapter of which edgekit reads whole weights, and PEFT the rest."""
    stored = _read_file(path, *_INDICES)
    embedding, head = ends_of(base.architecture, base.spec)
    modules = {name.rpartition(".")[0] for name in base.tensors} | {head.removesuffix(".weight")}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in stored.items():
        name = bare(key)
        module = _longest_beginning(name, modules)
        rest = name.removeprefix(module).removeprefix(".").removeprefix("base_layer.")
        if not module and _layer_of(f".{name}") is not None:
            raise UsageError(
                f"{path} changes {name}, which {base.directory} does not have",
                hint=f"the adapter was made for {settings.base_model!r}",
            )
        if module:
            kind = rest if rest in ("weight", "bias") else _OTHER
            parts.setdefault(module, {})[kind] = narrow(tensor)
    return _Fit(
        base=base,
        settings=settings,
        path=path,
        parts=parts,
        keys={key: key if key.startswith("base_model.") else PREFIX + bare(key) for key in stored},
        others=(),
        is_wide=any(stored_dtype(it) == "F64" for it in stored.values()),
        embedding=embedding,
        head=head,
    )


def _longest_beginning(name: str, modules: set[str]) -> str:
    """Return the module that a tensor's name begins with, "" if there is none."""
    parts = name.split(".")
    candidates = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((it for it in candidates if it in modules), "")


def _open_mlx(base: Checkpoint, directory: Path) -> _Fit:
    path, adapter = directory / mlx.WEIGHTS, mlx.read(directory)
    embedding, head = ends_of(base.architecture, base.spec)
    stored = _read_file(path)
    naming = _naming({mlx.split(key, path)[0] for key in stored}, base)
    parts: dict[str, dict[str, Tensor]] = {}
    others = []
    for key, tensor in stored.items():
        module, kind = mlx.split(key, path)
        own = naming.own(families.own_name(base.architecture, module))
        if own is None:
            others.append(module)
            continue
        is_embedding = f"{own}.weight" == embedding
        kind, it = mlx.in_peft_form(kind, narrow(tensor), is_embedding=is_embedding)
        parts.setdefault(own, {})[kind] = it
    mlx.refuse_other_layers(adapter, list(parts), depth=len(base.spec.layers), path=path)
    return _Fit(
        base=base,
        settings=mlx.settings(adapter, parts),
        path=path,
        parts=parts,
        keys={},
        others=tuple(dict.fromkeys(others)),
        is_wide=any(stored_dtype(it) == "F64" for it in stored.values()),
        embedding=embedding,
        head=head,
    )


def _naming(modules: set[str], base: Checkpoint) -> Naming:
    head = ends_of(base.architecture, base.spec)[1].removesuffix(".weight")
    inner = {name.rpartition(".")[0] for name in base.tensors} - {head}
    own = {families.own_name(base.architecture, module) for module in modules}
    return names.find(own, base=inner, head=head)


def _read_file(path: Path, *dtypes: str) -> dict[str, Tensor]:
    stored = dict[str, Tensor](read_safetensors(path, dtypes=(*FLOATS, "F64", *dtypes)))
    if not stored:
        raise UsageError(f"{path} holds no tensor")
    if empty := [name for name, tensor in stored.items() if 0 in tensor.shape]:
        raise UsageError(
            f"{path} holds {len(empty)} empty tensors, {empty[0]} among them, as ZeRO-3 of "
            "DeepSpeed leaves them where each process keeps a part",
            hint="save it from the training with the parameters gathered "
            "(stage3_gather_16bit_weights_on_model_save)",
        )
    return stored


def _own_key(key: str, path: Path, naming: Naming, architecture: str) -> str | None:
    """Return PEFT's own name of a tensor; None if it is not the decoder's."""
    module, _ = _parse(key, path)
    own = naming.own(families.own_name(architecture, module))
    return None if own is None else PREFIX + own + bare(key).removeprefix(module)


def _parts(named: Mapping[str, Tensor], path: Path) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in named.items():
        module, kind = _parse(key, path)
        of_module = parts.setdefault(module, {})
        if kind in of_module:
            raise UsageError(f"{path} holds {kind} of {module} twice, the second time as {key}")
        of_module[kind] = narrow(tensor)
    for module, of_module in parts.items():
        _join_copies(of_module, f"{path} holds two versions of {module}")
        for kind in of_module:
            if kind.startswith(_ORIGINAL) and kind.removeprefix(_ORIGINAL) not in of_module:
                raise UsageError(f"{path} holds {kind} of {module} and not what replaces it")
    return parts


def _join_copies(parts: dict[str, Tensor], complaint: str) -> None:
    """Make one of what PEFT writes twice where a saved module was also resized."""
    for kind in ("weight", "bias"):
        if copy := parts.pop(f"modules_to_save.{kind}", None):
            one = parts.get(kind)
            parts[kind] = Twin(base=one, other=copy, complaint=complaint) if one else copy


def _parse(key: str, path: Path) -> tuple[str, str]:
    """Split a name of the file into the module and what of it this is.

    The kinds are those of `_LOW_RANK`, ``lora_B.bias``, ``tokens``, ``weight`` and ``bias`` for a
    parameter of the module itself, and these two after ``modules_to_save.`` or
    ``original_module.``. Names with and without the adapter's own name (``lora_A.default.weight``,
    ``lora_A.weight``) mean the same.
    """
    name = bare(key)
    tokens = r"(.+?)(?:\.token_adapter)?\.trainable_tokens_delta(\.[^.]+)?"
    if match := re.fullmatch(tokens, name):
        return match[1], "tokens"
    low_rank = rf"(.+?)\.({'|'.join(_LOW_RANK)})(\.(?!weight$|bias$)[^.]+)?(\.weight|\.bias)?"
    if match := re.fullmatch(low_rank, name):
        return match[1], match[2] + (".bias" if match[4] == ".bias" else "")
    copy = r"(?:(modules_to_save\.|original_module\.)(?:default\.)?)?"
    wrapped = rf"(.+?)(?:\.token_adapter)?(?:\.base_layer)?\.{copy}(weight|bias)"
    if match := re.fullmatch(wrapped, name):
        return match[1], (match[2] or "") + match[3]
    raise UsageError(
        f"{path} holds {key}, which is not part of a LoRA adapter",
        hint=f"supported: {adapter_config.SUPPORTED}",
    )


def _refuse_other_targets(fit: _Fit, tensors: Mapping[str, Tensor]) -> None:
    """Check that the file has low-rank updates for the modules of the config, and no others."""
    targeted = _targeted(fit, tensors)
    _refuse_experts(fit)
    if fit.settings.is_merged_by_peft and not any(map(_is_updated, fit.parts.values())):
        return  # one vector for all modules
    embedding, head = (name.removesuffix(".weight") for name in (fit.embedding, fit.head))
    is_kept = fit.settings.keeps_tie and not fit.settings.is_of_mlx
    if is_kept and fit.base.spec.is_tied and embedding in targeted:
        targeted.add(head)
    found = {module for module, parts in fit.parts.items() if _is_updated(parts)}
    if missing := sorted(targeted - found):
        _refuse_missing(fit, missing, found)
    for module in sorted(found - targeted):
        _refuse_unknown(fit, module, tensors)
        raise UsageError(
            f"{fit.path} holds an update of {module}, which {fit.settings.origin} does not target",
            hint="the two files belong to different adapters",
        )


def _targeted(fit: _Fit, tensors: Mapping[str, Tensor]) -> set[str]:
    """Return the modules that the config says have an update; some kinds change norms as well."""
    modules = {
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if name.endswith(".weight") and (len(tensor.shape) == 2 or fit.settings.is_merged_by_peft)
    }
    modules -= _modules_of_experts(fit.base)
    is_embedding = fit.is_embedding
    return {it for it in modules if fit.settings.targets(it, is_embedding=is_embedding(it))}


def _modules_of_experts(base: Checkpoint) -> set[str]:
    """Return what files call modules and transformers does not: the router, and each expert's."""
    family = families.get(base.architecture)
    return {
        tensor.removesuffix(".weight")
        for role, _ in base.spec.weights()
        if role.endswith((".router", *EXPERT_MATRICES))
        for tensor in family.source(role, base.spec).tensors
    }


def _refuse_experts(fit: _Fit) -> None:
    """Stop if experts, or what chooses them, are changed: by PEFT all of a layer at once."""
    modules = _modules_of_experts(fit.base)
    for changed in sorted(fit.parts):
        whole = changed.removesuffix(".base_layer")
        if any(f"{module}.".startswith(f"{whole}.") for module in modules):
            raise UsageError(
                f"{fit.path} changes {whole}: edgekit merges no update of experts, or of what "
                "chooses them",
                hint="merge it with PEFT, and pass the whole model",
            )


def _is_updated(parts: Parts) -> bool:
    return _is_low_rank(parts) or _OTHER in parts


def _is_low_rank(parts: Parts) -> bool:
    return any(kind.startswith("lora_") for kind in parts)


def _refuse_missing(fit: _Fit, missing: list[str], found: set[str]) -> NoReturn:
    layers = [layer for module in found if (layer := _layer_of(module)) is not None]
    depth = len(fit.base.spec.layers)
    if (
        layers
        and max(layers) + 1 < depth
        and all((_layer_of(module) or 0) > max(layers) for module in missing)
    ):
        raise UsageError(
            f"{fit.path} is for {max(layers) + 1} layers, {fit.base.directory} has {depth}",
            hint=_hint(fit),
        )
    raise UsageError(
        f"{fit.path} lacks the update of {missing[0]}, which {fit.settings.origin} targets "
        f"({len(missing)} such modules)",
        hint=_hint(fit),
    )


def _refuse_unknown(fit: _Fit, module: str, tensors: Mapping[str, Tensor]) -> None:
    """Stop if the base has no such module."""
    if f"{module}.weight" in tensors:
        return
    depth = len(fit.base.spec.layers)
    deepest = max((_layer_of(name) or 0 for name in fit.parts), default=0)
    if deepest >= depth:
        raise UsageError(
            f"{fit.path} is for at least {deepest + 1} layers, {fit.base.directory} has {depth}",
            hint=_hint(fit),
        )
    raise UsageError(
        f"{fit.path} changes {module}, which {fit.base.directory} does not have", hint=_hint(fit)
    )


def _layer_of(module: str) -> int | None:
    match = re.search(r"\.layers\.(\d+)\.", module)
    return int(match[1]) if match else None


def _hint(fit: _Fit) -> str:
    made_for = fit.settings.base_model
    return f"the adapter was made for {made_for!r}" if made_for else "it has another base"


def _replace_whole(fit: _Fit, tensors: dict[str, Tensor]) -> None:
    """Put in what the adapter stores whole: saved modules, biases, a resized embedding."""
    ends: dict[str, Tensor] = {}
    for module, parts in fit.parts.items():
        for kind in sorted(parts.keys() & {"weight", "bias"}):
            name, tensor = f"{module}.{kind}", parts[kind]
            if name not in tensors:
                _refuse_unknown(fit, module, tensors)
                raise UsageError(
                    f"{fit.path} has a {kind} for {module}, {fit.base.directory} has none",
                    hint=_hint(fit),
                )
            is_end = name in (fit.embedding, fit.head)
            _refuse_shape(fit, name, tensor.shape, tensors[name].shape, may_grow=is_end)
            if is_end:
                ends[name] = tensor
            else:
                tensors[name] = tensor
    _replace_ends(fit, tensors, ends)
    _refuse_unsaved(fit)


def _refuse_shape(
    fit: _Fit, name: str, found: Shape, expected: Shape, *, may_grow: bool = False
) -> None:
    if found == expected or (may_grow and found[1:] == expected[1:] and found[0] > 0):
        return
    raise UsageError(
        f"{fit.path}: {name} has shape {list(found)}, expected {list(expected)}", hint=_hint(fit)
    )


def _replace_ends(fit: _Fit, tensors: dict[str, Tensor], ends: Mapping[str, Tensor]) -> None:
    """Replace embedding and head.

    Where the base ties them, one that PEFT saved as a module of its own leaves the other alone;
    one that it saved because the vocabulary was resized, or its layer wrapped, is still both.
    """
    of_its_own = {
        name
        for name in ends
        if fit.settings.saves(name.removesuffix(".weight")) and not fit.settings.keeps_tie
    }
    shared = [tensor for name, tensor in ends.items() if name not in of_its_own]
    shared += [original for name in of_its_own if (original := _original(fit, name))]
    if fit.base.spec.is_tied and shared:
        both = shared[0] if len(shared) == 1 else _twin(fit, shared[0], shared[1])
        tensors[fit.embedding] = tensors[fit.head] = both
    for name in ends if not fit.base.spec.is_tied else of_its_own:
        tensors[name] = ends[name]


def _original(fit: _Fit, name: str) -> Tensor | None:
    """Return what a saved embedding or head was a copy of, if the file holds that too."""
    parts = fit.parts[name.removesuffix(".weight")]
    original = parts.get(f"{_ORIGINAL}weight")
    if original is not None:
        _refuse_shape(fit, name, original.shape, parts["weight"].shape)
    return original


def _twin(fit: _Fit, one: Tensor, other: Tensor) -> Twin:
    return Twin(
        base=one,
        other=other,
        complaint=f"{fit.path} holds two versions of what {fit.base.directory} ties: "
        f"{fit.embedding} and {fit.head}",
    )


def _refuse_unsaved(fit: _Fit) -> None:
    stored = [module for module, parts in fit.parts.items() if parts.keys() & {"weight", "bias"}]
    for name in fit.settings.modules_to_save:
        if not any(re.match(rf"(^|.*\.){name}($|\..*)", module) for module in stored):
            raise UsageError(
                f"{fit.settings.origin} lists {name!r} in modules_to_save, {fit.path} lacks it",
                hint="the adapter was saved incompletely; save it again with PEFT",
            )


def _add_updates(fit: _Fit, tensors: dict[str, Tensor]) -> None:
    for module, parts in fit.parts.items():
        if _is_low_rank(parts):
            name = f"{module}.weight"
            tensors[name] = _updated(fit, module, tensors[name])
            if "lora_B.bias" in parts:
                _add_bias(fit, module, tensors)
    if fit.settings.keeps_tie and fit.base.spec.is_tied and _are_updates_tied(fit):
        tensors[fit.head] = tensors[fit.embedding]


def _updated(fit: _Fit, module: str, base: Tensor) -> Tensor:
    is_lookup = f"{module}.weight" == fit.embedding
    down, up = _factors(fit, module, base.shape, is_lookup=is_lookup)
    update = EmbeddingUpdate if is_lookup else LowRankUpdate
    if not is_lookup:
        base = _without_start(fit, module, base)
    updated = update(base=base, down=down, up=up, scale=fit.settings.scale_of(module))
    if not fit.settings.has_magnitudes:
        return updated
    magnitudes = fit.parts[module]["lora_magnitude_vector"]
    of_columns = is_lookup and not fit.settings.is_of_mlx
    width = base.shape[1 if of_columns else 0]
    _refuse_shape(fit, f"{module}.lora_magnitude_vector", magnitudes.shape, (width,))
    scaled = ColumnMagnitudes if of_columns else RowMagnitudes
    return scaled(base=updated, magnitudes=magnitudes)


def _without_start(fit: _Fit, module: str, base: Tensor) -> Tensor:
    """Return a weight as it was when training began, where PEFT changes it for that."""
    rank = fit.settings.rank_of(module)
    match fit.settings.start:
        case "pissa":
            return WithoutPrincipal(base=base, rank=rank)
        case "olora":
            return WithoutFirstColumns(base=base, rank=rank, scale=fit.settings.scale_of(module))
        case _:
            return base


def _factors(fit: _Fit, module: str, shape: Shape, *, is_lookup: bool) -> tuple[Tensor, Tensor]:
    names = _LOW_RANK[2:4] if is_lookup else _LOW_RANK[:2]
    expected = {*names}
    if fit.settings.has_magnitudes:
        expected.add("lora_magnitude_vector")
    if fit.settings.has_lora_bias and not is_lookup:
        expected.add("lora_B.bias")
    parts = fit.parts[module]
    found = {kind for kind in parts if kind.startswith("lora_")}
    if found != expected:
        raise UsageError(
            f"{fit.path} holds {_listed(found)} of {module}, expected {_listed(expected)}",
            hint="the adapter was saved incompletely, or its config belongs to another one",
        )
    rows, columns = (shape[1], shape[0]) if is_lookup else shape
    rank = fit.settings.rank_of(module)
    _refuse_shape(fit, f"{module}.{names[0]}", parts[names[0]].shape, (rank, columns))
    _refuse_shape(fit, f"{module}.{names[1]}", parts[names[1]].shape, (rows, rank))
    return parts[names[0]], parts[names[1]]


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def _add_bias(fit: _Fit, module: str, tensors: dict[str, Tensor]) -> None:
    name, addend = f"{module}.bias", fit.parts[module]["lora_B.bias"]
    base = tensors.get(name)
    if base is None:  # whether the decoder can carry one, `_spec_with_biases` finds out
        base = Zeros(shape=tensors[f"{module}.weight"].shape[:1], dtype=stored_dtype(addend))
    _refuse_shape(fit, f"{module}.lora_B.bias", addend.shape, base.shape)
    tensors[name] = Sum(base=base, addend=addend, scale=fit.settings.scale_of(module))


def _merge_by_peft(fit: _Fit, tensors: dict[str, Tensor]) -> None:
    """Let PEFT merge what it alone knows the meaning of, in the modules that the config names."""
    if not fit.settings.is_merged_by_peft:
        return
    by_peft.require(fit.settings.kind)
    renamed = {key: own for key, own in fit.keys.items() if key != own}
    directory = fit.path.parent
    merger = by_peft.Merger(model=fit.base.directory, adapter=directory, renamed=renamed)
    targeted = _targeted(fit, tensors)
    for module in targeted:
        if fit.base.spec.is_tied and fit.is_embedding(module):
            raise UsageError(
                f"{fit.path} changes {module}, which {fit.base.directory} ties to another matrix",
                hint=adapter_config.merged_by_hand({}, directory),
            )
        given = {kind: tensors[f"{module}.{kind}"] for kind in ("weight", "bias")
                 if f"{module}.{kind}" in tensors}  # fmt: skip
        for kind, tensor in given.items():
            tensors[f"{module}.{kind}"] = by_peft.MergedByPeft(
                base=tensor, merger=merger, module=module, kind=kind, given=given
            )


def _are_updates_tied(fit: _Fit) -> bool:
    """Tell whether embedding and head have the same factors, transposed; they are small."""
    import numpy as np

    lookup = fit.parts.get(fit.embedding.removesuffix(".weight"), {})
    if fit.settings.is_of_mlx:
        return bool(lookup)
    head = fit.parts.get(fit.head.removesuffix(".weight"), {})
    if "lora_embedding_A" not in lookup or "lora_A" not in head or fit.settings.has_magnitudes:
        return False
    pairs = (("lora_embedding_B", "lora_A"), ("lora_embedding_A", "lora_B"))
    return all(np.array_equal(lookup[one].read().T, head[other].read()) for one, other in pairs)


def _replace_token_rows(fit: _Fit, tensors: dict[str, Tensor]) -> None:
    rows = {
        f"{module}.weight": parts["tokens"]
        for module, parts in fit.parts.items()
        if "tokens" in parts
    }
    for name in rows:
        if name not in tensors:
            _refuse_unknown(fit, name.removesuffix(".weight"), tensors)
    if fit.base.spec.is_tied and _are_rows_tied(fit, rows, tensors):
        values: Tensor = rows[fit.embedding]
        if fit.head in rows:
            values = _twin(fit, values, rows[fit.head])
        both = _with_rows(fit, fit.embedding, tensors, values)
        tensors[fit.embedding] = tensors[fit.head] = both
        _refuse_untrained(fit, {*rows, fit.head})
    else:
        tensors |= {name: _with_rows(fit, name, tensors, values) for name, values in rows.items()}
        _refuse_untrained(fit, set(rows))


def _refuse_untrained(fit: _Fit, replaced: set[str]) -> None:
    """Check that the file had the rows of every token the config names."""
    for module in fit.settings.token_ids:
        if not any(
            name.removesuffix(".weight").endswith(module) if module else name == fit.embedding
            for name in replaced
        ):
            raise UsageError(
                f"{fit.settings.origin} trains tokens of {module or 'the embedding'!r}, "
                f"{fit.path} lacks them",
                hint="the adapter was saved incompletely; save it again with PEFT",
            )


def _are_rows_tied(fit: _Fit, rows: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether the trained tokens of a tied embedding are also those of the head.

    PEFT keeps the two together unless the config names other tokens for the head.
    """
    if fit.embedding not in rows:
        return False
    head_ids = fit.settings.token_ids_of(fit.head.removesuffix(".weight"), is_embedding=False)
    if head_ids is not None and head_ids != _token_ids(fit, fit.embedding):
        return False
    if tensors[fit.embedding] is not tensors[fit.head]:
        raise UsageError(
            f"{fit.path} trains tokens of {fit.embedding}, which {fit.base.directory} ties to "
            f"{fit.head}, and changes one of the two in another way",
            hint="train the tokens, or the whole matrix, not both",
        )
    return True


def _with_rows(fit: _Fit, name: str, tensors: Mapping[str, Tensor], values: Tensor) -> ReplacedRows:
    module, base = name.removesuffix(".weight"), tensors[name]
    if _is_low_rank(fit.parts[module]) or len(base.shape) != 2:
        raise UsageError(
            f"{fit.path} has both trained tokens and a low-rank update for {module}",
            hint="edgekit merges one or the other",
        )
    ids = _token_ids(fit, name)
    _refuse_shape(fit, f"{module} (tokens)", values.shape, (len(ids), base.shape[1]))
    if max(ids, default=0) >= base.shape[0]:
        raise UsageError(
            f"{fit.settings.origin} trains the token {max(ids)}, {name} has {base.shape[0]}",
            hint=_hint(fit),
        )
    return ReplacedRows(base=base, replaced=ids, values=values)


def _token_ids(fit: _Fit, name: str) -> tuple[int, ...]:
    module = name.removesuffix(".weight")
    ids = fit.settings.token_ids_of(module, is_embedding=name == fit.embedding)
    if ids is None:
        raise UsageError(
            f"{fit.path} holds trained tokens of {module}, {fit.settings.origin} does not say which"
        )
    return ids


def _spec_of(fit: _Fit, tensors: dict[str, Tensor]) -> DecoderSpec:
    """Return the decoder of the merged tensors; completes ``tensors`` where that asks for it."""
    embedding, head = tensors[fit.embedding], tensors[fit.head]
    if embedding.shape[0] != head.shape[0]:
        raise UsageError(
            f"{fit.path} makes the vocabulary {embedding.shape[0]} tokens in {fit.embedding} and "
            f"{head.shape[0]} in {fit.head}",
            hint="save the adapter with save_embedding_layers=True",
        )
    is_tied = fit.base.spec.is_tied and embedding is head
    if is_tied:
        del tensors[fit.head]
    spec = replace(fit.base.spec, is_tied=is_tied, vocab_size=embedding.shape[0])
    new_biases = tensors.keys() - fit.base.tensors.keys() - {fit.head}
    return _spec_with_biases(fit, spec, tensors, new_biases) if new_biases else spec


def _spec_with_biases(
    fit: _Fit, spec: DecoderSpec, tensors: dict[str, Tensor], new: set[str]
) -> DecoderSpec:
    """Return the decoder that also has the biases ``new``; others it then needs are zeros."""
    family = families.get(fit.base.architecture)
    for candidate in _with_more_biases(spec):
        config = Config(family.config(candidate), origin="the merged config")
        if family.describe(config) != candidate:
            continue
        needed = {
            family.source(role, candidate).tensor: shape for role, shape in candidate.weights()
        }
        if new <= needed.keys():
            dtype = stored_dtype(tensors[fit.embedding])
            absent = needed.keys() - tensors.keys()
            tensors |= {name: Zeros(shape=needed[name], dtype=dtype) for name in absent}
            return candidate
    raise UsageError(
        f"{fit.path} adds a bias to {min(new).removesuffix('.bias')}, "
        f"{fit.base.architecture} models have none there",
        hint="train without lora_bias",
    )


def _with_more_biases(spec: DecoderSpec) -> Iterator[DecoderSpec]:
    attention = spec.attention
    for more in sorted(product((False, True), repeat=3), key=sum):
        query_key_value, output, mlp = more
        yield replace(
            spec,
            attention=replace(
                attention,
                has_qkv_bias=attention.has_qkv_bias or query_key_value,
                has_output_bias=attention.has_output_bias or output,
            ),
            has_mlp_bias=spec.has_mlp_bias or mlp,
        )


def _text_of(fit: _Fit, *, vocabulary: int) -> AdapterText:
    """Return the text side of base and adapter, whose tokenizer must know the trained tokens."""
    directory = fit.path.parent
    merged = adapter_text.merge(fit.base.text, directory, model=fit.base.directory)
    if vocabulary > fit.base.spec.vocab_size and not merged.has_tokens:
        raise UsageError(
            f"{fit.path} grows the vocabulary from {fit.base.spec.vocab_size} to {vocabulary} "
            f"tokens, but {directory} has no tokenizer.json for them",
            hint="save the tokenizer of the training run into the adapter's directory",
        )
    own = added_tokens(merged.files.tokenizer_json)
    known_before = added_tokens(fit.base.text.tokenizer_json)
    padding = merged.files.special_tokens.get("pad_token")  # of batches only, never in a text
    new = own.keys() - known_before.keys() - {padding}
    if beyond := sorted(it for it in new if own[it] >= vocabulary):
        raise UsageError(
            f"{directory} has a tokenizer with {beyond[0]!r}, id {own[beyond[0]]}, and the merged "
            f"model has {vocabulary} rows",
            hint="save the adapter with save_embedding_layers=True",
        )
    trained = [id for ids in fit.settings.token_ids.values() for id in ids]
    known = adapter_text.token_ids(merged.files.tokenizer_json) if trained else set()
    if nameless := sorted(set(trained) - known):
        raise UsageError(
            f"{fit.settings.origin} trains the token {nameless[0]}, which "
            f"{merged.files.tokenizer_json} does not know",
            hint="save the tokenizer of the training run into the adapter's directory",
        )
    return merged


def _record_of(fit: _Fit, spec: DecoderSpec, text: AdapterText) -> AdapterRecord:
    earlier = fit.base.adapter
    files = (fit.path.parent / "adapter_config.json", fit.path)
    return AdapterRecord(
        directory=fit.path.parent,
        name=f"{earlier.name} + {fit.name}" if earlier else fit.name,
        sha256=sha256_of_all(files, after=earlier.sha256 if earlier else None),
        notes=(*(earlier.notes if earlier else ()), *_notes(fit, spec, text)),
        is_of_mlx=fit.settings.is_of_mlx,
        renamed={key: own for key, own in fit.keys.items() if key != own} or None,
        changes=_changes(fit),
        earlier=earlier,
    )


def _changes(fit: _Fit) -> dict[str, Any] | None:
    """Return what the config must say where the modules have other names than in training."""
    if fit.settings.naming.is_usual:
        return None
    modules = sorted(module for module, parts in fit.parts.items() if _is_low_rank(parts))
    alphas = {it: fit.settings.alpha_of(it) for it in modules}
    return {
        "target_modules": modules,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {re.escape(it): fit.settings.rank_of(it) for it in modules},
        "alpha_pattern": {re.escape(it): alpha for it, alpha in alphas.items()},
    }


def _notes(fit: _Fit, spec: DecoderSpec, text: AdapterText) -> Iterator[str]:
    """Yield what a user should know about this merge, one sentence each."""
    before = fit.base.spec
    if before.is_tied and not spec.is_tied:
        yield (
            "the adapter changes the token embedding and the output head differently, so they are "
            "no longer tied and the model stores both"
        )
    if fit.settings.replicated:
        yield f"the adapter repeats layers of the base: the model has {len(spec.layers)}"
    if spec.vocab_size != before.vocab_size:
        yield f"the vocabulary has {spec.vocab_size} tokens, the base {before.vocab_size}"
    yield from text.notes
    yield from _notes_on_the_base(fit)
    yield from _notes_on_the_file(fit)
    ids = added_tokens(text.files.tokenizer_json)
    if beyond := [token for token, id in ids.items() if id >= spec.vocab_size]:
        yield f"the tokenizer knows tokens for which the model has no row: {', '.join(beyond)}"


def _notes_on_the_base(fit: _Fit) -> Iterator[str]:
    made_for, name = fit.settings.base_model, fit.base.name
    if fit.base.quantization:
        yield (
            f"{name!r} is stored as {fit.base.quantization}; the adapter is merged into "
            "its de-quantized weights"
        )
    elif _QUANTIZED_BASE.search(made_for):
        yield (
            f"the adapter was trained on the quantized {made_for!r} and is merged into "
            f"{name!r} as it is"
        )
    elif made_for and _plain_name(made_for) not in _names_of(fit.base):
        yield f"the adapter names {made_for!r} as its base and is merged into {name!r}"


def _names_of(base: Checkpoint) -> set[str]:
    """Return what a model is called: its directory, and what its own files say they are of."""
    path = base.directory / "config.json"
    own = read_object_if_there(path).get("_name_or_path")
    cached = [part for part in base.directory.resolve().parts if part.startswith("models--")]
    found = [base.name, *(part.rpartition("--")[2] for part in cached)]
    return {_plain_name(it) for it in (*found, own) if isinstance(it, str)}


def _plain_name(name: str) -> str:
    """Return the last part of a name or path, without how it was quantized or repackaged."""
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1].casefold()
    return re.sub(r"[-_. ]+", "-", _REPACKAGED.sub("", last))


def _notes_on_the_file(fit: _Fit) -> Iterator[str]:
    naming = fit.settings.naming
    if any(own.removeprefix(PREFIX) != key.removeprefix(PREFIX) for key, own in fit.keys.items()):
        told = f": {naming.stored_body!r} is read as {naming.body!r}" if not naming.is_usual else ""
        yield f"the adapter's names have what was around the model in training{told}"
    if fit.others:
        yield (
            f"of the adapter's modules, {len(fit.others)} are outside the decoder and left out, "
            f"{fit.others[0]} among them"
        )
    if fit.settings.start:
        yield (
            f"training began with init_lora_weights = {fit.settings.start!r}: what PEFT took off "
            f"the base for that is computed again from {fit.base.name!r}"
        )
    if fit.is_wide:
        yield "the adapter stores float64, which is read as float32"
    if _changes_nothing(fit):
        yield "the adapter's low-rank updates change nothing: a factor of each is zero"


def _changes_nothing(fit: _Fit) -> bool:
    """Tell whether every update is zero; factors are small, and the first usually is not."""
    pairs = [[tensor for kind, tensor in parts.items() if kind in _LOW_RANK[:4]]
             for parts in fit.parts.values() if _is_low_rank(parts)]  # fmt: skip
    return bool(pairs) and all(any(not it.read().any() for it in pair) for pair in pairs)
