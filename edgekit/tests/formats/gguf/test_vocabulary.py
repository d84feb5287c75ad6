import json
from dataclasses import replace

import pytest

from edgekit.errors import UsageError
from edgekit.formats.gguf.pretokenizers import (
    PRE_TOKENIZERS,
    _Trial,
    candidate_pre,
    find_pre,
    patterns_of,
    to_tokenizer_json,
    write_vocabulary,
)
from edgekit.formats.gguf.vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    UNUSED,
    TokenizerSource,
    known_differences,
    model_name,
    read_vocabulary,
    steps_of,
)
from edgekit.model.tokenizer_files import TokenizerFiles
from edgekit.tests.tiny import gguf_vocabularies
from edgekit.tests.tiny.gguf_vocabularies import BYTES_ONLY, CHAT, CHAT_SPECIAL, TEXTS
from edgekit.text import corpus


BYTE_LEVEL_NAMES = ("gpt-2", "smollm", "qwen2", "llama-bpe", "gpt-4o", "dbrx", "default")
VOCABULARY = 2000


def hand_made(directory, *, model=None, special=None, **fields):
    bpe = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    fields = {
        "pre_tokenizer": {"type": "ByteLevel", "use_regex": True},
        "added_tokens": [{"id": 3, "content": "</s>", "special": True}],
        "model": bpe | (model or {}),
    } | fields
    path = directory / "tokenizer.json"
    path.write_text(json.dumps(fields))
    return TokenizerFiles(
        tokenizer_json=path,
        special_tokens={"eos_token": "</s>"} if special is None else special,
        chat_template=None,
        declared_stop_ids=(),
        stop_ids_by_file={},
    )


def llama_ids(tokenizer, path, texts, *, pre=None):
    from edgekit.formats.gguf.runtime import runtime_ids

    metadata = read_vocabulary(tokenizer, vocabulary_tokens=VOCABULARY, pre=pre)
    write_vocabulary(path, {"general.name": ("string", model_name(tokenizer, "x")), **metadata})
    return runtime_ids(path, list(texts))


def test_ids_without_a_token_become_unused_ones(tmp_path):
    metadata = read_vocabulary(hand_made(tmp_path), vocabulary_tokens=6, pre="gpt-2")

    assert metadata["tokenizer.ggml.tokens"] == (
        "array[string]",
        ["a", "b", "ab", "</s>", "[PAD4]", "[PAD5]"],
    )
    assert metadata["tokenizer.ggml.token_type"] == (
        "array[int32]",
        [NORMAL, NORMAL, NORMAL, CONTROL, UNUSED, UNUSED],
    )


def test_merges_are_read_in_both_spellings(tmp_path):
    lists = read_vocabulary(hand_made(tmp_path), vocabulary_tokens=4, pre="gpt-2")
    strings = read_vocabulary(
        hand_made(tmp_path, model={"merges": ["a b"]}), vocabulary_tokens=4, pre="gpt-2"
    )

    assert lists["tokenizer.ggml.merges"] == ("array[string]", ["a b"])
    assert strings == lists


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    with pytest.raises(UsageError, match="token id 2, the model has 2 embeddings"):
        read_vocabulary(hand_made(tmp_path), vocabulary_tokens=2, pre="gpt-2")


def test_an_added_token_beyond_the_embedding_is_left_out(tmp_path):
    added = [
        {"id": 3, "content": "</s>", "special": True},
        {"id": 4, "content": "<image>", "special": True},
    ]
    ids = {"a": 0, "b": 1, "ab": 2, "</s>": 3, "<image>": 4}  # Gemma lists them here, too
    tokenizer = hand_made(tmp_path, model={"vocab": ids}, added_tokens=added)
    metadata = read_vocabulary(tokenizer, vocabulary_tokens=4, pre="gpt-2")

    assert metadata["tokenizer.ggml.tokens"][1] == ["a", "b", "ab", "</s>"]


