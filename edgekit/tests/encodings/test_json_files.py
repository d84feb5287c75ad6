"""No file that decides something may say it twice, and one reader sees to that."""

import ast
import json
import struct
import time
from pathlib import Path

import pytest

import edgekit
from edgekit.bundle.goldens import GOLDENS, Goldens
from edgekit.bundle.manifest import MANIFEST, Bundle
from edgekit.encodings.json_files import parse, parse_object, read_object, read_object_if_there
from edgekit.errors import BundleError, EdgekitError, UsageError
from edgekit.formats.mlc import chat_config, names, shards, tokenizer_info
from edgekit.formats.onnx import genai_text
from edgekit.measuring.measurement import Measurement
from edgekit.model import card, chat_templates
from edgekit.model.tokenizer_files import TokenizerFiles, added_tokens
from edgekit.server.openai_api import ApiError, Fields
from edgekit.source.adapters import adapter_config
from edgekit.source.checkpoint import Checkpoint, read_safetensors


PACKAGE = Path(edgekit.__file__).parent
TWICE = '{"a": 1, "b": {"eos_token_id": 1, "eos_token_id": 2}}'
# Where a module reads what no file holds: its own children, and a library's state.
ELSEWHERE = {
    "browser/devtools.py",  # from a browser of our own
    "cache.py",  # what it wrote itself
    "encodings/json_files.py",
    "formats/executorch/tokenizer.py",  # to and from a child of our own
    "formats/gguf/pretokenizers.py",  # from a child of our own
    "formats/gguf/tokenizer_probe.py",  # in a child of our own
    "measuring/measure.py",  # from a child of our own
    "measuring/report.py",  # what it wrote itself
    "model/card.py",  # a quoted string of YAML
    "runtime/limited.py",  # to and from a child of our own
    "text/tokenizer.py",  # the state of a decoder of tokenizers
}


@pytest.mark.parametrize("text", [r'"\ud800"', r'{"a": ["\uDFFF x"]}', r'{"\ud83d": 1}',
                                  r'"\ude00\ud83d"'])  # fmt: skip
def test_half_a_character_is_refused(text):
    assert json.loads(text)  # Python's own reader makes a text of it that nothing can write
    with pytest.raises(ValueError, match="surrogate"):
        parse(text)


@pytest.mark.parametrize(("text", "value"), [(r'"\ud83d\ude00"', "😀"), (r'"\\ud800"', r"\ud800")])
def test_a_pair_of_escapes_and_the_letters_of_one_are_text(text, value):
    assert parse(text) == value


def read_header(directory):
    content = TWICE.encode()
    path = directory / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(content)) + content)
    return dict(read_safetensors(path))


def tokenizer_files(directory):
    return TokenizerFiles.open(directory, config={})


READERS = {
    "config.json": Checkpoint.open,
    "generation_config.json": tokenizer_files,
    "generation_config.json for sampling": card.read_sampling,
    "tokenizer_config.json": tokenizer_files,
    "special_tokens_map.json": tokenizer_files,
    "tokenizer.json": lambda directory: added_tokens(directory / "tokenizer.json"),
    "tokenizer.json for MLC": lambda directory: tokenizer_info.read(directory / "tokenizer.json"),
    "tokenizer.json for GenAI": lambda directory: genai_text.notes(directory / "tokenizer.json"),
    "adapter_config.json": adapter_config.read,
    "model.safetensors.index.json": lambda directory: names._index(
        directory / "model.safetensors.index.json"
    ),
    "chat_template.json": tokenizer_files,
    "processor_config.json": tokenizer_files,
    "chat_template.json of a user's own": lambda directory: chat_templates.of_file(
        directory / "chat_template.json"
    ),
    shards.CACHE: lambda directory: shards.read_json(directory / shards.CACHE),
    chat_config.NAME: lambda directory: chat_config.read(directory / chat_config.NAME),
    MANIFEST: Bundle.load,
    GOLDENS: Goldens.load,
}


@pytest.mark.parametrize("file", READERS)
def test_a_key_that_is_there_twice_is_refused_in_every_file(file, tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": []}')
    (tmp_path / file.partition(" ")[0]).write_text(TWICE)
    with pytest.raises(EdgekitError, match="the key 'eos_token_id' is there twice") as refusal:
        READERS[file](tmp_path)
    assert isinstance(refusal.value, UsageError | BundleError)


def test_a_key_that_is_there_twice_is_refused_in_a_header_of_weights(tmp_path):
    with pytest.raises(UsageError, match="the key 'eos_token_id' is there twice"):
        read_header(tmp_path)


def test_a_key_that_is_there_twice_is_refused_in_a_measurement():
    with pytest.raises(UsageError, match="the key 'eos_token_id' is there twice"):
        Measurement.from_json(TWICE)


def test_a_key_that_is_there_twice_is_refused_in_a_request():
    with pytest.raises(ApiError, match="the key 'eos_token_id' is there twice"):
        Fields.parse(TWICE.encode())


def test_only_one_module_parses_what_a_file_holds():
    parsing = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if "tests" not in path.relative_to(PACKAGE).parts
        for text in [path.read_text(encoding="utf-8")]
        if "json.load" in text  # which is faster than to parse it
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in {"json.loads", "json.load"}
    }
    assert parsing == ELSEWHERE


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"), ("[1]", "holds a list"), ("null", "holds a NoneType"),
        ("[" * 100_000, "nested too deeply"), (b'{"a": "\xff"}', "can't decode"),
        ('{"a": 1}'.encode("utf-16"), "is not JSON"), ("\ufeff{}", "is not JSON"),
    ],
)  # fmt: skip
def test_what_is_not_an_object_in_utf8_is_refused_with_its_origin(text, said):
    with pytest.raises(BundleError, match=said) as refusal:
        parse_object(text, origin="x.json", refusal=BundleError, hint="copy it again")
    assert str(refusal.value).startswith("x.json ")
    assert refusal.value.hint == "copy it again"


def test_a_file_that_is_missing_or_a_directory_is_refused(tmp_path):
    with pytest.raises(UsageError, match="is missing"):
        read_object(tmp_path / "none.json")
    with pytest.raises(BundleError, match="is a directory"):
        read_object(tmp_path, refusal=BundleError)
    assert read_object_if_there(tmp_path / "none.json") == {}


@pytest.mark.slow
def test_looking_for_repeated_keys_takes_no_longer_than_the_parsing():
    text = json.dumps({f"token {index}": index for index in range(250_000)})

    def seconds(read):
        started = time.thread_time()
        read(text)
        return time.thread_time() - started

    both = [(seconds(parse), seconds(json.loads)) for _ in range(9)]  # 1.2 on a quiet machine
    assert min(ours for ours, _ in both) < 2 * min(theirs for _, theirs in both)
