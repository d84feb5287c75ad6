"""The tokenizer of a GGUF file as the files of an ordinary checkpoint.

The other direction of `edgekit.formats.gguf.vocabulary`. What llama.cpp computes from scores or
has compiled in is spelled out again: merges, cuts, the bos token in front.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from edgekit.errors import UsageError
from edgekit.formats.gguf.pretokenizers import (
    PreTokenizer,
    known_names,
    known_pre_tokenizer,
    to_tokenizer_json,
)
from edgekit.formats.gguf.vocabulary import (
    ANSWER_ENDS,
    CONTROL,
    MESSAGE_ENDS,
    NORMAL,
    PHI3_NAMES,
    PHI3_STAYING,
    SPACE,
    TURN_ENDS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    splits,
)
from edgekit.model import chat_templates


# What llama.cpp assumes for a "llama" vocabulary that does not say; a "gpt2" one has none worth
# having. Source: impl::load in src/llama-vocab.cpp, llama.cpp 0c1e57098.
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}


@dataclass(frozen=True, kw_only=True)
class _Vocabulary:
    """The ``tokenizer.*`` metadata of a file, checked."""

    model: str  # gpt2, llama or gemma4
    tokens: Sequence[str]
    types: Sequence[int]
    metadata: Mapping[str, Any]

    @classmethod
    def parse(cls, metadata: Mapping[str, Any]) -> "_Vocabulary":
        model = metadata.get("tokenizer.ggml.model")
        if model not in ("gpt2", "llama", "gemma4"):
            raise UsageError(
                f"the file has a {model!r} tokenizer, edgekit reads 'gpt2' (byte-level BPE), "
                "'llama' (SentencePiece BPE) and 'gemma4' (the same with its merges)",
                hint="start from the Hugging Face checkpoint instead",
            )
        tokens = _array(metadata, "tokens", str)
        types = _array(metadata, "token_type", int) or [NORMAL] * len(tokens)
        if not tokens or len(types) != len(tokens):
            raise UsageError(
                f"the file has {len(tokens)} tokens and {len(types)} token types",
                hint="the file is damaged; download it again",
            )
        kept = _without_padding(tokens, types)
        if len(set(tokens)) != len(tokens):
            raise UsageError("the file has a token twice", hint="the file is damaged")
        return cls(model=model, tokens=tokens[:kept], types=types[:kept], metadata=metadata)

    @cached_property
    def ids(self) -> Mapping[str, int]:
        return {token: id for id, token in enumerate(self.tokens)}

    def id(self, name: str) -> int | None:
        """Return a special token's id, if it names a token."""
        default = _SENTENCEPIECE_IDS.get(name) if self.model == "llama" else None
        found = self.metadata.get(f"tokenizer.ggml.{name}_token_id", default)
        is_token = isinstance(found, int) and 0 <= found < len(self.tokens)
        return found if is_token else None

    def token(self, name: str) -> str | None:
        id = self.id(name)
        return None if id is None else self.tokens[id]

    def flag(self, name: str, *, default: bool) -> bool:
        return bool(self.metadata.get(f"tokenizer.ggml.{name}", default))

    @cached_property
    def pre(self) -> PreTokenizer:
        name = str(self.metadata.get("tokenizer.ggml.pre", "default"))
        known = known_pre_tokenizer(name)
        if known is None:
            raise UsageError(
                f"the file's pre-tokenizer is {name!r}, edgekit knows {', '.join(known_names())}",
                hint="start from the Hugging Face checkpoint, which spells its cuts out",
            )
        return known

    @property
    def adds_bos(self) -> bool:
        default = self.pre.adds_bos if self.model == "gpt2" else True
        return self.id("bos") is not None and self.flag("add_bos_token", default=default)

    @property
    def adds_eos(self) -> bool:
        return self.id("eos") is not None and self.flag("add_eos_token", default=False)

    @property
    def adds_space(self) -> bool:
        return self.model == "llama" and self.flag("add_space_prefix", default=True)

    @property
    def is_phi3(self) -> bool:
        name = str(self.metadata.get("general.name", "")).lower()
        return any(word in name for word in PHI3_NAMES)


