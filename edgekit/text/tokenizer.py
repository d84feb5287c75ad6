"""Text on the device: the tokenizer, the chat template, and token ids turned back into text.

The tokenizers library and a sandboxed Jinja do the work; transformers is only the reference they
are proven against.
"""

import codecs
import difflib
import functools
import json
import math
import re
import string
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

from edgekit import installed
from edgekit.cache import remembered
from edgekit.encodings.files import is_file, readable
from edgekit.encodings.hashing import sha256_of_all
from edgekit.encodings.json_files import Refusal
from edgekit.encodings.limits import TEMPLATE_BYTES, TEXT_GROWTH, TOKENIZER_BYTES, check_size
from edgekit.errors import BundleError, UsageError
from edgekit.installed import missing_error
from edgekit.runtime.limited import OverLimitError
from edgekit.text import corpus, guarded, tokenizer_json
from edgekit.text.rules import TextRules
from edgekit.text.template import ChatTemplate, Clock, Message, as_parts


TOKENIZER = "tokenizer.json"
_HINTS: Mapping[Refusal, str] = {
    BundleError: "copy the bundle again",
    UsageError: tokenizer_json.HINT,
}
CHAT_TEMPLATE = "chat_template.jinja"
_TRIAL_VERSION = 1  # counts up when a tokenizer is tried otherwise, so that all are tried again
_ODD_TEXTS = (string.printable, "a" * 300, "9" * 300, " " * 300, "the cat sat on a mat " * 20,
              "a" * 300 + "!")  # fmt: skip
_QUESTION = "edgekit 4c1e"
_ANSWERS = ("edgekit 7f3a", "edgekit 7f3z")  # two that differ to their last letter
_TODAY = "edgekit 9b2d"
_OWN_VARIABLES = ("messages", "add_generation_prompt")  # what edgekit says itself


