import asyncio
import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

import edgekit
from edgekit.errors import BundleError, MissingDependencyError, ToolchainError, UsageError
from edgekit.runtime.generate import Sampling
from edgekit.serve import (
    LOOPBACK_HOSTS,
    MAX_BODY_BYTES,
    Service,
    _application,
    _greeting,
    _names,
    _server_settings,
    app,
    serve,
)
from edgekit.server.openai_api import ApiError, Ask, Fields
from edgekit.tests.witnesses.tiny_runner import (
    CHATML,
    DIALOGUE,
    QUESTION,
    THOUGHTS,
    bundle_in,
    runner_in,
    thinking_runner_in,
)
from edgekit.text.tokenizer import Text


httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")
uvicorn = pytest.importorskip("uvicorn")

# httpx.get and its like read all certificates for every request.
HTTP = httpx.Client(verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
PARIS = DIALOGUE[1]["content"]
ASK = list(DIALOGUE[:1])
MODEL = "tiny/ngram"
SERVE = sys.modules[app.__module__]  # the package has a function of that name


@contextlib.contextmanager
def served(application):
    """Run a real server on a free port and yield its address."""
    server = uvicorn.Server(_server_settings(application))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    refuse = "{% if messages[0].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    return runner_in(tmp_path_factory.mktemp("bundle"), template=refuse + CHATML)


@pytest.fixture(scope="module")
def url(runner):
    with served(app(runner)) as address:
        yield address


@pytest.fixture(scope="module")
def client(url):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=url, api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def http(url):
    with httpx.Client(base_url=url) as client:
        yield client


# OpenAI's own client


def test_a_variable_of_the_template_is_taken_as_other_servers_take_it(tmp_path):
    openai = pytest.importorskip("openai")
    runner = runner_in(tmp_path, template="{{ 'Be brief. ' if brief else '' }}" + CHATML)
    plain = len(runner.text.encode_chat(ASK))
    with (
        served(app(runner)) as address,
        openai.OpenAI(base_url=address, api_key="unused", max_retries=0) as client,
    ):

        def prompt_tokens(**body):
            made = client.chat.completions.create(model=MODEL, messages=ASK, extra_body=body)
            return made.usage.prompt_tokens

        longer = prompt_tokens(chat_template_kwargs={"brief": True})
        assert prompt_tokens() == prompt_tokens(chat_template_kwargs={"brief": False}) == plain
        assert longer == len(runner.text.encode_chat(ASK, brief=True)) > plain
        unread: list[object] = [{"breif": True}, {"messages": []}, [1]]
        for kwargs in unread:
            with pytest.raises(openai.BadRequestError) as refusal:
                prompt_tokens(chat_template_kwargs=kwargs)
            assert refusal.value.param == "chat_template_kwargs"


@pytest.fixture
def thinker(tmp_path):
    openai = pytest.importorskip("openai")
    with (
        served(app(thinking_runner_in(tmp_path))) as address,
        openai.OpenAI(base_url=address, api_key="unused", max_retries=0) as client,
    ):
        yield client


NOT_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}


def test_what_a_model_thinks_is_beside_its_answer(thinker):
    (choice,) = thinker.chat.completions.create(model=MODEL, messages=ASK).choices
    assert (choice.message.content, choice.finish_reason) == (PARIS, "stop")
    assert choice.message.reasoning_content == THOUGHTS[0]
    (choice,) = thinker.chat.completions.create(
        model=MODEL, messages=ASK, extra_body=NOT_THINKING
    ).choices
    assert choice.message.content == PARIS
    assert "reasoning_content" not in choice.message.model_dump()


def test_what_a_model_thinks_streams_before_its_answer(thinker):
    head, *chunks, end = thinker.chat.completions.create(model=MODEL, messages=ASK, stream=True)
    deltas = [chunk.choices[0].delta.model_dump(exclude_unset=True) for chunk in chunks]
    fields = [next(iter(delta)) for delta in deltas]
    assert all(len(delta) == 1 for delta in deltas)
    assert fields == sorted(fields, reverse=True)  # reasoning_content, then content
    for name, said in (("reasoning_content", THOUGHTS[0]), ("content", PARIS)):
        assert "".join(delta.get(name, "") for delta in deltas) == said
        assert fields.count(name) > 3
    assert head.choices[0].delta.content == ""
    assert end.choices[0].finish_reason == "stop"


