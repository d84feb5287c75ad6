"""Serve a bundle over HTTP, as OpenAI's clients expect it: models, chat and text completions.

One model, one session, one answer at a time; the others wait in line.
"""

import asyncio
import hmac
import ipaddress
import json
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, aclosing, contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from edgekit import installed
from edgekit.browser import web_page
from edgekit.browser.server import TYPES, Site, SiteServer
from edgekit.bundle.manifest import Bundle
from edgekit.encodings.visible import visible
from edgekit.errors import EdgekitError, MissingDependencyError, ToolchainError, UsageError
from edgekit.progress import Listener
from edgekit.run import Answer, Reply, Runner
from edgekit.runtime.generate import Sampling
from edgekit.server.openai_api import TEMPLATE_VARIABLES, ApiError, Ask, Fields, Wire
from edgekit.text.answer import Part


if TYPE_CHECKING:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import Message, Receive, Scope, Send

    Handler: TypeAlias = Callable[[Request], Awaitable[Response]]


# What strangers may cost. How long a text may be follows from the context: `Runner.ask`.
MAX_BODY_BYTES = 8 << 20  # of one request; a context of a million tokens, escaped, fits
MAX_BODIES_BYTES = 64 << 20  # of all requests that are still being sent; more get status 503
MAX_WAITING = 64  # requests that have come whole; more get status 503
MAX_CONNECTIONS = 512  # silent ones included; half of the files a process may usually have open
HEAD_S = 10.0  # for a request's first line and headers, counted from the first moment of silence
BODY_S = 30.0  # for the rest of it: 8 MB at 2.3 Mbit/s
SEND_S = 30.0  # for a client to take a piece of an answer, while the others wait for its end
SHUTDOWN_S = 3  # how long Ctrl-C waits for answers under way
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")  # names, as a Host header writes them


