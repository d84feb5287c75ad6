"""Text rules: what a runner must know besides the tokenizer and the chat template."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class ThoughtMarks:
    """What stands around what a model thinks before it answers: ``<think>`` and ``</think>``."""

    opens: str
    closes: str

    def opened_by(self, prompt: str) -> bool:
        """Tell whether a prompt ends within a thought, so that the model goes on with it."""
        return prompt.rstrip().endswith(self.opens)


@dataclass(frozen=True, kw_only=True)
class TextRules:
    """What the runner needs besides ``tokenizer.json`` and ``chat_template.jinja``."""

    stop_ids: tuple[int, ...]  # any of these ends an answer
    special_tokens: dict[str, str]  # the names a template may use: {"bos_token": "<s>", …}
    adds_bos: bool  # whether plain text, outside a template, starts with the BOS token
    chat_template_sha256: str | None  # None: the model has no template
    stop_strings: tuple[str, ...] = ()  # any of these ends an answer, and is not part of it
    # What the exporter fixed in the template, which says it itself: JSON, by name.
    template_variables: Mapping[str, str] = field(default_factory=dict)
    content_parts: tuple[str, ...] = ()  # roles whose content the template wants as a list of parts
    thoughts: ThoughtMarks | None = None  # None: the template knows of none