def test_a_served_thought_cut_short_has_no_answer(thinker):
    (choice,) = thinker.chat.completions.create(model=MODEL, messages=ASK, max_tokens=5).choices
    assert (choice.message.content, choice.finish_reason) == ("", "length")
    assert THOUGHTS[0].startswith(choice.message.reasoning_content)


def test_a_stop_string_of_a_request_ends_the_answer_and_no_thought(thinker):
    (choice,) = thinker.chat.completions.create(model=MODEL, messages=ASK, stop="파리").choices
    assert (choice.message.content, choice.finish_reason) == ("It is Paris, ", "stop")
    assert choice.message.reasoning_content == THOUGHTS[0]


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_what_a_model_thought_before_is_passed_to_its_template(thinker, tmp_path, field):
    said = [*ASK, {**DIALOGUE[1], field: "Hm"}]
    made = thinker.chat.completions.create(model=MODEL, messages=said, max_tokens=1)
    text = Text.open(tmp_path, bundle_in(tmp_path, thinking_runner_in(tmp_path).text.rules).text)
    written = text.render(said)
    assert "<think>\nHm\n</think>" in written
    assert made.usage.prompt_tokens == len(text.encode(written))


def test_the_next_turn_goes_on_from_what_the_template_left_of_the_last(thinker):
    first = thinker.chat.completions.create(model=MODEL, messages=ASK)
    answered = first.choices[0].message.model_dump(exclude_none=True)
    assert answered["reasoning_content"] == THOUGHTS[0]
    made = thinker.chat.completions.create(model=MODEL, messages=[*ASK, answered, DIALOGUE[2]])
    assert made.choices[0].message.content == "Yes."
    assert made.choices[0].message.reasoning_content == THOUGHTS[1]
    assert 0 < made.usage.prompt_tokens_details.cached_tokens < first.usage.prompt_tokens


def test_the_models_own_stop_strings_end_a_served_answer(tmp_path):
    with served(app(runner_in(tmp_path, stop_strings=("of course",)))) as address:
        body = {"model": MODEL, "messages": ASK}
        said = HTTP.post(f"{address}/chat/completions", json=body).json()["choices"][0]
    assert said["message"]["content"] == PARIS.partition("of course")[0]
    assert said["finish_reason"] == "stop"


def test_the_model_is_listed_and_found_by_its_name(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "edgekit"


def test_a_chat_is_answered(client, runner):
    answer = client.chat.completions.create(model=MODEL, messages=ASK)
    assert answer.choices[0].message.content == PARIS
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == len(runner.text.encode_chat(ASK))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_chat_streams(client):
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=ASK, stream=True, stream_options=options
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    *said, last, usage = chunks
    assert "".join(chunk.choices[0].delta.content for chunk in said) == PARIS
    assert len(said) > 5
    assert (last.choices[0].finish_reason, last.choices[0].delta.content) == ("stop", None)
    assert usage.choices == []
    assert usage.usage.completion_tokens > len(said) - 2
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_next_turn_of_a_chat_reads_only_what_is_new(client):
    client.chat.completions.create(model=MODEL, messages=ASK)
    answer = client.chat.completions.create(model=MODEL, messages=DIALOGUE[:3])
    assert answer.choices[0].message.content == "Yes."
    assert answer.usage.prompt_tokens - answer.usage.prompt_tokens_details.cached_tokens < 40


def test_text_is_completed(client, runner):
    prompt = "one two three"
    answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=5)
    assert answer.object == "text_completion"
    assert answer.choices[0].text.startswith(" four")
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 5)
    ids = runner.text.encode(prompt)
    same = client.completions.create(model=MODEL, prompt=ids, max_tokens=5)
    assert same.choices[0].text == answer.choices[0].text


