"""What is printed: nothing in it acts on a terminal, and everything else is as it was."""

import ast
import json
import unicodedata
from pathlib import Path

import pytest

import edgekit
from edgekit.encodings.visible import visible, visible_json, visible_lines


# Trojan Source (CVE-2021-42574): the characters of UAX #9 that embed, override or isolate.
TURNS_LETTERS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
LETTERS = list(map(chr, range(0x20000)))  # the rest are unassigned, CJK and for private use
ACTS = [
    letter
    for letter in LETTERS
    if unicodedata.category(letter) in {"Cc", "Cs", "Zl", "Zp"}
    or unicodedata.bidirectional(letter) in TURNS_LETTERS
]


def test_what_unicode_calls_a_control_is_written_out_and_nothing_else():
    others = "".join(sorted({*LETTERS} - {*ACTS}))
    assert len(ACTS) > 2000
    assert visible(others) == others
    written = visible("".join(ACTS))
    assert written.isascii()
    assert written.isprintable()
    assert [ast.literal_eval(f"'{visible(letter)}'") for letter in ACTS] == ACTS


def test_lines_keep_their_ends_and_tabs():
    assert visible_lines("a\tb\n\r\x1b]0;x\x07") == "a\tb\n\\r\\x1b]0;x\\x07"
    assert visible("a\tb\n") == r"a\tb\n"


def test_a_json_document_means_the_same():
    value = {".".join(ACTS): ["\u202e", 'a"b', "日本語 👩🏽‍🚀", {"\x9b2J": None}]}
    document = visible_json(json.dumps(value, indent=2, ensure_ascii=False))
    assert json.loads(document) == value
    assert visible_lines(document) == document


CALLS = ("print", "click.echo", "click.secho", "sys.stdout.write", "sys.stderr.write")
PRINTS = {
    "cli.py": ["_print_refusal", "echo", "echo_json", "echo_lines", "print_stream"],
    "serve.py": ["serve"],
}
TO_A_PARENT = {  # children of edgekit, which answer in JSON through a pipe
    "formats/executorch/tokenizer.py", "formats/gguf/tokenizer_probe.py", "measuring/measure.py",
    "source/transformers_tokenizer.py",
}  # fmt: skip


def test_everything_that_is_printed_goes_through_here():
    root = Path(edgekit.__file__).parent
    found = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name.startswith("tests/") or name in TO_A_PARENT:
            continue
        text = path.read_text(encoding="utf-8")
        if not any(f"{call}(" in text for call in CALLS):  # which is faster than to parse it
            continue
        functions = [it for it in ast.walk(ast.parse(text)) if isinstance(it, ast.FunctionDef)]
        printing = [it.name for it in functions if _prints(it)]
        if printing:
            found[name] = sorted(printing)
    assert found == PRINTS


def _prints(function):
    calls = [ast.unparse(it.func) for it in ast.walk(function) if isinstance(it, ast.Call)]
    return any(call in CALLS for call in calls)


@pytest.mark.parametrize("letter", ["\r", "\b", "\x1b", "\x9b", "\u2028", "\u202e", "\ud800"])
def test_one_letter_is_enough_to_be_seen(letter):
    assert letter not in visible(f"name{letter}")