@pytest.mark.parametrize("kind", ["Unigram", "WordPiece", "WordLevel"])
def test_another_kind_of_tokenizer_is_refused_by_name(kind, tmp_path):
    with pytest.raises(UsageError, match=f"is a {kind} tokenizer"):
        read_vocabulary(hand_made(tmp_path, model={"type": kind}), vocabulary_tokens=9, pre="gpt-2")


def test_a_normalizer_llama_cpp_lacks_is_refused_by_name(tmp_path):
    tokenizer = hand_made(tmp_path, normalizer={"type": "Lowercase"})

    with pytest.raises(UsageError, match="Lowercase"):
        read_vocabulary(tokenizer, vocabulary_tokens=9, pre="gpt-2")


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    tokenizer = hand_made(tmp_path, special={})

    with pytest.raises(UsageError, match="no token that ends an answer"):
        read_vocabulary(tokenizer, vocabulary_tokens=9, pre="gpt-2")


def test_further_stop_ids_take_the_places_of_turn_and_message(tmp_path):
    added = [
        {"id": 3, "content": "</s>", "special": True},
        {"id": 4, "content": "<|im_end|>", "special": True},
        {"id": 5, "content": "<|done|>", "special": True},
    ]
    tokenizer = replace(hand_made(tmp_path, added_tokens=added), declared_stop_ids=(3, 4, 5))
    metadata = read_vocabulary(tokenizer, vocabulary_tokens=9, pre="gpt-2")

    assert metadata["tokenizer.ggml.eos_token_id"] == ("uint32", 3)
    # llama.cpp finds <|im_end|> by its text, so the other one goes first.
    assert metadata["tokenizer.ggml.eot_token_id"] == ("uint32", 5)
    assert metadata["tokenizer.ggml.eom_token_id"] == ("uint32", 4)


def test_the_same_token_twice_is_refused(tmp_path):
    added = [
        {"id": 3, "content": "</s>", "special": True},
        {"id": 4, "content": "[PAD5]", "special": True},
    ]
    with pytest.raises(UsageError, match=r"'\[PAD5\]' is both token 4 and token 5"):
        read_vocabulary(hand_made(tmp_path, added_tokens=added), vocabulary_tokens=6, pre="gpt-2")


def test_byte_fallback_needs_every_byte(tmp_path):
    tokenizer = hand_made(tmp_path, model={"byte_fallback": True}, pre_tokenizer=None)

    with pytest.raises(UsageError, match="lacks <0x00>"):
        read_vocabulary(tokenizer, vocabulary_tokens=9, pre=None)


def test_a_score_is_minus_the_rank_of_the_merge(tmp_path):
    ids = {f"<0x{byte:02X}>": byte for byte in range(256)}
    ids |= {"a": 256, "b": 257, "c": 258, "bc": 259, "ab": 260}
    merges = [["b", "c"], ["a", "b"]]
    tokenizer = hand_made(
        tmp_path,
        model={"byte_fallback": True, "vocab": ids, "merges": merges},
        pre_tokenizer=None,
        added_tokens=[{"id": 261, "content": "</s>", "special": True}],
    )
    metadata = read_vocabulary(tokenizer, vocabulary_tokens=262, pre=None)
    tokens = metadata["tokenizer.ggml.tokens"][1]
    scores = dict(zip(tokens, metadata["tokenizer.ggml.scores"][1], strict=True))
    types = dict(zip(tokens, metadata["tokenizer.ggml.token_type"][1], strict=True))

    assert scores["bc"] == 0
    assert scores["ab"] == -1
    assert scores["a"] < scores["ab"]
    assert types["<0x41>"] == BYTE


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"added_tokens": "none"}, "added_tokens is 'none', expected a list"),
        ({"added_tokens": [{"id": -1, "content": "x"}]}, "expected a token with content and id"),
        ({"pre_tokenizer": ["ByteLevel"]}, "pre_tokenizer is .*, expected an object"),
        (
            {"normalizer": {"type": "Sequence", "normalizers": 3}},
            "normalizer.normalizers is 3, expected a list",
        ),
        ({"post_processor": {"type": "TemplateProcessing"}}, "post_processor is malformed"),
        ({"model": None}, "is a nameless tokenizer"),
        ({"model": {"type": "BPE", "vocab": [], "merges": []}}, "model.vocab is not an object"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": ["a b c"]}}, "is not a pair of tokens"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}, "make a third"),
        ({"model": {"type": "BPE", "vocab": {"\ud800": 0}, "merges": []}}, "surrogate"),
    ],
)
def test_a_damaged_tokenizer_is_refused_with_the_field(fields, message, tmp_path):
    tokenizer = hand_made(tmp_path)
    whole = json.loads(tokenizer.tokenizer_json.read_text())
    tokenizer.tokenizer_json.write_text(json.dumps(whole | fields))

    with pytest.raises(UsageError, match=message):
        read_vocabulary(tokenizer, vocabulary_tokens=9, pre="gpt-2")


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_a_pre_tokenizer_comes_back_from_its_json(name):
    pre = PRE_TOKENIZERS[name]

    assert patterns_of(steps_of(to_tokenizer_json(pre))) == pre.patterns


