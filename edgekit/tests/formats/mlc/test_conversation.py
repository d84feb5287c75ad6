"""Chat templates in MLC's language: which can be said, how, and why others cannot."""

import doctest
import json
from dataclasses import replace
from datetime import date

import pytest

from edgekit.errors import UsageError
from edgekit.formats.mlc import clients, conversation, tokenizer_info
from edgekit.source.opening import with_template
from edgekit.tests.tiny.tokenizers import VOICES, train
from edgekit.tests.tiny.voices import speak, text_of, thoughtful


CHATML = VOICES["stablelm"].template
ASK = {"role": "user", "content": "Hi"}
SYSTEM = {"role": "system", "content": "You are terse."}


def derive(directory, voice, template=None, **fields):
    return conversation.derive(speak(directory / "model", voice, template=template, **fields))


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    """What Qwen 3's own template becomes."""
    return derive(tmp_path_factory.mktemp("qwen3"), "qwen3")


def inst(open_ask, close_ask, answer_end):
    """Return a template in which a question stands between two marks."""
    return (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        f"{{{{ '{open_ask}' + m.content + '{close_ask}' }}}}{{% else %}}"
        f"{{{{ ' ' + m.content + '{answer_end}' }}}}{{% endif %}}{{% endfor %}}"
    )


def test_a_default_system_message_is_the_one_that_an_app_replaces(tmp_path):
    found = derive(tmp_path, "smollm")

    assert found.template == {
        "name": "edgekit",
        "system_template": "<|im_start|>system\n{system_message}",
        "system_message": "You answer briefly and kindly.",
        "system_prefix_token_ids": [],
        "add_role_after_system_message": True,
        "roles": {
            "user": "<|im_end|>\n<|im_start|>user\n",
            "assistant": "<|im_start|>assistant\n",
        },
        "messages": [],
        "seps": ["<|im_end|>\n", ""],
        "role_content_sep": "",
        "role_empty_sep": "",
        "stop_str": [],
        "stop_token_ids": [2],
        "function_string": "",
        "use_function_calling": False,
    }
    assert found.keeps_cache
    assert found.notes == ()


def test_a_system_block_that_is_always_there_may_be_empty(tmp_path):
    """Llama 3.1's, with its date."""
    block = (
        "{{ '<|im_start|>system\\nKnows 2023.\\n' }}{% if messages[0].role == 'system' %}"
        "{{ messages[0].content }}{% set messages = messages[1:] %}{% endif %}{{ '<|im_end|>\\n' }}"
    )

    found = derive(tmp_path, "stablelm", block + CHATML)

    assert found.template["system_template"] == "<|im_start|>system\nKnows 2023.\n{system_message}"
    assert found.template["system_message"] == ""
    assert found.notes == ()


def test_a_template_without_a_system_block_of_its_own_takes_two_forms(tmp_path):
    found = derive(tmp_path, "stablelm")

    assert found.template["system_template"] == ""
    assert found.template["roles"]["user"] == "<|im_start|>user\n"
    assert found.with_system == {
        "system_template": "<|im_start|>system\n{system_message}",
        "roles": {
            "user": "<|im_end|>\n<|im_start|>user\n",
            "assistant": "<|im_start|>assistant\n",
        },
        "seps": ["<|im_end|>\n", ""],
    }
    assert "load the model whose name ends in -with-system" in found.notes[0]
    assert "call resetChat() before each turn" in found.notes[0]


def test_a_bos_token_becomes_an_id_once(tmp_path):
    model = speak(tmp_path / "model", "llama3")
    template = conversation.derive(model).template
    text = text_of(model, tmp_path / "bundle")

    ids = clients.webllm_ids(template, [ASK], lambda part: text.encode(part, adds_bos=False))

    bos = text.tokenizer.token_to_id("<|begin_of_text|>")
    assert template["system_prefix_token_ids"] == [bos]
    assert ids.count(bos) == 1
    assert template["stop_token_ids"] == list(model.text.declared_stop_ids)


def test_whitespace_that_the_template_strips_is_left_to_the_app(tmp_path):
    found = derive(tmp_path, "llama3")

    assert found.trimmed_roles == ("system", "user", "assistant")
    assert "strip the whitespace around system and user and assistant messages" in found.notes[0]


def test_a_system_message_that_goes_into_the_first_question_stays_there(tmp_path):
    found = derive(tmp_path, "gemma")

    assert found.with_system["system_template"] == "<start_of_turn>user\n{system_message}\n\n"
    assert not found.with_system["add_role_after_system_message"]


def test_a_template_that_refuses_system_messages_says_so(tmp_path):
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"

    found = derive(tmp_path, "stablelm", refusing + CHATML)

    assert not found.takes_system
    assert found.with_system is None
    assert "pass no system message, it would be dropped" in found.notes[0]


def test_a_template_that_wants_a_system_message_says_so(tmp_path):
    wanting = "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}"

    found = derive(tmp_path, "stablelm", wanting + CHATML)

    assert found.needs_system
    assert found.keeps_cache
    assert found.template["system_template"] == "<|im_start|>system\n{system_message}"


