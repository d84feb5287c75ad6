"""Which file says where an answer ends, and which tokens are special."""

import json

import pytest

from edgekit.errors import UsageError
from edgekit.model.tokenizer_files import TokenizerFiles


END, WORD, NEWLINE, BYTE = 8, 2, 3, 4
VOCABULARY = {"Ġthe": 1, "I": WORD, "Ċ": NEWLINE, "<0x0A>": BYTE, "</s>": 5, "中": 6}
ADDED = [{"content": "<|end|>", "id": END, "special": True},
         {"content": "<|pad|>", "id": 9, "special": True}]  # fmt: skip


def files(directory, *, config=None, generation=None, settings=None, legacy=None):
    fields = {"added_tokens": ADDED, "model": {"type": "BPE", "vocab": VOCABULARY, "merges": []}}
    (directory / "tokenizer.json").write_text(json.dumps(fields))
    for name, said in (
        ("generation_config.json", generation),
        ("tokenizer_config.json", settings),
        ("special_tokens_map.json", legacy),
    ):
        if said is not None:
            (directory / name).write_text(json.dumps(said))
    return TokenizerFiles.open(directory, config={} if config is None else config)


def test_generation_settings_overrule_the_config(tmp_path):
    found = files(tmp_path, config={"eos_token_id": 9}, generation={"eos_token_id": [END]})
    assert found.declared_stop_ids == (END,)
    (note,) = found.notes
    assert "config.json ends answers at [9], generation_config.json at [8]" in note


def test_the_config_counts_where_generation_settings_name_no_end(tmp_path):
    found = files(tmp_path, config={"eos_token_id": 9}, generation={"temperature": 0.5})
    assert found.declared_stop_ids == (9,)
    assert found.notes == ()


def test_files_that_agree_are_no_news(tmp_path):
    found = files(tmp_path, config={"eos_token_id": END}, generation={"eos_token_id": [END, 9]})
    assert found.declared_stop_ids == (END, 9)
    assert found.notes == ()


def test_the_tokenizers_end_joins(tmp_path):
    found = files(
        tmp_path, generation={"eos_token_id": 9}, settings={"eos_token": {"content": "<|end|>"}}
    )
    assert found.declared_stop_ids == (END, 9)


def test_an_end_that_is_in_the_vocabulary_alone_is_found(tmp_path):
    assert files(tmp_path, settings={"eos_token": "</s>"}).declared_stop_ids == (5,)


@pytest.mark.parametrize("id", [WORD, 1, 6])
def test_a_word_that_a_stale_config_calls_the_end_ends_nothing(tmp_path, id):
    found = files(tmp_path, config={"eos_token_id": id}, settings={"eos_token": "<|end|>"})
    assert found.declared_stop_ids == (END,)
    (note,) = found.notes
    assert f"the token {id}, which is the text" in note


def test_a_stale_word_in_generation_settings_made_of_the_config_ends_nothing(tmp_path):
    found = files(tmp_path, config={"eos_token_id": WORD}, generation={"eos_token_id": [WORD, END]})
    assert found.declared_stop_ids == (END,)


def test_a_word_that_only_generation_settings_name_is_meant(tmp_path):
    found = files(tmp_path, config={"eos_token_id": END}, generation={"eos_token_id": WORD})
    assert found.declared_stop_ids == (WORD,)


@pytest.mark.parametrize("id", [END, 9, NEWLINE, BYTE, 5])
def test_a_token_that_is_no_word_may_end_answers_by_the_config(tmp_path, id):
    found = files(tmp_path, config={"eos_token_id": id})
    assert found.declared_stop_ids == (id,)
    assert found.notes == ()


@pytest.mark.parametrize("value", ["2", 2.0, True, {"id": 2}, [2, "3"]])
@pytest.mark.parametrize("name", ["config", "generation"])
def test_an_end_that_is_no_id_is_refused(tmp_path, name, value):
    with pytest.raises(UsageError, match=r"eos_token_id = .*, expected a token id"):
        files(tmp_path, **{name: {"eos_token_id": value}})


def test_ids_without_a_row_are_left_out_and_said(tmp_path):
    found = files(tmp_path, generation={"eos_token_id": [END, 99, -1]}).within(10)
    assert found.declared_stop_ids == (END,)
    assert found.stop_ids_by_file["generation_config.json"] == (END,)
    (note,) = found.notes
    assert "[99, -1]" in note


def test_the_older_map_of_special_tokens_counts_where_settings_list_no_added_ones(tmp_path):
    legacy = {"eos_token": "<|end|>"}
    found = files(tmp_path, settings={"eos_token": "</s>"}, legacy=legacy)
    assert found.special_tokens == {"eos_token": "<|end|>"}
    settings = {"eos_token": "</s>", "added_tokens_decoder": {}}
    assert files(tmp_path, settings=settings, legacy=legacy).special_tokens == {"eos_token": "</s>"}


def test_a_models_own_special_tokens_are_known_to_its_template(tmp_path):
    settings = {
        "image_token": "<image>", "add_bos_token": True, "extra_special_tokens": {"fim": "<fim>"},
    }  # fmt: skip
    assert files(tmp_path, settings=settings).special_tokens == {
        "image_token": "<image>", "fim": "<fim>",
    }  # fmt: skip
