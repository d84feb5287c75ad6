"""Measure a bundle in a browser: one fresh browser for each repetition.

``python -m edgekit.measuring.in_browser BUNDLE …`` takes what `edgekit.measuring.measure`
takes, and options. What is timed is timed in the page; memory is that of all the browser's
processes, from outside.
"""

import argparse
import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from edgekit import formats
from edgekit.browser.chromium import Browser
from edgekit.browser.devtools import KilledError
from edgekit.browser.options import BrowserOptions, Limits
from edgekit.browser.session import BrowserSession, Page, Timed
from edgekit.bundle.goldens import Goldens, LogitGolden
from edgekit.bundle.manifest import Bundle
from edgekit.encodings.json_files import parse
from edgekit.errors import BundleError, ToolchainError
from edgekit.measuring import measure
from edgekit.measuring.machine import Machine, Watch, forget
from edgekit.measuring.measurement import (
    Answers,
    BrowserEnvironment,
    BrowserRun,
    ColdStart,
    Environment,
    Generation,
    MemoryMetric,
    Repetition,
    Workload,
    read_fields,
)
from edgekit.runtime.child import KILLED
from edgekit.text import corpus
from edgekit.text.tokenizer import Text


if TYPE_CHECKING:
    from edgekit.runtime.session import Logits

_LOOK_S = 0.25  # between two looks at a tree of processes, which take milliseconds each
_GOLDEN_TOKENS = 40  # of a text; runtimes that read them one by one take up to a second for each
_GOLDEN_ANSWER_TOKENS = 8
_ORPHAN_S = 1.0  # between two looks whether the parent is still there
_SHIFTS = 64  # places of a text at which a prompt is tried to begin


@dataclass(frozen=True, kw_only=True)
class BrowserMachine(Machine):
    """This machine, where memory and threads are those of a browser."""

    browser: Browser

    def memory_bytes(self) -> tuple[int, int] | None:
        """Return what all of its processes hold, and what of that only they can free."""
        held = self.browser.held()
        return None if held is None else (held.pss_bytes, held.unreclaimable_bytes)

    def thread_times_ns(self) -> dict[str, tuple[int, int]]:
        """Return nothing: the browser's own threads wait for each other by design."""
        return {}


class BrowserWatch(Watch):
    """Looks at a browser while it works."""

    def peaks_bytes(self) -> dict[MemoryMetric, int]:
        """Return the most that the tree of processes was seen to hold."""
        points = self.points
        if not points:
            return {}
        return {
            "process_tree_pss": max(point.resident_bytes for point in points),
            "unreclaimable": max(point.unreclaimable_bytes for point in points),
        }


def repeat(directory: Path, workload: Workload, options: BrowserOptions) -> Repetition:
    """Start a browser, load a bundle, warm up and time the workload, once."""
    started = time.perf_counter()
    bundle = Bundle.load(directory, check_hashes=False)
    cached = measure.cached_share_of(bundle)
    with (
        _Watching(started) as watching,
        _open(bundle, workload, options, on_start=watching.begin) as session,
    ):
        warm_up = _warm_up(session, workload)
        watching.watch.begin()
        generations = tuple(
            _generation(session.generate(_prompt(session, length), workload.answer_tokens), length)
            for length in workload.prompt_lengths_tokens
            for _ in range(workload.generations)
        )
        watch = watching.end()
        return Repetition(
            load_s=session.loaded.load_s,
            cached_before_load=cached,
            warm_up=warm_up,
            generations=generations,
            memory_peaks_bytes=watch.peaks_bytes(),
            memory_over_time=watch.points,
            conditions=watch.conditions,
            browser=_run_of(session),
        )


