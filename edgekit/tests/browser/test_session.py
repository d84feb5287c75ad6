"""A tiny model in a real Chromium says what it says in ONNX Runtime, or why it cannot."""

import os
import signal
import threading
import time

import pytest

from edgekit import formats
from edgekit.browser.options import BrowserOptions, Limits
from edgekit.browser.session import BrowserSession, LackingError, Page
from edgekit.errors import ToolchainError, UsageError
from edgekit.run import Runner, run
from edgekit.tests.browser.conftest import CONTEXT_TOKENS, PROMPT


pytestmark = [pytest.mark.toolchain, pytest.mark.usefixtures("needs_browser")]
np = pytest.importorskip("numpy")


@pytest.fixture(scope="module")
def open_in(onnx_bundle, onnx_text):
    """Return what opens the bundle in a browser."""

    def open_session(text, **fields):
        options = BrowserOptions.parse(text)
        return BrowserSession.open(
            onnx_bundle.artifact_path, "onnx", BrowserOptions(**(vars(options) | fields)),
            text=onnx_text, context_tokens=CONTEXT_TOKENS, threads=1,
        )  # fmt: skip

    return open_session


@pytest.fixture(scope="module")
def on_gpu(open_in):
    session = open_in("browser?adapter=software")
    yield session
    session.close()


@pytest.fixture(scope="module")
def in_wasm(open_in):
    session = open_in("browser?backend=wasm")
    yield session
    session.close()


@pytest.fixture(params=["on_gpu", "in_wasm"])
def session(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def native(onnx_bundle):
    session = formats.running("onnx").load(
        onnx_bundle.artifact_path, context_tokens=CONTEXT_TOKENS, threads=1
    )
    yield session
    session.close()


def furthest(found, expected):
    return np.abs((found - found.max()) - (expected - expected.max())).max()


def test_a_page_computes_what_onnx_runtime_computes(session, native):
    session.reset()
    native.reset()
    assert furthest(session.prefill(PROMPT), native.prefill(PROMPT)) < 1e-3
    assert furthest(session.decode(9), native.decode(9)) < 1e-3
    assert furthest(session.prefill([3, 4]), native.prefill([3, 4])) < 1e-3
    assert furthest(session.all_logits(PROMPT)[20], native.all_logits(PROMPT)[20]) < 1e-3


def test_what_computed_is_counted_and_not_believed(on_gpu, in_wasm):
    on_gpu.generate(PROMPT, 2)
    in_wasm.generate(PROMPT, 2)
    assert (on_gpu.backend, in_wasm.backend) == ("webgpu", "wasm")
    assert on_gpu.page.gpu.is_software
    assert "in WebGPU (google swiftshader)" in next(on_gpu.notes())
    assert "in WebAssembly" in next(in_wasm.notes())


def test_a_timed_answer_is_the_greedy_one(session, native):
    native.reset()
    expected = [int(native.prefill(PROMPT).argmax())]
    expected += [int(native.decode(expected[-1]).argmax())]
    found = session.generate(PROMPT, 2)
    assert list(found.ids) == expected
    assert found.first_token_s > 0
    assert len(found.decode_s) == 1


def test_onnx_runtime_web_errs_with_subgroups_of_four_lanes_and_the_page_notices(on_gpu):
    """On SwiftShader, 3.4 and more in the logits of prompts from 32 tokens on; 1e-5 without."""
    assert "answers wrongly with the subgroups of this GPU" in on_gpu.note
    assert on_gpu.loaded.check.is_right  # now that they are hidden
    assert on_gpu.loaded.check.differs < 1e-3


def test_unmodified_it_errs_in_long_prompts_only(onnx_bundle, native):
    browsing = formats.browsing("onnx")
    path = onnx_bundle.artifact_path
    request = browsing.request(path, context_tokens=CONTEXT_TOKENS)
    options = BrowserOptions.parse("browser?adapter=software")
    with Page.open(path, browsing, request, options) as page:
        loaded = page.load(request, context_tokens=CONTEXT_TOKENS, threads=1, backend="webgpu")
        assert page.has_feature("subgroups")
        said = [page.generate(PROMPT[:length], 1).ids[0] for length in (16, 40)]
    right = []
    for length in (16, 40):
        native.reset()
        right.append(int(native.prefill(PROMPT[:length]).argmax()))
    assert loaded.check is not None
    assert loaded.check.differs > 1
    assert said[0] == right[0]
    assert said[1] != right[1]


@pytest.mark.parametrize(
    ("limits", "sentence"),
    [
        (
            Limits(at_most={"maxStorageBufferBindingSize": 100_000}),
            "token_embedding needs 0.1 MiB of maxStorageBufferBindingSize, this GPU has 0.1 MiB.",
        ),
    ],
)
def test_a_gpu_that_is_held_to_lower_limits_is_refused_in_the_page(open_in, limits, sentence):
    with pytest.raises(LackingError) as refusal:
        open_in("browser?backend=webgpu&adapter=software", limits=limits)
    assert str(refusal.value) == sentence


def test_without_what_it_needs_of_a_gpu_a_model_falls_back_and_says_so(open_in):
    limits = Limits(at_most={"maxStorageBufferBindingSize": 100_000})
    session = open_in("browser?adapter=software", limits=limits)
    with session:
        assert session.backend == "wasm"
        assert "maxStorageBufferBindingSize" in session.fell_back()
        assert "in WebAssembly" in next(session.notes())


def test_a_prompt_beyond_the_context_is_refused_before_the_page_is_asked(in_wasm):
    in_wasm.reset()
    with pytest.raises(UsageError, match="exceed the context of 128"):
        in_wasm.prefill([1] * 129)


def after(delay_s, work):
    timer = threading.Timer(delay_s, work)
    timer.start()
    return timer


def ask_until_it_fails(session):
    limit = time.monotonic() + 30
    while time.monotonic() < limit:
        session.generate(PROMPT, 8)
    pytest.fail("nothing failed")


@pytest.mark.parametrize(
    ("kind", "device", "sentence"),
    [
        ("GPU", "browser?adapter=software", "the GPU was lost: .+"),
        (
            "renderer",
            "browser?backend=wasm",
            "the page's process was killed, as the system does .+",
        ),
        ("browser", "browser?backend=wasm", "the browser was closed"),
    ],
)
def test_what_dies_while_it_computes_is_said_in_one_sentence(open_in, kind, device, sentence):
    limits = Limits(hidden=("subgroups", "subgroup-size-control"))
    with open_in(device, limits=limits) as session:

        def kill():
            for pid in session.page.browser.process_ids(kind):
                os.kill(pid, signal.SIGKILL)

        timer = after(0.2, kill)
        with pytest.raises(ToolchainError, match=f"^{sentence}$"):
            ask_until_it_fails(session)
        timer.join()


def test_the_verb_answers_from_a_browser_as_from_here(onnx_bundle):
    directory = onnx_bundle.directory
    here = "".join(run(directory, "Hi"))
    with Runner.open(directory, device="browser?backend=wasm") as runner:
        reply = runner.ask([{"role": "user", "content": "Hi"}], max_tokens=len(here))
        found = reply.answer.text
        assert "in WebAssembly" in runner.device_notes()[0]
    assert found[:8] == here[:8]


def test_a_format_that_no_browser_opens_is_refused():
    with pytest.raises(UsageError, match="no browser opens executorch bundles") as refusal:
        formats.browsing("executorch")
    assert refusal.value.hint == "browsers open gguf, mlc, onnx"
