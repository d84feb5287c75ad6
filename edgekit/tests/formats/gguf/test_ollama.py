"""The Modelfile next to a GGUF file, read back by the rules of Ollama's parser."""

import json

import pytest

from edgekit.doctor import _tiny_checkpoint
from edgekit.formats.gguf import ollama
from edgekit.formats.gguf.ollama import modelfile, quote
from edgekit.source.checkpoint import Checkpoint
from edgekit.source.opening import open_checkpoint
from edgekit.source.writer import write_checkpoint


SYSTEM = """\
{%- if messages[0]['role'] != 'system' -%}<s>You are "Ada".
You help.</s>{%- endif -%}
{%- for m in messages -%}
{%- if m['role'] == 'system' -%}<s>{{ m['content'] }}</s>
{%- else -%}[{{ m['content'] }}]{%- endif -%}
{%- endfor -%}"""
PLAIN = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "[{{ m['content'] }}]{% endfor %}"
)


def instructions(text):
    """Read a Modelfile: comments, then a name and a value that may be quoted once or thrice."""
    found, left = [], text
    while left := left.lstrip(" \t\r\n"):
        if left.startswith("#"):
            left = left.partition("\n")[2]
            continue
        name, _, left = left.partition(" ")
        if name == "PARAMETER":
            parameter, _, left = left.partition(" ")
            name = f"PARAMETER {parameter}"
        value, left = value_of(left)
        found.append((name, value))
    return found


def value_of(text):
    """Take a value: it ends at the first line end where its quotes are closed."""
    end = -1
    while True:
        end = text.index("\n", end + 1)
        raw = text[:end].strip()
        for mark in ('"""', '"'):
            if raw.startswith(mark):
                closed = len(raw) >= 2 * len(mark) and raw.endswith(mark)
                break
        else:
            return raw, text[end:]
        if closed:
            return raw[len(mark) : -len(mark)], text[end:]


@pytest.mark.parametrize(
    "text",
    ["<|im_end|>", "two words", " edges ", 'say "hi"', '"', '""', 'ends in """', '"""', "a\nb",
     'a "b"\nc\n', "\n", "tab\there", "# no comment", "FROM x", "日本語 👋🏽", "", 'x"""y\nz',
     "a\r\nb", '"quoted"'],
)  # fmt: skip
def test_what_is_quoted_reads_back(text):
    quoted = quote(text)
    assert quoted is not None
    assert value_of(f"{quoted}\nPARAMETER x 1\n") == (text, "\nPARAMETER x 1\n")


@pytest.mark.parametrize(
    "text", ['"""\nx', 'a\nb"""\nc', "zero\0", "\x1b[0m", "a\u200bb", "\u00a0"]
)
def test_what_a_modelfile_cannot_hold_is_not_quoted(text):
    assert quote(text) is None


@pytest.fixture
def model(tmp_path):
    """Return a directory whose tokenizer has some odd special tokens."""
    pytest.importorskip("numpy")
    pytest.importorskip("jinja2")
    (tmp_path / "made").mkdir()
    return write_checkpoint(_tiny_checkpoint(tmp_path / "made"), tmp_path / "model")


def stop_at(model, texts):
    """Declare these as tokens that end an answer, in place of the first ordinary ones."""
    path = model / "tokenizer.json"
    fields = json.loads(path.read_text())
    fields["added_tokens"] = [
        {
            "id": id, "content": text, "special": True, "single_word": False, "lstrip": False,
            "rstrip": False, "normalized": False,
        }
        for id, text in enumerate(texts)
    ]  # fmt: skip
    path.write_text(json.dumps(fields))
    write(model, "generation_config.json", {"eos_token_id": list(range(len(texts)))})


def write(model, name, content):
    text = content if isinstance(content, str) else json.dumps(content)
    (model / name).write_text(text)


def modelfile_of(model):
    return modelfile(Checkpoint.open(model), "model.gguf", context_tokens=512)


def test_it_names_the_file_and_the_context(model):
    found = instructions(modelfile_of(model))
    assert found[:2] == [("FROM", "./model.gguf"), ("PARAMETER num_ctx", "512")]


