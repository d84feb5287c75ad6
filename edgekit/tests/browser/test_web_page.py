"""The page of a bundle, in a real Chromium: it loads the model, or says what is missing."""

import contextlib
import json
import shutil
import time

import pytest

from edgekit.browser import chromium, packages, web_page
from edgekit.browser.server import serving
from edgekit.formats.onnx import browsing


pytestmark = [pytest.mark.toolchain, pytest.mark.usefixtures("needs_browser")]


class Visit:
    """A page in a browser."""

    def __init__(self, browser):
        self.browser = browser

    def evaluate(self, expression):
        answer = self.browser.call(
            "Runtime.evaluate",
            {"expression": expression, "awaitPromise": True, "returnByValue": True},
        )
        return answer["result"].get("value")

    def state(self, *, after=("Loading", "Starting"), timeout_s=90):
        """Return what the page says once it no longer loads."""
        limit, text = time.monotonic() + timeout_s, ""
        while time.monotonic() < limit:
            text = self.evaluate("document.querySelector('#state')?.textContent") or "Loading"
            if not text.startswith(after) and " of " not in text:
                return text
            time.sleep(0.1)
        raise AssertionError(text)

    def answer(self, text):
        self.evaluate(
            f"document.querySelector('textarea').value = {json.dumps(text)};"
            "document.querySelector('form').requestSubmit()"
        )
        self.evaluate(
            "new Promise((go) => { const look = () => document.querySelector('button').disabled "
            "? setTimeout(look, 50) : go(); look(); })"
        )
        return self.evaluate("document.querySelector('.assistant').textContent")


@contextlib.contextmanager
def visit(directory, format="onnx", *, script="", flags=()):
    site = web_page.site(directory, format)
    assert site is not None
    flags = [chromium.reaching_only(()), *flags]
    with (
        serving(site) as server,
        chromium.running(flags=flags, on_event=lambda *_: None) as browser,
    ):
        browser.call("Page.enable")
        browser.call("Page.addScriptToEvaluateOnNewDocument", {"source": script})
        browser.call("Page.navigate", {"url": server.url})
        yield Visit(browser)


NO_GPU = "Object.defineProperty(Navigator.prototype, 'gpu', { get: () => undefined });"
LITTLE_ROOM = "StorageManager.prototype.estimate = async () => ({ quota: 1000, usage: 900 });"


def test_the_page_says_what_the_browser_lacks_and_answers_all_the_same(onnx_bundle):
    with visit(onnx_bundle.directory, script=NO_GPU) as page:
        assert page.state() == (
            "Ready, in WebAssembly. This browser has no WebGPU here: take a current one, and "
            "https or localhost."
        )
        assert page.answer("Hi")
        assert page.evaluate("crossOriginIsolated")


def test_the_page_finds_that_subgroups_err_and_does_without(onnx_bundle):
    with visit(onnx_bundle.directory, flags=[chromium.SOFTWARE_ADAPTER]) as page:
        page.state()
        limit = time.monotonic() + 60
        while "subgroups" not in page.state() and time.monotonic() < limit:
            time.sleep(0.2)  # it loads itself again
        assert page.state() == (
            "Ready, on the GPU. Its subgroups are not used: with them the runtime answered wrongly."
        )


def test_a_browser_without_room_is_not_sent_the_model(onnx_bundle):
    with visit(onnx_bundle.directory, script=NO_GPU + LITTLE_ROOM) as page:
        assert page.state().startswith("The model takes 1 MB, and this browser lets the page keep ")
        asked = page.evaluate("performance.getEntriesByType('resource').map(({ name }) => name)")
    assert asked
    assert not [name for name in asked if "onnx_data" in name]


def test_a_page_without_its_runtime_says_so(onnx_bundle, tmp_path):
    copy = tmp_path / "bundle"
    shutil.copytree(onnx_bundle.directory, copy)
    index = (copy / web_page.INDEX).read_text()
    (copy / web_page.INDEX).write_text(index.replace("node_modules", "not_there"))
    with visit(copy) as page:
        assert page.state() == (
            "The runtime is missing: this page's source says how to put it here."
        )
    assert f"npm install --ignore-scripts {browsing.PACKAGES[0]}" in index


def test_a_site_has_the_runtime_beside_the_bundle(onnx_bundle):
    site = web_page.site(onnx_bundle.directory, "onnx")
    assert site is not None
    file = site.file("/node_modules/onnxruntime-web/dist/ort.webgpu.bundle.min.mjs")
    assert file is not None
    assert file.is_relative_to(packages.directory(browsing.PACKAGES[0]))
    assert site.file("/manifest.json") == onnx_bundle.directory / "manifest.json"
    assert web_page.site(onnx_bundle.directory, "executorch") is None
