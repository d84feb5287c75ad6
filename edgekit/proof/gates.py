"""Gates: a finished artifact, in its real runtime, must say what the checkpoint says.

Eight gates; an export fails unless all hold. The checkpoint's word comes from
`transformers_logits` (float32), the artifact's from the runtime that devices use.
"""

import math
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from operator import ne
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from edgekit import formats
from edgekit.bundle.goldens import ChatGolden, Goldens, LogitGolden, TextGolden
from edgekit.bundle.manifest import Agreement, Gate
from edgekit.errors import UsageError
from edgekit.formats import Layout, ReadableRunning, Running
from edgekit.model.tokenizer_files import added_tokens
from edgekit.progress import Listener, Silent
from edgekit.proof import interpreter, transformers_logits
from edgekit.proof.fidelity import Comparison, Fidelity
from edgekit.proof.load_probe import probe
from edgekit.quant.recipe import Recipe
from edgekit.runtime.generate import Sampling, generate
from edgekit.runtime.session import Session
from edgekit.source.checkpoint import Checkpoint
from edgekit.text import corpus, spaces
from edgekit.text.rules import TextRules
from edgekit.text.tokenizer import Text


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    # Token ids, the checkpoint's logits after each, and the artifact's.
    Pair: TypeAlias = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.float32]]


CHUNK_TOKENS = 256
LARGE_POSITIONS = 512  # of a model that is computed layer by layer, which takes long
POSITIONS = 2048  # enough that the mean KL of 4-bit weights repeats within a tenth
ANSWER_TOKENS = 24
GOLDENS = 2
GOLDEN_TOKENS = 48
# What half precision in a runtime's cache and attention may add where weights are exact; tiny
# random models lose 5e-6. Quantized ones may lose as much as by their weights again, since a small
# change of an activation changes how it is rounded.
MAX_CACHE_KL_NATS = 1e-3
GREEDY = Sampling()