def test_cuts_nobody_named_have_no_candidate(tmp_path):
    cut = {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated", "invert": False}
    steps = {"type": "Sequence", "pretokenizers": [cut, BYTES_ONLY]}

    assert candidate_pre(hand_made(tmp_path, pre_tokenizer=steps)) == []


def test_ignoring_merges_decides_between_names_with_the_same_cuts(tmp_path):
    cuts = to_tokenizer_json(PRE_TOKENIZERS["dbrx"])
    following = hand_made(tmp_path, pre_tokenizer=cuts)
    assert candidate_pre(following) == ["dbrx", "llama-bpe", "glm4"]

    ignoring = hand_made(tmp_path, pre_tokenizer=cuts, model={"ignore_merges": True})
    assert candidate_pre(ignoring) == ["llama-bpe", "glm4", "dbrx"]


def test_composing_decides_between_names_that_are_else_alike(tmp_path):
    cuts = to_tokenizer_json(PRE_TOKENIZERS["qwen2"])
    plain = hand_made(tmp_path, pre_tokenizer=cuts)
    assert candidate_pre(plain) == ["stablelm2", "qwen2"]

    composing = hand_made(tmp_path, pre_tokenizer=cuts, normalizer={"type": "NFC"})
    assert candidate_pre(composing) == ["qwen2", "stablelm2"]


def test_known_differences_name_the_token(tmp_path):
    added = [
        {"id": 3, "content": "</s>", "special": True},
        {"id": 4, "content": "<mask>", "special": True, "lstrip": True},
    ]
    tokenizer = hand_made(tmp_path, added_tokens=added, normalizer={"type": "NFC"})

    composing, mask = known_differences(tokenizer)
    assert "NFC" in composing
    assert "<mask>" in mask


def test_an_end_beyond_the_embedding_is_refused(tmp_path):
    added = [{"id": 3, "content": "</s>", "special": True}]
    tokenizer = hand_made(tmp_path, added_tokens=added)

    with pytest.raises(UsageError, match="the eos id 3 is no token of the model"):
        read_vocabulary(tokenizer, vocabulary_tokens=3, pre="gpt-2")


def test_other_special_tokens_beyond_the_embedding_are_left_out(tmp_path):
    """Training scripts add a padding token and do not resize the embedding."""
    names = ["</s>", "<pad>", "<s>", "<unk>"]
    added = [
        {"id": id, "content": token, "special": True} for id, token in enumerate(names, start=3)
    ]
    special = {
        "eos_token": "</s>", "pad_token": "<pad>", "bos_token": "<s>", "unk_token": "<unk>",
    }  # fmt: skip
    tokenizer = hand_made(tmp_path, added_tokens=added, special=special)

    keys = read_vocabulary(tokenizer, vocabulary_tokens=4, pre="gpt-2")
    assert keys["tokenizer.ggml.eos_token_id"] == ("uint32", 3)
    assert [key for key in keys if key.endswith("_token_id")] == ["tokenizer.ggml.eos_token_id"]


def test_an_end_after_every_text_is_left_to_training(tmp_path):
    """With add_eos_token, llama.cpp would end every prompt, and the model would say nothing."""
    bos, eos = ({"SpecialToken": {"id": token, "type_id": 0}} for token in ("<s>", "</s>"))
    text = {"Sequence": {"id": "A", "type_id": 0}}
    ids = {token: {"id": token, "ids": [id], "tokens": [token]}
           for token, id in (("<s>", 4), ("</s>", 3))}  # fmt: skip
    added = [{"id": it["ids"][0], "content": token, "special": True} for token, it in ids.items()]
    processor = {"type": "TemplateProcessing", "single": [bos, text, eos], "special_tokens": ids}
    tokenizer = hand_made(
        tmp_path, added_tokens=added, special={"eos_token": "</s>", "bos_token": "<s>"},
        post_processor=processor,
    )  # fmt: skip

    keys = read_vocabulary(tokenizer, vocabulary_tokens=5, pre="gpt-2")
    assert keys["tokenizer.ggml.add_bos_token"] == ("bool", True)
    assert keys["tokenizer.ggml.add_eos_token"] == ("bool", False)
    (difference,) = known_differences(tokenizer)
    assert "it ends every text with the end token" in difference


# Each with the settings that make llama.cpp read it as the checkpoint does.
_ZEPHYR = "{% for m in messages %}<|user|> {{ m.content }}<|im_end|>\n{% endfor %}"
_SPACED = "{% for m in messages %}<|im_start|> {{ m.content }}{% endfor %}"
_BARE = "{% for m in messages %}<|im_start|>[{{ m.content }}]{% endfor %}"
_INDENTED = "{{ ' ' }}" + _ZEPHYR
PROMPTS = {
    "first, begins with text": ("first", _ZEPHYR, (False, True)),
    "first, begins with blanks that are trimmed": ("first", f"  {_ZEPHYR}", (False, True)),
    "first, begins with a space": ("first", _INDENTED, (False, False)),
    "first, begins with a special token": ("first", _BARE, (False, False)),
    "first, spaces already there": ("first", _SPACED, (False, False)),
    "always, a space each": ("always", _BARE, (True, False)),
    "always, spaces already there": ("always", _SPACED, (False, False)),
    "never": ("never", _ZEPHYR, (False, False)),
}


def saved_again(directory, scheme, template):
    """A tokenizer as transformers 5 saves Llama 2's: no normalizer, a Metaspace."""
    tokenizer = gguf_vocabularies.sentencepiece(directory, space="first", template=template)
    path = tokenizer.tokenizer_json
    fields = json.loads(path.read_text())
    fields["pre_tokenizer"] = gguf_vocabularies.metaspace(scheme, split=False)
    path.write_text(json.dumps(fields, ensure_ascii=False))
    return TokenizerFiles.open(directory, config={})


@pytest.mark.parametrize("name", PROMPTS)
def test_a_file_puts_spaces_where_the_prompts_need_them(name, tmp_path):
    scheme, template, (adds, opens) = PROMPTS[name]
    tokenizer = saved_again(tmp_path, scheme, template)
    keys = read_vocabulary(tokenizer, vocabulary_tokens=VOCABULARY, pre=None)
    assert keys["tokenizer.ggml.add_space_prefix"] == ("bool", adds)
    written = "{{ ' ' }}" + template.lstrip() if opens else template
    assert keys["tokenizer.chat_template"] == ("string", written)


@pytest.mark.toolchain
@pytest.mark.parametrize("name", PROMPTS)
def test_llama_cpp_reads_prompts_of_the_files_own_template_as_the_checkpoint_does(name, tmp_path):
    import jinja2

    scheme, template, _ = PROMPTS[name]
    tokenizer = saved_again(tmp_path, scheme, template)
    own = read_vocabulary(tokenizer, vocabulary_tokens=VOCABULARY, pre=None)[
        "tokenizer.chat_template"
    ][1]
    written, said = (
        [
            jinja2.Template(source, trim_blocks=True, lstrip_blocks=True).render(messages=turns)
            for turns in corpus.CONVERSATIONS
        ]
        for source in (own, template)
    )
    found = llama_ids(tokenizer, tmp_path / "v.gguf", written)
    assert found == gguf_vocabularies.reference_ids(tmp_path, said)


def test_prompts_that_need_a_space_here_and_none_there_are_refused(tmp_path):
    tokenizer = saved_again(tmp_path, "always", _ZEPHYR + "{{ '<|im_start|> Yes' }}")
    with pytest.raises(UsageError, match="before some texts of a chat prompt and none before"):
        read_vocabulary(tokenizer, vocabulary_tokens=VOCABULARY, pre=None)


@pytest.mark.toolchain
def test_plain_text_may_get_another_space_in_front_and_nothing_else_is_let_pass(tmp_path):
    tokenizer = saved_again(tmp_path / "spaced", "first", _ZEPHYR)
    assert find_pre(tokenizer, corpus=TEXTS) == "default"

    fields = json.loads(tokenizer.tokenizer_json.read_text())
    fields["pre_tokenizer"]["split"] = True  # merges end where words do
    model = fields["model"]
    model["vocab"]["e\u2581"] = len(model["vocab"])  # and here is one that does not
    model["merges"].insert(0, ["e", "\u2581"])
    tokenizer.tokenizer_json.write_text(json.dumps(fields, ensure_ascii=False))
    with pytest.raises(UsageError, match=r"llama\.cpp reads text otherwise than .*: .The ferry"):
        find_pre(tokenizer, corpus=TEXTS)


@pytest.mark.toolchain
def test_llama_cpp_is_asked_once_for_a_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    tokenizer = gguf_vocabularies.byte_level(tmp_path, to_tokenizer_json(PRE_TOKENIZERS["gpt-2"]))
    assert find_pre(tokenizer, corpus=TEXTS) == "gpt-2"
    monkeypatch.setattr(_Trial, "run", lambda self, names: 1 / 0)
    assert find_pre(tokenizer, corpus=TEXTS) == "gpt-2"
    with pytest.raises(ZeroDivisionError):  # another question
        find_pre(tokenizer, corpus=TEXTS[1:])


@pytest.mark.parametrize(
    ("scheme", "split", "words"),
    [("always", False, "no space before a text that begins with one"), ("never", True, "within")],
)
def test_what_a_metaspace_does_that_llama_cpp_does_not_is_said(scheme, split, words, tmp_path):
    ids = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"a": 256, "▁": 257, "a▁": 258}
    tokenizer = hand_made(
        tmp_path,
        model={"byte_fallback": True, "vocab": ids, "merges": [["a", "▁"]]},
        pre_tokenizer=gguf_vocabularies.metaspace(scheme, split=split),
        added_tokens=[{"id": 259, "content": "</s>", "special": True}],
    )
    (difference,) = known_differences(tokenizer)

    assert words in difference


