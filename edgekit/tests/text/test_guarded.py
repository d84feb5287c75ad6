"""Strangers' templates and tokenizers: whatever they do ends in a refusal that names the file."""

import json
import sys

import pytest

from edgekit.errors import UsageError
from edgekit.runtime.limited import Allowance
from edgekit.tests.tiny import hostile_templates, hostile_tokenizers
from edgekit.tests.witnesses.tiny_runner import byte_level_tokenizer, text_in
from edgekit.text import guarded
from edgekit.text.template import ChatTemplate
from edgekit.text.tokenizer import open_tokenizer


has_limits = pytest.mark.skipif(sys.platform != "linux", reason="the system has no such limits")
ASKED = [{"role": "user", "content": "Hi"}]
# One of each kind, and what is said about it.
REFUSED = {
    "round 3000000000": "makes more than",
    "bytes times 3000000000": "makes more than",
    "percent, star 3000000000": "makes more than",
    "power 3000000000": "makes more than",
    "half a surrogate pair in a string": "not Unicode at character",
    "parentheses, 1000 deep": "nested too deeply",
    "blocks of for, 25 deep": "not Jinja that Python can run",
    "an unknown filter": "No filter named 'evil'",
}


def test_there_are_as_many_templates_as_the_attack_had():
    assert len(hostile_templates.TEMPLATES) >= 186


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_template_is_refused_with_its_reason(name):
    source = hostile_templates.TEMPLATES[name]
    with pytest.raises(UsageError, match=f"^the file x .*{REFUSED[name]}"):
        ChatTemplate.compile(source, origin="the file x").render(ASKED, {})


@has_limits
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("silent loops", "takes more than 1 s"),
        ("a million names", "takes more than 32 MiB of memory"),
    ],
)
def test_what_no_check_sees_the_system_ends(name, reason, monkeypatch):
    monkeypatch.setattr("edgekit.text.template.MAX_SECONDS", 60)  # the sandbox's own clock
    monkeypatch.setattr(guarded, "TEMPLATE", Allowance(cpu_s=1, memory_bytes=32 << 20))
    with pytest.raises(UsageError, match=f"^the file x {reason}$"):
        ChatTemplate.compile(hostile_templates.TEMPLATES[name], origin="the file x").render(
            ASKED, {}
        )
    assert ChatTemplate.compile("{{ messages[0].content }}").render(ASKED, {}) == "Hi"


@pytest.mark.parametrize("name", hostile_templates.REACHING)
def test_a_template_that_reaches_out_gets_nothing(name):
    try:
        said = ChatTemplate.compile(hostile_templates.TEMPLATES[name]).render(ASKED, {})
    except UsageError:
        return
    assert said in {"", "{}", "[Undefined]"}


def test_a_template_changes_neither_the_conversation_nor_later_ones(tmp_path):
    change = "{% set messages = [] %}{% set n = namespace(x=1) %}{% set strftime_now = 1 %}"
    asked = [{"role": "user", "content": "Hi"}]
    assert ChatTemplate.compile(change).render(asked, {}) == ""
    assert asked == [{"role": "user", "content": "Hi"}]
    year = ChatTemplate.compile("{{ messages[0].content }}{{ strftime_now('%Y') }}")
    assert year.render(asked, {}, clock="!") == "Hi!"


def test_what_json_cannot_hold_is_no_conversation():
    with pytest.raises(UsageError, match="more than JSON can hold"):
        ChatTemplate.compile("{{ messages }}").render([{"role": "user", "content": object()}], {})


@pytest.mark.slow
@pytest.mark.parametrize("name", hostile_templates.TEMPLATES)
def test_every_hostile_template_ends(name, monkeypatch):
    monkeypatch.setattr("edgekit.text.template.MAX_SECONDS", 0.3)
    try:
        said = ChatTemplate.compile(hostile_templates.TEMPLATES[name]).render(ASKED, {})
    except UsageError as refusal:
        said = str(refusal)
    assert len(said) <= 1 << 20


# Tokenizers

SLOW = {
    "every letter doubled", "one letter doubled", "one letter made long", "a token made long",
    "words before a mark", "letters before an end", "alternatives", "a slow normalizer",
    "a pattern that counts", "a rare letter made long",
}  # fmt: skip
HARMLESS = {"a pattern that refers back"}


@has_limits
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name in hostile_tokenizers.TOKENIZERS
        if name not in HARMLESS
    ],
)
def test_a_hostile_tokenizer_is_refused_by_its_name(name, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tokenizer.json"
    fields = json.loads(byte_level_tokenizer().to_str()) | hostile_tokenizers.TOKENIZERS[name]
    path.write_text(json.dumps(fields))
    with pytest.raises(UsageError) as refusal:
        open_tokenizer(path, refusal=UsageError)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_tokenizer_is_tried_once_for_each_content(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("edgekit.cache._ANSWERS", {})
    path, tried = tmp_path / "tokenizer.json", []
    real = guarded.try_tokenizer

    def counted(*asked):
        tried.append(asked)
        return real(*asked)

    monkeypatch.setattr(guarded, "try_tokenizer", counted)
    for content in (byte_level_tokenizer().to_str(), byte_level_tokenizer().to_str() + "\n"):
        path.write_text(content)
        assert [open_tokenizer(path).encode("Hi").ids for _ in range(2)]
    assert len(tried) == 2


def test_a_text_that_the_library_panics_over_is_refused(tmp_path):
    text = text_in(tmp_path, byte_level_tokenizer())
    text.tokenizer.pre_tokenizer = _slow_splitter()
    with pytest.raises(UsageError, match=r"the tokenizer fails over this text: .*retry-limit"):
        text.encode("q" * 60 + "!")


def _slow_splitter():
    import tokenizers

    pattern = tokenizers.Regex("(q+)+$")  # which no text of the trial meets
    return tokenizers.pre_tokenizers.Split(pattern, "isolated")
