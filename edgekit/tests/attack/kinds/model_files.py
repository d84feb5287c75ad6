"""The files of a model directory, damaged one by one."""

import json
import shutil
from pathlib import Path

from edgekit.formats.gguf.vocabulary import TokenizerSource
from edgekit.model import card
from edgekit.source.checkpoint import Checkpoint, weight_files
from edgekit.source.opening import open_checkpoint
from edgekit.tests.attack import samples
from edgekit.tests.attack.attack import OTHER_PROGRAMS_S, DamagedFiles
from edgekit.tests.tiny.adapters import write_base


_ROPES = {
    "llama3": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
             "original_max_position_embeddings": 32},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
}  # fmt: skip


class Configs(DamagedFiles):
    """config.json"""

    damaged = "config.json"
    share = 6.0

    def prepare(self) -> None:
        samples.checkpoints(self.whole)
        for name, rope in _ROPES.items():
            directory = shutil.copytree(self.whole / "llama", self.whole / f"llama-{name}")
            samples.edit(directory / "config.json", rope_parameters=rope)
        old = shutil.copytree(self.whole / "llama", self.whole / "llama-legacy")
        fields = json.loads((old / "config.json").read_text())
        fields.pop("rope_parameters", None)
        legacy = {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}}
        (old / "config.json").write_text(json.dumps(fields | legacy))
        wrapper = shutil.copytree(self.whole / "llama", self.whole / "llava")
        text = json.loads((wrapper / "config.json").read_text())
        fields = {"model_type": "llava", "text_config": text, "vision_config": {"hidden_size": 8},
                  "image_token_index": 7}  # fmt: skip
        (wrapper / "config.json").write_text(json.dumps(fields))

    def read(self, directory: Path) -> object:
        opened = Checkpoint.open(directory)
        return opened.name, opened.remarks, opened.card, opened.parameters, opened.text.rules()


class FourBitModels(DamagedFiles):
    """models in four bits"""

    damaged = "[cm]o[nd]*"  # the config and the weights

    def prepare(self) -> None:
        from edgekit.tests.proof.test_qlora import write_quantized

        base = write_base(self.place / "base")
        for name, nested in (("plain", False), ("nested", True)):
            write_quantized(base, self.whole / name, nested=nested)

    def read(self, directory: Path) -> object:
        return [tensor.read() for tensor in Checkpoint.open(directory).tensors.values()]


class SafetensorsFiles(DamagedFiles):
    """safetensors"""

    damaged = "model.safetensors"
    share = 4.0

    def prepare(self) -> None:
        samples.checkpoint(self.whole / "model")

    def read(self, directory: Path) -> object:
        opened = Checkpoint.open(directory)
        return [tensor.read() for tensor in opened.tensors.values()]


class ShardIndexes(DamagedFiles):
    """model.safetensors.index.json"""

    damaged = "*.index.json"

    def prepare(self) -> None:
        samples.checkpoint(self.whole / "model", shard_bytes=60_000)

    def read(self, directory: Path) -> object:
        return weight_files(directory), Checkpoint.open(directory).sha256


class Shards(DamagedFiles):
    """shards"""

    damaged = "*.safetensors"

    def prepare(self) -> None:
        samples.checkpoint(self.whole / "model", shard_bytes=60_000)
        bare = samples.checkpoint(self.whole / "bare", shard_bytes=60_000)
        (bare / "model.safetensors.index.json").unlink()

    def read(self, directory: Path) -> object:
        return Checkpoint.open(directory).sha256


class SmallFiles(DamagedFiles):
    """settings, special tokens, generation_config.json"""

    damaged = "[gs]*_*.json"
    share = 2.0

    def prepare(self) -> None:
        samples.checkpoint(self.whole / "model")

    def read(self, directory: Path) -> object:
        opened = Checkpoint.open(directory)
        return opened.sampling, opened.text.rules(), opened.text.stop_strings, opened.remarks


class TokenizerSettings(DamagedFiles):
    """tokenizer_config.json"""

    damaged = "tokenizer_config.json"
    share = 2.0

    def prepare(self) -> None:
        samples.checkpoint(self.whole / "model")
        listed = samples.checkpoint(self.whole / "listed")
        templates = [{"name": name, "template": samples.TEMPLATE} for name in ("default", "tools")]
        added = {"256": {"content": "<|end|>", "special": True, "lstrip": False}}
        samples.edit(listed / "tokenizer_config.json", chat_template=templates,
                     added_tokens_decoder=added, additional_special_tokens=["<|end|>"])  # fmt: skip

    def read(self, directory: Path) -> object:
        opened = Checkpoint.open(directory)
        return opened.text.rules(), opened.remarks


class Tokenizers(DamagedFiles):
    """tokenizer.json, as edgekit reads it"""

    damaged = "tokenizer.json"
    share = 2.0

    def prepare(self) -> None:
        samples.checkpoint(self.whole / "model")

    def read(self, directory: Path) -> object:
        text = Checkpoint.open(directory).text
        text.refuse_unreadable()
        source = TokenizerSource.open(text)
        return source.all_ids, source.steps("pre_tokenizer"), text.within(257)


class OpenedTokenizers(DamagedFiles):
    """tokenizer.json, opened"""

    damaged = "tokenizer.json"
    share = 2.0
    limit_s = OTHER_PROGRAMS_S

    def prepare(self) -> None:
        samples.checkpoint(self.whole / "model")

    def read(self, directory: Path) -> object:
        return open_checkpoint(directory).text.rules()


class ModelCards(DamagedFiles):
    """README.md"""

    damaged = "README.md"

    def prepare(self) -> None:
        samples.checkpoint(self.whole / "model")

    def read(self, directory: Path) -> object:
        found = card.read(directory)
        return card.with_adapter(found, directory, base_name="base")


class TemplateFiles(DamagedFiles):
    """chat_template.jinja"""

    damaged = "chat_template.jinja"
    share = 2.0
    limit_s = OTHER_PROGRAMS_S

    def prepare(self) -> None:
        directory = samples.checkpoint(self.whole / "model")
        (directory / "chat_template.jinja").write_text(samples.TEMPLATE)

    def read(self, directory: Path) -> object:
        return open_checkpoint(directory).text.rules()
