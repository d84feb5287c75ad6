"""A padding token that training added behind the last row is left out of every format."""

import json
from dataclasses import replace

import pytest

from edgekit.errors import UsageError
from edgekit.formats import BuildRequest
from edgekit.formats.gguf.vocabulary import read_vocabulary
from edgekit.formats.mlc import RECIPES as MLC_RECIPES
from edgekit.formats.mlc import chat_config
from edgekit.formats.mlc import writing as mlc_writing
from edgekit.formats.onnx import clients
from edgekit.formats.onnx.tensor_types import RECIPES as ONNX_RECIPES
from edgekit.model.tokenizer_files import TokenizerFiles
from edgekit.source.opening import open_checkpoint
from edgekit.source.writer import write_checkpoint
from edgekit.tests.needs import needs
from edgekit.tests.tiny.random_checkpoints import random_checkpoint


pytestmark = needs("numpy", "tokenizers", "jinja2")
ROWS = 257


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def add_token(tokenizer_json, **fields):
    added = json.loads(tokenizer_json.read_text())["added_tokens"]
    edit(tokenizer_json, added_tokens=[*added, added[0] | fields])


@pytest.fixture
def padded(tmp_path):
    """A model whose padding token was added and whose embedding was not resized."""
    made = random_checkpoint(tmp_path)
    directory = write_checkpoint(made, tmp_path / "model")
    add_token(directory / "tokenizer.json", id=ROWS, content="<pad>")
    edit(directory / "tokenizer_config.json", pad_token="<pad>")  # noqa: S106 - no password
    edit(directory / "config.json", pad_token_id=ROWS)
    said = {"eos_token_id": 256, "pad_token_id": ROWS, "bos_token_id": -1}
    (directory / "generation_config.json").write_text(json.dumps(said))
    return open_checkpoint(directory)


def test_it_is_said_and_no_name_is_left_for_it(padded):
    assert "pad_token '<pad>' is left out" in padded.text.notes[0]
    assert "pad_token" not in padded.text.special_tokens


def test_a_gguf_file_names_none(padded):
    keys = read_vocabulary(padded.text, vocabulary_tokens=ROWS, pre="gpt-2")
    assert "tokenizer.ggml.padding_token_id" not in keys


def test_no_client_of_an_onnx_file_is_told_one(padded):
    found = clients.transformers_files(padded, ONNX_RECIPES["F32"], data_files=1)
    assert "pad_token_id" not in found["config.json"]
    assert "pad_token_id" not in found["generation_config.json"]
    assert "bos_token_id" not in found["generation_config.json"]
    genai = clients.genai_config(padded, "model.onnx", context_tokens=32)["model"]
    assert genai["pad_token_id"] == genai["eos_token_id"][0] == 256


def test_mlc_is_told_none_and_samples_only_what_has_a_row(padded):
    found = chat_config.build(padded, "q4f16_1", context_tokens=32, conv_template={})
    assert found["pad_token_id"] < ROWS
    assert found["active_vocab_size"] == ROWS


def test_a_token_that_mlc_would_meet_twice_is_refused_in_the_plan(tmp_path):
    made = random_checkpoint(tmp_path)
    add_token(tmp_path / "tokenizer.json", id=ROWS)
    twice = replace(made, text=TokenizerFiles.open(tmp_path, config={"eos_token_id": 256}))
    request = BuildRequest(recipe=next(iter(MLC_RECIPES.values())), context_tokens=32)
    with pytest.raises(UsageError, match=r"adds the token '<\|end\|>' twice"):
        mlc_writing.lay_out(twice, request)
