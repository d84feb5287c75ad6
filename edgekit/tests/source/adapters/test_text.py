import json
import re
from typing import Any

import pytest

from edgekit.encodings import protobuf
from edgekit.errors import UsageError
from edgekit.source.adapters import text as adapter_text
from edgekit.tests.tiny.voices import speak
from edgekit.text.tokenizer import open_tokenizer


tokenizers = pytest.importorskip("tokenizers")

CALL = "<call>x</call> and <call> y </call>"
NEW = ("<call>", "</call>")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return speak(tmp_path_factory.mktemp("qwen") / "base", "qwen2", temperature=0.7, top_p=0.8)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return speak(tmp_path_factory.mktemp("llama") / "base", "tinyllama")


def write(directory, name, fields):
    directory.mkdir(parents=True, exist_ok=True)
    text = fields if isinstance(fields, str) else json.dumps(fields)
    (directory / name).write_text(text, encoding="utf-8")


def tokenizer_of(base):
    return json.loads(base.text.tokenizer_json.read_text())


def next_id(base):
    return open_tokenizer(base.text.tokenizer_json).get_vocab_size()


def decoder(base, *new, **attributes):
    """Return what tokenizer_config.json says about added tokens, with new ones after the base's."""
    known = {str(it["id"]): {k: v for k, v in it.items() if k != "id"}
             for it in tokenizer_of(base)["added_tokens"]}  # fmt: skip
    plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False,
             "special": False} | attributes  # fmt: skip
    first = next_id(base)
    return known | {str(first + n): {"content": it, **plain} for n, it in enumerate(new)}


def write_slow(directory, base, *new, tokenizer_class="Qwen2Tokenizer"):
    """Write the files of a slow byte-level tokenizer, as version 4 saved them."""
    fields = tokenizer_of(base)
    merges = (it if isinstance(it, str) else " ".join(it) for it in fields["model"]["merges"])
    write(directory, "vocab.json", fields["model"]["vocab"])
    write(directory, "merges.txt", "\n".join(["#version: 0.2", *merges, ""]))
    write(directory, "tokenizer_config.json", {
        "tokenizer_class": tokenizer_class, "added_tokens_decoder": decoder(base, *new),
        "eos_token": base.text.special_tokens["eos_token"],
        "pad_token": base.text.special_tokens["eos_token"],
    })  # fmt: skip


def merged(base, directory):
    return adapter_text.merge(base.text, directory, model=base.directory)


def ids(found, text):
    return open_tokenizer(found.files.tokenizer_json).encode(text, add_special_tokens=False).ids


def refusal(base, directory):
    with pytest.raises(UsageError) as refused:
        merged(base, directory)
    return str(refused.value)


@pytest.mark.parametrize("source", ["added_tokens_decoder", "added_tokens.json"])
def test_new_tokens_without_a_tokenizer_json_are_put_over_the_bases(qwen, tmp_path, source):
    first = next_id(qwen)
    if source == "added_tokens.json":
        write(tmp_path, source, {"</call>": first + 1, "<call>": first})
    else:
        write(tmp_path, "tokenizer_config.json", {source: decoder(qwen, *NEW)})
    found = merged(qwen, tmp_path)
    expected = tokenizers.Tokenizer.from_file(str(qwen.text.tokenizer_json))
    expected.add_tokens([tokenizers.AddedToken(it, normalized=False) for it in NEW])
    assert ids(found, CALL) == expected.encode(CALL, add_special_tokens=False).ids
    assert ids(found, CALL)[0] == first
    assert found.has_tokens
    assert found.notes == (
        "the tokenizer is the base's with 2 of the adapter's tokens: '<call>', '</call>'",
    )
    assert found.files.chat_template == qwen.text.chat_template
    assert found.files.declared_stop_ids == qwen.text.declared_stop_ids


def test_attributes_of_a_token_are_the_adapters(qwen, tmp_path):
    tokens = decoder(qwen, "<call>", rstrip=True, lstrip=True)
    write(tmp_path, "tokenizer_config.json", {"added_tokens_decoder": tokens})
    assert ids(merged(qwen, tmp_path), "<call>  x") == ids(merged(qwen, tmp_path), "  <call>x")


def test_a_slow_tokenizer_of_the_bases_vocabulary_is_the_base_with_its_tokens(qwen, tmp_path):
    write_slow(tmp_path, qwen, *NEW)
    found = merged(qwen, tmp_path)
    assert ids(found, "<call>")[0] == next_id(qwen)
    assert found.has_tokens