@dataclass(frozen=True, kw_only=True)
class Text:
    """How one model reads and writes text."""

    tokenizer: Any  # tokenizers.Tokenizer
    template: ChatTemplate | None
    rules: TextRules
    clock: Clock | None = None  # what the template is told of the time; None: the machine's
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @classmethod
    def open(cls, directory: Path, rules: TextRules) -> Self:
        """Load ``tokenizer.json`` and, if the model has one, ``chat_template.jinja``.

        Raises:
            BundleError: If a file is missing or is not what ``rules`` say.
            UsageError: If the template is not Jinja.
            MissingDependencyError: If tokenizers or jinja2 is not installed.
        """
        source = _template_source(directory / CHAT_TEMPLATE, rules.chat_template_sha256)
        return cls(
            tokenizer=open_tokenizer(directory / TOKENIZER),
            template=None
            if source is None
            else ChatTemplate.compile(
                source, origin=f"the chat template of {directory / CHAT_TEMPLATE}"
            ),
            rules=rules,
        )

    def encode(
        self, text: str, *, parses_special: bool = True, adds_bos: bool | None = None
    ) -> list[int]:
        """Return the token ids of plain text.

        Args:
            text: What the model must read.
            parses_special: Whether ``<|im_end|>`` in it is that token, or its letters.
            adds_bos: None does what the model's tokenizer does. There is never a second one.

        Raises:
            UsageError: If the text holds half a surrogate pair, or the tokenizer fails over it.
        """
        ids = self._ids(text, parses_special=parses_special)
        if not (self.rules.adds_bos if adds_bos is None else adds_bos):
            return ids
        bos = self._bos_id
        return ids if ids[:1] == [bos] else [bos, *ids]

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """Return the conversation as the model's chat template writes it.

        Raises:
            UsageError: If there is no template or no message, or the template refuses or fails.
        """
        return self._render(
            messages, None, add_generation_prompt=add_generation_prompt, **variables
        )

    def _render(
        self,
        messages: Sequence[Message],
        clock: Clock | None,
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        if self.template is None:
            raise UsageError("the model has no chat template", hint="pass it plain text")
        if not messages:
            raise UsageError("the conversation is empty")
        known: dict[str, Any] = {"tools": None, "documents": None, **self.rules.special_tokens}
        known |= {"add_generation_prompt": add_generation_prompt}
        return self.template.render(
            as_parts(messages, self.rules.content_parts),
            {**known, **variables},
            clock=self.clock if clock is None else clock,
        )

    def writes_today(self, messages: Sequence[Message]) -> bool:
        """Tell whether the prompt of a conversation is another one every day."""
        try:
            rendered = self._render(messages, _TODAY)
        except UsageError:  # it refuses a system message, or wants one
            return False
        return _TODAY in rendered

    def on(self, day: date) -> Self:
        """Return the same, for whom it is always that day."""
        return replace(self, clock=day)

    def check_variables(self, variables: Mapping[str, Any]) -> None:
        """Refuse variables that would change nothing.

        Args:
            variables: By name, as for `render`.

        Raises:
            UsageError: If there is no template, or it does not read one of them, or edgekit or the
                bundle has set it already.
        """
        fixed = self.rules.template_variables
        for name in variables:
            if self.template is None:
                raise UsageError(
                    f"the model has no chat template, so nothing reads the variable {name!r}"
                )
            if name in _OWN_VARIABLES:
                raise UsageError(f"edgekit sets the template's variable {name!r} itself")
            if name in fixed:
                raise UsageError(
                    f"the template's variable {name!r} is fixed to {fixed[name]} in this bundle",
                    hint="export again without it, or with another value",
                )
            if name not in self.template.variables:
                raise _unread(name, self.template.variables)

    def encode_chat(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """Return the token ids of a conversation, up to where the model must answer."""
        return self._ids(self.render(messages, **variables), parses_special=True)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids`` without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def detokenizer(
        self, *, continues: bool = False, shown: Mapping[int, str] | None = None
    ) -> "Detokenizer":
        """Return what turns ids into text one by one.

        Args:
            continues: Whether the text goes on where a prompt ended, so that the space that opens
                its first word is kept.
            shown: Special tokens that are not left out, by id, and what is written for them.
        """
        return Detokenizer(self._pieces, is_at_start=not continues, shown=shown)

    def stop_id_of_template(self) -> int | None:
        """Return the token that the template puts right after an answer, None if there is none."""
        if self.template is None:
            return None
        asked: list[Message] = [{"role": "user", "content": _QUESTION}]
        one, other = (
            self.render(
                [*asked, {"role": "assistant", "content": answer}], add_generation_prompt=False
            )
            for answer in _ANSWERS
        )
        if one == other:
            return None  # it does not write the answer
        after = _shared_end(one, other).strip()
        end = max((t for t in self._added_texts if after.startswith(t)), key=len, default=None)
        # One that asks on right away opens a turn there: `<|im_start|>assistant`.
        before = one.partition(_QUESTION)[0]
        opener = max(self._added_texts, key=before.rfind, default=None)
        if end is None or (end == opener and end in before and after != end):
            return None
        return int(self.tokenizer.token_to_id(end))

    @functools.cached_property
    def longest_token_bytes(self) -> int:
        """The most bytes of text that one token can stand for.

        Read off the vocabulary, without running it. A ▁ counts as its own three bytes, so this may
        be more than the truth, never less, unless the tokenizer shortens text before it reads it.
        """
        added = {token.encode() for token in self._added_texts}
        letters = self.tokenizer.get_vocab(with_added_tokens=False)
        # Byte-level vocabularies write one letter for each byte.
        sizes = map(len, letters if self._pieces.is_byte_level else map(str.encode, letters))
        return max((*sizes, *map(len, added)), default=1)

    @functools.cached_property
    def _added_texts(self) -> list[str]:
        return [token.content for token in self.tokenizer.get_added_tokens_decoder().values()]

    @property
    def special_tokens(self) -> dict[int, str]:
        """The tokens that are no text, by id."""
        added = self.tokenizer.get_added_tokens_decoder()
        return {id: token.content for id, token in added.items() if token.special}

    @functools.cached_property
    def _pieces(self) -> "_Pieces":
        return _Pieces.of(self.tokenizer)

    @property
    def _bos_id(self) -> int:
        bos = self.rules.special_tokens.get("bos_token")
        id = None if bos is None else self.tokenizer.token_to_id(bos)
        if id is None:
            raise BundleError(f"text starts with a BOS token, but {TOKENIZER} has no {bos!r}")
        return int(id)

    def _ids(self, text: str, *, parses_special: bool) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(f"the text is not Unicode at character {error.start}") from error
        with self._lock:  # the switch belongs to the tokenizer, not to the call
            self.tokenizer.encode_special_tokens = not parses_special
            with _reading():
                return list(self.tokenizer.encode(text, add_special_tokens=False).ids)


def _unread(name: str, known: Collection[str]) -> UsageError:
    near = difflib.get_close_matches(name, known, n=1)
    others = sorted(set(known) - set(_OWN_VARIABLES))
    return UsageError(
        f"the chat template reads no variable {name!r}",
        hint=f"did you mean {near[0]!r}?" if near else f"it reads {', '.join(others) or 'none'}",
    )


def _shared_end(one: str, other: str) -> str:
    pairs = enumerate(zip(reversed(one), reversed(other), strict=False))
    length = next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
    return one[len(one) - length :]


class Detokenizer:
    """Turns token ids into text piece by piece: whole characters only, each id seen once.

    All pieces together are what `Text.decode` makes of all ids, wherever those are valid UTF-8.
    """

    def __init__(
        self, pieces: "_Pieces", *, is_at_start: bool, shown: Mapping[int, str] | None = None
    ) -> None:
        self._pieces = pieces
        self._shown = shown or {}
        self._is_at_start = is_at_start
        self._spaces_to_strip = pieces.leading_spaces_stripped if is_at_start else 0
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """Return the text that ``token`` completes; often all of its own, sometimes none."""
        piece = self._pieces.bytes_of(token, is_first=self._is_at_start)
        if piece is None:
            return self._shown.get(token, "")
        self._is_at_start = False
        return self._stripped(self._utf8.decode(piece))

    def finish(self) -> str:
        """Return what is left: U+FFFD if the ids end within a character."""
        return self._stripped(self._utf8.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        while self._spaces_to_strip and text:
            if text[0] != " ":
                self._spaces_to_strip = 0
                break
            text = text[1:]
            self._spaces_to_strip -= 1
        return text


class StopStrings:
    """Watches text for strings that end it, across the borders of its pieces."""

    def __init__(self, strings: Sequence[str]) -> None:
        if "" in strings:
            raise UsageError("a stop string is empty")
        self._strings = tuple(strings)
        self._held = ""  # may be the beginning of a stop string
        self.found = False

    def feed(self, text: str) -> str:
        """Return the text that is certainly before any stop string."""
        text = self._held + text
        starts = [at for at in map(text.find, self._strings) if at >= 0]
        if starts:
            self.found, self._held = True, ""
            return text[: min(starts)]
        kept = max((overlap(text, string) for string in self._strings), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def finish(self) -> str:
        """Return what was held back."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, string: str) -> int:
    """Return how many characters at the end of ``text`` begin ``string``."""
    longest = min(len(text), len(string) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(string[:n])), 0)


@dataclass(frozen=True, kw_only=True)
class _Pieces:
    """What each token contributes to the text, in bytes, by the decoder of a tokenizer.json."""

    token_of: Callable[[int], str | None]
    special_ids: frozenset[int]  # never part of an answer
    is_byte_level: bool
    has_byte_fallback: bool
    replacements: tuple[tuple[str, str], ...]
    metaspace: str | None  # at the very start it is dropped instead of replaced
    leading_spaces_stripped: int

    @classmethod
    def of(cls, tokenizer: Any) -> Self:
        """Read the decoder.

        Raises:
            BundleError: If it is of a kind no small decoder model uses (WordPiece, CTC …).
        """
        # The state of a decoder is its part of tokenizer.json; the whole file can be 17 MB.
        decoder = tokenizer.decoder and json.loads(tokenizer.decoder.__getstate__())
        refuse_unknown_decoder(decoder)
        steps = list(_steps(decoder))
        kinds = [step["type"] for step in steps]
        spaces = [step for step in steps if step["type"] == "Metaspace"]
        added = tokenizer.get_added_tokens_decoder()
        return cls(
            token_of=tokenizer.id_to_token,
            special_ids=frozenset(id for id, token in added.items() if token.special),
            is_byte_level="ByteLevel" in kinds,
            has_byte_fallback="ByteFallback" in kinds,
            replacements=(
                *((s["pattern"]["String"], s["content"]) for s in steps if s["type"] == "Replace"),
                *((s["replacement"], " ") for s in spaces),
            ),
            metaspace=next(
                (s["replacement"] for s in spaces if s["prepend_scheme"] != "never"), None
            ),
            leading_spaces_stripped=sum(s["start"] for s in steps if s["type"] == "Strip"),
        )

    def bytes_of(self, id: int, *, is_first: bool) -> bytes | None:
        """Return the bytes of a token, None if it is special or unknown and so not text."""
        token = None if id in self.special_ids else self.token_of(id)
        if token is None:
            return None
        if self.is_byte_level:
            return _byte_level_bytes(token)
        if self.has_byte_fallback and re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
            return bytes([int(token[3:5], 16)])
        if is_first and self.metaspace:
            token = token.replace(self.metaspace, "")
        for old, new in self.replacements:
            token = token.replace(old, new)
        return token.encode()


def _steps(part: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """Yield the steps of a decoder or a normalizer, or itself if it is no sequence."""
    waiting = [] if part is None else [part]
    while waiting:
        step = waiting.pop(0)
        if step["type"] == "Sequence":
            waiting = [*(step.get("decoders") or step.get("normalizers") or []), *waiting]
        else:
            yield step


def refuse_unknown_decoder(
    decoder: Mapping[str, Any] | None, *, refusal: Refusal = BundleError
) -> None:
    """Check that ids can be turned into text one by one.

    Args:
        decoder: Of a tokenizer.json.
        refusal: What is raised.

    Raises:
        BundleError, UsageError: As ``refusal``, if the decoder is of a kind no small decoder model
            uses (WordPiece, CTC …).
    """
    steps = list(_steps(decoder))
    kinds = [step["type"] for step in steps]
    unknown = set(kinds) - {"ByteLevel", "ByteFallback", "Metaspace", "Replace", "Strip", "Fuse"}
    for step in steps:
        is_of_whole_text = "Fuse" in kinds[: kinds.index(step["type"])]
        if step["type"] == "Replace" and "String" not in step["pattern"]:
            unknown.add("Replace with a pattern")
        if step["type"] == "Strip" and not (
            is_of_whole_text and step["content"] == " " and not step["stop"]
        ):
            unknown.add("Strip of each token")
    if unknown or not kinds:
        found = ", ".join(sorted(unknown)) or "none"
        raise refusal(
            f"{TOKENIZER} has a decoder edgekit does not know: {found}",
            hint="known are those of byte-level BPE and of SentencePiece",
        )


def _byte_level_bytes(token: str) -> bytes:
    table = _bytes_by_letter()
    if all(letter in table for letter in token):
        return bytes(table[letter] for letter in token)
    return token.encode()  # an added token is written as it is


@functools.cache
def _bytes_by_letter() -> dict[str, int]:
    """Return the byte each letter of byte-level BPE stands for.

    Printable Latin-1 stands for itself, the other bytes for the letters from U+0100 on, in order.
    Source: ``bytes_char`` in tokenizers/src/pre_tokenizers/byte_level.rs.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }


def _template_source(path: Path, expected_sha256: str | None) -> str | None:
    if not is_file(path, refusal=BundleError):
        if expected_sha256 is not None:
            raise BundleError(f"{path} is missing", hint="copy the bundle again")
        return None
    check_size(path, TEMPLATE_BYTES, refusal=BundleError)
    with readable(path, refusal=BundleError):
        content = path.read_bytes()
    if sha256(content).hexdigest() != expected_sha256:
        raise BundleError(
            f"{path} is not the chat template that the manifest describes",
            hint="copy the bundle again",
        )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(f"{path} is not UTF-8 at byte {error.start}") from error


def open_tokenizer(path: Path, *, refusal: Refusal = BundleError) -> Any:
    """Load a ``tokenizer.json`` as it is, without its truncation and padding.

    A file that was never opened here is tried in a child process first: some make the library end
    the process, or multiply what they read.

    Raises:
        BundleError, UsageError: As ``refusal``, if it is missing, is too large, is not a tokenizer,
            or costs more than a tokenizer may.
        MissingDependencyError: If tokenizers is not installed.
    """
    try:
        import tokenizers
    except ModuleNotFoundError:
        raise missing_error("tokenizers", purpose="every model", extra="run-gguf") from None
    if not is_file(path, refusal=refusal):
        raise refusal(f"{path} is missing", hint=_HINTS[refusal])
    check_size(path, TOKENIZER_BYTES, refusal=refusal, hint=_HINTS[refusal])
    _try(path, refusal)
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        if type(error) is not Exception:  # tokenizers raises the bare class
            raise
        raise refusal(f"{path} is not a tokenizer: {error}", hint=_HINTS[refusal]) from error
    tokenizer.no_truncation()  # the file may say otherwise; a prompt is never cut in silence
    tokenizer.no_padding()
    _refuse_growth(tokenizer, path, refusal)
    return tokenizer


def _try(path: Path, refusal: Refusal) -> None:
    """Have a child process open a tokenizer and use it once, unless that went well before."""
    version = f"{installed.version('tokenizers')} {_TRIAL_VERSION}"
    key = sha256_of_all([path], after=sha256(version.encode()).hexdigest())

    def tried() -> dict[str, Any]:
        wrong = guarded.try_tokenizer(path, [*corpus.lines(), *_ODD_TEXTS])
        if wrong is not None:
            raise refusal(f"{path} is not a tokenizer: {wrong}", hint=_HINTS[refusal])
        return {}

    try:
        remembered("tokenizers-tried", key, tried)
    except OverLimitError as error:
        raise refusal(f"{path} {error}", hint=_HINTS[refusal]) from error


def _refuse_growth(tokenizer: Any, path: Path, refusal: Refusal) -> None:
    """Refuse what makes a text, or a token, many times as long: in a letter nobody has tried."""
    for name, part in (("normalizer", tokenizer.normalizer), ("decoder", tokenizer.decoder)):
        fields = json.loads(part.__getstate__()) if part else None
        growth = math.prod(map(_growth, _steps(fields)))
        if growth > TEXT_GROWTH:
            raise refusal(
                f"{path}: its {name} can make a text {_times(growth)} as long, expected at most "
                f"{TEXT_GROWTH} times",
                hint=_HINTS[refusal],
            )


def _times(growth: float) -> str:
    return f"{growth:.0f} times" if growth < 10**6 else "millions of times"


def _growth(step: Mapping[str, Any]) -> float:
    """Return how many times as long a Replace makes a text at most."""
    if step["type"] != "Replace":
        return 1  # NFKD's 18 letters for one included: they come once
    replaced = step["pattern"].get("String")
    content = len(step["content"])
    # A pattern may match nothing, before every letter.
    return max(1, content / len(replaced)) if replaced else 1 + content


@contextmanager
def _reading() -> Iterator[None]:
    """Refuse a text over which the tokenizers library fails or panics."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and not guarded.is_panic(error):
            raise
        raise UsageError(f"the tokenizer fails over this text: {error}") from error
