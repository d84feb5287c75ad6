"""What a checkpoint's files say about text: the tokenizer, the chat template, where to stop."""

import functools
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from edgekit import installed
from edgekit.encodings.files import is_file
from edgekit.encodings.json_files import read_object_if_there
from edgekit.encodings.limits import IDS_BEYOND
from edgekit.errors import UsageError
from edgekit.model import stops
from edgekit.model.chat_templates import ChatTemplates
from edgekit.text import corpus
from edgekit.text.rules import TextRules, ThoughtMarks
from edgekit.text.template import AS_IT_IS, ChatTemplate, TemplateCall
from edgekit.text.tokenizer import Text, open_tokenizer, refuse_unknown_decoder
from edgekit.text.tokenizer_json import read as read_tokenizer


_LARGEST_MERGED_ID = "largest merged id"  # not a field of tokenizer.json
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token",
                  "mask_token")  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)  # compared by identity, so that it can be a key
class TokenizerFiles:
    """The text side of a checkpoint, parsed but not loaded into a tokenizer."""

    tokenizer_json: Path
    special_tokens: dict[str, str]  # {"bos_token": "<s>", …}
    chat_template: str | None
    declared_stop_ids: tuple[int, ...]  # of config, generation_config and tokenizer_config together
    stop_ids_by_file: dict[str, tuple[int, ...]]  # which file declared which, for the report
    stop_strings: tuple[str, ...] = ()  # texts that end an answer and are not part of it
    templates: Mapping[str, str] = field(default_factory=dict)  # all there are, by name
    template_files: Mapping[str, Path] = field(default_factory=dict)  # where each is, for messages
    template_call: TemplateCall = AS_IT_IS  # what it gets; its preamble begins the template
    thoughts: ThoughtMarks | None = None  # what the template writes around them, once it was asked
    notes: tuple[str, ...] = ()  # what was decided where the files disagree, one sentence each

    @classmethod
    def open(cls, directory: Path, *, config: Mapping[str, Any]) -> Self:
        """Read the tokenizer's files of a model directory.

        Raises:
            UsageError: If there is no tokenizer.json, or a file is not JSON.
        """
        tokenizer_json = directory / "tokenizer.json"
        if not is_file(tokenizer_json):
            raise UsageError(
                f"{directory} has no tokenizer.json",
                hint="load it once with AutoTokenizer and save_pretrained() it into the model",
            )
        settings = read_object_if_there(directory / "tokenizer_config.json")
        special = special_tokens(with_legacy_map(directory, settings))
        generation = directory / "generation_config.json"
        generation_config = read_object_if_there(generation)
        found = ChatTemplates.read(directory, settings)
        ids = TokenIds(tokenizer_json, special)
        ends = stops.settle(
            config,
            generation_config,
            eos_id=ids.of(special.get("eos_token")),
            tokens=ids,
            directory=directory,
        )
        return cls(
            tokenizer_json=tokenizer_json,
            special_tokens=special,
            chat_template=found.default,
            declared_stop_ids=stops.together(ends.by_file),
            stop_ids_by_file=ends.by_file,
            stop_strings=stops.strings(generation_config, generation),
            templates=found.by_name,
            template_files=found.files,
            notes=(*ends.notes, *found.notes),
        )

    def refuse_unreadable(self) -> None:
        """Check what only `edgekit run` would notice: that ids can become text one by one.

        Raises:
            UsageError: If they cannot.
        """
        decoder = _small_parts(self.tokenizer_json).get("decoder")
        refuse_unknown_decoder(decoder, refusal=UsageError)

    def loaded(self) -> Text:
        """Return what reads and writes text with these files.

        Raises:
            BundleError: If the tokenizer is not one.
            UsageError: If the template is not Jinja, or nothing says where an answer ends.
            MissingDependencyError: If tokenizers or jinja2 is not installed.
        """
        source = self.chat_template
        return Text(
            tokenizer=open_tokenizer(self.tokenizer_json),
            template=None if source is None else ChatTemplate.compile(source),
            rules=self.rules(),
        )

    def prompts(self) -> tuple[str, ...]:
        """Return edgekit's conversations as the chat template writes them, those that it can say.

        There are none without a template, or where jinja2 is not installed.

        Raises:
            UsageError: If the template is not Jinja.
        """
        if self.chat_template is None or installed.missing("jinja2"):
            return ()
        rules = TextRules(stop_ids=(), special_tokens=self.special_tokens, adds_bos=False,
                          chat_template_sha256=None)  # fmt: skip
        template = ChatTemplate.compile(self.chat_template)
        text = Text(tokenizer=None, template=template, rules=rules)
        found = []
        for turns in corpus.CONVERSATIONS:
            with suppress(UsageError):  # Gemma's has no system role
                found.append(text.render(turns))
        return tuple(found)

    def within(self, rows: int) -> Self:
        """Return the same files for an embedding of so many rows, without special tokens beyond.

        Raises:
            UsageError: If text can become an id that has no row, or an added token has an absurd
                one, for which some formats would make a row.
        """
        largest = _largest_merged_id(self.tokenizer_json)
        if largest >= rows:
            raise UsageError(
                f"{self.tokenizer_json} has the token id {largest}, the model has {rows} "
                "embeddings",
                hint="is this another model's tokenizer?",
            )
        ids = added_tokens(self.tokenizer_json)
        lowest, highest = min(ids.values(), default=0), max(ids.values(), default=0)
        if not 0 <= lowest <= highest < rows + IDS_BEYOND:
            raise UsageError(
                f"{self.tokenizer_json} has added tokens with ids from {lowest} to {highest}, the "
                f"model has {rows} embeddings",
                hint="is this another model's tokenizer?",
            )
        beyond = {
            name: token for name, token in self.special_tokens.items() if ids.get(token, 0) >= rows
        }
        notes = (
            f"{name} {token!r} is left out: its id {ids[token]} is beyond the model's {rows} rows"
            for name, token in beyond.items()
        )
        kept = {name: it for name, it in self.special_tokens.items() if name not in beyond}
        files = replace(self, special_tokens=kept, notes=(*self.notes, *notes))
        return files.with_stops(stops.within(self.stop_ids_by_file, rows))

    def with_stops(self, ends: stops.Stops) -> Self:
        """Return the same files with other ids that end an answer."""
        return replace(
            self,
            declared_stop_ids=stops.together(ends.by_file),
            stop_ids_by_file=ends.by_file,
            notes=(*self.notes, *ends.notes),
        )

    def with_stop_id(self, id: int, *, origin: str) -> Self:
        """Return the same files with one more id that ends an answer."""
        return replace(
            self,
            declared_stop_ids=tuple(sorted({*self.declared_stop_ids, id})),
            stop_ids_by_file={**self.stop_ids_by_file, origin: (id,)},
        )

    def with_template(self, template: str, call: TemplateCall = AS_IT_IS) -> Self:
        """Return the same files with this template, which is called so, on every runtime.

        Args:
            template: As its author wrote it.
            call: What it gets besides the conversation; what can be said in Jinja is put before it.
        """
        return replace(self, chat_template=call.preamble + template, template_call=call)

    @property
    def template_source(self) -> str | None:
        """The chat template as its author wrote it."""
        template = self.chat_template
        return None if template is None else template.removeprefix(self.template_call.preamble)

    @property
    def eos_token_id(self) -> int | list[int] | None:
        """The ids that end an answer as settings spell them: one id, a list, or nothing."""
        ids = list(self.declared_stop_ids)
        return ids[0] if len(ids) == 1 else ids or None

    def beside(self, name: str, *, otherwise: Path) -> Path:
        """Return where a file of settings is: next to the tokenizer, which an adapter may bring.

        Args:
            name: Of the file.
            otherwise: The model's directory, for one that is not next to the tokenizer.
        """
        path = self.tokenizer_json.parent / name
        return path if is_file(path) else otherwise / name

    def copy_into(self, directory: Path) -> TextRules:
        """Write what the runner reads into a bundle, and return the rules that go with it."""
        shutil.copyfile(self.tokenizer_json, directory / "tokenizer.json")
        template = self.chat_template
        if template is not None:
            (directory / "chat_template.jinja").write_bytes(template.encode())
        return self.rules()

    def rules(self) -> TextRules:
        """Return what the runner must know besides the files.

        Raises:
            UsageError: If nothing says where an answer ends.
        """
        if not self.declared_stop_ids:
            raise UsageError(
                f"nothing in {self.tokenizer_json.parent} says which token ends an answer",
                hint="set eos_token_id in generation_config.json",
            )
        template = self.chat_template
        return TextRules(
            stop_ids=self.declared_stop_ids,
            special_tokens=self.special_tokens,
            adds_bos=self._adds_bos(),
            chat_template_sha256=template and hashlib.sha256(template.encode()).hexdigest(),
            stop_strings=self.stop_strings,
            template_variables={
                name: json.dumps(value, ensure_ascii=False)
                for name, value in self.template_call.variables.items()
            },
            content_parts=self.template_call.content_parts,
            thoughts=self.thoughts,
        )

    def _adds_bos(self) -> bool:
        """Tell whether the tokenizer puts its BOS token before plain text."""
        before, _ = put_around(self.tokenizer_json)
        bos = added_tokens(self.tokenizer_json).get(self.special_tokens.get("bos_token", ""))
        return bos is not None and bos in before


