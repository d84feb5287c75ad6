"""Whole inputs, small and made without torch, for attacks to damage."""

import json
from contextlib import suppress
from pathlib import Path

from edgekit import formats, target
from edgekit.errors import UsageError
from edgekit.export import export
from edgekit.formats import BuildRequest
from edgekit.source import families
from edgekit.source.opening import open_checkpoint
from edgekit.source.writer import write_checkpoint
from edgekit.tests.tiny.random_checkpoints import random_checkpoint


TARGET = "raspberry-pi-5-8gb"
CONTEXT_TOKENS = 64
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CARD = """---
license: apache-2.0
base_model:
- someone/a-base
datasets: [some/data, "other/data"]
language: en
tags:
  - chat
---
# A model
"""


def checkpoint(directory: Path, family: str = "llama", *, shard_bytes: int = 1 << 40) -> Path:
    """Write a model directory with every file that edgekit reads."""
    plain = random_checkpoint(directory.parent / f".{directory.name}", family)
    write_checkpoint(plain, directory, precision="f16", shard_bytes=shard_bytes)
    edit(directory / "generation_config.json", temperature=0.7, top_p=0.9, top_k=40, do_sample=True)
    edit(directory / "generation_config.json", stop_strings=["###"], eos_token_id=[256])
    edit(directory / "tokenizer_config.json", chat_template=TEMPLATE, model_max_length=64)
    names = {"eos_token": "<|end|>", "pad_token": {"content": "<|end|>", "lstrip": False}}
    edit(directory / "special_tokens_map.json", **names)
    (directory / "README.md").write_text(CARD)
    return directory


def checkpoints(directory: Path) -> None:
    """Write a model directory of each family whose config can say a plain decoder."""
    for family in families.names():
        with suppress(UsageError):
            checkpoint(directory / family, family)


def artifact(directory: Path, format: str, recipe: str | None = None) -> Path:
    """Write an artifact of a format, and return the file that is opened."""
    source = open_checkpoint(checkpoint(directory.parent / f".{directory.name}-source"))
    fmt = formats.get(format)
    directory.mkdir(parents=True)
    request = BuildRequest(recipe=fmt.RECIPES[recipe or next(iter(fmt.RECIPES))])
    entry = formats.writing(format).convert(source, request, directory, progress=lambda _: None)
    return directory / entry


def bundle(directory: Path) -> Path:
    """Export a model directory."""
    source = checkpoint(directory.parent / f".{directory.name}-source")
    export(
        source, TARGET, format="gguf", quant="F16", context_tokens=CONTEXT_TOKENS, verify=False,
        out=directory,
    )  # fmt: skip
    return directory


def small_target(path: Path) -> None:
    """Write a target whose budget is for prompts and answers that the bundle's context holds."""
    text = target._files()[TARGET].read_text(encoding="utf-8")
    for known, small in ((4096, CONTEXT_TOKENS), (512, 16), (128, 8)):
        text = text.replace(f'"{known} tokens"', f'"{small} tokens"')
    path.write_text(text, encoding="utf-8")


def edit(path: Path, **fields: object) -> None:
    """Set fields of a JSON file, which need not be there yet."""
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | fields))