@dataclass(kw_only=True, eq=False)
class Service:
    """The endpoints over one runner."""

    runner: Runner
    sampling: Sampling
    api_key: str | None
    hosts: Collection[str] | None  # names in lower case; None: any
    page: Site | None = None  # of a bundle for browsers
    takes_addresses: bool = False  # whether any IP address will do for a name
    started: int = field(default_factory=lambda: int(time.time()))
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)  # held for one answer
    step: threading.Lock = field(default_factory=threading.Lock)  # held while the session works
    reading: asyncio.Lock = field(default_factory=asyncio.Lock)  # held while a text is tokenized
    waiting: int = 0  # requests that have come whole and are not answered yet
    bodies_bytes: int = 0  # of the requests that are being sent

    @property
    def model(self) -> str:
        """The name clients use."""
        return self.runner.bundle.model.name

    async def models(self, request: "Request") -> "Response":
        """GET /v1/models and /v1/models/NAME."""
        from starlette.responses import JSONResponse

        card = {"id": self.model, "object": "model", "created": self.started, "owned_by": "edgekit"}
        if "name" not in request.path_params:
            return JSONResponse({"object": "list", "data": [card]})
        self._check_model(request.path_params["name"])
        return JSONResponse(card)

    async def chat_completions(self, request: "Request") -> "Response":
        """POST /v1/chat/completions."""
        return await self._complete(request, Ask.chat)

    async def completions(self, request: "Request") -> "Response":
        """POST /v1/completions."""
        return await self._complete(request, Ask.text)

    async def file(self, request: "Request") -> "Response":
        """GET / and what the page asks for."""
        from starlette.responses import FileResponse, Response

        page = self.page
        assert page is not None  # noqa: S101 - else there is no such route
        path = request.url.path
        if path in page.pages:
            kind, body = page.pages[path]
            return Response(body, media_type=kind, headers=page.headers)
        found = page.file(path)
        if found is None:
            raise ApiError(f"there is no {path}", status=404)
        kind = TYPES.get(found.suffix, "application/octet-stream")
        return FileResponse(found, media_type=kind, headers=page.headers)

    async def _complete(self, request: "Request", read: Callable[..., Ask]) -> "Response":
        from starlette.responses import JSONResponse

        body = await self._body(request)
        with ExitStack() as place:
            place.enter_context(self._place())
            fields = Fields.parse(body)
            self._check_model(fields.take("model"))
            ask = read(fields, sampling=self.sampling)
            reply = await self._prepared(request, ask)
            if reply is None:
                return _gone()
            digest = self.runner.bundle.model.sha256[:12]
            wire = Wire(ask=ask, model=self.model, fingerprint=f"edgekit-{digest}")
            if ask.streams:
                return _event_stream(self._events(reply, wire), place.pop_all())
            answer = await self._whole(request, reply)
            return _gone() if answer is None else JSONResponse(wire.whole(answer))

    async def _body(self, request: "Request") -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # a form on any web page could send something else
            raise ApiError(f"the body is {kind!r}, expected 'application/json'", status=415)
        _check_size(int(request.headers.get("content-length", "0")))
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_S):
                async for piece in request.stream():
                    body += piece
                    self.bodies_bytes += len(piece)
                    _check_size(len(body))
                    if self.bodies_bytes > MAX_BODIES_BYTES:
                        raise _busy()
        except TimeoutError:
            raise ApiError(f"the body did not come within {BODY_S:g} s", status=408) from None
        finally:
            self.bodies_bytes -= len(body)
        return bytes(body)

    @contextmanager
    def _place(self) -> Iterator[None]:
        """Hold a place in the line."""
        if self.waiting >= MAX_WAITING:
            raise _busy()
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    async def _prepared(self, request: "Request", ask: Ask) -> Reply | None:
        """Return what `_reply` does, None if the client has left before its turn to be read."""
        from starlette.concurrency import run_in_threadpool

        async with self.reading:  # one at a time: a long text takes memory while it is tokenized
            if await request.is_disconnected():
                return None
            return await run_in_threadpool(self._reply, ask)

    def _reply(self, ask: Ask) -> Reply:
        """Prepare the answer: everything that can be refused is refused here."""
        if ask.kind == "chat":
            _check_variables(self.runner, ask)
            return self.runner.ask(
                ask.messages,
                max_tokens=ask.max_tokens,
                sampling=ask.sampling,
                stop=ask.stop,
                template_variables=ask.template_variables,
            )
        if not isinstance(ask.prompt, str):
            _check_ids(ask.prompt, self.runner.session.vocabulary_tokens)
        return self.runner.complete(
            ask.prompt, max_tokens=ask.max_tokens, sampling=ask.sampling, stop=ask.stop
        )

    async def _whole(self, request: "Request", reply: Reply) -> Answer | None:
        async with self.turn:
            try:
                while not await request.is_disconnected():
                    if await self._next(reply) is None:
                        return reply.answer
            finally:
                self._close(reply)
        return None

    async def _events(self, reply: Reply, wire: Wire) -> AsyncGenerator[str]:
        for chunk in wire.head():
            yield _event(chunk)
        async with self.turn:
            try:
                while (part := await self._next(reply)) is not None:
                    yield _event(wire.piece(part))
            except EdgekitError as error:
                yield _event(ApiError.of(error).body)
                return
            finally:
                self._close(reply)
        for chunk in wire.tail(reply.answer):
            yield _event(chunk)
        yield "data: [DONE]\n\n"

    async def _next(self, reply: Reply) -> Part | None:
        from starlette.concurrency import run_in_threadpool

        def step() -> Part | None:
            with self.step:
                return reply.next_part()

        # A cancelled request waits here for the step under way, so no two ever run at once.
        return await run_in_threadpool(step)

    def _close(self, reply: Reply) -> None:
        if self.step.acquire(blocking=False):  # else the whole server is being torn down
            try:
                reply.close()
            finally:
                self.step.release()

    def _check_model(self, name: Any) -> None:
        if not isinstance(name, str):
            raise ApiError("model must be the name of a model", param="model")
        if name != self.model:
            raise ApiError(
                f"no model named {name!r}; this server has {self.model!r}",
                status=404,
                param="model",
                code="model_not_found",
            )

    def admits(self, handler: "Handler") -> "Handler":
        """Wrap a handler so that requests without permission do not reach it."""

        async def admitted(request: "Request") -> "Response":
            self._check_host(request.headers.get("host", ""))
            self._check_key(request.headers.get("authorization", ""))
            return await handler(request)

        return admitted

    def _check_host(self, header: str) -> None:
        """Refuse a web page that has pointed its own name at this machine (DNS rebinding)."""
        name = header.rpartition(":")[0] if not header.endswith("]") and ":" in header else header
        # A page can point its own name at this machine, but not an address.
        is_known = name.lower() in (self.hosts or ()) or (
            self.takes_addresses and _is_address(name)
        )
        if self.hosts is not None and not is_known:
            raise ApiError(f"this server does not serve the host name {name!r}", status=403)

    def _check_key(self, header: str) -> None:
        if self.api_key is None:
            return
        given = header.removeprefix("Bearer ").encode()
        if not hmac.compare_digest(given, self.api_key.encode()):
            raise ApiError("the API key is missing or wrong", status=401, code="invalid_api_key")