def test_ordinary_text_that_llama_cpp_takes_for_an_end_is_named(tmp_path):
    ids = {"a": 0, "b": 1, "ab": 2, "<eos>": 3}
    added = [{"id": 4, "content": "</s>", "special": True}]
    tokenizer = hand_made(tmp_path, model={"vocab": ids}, added_tokens=added)
    (difference,) = known_differences(tokenizer)

    assert "'<eos>' is ordinary text" in difference


def test_a_name_never_turns_on_phi3_by_accident(tmp_path):
    tokenizer = hand_made(tmp_path)

    assert model_name(tokenizer, "not-Phi-3-mini") == "not-Phi 3-mini"
    assert model_name(tokenizer, "SmolLM2") == "SmolLM2"


def test_a_phi3_tokenizer_gets_the_name_that_strips(tmp_path):
    added = [
        {"id": 3, "content": "</s>", "special": True, "rstrip": True},
        {"id": 4, "content": "<s>", "special": True},
        {"id": 5, "content": "<unk>", "special": True},
        {"id": 6, "content": "<|endoftext|>", "special": True},
        {"id": 7, "content": "<|user|>", "special": True, "rstrip": True},
    ]
    tokenizer = hand_made(tmp_path, added_tokens=added)

    assert model_name(tokenizer, "my-tune") == "my-tune (Phi-3)"
    assert known_differences(tokenizer) == []


