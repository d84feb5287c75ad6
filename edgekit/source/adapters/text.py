"""An adapter's text side: its tokenizer, special tokens, chat template and generation settings.

What an adapter brings is taken whole or refused, because a fine-tune whose tokens fall apart, or
that stops at another token, is not what was trained. Base and adapter together are written into a
directory of the cache, as transformers reads one, and everything after that reads this directory.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from edgekit.bundle import kept
from edgekit.cache import cache_directory
from edgekit.encodings.files import is_file, readable, require_file
from edgekit.encodings.hashing import sha256_of
from edgekit.encodings.json_files import read_object, read_object_if_there
from edgekit.encodings.limits import TOKENIZER_BYTES, check_size
from edgekit.encodings.protobuf import ProtobufMessage
from edgekit.errors import BundleError, UsageError
from edgekit.model import chat_templates
from edgekit.model.chat_templates import ChatTemplates
from edgekit.model.tokenizer_files import TokenizerFiles, special_tokens, with_legacy_map
from edgekit.text.tokenizer_json import read as read_tokenizer


TOKENIZER, SETTINGS, GENERATION = (
    "tokenizer.json", "tokenizer_config.json", "generation_config.json",
)  # fmt: skip
_ADDED = "added_tokens.json"
_SENTENCEPIECE = "tokenizer.model"
# What tokenizers without a tokenizer.json read; the rest of them edgekit compares as bytes only.
_VOCABULARIES = ("vocab.json", "merges.txt", _SENTENCEPIECE, "spiece.model", "vocab.txt",
                 "tokenizer.tiktoken", "qwen.tiktoken")  # fmt: skip
_PIECES, _PIECE = 1, 1  # fields of sentencepiece_model.proto: ModelProto, SentencePiece
_ATTRIBUTES = ("single_word", "lstrip", "rstrip", "normalized", "special")
_MORE_NAMES = ("additional_special_tokens", "extra_special_tokens")
_WAY_OUT = (
    "in the adapter's directory, AutoTokenizer.from_pretrained('.').save_pretrained('.') writes "
    "the tokenizer.json it was trained with"
)

Token = dict[str, Any]  # an entry of tokenizer.json's added_tokens


@dataclass(frozen=True, kw_only=True)
class AdapterText:
    """The text side of base and adapter together, and what the adapter brought to it."""

    files: TokenizerFiles
    has_tokens: bool = False  # a tokenizer.json of its own, or tokens that the base lacks
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Brought:
    """What an adapter's directory says about text."""

    directory: Path
    settings: Mapping[str, Any]  # its tokenizer_config.json, special_tokens_map.json joined
    templates: ChatTemplates
    has_tokenizer: bool  # a tokenizer.json
    has_settings: bool
    has_generation: bool

    @property
    def is_nothing(self) -> bool:
        return not (
            self.settings
            or self.templates.by_name
            or self.has_tokenizer
            or self.has_generation
            or is_file(self.directory / _ADDED)
            or brings_vocabulary(self.directory)
        )


def brings_vocabulary(directory: Path) -> bool:
    """Tell whether an adapter's directory holds a tokenizer that opens without its base."""
    return any(is_file(directory / name) for name in (TOKENIZER, *_VOCABULARIES))


def merge(base: TokenizerFiles, adapter: Path, *, model: Path) -> AdapterText:
    """Return the text side of a base with what an adapter's directory says put over it.

    Args:
        base: Of the model, earlier adapters included.
        adapter: The adapter's directory.
        model: The model's directory.

    Raises:
        UsageError: If a file is damaged, or the adapter's tokenizer is one that edgekit cannot
            put together from the base's tokenizer.json.
    """
    brought = _read(adapter)
    if brought.is_nothing:
        return AdapterText(files=base)
    tokenizer, new = _tokenizer(base, brought)
    small = {
        SETTINGS: _settings(base, brought),
        GENERATION: _generation_config(base, brought, model),
    }
    directory = _written(tokenizer, small)
    declared = base.stop_ids_by_file.get("config.json", ())
    files = TokenizerFiles.open(directory, config={"eos_token_id": list(declared)})
    return AdapterText(
        files=replace(
            files,
            notes=(*base.notes, *brought.templates.notes),
            template_files={**base.template_files, **brought.templates.files},
        ),
        has_tokens=brought.has_tokenizer or bool(new),
        notes=tuple(_notes(brought, new)),
    )


