"""The tiny models other tests stand on: they must be like the real ones, and repeatable."""

import hashlib

import pytest

from edgekit.source import families
from edgekit.source.checkpoint import Checkpoint
from edgekit.tests.tiny.checkpoints import TINY, find_case, write_tiny_checkpoint
from edgekit.tests.tiny.tokenizers import VOICES, train
from edgekit.text import corpus


pytestmark = pytest.mark.toolchain

CHAT = [
    {"role": "user", "content": " How high was the tide? "},
    {"role": "assistant", "content": "4.7 m."},
    {"role": "user", "content": "안녕 🌊"},
]


def load(voice):
    from tokenizers import Tokenizer

    return Tokenizer.from_str(train(voice))


def load_as_transformers_does(directory, voice):
    from transformers import AutoTokenizer

    name = next(name for name, case in TINY.items() if case.voice == voice)
    return AutoTokenizer.from_pretrained(write_tiny_checkpoint(directory, name))


def test_there_is_one_for_every_family():
    assert {case.model_type for case in TINY.values()} == set(families.names())
    assert {case.voice for case in TINY.values()} == VOICES.keys()


def test_a_model_type_means_its_first_case():
    assert find_case("stablelm") == TINY["stablelm-1.6b"]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    seeds = {"a": 0, "b": 0, "c": 1}
    for name, seed in seeds.items():
        write_tiny_checkpoint(tmp_path / name, "qwen3", seed=seed)
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in seeds]
    assert files[0] == files[1]
    found = [hashlib.sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest()
             for name in seeds]  # fmt: skip
    assert found[0] == found[1] != found[2]


def test_a_config_field_can_be_overridden(tmp_path):
    spec = Checkpoint.open(write_tiny_checkpoint(tmp_path, "qwen2", hidden_size=256)).spec
    assert spec.hidden_size == 256
    assert spec.attention.head_dim == 64


@pytest.mark.parametrize("name", TINY)
def test_every_token_has_a_row_in_the_embedding_and_every_stop_is_a_token(name, tmp_path):
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path, name))
    tokenizer = load(TINY[name].voice)
    assert tokenizer.get_vocab_size() <= checkpoint.spec.vocab_size
    expected = {tokenizer.token_to_id(token) for token in VOICES[TINY[name].voice].stops}
    assert expected <= set(checkpoint.text.declared_stop_ids)
    assert None not in expected


@pytest.mark.parametrize("voice", VOICES)
def test_transformers_reads_the_corpus_as_the_tokenizer_does(voice, tmp_path):
    ours, theirs = load(voice), load_as_transformers_does(tmp_path, voice)
    assert len(list(corpus.texts())) > 5
    for name, text in corpus.texts():
        ids = ours.encode(text).ids
        assert theirs(text).input_ids == ids, name
        assert ours.decode(ids) == (ours.normalizer.normalize_str(text)
                                    if VOICES[voice].pipeline == "qwen2" else text)  # fmt: skip


@pytest.mark.parametrize("voice", VOICES)
def test_templates_render_and_put_the_start_token_at_most_once(voice, tmp_path):
    tokenizer = load_as_transformers_does(tmp_path, voice)
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert "안녕 🌊" in text
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert set(ids) & {tokenizer.convert_tokens_to_ids(stop) for stop in VOICES[voice].stops}
    assert ids.count(tokenizer.bos_token_id) <= 1 or VOICES[voice].pipeline == "smollm"
    with_system = [{"role": "system", "content": "Be brief."}, *CHAT]
    assert "Be brief." in tokenizer.apply_chat_template(with_system, tokenize=False)


def test_the_pipelines_split_numbers_and_words_in_their_own_ways():
    def pieces(voice, text):
        return [piece for piece, _ in load(voice).pre_tokenizer.pre_tokenize_str(text)]

    assert pieces("smollm", "1234") == ["1", "2", "3", "4"]
    assert pieces("qwen2", "1234") == ["1", "2", "3", "4"]
    assert pieces("llama3", "1234") == ["123", "4"]
    assert pieces("llama3", "camelCase") == ["camelCase"]
    assert pieces("phi4", "camelCase") == ["camel", "Case"]
    assert pieces("smollm", "I'M") == ["I", "'", "M"]  # GPT-2 knows only small contractions
    assert pieces("llama3", "I'M") == ["I", "'M"]


def test_a_sentencepiece_model_writes_unknown_letters_as_bytes():
    tokens = load("tinyllama").encode("ሰ").tokens
    assert tokens == ["<s>", "▁", "<0xE1>", "<0x88>", "<0xB0>"]
