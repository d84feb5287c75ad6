"""How transformers reads a tokenizer, where that is not what its tokenizer.json says.

For classes such as LlamaTokenizer and Qwen2Tokenizer, transformers 5 takes the vocabulary and the
merges from tokenizer.json and puts the rest together anew; for some types of models it does so
whatever class the files name. The file's own reading is that of every other program, and of the
text that a base was trained on. It counts; a user who trained with the other takes that.

transformers is asked in a child process, ``python -m edgekit.source.transformers_tokenizer``, once
for each tokenizer: without torch, which takes longer to import than the answer.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, get_args

from edgekit import installed
from edgekit.bundle import kept
from edgekit.cache import cache_directory, remembered
from edgekit.encodings.files import is_file
from edgekit.encodings.hashing import sha256_of_all
from edgekit.encodings.json_files import parse_object
from edgekit.encodings.limits import TRANSFORMERS_CPU_S, TRANSFORMERS_MEMORY_BYTES
from edgekit.errors import MissingDependencyError, UsageError
from edgekit.model.tokenizer_files import TokenizerFiles
from edgekit.runtime.child import death_of, environment, shell_status
from edgekit.runtime.limited import Allowance, set_limits
from edgekit.text import corpus
from edgekit.text.tokenizer import open_tokenizer


Reading = Literal["file", "transformers"]
# What transformers makes a tokenizer of, and the settings that stay next to it.
FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "config.json", "generation_config.json",
)  # fmt: skip
_VERSION = 1  # counts up when the question changes, so that cached answers are not taken
_ALLOWANCE = Allowance(cpu_s=TRANSFORMERS_CPU_S, memory_bytes=TRANSFORMERS_MEMORY_BYTES)
_TIMEOUT_S = 2 * TRANSFORMERS_CPU_S
_SHOWN_IDS = 4


@dataclass(frozen=True, kw_only=True)
class Differences:
    """Of some texts, those that transformers reads otherwise than tokenizer.json, and the first."""

    count: int
    of: int
    text: str = ""
    transformers_ids: tuple[int, ...] = ()
    file_ids: tuple[int, ...] = ()

    @property
    def first(self) -> str:
        """The first of them, in words."""
        return (
            f"{self.text!r} becomes {list(self.transformers_ids)}, in the file "
            f"{list(self.file_ids)}"
        )


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What transformers makes of a tokenizer's directory."""

    failure: str | None = None  # why it makes nothing of it
    corpus: Differences | None = None
    added: Differences | None = None  # in a line for each added token
    is_exact: bool = True  # whether a tokenizer.json can say what it does

    @property
    def differs(self) -> bool:
        """Whether its ids of a text, or of a prompt, are other ones."""
        return any(found and found.count for found in (self.corpus, self.added))


def taken(files: TokenizerFiles, reading: str) -> TokenizerFiles:
    """Return the text side of a checkpoint with one of the two readings, and say where they differ.

    Raises:
        UsageError: If there is no such reading, or transformers' cannot be had of this tokenizer.
        MissingDependencyError: If transformers' is asked for and it is not installed.
    """
    if reading not in get_args(Reading):
        raise UsageError(
            f"tokenizer = {reading!r}, expected 'file' or 'transformers'",
            hint="file reads tokenizer.json as it is, transformers as AutoTokenizer does",
        )
    if reading == "transformers":
        return _as_transformers_reads(files)
    if installed.missing("transformers", "tokenizers"):
        return files
    return replace(files, notes=(*files.notes, *_notes(ask(files))))


def ask(files: TokenizerFiles) -> Answer:
    """Return what transformers makes of the directory, from the cache if it was asked before."""
    try:
        said = remembered("tokenizers", _key(files), lambda: asdict(_child(files.tokenizer_json)))
    except ChildProcessError as error:  # which may go better the next time
        return Answer(failure=str(error))
    return _answer_of(said)


def _as_transformers_reads(files: TokenizerFiles) -> TokenizerFiles:
    if lacking := installed.missing("transformers", "tokenizers"):
        raise MissingDependencyError(
            f"--tokenizer transformers needs {' and '.join(lacking)}, which is not installed",
            hint="pip install 'edgekit[gguf]', or leave it out to read tokenizer.json as it is",
        )
    said = ask(files)
    directory = files.tokenizer_json.parent
    reason = said.failure or ("" if said.is_exact else "no tokenizer.json can say what it does")
    if reason:
        raise UsageError(
            f"{directory} has no tokenizer as transformers reads it: {reason}",
            hint="leave out --tokenizer to read tokenizer.json as it is",
        )
    if not said.differs:
        return replace(files, notes=(*files.notes, f"{_name()} reads tokenizer.json as it is"))
    out = cache_directory() / "tokenizers" / _key(files)
    kept.directory(out, lambda work: _write(files, work))
    note = f"text is read as {_name()} does, not as tokenizer.json says: {_difference(said)}"
    return replace(files, tokenizer_json=out / "tokenizer.json", notes=(*files.notes, note))