@pytest.mark.toolchain
@pytest.mark.parametrize("kind", ["qwen2", "tinyllama"])
def test_transformers_reads_the_adapters_own_files_the_same(qwen, llama, tmp_path, kind):
    from transformers import AutoTokenizer

    base = qwen if kind == "qwen2" else llama
    directory = tmp_path / "adapter"
    if kind == "qwen2":
        write_slow(directory, base, *NEW)
    else:
        write(directory, "tokenizer_config.json", {"added_tokens_decoder": decoder(base, *NEW),
              "tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", "bos_token": "<s>",
              "eos_token": "</s>"})  # fmt: skip
        directory.joinpath("tokenizer.model").write_bytes(sentencepiece_model(base))
    theirs = AutoTokenizer.from_pretrained(directory)
    texts = ["<call></call><call>"]
    if kind == "qwen2":  # for Llama's, transformers has rules of its own where spaces go
        texts += [CALL, "<call>{'a': 1}</call>\n<call>", "<|im_end|> 12 </call>é"]
    found = merged(base, directory)
    expected = [theirs(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert [ids(found, text) for text in texts] == expected


def sentencepiece_model(base, *, drop=0):
    """Return a SentencePiece BPE model of the pieces in a tokenizer.json."""
    vocabulary = tokenizer_of(base)["model"]["vocab"]
    pieces = sorted(vocabulary, key=vocabulary.get)
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3}  # unknown, control; others are bytes (6) and usual
    messages = [
        protobuf.nested(1, protobuf.text(1, it), protobuf.real(2, -float(id)),
                        protobuf.integer(3, kinds.get(it, 6 if it.startswith("<0x") else 1)))
        for id, it in enumerate(pieces[: len(pieces) - drop])
    ]  # fmt: skip
    trainer = protobuf.nested(2, protobuf.integer(3, 2), protobuf.integer(35, 1))  # BPE, bytes
    return b"".join(messages) + trainer


def test_a_sentencepiece_model_of_the_bases_pieces_is_its_tokenizer(llama, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(llama))
    write(tmp_path, "added_tokens.json", {"<call>": next_id(llama)})
    assert ids(merged(llama, tmp_path), "<call>") == [next_id(llama)]
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(llama, drop=3))
    assert "tokenizer.model is not the vocabulary" in refusal(llama, tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\xff")
    assert "damaged" in refusal(llama, tmp_path)


@pytest.mark.parametrize("change", ["an id", "a token more", "a token less", "a merge", "a file"])
def test_another_vocabulary_is_refused_with_the_way_out(qwen, tmp_path, change):
    write_slow(tmp_path, qwen)
    assert not merged(qwen, tmp_path).has_tokens
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    last = max(vocabulary, key=vocabulary.get)
    if change == "a merge":
        lines = (tmp_path / "merges.txt").read_text().split("\n")
        write(tmp_path, "merges.txt", "\n".join([lines[0], lines[2], lines[1], *lines[3:]]))
    elif change == "a file":
        write(tmp_path, "qwen.tiktoken", "IQ== 0\n")
    else:
        changed = {"an id": {last: 7}, "a token more": {"zzzz": 9999}, "a token less": {}}
        kept = {it: id for it, id in vocabulary.items() if change != "a token less" or it != last}
        write(tmp_path, "vocab.json", kept | changed[change])
    with pytest.raises(UsageError, match="is not the vocabulary of") as refused:
        merged(qwen, tmp_path)
    assert "save_pretrained" in refused.value.hint


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ({"<call>": 5}, r"'<call>' the id 5, which is '.+' in the base's tokenizer"),
        ({"<call>": 100_000}, r"'<call>' the id 100000, the next after .* is \d+"),
        ({"<|im_end|>": 3}, r"'<\|im_end\|>' the id 3, the base's tokenizer \d+"),
        ({"<call>": "x"}, "not tokens with content and id"),
    ],
)
def test_ids_that_no_tokenizer_json_can_say_are_refused(qwen, tmp_path, tokens, words):
    write(tmp_path, "added_tokens.json", tokens)
    assert re.search(words, refusal(qwen, tmp_path))


def test_a_tokenizer_that_lacks_tokens_of_the_base_is_refused(qwen, tmp_path):
    write_slow(tmp_path, qwen)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"].popitem()
    write(tmp_path, "tokenizer_config.json", settings)
    assert "a tokenizer without the base's" in refusal(qwen, tmp_path)