def _array(metadata: Mapping[str, Any], name: str, kind: type) -> Sequence[Any]:
    values = metadata.get(f"tokenizer.ggml.{name}", ())
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise UsageError(f"tokenizer.ggml.{name} is not an array")
    if not all(isinstance(value, kind) for value in values):
        raise UsageError(f"tokenizer.ggml.{name} is not an array of {kind.__name__}")
    return values


def _without_padding(tokens: Sequence[str], types: Sequence[int]) -> int:
    """Return how many tokens there are before the ones that only fill up the embedding."""
    kept = len(tokens)
    # Old converters called them unknown.
    while kept and types[kept - 1] in {UNUSED, UNKNOWN} and tokens[kept - 1] == f"[PAD{kept - 1}]":
        kept -= 1
    return kept


def write_tokenizer(metadata: Mapping[str, Any], directory: Path) -> None:
    """Write the tokenizer of a GGUF file as a checkpoint has it.

    Args:
        metadata: All keys of the file with plain values.
        directory: Gets tokenizer.json, tokenizer_config.json, generation_config.json, and
            chat_template.jinja and additional_chat_templates if the file has templates.

    Raises:
        UsageError: If edgekit cannot reproduce the tokenizer; the message says which part.
    """
    vocabulary = _Vocabulary.parse(metadata)
    _write_json(directory / "tokenizer.json", _tokenizer_json(vocabulary))
    _write_json(directory / "tokenizer_config.json", _tokenizer_config(vocabulary))
    _write_json(directory / "generation_config.json", _generation_config(vocabulary))
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        (directory / chat_templates.FILE).write_bytes(template.encode())
    chat_templates.write_others(dict(_named_templates(metadata)), directory)


def _named_templates(metadata: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    prefix = "tokenizer.chat_template."
    for key, template in metadata.items():
        if key.startswith(prefix) and isinstance(template, str):
            yield key.removeprefix(prefix), template


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
    text = json.dumps(fields, ensure_ascii=False, indent=2)
    path.write_text(text + "\n", encoding="utf-8")


def _tokenizer_config(vocabulary: _Vocabulary) -> dict[str, Any]:
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    special = {ours: vocabulary.token(name) for name, ours in names.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: token for name, token in special.items() if token is not None},
        "clean_up_tokenization_spaces": False,
    }


def _generation_config(vocabulary: _Vocabulary) -> dict[str, Any]:
    ids = {"bos_token_id": vocabulary.id("bos"), "pad_token_id": vocabulary.id("padding")}
    return {
        **{name: id for name, id in ids.items() if id is not None},
        "eos_token_id": list(_stop_ids(vocabulary)),
    }


def _stop_ids(vocabulary: _Vocabulary) -> dict[int, None]:
    """Return the ids that end an answer, each once: the declared ones, and known ends of turns.

    Most files declare one end and leave llama.cpp to find the others by their text.
    """
    declared = [vocabulary.id(name) for name in ("eos", "eot", "eom")]
    by_text = [
        vocabulary.ids[token]
        for token in (*TURN_ENDS, *MESSAGE_ENDS, *ANSWER_ENDS)
        if token in vocabulary.ids and vocabulary.types[vocabulary.ids[token]] == CONTROL
    ]
    found = dict.fromkeys(id for id in [*declared, *by_text] if id is not None)
    if not found:
        raise UsageError("the file declares no token that ends an answer")
    return found


# tokenizer.json


def _tokenizer_json(vocabulary: _Vocabulary) -> dict[str, Any]:
    fields = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(_added_tokens(vocabulary)),
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": _post_processor(vocabulary),
    }
    is_byte_level = vocabulary.model == "gpt2"
    return fields | (_byte_level(vocabulary) if is_byte_level else _sentencepiece(vocabulary))