def _write(files: TokenizerFiles, work: Path) -> None:
    """Write the tokenizer.json that transformers makes, and what else it reads next to it."""
    for name in FILES[1:]:
        if is_file(files.tokenizer_json.parent / name):
            shutil.copyfile(files.tokenizer_json.parent / name, work / name)
    try:
        _child(files.tokenizer_json, out=work / "tokenizer.json")
    except ChildProcessError as error:
        raise UsageError(
            f"transformers wrote no tokenizer.json: {error}", hint="try again"
        ) from error


def _notes(said: Answer) -> Iterator[str]:
    if said.failure:
        yield f"{_name()} cannot read this tokenizer; its tokenizer.json counts ({said.failure})"
    elif said.differs:
        way = "; --tokenizer transformers takes its reading" if said.is_exact else ""
        yield f"tokenizer.json counts; {_name()} reads otherwise {_difference(said)}{way}"


def _difference(said: Answer) -> str:
    found = {"lines of text": said.corpus, "lines with an added token": said.added}
    return next(
        f"{it.count} of {it.of} {kind}, {it.first}" for kind, it in found.items() if it and it.count
    )


def _name() -> str:
    return f"transformers {installed.version('transformers')}"


def _key(files: TokenizerFiles) -> str:
    """Return a hash over all that the answer depends on."""
    directory = files.tokenizer_json.parent
    there = [name for name in FILES if is_file(directory / name)]
    question = [_VERSION, installed.version("transformers"), installed.version("tokenizers"),
                there, corpus.lines()]  # fmt: skip
    digest = sha256(json.dumps(question).encode()).hexdigest()
    return sha256_of_all([directory / name for name in there], after=digest)


def _child(tokenizer_json: Path, *, out: Path | None = None) -> Answer:
    """Ask transformers, and have it write its tokenizer.json if that is wanted.

    Raises:
        ChildProcessError: If it is killed, or takes too long.
    """
    places = [str(tokenizer_json), *([] if out is None else [str(out)])]
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", __name__, *places],
            capture_output=True, text=True, errors="replace", check=False,
            env=environment() | quiet, timeout=_TIMEOUT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ChildProcessError(f"no answer within {_TIMEOUT_S} s") from error
    if death := death_of(shell_status(done.returncode)):
        raise ChildProcessError(f"it {death}")
    if done.returncode == 0:
        said = parse_object(done.stdout.splitlines()[-1], origin="the answer of transformers")
        return _answer_of(said)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return Answer(failure=lines[-1].strip() if lines else f"exit status {done.returncode}")


def _answer_of(fields: dict[str, Any]) -> Answer:
    found = {
        name: Differences(**value | {key: tuple(value[key]) for key in value if "ids" in key})
        for name, value in fields.items()
        if isinstance(value, dict)
    }
    return Answer(**fields | found)


def main(tokenizer_json: Path, out: Path | None = None) -> Answer:
    """Do what is asked of a child: compare, and write what transformers made of the directory."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # to transformers, not installed
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(
        tokenizer_json.parent, local_files_only=True, trust_remote_code=False
    )
    made = theirs.backend_tokenizer.to_str()
    if out is not None:
        out.write_text(made, encoding="utf-8")
    file = open_tokenizer(tokenizer_json, refusal=UsageError)
    tokens = {
        token.content: None
        for tokenizer in (file, theirs.backend_tokenizer)
        for token in tokenizer.get_added_tokens_decoder().values()
    }
    texts = [*corpus.lines(), *(f"a {token} b{token}\n\n{token}c" for token in tokens)]
    expected = theirs(texts, add_special_tokens=False)["input_ids"]
    found = [it.ids for it in file.encode_batch(texts, add_special_tokens=False)]
    again = file.from_str(made)
    again.no_truncation()
    lines = len(corpus.lines())
    return Answer(
        corpus=_compare(texts[:lines], expected, found),
        added=_compare(texts[lines:], expected[lines:], found[lines:]),
        is_exact=expected == [it.ids for it in again.encode_batch(texts, add_special_tokens=False)],
    )


def _compare(
    texts: Sequence[str], expected: Sequence[list[int]], found: Sequence[list[int]]
) -> Differences:
    """Return where they differ: ``expected`` is what transformers says, ``found`` the file."""
    wrong = [i for i in range(len(texts)) if expected[i] != found[i]]
    if not wrong:
        return Differences(count=0, of=len(texts))
    theirs, ours = expected[wrong[0]], found[wrong[0]]
    at = next(
        (i for i, pair in enumerate(zip(theirs, ours, strict=False)) if pair[0] != pair[1]),
        min(len(theirs), len(ours)),
    )
    return Differences(
        count=len(wrong),
        of=len(texts),
        text=texts[wrong[0]],
        transformers_ids=tuple(theirs[at : at + _SHOWN_IDS]),
        file_ids=tuple(ours[at : at + _SHOWN_IDS]),
    )


if __name__ == "__main__":
    set_limits(_ALLOWANCE)
    print(json.dumps(asdict(main(*map(Path, sys.argv[1:])))))  # noqa: T201 - to the parent
