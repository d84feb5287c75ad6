"""The text side of a tiny model without its weights: what needs no torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgekit.model.tokenizer_files import TokenizerFiles
from edgekit.tests.tiny.tokenizers import VOICES, train
from edgekit.text.tokenizer import Text


if TYPE_CHECKING:
    from edgekit.source.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class _TextSide:
    """What of a checkpoint a conversation is derived from."""

    directory: Path
    text: TokenizerFiles


def speak(
    directory: Path,
    voice: str,
    *,
    template: str | None = None,
    has_template: bool = True,
    **generation: Any,
) -> "Checkpoint":
    """Return a checkpoint with a directory and a text side, and nothing else.

    Args:
        directory: Where its files go; made if it is not there.
        voice: Of `VOICES`.
        template: Its chat template, if not the voice's own.
        has_template: Whether it has one at all.
        generation: Fields of its ``generation_config.json``; the stop ids are the voice's.
    """
    known = VOICES[voice]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(train(voice), encoding="utf-8")
    if has_template:
        source = known.template if template is None else template
        (directory / "chat_template.jinja").write_text(source, encoding="utf-8")
    special = {"bos_token": known.bos, "eos_token": known.eos}
    (directory / "tokenizer_config.json").write_text(json.dumps(special), encoding="utf-8")
    ids = {token["content"]: token["id"] for token in json.loads(train(voice))["added_tokens"]}
    fields = {"eos_token_id": [ids[token] for token in known.stops], **generation}
    (directory / "generation_config.json").write_text(json.dumps(fields), encoding="utf-8")
    files = TokenizerFiles.open(directory, config={})
    return cast("Checkpoint", _TextSide(directory=directory, text=files))


def text_of(checkpoint: "Checkpoint", directory: Path) -> Text:
    """Return how the runner reads and writes the checkpoint's text; ``directory`` is for copies."""
    directory.mkdir(parents=True, exist_ok=True)
    return Text.open(directory, checkpoint.text.copy_into(directory))


def thoughtful(voice, *, before="'<think></think>' + "):
    """Return a voice's template with an empty thought before every earlier answer."""
    template = VOICES[voice].template
    content = "message['content'] + '<|im_end|>'"
    assert content in template
    answered = f"({before}said if message.role == 'assistant' else said) + '<|im_end|>'"
    said = (
        "{%- set said = message.content.split('</think>')[-1].lstrip('\\n') if '</think>' in "
        "message.content else message.content %}"
    )
    head = "{%- for message in messages -%}\n"
    assert head in template
    return template.replace(content, answered).replace(head, head + said)