@dataclass(frozen=True, kw_only=True)
class Subject:
    """An artifact and the checkpoint it was made from."""

    checkpoint: Checkpoint
    directory: Path
    entry: str
    format: str
    recipe: Recipe
    layout: Layout  # what the plan said the artifact would hold
    rules: TextRules
    context_tokens: int

    @property
    def path(self) -> Path:
        """The file the runtime opens."""
        return self.directory / self.entry

    @property
    def running(self) -> Running:
        """What runs artifacts of its format."""
        return formats.running(self.format)

    @property
    def runtime(self) -> str:
        """What opens the artifact, as people call it."""
        return formats.get(self.format).RUNTIME

    @property
    def is_run_here(self) -> bool:
        """Whether its runtime computes the artifact's side of the proof."""
        return self.running.is_run_here(self.layout.variant)

    @property
    def computed_by(self) -> str:
        """What computes the artifact's side of the proof."""
        if self.is_run_here:
            return self.runtime
        needed = cast("ReadableRunning", self.running).runs_on(self.layout.variant)
        return (
            f"edgekit's float32 reference on the weights read back, not {self.runtime}: "
            f"not executed here, it needs {needed}"
        )

    @cached_property
    def text(self) -> Text:
        """The text layer of the bundle."""
        return Text.open(self.directory, self.rules)

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer in transformers."""
        return transformers_logits.tokenizer(self.checkpoint)

    @cached_property
    def conversations(self) -> list[tuple[dict[str, str], ...]]:
        """The conversations that this model's template can say; Gemma's has no system role."""
        return [turns for turns in corpus.CONVERSATIONS if self._can_render(turns)]

    def _can_render(self, turns: Sequence[dict[str, str]]) -> bool:
        if self.text.template is None:
            return False
        try:
            self.text.render(turns)
        except UsageError:
            return False
        return True

    @cached_property
    def fits_in_memory(self) -> bool:
        """Whether transformers can hold the checkpoint; asked once, as free memory changes."""
        return transformers_logits.holds(self.checkpoint)

    @cached_property
    def chunks(self) -> list[list[int]]:
        """Return the corpus as ids, a share of every text, in pieces the context can hold."""
        texts = [self.text.encode(text, adds_bos=self.rules.adds_bos) for _, text in corpus.texts()]
        length = min(CHUNK_TOKENS, self.context_tokens)
        share = max(length, POSITIONS // len(texts))
        if not self.fits_in_memory:
            length = share = min(length, LARGE_POSITIONS // len(texts))
        pieces = [
            ids[first : first + length]
            for ids in texts
            for first in range(0, min(share, len(ids)), length)
        ]
        return [piece for piece in pieces if len(piece) > 1]


@dataclass(frozen=True, kw_only=True)
class Proof:
    """The gates, and what the artifact said, to be asked again on a device."""

    agreement: Agreement
    goldens: Goldens


@dataclass(kw_only=True)
class _Findings:
    gates: list[Gate] = field(default_factory=list)

    def add(self, name: str, finding: str, *, passed: bool) -> None:
        self.gates.append(Gate(name=name, passed=passed, finding=finding))


def check(subject: Subject, *, listener: Listener | None = None) -> Proof:
    """Put an artifact through all gates.

    Returns:
        The proof; whether its gates hold is for the caller to judge.

    Raises:
        BundleError, ToolchainError: If the runtime cannot even open or run the artifact.
    """
    transformers_logits.require()
    listener = listener or Silent()
    found = _Findings()
    if subject.is_run_here:  # a native abort must end a child, not this process and its work
        probe(subject.format, subject.path, context_tokens=subject.context_tokens)
    with closing(_open(subject)) as session:
        prompt, answer = _check_generation(subject, session, found)
        _check_stops(subject, session, prompt, answer, found)
        logit_goldens = _logit_goldens(subject, session)
    expected = transformers_logits.logits(
        subject.checkpoint, subject.chunks, fits_in_memory=subject.fits_in_memory, listener=listener
    )
    first = next(expected)
    with closing(_open(subject, has_exact_cache=True)) as session:
        both = _both(subject, session, chain([first], expected), listener)
        fidelity = _check_logits(subject, both, logit_goldens, found)
    _check_ids(subject, found)
    _check_template(subject, found)
    _check_tensor_types(subject, found)
    _check_size(subject, found)
    _check_adapter(subject, first, found)
    return Proof(
        agreement=_agreement(subject, found, fidelity),
        goldens=_goldens(subject, logit_goldens, prompt, answer),
    )


def _open(subject: Subject, *, has_exact_cache: bool = False) -> Session:
    context = subject.context_tokens
    if has_exact_cache:
        context = min(context, CHUNK_TOKENS)
    if not subject.is_run_here:
        read = cast("ReadableRunning", subject.running).read_back(
            subject.path, subject.checkpoint.spec
        )
        return interpreter.InterpreterSession(read, context_tokens=context)
    return subject.running.load(
        subject.path, context_tokens=context, has_exact_cache=has_exact_cache
    )


def _agreement(subject: Subject, found: _Findings, fidelity: Fidelity) -> Agreement:
    return Agreement(
        gates=tuple(found.gates),
        positions=fidelity.positions,
        mean_kl_nats=fidelity.mean_kl_nats,
        p99_kl_nats=fidelity.p99_kl_nats,
        same_top_token=fidelity.same_top_token,
        perplexity_ratio=fidelity.perplexity_ratio,
        said_by=subject.computed_by,
    )


def _check_generation(
    subject: Subject, session: Session, found: _Findings
) -> tuple[list[int], list[int]]:
    """Gate 1: it loads and generates."""
    prompt = _question(subject)[: subject.context_tokens - 1]
    tokens = list(generate(session, prompt, max_tokens=ANSWER_TOKENS, stop_ids=(), sampling=GREEDY))
    found.add(
        "runs",
        f"{len(tokens)} tokens from {subject.computed_by}: {_shown(subject, tokens)}",
        passed=bool(tokens),
    )
    return prompt, tokens


def _shown(subject: Subject, tokens: list[int]) -> str:
    """Return what a user would see of these tokens, and whether the answer ends with them."""
    ends = [index for index, token in enumerate(tokens) if token in subject.rules.stop_ids]
    said = subject.text.decode(tokens[: ends[0]] if ends else tokens)
    return f"{said!r}, and stops" if ends else f"{said!r} …"


def _question(subject: Subject) -> list[int]:
    if subject.conversations:
        return subject.text.encode_chat(subject.conversations[0])
    return subject.text.encode(corpus.QUESTION)


def _logit_goldens(subject: Subject, session: Session) -> list[LogitGolden]:
    """Return what the artifact says on a device, its cache in half precision and all."""
    chunks = [chunk[:GOLDEN_TOKENS] for chunk in subject.chunks[:GOLDENS]]
    vocabulary = subject.checkpoint.spec.vocab_size
    return [LogitGolden.of(chunk, session.all_logits(chunk)[:, :vocabulary]) for chunk in chunks]


def _check_logits(
    subject: Subject,
    both: Iterator["Pair"],
    goldens: Sequence[LogitGolden],
    found: _Findings,
) -> Fidelity:
    """Gate 3: the logits agree with the checkpoint's, as closely as this recipe can.

    The weights are judged with an exact cache; what the device's own adds is judged by itself.
    """
    comparison, cache_kl_nats = Comparison(), list[float]()
    for index, (chunk, expected, said) in enumerate(both):
        comparison.add(expected, said, chunk)
        if index < len(goldens):
            golden = goldens[index]
            cache_kl_nats.append(golden.mean_kl_nats(said[: len(golden.ids)]))
    fidelity, limits = comparison.result(), subject.recipe
    max_mean_kl_nats = max_logit_kl_nats(limits, subject.layout)
    max_cache_kl_nats = max(limits.max_mean_kl_nats, MAX_CACHE_KL_NATS)
    found.add(
        "logits",
        f"mean KL {fidelity.mean_kl_nats:.2e} nats (<= {max_mean_kl_nats:g}), same top "
        f"token {fidelity.same_top_token:.1%} (>= {limits.min_same_top_token:.0%}) over "
        f"{fidelity.positions} positions; a device's cache adds {max(cache_kl_nats):.0e} nats "
        f"(<= {max_cache_kl_nats:g})",
        passed=fidelity.mean_kl_nats <= max_mean_kl_nats
        and fidelity.same_top_token >= limits.min_same_top_token
        and max(cache_kl_nats) <= max_cache_kl_nats,
    )
    return fidelity


def max_logit_kl_nats(recipe: Recipe, layout: Layout) -> float:
    """Return the mean KL of an artifact at most: its weights' and the runtime's kernels'."""
    return recipe.max_mean_kl_nats + layout.kernel_kl_nats