def _read(directory: Path) -> _Brought:
    own = read_object_if_there(directory / SETTINGS)
    return _Brought(
        directory=directory,
        settings=with_legacy_map(directory, own),
        templates=ChatTemplates.read(directory, own),
        has_tokenizer=is_file(directory / TOKENIZER),
        has_settings=is_file(directory / SETTINGS),
        has_generation=is_file(directory / GENERATION),
    )


def _notes(brought: _Brought, new: list[str]) -> Iterator[str]:
    if brought.has_tokenizer:
        is_both = brought.templates.by_name
        yield f"the tokenizer {'and chat template are' if is_both else 'is'} the adapter's"
        return
    if new:
        yield (
            f"the tokenizer is the base's with {len(new)} of the adapter's tokens: {_listed(new)}"
        )
    if brought.templates.by_name:
        yield "the chat template is the adapter's"


def _listed(tokens: list[str], *, most: int = 4) -> str:
    return ", ".join(map(repr, tokens[:most])) + (", …" if len(tokens) > most else "")


# The tokenizer


def _tokenizer(base: TokenizerFiles, brought: _Brought) -> tuple[Path | bytes, list[str]]:
    """Return the tokenizer.json that counts, a file or its text, and the tokens new in it."""
    if brought.has_tokenizer:
        return brought.directory / TOKENIZER, []
    is_whole = brings_vocabulary(brought.directory)
    tokens = _added(brought)
    names = special_tokens(brought.settings)
    if not (is_whole or tokens or names):
        return base.tokenizer_json, []
    fields = read_tokenizer(base.tokenizer_json)
    ids = _ids_of(fields, base.tokenizer_json)
    _refuse_other_vocabulary(base, brought, fields, ids)
    has_all = is_whole and "added_tokens_decoder" in brought.settings
    known = {str(token["content"]): token for token in fields.get("added_tokens", [])}
    if has_all and (lost := sorted(known.keys() - {it["content"] for it in tokens})):
        raise UsageError(
            f"{brought.directory} has a tokenizer without the base's {_listed(lost)}",
            hint=_WAY_OUT,
        )
    tokens += _named(brought, {*known, *(it["content"] for it in tokens)}, ids)
    new = [it for it in tokens if it["content"] not in ids]
    _refuse_other_ids(brought, tokens, new, ids)
    said = {it["content"]: it for it in tokens}
    has_attributes = "added_tokens_decoder" in brought.settings
    joined = known | said if has_attributes else said | known
    if joined == known:
        return base.tokenizer_json, []
    _refuse_gaps(brought, new, ids)
    fields["added_tokens"] = sorted(joined.values(), key=lambda token: int(token["id"]))
    text = json.dumps(fields, ensure_ascii=False).encode()
    return text, [it["content"] for it in new]


def token_ids(tokenizer_json: Path) -> set[int]:
    """Return every id that a tokenizer knows.

    Raises:
        UsageError: If it is not a tokenizer.
    """
    return set(_ids_of(read_tokenizer(tokenizer_json), tokenizer_json).values())


def _ids_of(fields: Mapping[str, Any], path: Path) -> dict[str, int]:
    """Return the id of every token of a tokenizer.json."""
    vocabulary = _model_of(fields).get("vocab")
    try:
        if isinstance(vocabulary, list):  # Unigram's pieces, each with its score
            ids = {str(piece[0]): id for id, piece in enumerate(vocabulary)}
        else:
            ids = {str(token): int(id) for token, id in dict(vocabulary or {}).items()}
        added = fields.get("added_tokens", [])
        return ids | {str(token["content"]): int(token["id"]) for token in added}
    except (TypeError, KeyError, ValueError, IndexError) as error:
        raise UsageError(f"{path} is not a tokenizer: its vocabulary is malformed") from error