ANY_TOKENIZER = "PreTrainedTokenizerFast"  # what transformers calls one of tokenizer.json alone


def common_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a ``tokenizer_config.json`` in words that transformers 4 knows as well as 5.

    Where 5 has no class for a model's tokenizer it names the back-end, of which 4 has none; 4 has
    one that makes token types too, which no decoder takes, unless it is told what to make. Other
    special tokens are a list under a name that means an object to 4.
    """
    found = dict(settings)
    if str(found.get("tokenizer_class")).endswith("Backend"):
        found["tokenizer_class"] = ANY_TOKENIZER
    if found.get("tokenizer_class") == ANY_TOKENIZER:
        found.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if isinstance(found.get("extra_special_tokens"), list):
        found["additional_special_tokens"] = found.pop("extra_special_tokens")
    return found


def added_tokens(tokenizer_json: Path) -> dict[str, int]:
    """Return the ids of the tokens that are matched before the tokenizer splits text.

    Raises:
        UsageError: If the list of them is malformed.
    """
    entries = _small_parts(tokenizer_json).get("added_tokens", [])
    try:
        return {str(entry["content"]): int(entry["id"]) for entry in entries}
    except (TypeError, KeyError, ValueError) as error:
        raise UsageError(
            f"{tokenizer_json}: added_tokens is not a list of tokens with content and id"
        ) from error


def put_around(tokenizer_json: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that the tokenizer puts before and after a single text.

    Raises:
        UsageError: If its post-processor is malformed.
    """
    before: list[int] = []
    after: list[int] = []
    try:
        for step in _processors(_small_parts(tokenizer_json).get("post_processor")):
            if step.get("type") == "TemplateProcessing":
                _collect_template(step, before, after)
            elif step.get("type") in {"RobertaProcessing", "BertProcessing"}:
                before.append(int(step["cls"][1]))
                after.append(int(step["sep"][1]))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UsageError(f"{tokenizer_json}: post_processor is malformed: {error}") from error
    return tuple(before), tuple(after)


