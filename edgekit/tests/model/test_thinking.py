"""What templates do about thoughts: small ones in the styles there are, and real ones."""

import json
import time

import pytest

from edgekit.model import template_fit, thinking
from edgekit.model.thinking import Switch
from edgekit.tests.witnesses.real_vocabularies import template, tokenizer_files
from edgekit.text import template as template_limits
from edgekit.text.rules import TextRules, ThoughtMarks
from edgekit.text.template import AS_IT_IS, ChatTemplate
from edgekit.text.tokenizer import Text


pytest.importorskip("jinja2")

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
THINK = ThoughtMarks(opens="<think>", closes="</think>")
OPEN, EMPTY = "<think>\\n", "<think>\\n\\n</think>\\n\\n"

LATEST = (
    "{%- set ns = namespace(asked=0) %}"
    "{%- for m in messages if m.role == 'user' %}{% set ns.asked = loop.index0 * 2 %}{% endfor %}"
)
TURNS = """\
{%- for m in messages %}
    {%- set said, thought = m.content, '' %}
    {%- if m.role == 'assistant' %}
        {%- if m.reasoning_content is string %}
            {%- set thought = m.reasoning_content %}
        {%- elif '</think>' in said %}
            {%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set said = said.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' and loop.index0 > ns.asked and (thought or ALWAYS) %}
        {{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- said + '<|im_end|>\\n' }}
{%- endfor %}
"""
REPLY = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
QWEN3 = LATEST + TURNS.replace("ALWAYS", "loop.last") + REPLY
QWEN35 = LATEST + TURNS.replace("ALWAYS", "true") + REPLY
GEMMA4 = """\
{%- macro told(text) %}
    {%- for part in text.split('<channel|>') %}{{ part.split('<|channel>')[0] }}{% endfor %}
{%- endmacro %}
{{- bos_token }}
{%- if enable_thinking is defined and enable_thinking %}
    {{- '<|turn>system\\n<|think|>\\n<turn|>\\n' }}
{%- endif %}
{%- for m in messages %}
    {{- '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
    {%- if m.reasoning_content and m.tool_calls and loop.last %}
        {{- '<|channel>thought\\n' + m.reasoning_content + '\\n<channel|>' }}
    {%- endif %}
    {%- for call in m.tool_calls or [] %}
        {{- '<|tool_call>call:' + call.function.name + '<tool_call|>' }}
    {%- endfor %}
    {{- told(m.content) if m.role == 'assistant' else m.content }}{{ '<turn|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|turn>model\\n' }}
    {%- if not enable_thinking | default(false) %}{{- '<|channel>thought\\n<channel|>' }}{% endif %}
{%- endif %}"""
SMOLLM3 = """\
{%- set thinks = enable_thinking if enable_thinking is defined else true %}
{{- '<|im_start|>system\\nReasoning Mode: ' + ('/think' if thinks else '/no_think') }}
{{- '<|im_end|>\\n' }}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {{- m.content.split('</think>')[-1].lstrip('\\n') + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' + ('' if thinks else '<think>\\n\\n</think>\\n') }}
{%- endif %}"""
R1 = """\
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- '<Assistant>' + m.content.split('</think>')[-1] + eos_token }}
    {%- else %}{{- '<User>' + m.content }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<Assistant><think>\\n' }}{% endif %}"""
GRANITE = """\
{%- if thinking %}
    {{- '<|start|>system\\nThink between <think></think>, then answer.<|end|>\\n' }}
{%- endif %}
{%- for m in messages %}{{- '<|start|>' + m.role + '\\n' + m.content + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant\\n' }}{% endif %}"""
MINISTRAL = """\
{%- for m in messages %}
    {%- if m.role == 'user' %}{{- '[INST]' + m.content + '[/INST]' }}
    {%- elif m.content is string %}{{- m.content + eos_token }}
    {%- else %}
        {%- for part in m.content %}
            {{- '[THINK]' + part.thinking + '[/THINK]' if part.type == 'thinking' else part.text }}
        {%- endfor %}{{- eos_token }}
    {%- endif %}
{%- endfor %}"""
EMPTY_IN_EVERY_ANSWER = """\
{%- for m in messages %}
    {{- '<|' + m.role + '|>' }}
    {%- if m.role == 'assistant' %}{{- '<think>' + (m.reasoning_content or '') + '</think>' }}
    {%- endif %}{{- m.content }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|><think>' }}{% endif %}"""
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TOOLS = CHATML + "{% if enable_tools %}<tool_call></tool_call>{% endif %}"
DUMPS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"


