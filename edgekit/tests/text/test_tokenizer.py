import dataclasses
import random
import re
from datetime import datetime

import pytest

from edgekit.errors import BundleError, UsageError
from edgekit.tests.witnesses.tiny_runner import (
    CHATML,
    TEXTS,
    byte_level_tokenizer,
    sentencepiece_tokenizer,
    text_in,
)
from edgekit.text.rules import TextRules
from edgekit.text.template import ChatTemplate, Message
from edgekit.text.tokenizer import StopStrings, Text


TOKENIZERS = {
    "byte level": byte_level_tokenizer,
    "sentencepiece": sentencepiece_tokenizer,
    "sentencepiece without strip": lambda: sentencepiece_tokenizer(decoder="keep"),
    "metaspace": lambda: sentencepiece_tokenizer(decoder="metaspace"),
}


@pytest.fixture(params=TOKENIZERS)
def any_text(request, tmp_path):
    return text_in(tmp_path, TOKENIZERS[request.param]())


@pytest.fixture
def text(tmp_path):
    return text_in(tmp_path, byte_level_tokenizer())


def pieces_of(text, ids, **options):
    detokenizer = text.detokenizer(**options)
    return [*(detokenizer.feed(token) for token in ids), detokenizer.finish()]


# The detokenizer


@pytest.mark.parametrize("written", TEXTS)
def test_streamed_pieces_join_to_the_decoded_text(any_text, written):
    ids = any_text.encode(written)
    assert "".join(pieces_of(any_text, ids)) == any_text.decode(ids)


def test_any_sequence_of_ids_streams_to_what_the_tokenizer_decodes(tmp_path):
    text = text_in(tmp_path, byte_level_tokenizer())
    chance = random.Random(7)
    for _ in range(300):
        ids = [chance.randrange(text.tokenizer.get_vocab_size() + 5) for _ in range(40)]
        assert "".join(pieces_of(text, ids)) == text.decode(ids)


@pytest.mark.parametrize("decoder", ["fuse", "keep", "metaspace"])
def test_any_words_stream_to_what_a_sentencepiece_tokenizer_decodes(tmp_path, decoder):
    text = text_in(tmp_path, sentencepiece_tokenizer(decoder=decoder))
    words = [i for t, i in text.tokenizer.get_vocab().items() if not re.fullmatch("<0x..>", t)]
    chance = random.Random(7)
    for _ in range(300):
        ids = chance.choices(words, k=20)
        assert "".join(pieces_of(text, ids)) == text.decode(ids)


def test_a_character_of_four_tokens_comes_whole(tmp_path):
    text = text_in(tmp_path, sentencepiece_tokenizer())
    pieces = pieces_of(text, text.encode("a🙂b"))
    assert [piece for piece in pieces if piece] == ["a", "🙂", "b"]


def test_ids_that_end_within_a_character_end_in_one_replacement(tmp_path):
    text = text_in(tmp_path, sentencepiece_tokenizer())
    ids = text.encode("a🙂")[:-1]
    assert pieces_of(text, ids)[-1] == "\ufffd"


def test_a_continued_prompt_keeps_the_space_before_its_first_word(tmp_path):
    text = text_in(tmp_path, sentencepiece_tokenizer())
    ids = text.encode("the fox")
    assert "".join(pieces_of(text, ids)) == "the fox"
    assert "".join(pieces_of(text, ids, continues=True)) == " the fox"


def test_special_tokens_are_no_text_but_a_tool_call_is(text):
    ids = text.encode("a<|im_start|>b<tool>c")
    assert "".join(pieces_of(text, ids)) == "ab<tool>c"


def test_a_decoder_of_another_kind_is_refused_by_name(tmp_path):
    from tokenizers import decoders

    tokenizer = byte_level_tokenizer()
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(BundleError, match="WordPiece"):
        text_in(tmp_path, tokenizer).detokenizer()


# Stop strings


@pytest.mark.parametrize(
    "pieces",
    [["one ST", "OP two"], ["one S", "T", "O", "P two"], ["one STOP two"], list("one STOP two")],
)
def test_a_stop_string_ends_the_text_wherever_its_pieces_break(pieces):
    stop = StopStrings(["STOP", "never"])
    assert "".join(stop.feed(piece) for piece in pieces if not stop.found) == "one "
    assert stop.found


def test_what_only_looked_like_a_stop_string_is_given_back():
    stop = StopStrings(["<end>"])
    assert stop.feed("a<en") == "a"
    assert stop.feed("tity") == "<entity"
    assert (stop.feed("<e"), stop.finish(), stop.found) == ("", "<e", False)


