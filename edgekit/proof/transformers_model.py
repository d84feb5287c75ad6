"""A checkpoint in transformers: its decoder in float32, whatever is stored around it or before it.

transformers reads the files itself. What it does not do by itself is done here and nowhere else:
names that training tools left behind are told to it, shards without an index get one, and of a
model that also sees the decoder is taken.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgekit import scratch
from edgekit.encodings.files import is_file
from edgekit.errors import UsageError
from edgekit.source import names
from edgekit.source.checkpoint import Checkpoint, read_safetensors, weight_files


def load(transformers: Any, checkpoint: Checkpoint) -> Any:
    """Return the base of a checkpoint, without its adapters, as a causal language model.

    Args:
        transformers: The package.
        checkpoint: Only its directory is read.

    Raises:
        UsageError: If transformers finds no class for the model around the decoder, or misses a
            tensor.
    """
    with _directory(checkpoint) as directory:
        config = _config(transformers, directory)
        if checkpoint.wrapper:
            return _decoder_of(transformers, _wrapped(transformers, directory, config))
        return _plain(transformers, directory, config, checkpoint)


def _config(transformers: Any, directory: Path) -> Any:
    """Return the config without a padding token, which may have no row and means nothing here."""
    config = transformers.AutoConfig.from_pretrained(
        directory, local_files_only=True, trust_remote_code=False
    )
    config.get_text_config().pad_token_id = None
    return config


def _plain(transformers: Any, directory: Path, config: Any, checkpoint: Checkpoint) -> Any:
    import torch

    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        directory, config=config, dtype=torch.float32, local_files_only=True,
        trust_remote_code=False, key_mapping=checkpoint.stored_names.patterns() or None,
        output_loading_info=True,
    )  # fmt: skip
    if missing := sorted(found["missing_keys"]):
        raise UsageError(f"transformers finds no {missing[0]} in {checkpoint.directory}")
    return model


def _wrapped(transformers: Any, directory: Path, config: Any) -> Any:
    """Return a model that also sees or hears."""
    import torch

    named = next(iter(config.architectures or ()), "")
    kind = getattr(transformers, str(named), None) or transformers.AutoModelForImageTextToText
    return kind.from_pretrained(
        directory, config=config, dtype=torch.float32, local_files_only=True,
        trust_remote_code=False, key_mapping=names.outer_patterns(),
    )  # fmt: skip


def _decoder_of(transformers: Any, model: Any) -> Any:
    """Return a causal language model of the modules in which a larger one keeps its own."""
    import torch

    with torch.device("meta"):
        decoder = transformers.AutoModelForCausalLM.from_config(model.config.get_text_config())
    setattr(decoder, decoder.base_model_prefix, model.get_decoder())
    decoder.set_output_embeddings(model.get_output_embeddings())
    return decoder


@contextmanager
def _directory(checkpoint: Checkpoint) -> Iterator[Path]:
    """Give a directory that transformers opens: shards without an index, linked next to one."""
    files = weight_files(checkpoint.directory)
    index = checkpoint.directory / "model.safetensors.index.json"
    if is_file(index) or files == [checkpoint.directory / "model.safetensors"]:
        yield checkpoint.directory
        return
    with scratch.directory("shards") as directory:
        for path in (checkpoint.directory / "config.json", *files):
            (directory / path.name).symlink_to(path.resolve())
        places = {
            name: path.name for path in files for name, _ in read_safetensors(path, dtypes=None)
        }
        text = json.dumps({"metadata": {}, "weight_map": places})
        (directory / index.name).write_text(text, encoding="utf-8")
        yield directory
