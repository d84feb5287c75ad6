"""The space in front of a text, which SentencePiece's tokenizers put there and programs do not.

A tokenizer.json may put one before the first text of a prompt, or before every text that does not
begin with one. Other programs know only "always" and "never", so text that is not a chat prompt
may get one space more or less from them.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgekit.text.tokenizer_json import read as read_tokenizer


def with_and_without(tokenizer_json: Path, texts: Sequence[str]) -> list[list[list[int]]]:
    """Return for each text its ids with one more space in front and with none put there.

    They are empty where the tokenizer looks for no space in front: there is one reading then.

    Raises:
        UsageError: If the file is malformed.
        MissingDependencyError: If tokenizers is not installed.
    """
    fields = read_tokenizer(tokenizer_json)
    plain = _without_space(fields.get("pre_tokenizer"))
    if plain == fields.get("pre_tokenizer"):
        return [[] for _ in texts]
    import tokenizers

    reader = tokenizers.Tokenizer.from_str(json.dumps(fields | {"pre_tokenizer": plain}))
    reader.no_truncation()
    reader.no_padding()
    both = [[f" {text}", text] for text in texts]
    return [[it.ids for it in reader.encode_batch(pair, add_special_tokens=False)] for pair in both]


def _without_space(step: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Return a pre-tokenizer in which no Metaspace puts a space in front."""
    if step is None:
        return None
    if step.get("type") == "Sequence":
        return {**step, "pretokenizers": [_without_space(it) for it in step["pretokenizers"]]}
    if step.get("type") != "Metaspace" or step.get("prepend_scheme") == "never":
        return step
    kept = {key: value for key, value in step.items() if key != "add_prefix_space"}
    return {**kept, "prepend_scheme": "never"}
