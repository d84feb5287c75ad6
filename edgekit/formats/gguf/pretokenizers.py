"""Pre-tokenizers: where text is cut before its bytes are merged.

A tokenizer.json spells its cuts out as regular expressions; a GGUF file only names a set that is
compiled into llama.cpp. One table reads both ways. What it proposes is not believed: `find_pre`
has llama.cpp tokenize a corpus under that name, and tries all others when the ids differ.
"""

import json
import subprocess
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from edgekit import installed, scratch
from edgekit.cache import remembered
from edgekit.encodings.hashing import sha256_of
from edgekit.errors import ToolchainError, UsageError
from edgekit.formats.gguf import vocabulary
from edgekit.formats.gguf.layout import Value, encode_header
from edgekit.formats.gguf.runtime import library
from edgekit.formats.gguf.vocabulary import TokenizerSource, vocabulary_of
from edgekit.model.tokenizer_files import TokenizerFiles
from edgekit.runtime.child import environment
from edgekit.text import spaces
from edgekit.text.tokenizer import open_tokenizer


# GPT-2's own cuts, which Hugging Face's ByteLevel makes when `use_regex` is on.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
ONE_DIGIT = r"\p{N}"  # what Hugging Face's Digits cuts with `individual_digits`
_DIGITS = r"\p{N}+"
_ASCII_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|`]+"
_THREE_DIGITS = "[0-9][0-9][0-9]"

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_OTHER = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
_OTHER_OR_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"
_SPACES = r"\s+(?!\S)|\s+"
_LETTER_CASES = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_LLAMA3 = f"{_CONTRACTION}|{_WORD}|\\p{{N}}{{1,3}}|{_OTHER}|{_SPACES}"
_QWEN2 = f"{_CONTRACTION}|{_WORD}|\\p{{N}}|{_OTHER}|{_SPACES}"
_QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}|"
    rf" ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{_SPACES}"
)
_TEKKEN = f"{'|'.join(_LETTER_CASES)}|\\p{{N}}|{_OTHER_OR_SLASH}|{_SPACES}"
_GPT4O = (
    f"{'|'.join(f'{case}{_CONTRACTION}?' for case in _LETTER_CASES)}"
    f"|\\p{{N}}{{1,3}}|{_OTHER_OR_SLASH}|{_SPACES}"
)
_DEEPSEEK3_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHINESE_JAPANESE = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"


@dataclass(frozen=True, kw_only=True)
class PreTokenizer:
    """Regular expressions, each cutting what the ones before it left, matches and gaps alike."""

    patterns: tuple[str, ...]
    ignores_merges: bool = False  # a piece that is a token is taken whole, merges or not
    adds_bos: bool = False  # what llama.cpp does when the file does not say
    composes: bool = False  # the models of this name normalize to NFC; llama.cpp never does


# By llama.cpp's name; the first name of each behaviour is the one edgekit writes.
# Source: llm_tokenizer_bpe and impl::load in src/llama-vocab.cpp, llama.cpp 0c1e57098, and the
# tokenizer.json of the models those names were made for.
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "gpt-2": PreTokenizer(patterns=(GPT2,)),
    "smollm": PreTokenizer(patterns=(ONE_DIGIT, GPT2)),
    "qwen2": PreTokenizer(patterns=(_QWEN2,), composes=True),
    "stablelm2": PreTokenizer(patterns=(_QWEN2,)),
    "llama-bpe": PreTokenizer(patterns=(_LLAMA3,), ignores_merges=True, adds_bos=True),
    "gpt-4o": PreTokenizer(patterns=(_GPT4O,)),
    "granite-embed-multi-97m": PreTokenizer(patterns=(_GPT4O,), ignores_merges=True),
    "tekken": PreTokenizer(patterns=(_TEKKEN,), ignores_merges=True, adds_bos=True),
    "dbrx": PreTokenizer(patterns=(_LLAMA3,)),
    "glm4": PreTokenizer(patterns=(_LLAMA3,), ignores_merges=True),
    "olmo": PreTokenizer(patterns=(GPT2,), composes=True),
    "command-r": PreTokenizer(patterns=(ONE_DIGIT, GPT2), composes=True),
    "qwen35": PreTokenizer(patterns=(_QWEN35,), composes=True),
    "deepseek-v3": PreTokenizer(patterns=(r"\p{N}{1,3}", _CHINESE_JAPANESE, _DEEPSEEK3_WORDS)),
    "falcon": PreTokenizer(patterns=(_ASCII_PUNCTUATION, GPT2, _THREE_DIGITS)),
    "default": PreTokenizer(
        patterns=(r"[\p{P}\$\+<=>\^~\|]+", GPT2, _DIGITS, _THREE_DIGITS),
    ),
    "ufakzeka": PreTokenizer(patterns=(f"{_WORD}|\\p{{N}}|{_OTHER}|{_SPACES}",)),
}
_SAME_AS: Mapping[str, str] = {
    **dict.fromkeys(("phi-2", "mpt", "jais", "mellum", "gigachat", "a.x-4.0", "exaone4"), "gpt-2"),
    **dict.fromkeys(("trillion", "granite-docling"), "gpt-2"),
    **dict.fromkeys(("starcoder", "refact", "codeshell", "exaone"), "smollm"),
    **dict.fromkeys(("minerva-7b", "mellum2"), "smollm"),
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral"), "llama-bpe"),
    **dict.fromkeys(("midm-2.0", "lfm2"), "llama-bpe"),
    **dict.fromkeys(("llama4", "kanana2", "talkie", "minimax-m2"), "gpt-4o"),
    **dict.fromkeys(("smaug-bpe", "chatglm-bpe"), "dbrx"),
    **dict.fromkeys(("deepseek-r1-qwen", "kormo", "megrez", "hunyuan"), "stablelm2"),
    **dict.fromkeys(("grok-2", "solar-open"), "stablelm2"),
}
# Names whose cuts only llama.cpp knows here; the search tries them too.
_SEARCHED_ONLY = (
    *("deepseek-llm", "deepseek-coder", "jais-2", "youtu", "minicpm5", "seed-coder"),
    *("bailingmoe", "poro-chat", "viking", "chameleon", "tiny_aya"),
    *("superbpe", "afmoe", "laguna", "exaone-moe", "spark2_5", "kimi-k2", "whitespace"),
)
# How a Split keeps everything: pieces and gaps, or the pieces of a pattern that matches everything,
# which is how conversions from tiktoken say it.
_CUTS = (("Isolated", False), ("Removed", True))
_VERSION = 1  # counts up when the search changes, so that remembered answers are not taken
_SEARCH_S = 300  # for one child; all names over 128 000 tokens took 40 s on two busy cores


def known_pre_tokenizer(name: str) -> PreTokenizer | None:
    """Return what a name of llama.cpp's stands for, if the table holds it."""
    return PRE_TOKENIZERS.get(_SAME_AS.get(name, name))


def known_names() -> list[str]:
    """Return every name `known_pre_tokenizer` answers."""
    return sorted({*PRE_TOKENIZERS, *_SAME_AS})


def to_tokenizer_json(pre: PreTokenizer) -> dict[str, Any]:
    """Return the ``pre_tokenizer`` of a tokenizer.json that makes these cuts."""
    ends_as_gpt2 = pre.patterns[-1] == GPT2
    cuts = pre.patterns[:-1] if ends_as_gpt2 else pre.patterns
    steps = [_step_of(pattern) for pattern in cuts]
    steps.append(
        {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": ends_as_gpt2,
        }
    )
    return steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}


def _step_of(pattern: str) -> dict[str, Any]:
    if pattern == ONE_DIGIT:
        return {"type": "Digits", "individual_digits": True}
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def patterns_of(steps: Iterable[Mapping[str, Any]]) -> tuple[str, ...] | None:
    """Return the cuts a tokenizer.json asks for, or None if they are no such sequence."""
    patterns: list[str] = []
    for step in steps:
        cut = _pattern_of(step)
        if cut is None:
            return None
        patterns += cut
    return tuple(patterns)


def _pattern_of(step: Mapping[str, Any]) -> list[str] | None:
    match step.get("type"):
        case "ByteLevel":
            return [GPT2] if step.get("use_regex", True) else []
        case "Digits":
            return [ONE_DIGIT if step.get("individual_digits") else _DIGITS]
        case "Punctuation" if step.get("behavior") == "Contiguous":
            return [_ASCII_PUNCTUATION]
        case "Split":
            kept = (step.get("behavior"), bool(step.get("invert")))
            pattern = step.get("pattern")
            regex = pattern.get("Regex") if isinstance(pattern, dict) else None
            if not isinstance(regex, str) or kept not in _CUTS:
                return None
            return [regex]
        case _:
            return None


def candidate_pre(tokenizer: TokenizerFiles) -> list[str]:
    """Return llama.cpp's names for a byte-level tokenizer's cuts, the likeliest first.

    They all stand for exactly these patterns; those that also agree on ignoring merges, then on
    normalizing, come first. The list is empty for cuts nobody named.
    """
    return _candidates(TokenizerSource.open(tokenizer))


def _candidates(source: TokenizerSource) -> list[str]:
    patterns = patterns_of(source.steps("pre_tokenizer"))
    same = [name for name, pre in PRE_TOKENIZERS.items() if pre.patterns == patterns]
    return sorted(same, key=lambda name: _unlikeness(PRE_TOKENIZERS[name], source))


def _unlikeness(pre: PreTokenizer, source: TokenizerSource) -> tuple[bool, bool]:
    ignores_merges = bool(source.model.get("ignore_merges"))
    return pre.ignores_merges != ignores_merges, pre.composes != _composes(source)


@dataclass(frozen=True, kw_only=True)
class _Difference:
    """The first text that llama.cpp cuts otherwise under one name."""

    name: str
    texts: int  # how many differ
    text: str
    expected: list[int]
    found: list[int]

    def __str__(self) -> str:
        at = next(
            (i for i, (a, b) in enumerate(zip(self.expected, self.found, strict=False)) if a != b),
            min(len(self.expected), len(self.found)),
        )
        return (
            f"{self.text!r} becomes {self.found[at : at + 4]} at token {at}, "
            f"expected {self.expected[at : at + 4]}"
        )


def likely_pre(tokenizer: TokenizerFiles) -> str:
    """Return the name `find_pre` will most likely settle on, without asking llama.cpp."""
    return next(iter(candidate_pre(tokenizer)), "default")


def find_pre(tokenizer: TokenizerFiles, *, corpus: Sequence[str]) -> str:
    """Return the name under which llama.cpp tokenizes every text of the corpus as the checkpoint.

    Chat prompts must give the same ids too; a text that is not one may get another space in front
    (see `spaces`). The candidates are tried first, then every other name llama.cpp knows, each in a
    child process, because some abort on a vocabulary they were not made for. What was found is
    remembered.

    Raises:
        UsageError: If no name agrees; the message shows the first difference of the best.
        MissingDependencyError: If llama.cpp or tokenizers is not installed.
    """
    source = TokenizerSource.open(tokenizer)
    if installed.missing("llama_cpp"):
        library()  # says what to install; otherwise only the child needs it
    asked = [_VERSION, installed.version("llama-cpp-python"), installed.version("tokenizers"),
             *corpus, *tokenizer.prompts(), sha256_of(tokenizer.tokenizer_json)]  # fmt: skip
    key = sha256(json.dumps(asked).encode()).hexdigest()
    found = remembered("gguf-tokenizers", key, lambda: _search(source, corpus))
    if "name" in found:
        return str(found["name"])
    raise UsageError(
        f"llama.cpp reads text otherwise than {source.path}: {found['difference']}"
        if found["difference"]
        else f"llama.cpp loads the vocabulary of {source.path} under no name",
        hint="the artifact would read other tokens than the model was trained on; "
        "export this model to another format",
    )


def _search(source: TokenizerSource, corpus: Sequence[str]) -> dict[str, str]:
    """Return the ``name`` that agrees, or in words the ``difference`` of the closest."""
    if source.kind != "gpt2":
        # What llama.cpp takes for a vocabulary without cuts, whatever it is told.
        tried = [["gemma4" if source.kind == "gemma4" else "default"]]
    else:
        names = dict.fromkeys([*_candidates(source), *PRE_TOKENIZERS, *_SEARCHED_ONLY])
        likeliest, *others = names
        tried = [[likeliest], others]
    closest: _Difference | None = None
    with scratch.directory("pre") as directory:
        trial = _Trial.prepare(source, corpus, directory)
        for names_now in tried:
            for name, difference in trial.run(names_now):
                if difference is None:
                    return {"name": name}
                if closest is None or difference.texts < closest.texts:
                    closest = difference
    if closest is None or source.kind != "gpt2":
        return {"difference": str(closest or "")}
    return {"difference": f"of its pre-tokenizers {closest.name!r} is the closest, where {closest}"}


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """One vocabulary file and what its tokenizer makes of the corpus."""

    gguf: Path
    texts: list[str]
    expected: list[list[int]]
    tolerated: list[list[list[int]]]  # of each text: with another space in front of it

    @classmethod
    def prepare(cls, source: TokenizerSource, corpus: Sequence[str], directory: Path) -> "_Trial":
        reference = open_tokenizer(source.path, refusal=UsageError)
        # llama.cpp does not compose characters; where the checkpoint does, what it would see.
        composes = _composes(source)
        prompts = source.files.prompts()
        texts = [
            unicodedata.normalize("NFC", text) if composes else text for text in (*corpus, *prompts)
        ]
        encodings = reference.encode_batch(texts, add_special_tokens=False)
        tolerated = spaces.with_and_without(source.path, texts[: len(corpus)])
        if vocabulary.spaces(source).opens_template:
            texts[len(corpus) :] = [f" {prompt}" for prompt in texts[len(corpus) :]]
        tokens = 1 + max(source.all_ids.values(), default=0)
        path = directory / "vocabulary.gguf"
        keys = vocabulary_of(source, vocabulary_tokens=tokens, pre=None)
        write_vocabulary(
            path, {"general.name": ("string", vocabulary.name_of(source, "trial")), **keys}
        )
        return cls(
            gguf=path,
            texts=texts,
            expected=[encoding.ids for encoding in encodings],
            tolerated=[*tolerated, *([] for _ in prompts)],
        )

    def run(self, names: Sequence[str]) -> Iterator[tuple[str, _Difference | None]]:
        """Yield what each name that loads makes of the texts; a child that dies is replaced."""
        left = list(names)
        while left:
            answers = self._answers(left)
            for answer in answers:
                if "ids" in answer:
                    yield answer["name"], self._compare(answer["name"], answer["ids"])
            # The one after the last answer killed the child, if any is left.
            left = left[len(answers) + 1 :]

    def _answers(self, names: Sequence[str]) -> list[dict[str, Any]]:
        request = {"gguf": str(self.gguf), "names": list(names), "texts": self.texts}
        command = [sys.executable, "-P", "-m", "edgekit.formats.gguf.tokenizer_probe"]
        try:
            child = subprocess.run(
                command,
                input=json.dumps(request).encode(),
                capture_output=True,
                env=environment(),
                timeout=_SEARCH_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            return _whole_lines(error.stdout or b"")
        if child.returncode > 0:  # not by a signal: nothing a next child would do better
            raise ToolchainError(
                f"the tokenizer probe exited with {child.returncode}",
                log=child.stderr.decode(errors="replace")[-2000:],
            )
        return _whole_lines(child.stdout)

    def _compare(self, name: str, found: Sequence[list[int]]) -> _Difference | None:
        differing = [
            i
            for i, ids in enumerate(found)
            if ids != self.expected[i] and ids not in self.tolerated[i]
        ]
        if not differing:
            return None
        first = differing[0]
        return _Difference(
            name=name,
            texts=len(differing),
            text=self.texts[first],
            expected=self.expected[first],
            found=found[first],
        )


def _whole_lines(output: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output[: output.rfind(b"\n") + 1].splitlines()]


def _composes(source: TokenizerSource) -> bool:
    return any(step.get("type") == "NFC" for step in source.steps("normalizer"))


def write_vocabulary(path: Path, metadata: Mapping[str, Value]) -> None:
    """Write a GGUF file that holds a tokenizer and no tensor, for llama.cpp's ``vocab_only``."""
    # An architecture is required; without tensors any will do.
    header = encode_header({"general.architecture": ("string", "llama"), **metadata}, [])
    path.write_bytes(header)
