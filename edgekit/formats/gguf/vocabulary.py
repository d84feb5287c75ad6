"""Vocabularies: a tokenizer.json as the ``tokenizer.*`` metadata of a GGUF file.

Two kinds of BPE exist among small models. Byte-level BPE becomes llama.cpp's ``gpt2``, which
follows the merges as they are listed. SentencePiece's BPE becomes its ``llama``, which knows no
merges: it joins the two neighbours whose union has the best score, so the scores here are the
ranks of the merges. Gemma 4's, SentencePiece's too, becomes ``gemma4``, which follows the merges.
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from edgekit.encodings.files import is_file
from edgekit.errors import UsageError
from edgekit.formats.gguf.layout import Value
from edgekit.model.tokenizer_files import TokenizerFiles, put_around
from edgekit.text.tokenizer_json import read as read_tokenizer


# enum llama_token_type in include/llama.h
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "▁"  # U+2581, how SentencePiece writes a space
BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
# Control tokens that llama.cpp treats as the end of a turn whatever the file says; the order is the
# one in which they are preferred as `eot`. Source: impl::load in src/llama-vocab.cpp, 0c1e57098.
TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>")
MESSAGE_ENDS = ("<|eom_id|>",)
ANSWER_ENDS = ("<turn|>",)  # never preferred as either
_KNOWN_ENDS = (
    *TURN_ENDS, *MESSAGE_ENDS, *ANSWER_ENDS, "</s>", "<eos>", "<EOT>", "<|end_of_text|>", "[EOS]",
    "<|tool_response>",
)  # fmt: skip
# What opens and closes the turns of Gemma 4 and no other, and what of it a program that reads its
# answers must see: a control token is not printed. Source: Gemma4Model in conversion/gemma.py.
GEMMA4_TURNS = {"<|turn>", "<turn|>"}
_GEMMA4_VISIBLE = {
    "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>",
    "<tool_response|>", '<|"|>',
}  # fmt: skip
# llama.cpp lets the special tokens of a model *named* so swallow the spaces after them, but for
# three; it fails to load one that lacks any of the four.
PHI3_NAMES = ("phi-3", "phi3")
PHI3_STAYING = ("<unk>", "<s>", "<|endoftext|>")

TokenizerKind = Literal["gpt2", "llama", "gemma4"]


@dataclass(frozen=True, kw_only=True)
class _AddedToken:
    """A token that is found in the text before anything else is done to it."""

    id: int
    content: str
    is_special: bool
    strips_left: bool
    strips_right: bool
    is_single_word: bool


@dataclass(frozen=True, kw_only=True)
class TokenizerSource:
    """A tokenizer.json, parsed once, with what the checkpoint's other files say about it."""

    files: TokenizerFiles
    fields: Mapping[str, Any]
    model: Mapping[str, Any]  # the merges and the vocabulary
    ids: Mapping[str, int]  # of the tokens that are merged
    merges: tuple[tuple[str, str], ...]  # the pairs that are joined, the first one first
    added: tuple[_AddedToken, ...]  # the tokens that are found before text is cut
    kind: TokenizerKind  # which of llama.cpp's tokenizers this is

    @classmethod
    def open(cls, tokenizer: TokenizerFiles) -> "TokenizerSource":
        """Parse the tokenizer.json; asked again for the same one, return what was parsed.

        Raises:
            UsageError: If it is not a JSON object, not of a kind that GGUF can hold, or malformed.
        """
        path = tokenizer.tokenizer_json
        return cls._parsed(tokenizer, path.stat().st_mtime_ns if is_file(path) else 0)

    @classmethod
    @functools.lru_cache(maxsize=1)  # every recipe of a plan asks, and it takes half a second
    def _parsed(cls, tokenizer: TokenizerFiles, changed_ns: int) -> "TokenizerSource":
        del changed_ns  # a file that was changed is parsed again
        path = tokenizer.tokenizer_json
        fields = read_tokenizer(path)
        model = _model(fields, path)
        return cls(
            files=tokenizer,
            fields=fields,
            model=model,
            ids=_ids(model, path),
            merges=tuple(_merges(model, path)),
            added=tuple(_added_tokens(fields)),
            kind=_kind(fields, model, path),
        )

    @property
    def path(self) -> Path:
        """The tokenizer.json."""
        return self.files.tokenizer_json

    @cached_property
    def listed(self) -> set[str]:
        """The added tokens' texts."""
        return {token.content for token in self.added}

    @cached_property
    def all_ids(self) -> Mapping[str, int]:
        """The ids of all tokens."""
        return {**self.ids, **{token.content: token.id for token in self.added}}

    def steps(self, name: str) -> list[Mapping[str, Any]]:
        """Return the steps of the normalizer, the pre-tokenizer or the post-processor."""
        return list(steps_of(self.fields.get(name)))

    def special_id(self, name: str) -> int | None:
        """Return the id of ``bos_token`` and the like, if the checkpoint has one."""
        token = self.files.special_tokens.get(name)
        return None if token is None else self.all_ids.get(token)