def test_text_streams(client):
    stream = client.completions.create(
        model=MODEL, prompt=["one two three"], max_tokens=99, stop=["seven"], stream=True
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == " four five six "
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert all(chunk.usage is None for chunk in chunks)


def test_completion_length_defaults_to_what_openai_documents(client):
    answer = client.completions.create(model=MODEL, prompt="one two three")
    assert answer.usage.completion_tokens == 16


def test_an_answer_has_the_length_and_the_chance_it_was_asked_for(client):
    answers = [
        client.chat.completions.create(
            model=MODEL, messages=ASK, max_completion_tokens=7, temperature=50, seed=seed, top_p=0.9
        )
        for seed in (4, 4, 5)
    ]
    assert answers[0].choices[0].finish_reason == "length"
    assert answers[0].usage.completion_tokens == 7
    said = [answer.choices[0].message.content for answer in answers]
    assert said[0] == said[1] != said[2]


def test_parts_of_text_are_joined(client):
    parts = [{"type": "text", "text": QUESTION[:9]}, {"type": "text", "text": QUESTION[9:]}]
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": parts}]
    )
    assert answer.choices[0].message.content == PARIS


def test_a_stranger_to_the_model_list_is_told_which_there_is(client):
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.NotFoundError, match="no model named 'gpt-9'") as refusal:
        client.chat.completions.create(model="gpt-9", messages=ASK)
    assert refusal.value.code == "model_not_found"


def test_a_prompt_too_long_has_the_code_clients_look_for(client):
    openai = pytest.importorskip("openai")
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="context holds 512") as refusal:
            client.completions.create(model=MODEL, prompt="long " * 999, stream=stream)
        assert refusal.value.code == "context_length_exceeded"


