"""What a checkpoint's files say about text: the tokenizer, the chat template, where to stop."""

import functools
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from edgekit.encodings.json_files import read_object_if_there
from edgekit.errors import UsageError
from edgekit.model import stops
from edgekit.model.chat_templates import ChatTemplates
from edgekit.text.rules import TextRules
from edgekit.text.template import AS_IT_IS, ChatTemplate, TemplateCall
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
    stop_strings: tuple[str, ...] = ()  # texts that end an answer and are not part of it
    templates: Mapping[str, str] = field(default_factory=dict)  # all there are, by name
    template_call: TemplateCall = AS_IT_IS  # what it gets; its preamble begins the template
    notes: tuple[str, ...] = ()  # what was decided where the files disagree, one sentence each

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
        special = special_tokens(
            settings | read_object_if_there(directory / "special_tokens_map.json")
        )
        generation = directory / "generation_config.json"
        generation_config = read_object_if_there(generation)
        found = ChatTemplates.read(directory, settings)
        by_file = stops.by_file(
            config,
            generation_config,
            eos_id=added_tokens(tokenizer_json).get(special.get("eos_token", "")),
        )
        return cls(
            tokenizer_json=tokenizer_json,
            special_tokens=special,
            chat_template=found.default,
            declared_stop_ids=stops.together(by_file),
            stop_ids_by_file=by_file,
            stop_strings=stops.strings(generation_config, generation),
            templates=found.by_name,
            notes=found.notes,
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

    def beside(self, name: str, *, otherwise: Path) -> Path:
        """Return where a file of settings is: next to the tokenizer, which an adapter may bring.

        Args:
            name: Of the file.
            otherwise: The model's directory, for one that is not next to the tokenizer.
        """
        path = self.tokenizer_json.parent / name
        return path if path.is_file() else otherwise / name

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
            template_variables=dict(self.template_call.variables),
            content_parts=self.template_call.content_parts,
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


def special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens by name; each is a string, or an object with ``content``."""
    found: dict[str, str] = {}
    for name in _SPECIAL_NAMES:
        value = settings.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found
