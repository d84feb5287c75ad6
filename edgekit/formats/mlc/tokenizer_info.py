"""What MLC's programs ask about a tokenizer before they load it."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgekit.errors import UsageError
from edgekit.text.tokenizer_json import read as read_tokenizer


def read(tokenizer_json: Path) -> dict[str, Any]:
    """Return the ``tokenizer_info`` of ``mlc-chat-config.json``.

    Raises:
        UsageError: If a token was added twice, with which MLC cannot load the tokenizer.

    Source: ``DetectTokenizerInfo`` in cpp/tokenizers/tokenizers.cc of mlc-llm.
    """
    fields = read_tokenizer(tokenizer_json)
    _refuse_repetition(tokenizer_json, fields.get("added_tokens", []))
    normalizers = list(_steps(fields.get("normalizer"), "normalizers"))
    decoders = list(_steps(fields.get("decoder"), "decoders"))
    return {
        "token_postproc_method": _method(decoders),
        "prepend_space_in_encode": any(
            step.get("type") == "Prepend" and step.get("prepend") == "\u2581"
            for step in normalizers
        ),
        "strip_space_in_decode": any(
            {key: step.get(key) for key in ("type", "content", "start", "stop")}
            == {"type": "Strip", "content": " ", "start": 1, "stop": 0}
            for step in decoders
        ),
    }


def active_vocab_size(tokenizer_json: Path) -> int:
    """Return how many tokens have a text; a model may have rows for more."""
    fields = read_tokenizer(tokenizer_json)
    vocabulary = fields["model"]["vocab"]
    # Unigram's is a list of pieces with scores.
    texts = set(vocabulary) if isinstance(vocabulary, dict) else {piece for piece, _ in vocabulary}
    return len(texts | {token["content"] for token in fields.get("added_tokens", [])})


def _refuse_repetition(path: Path, added: list[dict[str, Any]]) -> None:
    twice = [text for text, count in Counter(t["content"] for t in added).items() if count > 1]
    if twice:
        raise UsageError(
            f"{path} adds the token {twice[0]!r} twice, MLC reads each once",
            hint="load it once with AutoTokenizer and save_pretrained() it into the model",
        )


def _method(decoders: list[dict[str, Any]]) -> str:
    names = {"ByteLevel": "byte_level", "ByteFallback": "byte_fallback"}
    found = [names[step["type"]] for step in decoders if step.get("type") in names]
    return found[-1] if found else "byte_fallback"


def _steps(step: dict[str, Any] | None, parts: str) -> Iterator[dict[str, Any]]:
    """Yield a normalizer or decoder, or those in it if it is a sequence."""
    if step is None:
        return
    if step.get("type") == "Sequence":
        yield from step[parts]
    else:
        yield step
