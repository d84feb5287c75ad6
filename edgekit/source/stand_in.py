"""Text files for a model of which only the config is there, so that its shape can be planned.

Formats lay a vocabulary out, so a plan needs one of the right size. This one is made of no words:
its tokens and merges take about the room of real ones. In tokenizers of 32,000 to 262,144 tokens
(Llama 2 and 3, Gemma 3, Qwen 3, gpt-oss) a token has 6 to 10 bytes and there are one to two merges
for each; here it is 8 bytes and two merges.
"""

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path


VERSION = 1  # counts up when the same size gives other files
_LETTERS = "etao"  # so few that words grow as long as real tokens are
_MARKS = ("<|im_start|>", "<|im_end|>")
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_text_files(directory: Path, *, vocab_size: int) -> None:
    """Write the files of a byte-level BPE tokenizer of so many tokens, and a template."""
    added = _MARKS if vocab_size > len(_MARKS) else ()
    words = [word for word, _ in zip(_words(), range(vocab_size - len(added)), strict=False)]
    known = set(words)
    merges = [
        pair
        for word in words
        if len(word) > 1
        for pair in dict.fromkeys(((word[:-1], word[-1]), (word[0], word[1:])))
        if known.issuperset(pair)
    ]
    vocabulary = {token: id for id, token in enumerate((*words, *added))}
    tokens = [
        {
            "id": vocabulary[token], "content": token, "special": True, "normalized": False,
            "lstrip": False, "rstrip": False, "single_word": False,
        }
        for token in added
    ]  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": True}  # fmt: skip
    tokenizer = {
        "version": "1.0",
        "added_tokens": tokens,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    }
    _store(directory / "tokenizer.json", tokenizer)
    settings = {"chat_template": _TEMPLATE} | dict(
        zip(("bos_token", "eos_token"), added, strict=False)
    )
    _store(directory / "tokenizer_config.json", settings)
    _store(directory / "generation_config.json", {"eos_token_id": vocab_size - 1})


def _words() -> Iterator[str]:
    """Yield the bytes as byte-level BPE writes them, then words of a few letters, without end."""
    from tokenizers.pre_tokenizers import ByteLevel

    yield from sorted(ByteLevel.alphabet())
    length = 2
    while True:
        yield from map("".join, product(_LETTERS, repeat=length))
        length += 1


def _store(path: Path, fields: object) -> None:
    path.write_text(json.dumps(fields, ensure_ascii=False), encoding="utf-8")