def test_the_first_of_several_stop_strings_counts():
    stop = StopStrings(["dog", "brown"])
    assert stop.feed("the brown dog") == "the "


# Encoding


def test_special_tokens_in_plain_text_are_tokens_or_letters_as_asked(text):
    assert len(text.encode("<|im_end|>")) == 1
    assert len(text.encode("<|im_end|>", parses_special=False)) > 1
    assert len(text.encode("<|im_end|>")) == 1


def test_bos_comes_once(tmp_path):
    text = text_in(tmp_path, byte_level_tokenizer(), adds_bos=True)
    bos = text.tokenizer.token_to_id("<s>")
    assert text.encode("a")[0] == bos
    assert text.encode("<s>a").count(bos) == 1
    assert bos not in text.encode("a", adds_bos=False)


def test_a_template_that_writes_bos_gets_no_second_one(tmp_path):
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    text = text_in(tmp_path, byte_level_tokenizer(), template=template, adds_bos=True)
    ids = text.encode_chat([{"role": "user", "content": "hi"}])
    assert ids.count(text.tokenizer.token_to_id("<s>")) == 1


def test_a_tokenizer_that_would_cut_long_text_does_not(tmp_path):
    tokenizer = byte_level_tokenizer()
    tokenizer.enable_truncation(4)
    assert len(text_in(tmp_path, tokenizer).encode("x y z " * 20)) > 50


def test_no_token_stands_for_more_bytes_than_the_longest(any_text):
    tokenizer = any_text.tokenizer
    sizes = [
        len(tokenizer.decode([id], skip_special_tokens=False).encode())
        for id in range(tokenizer.get_vocab_size())
    ]
    # A byte of a character decodes to U+FFFD, which takes three.
    assert 3 < max(sizes) <= any_text.longest_token_bytes <= 3 * max(sizes)


def test_half_a_surrogate_pair_is_refused(text):
    with pytest.raises(UsageError, match="not Unicode at character 1"):
        text.encode("a\ud83d")


def test_a_changed_template_is_refused(tmp_path, text):
    (tmp_path / "chat_template.jinja").write_text(CHATML + " ")
    with pytest.raises(BundleError, match="not the chat template"):
        Text.open(tmp_path, text.rules)


def test_a_missing_template_is_refused(tmp_path, text):
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(BundleError, match="is missing"):
        Text.open(tmp_path, text.rules)


def test_a_template_the_manifest_does_not_know_is_refused(tmp_path, text):
    rules = dataclasses.replace(text.rules, chat_template_sha256=None)
    with pytest.raises(BundleError, match="not the chat template"):
        Text.open(tmp_path, rules)


def test_a_broken_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    rules = TextRules(stop_ids=(), special_tokens={}, adds_bos=False, chat_template_sha256=None)
    with pytest.raises(BundleError, match="is not a tokenizer"):
        Text.open(tmp_path, rules)


# The token after an answer


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ("<|im_end|>\n", "<|im_end|>"),
        (" </s>", "</s>"),
        ("\n", None),
        ("{{ eos_token }}", "</s>"),
        ("</s><end>", "</s>"),
    ],
)
def test_the_token_after_an_answer_is_read_off_the_template(tmp_path, after, expected):
    template = "{% for m in messages %}<s>{{ m['content'] }}" + after + "{% endfor %}"
    text = text_in(tmp_path, byte_level_tokenizer(), template=template)
    stop = text.stop_id_of_template()
    assert (None if stop is None else text.tokenizer.id_to_token(stop)) == expected


