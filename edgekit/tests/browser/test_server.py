import urllib.error
import urllib.request

import pytest

from edgekit.browser.server import Site, serving


@pytest.fixture
def server(tmp_path):
    (tmp_path / "secret").write_text("no")
    files = tmp_path / "files"
    files.mkdir()
    (files / "model.bin").write_bytes(b"weights")
    site = Site(
        pages={"/": ("text/html", b"<p>")}, roots={"/files/": files},
        connects_to=("https://libraries.example",),
    )  # fmt: skip
    with serving(site) as server:
        yield server


def get(server, path):
    return urllib.request.urlopen(  # noqa: S310 - of our own server
        server.url.rstrip("/") + path, timeout=5
    )


@pytest.mark.parametrize(("path", "body"), [("/", b"<p>"), ("/files/model.bin", b"weights")])
def test_what_is_served_may_share_memory_between_threads(server, path, body):
    with get(server, path) as answer:
        assert answer.read() == body
        assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"


def test_a_page_may_ask_the_server_and_those_named_and_nobody_else(server):
    with get(server, "/") as answer:
        policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'self'")
    assert policy.endswith("connect-src 'self' blob: data: https://libraries.example")


@pytest.mark.parametrize("path", ["/files/../secret", "/files/%2e%2e/secret", "/secret", "/files/"])
def test_nothing_else_is_served(server, path):
    with pytest.raises(urllib.error.HTTPError) as refusal:
        get(server, path)
    assert refusal.value.code == 404
    refusal.value.close()
