"""Text rules: what a runner must know besides the tokenizer and the chat template."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TextRules:
    """What the runner needs besides ``tokenizer.json`` and ``chat_template.jinja``."""

    stop_ids: tuple[int, ...]  # any of these ends an answer
    special_tokens: dict[str, str]  # the names a template may use: {"bos_token": "<s>", …}
    adds_bos: bool  # whether plain text, outside a template, starts with the BOS token
    chat_template_sha256: str | None  # None: the model has no template