def _check_variables(runner: Runner, ask: Ask) -> None:
    try:
        runner.text.check_variables(ask.template_variables)
    except UsageError as error:
        raise ApiError(str(error), param=TEMPLATE_VARIABLES) from error


def _check_ids(ids: list[int], vocabulary_tokens: int) -> None:
    for token in ids:
        if not 0 <= token < vocabulary_tokens:
            raise ApiError(f"prompt has the unknown token id {token}", param="prompt")


def _gone() -> "Response":
    from starlette.responses import Response

    return Response(status_code=499)  # nginx's number for a client that did not wait


def _check_size(body_bytes: int) -> None:
    if body_bytes > MAX_BODY_BYTES:
        raise ApiError(f"the body is larger than {MAX_BODY_BYTES} bytes", status=413)


def _busy() -> ApiError:
    return ApiError("the server is busy; try again later", status=503)


def _event(fields: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(fields, ensure_ascii=False)}\n\n"


def _event_stream(events: AsyncGenerator[str], place: ExitStack) -> "Response":
    from starlette.responses import StreamingResponse

    class EventStream(StreamingResponse):
        """Server-sent events that end, and free the session, the moment the client is gone."""

        async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
            with place:
                await super().__call__(scope, receive, send)

        async def stream_response(self, send: "Send") -> None:
            async def send_in_time(message: "Message") -> None:
                async with asyncio.timeout(SEND_S):
                    await send(message)

            with suppress(TimeoutError):  # it has stopped reading
                async with aclosing(events):
                    await super().stream_response(send_in_time)

    return EventStream(
        events, media_type="text/event-stream", headers={"cache-control": "no-store"}
    )


def app(
    runner: Runner,
    *,
    sampling: Sampling | None = None,
    api_key: str | None = None,
    hosts: Collection[str] | None = None,
) -> "Starlette":
    """Return the ASGI application.

    Args:
        runner: The loaded bundle; nothing else may use it meanwhile.
        sampling: What holds where a request says nothing; None: the most likely token.
        api_key: What clients must send; None: nothing.
        hosts: The names under which clients may reach it; None: any.

    Raises:
        MissingDependencyError: If the extra ``serve`` is not installed.
    """
    service = Service(runner=runner, sampling=sampling or Sampling(), api_key=api_key, hosts=hosts)
    return _application(service)


def _application(service: Service) -> "Starlette":
    check_installed()
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.responses import Response
    from starlette.routing import Route

    async def refuse(_: "Request", error: Exception) -> "Response":
        match error:
            case ClientDisconnect():
                return _gone()
            case ApiError():
                refusal = error
            case EdgekitError():
                refusal = ApiError.of(error)
            case HTTPException():
                refusal = ApiError(error.detail, status=error.status_code)
            case _:
                raise error
        # As ASCII: a refusal may quote what is not valid Unicode.
        return Response(
            json.dumps(refusal.body),
            refusal.status,
            media_type="application/json",
            headers={"connection": "close"} if refusal.status == HTTPStatus.REQUEST_TIMEOUT else {},
        )

    routes = [
        Route("/v1/models", service.admits(service.models)),
        Route("/v1/models/{name:path}", service.admits(service.models)),
        Route("/v1/chat/completions", service.admits(service.chat_completions), methods=["POST"]),
        Route("/v1/completions", service.admits(service.completions), methods=["POST"]),
    ]
    if service.page is not None:
        routes.append(Route("/{path:path}", service.admits(service.file)))
    handlers = dict.fromkeys((ApiError, EdgekitError, HTTPException, ClientDisconnect), refuse)
    return Starlette(routes=routes, exception_handlers=handlers)