def _both(
    subject: Subject,
    session: Session,
    expected_logits: Iterator["npt.NDArray[np.float32]"],
    listener: Listener,
) -> Iterator["Pair"]:
    """Yield ids, the checkpoint's logits and the artifact's, chunk by chunk."""
    import numpy as np

    chunks = subject.chunks
    with listener.track("prove", sum(map(len, chunks))) as advance:
        for chunk, expected in zip(chunks, expected_logits, strict=True):
            said = session.all_logits(chunk)[:, : subject.checkpoint.spec.vocab_size]
            yield np.array(chunk), expected, said
            advance(len(chunk))


def _check_ids(subject: Subject, found: _Findings) -> None:
    """Gate 4: every tokenizer that will read text makes the ids that tokenizer.json stands for.

    transformers rebuilds some tokenizers; where its own reading is another, it is counted.
    """
    prompts = subject.checkpoint.text.prompts()
    lines = [*corpus.lines(), *prompts]
    expected = transformers_logits.file_ids(subject.checkpoint, lines)
    rebuilt = [transformers_logits.ids(subject.tokenizer, line) for line in lines]
    ours = [subject.text.encode(line, adds_bos=False) for line in lines]
    sent = [*corpus.lines(), *_prompts_of_the_artifact(subject)]
    theirs = subject.running.runtime_ids(subject.path, sent)
    readers, finding = "edgekit run", ""
    wrong = _first_difference(lines, expected, ours)
    if theirs is not None and wrong is None:
        readers += " and the runtime's own tokenizer"
        uncomposed = _uncomposed(subject, lines, expected, theirs)
        spaced = _spaced(subject, corpus.lines(), expected, theirs)
        accepted = [
            expected[i] if i in {*uncomposed, *spaced} else ids for i, ids in enumerate(theirs)
        ]
        wrong = _first_difference(lines, expected, accepted)
        if uncomposed:
            finding += (
                f"; for the runtime's own, {len(uncomposed)} of them need composing (NFC) first, "
                "which edgekit run does"
            )
        if spaced:
            finding += (
                f"; the runtime's own puts another space in front of {len(spaced)} of them, "
                "none of them a chat prompt"
            )
    wrong = wrong or _adapter_difference(subject)
    if wrong is None:
        finding = f"{len(lines)} lines give the checkpoint's ids in {readers}{finding}"
        differing = sum(map(ne, rebuilt, expected))
        if differing:
            finding += f"; AutoTokenizer reads {differing} of them otherwise than tokenizer.json"
    else:
        finding = f"{readers.rpartition(' and ')[2]}: {wrong}"
    found.add("token ids", finding, passed=wrong is None)


