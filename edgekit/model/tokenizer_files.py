"""What a checkpoint's files say about text: the tokenizer, the chat template, where to stop."""

import functools
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from edgekit.encodings.json_files import read_object_if_there
from edgekit.errors import UsageError
from edgekit.text.rules import TextRules
from edgekit.text.template import ChatTemplate
from edgekit.text.tokenizer import Text, open_tokenizer


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

    @classmethod
    def open(cls, directory: Path, *, config: Mapping[str, Any]) -> Self:
        """Read the tokenizer's files of a model directory.

        Raises:
            UsageError: If there is no tokenizer.json, or a file is not JSON.
        """
        tokenizer_json = directory / "tokenizer.json"
        if not tokenizer_json.is_file():
            raise UsageError(
                f"{directory} has no tokenizer.json",
                hint="load it once with AutoTokenizer and save_pretrained() it into the model",
            )
        settings = read_object_if_there(directory / "tokenizer_config.json")
        special = _special_tokens(
            settings | read_object_if_there(directory / "special_tokens_map.json")
        )
        by_file = {
            "config.json": _ids(config.get("eos_token_id")),
            "generation_config.json": _ids(
                read_object_if_there(directory / "generation_config.json").get("eos_token_id")
            ),
            "tokenizer_config.json": _ids_of(tokenizer_json, special.get("eos_token")),
        }
        return cls(
            tokenizer_json=tokenizer_json,
            special_tokens=special,
            chat_template=_chat_template(directory, settings),
            declared_stop_ids=tuple(sorted({id for ids in by_file.values() for id in ids})),
            stop_ids_by_file=by_file,
        )

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

    def with_stop_id(self, id: int, *, origin: str) -> Self:
        """Return the same files with one more id that ends an answer."""
        return replace(
            self,
            declared_stop_ids=tuple(sorted({*self.declared_stop_ids, id})),
            stop_ids_by_file={**self.stop_ids_by_file, origin: (id,)},
        )

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
        )

    def _adds_bos(self) -> bool:
        """Tell whether the tokenizer puts its BOS token before plain text."""
        processor = json.dumps(_small_parts(self.tokenizer_json).get("post_processor"))
        bos = self.special_tokens.get("bos_token")
        return bos is not None and json.dumps(bos) in processor


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


def _small_parts(tokenizer_json: Path) -> dict[str, Any]:
    """Return a tokenizer without its vocabulary, parsed once: that takes as long as a layer."""
    if not tokenizer_json.is_file():
        return {}
    return _parse_small_parts(tokenizer_json, tokenizer_json.stat().st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _parse_small_parts(tokenizer_json: Path, changed_ns: int) -> dict[str, Any]:
    del changed_ns  # a file that was changed is parsed again
    fields = read_object_if_there(tokenizer_json)
    return {key: value for key, value in fields.items() if key != "model"}


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens by name; each is a string, or an object with ``content``."""
    found: dict[str, str] = {}
    for name in _SPECIAL_NAMES:
        value = settings.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found


def _chat_template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    """Return the template: a file of its own wins, of several in the config the default one."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except ValueError as error:
            raise UsageError(f"{path} is not UTF-8: {error}") from error
    template = settings.get("chat_template")
    if isinstance(template, list):
        entries = (entry for entry in template if isinstance(entry, dict))
        named = {entry.get("name"): entry.get("template") for entry in entries}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _ids(value: Any) -> tuple[int, ...]:
    return tuple(_flatten(value))


def _flatten(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _flatten(item)


def _ids_of(tokenizer_json: Path, token: str | None) -> tuple[int, ...]:
    if token is None:
        return ()
    added = added_tokens(tokenizer_json)
    return (added[token],) if token in added else ()