ENDS = {
    "no answer": ("{% for m in messages if m.role == 'user' %}<s>{{ m.content }}<end>{% endfor %}",
                  None),
    "no answer, at the end": (
        "{% for m in messages %}<s>{{ m.content + '<end>' if m.role == 'user' }}{% endfor %}",
        None),
    "a trimmed answer": (
        "{% for m in messages %}<s>{{ m.content | trim }}<end>\n{% endfor %}", "<end>"),
    "capital letters": (
        "{% for m in messages %}<s>{{ m.content | upper }}<end>{% endfor %}", "<end>"),
    "an answer written twice": (
        "{% for m in messages %}<s>{{ m.content }}</s>{{ m.content }}<end>{% endfor %}", "<end>"),
    "an answer in quotes": (
        "{% for m in messages %}<s>{{ m.content | tojson }}<end>{% endfor %}", None),
    "no end": ("{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}\n{% endfor %}", None),
    "no end, and the next header": (
        "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}\n{% endfor %}<s>assistant\n",
        None),
    "an end, and the next header": (
        "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}<s>assistant\n",
        "<end>"),
    "an open answer at the end": (
        "{% for m in messages %}<s>{{ m.content }}{{ '<end>' if not loop.last }}{% endfor %}",
        None),
    "ends between messages": (
        "{% for m in messages %}{{ m.content }}</s>{% endfor %}", "</s>"),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_a_token_ends_answers_only_if_the_template_writes_it_after_one(tmp_path, name):
    template, expected = ENDS[name]
    text = text_in(tmp_path, byte_level_tokenizer(), template=template)
    stop = text.stop_id_of_template()
    assert (None if stop is None else text.tokenizer.id_to_token(stop)) == expected


def test_of_tokens_that_begin_alike_the_longest_is_the_one_after_an_answer(tmp_path):
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens(["<end>!", "<end>?"])
    template = "{% for m in messages %}{{ m['content'] }}<end>!{% endfor %}"
    text = text_in(tmp_path, tokenizer, template=template)
    assert text.stop_id_of_template() == tokenizer.token_to_id("<end>!")


def test_a_model_without_template_has_no_token_after_an_answer(tmp_path):
    text = text_in(tmp_path, byte_level_tokenizer(), template=None)
    assert text.stop_id_of_template() is None
    with pytest.raises(UsageError, match="no chat template"):
        text.encode_chat([{"role": "user", "content": "hi"}])


# Hostile and broken templates

GROWING = {
    "output": "{% for a in range(99999) %}{{ 'x' * 99 }}{% endfor %}",
    "times": "{{ 'x' * 1000000000 }}",
    "times, turned": "{{ 1000000000 * 'x' }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "doubling by ~": "{% set n = namespace(x='x') %}{% for a in range(60) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling by +": "{% set n = namespace(x='x') %}{% for a in range(60) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}",
    "filter": "{{ 'x' | center(1000000000) }}",
    "filter by name": "{{ ['x'] | map('center', 1000000000) | list }}",
    "filter of a product": "{% set s = 'x' * 99999 %}{{ s | replace('x', s) }}",
    "format filter": "{{ '%1000000000d' | format(3) }}",
    "batch": "{{ [1] | batch(1000000000, 'x') | list }}",
    "json": "{{ [1] | tojson(indent=1000000000) }}",
    "method": "{{ 'x'.ljust(1000000000) }}",
    "method of a product": "{% set s = 'x' * 99999 %}{{ s.replace('x', s) }}",
    "join": "{% set s = 'x' * 99999 %}{{ s.join(s) }}",
    "percent": "{{ '%1000000000d' % 3 }}",
    "percent, indirect": "{{ '%*d' % (1000000000, 3) }}",
    "format": "{{ '{:1000000000}'.format(3) }}",
    "format, indirect": "{{ '{:{}}'.format(3, 1000000000) }}",
}


@pytest.mark.parametrize("name", GROWING)
def test_a_template_that_grows_without_end_is_refused(name, monkeypatch):
    monkeypatch.setattr("edgekit.text.template.MAX_SECONDS", 60)
    with pytest.raises(UsageError, match="more than 1048576 characters"):
        ChatTemplate.compile(GROWING[name]).render([], {})


@pytest.mark.parametrize("pair", ["[n.x, n.x]", "(n.x, n.x)", "{'a': n.x, 'b': n.x}"])
def test_nested_doubling_is_refused(pair, monkeypatch):
    monkeypatch.setattr("edgekit.text.template.MAX_SECONDS", 60)
    monkeypatch.setattr("edgekit.text.template.MAX_CHARACTERS", 10_000)
    grow = "{% set n = namespace(x='x') %}{% for a in range(60) %}{% set n.x = "
    with pytest.raises(UsageError, match="more than 10000 characters"):
        ChatTemplate.compile(grow + pair + " %}{% endfor %}{{ n.x }}").render([], {})


ENDLESS = {
    "silent loops": "{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% endfor %}{% endfor %}",
    "loops without a call": "{% set r = range(99999) %}{% for a in r %}{% for b in r %}"
    "{% endfor %}{% endfor %}",
    "a macro that calls itself twice": "{% macro m(n) %}{% if n %}{% set a = m(n - 1) %}"
    "{% set b = m(n - 1) %}{% endif %}{% endmacro %}{{ m(60) }}",
    "sums": "{% for i in range(9999) %}{% set x = range(99999) | sum %}{% endfor %}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_that_does_not_end_is_refused(name, monkeypatch):
    monkeypatch.setattr("edgekit.text.template.MAX_SECONDS", 0.05)
    with pytest.raises(UsageError, match="takes more than"):
        ChatTemplate.compile(ENDLESS[name]).render([], {})


BROKEN = {
    "{{ raise_exception('no system role here') }}": "no system role here",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "calls itself without end",
    "{{ none + 'x' }}": "failed: unsupported operand",
    "{{ 1 / 0 }}": "failed: division by zero",
    "{{ absent.field }}": "'absent' is undefined",
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{{ messages.append(1) }}": "unsafe",
    "{% set n = namespace(_x=1) %}": "cannot hold '_x'",
    "{% include 'x' %}": "no loader",
    "a{% if %}": r"not Jinja: .* \(line 1\)",
    "{{ 'x'.translate({}) }}": "translate",
}


@pytest.mark.parametrize("source", BROKEN)
def test_a_broken_template_is_refused_in_one_sentence(source):
    with pytest.raises(UsageError, match=BROKEN[source]) as refusal:
        ChatTemplate.compile(source).render([], {})
    assert "\n" not in str(refusal.value)


def test_large_numbers_that_grow_nothing_are_fine():
    source = "{{ 1700000000 | string }} {{ absent | default(1700000000) }} {{ 2 * 3 + 10 ** 9 }}"
    assert ChatTemplate.compile(source).render([], {}) == "1700000000 1700000000 1000000006"


def test_a_long_conversation_is_no_attack(tmp_path):
    template = (
        "{% set n = namespace(all='') %}{% for m in messages %}{% set n.all = n.all ~ m.content"
        " | replace('<think>', '<|thought|>') ~ m.content.split('</think>')[-1] %}"
        "{% endfor %}{{ n.all.replace('\\n', ' ') | trim }}"
    )
    text = text_in(tmp_path, byte_level_tokenizer(), template=template)
    messages = [{"role": "user", "content": "<think>word</think>\n" * 9000}] * 2
    assert len(text.render(messages)) > 400_000


# The same bytes as transformers

TEMPLATES = {
    "ChatML with a default system turn": """\
{%- if messages[0]['role'] != 'system' -%}
    {{- '<|im_start|>system\\nBe brief and kind.<|im_end|>\\n' -}}
{%- endif -%}
{% for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>\\n' }}
{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
""",
    "headers after BOS": """\
{{- bos_token }}
{%- for message in messages if message.role != 'tool' %}
    {%- set header = '<|start|>' ~ message['role'] ~ '<|end|>\\n\\n' %}
    {%- if loop.first and message.role == 'system' %}
        {{- header ~ "Today: " ~ (today | default('26 Jul 2024')) ~ "\\n\\n" }}
    {%- else %}{{- header }}{%- endif %}
    {{- message['content'] | trim ~ '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant<|end|>\\n\\n' }}{%- endif %}
""",
    "turns without a system role": """\
{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'system' %}{{ raise_exception('there is no system role') }}{% endif %}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
<turn>{{ role }}
{{ message['content'] | trim }}<end>
{% endfor %}
{% if add_generation_prompt %}<turn>model
{% endif %}""",
    "instructions in brackets": """\
{%- set first = messages[0].content if messages[0].role == 'system' else none -%}
{%- set turns = messages[1:] if first is not none else messages -%}
{{ bos_token }}
{%- for message in turns -%}
  {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
    {{ raise_exception('roles must alternate: ' ~ message.role) }}
  {%- endif -%}
  {%- if message.role == 'user' -%}
    [INST] {{ first ~ '\\n\\n' if loop.first and first is not none }}{{ message.content }} [/INST]
  {%- else %} {{ message.content.strip() }}{{ eos_token }}
  {%- endif -%}
{%- endfor -%}
""",
    "one tag for each role": """\
{% for m in messages %}{% if m['role'] == 'system' and m['content'] %}
<|system|>
{{ m['content'] }}<|end|>
{% elif m['role'] == 'user' %}
{{ '<|user|>\\n' + m['content'] + '<|end|>\\n' }}
{%- elif m['role'] == 'assistant' %}
{{ '<|assistant|>\\n' + m['content'] + '<|end|>\\n' }}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}
""",
    "loop controls, a namespace and the date": """\
{%- set seen = namespace(users=0, last='') -%}
{{ strftime_now('%Y-%m-%d') }}
{% for m in messages %}
  {%- if m.role == 'system' %}{% continue %}{% endif -%}
  {%- if seen.users > 1 %}{% break %}{% endif -%}
  {%- if m.role == 'user' %}{% set seen.users = seen.users + 1 %}{% endif -%}
  {% set seen.last = m.content %}
{{ '%02d' % loop.index }}|{{ m.role.upper() }}: {{ m.content.split('\\n') | join(' / ') }}
{% endfor %}{{ seen.users }} users; last {{ seen.last | length }}
""",
    "macros, JSON and a marked answer": """\
{%- macro turn(role, body, loud=false) -%}
<{{ role }}{{ '!' if loud }}>{{ caller() if caller }}{{ body }}</{{ role }}>
{% endmacro -%}
{%- for m in messages -%}
  {%- if m.role == 'assistant' -%}
    {% generation %}{{ turn(m.role, m.content) }}{% endgeneration %}
  {%- else -%}
    {%- call turn(m.role, m.content, loud=loop.last) %}#{{ loop.index }} {% endcall -%}
  {%- endif -%}
  {{ m | tojson }}{{ {'b': [1, m.content], 'a': none} | tojson(indent=2) }}
{% endfor %}
{{- tools is none }} {{ documents is defined }} {{ 'thinking' in messages[-1] }}
""",
    "parts, slices and filters": """\
{% for m in messages[::-1] %}
{{ loop.revindex }} {{ m.items() | list | length }} {{ m.content[:5] | replace('a', 'A') | title }}
{{- m.content | indent(2) }} {{ m.content.rstrip('.') }} {{ (m.content ~ m.role) | length }}
{%- for line in m.content.splitlines() | reject('equalto', '') %}{{ loop.cycle('-', '+') }}
{%- endfor %}
{% endfor %}
{{ messages | map(attribute='role') | unique | join(',') }} {{ '{:>4}'.format(messages | length) }}
{{ "%s and %r" | format(bos_token, eos_token) }} {{ dict(a=1).get('a') }} {{ [1, 2] + [3] }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length in [1, 2, 3] }}
""",
}
CONVERSATIONS: dict[str, list[Message]] = {
    "one question": [{"role": "user", "content": "Hello, world"}],
    "with a system": [
        {"role": "system", "content": " You are terse.\n"},
        {"role": "user", "content": "안녕 <b>&amp;</b> 'quoted' \"twice\"\n\nsecond line "},
    ],
    "two turns": [
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": " sure 🙂 ", "reasoning": "easy", "tool_calls": None},
        {"role": "user", "content": "{{ 7 * 7 }} {% raw %}"},
    ],
    "an answer at the end": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "the answer."},
    ],
}


@pytest.fixture(scope="module")
def reference():
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_level_tokenizer(),
        bos_token="<s>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
    )