def _added_tokens(vocabulary: _Vocabulary) -> Iterator[dict[str, Any]]:
    for id, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if kind in {CONTROL, USER_DEFINED, UNKNOWN}:
            yield {
                "id": id,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": vocabulary.is_phi3 and token not in PHI3_STAYING,
                "normalized": False,
                "special": kind != USER_DEFINED,
            }


def _byte_level(vocabulary: _Vocabulary) -> dict[str, Any]:
    pre = vocabulary.pre
    decoder = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": True,
        "use_regex": True,
    }
    return {
        "normalizer": {"type": "NFC"} if pre.composes else None,
        "pre_tokenizer": to_tokenizer_json(pre),
        "decoder": decoder,
        "model": _bpe(
            vocabulary, _listed_merges(vocabulary), unknown=None, ignores_merges=pre.ignores_merges
        ),
    }


def _bpe(
    vocabulary: _Vocabulary,
    merges: Sequence[tuple[str, str]],
    *,
    unknown: str | None,
    ignores_merges: bool = False,
) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": unknown is not None,
        "byte_fallback": vocabulary.model != "gpt2",
        "ignore_merges": ignores_merges,
        "vocab": dict(vocabulary.ids),
        "merges": [list(pair) for pair in merges],
    }


def _listed_merges(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    merges = []
    for merge in _array(vocabulary.metadata, "merges", str):
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= vocabulary.ids.keys():
            raise UsageError(
                f"the file merges {merge!r}, which are not two tokens that make a third",
                hint="the file is damaged; download it again",
            )
        merges.append((left, right))
    return merges


def _sentencepiece(vocabulary: _Vocabulary) -> dict[str, Any]:
    to_mark = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    to_space = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    has_merges = vocabulary.model == "gemma4"
    merges = _listed_merges(vocabulary) if has_merges else _scored_merges(vocabulary)
    normalizers = [to_mark]
    decoders = [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if vocabulary.adds_space:
        normalizers.insert(0, {"type": "Prepend", "prepend": SPACE})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(vocabulary, merges, unknown=vocabulary.token("unknown")),
    }


def _scored_merges(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Return every pair of tokens that makes a token, the best score of the result first."""
    scores = _array(vocabulary.metadata, "scores", float)
    if len(scores) < len(vocabulary.tokens):
        raise UsageError(f"the file has {len(scores)} scores, {len(vocabulary.tokens)} tokens")
    normal = {token: id for token, id in vocabulary.ids.items() if vocabulary.types[id] == NORMAL}
    made = [(id, pair) for token, id in normal.items() for pair in splits(token, normal)]
    if len(made) > 1 and len({scores[id] for id, _ in made}) == 1:
        raise UsageError(
            "the file gives every token the same score, so the order of its merges is lost",
            hint="it was converted without its tokenizer.model; start from the checkpoint instead",
        )
    made.sort(key=lambda item: (-scores[item[0]], *(normal[part] for part in item[1])))
    return [pair for _, pair in made]


def _post_processor(vocabulary: _Vocabulary) -> dict[str, Any] | None:
    before = vocabulary.token("bos") if vocabulary.adds_bos else None
    after = vocabulary.token("eos") if vocabulary.adds_eos else None
    if before is None and after is None:
        if vocabulary.model != "gpt2":
            return None
        return {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": False,
            "use_regex": True,
        }
    return {
        "type": "TemplateProcessing",
        "single": list(_around("A", before, after, type_id=0)),
        "pair": [
            *_around("A", before, after, type_id=0),
            *_around("B", before, after, type_id=1),
        ],
        "special_tokens": {
            token: {"id": token, "ids": [vocabulary.ids[token]], "tokens": [token]}
            for token in (before, after)
            if token is not None
        },
    }


def _around(
    text: str, before: str | None, after: str | None, *, type_id: int
) -> Iterator[dict[str, Any]]:
    if before is not None:
        yield {"SpecialToken": {"id": before, "type_id": type_id}}
    yield {"Sequence": {"id": text, "type_id": type_id}}
    if after is not None:
        yield {"SpecialToken": {"id": after, "type_id": type_id}}