def replies(*, on, off, default):
    """Return how a template of the Qwen family ends, thinking by default or not."""
    switch = "enable_thinking is defined and enable_thinking is true"
    if default:
        switch = "not (enable_thinking is defined and enable_thinking is false)"
    thinks, answers = (f"{{{{- '{written}' }}}}" for written in (on, off))
    return f"{{%- if {switch} %}}{thinks}{{%- else %}}{answers}{{%- endif %}}{{%- endif %}}"


def switch(default, *, name="enable_thinking", thinks_if=True):
    return Switch(name=name, default=default, thinks_if=thinks_if)


GEMMAS = ThoughtMarks(opens="<|channel>thought", closes="<channel|>")
# Template, its marks, its switch, whether its prompts open a thought, whether it strips them.
STYLES = {
    "Qwen3": (
        QWEN3 + replies(on="", off=EMPTY, default=True), THINK, switch(True), False, True
    ),
    "Qwen3.5 4B": (
        QWEN35 + replies(on=OPEN, off=EMPTY, default=True), THINK, switch(True), True, True
    ),
    "Qwen3.5 0.8B": (
        QWEN35 + replies(on=OPEN, off=EMPTY, default=False), THINK, switch(False), False, True
    ),
    "Gemma 4": (GEMMA4, GEMMAS, switch(False), False, True),
    "SmolLM3": (SMOLLM3, THINK, switch(True), False, True),
    "R1": (R1, THINK, None, True, True),
    "Granite 3.3": (GRANITE, THINK, switch(False, name="thinking"), False, True),
    "Ministral 3": (
        MINISTRAL, ThoughtMarks(opens="[THINK]", closes="[/THINK]"), None, False, True
    ),
    "an empty thought in every answer": (EMPTY_IN_EVERY_ANSWER, THINK, None, True, False),
    "left to the model, or switched": (
        QWEN3
        + "{%- if enable_thinking is defined %}"
        + replies(on=OPEN, off=EMPTY, default=True)
        + "{%- endif %}",
        THINK, switch(None), False, True,
    ),
    "a switch that turns it off": (
        QWEN35
        + replies(on=OPEN, off=EMPTY, default=True).replace("enable_thinking is false", "no_hurry")
        .replace("enable_thinking is defined", "true").replace("no_hurry", "no_thinking"),
        THINK, switch(False, name="no_thinking", thinks_if=False), True, True,
    ),
    "no thoughts": (CHATML, None, None, False, False),
    "other tags": (TOOLS, None, None, False, False),
    "messages written as they are": (DUMPS, None, None, False, False),
}  # fmt: skip


def text_of(source):
    call = template_fit.fit(source, AS_IT_IS, SPECIAL)
    rules = TextRules(stop_ids=(), special_tokens=SPECIAL, adds_bos=False,
                      chat_template_sha256=None, content_parts=call.content_parts)  # fmt: skip
    compiled = ChatTemplate.compile(call.preamble + source)
    return Text(tokenizer=None, template=compiled, rules=rules)


@pytest.mark.parametrize("style", STYLES)
def test_a_template_says_how_the_model_thinks(style):
    source, marks, switch, opens, strips = STYLES[style]
    found = thinking.find(text_of(source))
    assert (found.marks, found.switch, found.opens, found.strips) == (marks, switch, opens, strips)


