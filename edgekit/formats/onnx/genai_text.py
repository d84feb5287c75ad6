"""How ONNX Runtime GenAI reads text: with a tokenizer and a Jinja of its own.

Both are those of onnxruntime-extensions (operators/tokenizer, shared/api/chat_template.cc). What
they can be told is written into ``tokenizer_module.json``, which no other program reads and whose
fields go before those of ``tokenizer_config.json``; the rest is for the user to know.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgekit.text.tokenizer_json import read as read_tokenizer


MODULE = "tokenizer_module.json"
# How `ByteLevel` splits; written as in onnxruntime-extensions, which knows it by its letters.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_MARKS = frozenset(
    f"{what}_{where}" for what in ("block", "comment", "raw") for where in ("begin", "end")
)


def tokenizer_module(template: str | None) -> dict[str, str]:
    """Return the fields of ``tokenizer_module.json``; none where it need not exist.

    transformers renders a template with Jinja's ``trim_blocks`` and ``lstrip_blocks``, ONNX Runtime
    GenAI without; so it is given one from which that whitespace is gone.
    """
    if template is None:
        return {}
    trimmed = "".join(
        text.replace("+", "") if kind in _MARKS else text  # plus: do not trim here
        for kind, text in _tokens(template, trims=True)
    )
    as_it_is = "".join(text for _, text in _tokens(template, trims=False))
    return {} if trimmed == as_it_is else {"chat_template": trimmed}


def _tokens(template: str, *, trims: bool) -> Iterator[tuple[str, str]]:
    """Yield kind and text of all that a template consists of, as Jinja cuts it."""
    import jinja2

    lexer = jinja2.Environment(trim_blocks=trims, lstrip_blocks=trims)  # noqa: S701 - renders none
    for _, kind, text in lexer.lex(template):
        # What is trimmed after a mark is a part of it.
        yield kind, text.rstrip() if kind in _MARKS else text


def without_digits(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer.json that cuts out digits in words which other programs know too.

    tokenizers takes every numeral for a digit, transformers.js only 0 to 9. ONNX Runtime GenAI
    leaves the step out, and reads of a sequence only the splits by pattern, so that what
    ``ByteLevel`` does by default has to be one of them.
    """
    steps = (fields.get("pre_tokenizer") or {}).get("pretokenizers", [])
    kinds = [step["type"] for step in steps]
    if kinds != ["Digits", "ByteLevel"] or not steps[0]["individual_digits"]:
        return fields
    last = steps[1]
    if last["add_prefix_space"] or not last["use_regex"]:
        return fields
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    patterns = [split | {"pattern": {"Regex": pattern}} for pattern in (r"\p{N}", GPT2_PATTERN)]
    explicit = {"type": "Sequence", "pretokenizers": [*patterns, last | {"use_regex": False}]}
    return fields | {"pre_tokenizer": explicit}


def notes(tokenizer_json: Path) -> tuple[str, ...]:
    """Return what ONNX Runtime GenAI 0.18 reads otherwise than this tokenizer."""
    fields = read_tokenizer(tokenizer_json)
    return tuple(_notes(without_digits(fields)))


def _notes(fields: Mapping[str, Any]) -> Iterator[str]:
    reads = "ONNX Runtime GenAI's own tokenizer reads"
    normalizer, pre_tokenizer = fields.get("normalizer"), fields.get("pre_tokenizer")
    if "NFC" in _kinds(normalizer, "normalizers"):
        yield f"{reads} letters whose accents stand apart otherwise: it does not compose them (NFC)"
    if "Digits" in _kinds(pre_tokenizer, "pretokenizers"):
        yield f"{reads} numerals beyond 0 to 9 otherwise after a space (½, ٣): it splits no digits"
    if "Prepend" in _kinds(normalizer, "normalizers") and pre_tokenizer is None:
        yield f"{reads} some digits and punctuation otherwise: it cuts text before it merges"


def _kinds(step: Mapping[str, Any] | None, parts: str) -> set[str]:
    """Return the types of a step of a tokenizer.json and of the steps it is made of."""
    if step is None:
        return set()
    return {str(step["type"])}.union(*(_kinds(part, parts) for part in step.get(parts, ())))
