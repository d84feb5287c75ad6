"""What edgekit reads of a tokenizer.json, held against the library that it is made for."""

import json
from typing import Any

import pytest

from edgekit.errors import BundleError, UsageError
from edgekit.model.tokenizer_files import TokenizerFiles
from edgekit.tests.tiny.random_checkpoints import random_checkpoint
from edgekit.text import tokenizer_json


STEP = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
FUSED = {"type": "Sequence", "decoders": [STEP, {"type": "Fuse"}]}
MALFORMED: dict[str, list[Any]] = {
    "added_tokens": [3.5, {"a": 1}, None, [None], [{"id": "1", "content": "x"}], [{"id": 1}],
                     [{"id": -1, "content": "x"}], [{"id": True, "content": "x"}]],
    "model": [3, [], {"vocab": 3}, {"vocab": {"a": "b"}}, {"vocab": {"a": None}}, {"vocab": [1]},
              {"vocab": [["a"]]}, {"vocab": {"a": -1}}],
    "decoder": [3, "x", {"type": 3}, {}, {"type": "Sequence"}, {**FUSED, "decoders": [None]},
                {**FUSED, "decoders": [3]}, {"type": "Replace", "pattern": "x", "content": "y"},
                {"type": "Strip", "content": " "}, {"type": "Replace", "content": ""}],
    "pre_tokenizer": [7, {"type": "Sequence", "pretokenizers": "x"}, {"type": []}],
    "normalizer": [True, {"type": "Sequence", "normalizers": {}}, {"type": "Prepend"}],
    "post_processor": [[], {"type": "Sequence", "processors": [1]}],
}  # fmt: skip


@pytest.fixture
def path(tmp_path):
    random_checkpoint(tmp_path)
    return tmp_path / "tokenizer.json"


@pytest.mark.parametrize(
    ("part", "value"), [(part, value) for part, values in MALFORMED.items() for value in values]
)
def test_a_malformed_part_is_named_wherever_it_is_read(part, value, path):
    tokenizers = pytest.importorskip("tokenizers")
    path.write_text(json.dumps(json.loads(path.read_text()) | {part: value}))
    with pytest.raises(Exception):  # noqa: B017, PT011 - the library has no other
        tokenizers.Tokenizer.from_file(str(path))
    with pytest.raises(UsageError, match=part):
        TokenizerFiles.open(path.parent, config={"eos_token_id": 256})
    with pytest.raises(BundleError, match=f"{path}: {part}"):
        tokenizer_json.read(path, refusal=BundleError)


@pytest.mark.parametrize(
    "changes",
    [
        {"decoder": None, "normalizer": None, "pre_tokenizer": None, "post_processor": None},
        {"decoder": FUSED},
        {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": False}},
        {"model": {"type": "Unigram", "vocab": [["a", 0.0], ["b", -1.5]], "unk_id": 0}},
        {"added_tokens": []},
    ],
)
def test_what_the_library_reads_is_read(changes, path):
    tokenizers = pytest.importorskip("tokenizers")
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(fields))
    tokenizers.Tokenizer.from_file(str(path))
    assert tokenizer_json.read(path) == fields
