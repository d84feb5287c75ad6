"""Goldens: what an artifact said on the workstation, kept in the bundle to ask a device again.

``goldens.json`` lets ``device_tests`` check on the device itself that text becomes the same ids,
that a conversation renders to the same bytes, and that the logits are those that were proven.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from edgekit.encodings.files import is_file
from edgekit.encodings.json_files import read_object
from edgekit.encodings.typed_json import FieldReader
from edgekit.errors import BundleError


if TYPE_CHECKING:
    from edgekit.runtime.session import Logits


GOLDENS = "goldens.json"
_ROUNDED = 1e-4  # how far above 0 a logarithm of a probability may have been rounded
TOP_TOKENS = 16  # of every distribution; the rest is one remainder


@dataclass(frozen=True, kw_only=True)
class TextGolden:
    """A text and its ids, special tokens parsed and none added."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ChatGolden:
    """A conversation, the text it renders to, and that text's ids."""

    messages: tuple[dict[str, str], ...]
    rendered: str
    ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class LogitGolden:
    """The most likely tokens after each token of a text."""

    ids: tuple[int, ...]
    top_ids: tuple[tuple[int, ...], ...]
    top_log_probabilities: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, ids: Sequence[int], logits: "Logits") -> Self:
        """Keep the top of each row; ``logits`` has shape ``(len(ids), vocabulary)``."""
        import numpy as np

        count = min(TOP_TOKENS, logits.shape[1])
        top = np.argsort(-logits, axis=1, kind="stable")[:, :count]
        log_probabilities = np.take_along_axis(_log_softmax(logits), top, axis=1)
        return cls(
            ids=tuple(ids),
            top_ids=tuple(map(tuple, top.tolist())),
            top_log_probabilities=tuple(
                tuple(round(value, 5) for value in row) for row in log_probabilities.tolist()
            ),
        )

    @property
    def problem(self) -> str:
        """What is wrong with the lengths of its rows; nothing where they are those of one text."""
        rows = len(self.top_ids), len(self.top_log_probabilities)
        if not self.ids or set(rows) != {len(self.ids)}:
            return f"has {len(self.ids)} ids, {rows[0]} rows of top ids and {rows[1]} of logarithms"
        lengths = {*map(len, self.top_ids), *map(len, self.top_log_probabilities)}
        if len(lengths) > 1 or not 0 < min(lengths) <= TOP_TOKENS:
            return f"has rows of {sorted(lengths)} tokens, expected one length up to {TOP_TOKENS}"
        if max(map(max, self.top_log_probabilities)) > _ROUNDED:
            return "has the logarithm of a probability above 1"
        return ""

    def mean_kl_nats(self, logits: "Logits") -> float:
        """Return how far a device's logits are from these, all other tokens taken as one.

        Joining tokens never makes a divergence larger, so this is a lower bound of the full one.

        Raises:
            BundleError: If a token is beyond the device's vocabulary.
        """
        import numpy as np

        if max(map(max, self.top_ids)) >= logits.shape[1]:
            raise BundleError(f"{GOLDENS} has a token beyond the vocabulary of {logits.shape[1]}")

        log_p = np.array(self.top_log_probabilities)
        log_q = np.take_along_axis(_log_softmax(logits), np.array(self.top_ids), axis=1)
        p_rest = np.maximum(1 - np.exp(log_p).sum(axis=1), 1e-9)
        q_rest = np.maximum(1 - np.exp(log_q).sum(axis=1), 1e-9)
        kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=1) + p_rest * np.log(p_rest / q_rest)
        return float(kl.mean())


def _log_softmax(logits: "Logits") -> Any:
    import numpy as np

    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


@dataclass(frozen=True, kw_only=True)
class Goldens:
    """Everything a device is asked again."""

    texts: tuple[TextGolden, ...]
    chats: tuple[ChatGolden, ...]
    logits: tuple[LogitGolden, ...]
    answer_prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]  # what the artifact says next, greedily

    def save(self, directory: Path) -> None:
        """Write ``goldens.json``."""
        text = json.dumps(asdict(self), ensure_ascii=False, separators=(",", ":"))
        (directory / GOLDENS).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read ``goldens.json``.

        Raises:
            BundleError: If the bundle has none, since it was exported without proof, or they are
                damaged.
        """
        path = directory / GOLDENS
        if not is_file(path, refusal=BundleError):
            raise BundleError(f"{directory} has no {GOLDENS}", hint="export it without --no-verify")
        hint = "copy the bundle again"
        fields = read_object(path, refusal=BundleError, hint=hint)
        goldens = FieldReader(origin=path, refusal=BundleError, hint=hint).read(cls, fields)
        for index, golden in enumerate(goldens.logits):
            if problem := golden.problem:
                raise BundleError(f"{path}: logits[{index}] {problem}", hint=hint)
        return goldens
