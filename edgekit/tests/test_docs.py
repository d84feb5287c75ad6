"""What pages and help texts show works: commands, names, paths, links, the order of things."""

import ast
import itertools
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from edgekit import formats, target, versions
from edgekit.cli import cli
from edgekit.errors import MissingDependencyError, UsageError
from edgekit.formats.gguf import runtime


ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]
SOURCES = [
    *sorted(ROOT.glob("examples/*.py")),
    *(path for path in sorted(ROOT.glob("edgekit/**/*.py")) if "tests" not in path.parts),
]
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
PLACEHOLDER = re.compile(r"[A-Z]+")  # NAME, Q: recipes have digits
FENCED = re.compile(r"^( *)```\w*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`((?:edgekit|\.venv/bin/edgekit)\s[^`{}…]+)`(?!`)")


def help_texts() -> Iterator[tuple[str, str]]:
    """Yield everything that ``--help`` prints, by command."""
    for name, command in [("edgekit", cli), *cli.commands.items()]:
        helps = [getattr(option, "help", None) or "" for option in command.params]
        yield f"{name} --help", "\n".join([command.help or "", *helps])


def whole_commands(blocks: str) -> Iterator[list[str]]:
    """Yield the words after ``edgekit`` of every command line in a block."""
    for line in blocks.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|\|", line.strip().removeprefix("$ ")):
            if re.match(r"(\.venv/bin/)?edgekit [a-z]", part.strip()):
                words = shlex.split(part, comments=True)[1:]
                yield list(itertools.takewhile(lambda word: word != ">", words))


def mentioned_commands(text: str) -> Iterator[list[str]]:
    """Yield the words after ``edgekit`` of commands in sentences, which may leave some out."""
    for span in INLINE.findall(FENCED.sub("", text)):
        yield shlex.split(re.sub(r"[\[\]]", "", span))[1:]


def shown() -> Iterator[tuple[str, list[str], bool]]:
    """Yield where a command is shown, its words, and whether it is whole."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = "\n".join(block for _, block in FENCED.findall(text))
        yield from ((page.name, words, True) for words in whole_commands(blocks))
        yield from ((page.name, words, False) for words in mentioned_commands(text))
    for name, text in help_texts():
        indented = "\n".join(re.findall(r"^ {2,}(.+)$", text, re.MULTILINE))
        yield from ((name, words, True) for words in whole_commands(indented))
        yield from ((name, words, False) for words in mentioned_commands(text))
    for source in SOURCES:
        text = source.read_text(encoding="utf-8")
        yield from ((source.name, words, False) for words in mentioned_commands(text))


def parse(words: list[str], *, whole: bool) -> None:
    """Let click read a command as if it were run.

    Raises:
        click.ClickException, EdgekitError: If it would be refused.
    """
    if words[0].startswith("-"):
        assert words[0] in {"--help", "--version"}
        return
    assert words[0] in cli.commands, f"edgekit has no command {words[0]!r}"
    try:
        cli.commands[words[0]].make_context(words[0], words[1:])
    except click.MissingParameter:
        if whole:
            raise
    except click.exceptions.Exit:  # --help
        pass


def values(words: list[str]) -> dict[str, str]:
    """Return what a command's options are set to, placeholders left out."""
    pairs = dict(itertools.pairwise(words))
    return {
        option: value
        for option, value in pairs.items()
        if option.startswith("--") and not PLACEHOLDER.fullmatch(value)
    }


def check(words: list[str], *, whole: bool) -> None:
    """Fail unless a command parses, and its values exist."""
    parse(words, whole=whole)
    check_values(words)


def check_values(words: list[str]) -> None:
    """Fail unless targets, formats, recipes and variants exist, together."""
    found, possible = values(words), formats.names()
    if "--target" in found and not found["--target"].endswith(".toml"):
        possible = list(target.load(found["--target"]).formats)
    if "--format" in found:
        assert found["--format"] in possible
        possible = [found["--format"]]
    for option, attribute in (("--quant", "RECIPES"), ("--variant", "VARIANTS")):
        if option in found:
            known = {name for each in possible for name in getattr(formats.get(each), attribute)}
            assert found[option] in known, f"{option} {found[option]} is none of {sorted(known)}"


SHOWN = list(shown())


def test_pages_examples_and_help_texts_show_commands():
    places = {name for name, _, _ in SHOWN}
    assert {"README.md", "handover.md", "export --help", "edgekit --help"} <= places
    assert len([words for _, words, whole in SHOWN if whole]) > 20


@pytest.mark.parametrize(
    ("words", "whole"),
    [(words, whole) for _, words, whole in SHOWN],
    ids=[f"{name}: {' '.join(words)}" for name, words, _ in SHOWN],
)
def test_a_command_that_is_shown_can_be_run(words, whole):
    check(words, whole=whole)


@pytest.mark.parametrize(
    "text",
    [
        "edgekit exprot demo --target raspberry-pi-5-8gb",
        "edgekit export demo --taget raspberry-pi-5-8gb",
        "edgekit export demo --target browser-wasm",
        "edgekit export demo --target raspberry-pi-5-8gb --quant Q9_9",
        "edgekit export demo --target raspberry-pi-5-8gb --format onnx --quant Q8_0",
        "edgekit export demo",
    ],
)
def test_a_command_that_cannot_be_run_would_be_noticed(text):
    (words,) = whole_commands(text)
    with pytest.raises((AssertionError, click.ClickException, UsageError)):
        check(words, whole=True)