@pytest.mark.toolchain
@pytest.mark.parametrize("name", BYTE_LEVEL_NAMES)
def test_llama_cpp_reads_byte_level_bpe_as_the_checkpoint_does(name, tmp_path):
    pre = PRE_TOKENIZERS[name]
    tokenizer = gguf_vocabularies.byte_level(
        tmp_path,
        to_tokenizer_json(pre),
        user_defined=("<tool>", "    "),
        ignore_merges=pre.ignores_merges,
        normalizer={"type": "NFC"} if pre.composes else None,
    )
    texts = [*TEXTS, CHAT, "a<tool>b <tool> c"]

    assert candidate_pre(tokenizer)[0] == name
    found = llama_ids(tokenizer, tmp_path / "v.gguf", texts, pre=name)
    assert found == gguf_vocabularies.reference_ids(tmp_path, texts)


@pytest.mark.toolchain
@pytest.mark.parametrize("space", ["every", "never"])
def test_llama_cpp_reads_sentencepiece_bpe_as_the_checkpoint_does(space, tmp_path):
    tokenizer = gguf_vocabularies.sentencepiece(tmp_path, space=space, user_defined=("<tool>",))
    texts = [*TEXTS, CHAT, "a<tool>b <tool> c", "<s>one</s> two"]

    found = llama_ids(tokenizer, tmp_path / "v.gguf", texts)
    assert found == gguf_vocabularies.reference_ids(tmp_path, texts)
    assert known_differences(tokenizer) == []