def _model_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    model = fields.get("model")
    return model if isinstance(model, dict) else {}


def _added(brought: _Brought) -> list[Token]:
    """Return the tokens that the adapter's files add, in the order of their ids."""
    decoder = brought.settings.get("added_tokens_decoder")
    path = brought.directory / (_ADDED if decoder is None else SETTINGS)
    if decoder is None:
        by_content = read_object_if_there(path)
        special = set(_special_contents(brought.settings))
        entries = [(id, {"content": it, "special": it in special}) for it, id in by_content.items()]
    else:
        entries = list(decoder.items()) if isinstance(decoder, dict) else [("", decoder)]
    try:
        tokens = [_token(int(id), given) for id, given in entries]
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise UsageError(f"{path}: the added tokens are not tokens with content and id") from error
    return sorted(tokens, key=lambda token: int(token["id"]))


def _token(id: int, given: Mapping[str, Any]) -> Token:
    """Return an entry of tokenizer.json; what is not given is as in transformers' AddedToken."""
    is_special = bool(given.get("special", False))
    usual = {"normalized": not is_special, "special": is_special}
    attributes = {name: bool(given.get(name, usual.get(name, False))) for name in _ATTRIBUTES}
    return {"id": id, "content": str(given["content"]), **attributes}


def _special_contents(settings: Mapping[str, Any]) -> Iterator[str]:
    yield from special_tokens(settings).values()
    for name in _MORE_NAMES:
        listed = settings.get(name)
        entries = listed.values() if isinstance(listed, dict) else listed or []
        for entry in entries:
            yield str(entry.get("content") if isinstance(entry, dict) else entry)


def _named(brought: _Brought, known: set[str], ids: Mapping[str, int]) -> Iterator[Token]:
    """Yield the special tokens that only their names tell of; transformers adds these too."""
    for content in dict.fromkeys(_special_contents(brought.settings)):
        if content in known:
            continue
        if content not in ids:
            raise UsageError(
                f"{brought.directory} names the special token {content!r}, which has no id in it "
                "or in the base's tokenizer",
                hint=_WAY_OUT,
            )
        yield _token(ids[content], {"content": content, "special": True})


def _refuse_other_ids(
    brought: _Brought, tokens: list[Token], new: list[Token], ids: Mapping[str, int]
) -> None:
    taken = {id: token for token, id in ids.items()}
    for token in tokens:
        content, id = token["content"], token["id"]
        if ids.get(content, id) != id:
            raise UsageError(
                f"{brought.directory} gives the token {content!r} the id {id}, the base's "
                f"tokenizer {ids[content]}",
                hint=_WAY_OUT,
            )
    for token in new:
        if token["id"] in taken:
            raise UsageError(
                f"{brought.directory} gives the token {token['content']!r} the id {token['id']}, "
                f"which is {taken[token['id']]!r} in the base's tokenizer",
                hint=_WAY_OUT,
            )


def _refuse_gaps(brought: _Brought, new: list[Token], ids: Mapping[str, int]) -> None:
    """Check that new ids go on where the base's end: a tokenizer.json cannot say another thing."""
    first = max(ids.values(), default=-1) + 1
    for expected, token in enumerate(new, start=first):
        if token["id"] != expected:
            raise UsageError(
                f"{brought.directory} gives the new token {token['content']!r} the id "
                f"{token['id']}, the next after the base's tokenizer is {expected}",
                hint=_WAY_OUT,
            )


def _refuse_other_vocabulary(
    base: TokenizerFiles, brought: _Brought, fields: Mapping[str, Any], ids: Mapping[str, int]
) -> None:
    """Check that the files of a slow tokenizer say what the base's tokenizer.json says."""
    for name in _VOCABULARIES:
        path, own = brought.directory / name, base.tokenizer_json.parent / name
        if not is_file(path) or (is_file(own) and sha256_of(own) == sha256_of(path)):
            continue
        if name == "merges.txt":
            is_same = _merges_of(path) == _merges(fields)
        elif name == "vocab.json":
            is_same = _is_vocabulary(read_object(path), fields, ids)
        elif name == _SENTENCEPIECE and isinstance(_model_of(fields).get("vocab"), dict):
            is_same = _is_vocabulary(_pieces(path), fields, ids)
        else:
            is_same = False
        if not is_same:
            raise UsageError(
                f"{path} is not the vocabulary of {base.tokenizer_json}, and {brought.directory} "
                "has no tokenizer.json",
                hint=_WAY_OUT,
            )


