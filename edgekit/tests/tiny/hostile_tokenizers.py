"""Changes to a tokenizer.json that make the tokenizers library panic, abort, or multiply its text.

Each is a top-level field with its new value; the file around it is any byte-level BPE.
"""

import base64
import struct
from collections.abc import Mapping
from typing import Any


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _replace(content: str, *, times: int = 1, **pattern: str) -> dict[str, Any]:
    step = {"type": "Replace", "pattern": pattern, "content": content}
    return step if times == 1 else {"type": "Sequence", "normalizers": [step] * times}


def _charsmap(trie: bytes, text: bytes = b"") -> dict[str, Any]:
    content = base64.b64encode(struct.pack("<I", len(trie)) + trie + text).decode()
    return {"type": "Precompiled", "precompiled_charsmap": content}


def _nested(kind: str, parts: str, depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {"type": kind, parts: []}
    for _ in range(depth):
        value = {"type": kind, parts: [value]}
    return value


TOKENIZERS: Mapping[str, Mapping[str, Any]] = {
    # Patterns that try every way to split a text
    "words before a mark": {"pre_tokenizer": _split(r"(\w+\s?)*!")},
    "letters before an end": {"pre_tokenizer": _split(r"(a+)+$")},
    "alternatives": {"pre_tokenizer": _split(r"(a|aa)+!")},
    "a slow normalizer": {"normalizer": _replace("", Regex=r"(\w+\s?)*!")},
    "a pattern that refers back": {"pre_tokenizer": _split(r"(\w*)*\1!")},
    "a pattern that is none": {"pre_tokenizer": _split(r"(")},
    "a pattern of a million braces": {"pre_tokenizer": _split("(" * 100_000 + ")" * 100_000)},
    "a pattern that counts": {"pre_tokenizer": _split("((a{1,30000}){1,30000}){1,30000}!")},
    # What makes a text many times as long
    "every letter doubled": {"normalizer": _replace("aa", times=34, Regex=".")},
    "one letter doubled": {"normalizer": _replace("ee", times=34, String="e")},
    "a rare letter doubled": {"normalizer": _replace("\u2603\u2603", times=34, String="\u2603")},
    "nothing made long": {"normalizer": _replace("a" * 100, Regex="")},
    "one letter made long": {"normalizer": _replace("a" * 1_000_000, String="e")},
    "a rare letter made long": {"normalizer": _replace("a" * 1_000_000, String="\u2603")},
    "a token made long": {
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 1_000_000},
                {"type": "Fuse"},
            ],
        }
    },
    # Tables that are none
    "no table": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}},
    "a table of three bytes": {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    },
    "a table that lies about its size": {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////wAAAAA="}
    },
    "a table that is not base64": {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": "%%%"}
    },
    "a table that points out of itself": {"normalizer": _charsmap(b"\xff" * 1024, b"\xff" * 9)},
    # Depth, and parts that are none
    "a deep normalizer": {"normalizer": _nested("Sequence", "normalizers", 400)},
    "a deep pre-tokenizer": {"pre_tokenizer": _nested("Sequence", "pretokenizers", 400)},
    "a deep decoder": {"decoder": _nested("Sequence", "decoders", 400)},
    "an unknown part": {"normalizer": {"type": "Evil"}},
    "a part that is text": {"pre_tokenizer": "Evil"},
    "merges of unknown tokens": {
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["x", "y"]]}
    },
    "an unknown token that is none": {
        "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}
    },
    "no unknown token": {"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": None}},
    "an unknown id beyond the pieces": {
        "model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 9}
    },
    "no pieces": {"model": {"type": "Unigram", "vocab": [], "unk_id": 0}},
    "a score that is none": {"model": {"type": "Unigram", "vocab": [["a", "x"]], "unk_id": 0}},
    "an id beyond 32 bits": {"model": {"type": "BPE", "vocab": {"a": 2**40}, "merges": []}},
    "a negative id": {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}},
    "an added token without an id": {"added_tokens": [{"content": "<x>"}]},
    "an empty added token": {"added_tokens": [{"id": 0, "content": ""}]},
    "a truncation below nothing": {"truncation": {"max_length": -1}},
}
