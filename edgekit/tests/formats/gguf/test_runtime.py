"""What is llama.cpp's own in its `Session`: its refusals and its tokenizer."""

import pytest

from edgekit import formats
from edgekit.doctor import _tiny_checkpoint
from edgekit.errors import BundleError, ToolchainError, UsageError
from edgekit.formats import BuildRequest
from edgekit.formats.gguf import runtime, writing
from edgekit.formats.gguf.runtime import BATCH_TOKENS, GgufSession
from edgekit.tests.needs import needs


pytestmark = [pytest.mark.toolchain, needs("llama_cpp", "tokenizers")]
np = pytest.importorskip("numpy")

CONTEXT_TOKENS = BATCH_TOKENS + 20  # two batches
VOCABULARY_TOKENS = 257
IDS = [72, 101, 108, 108, 111, 220, 4, 9]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    fmt = formats.get("gguf")
    checkpoint = _tiny_checkpoint(directory)
    return directory / writing.convert(
        checkpoint, BuildRequest(recipe=fmt.RECIPES["F32"]), directory, progress=lambda _: None
    )


@pytest.fixture
def session(gguf):
    session = GgufSession(gguf, context_tokens=CONTEXT_TOKENS, threads=1)
    yield session
    session.close()


class Deaf:
    """Stands where llama.cpp is, and lets nothing run."""

    def __getattr__(self, name):
        pytest.fail(f"{name} ran")


def test_a_prompt_beyond_the_context_is_refused_before_anything_runs(session, monkeypatch):
    session.prefill(IDS)
    with monkeypatch.context() as patch:
        patch.setattr(session, "_llama", Deaf())
        with pytest.raises(UsageError) as refusal:
            session.prefill([1] * (CONTEXT_TOKENS - len(IDS) + 1))
    assert str(refusal.value) == "8 cached and 269 new tokens exceed the context of 276"
    assert "--context" in refusal.value.hint
    session.prefill([1] * (CONTEXT_TOKENS - len(IDS)))  # exactly full is full


def test_a_token_beyond_the_context_is_refused_too(session, monkeypatch):
    session.prefill([1] * CONTEXT_TOKENS)
    monkeypatch.setattr(session, "_llama", Deaf())
    with pytest.raises(UsageError, match="276 cached and 1 new tokens"):
        session.decode(1)
    monkeypatch.undo()


def test_a_context_of_nothing_is_refused_with_the_reason_alone(gguf):
    with pytest.raises(ToolchainError, match="cannot hold 0 tokens") as refusal:
        GgufSession(gguf, context_tokens=0, threads=1)
    assert "--context" in refusal.value.hint
    assert refusal.value.log.startswith("llama_init_from_model: ")


@pytest.mark.parametrize("threads", [-5, 0, 100_000])
def test_threads_that_would_end_the_process_are_refused(gguf, threads):
    with pytest.raises(UsageError, match=f"{threads} threads are not possible"):
        GgufSession(gguf, context_tokens=16, threads=threads)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all" * 10])
def test_a_file_that_is_none_is_refused_with_the_reason_of_llama_cpp(tmp_path, content):
    path = tmp_path / "garbage.gguf"
    path.write_bytes(content)
    with pytest.raises(BundleError) as refusal:
        GgufSession(path, context_tokens=16, threads=1)
    assert f"llama.cpp refuses {path}: " in str(refusal.value)
    assert "no reason given" not in str(refusal.value)


def test_a_truncated_file_is_refused_with_its_own_reason_only(gguf, tmp_path):
    for name, content in (("first", b"GGUF"), ("second", gguf.read_bytes()[:-5000])):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BundleError):
        GgufSession(tmp_path / "first", context_tokens=16, threads=1)
    with pytest.raises(BundleError, match="not within the file bounds") as refusal:
        GgufSession(tmp_path / "second", context_tokens=16, threads=1)
    assert "magic" not in str(refusal.value)
    assert "first" not in str(refusal.value)


# What stands around the session


def test_the_format_loads_a_session(gguf):
    session = formats.running("gguf").load(gguf, context_tokens=16, threads=1)
    assert isinstance(session, GgufSession)
    assert session.context_tokens == 16
    session.close()


def test_llama_cpps_tokenizer_reads_special_tokens(gguf):
    assert runtime.runtime_ids(gguf, ["", "!", "!<|end|>!"]) == [[], [0], [0, 256, 0]]


def test_a_text_has_at_least_one_token_per_letter_here(gguf):
    (ids,) = runtime.runtime_ids(gguf, ["hé🌊\n\0x"])
    assert len(ids) == len("hé🌊\n\0x".encode())  # this tokenizer reads single bytes
