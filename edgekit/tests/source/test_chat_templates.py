"""Which chat template a model is exported with, how it is called, and where it ends an answer."""

import json

import pytest

import edgekit
from edgekit.errors import UsageError
from edgekit.source.checkpoint import Checkpoint
from edgekit.source.opening import open_checkpoint, with_template
from edgekit.source.writer import write_checkpoint
from edgekit.tests.tiny.random_checkpoints import random_checkpoint
from edgekit.tests.tiny.tokenizers import VOICES
from edgekit.tests.tiny.voices import speak
from edgekit.tests.witnesses.tiny_runner import THINKING
from edgekit.text.rules import ThoughtMarks


CHATML = VOICES["smollm"].template
TOOLS = "{% for tool in tools %}{{ tool.name }}{% endfor %}" + CHATML
SWITCH = "{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}" + CHATML
NAMES = {"default": CHATML, "tool_use": TOOLS, "brief": SWITCH}


def files_of(directory, templates, **generation):
    """Return a text side whose templates are a list in the tokenizer's settings."""
    speak(directory, "smollm", has_template=False, **generation)
    path = directory / "tokenizer_config.json"
    named = [{"name": name, "template": template} for name, template in templates.items()]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": named}))
    from edgekit.model.tokenizer_files import TokenizerFiles

    return TokenizerFiles.open(directory, config={})


def test_a_template_is_chosen_by_its_name_or_by_its_file(tmp_path):
    files = files_of(tmp_path, NAMES)
    (tmp_path / "own.jinja").write_text(CHATML + "!")
    assert with_template(files).chat_template == CHATML
    assert with_template(files, chosen="brief").chat_template == SWITCH
    assert with_template(files, chosen=tmp_path / "own.jinja").chat_template == CHATML + "!"
    assert with_template(files, chosen=str(tmp_path / "own.jinja")).template_source == CHATML + "!"


def test_a_name_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    with pytest.raises(UsageError, match="no chat template named 'rag', and no such file") as told:
        with_template(files_of(tmp_path, NAMES), chosen="rag")
    assert told.value.hint == "the model has 'brief', 'default', 'tool_use'"


def test_templates_that_are_not_taken_are_noted(tmp_path):
    (note,) = with_template(files_of(tmp_path, NAMES)).notes
    assert note == (
        "the chat template 'default' is taken; with --chat-template NAME it is 'tool_use', 'brief'"
    )


def test_several_templates_without_a_default_need_a_choice(tmp_path):
    files = files_of(tmp_path, {"tool_use": TOOLS, "brief": SWITCH})
    with pytest.raises(
        UsageError, match="none of them is the default: 'brief', 'tool_use'"
    ) as told:
        with_template(files)
    assert told.value.hint == "choose one with --chat-template NAME"
    assert with_template(files, chosen="brief").chat_template == SWITCH


@pytest.mark.toolchain
def test_a_directory_whose_only_template_is_for_tools_opens_and_says_what_transformers_says(
    tmp_path,
):
    transformers = pytest.importorskip("transformers")
    opened = with_template(files_of(tmp_path, {"tool_use": TOOLS}))
    assert opened.notes == (
        "the only chat template is named 'tool_use', so it is taken",
        "the chat template fails without a list of tools, so it begins with an empty one",
    )
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ask = [{"role": "user", "content": "Hi"}]
    assert opened.loaded().render(ask) == tokenizer.apply_chat_template(
        ask, tools=[], tokenize=False, add_generation_prompt=True
    )


def test_a_variable_is_fixed_for_every_program_and_said_in_the_rules(tmp_path):
    files = with_template(
        files_of(tmp_path, NAMES), chosen="brief", variables={"enable_thinking": False}
    )
    assert files.chat_template == "{%- set enable_thinking = false %}\n" + SWITCH
    assert files.template_source == SWITCH
    (tmp_path / "bundle").mkdir()
    rules = files.copy_into(tmp_path / "bundle")
    assert (tmp_path / "bundle" / "chat_template.jinja").read_text() == files.chat_template
    assert rules.template_variables == {"enable_thinking": "false"}
    assert (
        files.loaded().render([{"role": "user", "content": "Hi"}]).startswith("False<|im_start|>")
    )


@pytest.mark.parametrize(
    ("name", "hint"),
    [("enable_thinkin", "did you mean 'enable_thinking'?"), ("zzz", "it reads enable_thinking")],
)
def test_a_variable_that_the_template_never_reads_is_refused(tmp_path, name, hint):
    files = files_of(tmp_path, NAMES)
    with pytest.raises(UsageError, match=f"reads no variable '{name}'") as told:
        with_template(files, chosen="brief", variables={name: 1})
    assert hint in told.value.hint