@pytest.mark.toolchain
@pytest.mark.parametrize("prompts", [True, False])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_byte_for_byte_as_in_transformers(
    tmp_path, reference, name, conversation, prompts
):
    import jinja2

    text = text_in(tmp_path, byte_level_tokenizer(), template=TEMPLATES[name])
    messages, options = CONVERSATIONS[conversation], {"add_generation_prompt": prompts}
    template = TEMPLATES[name]
    try:
        expected = reference.apply_chat_template(
            messages, chat_template=template, tokenize=False, **options
        )
    except jinja2.TemplateError as error:
        with pytest.raises(UsageError, match=re.escape(str(error))):
            text.render(messages, **options)
        return
    assert text.render(messages, **options) == expected
    ids = reference.apply_chat_template(messages, chat_template=template, **options)["input_ids"]
    assert text.encode_chat(messages, **options) == ids


@pytest.mark.toolchain
def test_text_encodes_and_decodes_as_in_transformers(tmp_path, reference):
    text = text_in(tmp_path, byte_level_tokenizer())
    for written in (*TEXTS, "<s>a<|im_end|>b<tool>"):
        ids = reference(written, add_special_tokens=False)["input_ids"]
        assert text.encode(written) == ids
        decoded = reference.decode(ids, skip_special_tokens=True)
        assert "".join(pieces_of(text, ids)) == text.decode(ids) == decoded


def test_the_date_in_a_template_is_today(tmp_path):
    text = text_in(tmp_path, byte_level_tokenizer(), template="{{ strftime_now('%Y') }}")
    assert text.render(CONVERSATIONS["one question"]) == str(datetime.now().year)  # noqa: DTZ005
