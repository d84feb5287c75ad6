"""Real vocabularies, held to llama.cpp's own vectors and to the tokenizers library."""

import json
import shutil
import unicodedata

import pytest

from edgekit.formats.gguf import layout
from edgekit.formats.gguf.pretokenizers import find_pre, known_pre_tokenizer, write_vocabulary
from edgekit.formats.gguf.vocabulary import read_vocabulary
from edgekit.model.tokenizer_files import TokenizerFiles
from edgekit.source.gguf_tokenizer import write_tokenizer
from edgekit.source.transformers_tokenizer import taken
from edgekit.tests.needs import needs
from edgekit.tests.tiny.gguf_vocabularies import reference_ids
from edgekit.tests.witnesses import real_vocabularies
from edgekit.text import corpus


pytestmark = [
    pytest.mark.toolchain, pytest.mark.slow, needs("llama_cpp", "tokenizers", "transformers")
]  # fmt: skip

LLAMA_CPPS = (
    *("command-r", "falcon", "gpt-2", "llama-bpe", "llama-spm", "mpt", "phi-3", "qwen2", "qwen35"),
    *("refact", "starcoder"),
)
# tokenizer.json files whose vocabulary llama.cpp has too, under another name.
ALSO_LLAMA_CPPS = {"llama3": "llama-bpe", "llama3_1": "llama-bpe", "qwen3": "qwen2"}
OTHERS = ("llama2", "gemma3", "deepseek_v3", "gptoss")


def opened(name, directory, *, model_type=None):
    """Return the files of a real tokenizer, in a directory that says which type of model it is."""
    shutil.copytree(real_vocabularies.tokenizer_files(name), directory)
    if model_type:
        (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    return TokenizerFiles.open(directory, config={"eos_token_id": 1})


def llama_cpp_ids(files, path, texts):
    """Return what llama.cpp makes of texts with the vocabulary that edgekit writes."""
    from edgekit.formats.gguf.runtime import runtime_ids

    pre = find_pre(files, corpus=corpus.lines())
    fields = json.loads(files.tokenizer_json.read_bytes())
    ids = {*fields["model"]["vocab"].values(), *(token["id"] for token in fields["added_tokens"])}
    write_vocabulary(path, read_vocabulary(files, vocabulary_tokens=1 + max(ids), pre=pre))
    return runtime_ids(path, list(texts))


@pytest.mark.parametrize("name", LLAMA_CPPS)
def test_a_vocabulary_of_llama_cpp_is_read_as_its_own_vectors_say(name, tmp_path):
    known = real_vocabularies.vectors(name)
    metadata = layout.read(known.gguf).metadata
    write_tokenizer(metadata, tmp_path)
    found = reference_ids(tmp_path, known.texts)
    pre = known_pre_tokenizer(metadata.get("tokenizer.ggml.pre", "default"))
    composes = pre is not None and pre.composes  # which the model does, and llama.cpp does not
    compared = [
        index
        for index, text in enumerate(known.texts)
        if not composes or unicodedata.normalize("NFC", text) == text
    ]
    assert len(compared) >= 46
    assert [found[index] for index in compared] == [known.ids[index] for index in compared]


@pytest.mark.parametrize("name", ALSO_LLAMA_CPPS)
def test_the_file_and_what_is_written_from_it_give_llama_cpps_own_ids(name, tmp_path):
    files = opened(name, tmp_path / "model")
    known = real_vocabularies.vectors(ALSO_LLAMA_CPPS[name])
    assert reference_ids(tmp_path / "model", known.texts) == known.ids
    assert llama_cpp_ids(files, tmp_path / "v.gguf", known.texts) == known.ids


@pytest.mark.parametrize("name", OTHERS)
def test_llama_cpp_reads_a_real_vocabulary_as_its_file_does(name, tmp_path):
    files = opened(name, tmp_path / "model")
    lines = corpus.lines()[::4]  # llama.cpp takes seconds for DeepSeek's cuts
    found = llama_cpp_ids(files, tmp_path / "v.gguf", lines)
    assert found == reference_ids(tmp_path / "model", lines)


@pytest.mark.parametrize(
    ("name", "model_type", "differing"),
    [("llama2", "llama", 11), ("llama3", "llama", 0), ("qwen3", "qwen3", 0),
     ("deepseek_v3", "qwen2", None)],
)  # fmt: skip
def test_where_transformers_reads_otherwise_is_told(name, model_type, differing, tmp_path):
    from transformers import AutoTokenizer

    files = opened(name, tmp_path / "model", model_type=model_type)
    lines = corpus.lines()
    theirs = AutoTokenizer.from_pretrained(tmp_path / "model")(lines, add_special_tokens=False)
    ours = reference_ids(tmp_path / "model", lines)
    counted = sum(a != b for a, b in zip(theirs["input_ids"], ours, strict=True))
    assert differing in (counted, None)
    notes = taken(files, "file").notes
    assert [f"{counted} of {len(lines)} lines" in note for note in notes] == [True] * bool(counted)


def test_llama_2_as_transformers_reads_it_is_what_it_says(tmp_path):
    from transformers import AutoTokenizer

    read = taken(opened("llama2", tmp_path / "model", model_type="llama"), "transformers")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "model")
    lines = corpus.lines()
    expected = theirs(lines, add_special_tokens=False)["input_ids"]
    assert reference_ids(read.tokenizer_json.parent, lines) == expected
    assert reference_ids(tmp_path / "model", lines) != expected