def _prompts_of_the_artifact(subject: Subject) -> tuple[str, ...]:
    """Return the prompts as a program writes them that reads nothing but the artifact."""
    text, own = subject.checkpoint.text, subject.running.own_template(subject.path)
    return (text if own is None else replace(text, chat_template=own)).prompts()


def _spaced(
    subject: Subject,
    lines: Sequence[str],
    expected: Sequence[list[int]],
    theirs: Sequence[list[int]],
) -> list[int]:
    """Return which lines the runtime reads with one space more or less in front of them."""
    both = spaces.with_and_without(subject.checkpoint.text.tokenizer_json, lines)
    return [i for i in range(len(lines)) if theirs[i] != expected[i] and theirs[i] in both[i]]


def _adapter_difference(subject: Subject) -> str | None:
    """Return where a token that the adapter brought becomes other ids than it was trained as."""
    theirs = transformers_logits.adapter_tokenizer(subject.checkpoint)
    if theirs is None:
        return None
    known = added_tokens(subject.checkpoint.directory / "tokenizer.json")
    # Without text between, as transformers rebuilds some tokenizers' rules for it.
    lines = [f"{it}{it}" for it in theirs.get_added_vocab() if it not in known]
    expected = [transformers_logits.ids(theirs, line) for line in lines]
    found = [subject.text.encode(line, adds_bos=False) for line in lines]
    runtimes = subject.running.runtime_ids(subject.path, lines) if lines else None
    both = [found, *([] if runtimes is None else [runtimes])]
    return next(filter(None, (_first_difference(lines, expected, ids) for ids in both)), None)


def _uncomposed(
    subject: Subject,
    lines: Sequence[str],
    expected: Sequence[list[int]],
    theirs: Sequence[list[int]],
) -> list[int]:
    """Return which lines the runtime reads as the checkpoint does once their letters are composed.

    Only where the checkpoint's tokenizer itself composes: to it both forms are the same text.
    """
    composed = [unicodedata.normalize("NFC", line) for line in lines]
    said = transformers_logits.file_ids(subject.checkpoint, composed)
    candidates = [
        index
        for index, line in enumerate(lines)
        if theirs[index] != expected[index]
        and composed[index] != line
        and said[index] == expected[index]
    ]
    if not candidates:
        return []
    texts = [composed[index] for index in candidates]
    again = subject.running.runtime_ids(subject.path, texts) or []
    return [index for index, ids in zip(candidates, again, strict=True) if ids == expected[index]]


def _first_difference(
    lines: Sequence[str], expected: Sequence[list[int]], ids: Sequence[list[int]]
) -> str | None:
    for line, wanted, got in zip(lines, expected, ids, strict=True):
        if wanted != got:
            at = next(
                (i for i, pair in enumerate(zip(wanted, got, strict=False)) if pair[0] != pair[1]),
                min(len(wanted), len(got)),
            )
            return (
                f"{line!r} becomes {got[at : at + 4]} at token {at}, the checkpoint's tokenizer "
                f"says {wanted[at : at + 4]}"
            )
    return None


def _check_template(subject: Subject, found: _Findings) -> None:
    """Gate 5: a conversation becomes the same bytes as in transformers."""
    files = subject.checkpoint.text
    template, call = files.template_source, files.template_call
    if template is None:
        found.add("chat template", "the checkpoint has none", passed=True)
        return
    for turns in subject.conversations:
        expected = transformers_logits.rendered(
            subject.tokenizer, turns, template=template, call=call
        )
        if subject.text.render(turns) != expected:
            found.add("chat template", f"renders otherwise than {expected!r}", passed=False)
            return
    found.add(
        "chat template",
        f"{len(subject.conversations)} conversations render to the same bytes",
        passed=bool(subject.conversations),
    )