GIVEN = "--template-var enable_thinking"
LESS = "; earlier answers are read without their thoughts"
NOTES = {
    "Qwen3.5 0.8B": f"enable_thinking is off by default: {GIVEN}=true has the model think first",
    "Qwen3.5 4B": (
        f"enable_thinking is on by default: {GIVEN}=false has the model answer without thinking"
    ),
    "a switch that turns it off": (
        "no_thinking is off by default: --template-var no_thinking=true has the model answer "
        "without thinking"
    ),
    "left to the model, or switched": (
        f"enable_thinking is not set by default, so the model decides: {GIVEN}=true has it think "
        f"first, {GIVEN}=false answer without thinking"
    ),
}


@pytest.mark.parametrize("style", NOTES)
def test_a_plan_says_in_one_note_how_thinking_is_switched(style):
    (note,) = thinking.find(text_of(STYLES[style][0])).notes
    assert note == f"the chat template's {NOTES[style]}{LESS}"


def test_a_plan_says_that_nothing_switches_thinking():
    (note,) = thinking.find(text_of(R1)).notes
    assert note == f"the chat template opens a thought before every answer{LESS}"


def test_a_template_without_thoughts_has_no_note():
    assert thinking.find(text_of(CHATML)).notes == ()


def test_a_fixed_switch_is_none_and_what_it_does_is_seen():
    source = "{%- set enable_thinking = false %}" + STYLES["Qwen3.5 4B"][0]
    found = thinking.find(text_of(source))
    assert (found.marks, found.switch, found.opens) == (THINK, None, False)


@pytest.mark.parametrize(
    "wrong",
    [
        "{% for m in messages if m.reasoning_content %}{{ raise_exception('no') }}{% endfor %}",
        "{% for m in messages if m.tool_calls %}{{ m.nothing.at_all }}{% endfor %}",
        "{% if messages | length > 1 %}{{ raise_exception('one question') }}{% endif %}",
    ],
)
def test_a_template_that_fails_over_thoughts_is_no_refusal(wrong):
    found = thinking.find(text_of(wrong + CHATML + "{{ enable_thinking }}"))
    assert (found.marks, found.notes) == (None, ())


def test_a_template_that_grows_over_thoughts_is_asked_once(monkeypatch):
    endless = (
        "{% for m in messages if m.reasoning_content %}{% for a in range(99999) %}"
        "{% for b in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
    )
    text = text_of(endless + CHATML)
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.2)
    started = time.monotonic()
    assert thinking.find(text).marks is None
    assert time.monotonic() - started < 2


# Real templates


@pytest.mark.toolchain
@pytest.mark.parametrize(
    ("name", "marks", "switch", "opens", "strips"),
    [
        ("Qwen-Qwen3-0.6B", THINK, switch(True), False, True),
        ("Qwen3.5-4B", THINK, switch(True), True, True),
        ("google-gemma-4-31B-it", GEMMAS, switch(False), False, True),
        ("LFM2.5-8B-A1B", THINK, None, False, True),
        ("LFM2.5-Instruct", None, None, False, False),
        ("HuggingFaceTB-SmolLM3-3B", THINK, switch(True), False, True),
        ("ibm-granite-granite-3.3-2B-Instruct", THINK, switch(False, name="thinking"), False, True),
        ("openbmb-MiniCPM5-1B", THINK, switch(None), False, True),
        ("llama-cpp-deepseek-r1", THINK, None, True, True),
        (
            "mistralai-Ministral-3-14B-Reasoning-2512",
            ThoughtMarks(opens="[THINK]", closes="[/THINK]"),
            None,
            False,
            True,
        ),
        ("meta-llama-Llama-3.2-3B-Instruct", None, None, False, False),
        ("google-gemma-2-2b-it", None, None, False, False),
        ("Qwen-Qwen2.5-7B-Instruct", None, None, False, False),
    ],
)
def test_a_real_template_says_how_the_model_thinks(name, marks, switch, opens, strips):
    found = thinking.find(text_of(template(name)))
    assert (found.marks, found.switch, found.opens, found.strips) == (marks, switch, opens, strips)


@pytest.mark.toolchain
def test_the_template_that_a_tokenizer_brings_says_it_too():
    settings = json.loads((tokenizer_files("qwen3") / "tokenizer_config.json").read_text())
    found = thinking.find(text_of(settings["chat_template"]))
    assert (found.marks, found.switch) == (THINK, switch(True))