@pytest.mark.toolchain
def test_llama_cpp_reads_gemmas_bpe_as_the_checkpoint_does(tmp_path):
    tokenizer = gguf_vocabularies.gemma(tmp_path)
    chat = "<bos><start_of_turn>user\nHi,   you<end_of_turn>\n<start_of_turn>model\n\n\n\nx"
    texts = [*TEXTS, chat, "<table>a"]

    found = llama_ids(tokenizer, tmp_path / "v.gguf", texts)
    assert found == gguf_vocabularies.reference_ids(tmp_path, texts)


@pytest.mark.toolchain
def test_llama_cpp_strips_after_phi3s_tokens_as_the_checkpoint_does(tmp_path):
    tokenizer = gguf_vocabularies.phi3(tmp_path)
    chat = "<s><|user|>\nHi   you<|end|>\n \n<|user|>  x<|endoftext|>  y<unk> z</s> w"
    texts = [*TEXTS, chat]

    found = llama_ids(tokenizer, tmp_path / "v.gguf", texts)
    assert found == gguf_vocabularies.reference_ids(tmp_path, texts)
    assert known_differences(tokenizer) == []


@pytest.mark.toolchain
def test_a_space_before_the_first_text_only_is_exact_after_a_special_token(tmp_path):
    tokenizer = gguf_vocabularies.sentencepiece(
        tmp_path, space="first", template=gguf_vocabularies.TEMPLATE
    )
    texts = ["<s>" + text for text in TEXTS] + [CHAT]

    found = llama_ids(tokenizer, tmp_path / "v.gguf", texts)
    assert found == gguf_vocabularies.reference_ids(tmp_path, texts)
    assert any("before the first text only" in line for line in known_differences(tokenizer))