def check_installed() -> None:
    """Refuse to go on without the extra.

    Raises:
        MissingDependencyError: If a part of it is missing.
    """
    installed.require("starlette", "uvicorn", purpose="serving", extra="serve")


def serve(  # noqa: PLR0913 - a request in full
    bundle_directory: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    api_key: str | None = None,
    allow_remote: bool = False,
    no_key: bool = False,
    host_names: Collection[str] = (),
    context_tokens: int | None = None,
    threads: int | None = None,
    template_variables: Mapping[str, Any] | None = None,
    trusted: str | Path | None = None,
    say: Callable[[str], object] | None = None,
    listener: Listener | None = None,
) -> None:
    """Serve a bundle until Ctrl-C.

    Args:
        bundle_directory: What `edgekit export` printed.
        host: The address to listen on.
        port: 0 takes a free one.
        api_key: What clients must send; None: nothing.
        allow_remote: Whether ``host`` may be one that other machines reach.
        no_key: Whether they may do without a key.
        host_names: Further names by which they call this machine: a proxy's, one of a DNS zone.
        context_tokens: How much the cache must hold; None: what the bundle was made for.
        threads: From 1 to the number of cores; None: as many as there are fast ones.
        template_variables: What the chat template reads, by name, where a request says nothing.
        trusted: Public keys, or a list of allowed signers, one of whom must have signed the bundle
            (see `Bundle.load`); None: anybody may have made it.
        say: Is told the address, where there is no listener; None writes to stderr.
        listener: Who is told the address.

    Raises:
        UsageError: If ``host`` is not this machine's own and ``allow_remote``, or a key or
            ``no_key``, is not given, the port is taken, the machine cannot run that many threads,
            or the template does not read a variable.
        BundleError: If the bundle is damaged, or not signed as it must be.
        MissingDependencyError: If the extra ``serve`` or the bundle's runtime is not installed.
    """
    is_local = _is_loopback(host)
    if not is_local and not allow_remote:
        raise UsageError(
            f"{host} can be reached from other machines",
            hint="add --allow-remote if that is intended",
        )
    _check_key_policy(api_key, is_local=is_local, no_key=no_key)
    has_page = (Path(bundle_directory) / web_page.INDEX).is_file()
    if not has_page:
        check_installed()
    say = listener.say if listener else say or (lambda line: sys.stderr.write(f"{visible(line)}\n"))
    with ExitStack() as stack:
        listening = stack.enter_context(_listen(host, port))
        page = _page(Path(bundle_directory), trusted, say) if has_page else None
        try:
            check_installed()
            runner = stack.enter_context(
                Runner.open(
                    bundle_directory,
                    context_tokens=context_tokens,
                    threads=threads,
                    template_variables=template_variables,
                    trusted=trusted,
                )
            )
        except MissingDependencyError as error:
            if page is None or not is_local:
                raise
            listening.close()
            _serve_page(page, host, port, say, f"the page alone: {error}")
            return
        service = Service(
            runner=runner,
            page=page,
            sampling=Sampling(),
            api_key=api_key or None,
            hosts={name.lower() for name in (*_names(host, is_local=is_local), *host_names)},
            takes_addresses=not is_local,
        )
        for line in _greeting(service, host, listening.getsockname()[1], is_local=is_local):
            say(line)
        _run_server(service, listening)


def _page(directory: Path, trusted: str | Path | None, say: Callable[[str], object]) -> Site | None:
    """Return what shows the page of a bundle for browsers, None where its runtime is not to be had.

    It is as what made the manifest said, since a browser executes it.
    """
    bundle = Bundle.load(directory, trusted=trusted)
    try:
        return web_page.site(bundle.directory, bundle.artifact.format)
    except (MissingDependencyError, ToolchainError) as error:
        say(f"note: served without its page: {error}" + (f" ({error.hint})" if error.hint else ""))
        return None


