"""What a tokenizer's files say: what is put around text, and what the model has a row for."""

import json
from dataclasses import replace

import pytest

from edgekit.errors import UsageError
from edgekit.model.tokenizer_files import put_around
from edgekit.tests.needs import needs
from edgekit.tests.tiny import gguf_vocabularies


pytestmark = needs("tokenizers", "jinja2")
BOS, EOS = ({"SpecialToken": {"id": token, "type_id": 0}} for token in ("<s>", "</s>"))
TEXT, OTHER = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")


@pytest.fixture
def files(tmp_path):
    return gguf_vocabularies.sentencepiece(tmp_path, space="every", puts_bos=False)


def change(files, **fields):
    path = files.tokenizer_json
    said = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(said | fields, ensure_ascii=False), encoding="utf-8")
    return replace(files, declared_stop_ids=(2,))


def template(*single):
    tokens = {token: {"id": token, "ids": [id], "tokens": [token]}
              for token, id in (("<s>", 1), ("</s>", 2))}  # fmt: skip
    return {"type": "TemplateProcessing", "single": list(single),
            "pair": [BOS, TEXT, OTHER], "special_tokens": tokens}  # fmt: skip


PROCESSORS = {
    "nothing": None,
    "a template that puts nothing": template(TEXT),
    "bos": template(BOS, TEXT),
    "eos, left over from training": template(TEXT, EOS),
    "both": template(BOS, TEXT, EOS),
    "two before": template(BOS, BOS, TEXT),
    "in a sequence": {
        "type": "Sequence",
        "processors": [gguf_vocabularies.BYTES_ONLY, template(BOS, TEXT)],
    },
    "RoBERTa's": {
        "type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1], "trim_offsets": True,
        "add_prefix_space": False,
    },
    "BERT's": {"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1]},
}  # fmt: skip


@pytest.mark.parametrize("name", PROCESSORS)
def test_what_is_put_around_a_text_is_what_tokenizers_puts_there(name, files):
    files = change(files, post_processor=PROCESSORS[name])
    before, after = put_around(files.tokenizer_json)
    directory = files.tokenizer_json.parent
    bare, whole = (
        gguf_vocabularies.reference_ids(directory, ["sea"], add_special_tokens=adds)[0]
        for adds in (False, True)
    )
    assert [*before, *bare, *after] == whole
    assert files.rules().adds_bos is (1 in before)


def test_an_end_that_is_also_the_start_is_not_put_before_text(files):
    """As SmolLM's, whose <|endoftext|> is both, with add_eos_token left over from training."""
    files = change(files, post_processor=template(TEXT, EOS))
    both = replace(files, special_tokens={"bos_token": "</s>", "eos_token": "</s>"})
    assert not both.rules().adds_bos


@pytest.mark.parametrize("added", [-1, 1e308, True, "x", {"a": 1}, [1], [{"content": []}]])
def test_malformed_added_tokens_are_named(files, added):
    files = change(files, added_tokens=added)
    with pytest.raises(
        UsageError,
        match=r"tokenizer\.json: added_tokens(\[0\])? is .*, expected a (list|token with)",
    ):
        files.within(100_000)


def test_a_malformed_post_processor_is_named(files):
    broken = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<x>"}}]}
    with pytest.raises(UsageError, match="post_processor is malformed"):
        put_around(change(files, post_processor=broken).tokenizer_json)


def test_a_special_token_without_a_row_is_left_out_and_said(files):
    rows = 1 + max(gguf_vocabularies.token_ids(files).values())
    added = json.loads(files.tokenizer_json.read_text(encoding="utf-8"))["added_tokens"]
    pad = added[0] | {"id": rows, "content": "<pad>"}
    files = change(files, added_tokens=[*added, pad])
    special = {**files.special_tokens, "pad_token": "<pad>"}
    files = replace(files, special_tokens=special)

    assert files.within(rows + 1).special_tokens == special
    assert files.within(rows + 1).notes == ()
    cut = files.within(rows)
    assert cut.special_tokens == {k: v for k, v in special.items() if k != "pad_token"}
    assert cut.notes == (
        f"pad_token '<pad>' is left out: its id {rows} is beyond the model's {rows} rows",
    )


def test_a_vocabulary_larger_than_the_embedding_is_refused(files):
    largest = max(gguf_vocabularies.token_ids(files).values())
    with pytest.raises(UsageError, match=f"has the token id {largest}, the model has {largest} "):
        files.within(largest)


@pytest.mark.parametrize("id", [10**7, 2**31])
def test_an_added_token_with_an_absurd_id_is_refused_before_a_format_makes_rows_for_it(files, id):
    rows = 1 + max(gguf_vocabularies.token_ids(files).values())
    added = json.loads(files.tokenizer_json.read_text(encoding="utf-8"))["added_tokens"]
    files = change(files, added_tokens=[*added, added[0] | {"id": id, "content": "<far>"}])
    with pytest.raises(UsageError, match=f"ids from .*{id}.*, the model has {rows} embeddings"):
        files.within(rows)


@pytest.mark.parametrize("id", [-1, 2**40])
def test_an_added_token_with_an_id_that_no_tokenizer_has_is_named(files, id):
    added = json.loads(files.tokenizer_json.read_text(encoding="utf-8"))["added_tokens"]
    files = change(files, added_tokens=[*added, added[0] | {"id": id, "content": "<far>"}])
    with pytest.raises(UsageError, match=rf"added_tokens\[{len(added)}\] is .*, expected a token"):
        files.within(1000)


@pytest.mark.parametrize(
    ("decoder", "found"),
    [(None, "none"), ({"type": "WordPiece", "prefix": "##", "cleanup": True}, "WordPiece")],
)
def test_ids_that_cannot_become_text_one_by_one_are_refused(decoder, found, files):
    files.refuse_unreadable()
    with pytest.raises(UsageError, match=f"a decoder edgekit does not know: {found}"):
        change(files, decoder=decoder).refuse_unreadable()


def test_prompts_are_the_conversations_that_the_template_can_say(files):
    says = "{% for m in messages %}{{ raise_exception('no') if m.role == 'system' }}{{ m.role }}"
    prompts = replace(files, chat_template=says + "{% endfor %}").prompts()
    assert prompts == ("user", "userassistantuser")
    assert files.prompts() == ()