def test_a_variable_of_a_model_without_template_is_refused(tmp_path):
    with pytest.raises(UsageError, match="the model has no chat template"):
        with_template(files_of(tmp_path, {}), variables={"x": 1})


def test_what_a_template_lacks_can_be_given(tmp_path):
    wanting = "{% if not persona %}{{ raise_exception('no persona') }}{% endif %}" + CHATML
    files = files_of(tmp_path, {"default": wanting})
    with pytest.raises(UsageError, match="no persona") as told:
        with_template(files)
    assert "--template-var NAME=VALUE" in told.value.hint
    assert with_template(files, variables={"persona": "Ada"}).template_source == wanting


def test_a_special_token_that_the_tokenizer_lacks_can_be_given(tmp_path):
    """transformers fails there too."""
    files = files_of(tmp_path, {"default": "{{ pad_token + '!' }}" + CHATML})
    with pytest.raises(UsageError, match="'pad_token' is undefined"):
        with_template(files)
    text = with_template(files, variables={"pad_token": ""}).loaded()
    assert text.render([{"role": "user", "content": "Hi"}]).startswith("!<|im_start|>")


def test_a_template_that_writes_no_answer_adds_no_stop(tmp_path):
    """Seven of 240 real templates: the first token of a prompt would have ended every answer."""
    asks = "{% for m in messages if m.role != 'assistant' %}<|im_start|>{{ m.content }}{% endfor %}"
    files = files_of(tmp_path, {"default": asks})
    assert with_template(files).declared_stop_ids == files.declared_stop_ids


# Stop strings


@pytest.mark.parametrize(
    ("declared", "expected"),
    [("END", ("END",)), (["a", "b", "a", ""], ("a", "b")), ([], ()), (None, ())],
)
def test_stop_strings_are_read_as_transformers_reads_them(tmp_path, declared, expected):
    files = files_of(tmp_path, NAMES, stop_strings=declared)
    assert files.rules().stop_strings == expected


@pytest.mark.parametrize("declared", [3, [3], {"a": 1}, True])
def test_stop_strings_that_are_not_text_are_refused_with_their_file(tmp_path, declared):
    with pytest.raises(UsageError, match=r"generation_config.json: stop_strings = "):
        files_of(tmp_path, NAMES, stop_strings=declared)


# A whole checkpoint


@pytest.fixture
def model(tmp_path):
    directory = tmp_path / "model"
    write_checkpoint(random_checkpoint(tmp_path / "plain", context_tokens=256), directory)
    template = "{% for m in messages %}{{ m.content }} {{ level }}{% endfor %}"
    named = [{"name": "a", "template": template}, {"name": "b", "template": "b" + template}]
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(settings | {"chat_template": named}))
    return directory


def test_a_plan_refuses_and_notes_what_it_finds_in_templates(model):
    target = "raspberry-pi-5-8gb"
    with pytest.raises(UsageError, match="has several chat templates"):
        edgekit.plan(model, target)
    with pytest.raises(UsageError, match="reads no variable"):
        edgekit.plan(model, target, chat_template="a", template_variables={"levle": 1})
    made = edgekit.plan(model, target, chat_template="b", template_variables={"level": 1})
    assert made.recipe.name == "Q8_0"
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    notes = edgekit.plan(model, target).notes
    assert any("tokenizer_config.json is not taken" in note for note in notes)


def test_what_is_written_has_the_chosen_template_and_keeps_the_others(model, tmp_path):
    checkpoint = open_checkpoint(model, chat_template="a", template_variables={"level": 1})
    write_checkpoint(checkpoint, tmp_path / "out")
    written = Checkpoint.open(tmp_path / "out").text
    assert written.chat_template == checkpoint.text.template_source
    assert {*written.templates} == {"default", "a", "b"}
    assert written.templates["b"] == checkpoint.text.templates["b"]


def test_a_plan_tells_how_thinking_is_switched_and_a_fixed_switch_needs_no_note(model):
    target = "raspberry-pi-5-8gb"
    (model / "chat_template.jinja").write_text(THINKING, encoding="utf-8")
    note = (
        "the chat template's enable_thinking is on by default: --template-var "
        "enable_thinking=false has the model answer without thinking; earlier answers are read "
        "without their thoughts"
    )
    assert note in edgekit.plan(model, target).notes
    fixed = edgekit.plan(model, target, template_variables={"enable_thinking": False})
    assert not any("think" in said for said in fixed.notes)


def test_what_stands_around_a_thought_is_in_the_rules_of_a_bundle(tmp_path):
    files = with_template(files_of(tmp_path, {"default": THINKING}))
    assert files.rules().thoughts == ThoughtMarks(opens="<think>", closes="</think>")
    assert with_template(files_of(tmp_path / "plain", NAMES)).rules().thoughts is None