def _serve_page(
    page: Site, host: str, port: int, say: Callable[[str], object], reason: str
) -> None:
    try:
        server = SiteServer(page, host=host, port=port)
    except (OSError, OverflowError) as error:
        raise _taken(host, port, error) from error
    with server:
        say(f"serving {reason}")
        say(f"its page is http://{_bracketed(host)}:{server.server_port}/; Ctrl-C stops it")
        server.serve_forever(poll_interval=0.1)


def _check_key_policy(api_key: str | None, *, is_local: bool, no_key: bool) -> None:
    if api_key and no_key:
        raise UsageError("there is a key, and --no-key says that there is none", hint="drop one")
    if not (is_local or api_key or no_key):
        raise UsageError(
            "other machines could use the model without a key",
            hint="set one with --api-key or EDGEKIT_API_KEY; --no-key if anyone may use it",
        )


def _names(host: str, *, is_local: bool) -> tuple[str, ...]:
    """Return the names under which a server listening there is known to be meant."""
    if is_local:
        return LOOPBACK_HOSTS
    own = socket.gethostname()
    return (*LOOPBACK_HOSTS, host, own, f"{own}.local", socket.getfqdn())


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def _greeting(service: Service, host: str, port: int, *, is_local: bool) -> list[str]:
    name = _bracketed(host)
    lines = [f"serving {service.model} on http://{name}:{port}/v1; Ctrl-C stops it"]
    if service.page is not None:
        lines.append(f"its page is http://{name}:{port}/")
    if not is_local:
        limits = "with the API key" if service.api_key else "and no API key is needed"
        lines.append(f"warning: other machines can reach it, {limits}")
    return lines


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _run_server(service: Service, listening: socket.socket) -> None:
    import uvicorn

    server = uvicorn.Server(_server_settings(_application(service)))
    try:
        with _ending_with_the_terminal(server):
            server.run(sockets=[listening])
    finally:
        service.step.acquire()  # the session is closed next, no step may follow


@contextmanager
def _ending_with_the_terminal(server: "uvicorn.Server") -> Iterator[None]:
    """End a server on SIGHUP as uvicorn does on SIGTERM, then do what was to be done about it.

    What a handler raises in the middle of an event loop may be lost in it.
    """
    number = getattr(signal, "SIGHUP", None)
    is_main = threading.current_thread() is threading.main_thread()
    former = signal.getsignal(number) if number is not None and is_main else None
    if number is None or not callable(former):
        yield
        return
    came: list[int] = []

    def end(number: int, _: object) -> None:
        came.append(number)
        server.should_exit = True

    signal.signal(number, end)
    try:
        yield
    finally:
        signal.signal(number, former)
    if came:
        signal.raise_signal(number)


def _server_settings(application: "Starlette") -> "uvicorn.Config":
    import uvicorn

    return uvicorn.Config(
        application,
        http=_punctual_protocol(),
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=SHUTDOWN_S,
    )


def _punctual_protocol() -> "type[asyncio.Protocol]":
    """Return uvicorn's HTTP/1.1, which waits for ever for a request to begin, with a clock."""
    from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

    class PunctualProtocol(H11Protocol):
        """Drops a connection that does not say in time what it wants."""

        head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._set_timer()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._set_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            self._unset_timer()
            super().connection_lost(exc)

        def _set_timer(self) -> None:
            cycle: RequestResponseCycle | None = self.cycle  # None before the first request
            if cycle is not None and not cycle.response_complete:
                self._unset_timer()  # a request has begun; `_body` looks after the rest of it
            elif self.head_timer is None:
                self.head_timer = self.loop.call_later(HEAD_S, self.transport.abort)

        def _unset_timer(self) -> None:
            if self.head_timer is not None:
                self.head_timer.cancel()
                self.head_timer = None

    return PunctualProtocol


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise _taken(host, port, error) from error


def _taken(host: str, port: int, error: Exception) -> UsageError:
    return UsageError(
        f"cannot listen on {host}, port {port}: {error}", hint="--port 0 takes a free port"
    )