class _Watching:
    """Looks at the browser that was started last, from before it opens a model."""

    def __init__(self, started: float) -> None:
        self._started = started
        self._stack = ExitStack()

    def begin(self, browser: Browser) -> None:
        """Watch this one, and no other any more."""
        self._stack.close()
        machine = BrowserMachine(browser=browser)
        watch = BrowserWatch(machine, started=self._started, interval_s=_LOOK_S)
        self.watch = self._stack.enter_context(watch)

    def end(self) -> BrowserWatch:
        """Stop looking, while the browser is still there."""
        self._stack.close()
        return self.watch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def start_cold(directory: Path, workload: Workload, options: BrowserOptions) -> ColdStart:
    """Load a bundle that the kernel was asked to forget, wait for a token, and ask the goldens."""
    bundle = Bundle.load(directory, check_hashes=False)
    for name in bundle.artifact.files:
        forget(bundle.directory / name)
    cached = measure.cached_share_of(bundle)
    with _open(bundle, workload, options) as session:
        first = _warm_up(session, workload)
        return ColdStart(
            load_s=session.loaded.load_s,
            first_token_s=first.first_token_s,
            prompt_tokens=first.prompt_tokens,
            cached_before_load=cached,
            answers=_answers(bundle, session),
        )


def describe(directory: Path, options: BrowserOptions) -> Environment:
    """Start a browser, and say what it and this machine are."""
    bundle = Bundle.load(directory, check_hashes=False)
    browsing = formats.browsing(bundle.artifact.format)
    request = browsing.request(bundle.artifact_path, context_tokens=bundle.context_tokens)
    with Page.open(bundle.artifact_path, browsing, request, options) as page:
        found = Machine().environment(())
        return dataclasses.replace(
            found,
            system=f"{page.agent} on {found.system}",
            versions={**found.versions, **{p.name: p.version for p in browsing.PACKAGES}},
            browser=BrowserEnvironment(
                agent=page.agent,
                runtime=page.runtime,
                gpu=None if options.backend == "wasm" else page.gpu,
                features_needed=request.features,
                buffer_needed=request.largest_buffer,
            ),
        )


def _open(
    bundle: Bundle,
    workload: Workload,
    options: BrowserOptions,
    *,
    on_start: Callable[[Browser], object] | None = None,
) -> BrowserSession:
    return BrowserSession.open(
        bundle.artifact_path, bundle.artifact.format, options,
        text=Text.open(bundle.directory, bundle.text),
        context_tokens=workload.context_tokens, threads=workload.threads, on_start=on_start,
    )  # fmt: skip


def _warm_up(session: BrowserSession, workload: Workload) -> Generation:
    length = min(workload.prompt_lengths_tokens)
    count = min(measure.WARM_UP_TOKENS, workload.answer_tokens)
    return _generation(session.generate(_prompt(session, length), count), length)


def _prompt(session: BrowserSession, length: int) -> list[int]:
    """Return a prompt of that length; of real text where the runtime makes the ids itself."""
    if not session.loaded.reads_text:
        return measure.prompt_ids(session.vocabulary_tokens, length)
    lines = [line for line in corpus.lines() if line.isascii()]
    ids = session.text.encode("\n".join(lines), parses_special=False, adds_bos=False)
    while len(ids) < length + _SHIFTS:
        ids += ids
    bos = session.text.encode("")  # what the runtime puts before every text
    tries = ([*bos, *ids[first : first + length - len(bos)]] for first in range(_SHIFTS))
    found = next((each for each in tries if session.can_read(each)), None)
    if found is None:
        raise ToolchainError(f"no text was found that is {length} tokens to {session.page.runtime}")
    return found


def _generation(timed: Timed, prompt_tokens: int) -> Generation:
    return Generation(
        prompt_tokens=prompt_tokens, first_token_s=timed.first_token_s, decode_s=timed.decode_s
    )


def _run_of(session: BrowserSession) -> BrowserRun:
    return BrowserRun(
        backend=session.backend,
        gpu_submits=session.page.submits(),
        threads=session.loaded.threads,
        fell_back=session.fell_back(),
        note=session.note,
    )