def _check_stops(
    subject: Subject, session: Session, prompt: list[int], answer: list[int], found: _Findings
) -> None:
    """Gate 2: every file agrees on where an answer ends, and generation ends there."""
    by_file = subject.checkpoint.text.stop_ids_by_file
    declared = {id for ids in by_file.values() for id in ids}
    told = ", ".join(f"{name} {list(ids)}" for name, ids in by_file.items() if ids)
    last = answer[-1]
    before = answer[: answer.index(last)]
    session.reset()
    again = list(
        generate(session, prompt, max_tokens=len(answer), stop_ids=(last,), sampling=GREEDY)
    )
    found.add(
        "stops",
        f"at {list(subject.rules.stop_ids)} ({told}); a generation ends at the id it is told",
        passed=bool(declared) and set(subject.rules.stop_ids) == declared and again == before,
    )


def _check_tensor_types(subject: Subject, found: _Findings) -> None:
    """Gate 6: every tensor is stored as the plan said."""
    contents = subject.running.contents(subject.path)
    held = Counter((math.prod(shape), tensor_type) for _, shape, tensor_type in contents)
    planned = Counter((p.parameters, p.tensor_type) for p in subject.layout.placements)
    counts = Counter(tensor_type for _, _, tensor_type in contents)
    finding = ", ".join(f"{count} {tensor_type}" for tensor_type, count in sorted(counts.items()))
    if subject.layout.substituted:
        finding += f"; {len(subject.layout.substituted)} substituted"
    for (weights, tensor_type), count in sorted((planned - held).items()):
        finding += f"; planned {count} more of {weights} weights in {tensor_type}"
    found.add("tensor types", finding, passed=planned <= held)


def _check_size(subject: Subject, found: _Findings) -> None:
    """Gate 7: the bytes on disk are the bytes predicted."""
    files = subject.running.files(subject.path)
    size, predicted = sum(file.stat().st_size for file in files), subject.layout.artifact_bytes
    # The name under which llama.cpp cuts text is found by trial, and may lengthen the header.
    allowed = 64 if subject.layout.is_exact else predicted // 100
    found.add(
        "size",
        f"{size} bytes, predicted {predicted}",
        passed=abs(size - predicted) <= allowed,
    )


def _check_adapter(
    subject: Subject, side_by_side: "npt.NDArray[np.float32]", found: _Findings
) -> None:
    """Gate 8: base and adapter, side by side, say what the merged weights say.

    ``side_by_side`` is what they said to the first chunk.
    """
    adapter = subject.checkpoint.adapter
    if adapter is None:
        return
    import numpy as np

    if not subject.fits_in_memory:
        found.add(
            "adapter",
            f"{adapter.name} merged; the base is too large here to run with the adapter next to "
            "it, so only the artifact was compared with the merged weights",
            passed=True,
        )
        return
    merged = next(interpreter.logits(subject.checkpoint, subject.chunks[:1]))
    difference = float(np.abs(side_by_side - merged).max())
    scale = float(np.abs(side_by_side).max())
    limit = 1e-4 * max(1.0, scale)
    found.add(
        "adapter",
        f"{adapter.name} merged: logits within {difference:.1e} of base + adapter (<= {limit:.1e})",
        passed=difference <= limit,
    )


def _goldens(
    subject: Subject, logits: list[LogitGolden], prompt: list[int], answer: list[int]
) -> Goldens:
    text = subject.text
    return Goldens(
        texts=tuple(
            TextGolden(text=line, ids=tuple(text.encode(line, adds_bos=False)))
            for line in corpus.lines()
        ),
        chats=tuple(
            ChatGolden(
                messages=turns, rendered=text.render(turns), ids=tuple(text.encode_chat(turns))
            )
            for turns in subject.conversations
            if not text.writes_today(turns)  # a device would find it otherwise tomorrow
        ),
        logits=tuple(logits),
        answer_prompt_ids=tuple(prompt),
        answer_ids=tuple(answer),
    )
