"""What an app developer needs besides the program: lines that load it, and prompts to check with.

Names as in the ExecuTorch of `edgekit.versions`: ``LlmModule.kt``, ``LlmGenerationConfig.kt`` and
``LlmCallback.kt`` in extension/android, ``ExecuTorchLLMTextRunner.h`` and
``ExecuTorchLLMConfig.h`` in extension/llm/apple. Neither language is compiled where edgekit is
tested.
"""

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit import versions
from edgekit.errors import MissingDependencyError, UsageError
from edgekit.formats.executorch import backends, tokenizer
from edgekit.formats.executorch.backends import Backend, Build
from edgekit.formats.executorch.tokenizer import Preparation
from edgekit.text import corpus
from edgekit.text.tokenizer import Text
from edgekit.text.tokenizer_json import read as read_tokenizer


if TYPE_CHECKING:
    from edgekit.model.checkpoint_protocol import CheckpointProtocol
    from edgekit.model.tokenizer_files import TokenizerFiles


README = "README.md"
PROMPTS = "prompts.json"
_MARK = "edgekit message mark"
PLAIN_TEXTS = ("The lighthouse keeper", " a leading space, café and cafe\u0301", "1 + 1 =")


@dataclass(frozen=True, kw_only=True)
class AppKit:
    """How an app talks to one model."""

    entry: str
    text: Text
    prepare: Preparation
    context_tokens: int
    call_tokens: int  # what one call of the program reads at most
    variant: str
    has_runner_copy: bool
    stop_texts: tuple[str, ...]

    @property
    def backend(self) -> Backend:
        """Who computes it."""
        return backends.of(self.variant)

    @property
    def build(self) -> Build:
        """What it needs of an app."""
        return self.backend.builds[self.variant]


def write(
    checkpoint: "CheckpointProtocol",
    directory: Path,
    entry: str,
    *,
    context_tokens: int,
    variant: str,
) -> None:
    """Write what apps need besides the program ``entry``.

    ``README.md``, ``prompts.json`` and, where it reads as the checkpoint's tokenizer does,
    ``runner_tokenizer.json``.
    """
    text, copy = checkpoint.text.loaded(), _runner_copy(checkpoint.text)
    constants = backends.of(variant).writing.constants(
        checkpoint.spec, variant, context_tokens=context_tokens
    )
    if copy is not None:
        (directory / tokenizer.RUNNER_COPY).write_bytes(copy)
    app_kit = AppKit(
        entry=entry,
        text=text,
        prepare=_preparation(checkpoint.text),
        context_tokens=context_tokens,
        call_tokens=constants.get("get_max_seq_len", context_tokens),
        variant=variant,
        has_runner_copy=copy is not None,
        stop_texts=tuple(filter(None, map(text.tokenizer.id_to_token, text.rules.stop_ids))),
    )
    _write_json(directory / PROMPTS, prompts(app_kit))
    (directory / README).write_text(readme(app_kit), encoding="utf-8")


def note(checkpoint: "CheckpointProtocol") -> str | None:
    """Return what a developer must know of the model's text, None if a phone's runner just works.

    None too where ExecuTorch's tokenizer is not installed, so that a plan needs none.
    """
    with suppress(MissingDependencyError):
        if _runner_copy(checkpoint.text) is None:
            return tokenizer.NOTE
        prepare = _preparation(checkpoint.text)
        if prepare.composes or prepare.swallowing:
            return f"apps must prepare prompts for ExecuTorch's own tokenizer, as {README} shows"
    return None


@functools.cache
def _runner_copy(files: "TokenizerFiles") -> bytes | None:
    rendered = [rendered for _, rendered in _rendered(files.loaded())]
    return tokenizer.runner_copy(files.tokenizer_json, rendered)