def test_many_clients_at_once_are_answered_in_turn(url):
    openai = pytest.importorskip("openai")
    answers = []

    def ask():
        with openai.OpenAI(base_url=url, api_key="unused", max_retries=0) as client:
            stream = client.chat.completions.create(model=MODEL, messages=ASK, stream=True)
            answers.append("".join(c.choices[0].delta.content or "" for c in stream))

    threads = [threading.Thread(target=ask) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [PARIS] * 5


# What is refused, and how

REFUSED = {
    "n": 2,
    "logprobs": True,
    "top_logprobs": 3,
    "frequency_penalty": 0.5,
    "logit_bias": {"5": 1},
    "tools": [{"type": "function"}],
    "response_format": {"type": "json_object"},
    "temperature": "warm",
    "top_p": 0,
    "seed": 1.5,
    "stop": [""],
    "max_tokens": 0,
    "max_completion_tokens": 0,
    "stream": "yes",
    "messages": [],
    "tempature": 1,
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_that_cannot_be_honoured_is_named(http, name):
    body = {"model": MODEL, "messages": ASK, name: REFUSED[name]}
    response = http.post("/chat/completions", json=body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["param"].removeprefix("max_completion_") in {name, "max_tokens", "tokens"}
    assert error["type"] == "invalid_request_error"
    assert (error["param"] if name != "max_completion_tokens" else "max_tokens") in error["message"]


def test_values_that_ask_for_nothing_are_accepted():
    neutral: dict[str, object] = {
        "n": 1,
        "logprobs": None,
        "presence_penalty": 0,
        "tools": [],
        "user": "someone",
    }
    ask = Ask.chat(Fields(values={"messages": ASK, **neutral}), sampling=Sampling())
    assert ask.messages == ASK


@pytest.mark.parametrize(
    ("message", "where"),
    [
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0]"),
        ({"role": "user", "content": 3}, "messages[0].content"),
        ({"content": "hi"}, "messages[0]"),
        ("hi", "messages[0]"),
    ],
)
def test_a_message_that_is_no_text_is_refused_with_its_place(message, where):
    with pytest.raises(ApiError) as refusal:
        Ask.chat(Fields(values={"messages": [message]}), sampling=Sampling())
    assert refusal.value.param == where


def test_a_developer_speaks_as_the_system():
    fields = Fields(values={"messages": [{"role": "developer", "content": "be kind"}]})
    assert Ask.chat(fields, sampling=Sampling()).messages[0]["role"] == "system"


@pytest.mark.parametrize("prompt", [None, [], ["x", "y"], [[1], [2]], [True], {"a": 1}])
def test_a_prompt_that_is_not_one_text_is_refused(prompt):
    with pytest.raises(ApiError) as refusal:
        Ask.text(Fields(values={"prompt": prompt}), sampling=Sampling())
    assert refusal.value.param == "prompt"


@pytest.mark.parametrize("body", [b"{", b"[]", b"\xff", b"[" * 100_000, b"", b"9" * 9999])
def test_a_body_that_is_no_json_object_is_refused(http, body):
    headers = {"content-type": "application/json"}
    response = http.post("/chat/completions", content=body, headers=headers)
    assert response.status_code == 400
    assert "the body is" in response.json()["error"]["message"]


def test_other_requests_are_refused_in_the_same_shape(http):
    as_form = http.post("/chat/completions", data={"a": 1})
    too_large = http.post("/completions", json={"prompt": "x" * (MAX_BODY_BYTES + 1)})
    no_model = http.post("/completions", json={"prompt": "x"})
    bad_id = http.post("/completions", json={"model": MODEL, "prompt": [10**6]})
    surrogate = http.post(
        "/completions",
        content=json.dumps({"model": MODEL, "prompt": "\ud83d"}),
        headers={"content-type": "application/json"},
    )
    odd_name = http.post(
        "/completions",
        content=json.dumps({"model": MODEL, "prompt": "x", "\ud83d": 1}),
        headers={"content-type": "application/json"},
    )
    by_template = http.post(
        "/chat/completions",
        json={"model": MODEL, "messages": [{"role": "tool", "content": "x"}]},
    )
    responses = {
        415: as_form,
        413: too_large,
        404: http.get("/nothing"),
        405: http.get("/completions"),
    }
    assert {status: r.status_code for status, r in responses.items()} == {s: s for s in responses}
    for response in (no_model, bad_id, surrogate, odd_name, by_template):
        assert response.status_code == 400
    for response in (*responses.values(), no_model, bad_id, surrogate, odd_name, by_template):
        assert response.json()["error"]["message"]
    assert "no tools" in by_template.json()["error"]["message"]


def test_a_key_is_asked_for_when_there_is_one(runner):
    with served(app(runner, api_key="s3cret")) as url:
        statuses = [
            HTTP.get(f"{url}/models", headers=headers).status_code
            for headers in (
                {},
                {"authorization": "Bearer wrong"},
                {"authorization": "Bearer s3cret"},
            )
        ]
    assert statuses == [401, 401, 200]


def test_a_page_that_points_its_own_name_here_is_refused(runner):
    with served(app(runner, hosts=LOOPBACK_HOSTS)) as url:
        statuses = [
            HTTP.get(f"{url}/models", headers={"host": host}).status_code
            for host in ("evil.example:80", "localhost:1", "127.0.0.1", "[::1]:5", "[::1]", "")
        ]
    assert statuses == [403, 200, 200, 200, 200, 403]


# The session


@pytest.fixture
def slow(tmp_path, monkeypatch):
    """A runner that takes its time, so that one can interrupt it."""
    runner = runner_in(tmp_path, template=None)
    decode = runner.session.decode

    def decode_slowly(token):
        time.sleep(0.01)
        return decode(token)

    monkeypatch.setattr(runner.session, "decode", decode_slowly)
    return runner


def eventually_stands_still(session):
    seen = -1
    deadline = time.monotonic() + 10
    while seen != len(session.reads) and time.monotonic() < deadline:
        seen = len(session.reads)
        time.sleep(0.1)
    return len(session.reads)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_session(slow, stream):
    body = {"model": MODEL, "prompt": "one two", "max_tokens": 400, "stream": stream}
    with served(app(slow)) as url:
        with (
            contextlib.suppress(httpx.TimeoutException),
            HTTP.stream("POST", f"{url}/completions", json=body, timeout=0.3) as response,
        ):
            next(response.iter_lines())
        assert eventually_stands_still(slow.session) < 300
        body |= {"max_tokens": 2, "stream": False}
        assert HTTP.post(f"{url}/completions", json=body).json()["choices"][0]["text"]


def test_a_runtime_that_fails_mid_answer_is_reported_in_the_stream(slow, monkeypatch):
    def fail(token):
        raise ToolchainError("the runtime gave up")

    monkeypatch.setattr(slow.session, "decode", fail)
    body = {"model": MODEL, "prompt": "one two", "stream": True}
    with served(app(slow)) as url:
        lines = HTTP.post(f"{url}/completions", json=body).text.split("\n\n")
        whole = HTTP.post(f"{url}/completions", json=body | {"stream": False})
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["type"] == "server_error"
    assert "[DONE]" not in lines[-1]
    assert whole.status_code == 500
    assert whole.json()["error"]["message"] == "the runtime gave up"


# What strangers may cost


def raw(url, head):
    """Open a connection and say no more than this."""
    port = int(url.split(":")[2].split("/")[0])
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.sendall(head.encode())
    return connection


def was_dropped(connection):
    """Wait for the end of a connection on which nothing more is said."""
    try:
        return connection.recv(9) == b""
    except ConnectionResetError:
        return True


def head_of(length):
    return (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    )


@pytest.mark.parametrize(
    "request_fields",
    [{"prompt": "x" * 8_000_000}, {"prompt": "🙂" * 600_000}, {"prompt": " " * 999_999}],
)
def test_a_text_no_context_can_hold_is_refused_untokenized(
    runner, url, monkeypatch, request_fields
):
    def never(*_args, **_options):
        raise AssertionError("it was tokenized")

    monkeypatch.setattr(type(runner.text), "encode", never)
    response = HTTP.post(f"{url}/completions", json={"model": MODEL, **request_fields})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    chat = [{"role": "user", "content": request_fields["prompt"][:900_000]}]
    response = HTTP.post(f"{url}/chat/completions", json={"model": MODEL, "messages": chat})
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_a_body_announced_too_large_is_refused_before_it_comes(url):
    with raw(url, head_of(MAX_BODY_BYTES + 1)) as connection:
        assert connection.recv(99).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("head", ["", "POST /v1/comp", "GET /v1/models HTTP/1.1\r\nHost: a\r\nX: "])
def test_connections_that_say_nothing_keep_nobody_out_and_are_dropped(url, monkeypatch, head):
    monkeypatch.setattr(SERVE, "HEAD_S", 0.5)
    with contextlib.ExitStack() as silent:
        connections = [silent.enter_context(raw(url, head)) for _ in range(80)]
        assert HTTP.get(f"{url}/models").status_code == 200
        assert [was_dropped(connection) for connection in connections] == [True] * 80


def test_a_second_request_that_does_not_end_is_dropped_too(url, monkeypatch):
    monkeypatch.setattr(SERVE, "HEAD_S", 0.5)
    with raw(url, "GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n") as connection:
        said = b""
        while not said.endswith(b"}"):
            said += connection.recv(9999)
        assert said.startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /v1/mo")
        assert was_dropped(connection)


def test_an_answer_may_take_longer_than_its_request(slow, monkeypatch):
    monkeypatch.setattr(SERVE, "HEAD_S", 0.2)
    body = {"model": MODEL, "prompt": "one two", "max_tokens": 60}
    with served(app(slow)) as url:
        response = HTTP.post(f"{url}/completions", json=body)
    assert response.elapsed.total_seconds() > 0.3
    assert response.status_code == 200


def test_a_body_that_does_not_come_is_given_up(url, monkeypatch):
    monkeypatch.setattr(SERVE, "BODY_S", 0.3)
    with raw(url, head_of(99) + '{"model"') as connection:
        said = b"".join(iter(lambda: connection.recv(9999), b""))  # until it is dropped
    assert said.startswith(b"HTTP/1.1 408")
    assert b"the body did not come within 0.3 s" in said


def eventually(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_full_line_is_said_and_places_in_it_are_given_back(slow, monkeypatch):
    monkeypatch.setattr(SERVE, "MAX_WAITING", 1)
    service = Service(runner=slow, sampling=Sampling(), api_key=None, hosts=None)
    body = {"model": MODEL, "prompt": "one two", "max_tokens": 50}
    with served(_application(service)) as url:
        for stream in (True, False):
            waiting = threading.Thread(
                target=HTTP.post,
                args=[f"{url}/completions"],
                kwargs={"json": body | {"stream": stream}},
            )
            waiting.start()
            eventually(lambda: service.waiting == 1)
            refused = HTTP.post(f"{url}/completions", json=body)
            assert (refused.status_code, refused.json()["error"]["type"]) == (503, "server_error")
            assert HTTP.get(f"{url}/models").status_code == 200
            waiting.join()
            eventually(lambda: service.waiting == 0)
        assert HTTP.post(f"{url}/completions", json=body | {"n": 2}).status_code == 400
        assert service.waiting == 0


def test_bodies_on_their_way_take_only_so_much_together(runner, monkeypatch):
    monkeypatch.setattr(SERVE, "MAX_BODIES_BYTES", 1000)
    service = Service(runner=runner, sampling=Sampling(), api_key=None, hosts=None)
    body = {"model": MODEL, "prompt": "one two", "user": "x" * 99}
    with served(_application(service)) as url:
        with raw(url, head_of(950) + " " * 949):
            eventually(lambda: service.bodies_bytes == 949)
            assert HTTP.post(f"{url}/completions", json=body).status_code == 503
        eventually(lambda: service.bodies_bytes == 0)
        assert HTTP.post(f"{url}/completions", json=body).status_code == 200


def test_a_client_that_stops_reading_loses_its_turn(slow, monkeypatch):
    monkeypatch.setattr(SERVE, "SEND_S", 0.2)
    service = Service(runner=slow, sampling=Sampling(), api_key=None, hosts=None)
    body = json.dumps({"model": MODEL, "prompt": "one two", "max_tokens": 400, "stream": True})
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/completions",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    requests = [{"type": "http.request", "body": body.encode()}]
    taken = []

    async def receive():
        return requests.pop() if requests else await asyncio.Event().wait()

    async def send(message):
        taken.append(message)
        if len(taken) > 3:
            await asyncio.Event().wait()  # as uvicorn's does while the client's buffer is full

    async def ask():
        await asyncio.wait_for(_application(service)(scope, receive, send), 10)

    asyncio.run(ask())
    assert len(taken) == 4
    assert (service.waiting, service.turn.locked()) == (0, False)
    assert len(slow.session.reads) < 50


def test_a_client_that_left_before_its_text_was_read_costs_nothing(tmp_path, monkeypatch):
    runner = runner_in(tmp_path)
    read = []
    encode = type(runner.text).encode

    def read_slowly(text, prompt, **options):
        read.append(prompt)
        if prompt == "one":
            time.sleep(1)
        return encode(text, prompt, **options)

    monkeypatch.setattr(type(runner.text), "encode", read_slowly)
    with served(app(runner)) as url:

        def ask(prompt, timeout):
            with contextlib.suppress(httpx.TimeoutException):
                body = {"model": MODEL, "prompt": prompt, "max_tokens": 1}
                HTTP.post(f"{url}/completions", json=body, timeout=timeout)

        threads = [threading.Thread(target=ask, args=["one", 9])]
        threads += [threading.Thread(target=ask, args=["two", 0.2]) for _ in range(3)]
        for thread in threads:
            thread.start()
            time.sleep(0.05)
        for thread in threads:
            thread.join()
        ask("three", 9)
    assert read == ["one", "three"]


def test_unknown_options_of_a_stream_are_named(http):
    body = {"model": MODEL, "messages": ASK, "stream": True}
    known = {"include_usage": True, "include_obfuscation": False}
    assert http.post("/chat/completions", json=body | {"stream_options": known}).status_code == 200
    for options, name in (
        ({"include_use": True}, "include_use"),
        ({"include_usage": 1}, "include_usage"),
    ):
        response = http.post("/chat/completions", json=body | {"stream_options": options})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == f"stream_options.{name}"
        assert f"stream_options.{name}" in response.json()["error"]["message"]


# The verb


def test_an_address_others_can_reach_must_be_wanted(tmp_path):
    with pytest.raises(UsageError, match=r"0\.0\.0\.0 can be reached from other machines"):
        serve(tmp_path, host="0.0.0.0")  # noqa: S104


def test_others_need_a_key_unless_told_otherwise(tmp_path):
    everywhere = "0.0.0.0"  # noqa: S104
    for key in (None, ""):
        with pytest.raises(UsageError, match="other machines could use the model") as refusal:
            serve(tmp_path, host=everywhere, allow_remote=True, api_key=key)
        assert "--no-key" in refusal.value.hint
    with pytest.raises(UsageError, match="--no-key says that there is none"):
        serve(tmp_path, host=everywhere, allow_remote=True, api_key="k", no_key=True)
    for permission in ({"no_key": True}, {"api_key": "k"}):  # both get as far as the bundle
        with pytest.raises(BundleError, match="not a bundle"):
            serve(tmp_path, host=everywhere, port=0, allow_remote=True, **permission)


def test_others_may_use_this_machines_names_and_any_address(runner):
    names = {name.lower() for name in (*_names("Box.Lan", is_local=False), "api.example")}
    service = Service(
        runner=runner, sampling=Sampling(), api_key=None, hosts=names, takes_addresses=True
    )
    with served(_application(service)) as url:
        statuses = {
            host: HTTP.get(f"{url}/models", headers={"host": host}).status_code
            for host in (
                socket.gethostname(), "box.lan:80", "API.example", "192.168.1.7:8080",
                "[fe80::1]:9", "localhost", "evil.example", "192.168.1.7.evil.example:80",
                "", "x@192.168.1.7",
            )
        }  # fmt: skip
    assert list(statuses.values()) == [200] * 6 + [403] * 4


def test_an_address_others_can_reach_is_said_aloud(runner):
    service = Service(runner=runner, sampling=Sampling(), api_key=None, hosts=None)
    _, warning = _greeting(service, "0.0.0.0", 80, is_local=False)  # noqa: S104
    assert "other machines can reach it, and no API key is needed" in warning


def test_a_port_that_is_taken_is_refused(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1, port {port}"):
            serve(tmp_path, port=port)


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError) as refusal:
        serve(tmp_path)
    assert refusal.value.hint == "pip install 'edgekit[serve]'"


@pytest.mark.toolchain
@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_the_verb_serves_a_bundle_until_it_is_told_to_end(tmp_path, name, status):
    program = textwrap.dedent("""
        import signal, sys
        from pathlib import Path
        from edgekit import cli, formats
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # CI may run us with them ignored
            signal.signal(getattr(signal, name), signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from edgekit.tests.witnesses.tiny_runner import runner_in

        directory = Path(sys.argv[1])
        runner = runner_in(directory)
        runner.bundle.save()
        runner.load = lambda path, **_: runner.session
        formats.running = lambda name: runner
        try:
            cli.main(["serve", str(directory), "--port", "0"])
        finally:
            print("closed" if runner.session.is_closed else "open", file=sys.stderr)
    """)
    command = [sys.executable, "-c", program, str(tmp_path)]
    root = Path(edgekit.__file__).parents[1]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stderr
        greeting = process.stderr.readline()
        url = greeting.split()[3].rstrip(";")
        assert HTTP.get(f"{url}/models").json()["data"][0]["id"] == MODEL
        process.send_signal(getattr(signal, name))
        try:
            said = process.communicate(timeout=20)[1]
        finally:
            process.kill()  # nothing, if it has ended
        assert said.split() == ["interrupted", "closed"]
    assert process.returncode == status