def test_every_stop_token_is_a_stop_string_however_odd(model):
    stop_at(model, ["<|end|>", 'a "b"', "two\nlines"])
    stops = [value for name, value in instructions(modelfile_of(model)) if name.endswith("stop")]
    assert stops == ["<|end|>", 'a "b"', "two\nlines"]


def test_stop_strings_of_the_model_are_stop_strings(model):
    stop_at(model, ["<|end|>"])
    write(model, "generation_config.json", {"eos_token_id": 0, "stop_strings": ["END", "\nUser:"]})
    stops = [value for name, value in instructions(modelfile_of(model)) if name.endswith("stop")]
    assert stops == ["<|end|>", "END", "\nUser:"]


def test_a_default_system_message_is_found_where_contents_are_parts(model):
    (model / "chat_template.jinja").write_text(
        SYSTEM.replace("m['content']", "m['content'] | map(attribute='text') | join")
    )
    checkpoint = open_checkpoint(model)
    assert checkpoint.text.template_call.content_parts == ("user", "system", "assistant")
    assert ollama.default_system(checkpoint) == 'You are "Ada".\nYou help.'


def test_what_was_fixed_in_the_template_is_told_in_a_comment(model):
    (model / "chat_template.jinja").write_text("{{ mood }}" + PLAIN)
    plain, fixed = (
        modelfile(open_checkpoint(model, template_variables=variables), "m.gguf", context_tokens=9)
        for variables in ({}, {"mood": "two\nlines"})
    )
    says = '# The template inside the file says mood = "two\\nlines"; '
    assert f"{says}a version of Ollama's own does not." in fixed.splitlines()
    assert "inside the file says" not in plain
    assert instructions(fixed) == instructions(plain)


def test_a_stop_that_cannot_be_written_is_told_in_a_comment(model):
    stop_at(model, ["<end>", "\x00"])
    text = modelfile_of(model)
    assert r"# PARAMETER stop: not written, a Modelfile cannot hold '\x00'" in text.splitlines()
    assert ("PARAMETER stop", "<end>") in instructions(text)


def test_sampling_is_what_the_checkpoint_states(model):
    stated = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.05,
              "repetition_penalty": 1.1}  # fmt: skip
    write(model, "generation_config.json", stated)
    found = dict(instructions(modelfile_of(model)))
    assert {name: found[f"PARAMETER {name}"] for name in (
        "temperature", "top_p", "top_k", "min_p", "repeat_penalty")} == {
        "temperature": "0.7", "top_p": "0.8", "top_k": "20", "min_p": "0.05",
        "repeat_penalty": "1.1",
    }  # fmt: skip


def test_a_checkpoint_that_states_no_sampling_gets_none(model):
    names = {name for name, _ in instructions(modelfile_of(model))}
    assert not names & {"PARAMETER temperature", "PARAMETER top_p", "PARAMETER repeat_penalty"}


def test_greedy_is_a_temperature_of_zero(model):
    write(model, "generation_config.json", {"do_sample": False, "temperature": 0.7, "top_p": 0.9})
    found = dict(instructions(modelfile_of(model)))
    assert found["PARAMETER temperature"] == "0"
    assert "PARAMETER top_p" not in found


def test_the_system_message_that_a_template_puts_in_is_stated(model):
    write(model, "chat_template.jinja", SYSTEM)
    found = dict(instructions(modelfile_of(model)))
    assert found["SYSTEM"] == 'You are "Ada".\nYou help.'


@pytest.mark.parametrize("template", [PLAIN, NO_SYSTEM, "{{ messages[9].x.y }}"])
def test_a_template_without_one_gets_none(template, model):
    write(model, "chat_template.jinja", template)
    assert "SYSTEM" not in dict(instructions(modelfile_of(model)))


def test_it_says_that_the_template_is_not_translated(model):
    write(model, "chat_template.jinja", PLAIN)
    text = modelfile_of(model)
    assert "TEMPLATE" not in dict(instructions(text))
    assert "ollama show --template" in text


def test_it_says_that_there_is_no_template(model):
    (model / "chat_template.jinja").unlink(missing_ok=True)
    assert ollama._NO_TEMPLATE_NOTE in modelfile_of(model)


def test_the_licence_is_stated(model):
    write(model, "README.md", "---\nlicense: apache-2.0\n---\n")
    assert dict(instructions(modelfile_of(model)))["LICENSE"] == "apache-2.0"