def test_a_special_token_without_an_id_is_refused(qwen, tmp_path):
    write(tmp_path, "special_tokens_map.json", {"pad_token": {"content": "<pad>"}})
    assert "'<pad>', which has no id" in refusal(qwen, tmp_path)


TEMPLATE = "{% for m in messages %}adapted {{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("chat_template.jinja", TEMPLATE),
        ("chat_template.json", {"chat_template": TEMPLATE}),
        ("tokenizer_config.json", {"chat_template": TEMPLATE}),
        ("tokenizer_config.json", {"chat_template": [
            {"name": "tool_use", "template": "t"}, {"name": "default", "template": TEMPLATE},
        ]}),
        ("additional_chat_templates/adapted.jinja", TEMPLATE),
    ],
)  # fmt: skip
def test_a_template_is_taken_wherever_it_stands(qwen, tmp_path, name, fields):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    write(tmp_path, name, fields)
    found = merged(qwen, tmp_path)
    assert found.files.chat_template == TEMPLATE
    assert found.notes == ("the chat template is the adapter's",)
    assert found.files.declared_stop_ids == qwen.text.declared_stop_ids
    assert not found.has_tokens


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_the_bases_template_stays_byte_for_byte(tmp_path, line_end):
    template = line_end.join(["{% for m in messages %}", "{{ m.content }}", "{% endfor %}"])
    base = speak(tmp_path / "base", "qwen2", has_template=False)
    write(base.directory, "tokenizer_config.json", {"chat_template": template})
    again = speak(tmp_path / "base", "qwen2", has_template=False)
    write(again.directory, "tokenizer_config.json", {"chat_template": template})
    files = type(base.text).open(base.directory, config={})
    write(tmp_path / "a", "tokenizer_config.json", {"eos_token": "<|im_end|>"})
    found = adapter_text.merge(files, tmp_path / "a", model=base.directory)
    assert found.files.chat_template == template


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_the_end_that_an_adapter_names_ends_answers(llama, tmp_path, name):
    end = tokenizer_of(llama)["added_tokens"][0]
    write(tmp_path, name, {"eos_token": {"content": end["content"]}})
    files = merged(llama, tmp_path).files
    assert files.special_tokens["eos_token"] == end["content"]
    assert files.special_tokens["bos_token"] == llama.text.special_tokens["bos_token"]
    assert files.stop_ids_by_file["tokenizer_config.json"] == (end["id"],)


def test_generation_settings_of_an_adapter_replace_the_bases(qwen, tmp_path):
    write(tmp_path, "generation_config.json", {"eos_token_id": [3, 5], "temperature": 0.3})
    files = merged(qwen, tmp_path).files
    assert files.stop_ids_by_file["generation_config.json"] == (3, 5)
    path = files.beside("generation_config.json", otherwise=qwen.directory)
    assert json.loads(path.read_text()) == {"eos_token_id": [3, 5], "temperature": 0.3}


def test_generation_settings_without_an_end_keep_the_bases(qwen, tmp_path):
    write(tmp_path, "generation_config.json", {"top_k": 5})
    files = merged(qwen, tmp_path).files
    expected = qwen.text.stop_ids_by_file["generation_config.json"]
    assert files.stop_ids_by_file["generation_config.json"] == expected
    assert expected


def test_an_adapter_without_a_text_side_leaves_the_bases(qwen, tmp_path):
    write(tmp_path, "adapter_config.json", {"peft_type": "LORA"})
    found = merged(qwen, tmp_path)
    assert found.files is qwen.text
    assert found.notes == ()


def test_a_second_adapter_is_put_over_the_first(qwen, tmp_path):
    write(tmp_path / "one", "added_tokens.json", {"<call>": next_id(qwen)})
    one = merged(qwen, tmp_path / "one")
    write(tmp_path / "two", "added_tokens.json", {"</call>": next_id(qwen) + 1})
    two = adapter_text.merge(one.files, tmp_path / "two", model=qwen.directory)
    assert ids(two, "<call></call>") == [next_id(qwen), next_id(qwen) + 1]


def test_what_was_put_together_is_written_once(qwen, tmp_path):
    write(tmp_path, "added_tokens.json", {"<call>": next_id(qwen)})
    first, second = (merged(qwen, tmp_path).files.tokenizer_json for _ in range(2))
    assert first == second
    changed: dict[str, Any] = {"<call>": next_id(qwen), "</call>": next_id(qwen) + 1}
    write(tmp_path, "added_tokens.json", changed)
    assert merged(qwen, tmp_path).files.tokenizer_json != first