def slug(heading: str) -> str:
    """Return the anchor that a heading gets where Markdown is shown."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


LINKS = [
    (page, place)
    for page in PAGES
    for place in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize(("page", "place"), LINKS, ids=[f"{p.name}-{link}" for p, link in LINKS])
def test_a_link_leads_to_a_page_and_a_heading(page, place):
    name, _, anchor = place.partition("#")
    linked = page.parent / name if name else page
    assert linked.exists()
    headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
    assert not anchor or anchor in map(slug, headings)


@EVERY_PAGE
def test_a_path_in_the_text_exists(page):
    text = page.read_text(encoding="utf-8")
    own = r"(?<![\w/.-])((?:edgekit|docs|targets|examples|device_tests)/[\w./-]+)"
    named = {path.rstrip(".") for path in re.findall(own, text)}
    assert [path for path in sorted(named - {"targets/my-board.toml"})
            if not (ROOT / path).exists()] == []  # fmt: skip


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/handover.md"])
def test_installing_builds_only_what_is_used_of_llama_cpp(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    found = set(re.findall(r"-DCMAKE_PROJECT_llama_cpp_INCLUDE='\$PWD/(.+?)'", text))
    assert {ROOT / path for path in found} == {runtime.BUILD}
    blocks = [block for _, block in FENCED.findall(text)]
    assert all("CMAKE_ARGS" in block for block in blocks if "pip install" in block)


def test_whoever_lacks_llama_cpp_is_told_how_to_build_only_that(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(MissingDependencyError) as refusal:
        runtime.library()
    (path,) = re.findall(r"-DCMAKE_PROJECT_llama_cpp_INCLUDE=(\S+)", refusal.value.hint)
    assert f"llama-cpp-python {versions.LLAMA_CPP_PYTHON}" in Path(path).read_text(encoding="utf-8")


def contracts():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers, sides = settings["tool"]["importlinter"]["contracts"][:2]
    return layers["layers"], sides["source_modules"], sides["forbidden_modules"]


def test_the_architecture_page_shows_the_layers_of_the_contract():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    layers, _, _ = contracts()
    assert FENCED.findall(page)[0][1].splitlines() == layers


def test_the_architecture_page_lists_every_wing_and_its_side_of_the_contract():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `(\w+)/` \| (\w+) \|", page, re.MULTILINE))
    wings = {path.parent.name for path in (ROOT / "edgekit").glob("*/__init__.py")} - {"tests"}
    layers, device, workstation = contracts()

    def side(wing):
        name = f"edgekit.{wing}"
        return "device" if name in device else "workstation" if name in workstation else "both"

    assert listed == {wing: side(wing) for wing in wings}
    assert wings <= set(re.findall(r"\w+", " ".join(layers)))


def test_the_proof_page_counts_the_gates_as_the_code_does():
    tree = ast.parse((ROOT / "edgekit" / "proof" / "gates.py").read_text(encoding="utf-8"))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    numbered = {}
    for name, node in functions.items():
        if found := re.match(r"Gate (\d):", ast.get_docstring(node) or ""):
            numbered[int(found[1])] = name
    calls = [node.func.id for node in ast.walk(functions["check"])
             if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]  # fmt: skip
    assert [numbered[number] for number in sorted(numbered)] == [
        name for name in sorted(calls, key=lambda name: position(functions["check"], name))
        if name in numbered.values()
    ]  # fmt: skip
    page = (ROOT / "docs" / "proof.md").read_text(encoding="utf-8")
    listed = re.findall(r"^(\d)\. \*\*(.+?)\*\*:", page, re.MULTILINE)
    assert {int(number): name for number, name in listed} == {
        number: gate_name(functions[name]) for number, name in numbered.items()
    }


def position(function, name):
    """Return the line in which a function calls another."""
    return next(node.lineno for node in ast.walk(function)
                if isinstance(node, ast.Name) and node.id == name)  # fmt: skip


def gate_name(function):
    """Return the name under which a gate is printed."""
    return next(
        node.args[0].value
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        and node.func.attr == "add" and isinstance(node.args[0], ast.Constant)
    )  # fmt: skip


@pytest.mark.parametrize("name", formats.names())
def test_the_formats_page_names_every_recipe_and_variant(name):
    page = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    sections = {slug(part.partition("\n")[0]): part for part in page.split("\n## ")}
    words = set(re.findall(r"[\w-]+", sections[name]))
    fmt = formats.get(name)
    (recipes,) = re.findall(r"^Recipes: (.+)\.$", sections[name], re.MULTILINE)
    assert recipes.split(", ") == list(fmt.RECIPES)
    assert set(fmt.VARIANTS) <= words


def test_the_formats_page_names_the_versions_that_are_pinned():
    page = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    assert f"llama-cpp-python {versions.LLAMA_CPP_PYTHON}" in page
    assert f"llama.cpp {versions.LLAMA_CPP_COMMIT}" in page
    assert f"{versions.EXECUTORCH} runtime" in page
    assert f"WebLLM {versions.WEBLLM}" in page


def test_the_readme_is_short_and_says_early_that_it_needs_transformers_5():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    assert "transformers 5" in "\n".join(lines[:12])