def test_an_answer_may_have_to_start_with_a_thought(tmp_path):
    template = VOICES["qwen3"].template.replace(
        "'<|im_start|>assistant\\n' }}", "'<|im_start|>assistant\\n<think>\\n' }}"
    )

    found = derive(tmp_path, "qwen3", template)

    assert found.template["role_empty_sep"] == "<think>\n"
    assert found.drops_thoughts
    assert "cut <think>…</think> out of earlier answers" in found.notes[0]


def test_a_switch_that_webllm_and_the_template_understand_differently_is_reported(tmp_path, qwen3):
    other = VOICES["qwen3"].template.replace("<think>\\n\\n</think>\\n\\n", "<think></think>")

    notes = derive(tmp_path / "other", "qwen3", other).notes

    assert any("enable_thinking" in note for note in notes)
    assert not any("enable_thinking" in note for note in qwen3.notes)


def test_special_tokens_around_a_question_let_it_be_told_apart(tmp_path):
    """Mistral's from version 3 on, whose [INST] is a token."""
    template = inst("<|im_start|> ", "<|im_end|>", "<|endoftext|>")

    found = derive(tmp_path, "stablelm", template)

    assert found.template["roles"]["user"] == "<|endoftext|><|im_start|>"
    assert found.template["role_content_sep"] == " "
    assert found.template["role_empty_sep"] == ""


def test_text_around_a_question_does_not(tmp_path):
    """Mistral's and Llama's up to version 2."""
    with pytest.raises(
        UsageError, match=r"no special token is in ' \[/INST\]', between a question"
    ):
        derive(tmp_path, "mistral")


def test_a_raw_prompt_is_what_a_refusal_offers(tmp_path):
    with pytest.raises(UsageError) as refusal:
        derive(tmp_path, "mistral")

    assert "--variant raw-prompt" in refusal.value.hint


@pytest.mark.parametrize(
    ("template", "finding"),
    [
        (CHATML.replace("message['content']", "message['content'] * 2"), "each user message once"),
        (
            CHATML.replace(
                "message['content']",
                "(loop.index if message.role == 'user' else '') ~ message['content']",
            ),
            "have no header in common",
        ),
        (
            CHATML.replace("message['content']", "message['content'] | replace('  ', ' ')"),
            r"the template writes '.*' where MLC would write '.*'",
        ),
        ("{{ raise_exception('not today') }}", "not today"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "no special token is in"),
    ],
)
def test_what_mlc_cannot_say_is_refused_with_the_reason(tmp_path, template, finding):
    with pytest.raises(UsageError, match=f"MLC cannot express the chat template: .*{finding}"):
        derive(tmp_path, "stablelm", template)


DATED = """\
{%- if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}
{{- '<|im_start|>system\\nToday is ' + date_string + '.\\n' }}
{%- if messages[0].role == 'system' %}
    {{- messages[0].content }}{% set messages = messages[1:] %}
{%- endif %}
{{- '<|im_end|>\\n' }}"""


def test_the_date_of_the_day_stays_that_of_the_export(tmp_path):
    found = derive(tmp_path, "stablelm", DATED + CHATML)

    today = date.today()  # noqa: DTZ011 - as transformers
    assert found.template["system_template"] == (
        f"<|im_start|>system\nToday is {today:%d %b %Y}.\n{{system_message}}"
    )
    assert found.proven == 120
    assert found.notes[0] == (
        f"the chat template writes the day's date: for MLC it stays that of the export, "
        f"{today.isoformat()} (--template-var date_string=TEXT fixes another); with "
        "`--variant raw-prompt` the app writes it"
    )


def test_a_date_that_was_fixed_is_the_date(tmp_path):
    model = speak(tmp_path / "model", "stablelm", template=DATED + CHATML)
    files = with_template(model.text, variables={"date_string": "1 May 2020"})
    found = conversation.derive(replace(model, text=files))

    assert "Today is 1 May 2020." in found.template["system_template"]
    assert found.notes == ()


def test_a_date_that_only_tools_bring_is_none(tmp_path):
    unused = "{% if tools %}{{ strftime_now('%d %b %Y') }}{% endif %}" + CHATML

    assert derive(tmp_path, "stablelm", unused).notes[1:] == (
        "MLC cannot express how the chat template writes tools",
    )


# Thoughts


THOUGHT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIt costs $& or $5."}
TALK = [ASK, THOUGHT, ASK, {"role": "assistant", "content": "No {function_string}."}, ASK]


def test_a_thought_before_every_earlier_answer_is_put_there_by_a_role_template(tmp_path):
    found = derive(tmp_path, "stablelm", thoughtful("stablelm"))

    assert found.template["role_templates"] == {"assistant": "<think></think>{assistant_message}"}
    assert found.template["strip_reasoning_in_history"] is True
    assert found.drops_thoughts
    assert not found.keeps_breaks
    assert not found.keeps_cache
    assert "write $$ for $ in earlier answers" in found.notes[0]


def test_an_answer_may_start_with_a_space_where_its_header_does_not(tmp_path):
    """Mistral's from version 3 on, as their first tokenizers had them."""
    found = derive(tmp_path, "stablelm", inst("<|im_start|>", "<|im_end|>", "<|endoftext|>"))

    assert found.template["role_templates"] == {"assistant": " {assistant_message}"}