def _model(fields: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    model = fields.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    if not isinstance(model, dict) or kind != "BPE":
        raise UsageError(
            f"{path} is a {kind or 'nameless'} tokenizer, GGUF export reads "
            "BPE (byte-level, or SentencePiece with byte fallback)",
            hint="export to another format, which ships the tokenizer.json itself",
        )
    return model


def _ids(model: Mapping[str, Any], path: Path) -> Mapping[str, int]:
    ids = model.get("vocab")
    if not isinstance(ids, dict):
        raise UsageError(f"{path}: model.vocab is not an object of token ids")
    return ids


def _merges(model: Mapping[str, Any], path: Path) -> Iterator[tuple[str, str]]:
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise UsageError(f"{path}: model.merges is not an array")
    for merge in merges:
        # "a b" until tokenizers 0.20, ["a", "b"] since.
        parts = merge.split(" ") if isinstance(merge, str) else merge
        is_pair = isinstance(parts, list) and len(parts) == 2
        if not is_pair or not all(isinstance(part, str) for part in parts):
            raise UsageError(f"{path}: the merge {merge!r} is not a pair of tokens")
        yield parts[0], parts[1]


def _kind(fields: Mapping[str, Any], model: Mapping[str, Any], path: Path) -> TokenizerKind:
    if any(part.get("type") == "ByteLevel" for part in steps_of(fields.get("pre_tokenizer"))):
        return "gpt2"
    if not model.get("byte_fallback"):
        raise UsageError(
            f"{path} cuts neither into bytes nor falls back to them; "
            "llama.cpp has no tokenizer for it",
            hint="export to another format, which ships the tokenizer.json itself",
        )
    added = {token.get("content") for token in fields.get("added_tokens", [])}
    return "gemma4" if added >= GEMMA4_TURNS else "llama"


def _added_tokens(fields: Mapping[str, Any]) -> Iterator[_AddedToken]:
    for said in fields.get("added_tokens", []):
        yield _AddedToken(
            id=said["id"],
            content=said["content"],
            is_special=bool(said.get("special")),
            strips_left=bool(said.get("lstrip")),
            strips_right=bool(said.get("rstrip")),
            is_single_word=bool(said.get("single_word")),
        )


def steps_of(component: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the steps of a part of a tokenizer.json that was checked, sequences flattened."""
    if component is None:
        return
    if component.get("type") != "Sequence":
        yield component
        return
    for key in ("normalizers", "pretokenizers", "processors", "decoders"):
        for step in component.get(key, []):
            yield from steps_of(step)


def read_vocabulary(
    tokenizer: TokenizerFiles, *, vocabulary_tokens: int, pre: str | None
) -> dict[str, Value]:
    """Return the ``tokenizer.*`` metadata of a GGUF file.

    Args:
        tokenizer: The text side of the checkpoint.
        vocabulary_tokens: Rows of the embedding. Ids without a token become unused ones; added
            tokens beyond the last row, which the model could not read, are left out.
        pre: llama.cpp's name for the cuts of a byte-level tokenizer, from `find_pre`; None leaves
            it out, and means nothing to a SentencePiece one.

    Raises:
        UsageError: If llama.cpp has no such tokenizer; the message names what it lacks.
    """
    return vocabulary_of(
        TokenizerSource.open(tokenizer), vocabulary_tokens=vocabulary_tokens, pre=pre
    )


def vocabulary_of(
    source: TokenizerSource, *, vocabulary_tokens: int, pre: str | None
) -> dict[str, Value]:
    """Do what `read_vocabulary` does with a file that is already parsed."""
    _refuse_foreign_steps(source)
    tokens, types = _tokens(source, vocabulary_tokens)
    _refuse_half_characters(source, tokens)
    _refuse_foreign_merges(source)
    metadata: dict[str, Value] = {"tokenizer.ggml.model": ("string", source.kind)}
    if source.kind != "gpt2":
        name = "gemma4" if source.kind == "gemma4" else "default"
        metadata["tokenizer.ggml.pre"] = ("string", name)
    elif pre is not None:
        metadata["tokenizer.ggml.pre"] = ("string", pre)
    metadata["tokenizer.ggml.tokens"] = ("array[string]", tokens)
    metadata["tokenizer.ggml.token_type"] = ("array[int32]", types)
    if source.kind == "llama":
        metadata["tokenizer.ggml.scores"] = ("array[float32]", _scores(source, tokens, types))
    else:
        merges = [f"{left} {right}" for left, right in source.merges]
        metadata["tokenizer.ggml.merges"] = ("array[string]", merges)
    metadata |= _special_ids(source, vocabulary_tokens)
    front = spaces(source)
    metadata["tokenizer.ggml.add_space_prefix"] = ("bool", front.adds)
    template = source.files.chat_template
    if template is not None:
        opened = _opened(template) if front.opens_template else template
        metadata["tokenizer.chat_template"] = ("string", opened)
    return metadata


def _refuse_foreign_steps(source: TokenizerSource) -> None:
    """Refuse what changes the ids of ordinary text and has no place in a GGUF file."""
    for setting in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if source.model.get(setting):
            raise UsageError(
                f"{source.path} sets {setting} = {source.model[setting]!r}, which llama.cpp lacks",
                hint="export to another format, which ships the tokenizer.json itself",
            )
    allowed = {"gpt2": ("NFC",), "llama": ("Prepend", "Replace"), "gemma4": ("Replace",)}[
        source.kind
    ]
    for step in source.steps("normalizer"):
        is_space = step.get("type") == "Replace" and (
            step.get("pattern") != {"String": " "} or step.get("content") != SPACE
        )
        if step.get("type") not in allowed or is_space:
            raise UsageError(
                f"{source.path} normalizes text with {step.get('type')}, which llama.cpp lacks",
                hint="export to another format, which ships the tokenizer.json itself",
            )


# Tokens and their types


def _tokens(source: TokenizerSource, vocabulary_tokens: int) -> tuple[list[str], list[int]]:
    source.files.within(vocabulary_tokens)
    tokens = [f"[PAD{id}]" for id in range(vocabulary_tokens)]
    types = [UNUSED] * vocabulary_tokens
    for token, id in source.ids.items():
        # llama.cpp renames an empty one, and nothing can produce it.
        if token and id < vocabulary_tokens:
            tokens[id] = token
            types[id] = BYTE if _is_byte(source, token) else NORMAL
    for added in source.added:
        if added.id < vocabulary_tokens and added.content:
            tokens[added.id] = added.content
            types[added.id] = _type_of(source, added)
    _refuse_duplicates(source, tokens)
    return tokens, types


def _is_byte(source: TokenizerSource, token: str) -> bool:
    return source.kind != "gpt2" and BYTE_TOKEN.fullmatch(token) is not None


def _type_of(source: TokenizerSource, added: _AddedToken) -> int:
    if source.kind == "gemma4" and added.content in _GEMMA4_VISIBLE:
        return USER_DEFINED
    if source.kind != "gpt2":
        if added.content == source.model.get("unk_token"):
            return UNKNOWN
        # Gemma's runs of spaces: they are merged like any word, and only a normal token is
        # turned back into spaces when it is printed.
        if SPACE in added.content and added.content in source.ids and not added.is_special:
            return NORMAL
    return CONTROL if added.is_special else USER_DEFINED


def _refuse_duplicates(source: TokenizerSource, tokens: Sequence[str]) -> None:
    seen: dict[str, int] = {}
    for id, token in enumerate(tokens):
        if token in seen:
            raise UsageError(
                f"{source.path}: {token!r} is both token {seen[token]} and token {id}; "
                "llama.cpp needs every token once"
            )
        seen[token] = id


def _refuse_half_characters(source: TokenizerSource, tokens: Sequence[str]) -> None:
    try:
        "".join([*tokens, source.files.chat_template or ""]).encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{source.path}: a token or the chat template holds half a surrogate pair"
        ) from error


def _refuse_foreign_merges(source: TokenizerSource) -> None:
    ids = source.ids
    for left, right in source.merges:
        if left not in ids or right not in ids or left + right not in ids:
            raise UsageError(
                f"{source.path}: the merge {[left, right]} is not of two tokens that make a third",
                hint="the file is damaged; download it again",
            )


def _scores(source: TokenizerSource, tokens: Sequence[str], types: Sequence[int]) -> list[float]:
    """Return minus the rank of the first merge that makes each token.

    What no merge makes comes after all of them, so that llama.cpp prefers any listed merge.
    """
    missing = [f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in source.ids]
    if missing:
        raise UsageError(
            f"{source.path} falls back to bytes but lacks {missing[0]}; llama.cpp would abort"
        )
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(source.merges):
        ranks.setdefault(left + right, rank)
    last = len(source.merges)
    return [
        float(-ranks.get(token, last)) if kind in {NORMAL, USER_DEFINED} else 0.0
        for token, kind in zip(tokens, types, strict=True)
    ]


# Special tokens


def _special_ids(source: TokenizerSource, vocabulary_tokens: int) -> dict[str, Value]:
    before, _ = put_around(source.path)
    eos = _end_id(source)
    pad = source.special_id("pad_token")
    # llama.cpp takes id 11 where a byte-level file does not say: any declared end is better.
    bos = before[0] if before else source.special_id("bos_token")
    ids = {
        "bos": eos if bos is None else bos,
        "eos": eos,
        **_other_ends(source, [id for id in source.files.declared_stop_ids if id != eos]),
        "unknown": source.special_id("unk_token"),
        "padding": pad,
    }
    found: dict[str, Value] = {}
    for name, id in ids.items():
        if id is None or (name != "eos" and id >= vocabulary_tokens):
            continue  # the model has no row for it, as for other such tokens
        if not 0 <= id < vocabulary_tokens:
            raise UsageError(f"{source.path.parent}: the {name} id {id} is no token of the model")
        found[f"tokenizer.ggml.{name}_token_id"] = ("uint32", id)
    has_row = bool(before) and before[0] < vocabulary_tokens
    found["tokenizer.ggml.add_bos_token"] = ("bool", has_row)
    # True is left over from training: a prompt would end with the end token, and so the answer.
    found["tokenizer.ggml.add_eos_token"] = ("bool", False)
    return found


def _end_id(source: TokenizerSource) -> int:
    declared = source.special_id("eos_token")
    if declared is not None:
        return declared
    stops = source.files.declared_stop_ids
    if not stops:
        raise UsageError(
            f"{source.path.parent} declares no token that ends an answer",
            hint="set eos_token in tokenizer_config.json, or eos_token_id in config.json",
        )
    return stops[0]


def _other_ends(source: TokenizerSource, stops: Sequence[int]) -> dict[str, int]:
    """Give the stop ids next to eos the two places a GGUF file has: end of turn, of message.

    Those that llama.cpp knows by their text need no place, so the others go first.
    """
    texts = {id: token for token, id in source.all_ids.items()}
    by_text = [id for id in stops if texts.get(id) in (*TURN_ENDS, *MESSAGE_ENDS, *ANSWER_ENDS)]
    unknown = [id for id in stops if id not in by_text]
    turn_ends = sorted(
        (id for id in by_text if texts[id] in TURN_ENDS), key=lambda id: TURN_ENDS.index(texts[id])
    )
    message_ends = [id for id in by_text if texts[id] in MESSAGE_ENDS]
    return dict(zip(("eot", "eom"), [*unknown, *turn_ends, *message_ends], strict=False))


# Spaces

SPACE_IN_FRONT = "{{ ' ' }}"  # what opens a chat template whose first text needs a space


@dataclass(frozen=True, kw_only=True)
class Spaces:
    """What a GGUF file can say of the space that SentencePiece puts in front of text."""

    adds: bool = False  # llama.cpp puts one before a text, and after every special token
    opens_template: bool = False  # the chat template writes the one before a prompt itself


def spaces(source: TokenizerSource) -> Spaces:
    """Return what makes llama.cpp read the prompts of the chat template as the checkpoint does.

    A tokenizer that puts a space before the first text only has no equal in llama.cpp, nor has one
    that puts none before a text that begins with one. Without a template the first text counts.

    Raises:
        UsageError: If no setting is right for all of a prompt.
    """
    scheme = _space_scheme(source)
    if source.kind == "gpt2" or scheme == "never":
        return Spaces()
    prompts = source.files.prompts()
    if scheme == "every" or not prompts:
        return Spaces(adds=True)
    wanted = {found for prompt in prompts for found in _wanted_spaces(source, prompt)}
    if not any(has_space for has_space, _ in wanted):
        return Spaces()
    if all(has_space for has_space, _ in wanted):
        return Spaces(adds=True)
    if all(has_space == is_first for has_space, is_first in wanted):
        begin = [any(first for _, first in _wanted_spaces(source, prompt)) for prompt in prompts]
        if all(begin):
            return Spaces(opens_template=True)
    raise UsageError(
        f"{source.path} puts a space before some texts of a chat prompt and none before others; "
        "llama.cpp puts one before each, or none",
        hint="export to another format, which ships the tokenizer.json itself",
    )


def _opened(template: str) -> str:
    """Return a chat template that writes a space before all that it wrote.

    Blanks in front of its first block are trimmed as long as they begin the line.
    """
    return SPACE_IN_FRONT + re.sub(r"\A[ \t]+(?=\{[%#](?!\+))", "", template)


def _wanted_spaces(source: TokenizerSource, prompt: str) -> Iterator[tuple[bool, bool]]:
    """Yield for each text between the added tokens: is a space put before it, is it the first."""
    tokens = sorted(filter(None, source.listed), key=len, reverse=True)
    pieces = re.split(f"({'|'.join(map(re.escape, tokens))})", prompt) if tokens else [prompt]
    is_first_only = _space_scheme(source) == "first"
    for index, piece in enumerate(pieces):
        if piece and index % 2 == 0:
            may = index == 0 or not is_first_only
            yield may and piece[0] not in (" ", SPACE), index == 0


def _space_scheme(source: TokenizerSource) -> Literal["every", "always", "first", "never"]:
    """Return before which texts a space is put; all but "every" skip those that begin with one."""
    if any(step.get("type") == "Prepend" for step in source.steps("normalizer")):
        return "every"
    for step in source.steps("pre_tokenizer"):
        if step.get("type") == "Metaspace":
            scheme = step.get("prepend_scheme")
            if scheme is None:  # before tokenizers 0.15
                scheme = "always" if step.get("add_prefix_space", True) else "never"
            return "first" if scheme == "first" else "always" if scheme == "always" else "never"
    return "never"


def _is_phi3_like(source: TokenizerSource) -> bool:
    """Tell whether added tokens swallow the spaces after them as llama.cpp does for Phi-3."""
    swallowing = {token.content for token in source.added if token.strips_right}
    return (
        source.listed >= {*PHI3_STAYING, "</s>"}
        and bool(swallowing)
        and swallowing == source.listed - set(PHI3_STAYING)
    )


def model_name(tokenizer: TokenizerFiles, name: str) -> str:
    """Return a ``general.name`` that makes llama.cpp treat the special tokens as it should."""
    return name_of(TokenizerSource.open(tokenizer), name)


def name_of(source: TokenizerSource, name: str) -> str:
    """Do what `model_name` does with a file that is already parsed."""
    says_phi3 = any(word in name.lower() for word in PHI3_NAMES)
    if _is_phi3_like(source):
        return name if says_phi3 else f"{name} (Phi-3)"
    return re.sub(r"(?i)phi-?3", "Phi 3", name) if says_phi3 else name


def known_differences(tokenizer: TokenizerFiles) -> list[str]:
    """Return where llama.cpp's own tokenizer will differ from the checkpoint's, in sentences.

    edgekit reads text with the checkpoint's tokenizer.json, so these concern only other programs
    that open the file.
    """
    source = TokenizerSource.open(tokenizer)
    found = [*_text_differences(source), *_added_differences(source)]
    before, after = put_around(source.path)
    eos = _end_id(source)
    if len(before) > 1 or after not in ((), (eos,)):
        found.append(
            f"it puts the ids {list(before)} before and {list(after)} after a text; "
            "llama.cpp can put one bos before"
        )
    elif after:
        found.append(
            "it ends every text with the end token, as training wants it; llama.cpp is not told to,"
            " or prompts would end there"
        )
    return found


def _text_differences(source: TokenizerSource) -> Iterator[str]:
    if any(step.get("type") == "NFC" for step in source.steps("normalizer")):
        yield "it composes characters (NFC) first; llama.cpp takes them as they are"
    if source.kind != "llama":
        return
    front = spaces(source)
    if _space_scheme(source) == "first":
        yield (
            "it puts a space before the first text only; llama.cpp will also put one after every "
            "special token"
            if front.adds
            else "it puts a space before the first text only; llama.cpp will put none"
            + (", so the chat template in the file opens with one" if front.opens_template else "")
        )
    if _space_scheme(source) == "always" and not front.adds:
        yield "it puts a space before a text that does not begin with one; llama.cpp will put none"
    yield from _metaspace_differences(source)
    if _has_unlisted_merges(source):
        yield "it leaves some tokens apart that llama.cpp may join: not every pair is a merge"


def _metaspace_differences(source: TokenizerSource) -> Iterator[str]:
    for step in source.steps("pre_tokenizer"):
        if step.get("type") != "Metaspace":
            continue
        if spaces(source).adds:
            yield "it puts no space before a text that begins with one; llama.cpp does"
        if step.get("split", True) and any(SPACE in token[1:] for token in source.ids):
            yield "it merges within words only; llama.cpp also merges across spaces"


def _added_differences(source: TokenizerSource) -> Iterator[str]:
    looking = [token for token in source.added if token.strips_left or token.is_single_word]
    swallowing = [token for token in source.added if token.strips_right]
    if looking:
        yield f"{_listed(looking)} looks at the text next to it; for llama.cpp it does not"
    if swallowing and not _is_phi3_like(source):
        yield f"{_listed(swallowing)} swallows the spaces after it; for llama.cpp it does not"
    seized = [token for token in _KNOWN_ENDS if token in source.ids and token not in source.listed]
    if seized:
        yield f"{seized[0]!r} is ordinary text; for llama.cpp it is a token that ends an answer"


def _listed(tokens: Sequence[_AddedToken]) -> str:
    first = repr(tokens[0].content)
    return first if len(tokens) == 1 else f"each of {len(tokens)} tokens such as {first}"


def _has_unlisted_merges(source: TokenizerSource) -> bool:
    """Tell whether two tokens make a third without a merge that says so."""
    listed = set(source.merges)
    return any(
        pair not in listed
        for token in source.ids
        if token not in source.listed and not BYTE_TOKEN.fullmatch(token)
        for pair in splits(token, source.ids)
    )


def splits(token: str, tokens: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield every way to cut a token into two that exist."""
    for cut in range(1, len(token)):
        if token[:cut] in tokens and token[cut:] in tokens:
            yield token[:cut], token[cut:]
