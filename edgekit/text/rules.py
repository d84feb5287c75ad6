"""Text rules: what a runner must know besides the tokenizer and the chat template."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TextRules:
    """What the runner needs besides ``tokenizer.json`` and ``chat_template.jinja``."""

    stop_ids: tuple[int, ...]  # any of these ends an answer
    special_tokens: dict[str, str]  # the names a template may use: {"bos_token": "<s>", …}
    adds_bos: bool  # whether plain text, outside a template, starts with the BOS token
    chat_template_sha256: str | None  # None: the model has no template
    stop_strings: tuple[str, ...] = ()  # any of these ends an answer, and is not part of it
    # What the exporter fixed in the template, for messages: the template says it itself.
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    content_parts: tuple[str, ...] = ()  # roles whose content the template wants as a list of parts