def _answers(bundle: Bundle, session: BrowserSession) -> Answers | None:
    """Return what the model says where the goldens say what was proven."""
    try:
        goldens = Goldens.load(bundle.directory)
    except BundleError:  # exported without proof
        return None
    compared = [_compare(_shortened(golden), session) for golden in goldens.logits]
    positions, kls = [count for count, _ in compared], [kl for _, kl in compared]
    stops = bundle.text.stop_ids
    expected = tuple(takewhile(lambda id: id not in stops, goldens.answer_ids))
    expected = expected[:_GOLDEN_ANSWER_TOKENS]
    prompt = goldens.answer_prompt_ids
    said = session.generate(prompt, len(expected)) if expected else None
    return Answers(
        positions=sum(positions),
        mean_kl_nats=max(0.0, sum(kl * n for kl, n in zip(kls, positions, strict=True))
                         / max(1, sum(positions))),
        expected_ids=expected,
        said_ids=said.ids if said else (),
    )  # fmt: skip


def _compare(golden: LogitGolden, session: BrowserSession) -> tuple[int, float]:
    """Return at how many positions of a text distributions were compared, and their mean KL."""
    if not session.loaded.reads_text:
        return len(golden.ids), golden.mean_kl_nats(session.all_logits(golden.ids))
    # Where the beginning of the text is what the runtime would make of it.
    ends = [end for end in range(1, len(golden.ids) + 1) if session.can_read(golden.ids[:end])]
    if not ends:
        return 0, 0.0
    kls = [_kl_nats(golden, end - 1, session.last_logits(golden.ids[:end])) for end in ends]
    return len(ends), sum(kls) / len(kls)


def _kl_nats(golden: LogitGolden, position: int, row: "Logits") -> float:
    """Return how far one distribution is, of which only the most likely tokens may be known."""
    pairs = zip(golden.top_ids[position], golden.top_log_probabilities[position], strict=True)
    known = [(id, logarithm) for id, logarithm in pairs if row[id] > row.min()]
    one = LogitGolden(
        ids=(golden.ids[position],),
        top_ids=(tuple(id for id, _ in known) or golden.top_ids[position][:1],),
        top_log_probabilities=(
            tuple(it for _, it in known) or golden.top_log_probabilities[position][:1],
        ),
    )
    return one.mean_kl_nats(row[None])


def _shortened(golden: LogitGolden) -> LogitGolden:
    """Return the beginning of a text: every token of it is a call of the page."""
    return LogitGolden(
        ids=golden.ids[:_GOLDEN_TOKENS],
        top_ids=golden.top_ids[:_GOLDEN_TOKENS],
        top_log_probabilities=golden.top_log_probabilities[:_GOLDEN_TOKENS],
    )


def options_of(fields: dict[str, Any]) -> BrowserOptions:
    """Return options from what `dataclasses.asdict` made of them."""
    return BrowserOptions(
        **{**fields, "limits": read_fields(Limits, fields["limits"], of="limits")}
    )


def _perform(words: Sequence[str] | None) -> Callable[[], dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--browser", metavar="JSON", required=True)
    own, rest = parser.parse_known_args(words)
    options = options_of(parse(own.browser))
    arguments = measure.arguments_of(rest)

    def perform() -> dict[str, Any]:
        if arguments.environment:
            return {"environment": dataclasses.asdict(describe(arguments.bundle, options))}
        workload = read_fields(Workload, parse(arguments.workload), of="workload")
        if arguments.cold:
            cold = start_cold(arguments.bundle, workload, options)
            return {"cold_start": dataclasses.asdict(cold)}
        return {"repetition": dataclasses.asdict(repeat(arguments.bundle, workload, options))}

    return perform


def _end_with(parent: int) -> None:
    """End this process when whoever wanted the measurement was killed."""
    while os.getppid() == parent:
        time.sleep(_ORPHAN_S)
    os.kill(os.getpid(), signal.SIGTERM)


def main(words: Sequence[str] | None = None) -> int:
    """Perform one task; print its result, or its refusal, as one line of JSON."""
    for name in ("SIGTERM", "SIGHUP"):  # so that the browser is ended with it
        with suppress(AttributeError, ValueError):
            signal.signal(getattr(signal, name), lambda number, _: sys.exit(128 + number))
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        return measure.report(_perform(words))
    except KilledError:
        return KILLED  # as of a process that holds the model itself


if __name__ == "__main__":
    sys.exit(main())
