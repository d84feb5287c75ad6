"""A model in a page of the system's Chromium, as a session: token ids in, logits out."""

import base64
import hashlib
import json
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from edgekit import formats
from edgekit.browser import chromium, packages
from edgekit.browser.devtools import CallError, ClosedError, DevTools, Event, KilledError
from edgekit.browser.gpu import Gpu
from edgekit.browser.options import Backend, BrowserOptions
from edgekit.browser.server import Site, serving
from edgekit.cache import remembered
from edgekit.errors import BudgetError, ToolchainError
from edgekit.formats import BrowserRequest, Browsing
from edgekit.runtime import reading
from edgekit.text.tokenizer import Text


if TYPE_CHECKING:
    from edgekit.runtime.session import Logits

PAGE = Path(__file__).parent / "page"
SUBGROUPS = ("subgroups", "subgroup-size-control")  # the latter brings the former along
TIMEOUT_S = 600.0  # for one call of the page; a software adapter takes minutes for a long prompt
_START_S = 60.0
_FAULTS = "browser-subgroups"  # of the cache
_OUT_OF_MEMORY = ("out of memory", "Array buffer allocation failed", "bad_alloc", "OutOfMemory")
_HTML = string.Template("""<!doctype html>
<meta charset="utf-8" />
<title>edgekit</title>
<link rel="icon" href="data:," />
<script type="importmap">$imports</script>
<script type="module" src="/edgekit/device.mjs"></script>
""")


class LackingError(BudgetError):
    """The browser, or the GPU that it is held to, lacks what the model needs."""


@dataclass(frozen=True, kw_only=True)
class SelfCheck:
    """Whether a prompt says the same however it is read."""

    differs: float  # the largest difference of two logits that should be one
    is_right: bool


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """How a page opened a model."""

    load_s: float
    backend: Backend
    fell_back: str | None  # why not WebGPU, where that was not asked for
    vocabulary_tokens: int
    threads: int | None
    check: SelfCheck | None  # None: the runtime has none for this back-end
    reads_text: bool  # and no ids


@dataclass(frozen=True, kw_only=True)
class Timed:
    """An answer that the page timed."""

    ids: tuple[int, ...]
    first_token_s: float
    decode_s: tuple[float, ...]


