"""Where transformers reads text otherwise than tokenizer.json, the file counts and that is said."""

import json

import pytest

from edgekit import cache, installed
from edgekit.errors import MissingDependencyError, UsageError
from edgekit.formats.gguf.pretokenizers import PRE_TOKENIZERS, to_tokenizer_json
from edgekit.model.tokenizer_files import TokenizerFiles
from edgekit.source import transformers_tokenizer
from edgekit.source.transformers_tokenizer import taken
from edgekit.tests.needs import needs
from edgekit.tests.tiny import gguf_vocabularies
from edgekit.text import corpus


pytestmark = [needs("transformers", "tokenizers"), pytest.mark.toolchain]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))


def change(files, **settings):
    """Write fields of tokenizer_config.json, as other programs save it."""
    path = files.tokenizer_json.with_name("tokenizer_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return TokenizerFiles.open(path.parent, config={})


def llama2(directory, **settings):
    """A tokenizer as Llama 2 and TinyLlama have it; transformers makes a Metaspace of it."""
    files = gguf_vocabularies.sentencepiece(directory, space="every")
    return change(files, tokenizer_class="LlamaTokenizerFast", **settings)


def distilled(directory):
    """A tokenizer as DeepSeek-R1-Distill-Qwen has it: it does not compose, Qwen2Tokenizer does."""
    cuts = to_tokenizer_json(PRE_TOKENIZERS["stablelm2"])
    files = gguf_vocabularies.byte_level(directory, cuts)
    (directory / "config.json").write_text('{"model_type": "qwen2"}')
    return change(files, tokenizer_class="LlamaTokenizerFast")


def auto_ids(directory, texts):
    """Return what AutoTokenizer itself says."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)(list(texts), add_special_tokens=False).input_ids


@pytest.mark.parametrize("make", [llama2, distilled])
def test_the_file_counts_and_where_transformers_differs_is_said(make, tmp_path):
    files = make(tmp_path / "model")
    read = taken(files, "file")
    assert read.tokenizer_json == files.tokenizer_json
    (note,) = read.notes
    assert "tokenizer.json counts" in note
    assert "--tokenizer transformers takes its reading" in note


@pytest.mark.parametrize("make", [llama2, distilled])
def test_the_lines_that_differ_are_those_of_autotokenizer(make, tmp_path):
    files = make(tmp_path / "model")
    lines = corpus.lines()
    theirs = auto_ids(tmp_path / "model", lines)
    ours = gguf_vocabularies.reference_ids(tmp_path / "model", lines)
    wrong = [line for line, a, b in zip(lines, theirs, ours, strict=True) if a != b]
    assert wrong
    (note,) = taken(files, "file").notes
    assert f"{len(wrong)} of {len(lines)} lines" in note
    assert repr(wrong[0]) in note


@pytest.mark.parametrize("make", [llama2, distilled])
def test_transformers_reading_is_a_tokenizer_json_that_says_the_same(make, tmp_path):
    read = taken(make(tmp_path / "model"), "transformers")
    texts = [*corpus.lines(), *gguf_vocabularies.TEXTS, gguf_vocabularies.CHAT]
    written = gguf_vocabularies.reference_ids(read.tokenizer_json.parent, texts)
    assert written == auto_ids(tmp_path / "model", texts)
    assert written == auto_ids(read.tokenizer_json.parent, texts)
    assert "text is read as transformers" in read.notes[0]


def test_a_tokenizer_that_transformers_reads_as_it_is_gets_no_note(tmp_path):
    files = gguf_vocabularies.sentencepiece(tmp_path / "model", space="every")
    assert taken(files, "file").notes == ()
    read = taken(files, "transformers")
    assert read.tokenizer_json == files.tokenizer_json
    assert "reads tokenizer.json as it is" in read.notes[0]


def test_a_token_that_only_the_settings_know_is_said(tmp_path):
    """transformers adds it behind the last id, where the model has no row or another token."""
    files = gguf_vocabularies.sentencepiece(tmp_path / "model", space="every")
    files = change(files, pad_token="<pad>")  # noqa: S106 - no password
    (note,) = taken(files, "file").notes
    assert "lines with an added token, 'a <pad> b" in note


def test_what_no_tokenizer_json_can_say_is_not_offered(tmp_path):
    """With split_special_tokens, transformers cuts even a chat template's own into letters."""
    files = gguf_vocabularies.sentencepiece(tmp_path / "model", space="every")
    files = change(files, split_special_tokens=True)
    (note,) = taken(files, "file").notes
    assert "reads otherwise" in note
    assert "--tokenizer" not in note
    with pytest.raises(UsageError, match=r"no tokenizer\.json can say what it does"):
        taken(files, "transformers")


def test_a_tokenizer_that_transformers_cannot_read_is_read_by_its_file(tmp_path):
    files = gguf_vocabularies.sentencepiece(tmp_path / "model", space="every")
    files = change(files, auto_map={"AutoTokenizer": ["own.Slow", "own.Fast"]})
    (note,) = taken(files, "file").notes
    assert "cannot read this tokenizer" in note
    with pytest.raises(UsageError, match="has no tokenizer as transformers reads it"):
        taken(files, "transformers")


def test_transformers_is_asked_once_for_a_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_ANSWERS", {})
    files = llama2(tmp_path / "model")
    first = taken(files, "file").notes
    monkeypatch.setattr(transformers_tokenizer, "_child", lambda path: 1 / 0)
    monkeypatch.setattr(cache, "_ANSWERS", {})  # as in another process
    assert taken(files, "file").notes == first
    with pytest.raises(ZeroDivisionError):  # the settings count too
        taken(change(files, legacy=False), "file")


def test_an_answer_that_did_not_come_is_asked_for_again(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_ANSWERS", {})
    files = llama2(tmp_path / "model")
    with monkeypatch.context() as patch:
        patch.setattr(transformers_tokenizer, "_TIMEOUT_S", 0.01)
        (note,) = taken(files, "file").notes
    assert "cannot read this tokenizer" in note
    assert "no answer within 0.01 s" in note
    assert "reads otherwise" in taken(files, "file").notes[0]


def test_without_transformers_the_note_is_absent_and_its_reading_refused(tmp_path, monkeypatch):
    files = llama2(tmp_path / "model")
    monkeypatch.setattr(installed, "missing", lambda *packages: ["transformers"])
    assert taken(files, "file").notes == ()
    with pytest.raises(MissingDependencyError, match="--tokenizer transformers needs transformers"):
        taken(files, "transformers")


def test_a_reading_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(UsageError, match="tokenizer = 'slow', expected 'file' or 'transformers'"):
        taken(llama2(tmp_path / "model"), "slow")
