"""Adapters, damaged one file at a time."""

from pathlib import Path

from edgekit.source.adapters.merging import merge
from edgekit.source.checkpoint import Checkpoint
from edgekit.tests.attack.attack import DamagedFiles
from edgekit.tests.tiny.adapters import q_proj_updates, write_adapter, write_base, write_safetensors


class Adapters(DamagedFiles):
    """adapters of PEFT"""

    damaged = "adapter_*"
    share = 6.0

    def prepare(self) -> None:
        write_base(self.place / "base")
        write_adapter(self.whole / "lora", q_proj_updates())
        write_adapter(self.whole / "rs", q_proj_updates(), use_rslora=True, alpha_pattern={"q": 2})

    def open(self) -> None:
        self.base = Checkpoint.open(self.place / "base")
        super().open()

    def read(self, directory: Path) -> object:
        merged = merge(self.base, directory)
        return [tensor.read() for tensor in merged.tensors.values()], merged.remarks


class MlxAdapters(Adapters):
    """adapters of mlx-lm"""

    damaged = "adapter*"
    share = 1.0

    def prepare(self) -> None:
        import numpy as np

        write_base(self.place / "base")
        directory = self.whole / "mlx"
        directory.mkdir(parents=True)
        (directory / "adapter_config.json").write_text(
            '{"fine_tune_type": "lora", "num_layers": 2, "model": "base",'
            ' "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0}}'
        )
        tensors = {
            name.replace(".lora_A.weight", ".lora_a").replace(
                ".lora_B.weight", ".lora_b"
            ): np.array(values).T
            for name, values in q_proj_updates().items()
        }
        write_safetensors(directory / "adapters.safetensors", tensors)