@pytest.mark.toolchain
def test_llama_cpp_puts_the_same_bos_in_front(tmp_path):
    from edgekit.formats.gguf.runtime import library, open_model

    with_bos = gguf_vocabularies.sentencepiece(tmp_path / "with", space="every", puts_bos=True)
    without = gguf_vocabularies.sentencepiece(tmp_path / "without", space="every", puts_bos=False)
    for tokenizer, expected in ((with_bos, True), (without, False)):
        path = tokenizer.tokenizer_json.parent / "v.gguf"
        write_vocabulary(path, read_vocabulary(tokenizer, vocabulary_tokens=VOCABULARY, pre=None))
        model = open_model(path, vocabulary_only=True)
        vocabulary = library().llama_model_get_vocab(model)
        assert library().llama_vocab_get_add_bos(vocabulary) == expected
        assert library().llama_vocab_bos(vocabulary) == 1
        library().llama_model_free(model)


@pytest.mark.toolchain
def test_the_search_settles_on_the_likeliest_name(tmp_path):
    tokenizer = gguf_vocabularies.byte_level(
        tmp_path, to_tokenizer_json(PRE_TOKENIZERS["smollm"]), special=CHAT_SPECIAL
    )
    assert find_pre(tokenizer, corpus=[*TEXTS, CHAT]) == "smollm"


@pytest.mark.toolchain
def test_the_search_sees_through_cuts_that_are_spelt_otherwise(tmp_path):
    (pattern,) = PRE_TOKENIZERS["llama-bpe"].patterns
    respelt = {
        "type": "Split",
        "pattern": {"Regex": pattern.replace("(?i:'s|", "(?i:'[s]|")},
        "behavior": "Isolated",
        "invert": False,
    }
    cuts = {"type": "Sequence", "pretokenizers": [respelt, BYTES_ONLY]}
    tokenizer = gguf_vocabularies.byte_level(tmp_path, cuts)

    assert candidate_pre(tokenizer) == []
    found = find_pre(tokenizer, corpus=[*TEXTS, CHAT])
    assert PRE_TOKENIZERS[found].patterns == (pattern,)


@pytest.mark.toolchain
def test_cuts_llama_cpp_lacks_are_refused_with_the_first_difference(tmp_path):
    every_letter = {
        "type": "Split",
        "pattern": {"Regex": "[a-m]"},
        "behavior": "Isolated",
        "invert": False,
    }
    cuts = {"type": "Sequence", "pretokenizers": [every_letter, BYTES_ONLY]}
    tokenizer = gguf_vocabularies.byte_level(tmp_path, cuts)

    with pytest.raises(UsageError, match=r"'.*' is the closest, where .The ferry"):
        find_pre(tokenizer, corpus=TEXTS)


@pytest.mark.toolchain
def test_a_name_that_aborts_llama_cpp_does_not_end_the_search(tmp_path):
    tokenizer = gguf_vocabularies.byte_level(tmp_path, to_tokenizer_json(PRE_TOKENIZERS["gpt-2"]))
    trial = _Trial.prepare(TokenizerSource.open(tokenizer), TEXTS, tmp_path)

    # No merges of this vocabulary are its kind: llama.cpp asserts.
    assert dict(trial.run(["whitespace", "gpt-2"])) == {"gpt-2": None}


@pytest.mark.toolchain
def test_a_corpus_longer_than_the_tokenizer_truncates_is_compared_whole(tmp_path):
    tokenizer = gguf_vocabularies.byte_level(tmp_path, to_tokenizer_json(PRE_TOKENIZERS["gpt-2"]))
    fields = json.loads(tokenizer.tokenizer_json.read_text(encoding="utf-8"))
    fields["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    tokenizer.tokenizer_json.write_text(json.dumps(fields))

    assert find_pre(tokenizer, corpus=TEXTS) == "gpt-2"


@pytest.mark.toolchain
def test_text_that_is_not_composed_is_compared_as_the_checkpoint_sees_it(tmp_path):
    tokenizer = gguf_vocabularies.byte_level(
        tmp_path, to_tokenizer_json(PRE_TOKENIZERS["qwen2"]), normalizer={"type": "NFC"}
    )
    assert find_pre(tokenizer, corpus=[*TEXTS, "cafe\u0301"]) == "qwen2"
