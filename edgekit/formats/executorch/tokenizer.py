"""The tokenizer inside ExecuTorch's runners on phones, and what text and file must be for it.

It reads ``tokenizer.json``, but composes letters wrongly, takes bytes that are listed as added
tokens for unknown ones, and keeps whitespace that a special token swallows. So a bundle has a copy
without the first two, and `Preparation` says what an app does to a prompt instead. Where the copy
still reads otherwise, or not at all (Unigram), there is none, and the app needs edgekit's text
layer. ``python -m edgekit.formats.executorch.tokenizer FILE`` reads texts and writes ids, as JSON.
"""

import importlib
import json
import re
import subprocess
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgekit import scratch
from edgekit.encodings.files import is_file
from edgekit.encodings.typed_json import FieldReader
from edgekit.errors import BundleError, MissingDependencyError, ToolchainError
from edgekit.runtime.child import environment
from edgekit.text import corpus
from edgekit.text.tokenizer import open_tokenizer
from edgekit.text.tokenizer_json import read as read_tokenizer


RUNNER_COPY = "runner_tokenizer.json"
NOTE = (
    "the tokenizer inside ExecuTorch's phone runners reads this model's text otherwise, so the app "
    "needs edgekit's own text layer and must pass token ids"
)
WHITESPACE = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"  # White_Space
TIMEOUT_S = 300
LOG_LINES = 10
_PREPARATION = "edgekit_preparation"  # a field of the copy
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What an app does to a prompt before it hands it to the runner."""

    composes: bool  # to Unicode's NFC, as the checkpoint's tokenizer does itself
    swallowing: tuple[
        str, ...
    ]  # tokens after which whitespace is taken away, as they do themselves

    @classmethod
    def of(cls, tokenizer: dict[str, Any]) -> "Preparation":
        """Read it off a parsed ``tokenizer.json``."""
        return cls(
            composes="NFC" in _normalizers(tokenizer.get("normalizer")),
            swallowing=tuple(
                token["content"] for token in tokenizer.get("added_tokens", []) if token["rstrip"]
            ),
        )

    def __call__(self, text: str) -> str:
        """Return the prompt as the runner must get it."""
        if self.composes:
            text = unicodedata.normalize("NFC", text)
        if self.swallowing:
            text = re.sub(
                f"({'|'.join(map(re.escape, self.swallowing))}){WHITESPACE}+", r"\1", text
            )
        return text


def runner_copy(tokenizer_json: Path, prompts: Sequence[str] = ()) -> bytes | None:
    """Return ``tokenizer.json`` as the runner must have it, None if none gives the same ids.

    Compared are the corpus, every added token, and ``prompts``.

    Raises:
        MissingDependencyError: If the runner's tokenizer is not installed.
    """
    tokenizer = read_tokenizer(tokenizer_json)
    prepare, exact = Preparation.of(tokenizer), open_tokenizer(tokenizer_json)
    content = json.dumps(
        _rewritten(tokenizer, prepare), ensure_ascii=False, separators=(",", ":")
    ).encode()
    texts = [*corpus.lines(), *_texts_with(exact), *prompts]
    expected = [exact.encode(text, add_special_tokens=False).ids for text in texts]
    with scratch.directory("tokenizer") as directory:
        path = directory / RUNNER_COPY
        path.write_bytes(content)
        found = runner_ids(path, list(map(prepare, texts)))
    return content if found == expected else None


def runtime_ids(path: Path, texts: Sequence[str]) -> list[list[int]] | None:
    """Return what phone runners make of ``texts`` once an app has prepared them.

    Args:
        path: The ``.pte`` file of a bundle.
        texts: Prompts, with special tokens written out.

    Returns:
        None if the bundle has no copy of the tokenizer for them.
    """
    copy = path.with_name(RUNNER_COPY)
    if not is_file(copy, refusal=BundleError):
        return None
    said = read_tokenizer(copy, refusal=BundleError).get(_PREPARATION)
    prepare = FieldReader(origin=copy, refusal=BundleError).read(Preparation, said)
    return runner_ids(copy, list(map(prepare, texts)))


def runner_ids(tokenizer_json: Path, texts: Sequence[str]) -> list[list[int]] | None:
    """Return what the runner's tokenizer makes of ``texts``, None if it cannot read the file.

    In a process of its own: it talks to standard error, and a file it does not expect may end it.

    Raises:
        MissingDependencyError: If it is not installed.
        ToolchainError: If it dies.
    """
    done = subprocess.run(
        [sys.executable, "-P", "-m", __name__, str(tokenizer_json)],
        input=json.dumps(texts), capture_output=True, text=True, errors="replace", check=False,
        env=environment(), timeout=TIMEOUT_S,
    )  # fmt: skip
    if done.returncode != 0:
        raise ToolchainError(
            f"the runner's tokenizer ended with {done.returncode} over {tokenizer_json}",
            log="\n".join(done.stderr.strip().splitlines()[-LOG_LINES:]),
        )
    said = json.loads(done.stdout.splitlines()[-1])
    if "missing" in said:
        raise MissingDependencyError(
            f"ExecuTorch's tokenizer is not installed ({said['missing']})",
            hint="pip install 'edgekit[executorch]'",
        )
    ids: list[list[int]] | None = said["ids"]
    return ids


def _rewritten(tokenizer: dict[str, Any], prepare: Preparation) -> dict[str, Any]:
    added = tokenizer.get("added_tokens", [])
    return tokenizer | {
        _PREPARATION: asdict(prepare),  # what it does not know it passes over
        "normalizer": _without_nfc(tokenizer.get("normalizer")),
        "added_tokens": [it for it in added if not _BYTE_TOKEN.fullmatch(it["content"])],
    }


def _normalizers(step: dict[str, Any] | None) -> list[str]:
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [name for part in step["normalizers"] for name in _normalizers(part)]
    return [step["type"]]


def _without_nfc(step: dict[str, Any] | None) -> dict[str, Any] | None:
    if step is None or step["type"] == "NFC":
        return None
    if step["type"] != "Sequence":
        return step
    parts = [part for part in map(_without_nfc, step["normalizers"]) if part]
    return step | {"normalizers": parts} if parts else None


def _texts_with(tokenizer: Any) -> list[str]:
    """Return each added token between words, lines and others of its kind."""
    tokens = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    tokens = [token for token in tokens if not _BYTE_TOKEN.fullmatch(token)][:256]
    around = [f"{token}a {token} b\n{token}\n\n c" for token in tokens]
    return [*around, "".join(tokens), " ".join(tokens)]


def main(tokenizer_json: str) -> dict[str, Any]:
    """Do what `runner_ids` has a child do."""
    try:
        tokenizer = importlib.import_module("pytorch_tokenizers").CppHFTokenizer()
    except ImportError as error:
        return {"missing": str(error)}
    try:
        tokenizer.load(tokenizer_json)
        return {"ids": [list(tokenizer.encode(text)) for text in json.load(sys.stdin)]}
    except RuntimeError:  # Unigram, for one
        return {"ids": None}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))  # noqa: T201 - to the parent
