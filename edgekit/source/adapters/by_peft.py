"""Adapters of other kinds than LoRA, merged by PEFT itself, one tensor of the base at a time.

PEFT gets the base's modules with weights that take no memory, puts the adapter into them, and is
handed one weight when that is read. So its own code decides what an adapter means, and the base
never lies in memory whole.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit import installed, scratch
from edgekit.encodings.json_files import read_object
from edgekit.errors import UsageError
from edgekit.model.checkpoint_protocol import Tensor
from edgekit.runtime.silence import silence
from edgekit.source.made_tensors import MergedTensor


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Values = npt.NDArray[np.float32]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What PEFT 0.21 merges so that base and adapter, unmerged, say the same. It computes others from
# the base when it loads them (OSF, PSOFT, AdaMSS, FRoD), or cannot merge them.
KINDS = {
    "ADALORA": "AdaLoRA", "BOFT": "BOFT", "C3A": "C3A", "DEFT": "DEFT", "DELORA": "DeLoRA",
    "FOURIERFT": "FourierFT", "GLORA": "GLoRA", "GRALORA": "GraLoRA", "HIRA": "HiRA", "HRA": "HRA",
    "IA3": "IA3", "LN_TUNING": "layer norm tuning", "LOHA": "LoHa", "LOKR": "LoKr", "MISS": "MiSS",
    "OFT": "OFT", "PEANUT": "PEANuT", "PVERA": "PVeRA", "RANDLORA": "RandLoRA", "ROAD": "RoAd",
    "SHIRA": "SHiRA", "SUPERTUNING": "super tuning", "TINYLORA": "TinyLoRA", "UNILORA": "Uni-LoRA",
    "VBLORA": "VB-LoRA", "VERA": "VeRA", "WAVEFT": "WaveFT",
}  # fmt: skip


def require(kind: str) -> None:
    """Check that PEFT can merge here, before slow work.

    Raises:
        MissingDependencyError: If it is not installed, or what it stands on.
    """
    purpose = f"merging an adapter of kind {KINDS[kind]!r}"
    installed.require("torch", "transformers", "peft", purpose=purpose, extra="gguf")


def write_as_peft_would(
    adapter: Path, place: Path, *, renamed: Mapping[str, str], changes: Mapping[str, Any]
) -> None:
    """Write an adapter as PEFT would have, had nothing been around the model in training.

    Args:
        adapter: Its directory.
        place: The directory to write to.
        renamed: PEFT's own names of tensors that have others.
        changes: Fields of its config, as they read with those names.
    """
    from safetensors.torch import load_file, save_file

    config = read_object(adapter / CONFIG) | dict(changes)
    (place / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    stored = load_file(adapter / WEIGHTS)
    save_file({renamed.get(key, key): it for key, it in stored.items()}, place / WEIGHTS)


@dataclass(kw_only=True)
class Merger:
    """An adapter in PEFT, next to modules whose weights are not there."""

    model: Path  # the base's directory
    adapter: Path
    renamed: Mapping[str, str]
    _modules: dict[str, Any] | None = None
    _last: tuple[str, dict[str, "Values"]] | None = field(default=None, repr=False)

    def merged(self, module: str, given: Mapping[str, Tensor]) -> dict[str, "Values"]:
        """Return the merged weight and bias of a module, float32; the last ones are kept.

        Args:
            module: Transformers' name of it.
            given: Its ``weight`` and, if it has one, its ``bias``.

        Raises:
            UsageError: If PEFT does not merge them into what they are.
        """
        if self._last is None or self._last[0] != module:
            if self._modules is None:
                with silence():
                    self._modules = self._open()
            self._last = (module, self._merge(self._modules[module], given, module))
        return self._last[1]

    def _open(self) -> dict[str, Any]:
        import peft

        with scratch.directory("peft") as place:
            # Without a task PEFT needs nothing of the model but its modules.
            changes = {"task_type": None}
            write_as_peft_would(self.adapter, place, renamed=self.renamed, changes=changes)
            found = peft.PeftModel.from_pretrained(_skeleton(self.model), place)
        return dict(found.base_model.model.named_modules())

    def _merge(self, layer: Any, given: Mapping[str, Tensor], module: str) -> dict[str, "Values"]:
        import torch

        base = layer.get_base_layer()
        empty = {kind: getattr(base, kind) for kind in given}
        for kind, tensor in given.items():
            values = torch.from_numpy(tensor.read().copy())
            setattr(base, kind, torch.nn.Parameter(values, requires_grad=False))
        with torch.no_grad(), silence():
            layer.merge()
        base = layer.get_base_layer()  # some put another in its place
        found = {kind: getattr(base, kind).data.numpy() for kind in given}
        layer.merged_adapters.clear()
        for kind, values in empty.items():
            setattr(base, kind, values)
        if any(found[kind].shape != given[kind].shape for kind in given):
            raise UsageError(f"{self.adapter}: PEFT merges {module} into another shape")
        return found


def _skeleton(model: Path) -> Any:
    """Return the model's modules, each parameter a single zero that is repeated."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(model, local_files_only=True)
    with torch.device("meta"):
        skeleton = transformers.AutoModelForCausalLM.from_config(config.get_text_config())
    for module in skeleton.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            zeros = torch.zeros(()).expand(parameter.shape)
            setattr(module, name, torch.nn.Parameter(zeros, requires_grad=False))
    return skeleton


@dataclass(frozen=True, kw_only=True)
class MergedByPeft(MergedTensor):
    """A weight or a bias as PEFT merges it."""

    merger: Merger
    module: str
    kind: str  # weight or bias
    given: Mapping[str, Tensor]  # both of the module, where it has both

    def _merged(self, first_row: int, rows: int) -> "Values":
        whole = self.merger.merged(self.module, self.given)[self.kind]
        return whole[first_row : first_row + rows]
