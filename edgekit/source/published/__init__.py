"""Published models by name: a file here for each maker, so that plans need no weights.

A file is a JSON object of models by their name on the Hugging Face hub. Each says what its
config.json says of the decoder, how many parameters its makers count, and where both were read.
What the sizes compute is held against that count, so that the two confirm each other.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from edgekit.encodings.json_files import read_object


# What models of one shape are called besides: tuned or not, they have as many weights.
_TUNED = re.compile(r"-(instruct|it|chat|base|pt|bf16|hf|thinking)(?=-|$)", re.IGNORECASE)
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([bm])", re.IGNORECASE)
_SCALES = {"b": 1e9, "m": 1e6}
_NEAR = 0.15  # models of "3b" have up to so much more or less


@dataclass(frozen=True, kw_only=True)
class Published:
    """A model on the hub, without its weights."""

    name: str  # with its owner: Qwen/Qwen2.5-1.5B
    parameters: str  # "1,543,714,304", or "1.54B" where that is what is said
    config: Mapping[str, Any]  # the fields of its decoder
    source: str  # where both were read
    date: str  # YYYY-MM-DD
    licence: str | None = None
    wrapper: str | None = None  # the model_type around it

    @property
    def model_type(self) -> str:
        """That of the decoder."""
        return str(self.config["model_type"])

    @property
    def parameters_about(self) -> float:
        """The count as a number."""
        size = _SIZE.fullmatch(self.parameters)
        if size is None:
            return float(self.parameters.replace(",", ""))
        return float(size[1]) * _SCALES[size[2].lower()]

    @property
    def config_json(self) -> dict[str, Any]:
        """What its config.json says, as far as it matters here."""
        if self.wrapper is None:
            return dict(self.config)
        return {"model_type": self.wrapper, "text_config": dict(self.config)}

    def has(self, parameters: int) -> bool:
        """Tell whether that many numbers are as many as its makers say."""
        if self.parameters[-1].isdigit():
            return parameters == int(self.parameters.replace(",", ""))
        _, _, decimals = self.parameters[:-1].partition(".")
        return f"{parameters / 1e9:.{len(decimals)}f}B" == self.parameters


@cache
def models() -> Mapping[str, Published]:
    """Return all there are, by name."""
    return {
        name: Published(name=name, **fields)
        for path in sorted(Path(__file__).parent.glob("*.json"))
        for name, fields in read_object(path).items()
    }


def find(name: str) -> Published | None:
    """Return the model of a name, with or without its owner and what says how it was tuned."""
    wanted = _bare(name)
    owned = [it for known, it in models().items() if known.lower() == name.lower()]
    return next(iter(owned), None) or next(
        (it for known, it in models().items() if wanted in {_bare(known), _bare(_last(known))}),
        None,
    )


def of_size(text: str) -> list[Published]:
    """Return the models of about a size, smallest first; none if the text is no size: ``3b``."""
    size = _SIZE.fullmatch(text.strip())
    if size is None:
        return []
    wanted = float(size[1]) * _SCALES[size[2].lower()]
    near = (it for it in models().values() if abs(it.parameters_about / wanted - 1) <= _NEAR)
    return sorted(near, key=lambda it: it.parameters_about)


def like(name: str) -> Iterator[str]:
    """Yield names that somebody may have meant."""
    by_bare = {_bare(_last(known)): _last(known) for known in models()}
    for near in difflib.get_close_matches(_bare(_last(name)), by_bare, n=3, cutoff=0.6):
        yield by_bare[near]


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def _bare(name: str) -> str:
    return _TUNED.sub("", name).lower().replace("_", "-")
