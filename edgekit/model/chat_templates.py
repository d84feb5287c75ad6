"""Which of a checkpoint's chat templates counts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekit.errors import UsageError


def find(directory: Path, settings: Mapping[str, Any]) -> str | None:
    """Return the template: a file of its own wins, of several in the config the default one.

    Args:
        directory: The checkpoint.
        settings: What its ``tokenizer_config.json`` says.

    Raises:
        UsageError: If the template's file is not UTF-8.
    """
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except ValueError as error:
            raise UsageError(f"{path} is not UTF-8: {error}") from error
    template = settings.get("chat_template")
    if isinstance(template, list):
        entries = (entry for entry in template if isinstance(entry, dict))
        named = {entry.get("name"): entry.get("template") for entry in entries}
        template = named.get("default")
    return template if isinstance(template, str) else None