@dataclass(kw_only=True, eq=False)
class Page:
    """A running browser whose page can open one bundle; `close` ends it.

    Every call raises `ToolchainError`, one sentence, when the page, the GPU or the browser fails.
    """

    browser: chromium.Browser
    runtime: str
    agent: str  # the browser's name and version
    gpu: Gpu | None
    hardware_threads: int
    _resources: ExitStack
    _workers: list[str] = field(default_factory=list)  # DevTools' sessions of the page's workers

    @classmethod
    def open(
        cls, path: Path, browsing: Browsing, request: BrowserRequest, options: BrowserOptions
    ) -> Self:
        """Start a browser at a page for artifacts of a format.

        Args:
            path: The artifact's entry; its directory is served.
            browsing: What opens its format.
            request: What it will be told to open.
            options: How.

        Raises:
            MissingDependencyError: If there is no browser, or no npm to fetch the runtime with.
            ToolchainError: If the runtime cannot be fetched or the browser does not start.
        """
        chromium.find()  # before anything is fetched
        site = _site(path.parent, browsing, request)
        page = cls._open(site, browsing, options, is_software=options.adapter == "software")
        if page.gpu is None and options.backend != "wasm" and options.adapter is None:
            page.close()  # this machine has no GPU: a WebGPU of the processor's is better than none
            page = cls._open(site, browsing, options, is_software=True)
        return page

    @classmethod
    def _open(
        cls, site: Site, browsing: Browsing, options: BrowserOptions, *, is_software: bool
    ) -> Self:
        flags = [chromium.reaching_only(site.connects_to)]
        flags += [chromium.SOFTWARE_ADAPTER] if is_software else []
        workers: list[str] = []
        hook = _hook(options)

        def on_event(tools: DevTools, event: Event) -> None:
            _on_event(tools, event, hook, workers)

        with ExitStack() as stack:
            server = stack.enter_context(serving(site))
            browser = stack.enter_context(chromium.running(flags=flags, on_event=on_event))
            page = cls(
                browser=browser, runtime=_runtime(browsing), agent=browser.version(), gpu=None,
                hardware_threads=1, _resources=ExitStack(), _workers=workers,
            )  # fmt: skip
            page._visit(server.url, hook)
            described = page.ask("describe", timeout_s=_START_S)
            page.gpu = Gpu.read(described["gpu"])
            page.hardware_threads = described["threads"]
            page._resources = stack.pop_all()
        return page

    def _visit(self, url: str, hook: str) -> None:
        call = self.browser.call
        call("Runtime.enable")
        call("Inspector.enable")
        call("Page.enable")
        call("Page.addScriptToEvaluateOnNewDocument", {"source": hook})
        call(
            "Target.setAutoAttach",
            {"autoAttach": True, "waitForDebuggerOnStart": True, "flatten": True},
        )
        call("Page.navigate", {"url": url})
        waits = (
            "new Promise((resolve) => { const look = () => globalThis.edgekit ? resolve() : "
            "setTimeout(look, 20); look(); })"
        )
        with suppress(CallError):  # the document changed under it
            self._evaluate(waits, timeout_s=_START_S)
            return
        self._evaluate(waits, timeout_s=_START_S)

    def ask(self, method: str, *arguments: object, timeout_s: float = TIMEOUT_S) -> Any:
        """Return what a method of the page's ``edgekit`` answers.

        Raises:
            ToolchainError: If it fails, takes too long, or the browser, its tab or GPU is gone.
        """
        words = ", ".join(json.dumps(argument) for argument in arguments)
        try:
            answer = self._evaluate(f"edgekit.{method}({words})", timeout_s=timeout_s)
        except TimeoutError as error:
            raise ToolchainError(
                f"{self.runtime} gave no answer to {method!r} within {timeout_s:.0f} s"
            ) from error
        if method not in {"describe", "look"}:
            self._refuse_lost()
        return answer

    def _evaluate(self, expression: str, *, timeout_s: float) -> Any:
        found = self.browser.call(
            "Runtime.evaluate",
            {"expression": expression, "awaitPromise": True, "returnByValue": True},
            timeout_s=timeout_s,
        )
        if "exceptionDetails" in found:
            raise self._failure(found["exceptionDetails"])
        return found["result"].get("value")

    def _failure(self, details: Mapping[str, Any]) -> ToolchainError:
        thrown = details.get("exception", {})
        said = str(thrown.get("description") or thrown.get("value") or details.get("text"))
        first = said.strip().splitlines()[0].removeprefix("Error: ")
        self._refuse_lost()
        if any(sign in said for sign in _OUT_OF_MEMORY):
            return ToolchainError(
                f"the page ran out of memory: {first}",
                hint="take a smaller model or a shorter --context",
                log=said,
            )
        return ToolchainError(f"{self.runtime} failed: {first}", log=said)

    def _refuse_lost(self) -> None:
        """Check that the GPU is still there and found nothing wrong.

        Raises:
            ToolchainError: If it does not.
        """
        for seen in self.gpu_work():
            if seen["lost"]:
                raise ToolchainError(f"the GPU was lost: {seen['lost']}")
            if seen["errors"]:
                raise ToolchainError(
                    f"the GPU refused work of {self.runtime}: {seen['errors'][0].splitlines()[0]}",
                    log="\n".join(seen["errors"]),
                )

    def gpu_work(self) -> list[dict[str, Any]]:
        """Return what the page and each of its workers did with WebGPU so far."""
        found = []
        for session in (self.browser.session, *self._workers):
            with suppress(CallError, TimeoutError):
                answer = self.browser.tools.call(
                    "Runtime.evaluate",
                    {"expression": "globalThis.edgekitGpu", "returnByValue": True},
                    session=session,
                    timeout_s=10,
                )
                value = answer["result"].get("value")
                if value:
                    found.append(value)
        return found

    def has_feature(self, name: str) -> bool:
        """Tell whether the page sees a feature of the GPU."""
        return self.gpu is not None and name in self.gpu.features

    def submits(self) -> int:
        """Return how many times work was handed to a GPU."""
        return sum(seen["submits"] for seen in self.gpu_work())

    def load(
        self,
        request: BrowserRequest,
        *,
        context_tokens: int,
        threads: int | None,
        backend: Backend | None,
    ) -> Loaded:
        """Open the model.

        Raises:
            LackingError: If the browser lacks what the model needs.
            ToolchainError: If the runtime fails.
        """
        told = _as_told(request, context_tokens=context_tokens, threads=threads)
        found = self.ask("open", told, backend)
        if found["reason"] is not None:
            raise LackingError(
                found["reason"], hint="export it for this kind of browser: edgekit targets"
            )
        return Loaded(
            load_s=found["load_s"],
            backend=found["backend"],
            fell_back=found["fell_back"],
            vocabulary_tokens=found["vocabulary"],
            threads=found["threads"],
            check=found["check"] and SelfCheck(**found["check"]),
            reads_text=request.reads_text,
        )

    def generate(
        self, ids: Sequence[int], count: int, texts: Mapping[str, str] | None = None
    ) -> Timed:
        """Return a timed answer of so many tokens, from an empty cache."""
        said = self.ask("generate", list(ids), count, texts)
        return Timed(
            ids=tuple(said["ids"]),
            first_token_s=said["first_token_s"],
            decode_s=tuple(said["decode_s"]),
        )

    def close(self) -> None:
        """End the browser and all that it started."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class _Wanted:
    request: BrowserRequest
    text: Text
    context_tokens: int
    threads: int | None
    on_start: Callable[[chromium.Browser], object] | None


class BrowserSession:
    """A model in a page; satisfies `edgekit.runtime.session.Session`."""

    def __init__(self, page: Page, loaded: Loaded, text: Text, *, context_tokens: int) -> None:
        self.page, self.loaded, self.text = page, loaded, text
        self.vocabulary_tokens, self.context_tokens = loaded.vocabulary_tokens, context_tokens
        self.note: str | None = None  # what a reader of its answers should know
        self._read: list[int] = []  # what is cached

    @classmethod
    def open(  # noqa: PLR0913 - what is opened, and how
        cls,
        path: Path,
        format: str,
        options: BrowserOptions,
        *,
        text: Text,
        context_tokens: int,
        threads: int | None = None,
        on_start: Callable[[chromium.Browser], object] | None = None,
    ) -> Self:
        """Start a browser and open an artifact in it; errors are those of `Page`.

        Args:
            path: The artifact's entry.
            format: Its format.
            options: What of the browser is not left to it.
            text: The model's, for runtimes that take no ids.
            context_tokens: How many tokens the cache must hold.
            threads: Of WebAssembly; None: the runtime decides.
            on_start: Is told each browser that is started, before the artifact is opened.
        """
        browsing = formats.browsing(format)
        request = browsing.request(path, context_tokens=context_tokens)
        wanted = _Wanted(request, text, context_tokens, threads, on_start)
        page = Page.open(path, browsing, request, options)
        without = replace(
            options,
            limits=replace(options.limits, hidden=(*options.limits.hidden, *SUBGROUPS)),
        )
        differs = _known_fault(page) if options.backend != "wasm" else None
        if differs is None:
            opened = cls._load(page, wanted, options)
            check = opened.loaded.check
            if check is None or check.is_right or not page.has_feature(SUBGROUPS[0]):
                return opened
            differs = _remember_fault(page, check)
        page.close()
        again = cls._load(Page.open(path, browsing, request, without), wanted, without)
        if again.loaded.backend == "webgpu":
            again.note = (
                f"{again.page.runtime} answers wrongly with the subgroups of this GPU ("
                f"{differs:.1f} off in the logits of 48 tokens read at once); they are hidden "
                "here, as they are in the bundle's page"
            )
        return again

    @classmethod
    def _load(cls, page: Page, wanted: "_Wanted", options: BrowserOptions) -> Self:
        try:
            if wanted.on_start:
                wanted.on_start(page.browser)
            loaded = page.load(
                wanted.request, context_tokens=wanted.context_tokens, threads=wanted.threads,
                backend=options.backend,
            )  # fmt: skip
        except BaseException:
            page.close()
            raise
        return cls(page, loaded, wanted.text, context_tokens=wanted.context_tokens)

    def prefill(self, ids: Sequence[int]) -> "Logits":
        """Read ``ids`` after what is cached; return float32 ``(vocabulary_tokens,)`` logits.

        Raises:
            UsageError: If ``ids`` is empty, has an unknown id, or outgrows the context.
        """
        reading.refuse_empty(ids)
        reading.refuse(self, ids, cached_tokens=len(self._read))
        read = [*self._read, *ids]
        row = self._row(self.page.ask("prefill", list(ids), self._texts(read)))
        self._read = read
        return row

    def decode(self, token: int) -> "Logits":
        """Read one token after what is cached; return float32 ``(vocabulary_tokens,)`` logits."""
        reading.refuse(self, [token], cached_tokens=len(self._read))
        read = [*self._read, token]
        row = self._row(self.page.ask("decode", token, self._texts(read)))
        self._read = read
        return row

    def all_logits(self, ids: Sequence[int]) -> "Logits":
        """Read ``ids`` alone; return float32 ``(len(ids), vocabulary_tokens)`` logits."""
        import numpy as np

        reading.refuse_empty(ids)
        self.reset()
        reading.refuse(self, ids, cached_tokens=0)
        at_once = self.page.ask("all", list(ids))
        if at_once is not None:
            return self._row(at_once).reshape(len(ids), self.vocabulary_tokens)
        rows = [self.decode(id) for id in ids[:-1]]
        self.reset()
        rows.append(self.prefill(ids))  # at once, as prompts are read
        self.reset()
        return np.stack(rows)

    def last_logits(self, ids: Sequence[int]) -> "Logits":
        """Read ``ids`` alone; return float32 ``(vocabulary_tokens,)`` logits after the last."""
        self._read = []
        row = self._row(self.page.ask("last", list(ids), self._texts(ids)))
        self.reset()
        return row

    def generate(self, ids: Sequence[int], count: int) -> Timed:
        """Return an answer of so many tokens, chosen greedily and timed in the page."""
        self._read = []
        return self.page.generate(ids, count, self._texts(ids))

    def can_read(self, ids: Sequence[int]) -> bool:
        """Tell whether the runtime can be given exactly these ids.

        One that takes text must make the same ids of it. It is ASCII here, since wllama 3.13 dies
        over half a letter, which models say in the middle of others.
        """
        if not self.loaded.reads_text:
            return True
        text = self._text(ids)
        return text.isascii() and self._ids(text) == list(ids)

    def rewind(self, tokens: int) -> bool:
        """Return whether nothing has to be forgotten: runtimes of the web forget all or nothing."""
        return tokens == len(self._read)

    def reset(self) -> None:
        """Empty the cache."""
        self.page.ask("reset")
        self._read = []

    def _texts(self, ids: Sequence[int]) -> dict[str, str] | None:
        if not self.loaded.reads_text:
            return None
        return {"text": self._text(ids), "rest": self._text(ids[1:])}

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.text.tokenizer.decode(list(ids), skip_special_tokens=False))

    def _ids(self, text: str) -> list[int]:
        return self.text.encode(text, adds_bos=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def backend(self) -> Backend:
        """What did the work so far: WebGPU if anything was handed to it."""
        return "webgpu" if self.page.submits() else "wasm"

    def fell_back(self) -> str | None:
        """Return why not the GPU computes, where that was not asked for."""
        if self.loaded.backend == "webgpu" and self.backend == "wasm":
            return f"{self.page.runtime} was to use WebGPU and handed it no work"
        return self.loaded.fell_back

    def notes(self) -> Iterator[str]:
        """Yield what a reader of its answers should know."""
        page, gpu, fell_back = self.page, self.page.gpu, self.fell_back()
        if self.backend == "webgpu" and gpu is not None:
            yield f"computed by {page.runtime} in {gpu.name}, {page.agent}"
        else:
            reason = f": {fell_back}" if fell_back else ""
            yield f"computed by {page.runtime} in WebAssembly, {page.agent}{reason}"
        if self.note:
            yield self.note

    def close(self) -> None:
        """End the browser."""
        self.page.close()

    def _row(self, text: str) -> "Logits":
        import numpy as np

        row: Logits = np.frombuffer(base64.b64decode(text), np.float32)
        return row


class _UnknownError(Exception):
    """Nothing was remembered."""


def _fault_key(page: Page) -> str:
    gpu = page.gpu
    named = (gpu.vendor, gpu.architecture, gpu.device, gpu.description) if gpu else ()
    return hashlib.sha256(json.dumps([page.agent, page.runtime, *named]).encode()).hexdigest()


def _known_fault(page: Page) -> float | None:
    """Return how far the runtime was off with this GPU's subgroups before; None: not that is known.

    So a model is opened twice only the first time.
    """

    def ask_nobody() -> dict[str, Any]:
        raise _UnknownError

    if not page.has_feature(SUBGROUPS[0]):
        return None
    try:
        return float(remembered(_FAULTS, _fault_key(page), ask_nobody)["differs"])
    except _UnknownError:
        return None


def _remember_fault(page: Page, check: SelfCheck) -> float:
    remembered(_FAULTS, _fault_key(page), lambda: {"differs": check.differs})
    return check.differs


def _site(bundle: Path, browsing: Browsing, request: BrowserRequest) -> Site:
    roots = {f"/npm/{package.name}/": packages.directory(package) for package in browsing.PACKAGES}
    imports = {name: f"/npm/{file}" for name, file in browsing.IMPORTS.items()}
    html = _HTML.substitute(imports=json.dumps({"imports": imports}))
    return Site(
        pages={"/": ("text/html", html.encode())},
        roots={
            **roots,
            "/edgekit/": PAGE,
            "/edgekit/gpu.mjs": formats.PAGE / "gpu.mjs",
            "/format/runtime.mjs": browsing.MODULE,
            "/files/": bundle,
        },
        connects_to=request.connects_to,
    )  # fmt: skip


def _runtime(browsing: Browsing) -> str:
    return f"{browsing.RUNTIME} {browsing.PACKAGES[0].version}"


def _hook(options: BrowserOptions) -> str:
    forced = {"limits": dict(options.limits.at_most), "hidden": list(options.limits.hidden)}
    script = (formats.PAGE / "gpu.js").read_text(encoding="utf-8")
    return f"globalThis.edgekitForced = {json.dumps(forced)};\n{script}"


def _on_event(tools: DevTools, event: Event, hook: str, workers: list[str]) -> None:
    """Let workers run with the hook in place; notice a tab that dies."""
    match event["method"]:
        case "Target.attachedToTarget" if event["params"]["targetInfo"]["type"] == "worker":
            session = event["params"]["sessionId"]
            tools.send("Runtime.evaluate", {"expression": hook}, session=session)
            tools.send("Runtime.runIfWaitingForDebugger", session=session)
            workers.append(session)
        case "Target.detachedFromTarget":
            with suppress(ValueError):
                workers.remove(event["params"]["sessionId"])
        case "Target.targetCrashed":  # which says how; the page's own event does not
            tools.fail(_crash(event["params"]))
        case _:
            pass


def _crash(params: Mapping[str, Any]) -> ClosedError:
    status = params.get("status", "")
    if status in {"oom", "killed", "oom-killed"}:
        return KilledError("the page's process was killed, as the system does when memory runs out")
    return ClosedError("the page's process died" + (f" ({status})" if status else ""))


def _as_told(
    request: BrowserRequest, *, context_tokens: int, threads: int | None
) -> dict[str, Any]:
    buffer = request.largest_buffer
    return {
        **request.settings,
        "url": f"/files/{request.entry}",
        "data": [
            {"path": name, "data": f"/files/{name}"}
            for name in request.files
            if name != request.entry
        ],
        "features": list(request.features),
        "largest_buffer": buffer and asdict(buffer),
        "runs_in_wasm": request.runs_in_wasm,
        "context_tokens": context_tokens,
        "threads": threads,
    }