@functools.cache
def _preparation(files: "TokenizerFiles") -> Preparation:
    return Preparation.of(read_tokenizer(files.tokenizer_json))


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def prompts(app_kit: AppKit) -> dict[str, Any]:
    """Return conversations, each as the prompt a runner gets and as the ids it must become."""
    text, found = app_kit.text, []
    for messages, rendered in _rendered(text):
        said = {"messages": list(messages)} if messages else {}
        ids = text.encode(rendered, adds_bos=False)
        found.append({**said, "prompt": app_kit.prepare(rendered), "ids": ids})
    return {
        "context_tokens": app_kit.context_tokens,
        "stop_ids": list(text.rules.stop_ids),
        "stop_texts": list(app_kit.stop_texts),
        "stop_strings": list(text.rules.stop_strings),
        "prompts": found,
    }


def _rendered(text: Text) -> Iterator[tuple[Sequence[Mapping[str, str]], str]]:
    """Yield what the model can be asked, as its template writes it; Gemma's has no system role."""
    if text.template is None:
        yield from (((), _bos(text) + plain) for plain in PLAIN_TEXTS)
        return
    for messages in corpus.CONVERSATIONS:
        with suppress(UsageError):
            yield messages, text.render(messages)


def _bos(text: Text) -> str:
    return text.rules.special_tokens["bos_token"] if text.rules.adds_bos else ""


def readme(app_kit: AppKit) -> str:
    """Return the text of the README."""
    return "\n".join([_head(app_kit), _prompt_format(app_kit), *_clients(app_kit), _tail(app_kit)])


def _clients(app_kit: AppKit) -> Iterator[str]:
    """Yield the lines for each kind of phone that runs the program."""
    if not app_kit.has_runner_copy:
        yield _ids_only()
        return
    if app_kit.build.android:
        yield _kotlin(app_kit, libraries=app_kit.build.android)
    if app_kit.build.ios:
        yield _swift(app_kit, products=app_kit.build.ios)


def _head(app_kit: AppKit) -> str:
    device = app_kit.backend.device
    here = f"needs {device}" if device else "On a computer or a Raspberry Pi, `edgekit run`"
    return f"""\
# {app_kit.entry} in an app

| | |
|---|---|
| program | `{app_kit.entry}`, variant {app_kit.variant} ({app_kit.build.kind}) |
| context | {app_kit.context_tokens} tokens, prompt and answer together |
| an answer ends at | {_spelt_stops(app_kit)} |{_thoughts_row(app_kit)}
| to check an app with | `{PROMPTS}`: prompts, and the ids they must become |

{f"It {here}." if device else f"{here} this directory."}
{_limit_note(app_kit)}"""


def _limit_note(app_kit: AppKit) -> str:
    """Return what an app must set where a call reads less than the context: runners err there."""
    if app_kit.call_tokens >= app_kit.context_tokens:
        return ""
    return f"""
A call of the program reads {app_kit.call_tokens} tokens at most. ExecuTorch's text runners take
that for a cache that overwrites itself, count no token of the prompt, and let an answer outgrow the
context, where the program fails. So tell them the largest number of new tokens, as the lines below
do: no more than {app_kit.context_tokens} less the tokens of the prompt, and of the turns before it.
"""