@pytest.mark.parametrize(
    "template",
    [thoughtful("stablelm"), thoughtful("stablelm", before=""), VOICES["qwen3"].template],
)
def test_mlc_strips_thoughts_as_the_template_does(tmp_path, template):
    model = speak(tmp_path / "model", "stablelm", template=template)
    found = conversation.derive(model)

    wanted = text_of(model, tmp_path / "bundle").render(TALK)
    assert clients.mlc_text(found.template, TALK) == wanted
    assert "hm" not in wanted


def test_a_switch_that_was_fixed_is_fixed_for_mlc(tmp_path, qwen3):
    model = speak(tmp_path / "model", "qwen3")
    files = with_template(model.text, variables={"enable_thinking": False})
    found = conversation.derive(replace(model, text=files))

    assert found.template["role_empty_sep"] == "<think>\n\n</think>\n\n"
    assert qwen3.template["role_empty_sep"] == ""


def test_line_breaks_that_a_template_leaves_after_a_thought_are_left_to_the_app(tmp_path, qwen3):
    """Those of DeepSeek's distilled models."""
    keeps = thoughtful("stablelm", before="").replace(".lstrip('\\n')", "")
    found = derive(tmp_path, "stablelm", keeps)

    assert found.keeps_breaks
    assert "</think> out of earlier answers, but not the line breaks after it" in found.notes[0]
    assert not qwen3.keeps_breaks


def test_a_refusal_names_the_ways_out(tmp_path):
    with pytest.raises(UsageError) as refusal:
        derive(tmp_path, "stablelm", CHATML.replace("['content']", "['content'].lower()"))

    assert "--variant raw-prompt" in refusal.value.hint
    assert "--chat-template NAME|FILE" in refusal.value.hint
    assert "--template-var enable_thinking=false" in refusal.value.hint


def test_a_token_takes_along_the_white_space_that_it_swallows(tmp_path):
    """Phi-3's: cut before the line break, the texts are the same and the ids are not."""
    model = speak(tmp_path / "model", "phi3")
    text = text_of(model, tmp_path / "bundle")
    template = conversation.derive(model).template
    other = {
        **template,
        "seps": ["<|end|>", template["seps"][1]],
        "roles": template["roles"] | {"assistant": "\n<|assistant|>\n"},
    }

    ids, other_ids = (
        clients.webllm_ids(form, [ASK], lambda part: text.encode(part, adds_bos=False))
        for form in (template, other)
    )

    assert template["seps"][0] == "<|end|>\n"
    assert clients.mlc_text(other, [ASK]) == clients.mlc_text(template, [ASK])
    assert ids == text.encode_chat([ASK]) != other_ids


def test_a_prompt_is_passed_through_with_the_checkpoints_stops(tmp_path):
    model = speak(tmp_path / "model", "mistral", stop_strings="END")
    found = conversation.derive(model, raw_prompt=True)
    prompt = {"role": "user", "content": "<s> [INST] Hi [/INST]"}

    assert found.is_raw
    assert clients.mlc_text(found.template, [prompt]) == prompt["content"]
    assert found.template["stop_str"] == ["END"]
    assert found.template["stop_token_ids"] == [2]


def test_a_model_without_a_template_is_passed_text_that_starts_with_its_bos(tmp_path):
    found = derive(tmp_path, "llama3", has_template=False)

    assert found.is_raw
    assert "start every prompt with <|begin_of_text|>" in found.notes[1]


def test_the_examples_of_the_rules_are_right():
    assert doctest.testmod(clients) == (0, 2)


# What MLC asks about a tokenizer


@pytest.mark.parametrize(
    ("voice", "method", "prepends", "strips"),
    [
        ("smollm", "byte_level", False, False),
        ("gemma", "byte_fallback", False, False),
        ("tinyllama", "byte_fallback", True, True),
    ],
)
def test_a_tokenizer_is_described_as_mlc_detects_it(tmp_path, voice, method, prepends, strips):
    path = tmp_path / "tokenizer.json"
    path.write_text(train(voice), encoding="utf-8")

    assert tokenizer_info.read(path) == {
        "token_postproc_method": method,
        "prepend_space_in_encode": prepends,
        "strip_space_in_decode": strips,
    }


@pytest.mark.parametrize("voice", VOICES)
def test_every_token_with_a_text_is_active(tmp_path, voice):
    import tokenizers

    path = tmp_path / "tokenizer.json"
    path.write_text(train(voice), encoding="utf-8")

    size = tokenizers.Tokenizer.from_file(str(path)).get_vocab_size(with_added_tokens=True)
    assert tokenizer_info.active_vocab_size(path) == size


def test_a_token_that_was_added_twice_is_refused(tmp_path):
    fields = json.loads(train("smollm"))
    fields["added_tokens"].append(fields["added_tokens"][0] | {"id": 999})
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(fields), encoding="utf-8")

    with pytest.raises(UsageError, match=r"adds the token '<\|endoftext\|>' twice"):
        tokenizer_info.read(path)
