"""Which of a checkpoint's chat templates counts.

transformers 5 reads them in this order: ``chat_template.jinja`` and ``additional_chat_templates``,
which hide what ``tokenizer_config.json`` says; and where a processor is opened instead of a
tokenizer, ``chat_template.json`` or ``processor_config.json``.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from edgekit.encodings.files import is_file, readable, require_file
from edgekit.encodings.json_files import read_object, read_object_if_there
from edgekit.encodings.limits import TEMPLATE_BYTES, check_size
from edgekit.errors import UsageError


DEFAULT = "default"
FILE = "chat_template.jinja"
ADDITIONAL = "additional_chat_templates"  # a directory with a file for each further template
_SETTINGS = "tokenizer_config.json"
_OF_PROCESSORS = ("chat_template.json", "processor_config.json")


@dataclass(frozen=True, kw_only=True)
class ChatTemplates:
    """The templates of a checkpoint, by name, and what was decided between its files."""

    by_name: Mapping[str, str]
    notes: tuple[str, ...] = ()
    files: Mapping[str, Path] = field(default_factory=dict)  # which each comes from, for messages

    @classmethod
    def read(cls, directory: Path, settings: Mapping[str, Any]) -> Self:
        """Return the templates that count in a directory.

        Args:
            directory: Of a checkpoint or an adapter.
            settings: What its ``tokenizer_config.json`` says.

        Raises:
            UsageError: If a file is not UTF-8 or not JSON, or a template is not text.
        """
        sources, notes = [], []
        for name, found in _sources(directory, settings):
            filled = {key: template for key, template in found.items() if template.strip()}
            if len(filled) < len(found):
                notes.append(f"a chat template of {name} is empty, so it counts as none")
            sources += [(name, filled)] if filled else []
        if not sources:
            return cls(by_name={}, notes=tuple(notes))
        origin, by_name = sources[0]
        files = {name: _file(directory, origin, name) for name in by_name}
        for other, found in sources[1:]:
            if DEFAULT not in by_name and DEFAULT in found:
                by_name = {**by_name, DEFAULT: found[DEFAULT]}
                files[DEFAULT] = directory / other
                notes.append(
                    f"{origin} has no default chat template, so the one of {other} counts; "
                    "transformers does not look there"
                )
            elif any(by_name.get(name) != template for name, template in found.items()):
                notes.append(f"the chat template of {other} is not taken: {origin} has another")
        return cls(by_name=by_name, notes=tuple(notes), files=files)

    @property
    def default(self) -> str | None:
        """The template for a plain conversation: the default one, or the only one."""
        return self.by_name[self.default_name] if self.default_name is not None else None

    @property
    def default_name(self) -> str | None:
        """Its name; None if there is no template, or several and none of them is the default."""
        if DEFAULT in self.by_name:
            return DEFAULT
        return next(iter(self.by_name)) if len(self.by_name) == 1 else None


def _sources(directory: Path, settings: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield what each place says, the one that counts first."""
    files = dict(_files(directory))
    yield FILE if DEFAULT in files else ADDITIONAL, files
    yield _SETTINGS, _named(settings.get("chat_template"), directory / _SETTINGS)
    for name in _OF_PROCESSORS:
        fields = read_object_if_there(directory / name)
        yield name, _named(fields.get("chat_template"), directory / name)


def _file(directory: Path, origin: str, name: str) -> Path:
    """Return the file of a template: its own, or one that holds several."""
    own = origin in {FILE, ADDITIONAL} and name != DEFAULT
    return directory / ADDITIONAL / f"{name}.jinja" if own else directory / origin


def _files(directory: Path) -> Iterator[tuple[str, str]]:
    if is_file(directory / FILE):
        yield DEFAULT, _text(directory / FILE)
    for path in sorted((directory / ADDITIONAL).glob("*.jinja")):
        yield path.name.removesuffix(".jinja"), _text(path)


def _text(path: Path) -> str:
    require_file(path)
    check_size(path, TEMPLATE_BYTES)
    try:
        with readable(path):
            return path.read_text(encoding="utf-8")
    except ValueError as error:
        raise UsageError(f"{path} is not UTF-8: {error}") from error


def _named(value: Any, path: Path) -> dict[str, str]:
    """Return the templates of a JSON file: one text, or several as a list or an object."""
    if value is None:
        return {}
    pairs: list[tuple[Any, Any]] = [(None, None)]
    if isinstance(value, str):
        pairs = [(DEFAULT, value)]
    elif isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        pairs = [(entry.get("name"), entry.get("template")) for entry in value]
    if not all(isinstance(name, str) and isinstance(template, str) for name, template in pairs):
        raise UsageError(
            f"{path}: chat_template is neither text nor a list of templates with name and template",
            hint="repair the field, or remove it",
        )
    return dict(pairs)


def write_others(by_name: Mapping[str, str], directory: Path) -> None:
    """Write the templates that are not the default one, as transformers 5 does."""
    for name, template in by_name.items():
        path = directory / ADDITIONAL / f"{name}.jinja"
        if name == DEFAULT or path.parent.name != ADDITIONAL:
            continue  # a name that leads elsewhere is not one
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(template.encode())


def of_file(path: Path) -> str:
    """Return the template in a file of its own, or in the ``chat_template`` of a JSON file.

    Raises:
        UsageError: If it is not UTF-8, or a JSON file without one default template.
    """
    if path.suffix != ".json":
        return _text(path)
    found = ChatTemplates(by_name=_named(read_object(path).get("chat_template"), path)).default
    if found is None:
        raise UsageError(f"{path} has no default chat template")
    return found
