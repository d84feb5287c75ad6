"""How a template wants to be called, against what transformers renders when it is called so."""

import time
from typing import Any

import pytest

from edgekit.errors import UsageError
from edgekit.model.template_fit import fit
from edgekit.text import template as template_limits
from edgekit.text.template import (
    AS_IT_IS,
    ChatTemplate,
    EndlessTemplateError,
    TemplateCall,
    as_parts,
)


SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
USUAL = {"tools": None, "documents": None, "add_generation_prompt": True, **SPECIAL}
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
TOOLS = "{% for tool in tools %}[{{ tool.name }}]{% endfor %}" + PLAIN
DOCUMENTS = "{{ documents | length }} documents\n" + PLAIN
PARTS = """\
{%- for m in messages %}
<{{ m.role }}>
    {%- for part in m.content %}
        {%- if part.type == 'text' %}{{ part.text | trim }}{% endif %}
    {%- endfor %}
{% endfor %}"""
FIRST_PART = "{% for m in messages %}<{{ m.role }}>{{ m.content[0].text + '.' }}\n{% endfor %}"
PARTS_OF_USERS = """\
{% for m in messages %}<{{ m.role }}>
{%- if m.role == 'user' %}{{ m.content | map(attribute='text') | join }}
{%- else %}{{ m.content + '!' }}{% endif %}
{% endfor %}"""
EITHER = """\
{% for m in messages %}<{{ m.role }}>
{%- if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}
{% endfor %}"""
ALL = ("user", "system", "assistant")
# Template, the lists that it needs, the roles that speak in parts.
TEMPLATES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "as usual": (PLAIN, (), ()),
    "a list of tools": (TOOLS, ("tools",), ()),
    "a number of documents": (DOCUMENTS, ("documents",), ()),
    "both": (TOOLS + DOCUMENTS, ("tools", "documents"), ()),
    "parts, or nothing is written": (PARTS, (), ALL),
    "parts, or it fails": (FIRST_PART, (), ALL),
    "parts of one role": (PARTS_OF_USERS, (), ("user",)),
    "text or parts": (EITHER, (), ()),
    "parts and tools": (TOOLS.removesuffix(PLAIN) + PARTS, ("tools",), ALL),
    "capital letters": (PLAIN.replace("m.content", "m.content | upper"), (), ()),
    "no answers": (
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
        (),
        (),
    ),
    "no system": (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + PARTS,
        (),
        ("user", "assistant"),
    ),
}
CONVERSATIONS = (
    [{"role": "user", "content": "Name <b>one</b>."}],
    [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "{{ Q }}"},
    ],
)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_gets_what_it_needs_and_no_more(name):
    source, empty_lists, content_parts = TEMPLATES[name]
    found = fit(source, AS_IT_IS, SPECIAL)
    assert (found.empty_lists, found.content_parts) == (empty_lists, content_parts)


@pytest.fixture(scope="module")
def transformers_tokenizer():
    transformers = pytest.importorskip("transformers")
    from edgekit.tests.witnesses.tiny_runner import byte_level_tokenizer

    return transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer(), **SPECIAL)


@pytest.mark.toolchain
@pytest.mark.parametrize("name", TEMPLATES)
def test_called_so_it_says_what_it_says_in_transformers(name, transformers_tokenizer):
    source, empty_lists, content_parts = TEMPLATES[name]
    call = fit(source, AS_IT_IS, SPECIAL)
    template = ChatTemplate.compile(call.preamble + source)
    for conversation in CONVERSATIONS:
        messages = as_parts(conversation, content_parts)
        expected = transformers_tokenizer.apply_chat_template(
            messages,
            chat_template=source,
            tokenize=False,
            add_generation_prompt=True,
            **{name: [] for name in empty_lists},
        )
        assert template.render(messages, USUAL) == expected
        assert "." in expected or "Q" in expected.upper()


def test_a_template_that_no_call_helps_says_what_the_usual_one_meets():
    with pytest.raises(UsageError, match="functions"):
        fit("{{ functions.first }}" + TOOLS, AS_IT_IS, SPECIAL)


def test_a_template_without_end_is_asked_once(monkeypatch):
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.2)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    started = time.monotonic()
    with pytest.raises(EndlessTemplateError, match=r"takes more than 0\.2 s"):
        fit(endless, AS_IT_IS, SPECIAL)
    assert time.monotonic() - started < 2  # of 28 forms that could be tried


# Variables, fixed at the head of the template

READS = """\
  {% if enable_thinking is defined and not enable_thinking %}brief{% else %}long{% endif %}

{%- macro level() %}{{ effort | default('none') }}{% endmacro %}
{% for m in messages %} {{ level() }} {{ m.content }}{{ tools | tojson }}
{% endfor %}
{{ extra | tojson if extra is defined }}"""
VALUES: dict[str, dict[str, Any]] = {
    "none": {},
    "a switch": {"enable_thinking": False},
    "the same switch, on": {"enable_thinking": True},
    "text": {"effort": 'low "é" %} {{ 1 }} \\n \n🙂'},
    "a number": {"effort": 0.5},
    "nothing": {"effort": None},
    "a list of objects": {"tools": [{"name": "add", "fields": {"a": None, "b": [True, -1, 1e30]}}]},
    "several": {"enable_thinking": False, "effort": "low", "extra": {"}}": "%}"}},
}


@pytest.mark.toolchain
@pytest.mark.parametrize("begin", ["", "\n", "  \n\n", "{# a comment #}\n", "\t{%- if true %}"])
@pytest.mark.parametrize("values", VALUES)
def test_a_fixed_variable_says_what_it_says_when_transformers_is_given_it(
    values, begin, transformers_tokenizer
):
    source = begin + READS + ("{% endif %}" if "if true" in begin else "")
    call = TemplateCall(variables=VALUES[values])
    template = ChatTemplate.compile(call.preamble + source)
    expected = transformers_tokenizer.apply_chat_template(
        CONVERSATIONS[1],
        chat_template=source,
        tokenize=False,
        add_generation_prompt=True,
        **VALUES[values],
    )
    assert template.render(CONVERSATIONS[1], USUAL) == expected


@pytest.mark.parametrize("values", VALUES)
def test_a_fixed_variable_is_none_that_a_caller_could_still_set(values):
    call = TemplateCall(variables=VALUES[values])
    free = (
        ChatTemplate.compile(READS).variables
        - ChatTemplate.compile(call.preamble + READS).variables
    )
    assert free == set(VALUES[values])