def _is_vocabulary(
    found: Mapping[str, Any], fields: Mapping[str, Any], ids: Mapping[str, int]
) -> bool:
    own = _model_of(fields).get("vocab")
    added = {it["content"] for it in fields.get("added_tokens", [])}
    return (
        isinstance(own, dict)
        and all(ids.get(token) == id for token, id in found.items())
        and own.keys() - added <= found.keys()
    )


def _merges_of(path: Path) -> list[str]:
    require_file(path)
    check_size(path, TOKENIZER_BYTES)
    with readable(path):
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    if lines[0].startswith("#version"):
        lines = lines[1:]
    return [line.rstrip("\r") for line in lines if line.strip()]


def _merges(fields: Mapping[str, Any]) -> list[str]:
    merges = _model_of(fields).get("merges", [])
    return [it if isinstance(it, str) else " ".join(map(str, it)) for it in merges]


def _pieces(path: Path) -> dict[str, int]:
    """Return the pieces of a SentencePiece model; its scores order merges as its ids do."""
    require_file(path)
    check_size(path, TOKENIZER_BYTES)
    try:
        with readable(path):
            content = path.read_bytes()
        whole = ProtobufMessage.whole(content, origin=str(path))
        return {piece.text(_PIECE): id for id, piece in enumerate(whole.messages(_PIECES))}
    except BundleError as error:
        raise UsageError(str(error)) from error


# The small files


def _settings(base: TokenizerFiles, brought: _Brought) -> dict[str, Any]:
    """Return the tokenizer_config.json of both."""
    settings = dict(brought.settings)
    if not (brought.has_tokenizer and brought.has_settings):
        own = read_object_if_there(base.tokenizer_json.parent / SETTINGS)
        settings = own | base.special_tokens | settings
        settings.pop("added_tokens_decoder", None)  # tokenizer.json says the same, of both
        if not brought.has_tokenizer:  # what reads the base's file is the base's
            settings |= {name: own[name] for name in ("tokenizer_class",) if name in own}
    templates = brought.templates.by_name or base.templates
    settings["chat_template"] = _template_field(templates)
    return {name: value for name, value in settings.items() if value is not None}


def _template_field(templates: Mapping[str, str]) -> str | list[dict[str, str]] | None:
    if templates.keys() == {chat_templates.DEFAULT}:
        return templates[chat_templates.DEFAULT]
    named = [{"name": name, "template": source} for name, source in templates.items()]
    return named or None


def _generation_config(base: TokenizerFiles, brought: _Brought, model: Path) -> dict[str, Any]:
    """Return the adapter's generation settings, or else the base's; where both stop is kept."""
    own = read_object_if_there(base.beside(GENERATION, otherwise=model))
    if not brought.has_generation:
        return own
    fields = read_object(brought.directory / GENERATION)
    stop = own.get("eos_token_id")
    return ({} if stop is None else {"eos_token_id": stop}) | fields


def _written(tokenizer: Path | bytes, small: Mapping[str, Mapping[str, Any]]) -> Path:
    """Return the directory of the cache that holds these files, writing it the first time."""
    texts = {
        name: json.dumps(fields, ensure_ascii=False, indent=2).encode()
        for name, fields in small.items()
    }
    own = tokenizer if isinstance(tokenizer, bytes) else tokenizer.read_bytes()
    hashes = [sha256(own).hexdigest()]
    hashes += [f"{name} {sha256(text).hexdigest()}" for name, text in texts.items()]
    out = cache_directory() / "adapters" / sha256(" ".join(hashes).encode()).hexdigest()[:16]

    def write(work: Path) -> None:
        for name, text in texts.items():
            (work / name).write_bytes(text)
        (work / TOKENIZER).write_bytes(own)

    return kept.directory(out, write)
