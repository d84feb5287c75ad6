"""What a directory is where it is not what was asked for: the right path, or the right option."""

import re
from pathlib import Path

from edgekit.encodings.files import is_directory, is_file
from edgekit.encodings.json_files import read_object_if_there
from edgekit.errors import UsageError


_ADAPTER, _MODEL = "adapter_config.json", "config.json"


def hint_for_model(directory: Path) -> str | None:
    """Return the way out where a directory that should be a model holds something else."""
    if is_file(directory / _ADAPTER):
        base = _base_of(directory)
        named = f" (it names {base!r})" if base else ""
        return f"it is an adapter: pass its base as MODEL{named} and this with --adapter"
    if within := _within(directory, _MODEL):
        return f"pass {_one_of(within)}"
    if within := _within(directory, _ADAPTER):
        return f"it holds adapters: pass their base as MODEL and --adapter {_one_of(within)}"
    return None


def hint_for_adapter(directory: Path) -> str | None:
    """Return the way out where a directory that should be an adapter holds something else."""
    is_there = is_directory(directory)
    if not is_there and not is_file(directory):
        return "there is no such directory; edgekit reads local adapters only"
    if not is_there and is_file(directory.parent / _ADAPTER):
        return f"pass its directory: --adapter {directory.parent}"
    if directory.suffix == ".gguf":
        return "it is llama.cpp's form of one: pass the directory that it was converted from"
    if within := _within(directory, _ADAPTER):
        return f"pass --adapter {_one_of(within)}"
    if is_file(directory / _MODEL):
        return "it is a model: pass it as MODEL, or the directory that the training wrote"
    return None


def _base_of(directory: Path) -> str:
    try:
        fields = read_object_if_there(directory / _ADAPTER)
    except UsageError:
        return ""
    return str(fields.get("base_model_name_or_path") or fields.get("model") or "")


def _within(directory: Path, name: str) -> list[Path]:
    """Return the directories in it that hold a file of this name: what a Trainer saves, in order.

    The last checkpoint comes first.
    """
    found = [path.parent for path in directory.glob(f"*/{name}")]
    return sorted(found, key=lambda path: (-_step(path), path.name))


def _step(path: Path) -> int:
    match = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(match[1]) if match else -1


def _one_of(paths: list[Path], *, most: int = 4) -> str:
    """Return what to pass: the one there is, or the last checkpoint, or the first of the names."""
    if len(paths) == 1:
        return str(paths[0])
    others = ", ".join(path.name for path in paths[1:most])
    return f"{paths[0]}, or another in there: {others}{', …' if len(paths) > most else ''}"