def _processors(step: Any) -> Iterator[Mapping[str, Any]]:
    """Yield a post-processor, or those in it if it is a sequence."""
    if step is None:
        return
    if step.get("type") != "Sequence":
        yield step
        return
    for inner in step["processors"]:
        yield from _processors(inner)


def _collect_template(step: Mapping[str, Any], before: list[int], after: list[int]) -> None:
    target = before
    for piece in step["single"]:
        if "Sequence" in piece:
            target = after
        else:
            target += [int(id) for id in step["special_tokens"][piece["SpecialToken"]["id"]]["ids"]]


def _small_parts(tokenizer_json: Path) -> dict[str, Any]:
    """Return a tokenizer without its vocabulary, parsed once: that takes as long as a layer."""
    if not is_file(tokenizer_json):
        return {}
    return _parse_small_parts(tokenizer_json, tokenizer_json.stat().st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _parse_small_parts(tokenizer_json: Path, changed_ns: int) -> dict[str, Any]:
    del changed_ns  # a file that was changed is parsed again
    fields = read_tokenizer(tokenizer_json)
    small = {key: value for key, value in fields.items() if key != "model"}
    return small | {_LARGEST_MERGED_ID: _largest_id(fields)}


def _largest_merged_id(tokenizer_json: Path) -> int:
    """Return the largest id that text without added tokens can become, -1 if there is none."""
    return int(_small_parts(tokenizer_json).get(_LARGEST_MERGED_ID, -1))


def _vocabulary(fields: Mapping[str, Any]) -> Any:
    """Return the vocabulary of a tokenizer.json: ids by token, or Unigram's pieces in order."""
    model = fields.get("model")
    return model.get("vocab") if isinstance(model, dict) else None


def _largest_id(fields: Mapping[str, Any]) -> int:
    vocabulary = _vocabulary(fields)
    if isinstance(vocabulary, list):
        return len(vocabulary) - 1
    if not isinstance(vocabulary, dict):
        return -1
    added = fields.get("added_tokens")
    tokens = [it for it in added if isinstance(it, dict)] if isinstance(added, list) else []
    contents = {str(it.get("content")) for it in tokens}  # whoever reads them refuses others
    return max((id for token, id in vocabulary.items()
                if token not in contents and isinstance(id, int)), default=-1)  # fmt: skip


def with_legacy_map(directory: Path, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a ``tokenizer_config.json`` with ``special_tokens_map.json`` joined to it.

    That counts where the settings list no added tokens.

    Source: ``from_pretrained`` in tokenization_utils_base.py of transformers 5.24.
    """
    if "added_tokens_decoder" in settings:
        return settings
    return {**settings, **read_object_if_there(directory / "special_tokens_map.json")}


def special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens by name; each is a string, or an object with ``content``.

    A model may have tokens of its own besides the usual ones, as in transformers 5.
    """
    extra = settings.get("extra_special_tokens")
    found: dict[str, str] = {}
    for name in _SPECIAL_NAMES:
        value = settings.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            found[name] = content
    own = {name: value for name, value in settings.items() if name.endswith("_token")}
    own |= extra if isinstance(extra, dict) else {}
    return {name: value for name, value in own.items() if isinstance(value, str)} | found


class TokenIds:
    """The ids of a tokenizer's tokens; the vocabulary is parsed only if something asks for it."""

    def __init__(self, tokenizer_json: Path, special_tokens: Mapping[str, str]) -> None:
        self._path = tokenizer_json
        self._special = special_tokens
        self._added = added_tokens(tokenizer_json)

    def is_special(self, id: int) -> bool:
        """Tell whether it is an added token, or has a name such as ``eos_token``."""
        return id in self._added.values() or self.token(id) in self._special.values()

    def of(self, token: str | None) -> int | None:
        """Return the id of a token, None if there is none."""
        if token is None or token in self._added:
            return self._added.get(token or "")
        return self._vocabulary.get(token)

    def token(self, id: int) -> str | None:
        """Return the token of an id, None if there is none."""
        named = (token for token, of in self._added.items() if of == id)
        return next(named, None) or self._tokens.get(id)

    @functools.cached_property
    def _tokens(self) -> dict[int, str]:
        return {id: token for token, id in self._vocabulary.items()}

    @functools.cached_property
    def _vocabulary(self) -> dict[str, int]:
        vocabulary = _vocabulary(read_tokenizer(self._path))
        if isinstance(vocabulary, list):
            return {str(piece[0]): id for id, piece in enumerate(vocabulary) if piece}
        return vocabulary if isinstance(vocabulary, dict) else {}
