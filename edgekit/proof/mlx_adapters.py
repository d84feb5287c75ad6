"""Adapters of mlx-lm next to a model in transformers, computed as mlx-lm's layers compute them.

No package here runs them, so this is the other side of the proof; it shares nothing with the merge.
Source: ``__call__`` and ``as_linear`` of the layers in tuner/lora.py and tuner/dora.py of mlx-lm.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgekit.encodings.json_files import read_object
from edgekit.source import families
from edgekit.source.adapters.mlx import WEIGHTS


@dataclass(frozen=True, kw_only=True)
class _Update:
    """What an adapter holds for one module."""

    a: Any  # (columns, rank) of a linear layer, (rows, rank) of an embedding
    b: Any  # (rank, rows), (rank, columns)
    magnitudes: Any  # (rows,), or None
    scale: float

    def transposed(self) -> "_Update":
        """Return the same for an embedding that a text is multiplied with."""
        return replace(self, a=self.b.T, b=self.a.T)


def put_next_to(model: Any, directory: Path, *, model_type: str) -> Any:
    """Let a model's modules answer as they do with an adapter; return the model."""
    from safetensors.torch import load_file

    config = read_object(directory / "adapter_config.json")
    scale = float(config.get("lora_parameters", {}).get("scale", 1.0))
    stored = {key: value.float() for key, value in load_file(directory / WEIGHTS).items()}
    modules = dict(model.named_modules())
    for key, value in stored.items():
        name, _, kind = key.rpartition(".")
        own = families.own_name(model_type, name)
        module = modules.get(own) or modules[_without_prefix(own, modules)]
        if kind in ("weight", "bias"):  # fine_tune_type: full
            getattr(module, kind).data = value
        elif kind == "lora_a":
            b, magnitudes = stored[f"{name}.lora_b"], stored.get(f"{name}.m")
            _hook(model, module, _Update(a=value, b=b, magnitudes=magnitudes, scale=scale))
    return model


def bake(model: Any) -> Any:
    """Make weights of what hooked modules answer, for an adapter that is stacked on top."""
    import torch

    hooked = [it for it in model.modules() if it._forward_hooks]  # noqa: SLF001 - not public
    with torch.inference_mode():
        weights = [weight_of(it, is_lookup=isinstance(it, torch.nn.Embedding)) for it in hooked]
    for module, weight in zip(hooked, weights, strict=True):  # a tied one has the same twice
        module._forward_hooks.clear()  # noqa: SLF001 - these are ours
        module.weight.data = weight
    return model


def weight_of(module: Any, *, is_lookup: bool) -> Any:
    """Return the matrix by which an embedding or a linear layer answers, wrapped or not."""
    import torch

    rows, columns = module.weight.shape
    if is_lookup:
        return (module(torch.arange(rows)) / _embed_scale(module)).clone()
    unit = torch.eye(columns)
    return (module(unit) - module(torch.zeros_like(unit))).T.clone()


def _without_prefix(name: str, modules: dict[str, Any]) -> str:
    """Return the module of this decoder that has the same place in a larger model."""
    tail = re.sub(r"^.*?(?=layers\.|embed_tokens$|norm$|lm_head$)", "", name)
    return next(own for own in modules if own == tail or own.endswith(f".{tail}"))


def _hook(model: Any, module: Any, update: _Update) -> None:
    import torch

    if isinstance(module, torch.nn.Embedding):
        module.register_forward_hook(_looked_up(module, update))
        head = model.get_output_embeddings()
        if head.weight is module.weight:  # mlx-lm asks the same layer for both
            head.register_forward_hook(_multiplied(head, update.transposed()))
    else:
        module.register_forward_hook(_multiplied(module, update))


def _multiplied(module: Any, update: _Update) -> Callable[[Any, Any, Any], Any]:
    """Return a hook for a linear layer."""

    def after(_: Any, given: Any, answer: Any) -> Any:
        added = update.scale * ((given[0] @ update.a) @ update.b)
        if update.magnitudes is None:
            return answer + added
        bias = 0.0 if module.bias is None else module.bias
        lengths = (module.weight + update.scale * (update.b.T @ update.a.T)).norm(dim=1)
        return update.magnitudes / lengths * (answer - bias + added) + bias

    return after


def _looked_up(module: Any, update: _Update) -> Callable[[Any, Any, Any], Any]:
    """Return a hook for an embedding."""

    def after(_: Any, given: Any, answer: Any) -> Any:
        factor = _embed_scale(module)  # Gemma's layer multiplies within, mlx-lm's model after it
        rows = answer / factor + update.scale * (update.a[given[0]] @ update.b)
        if update.magnitudes is not None:
            rows = (update.magnitudes[given[0]] / rows.norm(dim=-1))[..., None] * rows
        return rows * factor

    return after


def _embed_scale(module: Any) -> Any:
    return getattr(module, "embed_scale", 1.0)