def _new_tokens(app_kit: AppKit) -> int | None:
    """Return a number of new tokens that leaves as much for the prompt, where one is needed."""
    is_needed = app_kit.call_tokens < app_kit.context_tokens
    return max(1, app_kit.context_tokens // 2) if is_needed else None


def _thoughts_row(app_kit: AppKit) -> str:
    marks = app_kit.text.rules.thoughts
    if marks is None or not (marks.opens + marks.closes).isprintable():
        return ""
    opens, closes = (
        mark.replace("|", "\\|").replace("`", "'") for mark in (marks.opens, marks.closes)
    )
    return (
        f"\n| before an answer | what the model thinks, if it does, between `{opens}` and "
        f"`{closes}`: not part of it |"
    )


def _spelt_stops(app_kit: AppKit) -> str:
    rules = app_kit.text.rules
    ids = ", ".join(map(str, rules.stop_ids))
    spelt = f"token {ids}: " + ", ".join(f"`{text}`" for text in app_kit.stop_texts)
    if not rules.stop_strings:
        return spelt
    strings = ", ".join(f"`{json.dumps(text, ensure_ascii=False)}`" for text in rules.stop_strings)
    return f"{spelt}; and before the text {strings}, which the app must look for"


def _prompt_format(app_kit: AppKit) -> str:
    if app_kit.text.template is None:
        return "## Prompt\n\nThe model has no chat template: it continues text.\n"
    prompt = "".join(_around(app_kit.text))
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", prompt)), default=0))
    return f"""\
## Prompt

The runners know no chat template: an app writes the prompt. One message in it:

{fence}
{prompt}
{fence}

{_dated(app_kit.text)}More turns, and a system message if the model takes one, are in `{PROMPTS}`.
"""


def _dated(text: Text) -> str:
    if not text.writes_today([{"role": "user", "content": _MARK}]):
        return ""
    return "The template writes the day's date: here it is that of the export.\n\n"


def _around(text: Text) -> tuple[str, str, str]:
    """Return what the template puts before one message, a stand-in, and what it puts after."""
    if text.template is None:
        return _bos(text), "MESSAGE", ""
    rendered = text.render([{"role": "user", "content": _MARK}])
    before, _, after = rendered.partition(_MARK)
    return before, "MESSAGE", after


def _trims(text: Text) -> bool:
    """Tell whether the template takes the whitespace around a message away."""
    spaced = f" {_MARK} "
    return text.template is not None and spaced not in text.render(
        [{"role": "user", "content": spaced}]
    )


def _kotlin(app_kit: AppKit, *, libraries: str) -> str:
    before, _, after = _around(app_kit.text)
    message = "message.trim()" if _trims(app_kit.text) else "message"
    changes = _kotlin_preparation(app_kit.prepare)
    limit = f".maxNewTokens({count})" if (count := _new_tokens(app_kit)) else ""
    return f"""\
## Android, Kotlin

{libraries}

```kotlin
import org.pytorch.executorch.extension.llm.LlmCallback
import org.pytorch.executorch.extension.llm.LlmGenerationConfig
import org.pytorch.executorch.extension.llm.LlmModule

// directory: where the app has put the files of this bundle
val module = LlmModule(
    "$directory/{app_kit.entry}", "$directory/{tokenizer.RUNNER_COPY}", 0.0f)
module.load()

{"var" if changes else "val"} prompt =
    {_kotlin_string(before)} +
    {message} + {_kotlin_string(after)}
{changes}val config = LlmGenerationConfig.create()
    .seqLen({app_kit.context_tokens}){limit}.temperature(0.0f).echo(false).numBos(0).numEos(0).build()
val stops = setOf({", ".join(map(_kotlin_string, app_kit.stop_texts))})
module.resetContext()  // begin again; without it the prompt goes on after the last answer
module.generate(prompt, config, object : LlmCallback {{
    override fun onResult(result: String) {{
        if (result !in stops) print(result)  // the token that ends an answer is passed on as well
    }}
}})
```
"""


def _kotlin_string(text: str) -> str:
    return _literal(text, "\\u{:04x}").replace("$", "\\$")


def _literal(text: str, control: str) -> str:
    """Return a string literal of Kotlin or Swift, which differ in how a control character looks."""
    letters = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return '"' + "".join(
        letters.get(letter) or (letter if letter >= " " else control.format(ord(letter)))
        for letter in text
    ) + '"'  # fmt: skip


def _kotlin_preparation(prepare: Preparation) -> str:
    lines = []
    if prepare.composes:
        form = "java.text.Normalizer.Form.NFC"
        lines.append(f"prompt = java.text.Normalizer.normalize(prompt, {form})")
    if prepare.swallowing:
        lines.append(
            f'prompt = prompt.replace(Regex({_kotlin_string(_swallowed(prepare))}), "\\$1")'
        )
    return "".join(f"{line}\n" for line in lines)


def _swallowed(prepare: Preparation) -> str:
    """Return the pattern of a token and the whitespace it takes away, for ICU and java.util."""
    tokens = "|".join(_escaped(token) for token in prepare.swallowing)
    return f"({tokens}){tokenizer.WHITESPACE}+"


def _escaped(token: str) -> str:
    return "".join(f"\\{letter}" if letter in "\\^$.|?*+()[]{}" else letter for letter in token)


def _swift(app_kit: AppKit, *, products: Sequence[str]) -> str:
    before, _, after = _around(app_kit.text)
    trims = ".trimmingCharacters(in: .whitespacesAndNewlines)" if _trims(app_kit.text) else ""
    changes = _swift_preparation(app_kit.prepare)
    limit = f"  $0.maximumNewTokens = {count}\n" if (count := _new_tokens(app_kit)) else ""
    return f"""\
## iOS, Swift

Link the products {", ".join(f"`{name}`" for name in products)} of ExecuTorch's Swift package, with
`-all_load` or `-force_load`, as they register themselves.

```swift
import ExecuTorchLLM

// directory: where the app has put the files of this bundle
let runner = TextRunner(
  modelPath: directory + "/{app_kit.entry}",
  tokenizerPath: directory + "/{tokenizer.RUNNER_COPY}")
try runner.load()

{"var" if changes else "let"} prompt =
  {_swift_string(before)} +
  message{trims} + {_swift_string(after)}
{changes}let stops: Set = [{_swift_strings(app_kit.stop_texts)}]
runner.reset()  // begin again; without it the prompt goes on after the last answer
try runner.generate(prompt, Config {{
  $0.sequenceLength = {app_kit.context_tokens}
{limit}  $0.temperature = 0
  $0.isEchoEnabled = false
  $0.bosCount = 0
  $0.eosCount = 0
}}) {{ token in
  if !stops.contains(token) {{ print(token, terminator: "") }}
}}
```
"""


def _swift_string(text: str) -> str:
    return _literal(text, "\\u{{{:x}}}")


def _swift_strings(texts: Sequence[str]) -> str:
    return ", ".join(map(_swift_string, texts))


def _swift_preparation(prepare: Preparation) -> str:
    lines = []
    if prepare.composes:
        lines.append("prompt = prompt.precomposedStringWithCanonicalMapping")
    if prepare.swallowing:
        lines.append(
            f"prompt = prompt.replacingOccurrences(\n  of: {_swift_string(_swallowed(prepare))}, "
            'with: "$1", options: .regularExpression)'
        )
    return "".join(f"{line}\n" for line in lines)


def _ids_only() -> str:
    return f"""\
## No text in, ids only

The tokenizer inside ExecuTorch's runners does not read this model's `tokenizer.json` as its makers
do, so `LlmModule` and `TextRunner` would send it other tokens. Make the ids with a Hugging Face
tokenizer from `tokenizer.json`, check them with `{PROMPTS}`, and call the program's `forward`
yourself: tokens int64 [1, S], then their positions int64 [S]; the logits of the last one come back.
"""


def _tail(app_kit: AppKit) -> str:
    return f"""\
## What was tested

{_what_ran(app_kit.backend)} The lines above were not compiled there: their names are those of
ExecuTorch {versions.EXECUTORCH}, whose LLM interfaces call themselves experimental. Prompts that
`{PROMPTS}` lists became these ids in the C++ tokenizer of the runners:
{"yes" if app_kit.has_runner_copy else "no"}.
"""


def _what_ran(backend: Backend) -> str:
    if backend.device is None:
        return (
            "The program was run by ExecuTorch's C++ runtime where it was exported, and\n"
            "`manifest.json` has what it was held against."
        )
    return (
        f"The program was **not executed** where it was exported: that needs {backend.device}.\n"
        "Its weights were read back from it, and `manifest.json` has what they were held against."
    )
