"""Which of a checkpoint's chat templates counts: the one that transformers takes."""

import json

import pytest

from edgekit.errors import UsageError
from edgekit.model.chat_templates import ChatTemplates, of_file
from edgekit.tests.tiny.voices import speak


ONE, TWO, THREE = "one {{ messages }}", "two {{ messages }}", "three {{ messages }}"


def named(**by_name):
    return [{"name": name, "template": template} for name, template in by_name.items()]


def written(directory, files):
    """Write templates into a checkpoint's text side: text as it is, objects as JSON."""
    speak(directory, "smollm", has_template=False)
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        known = json.loads(path.read_text()) if path.is_file() else {}
        text = content if isinstance(content, str) else json.dumps(known | content)
        path.write_text(text, encoding="utf-8")
    return directory


def read(directory):
    path = directory / "tokenizer_config.json"
    return ChatTemplates.read(directory, json.loads(path.read_text()))


# What AutoTokenizer reads, by the files that are there.
OF_TOKENIZERS = {
    "a file": ({"chat_template.jinja": ONE}, ONE),
    "a setting": ({"tokenizer_config.json": {"chat_template": ONE}}, ONE),
    "a file beside a setting": (
        {"chat_template.jinja": ONE, "tokenizer_config.json": {"chat_template": TWO}},
        ONE,
    ),
    "a list": ({"tokenizer_config.json": {"chat_template": named(tool_use=ONE, default=TWO)}}, TWO),
    "an object": ({"tokenizer_config.json": {"chat_template": {"default": ONE, "rag": TWO}}}, ONE),
    "files of their own": (
        {"chat_template.jinja": ONE, "additional_chat_templates/rag.jinja": TWO},
        ONE,
    ),
    "a default one among the additional": (
        {"chat_template.jinja": ONE, "additional_chat_templates/default.jinja": TWO},
        TWO,
    ),
    "line ends of Windows": (
        {"chat_template.jinja": "one\r\n{{ messages }}"},
        "one\n{{ messages }}",
    ),
    "the same name twice": (
        {"tokenizer_config.json": {"chat_template": [*named(default=ONE), *named(default=TWO)]}},
        TWO,
    ),
}
# What AutoProcessor reads, where no tokenizer has a template.
OF_PROCESSORS = {
    "chat_template.json": ({"chat_template.json": {"chat_template": ONE}}, ONE),
    "processor_config.json": ({"processor_config.json": {"chat_template": ONE}}, ONE),
}
LAYOUTS = OF_TOKENIZERS | OF_PROCESSORS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_template_counts(tmp_path, layout):
    files, expected = LAYOUTS[layout]
    assert read(written(tmp_path, files)).default == expected


@pytest.mark.toolchain
@pytest.mark.parametrize("layout", OF_TOKENIZERS)
def test_it_is_the_one_that_transformers_takes(tmp_path, layout):
    transformers = pytest.importorskip("transformers")
    directory = written(tmp_path, OF_TOKENIZERS[layout][0])
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    assert read(directory).default == tokenizer.get_chat_template()


@pytest.mark.toolchain
@pytest.mark.parametrize("layout", OF_PROCESSORS)
def test_it_is_the_one_that_a_processor_takes(tmp_path, layout):
    processing = pytest.importorskip("transformers.processing_utils")
    directory = written(tmp_path, OF_PROCESSORS[layout][0])
    settings, _ = processing.ProcessorMixin.get_processor_dict(directory)
    assert read(directory).default == settings["chat_template"]


@pytest.mark.parametrize(
    ("files", "names", "default_name"),
    [
        (
            {"tokenizer_config.json": {"chat_template": named(tool_use=ONE)}},
            {"tool_use"},
            "tool_use",
        ),
        ({"additional_chat_templates/rag.jinja": ONE}, {"rag"}, "rag"),
        (
            {"tokenizer_config.json": {"chat_template": named(tool_use=ONE, rag=TWO)}},
            {"tool_use", "rag"},
            None,
        ),
        ({"tokenizer_config.json": {"chat_template": []}}, set(), None),
        ({}, set(), None),
    ],
)
def test_the_only_template_is_taken_whatever_its_name(tmp_path, files, names, default_name):
    found = read(written(tmp_path, files))
    assert (set(found.by_name), found.default_name) == (names, default_name)


def test_what_a_file_hides_is_noted_if_it_is_another(tmp_path):
    files = {
        "chat_template.jinja": ONE,
        "tokenizer_config.json": {"chat_template": TWO},
        "chat_template.json": {"chat_template": ONE},
        "processor_config.json": {"chat_template": THREE},
    }
    assert read(written(tmp_path, files)).notes == (
        "the chat template of tokenizer_config.json is not taken: chat_template.jinja has another",
        "the chat template of processor_config.json is not taken: chat_template.jinja has another",
    )


def test_an_empty_template_counts_as_none(tmp_path):
    files = {
        "chat_template.jinja": " \n",
        "tokenizer_config.json": {"chat_template": named(default="", rag=TWO)},
    }
    found = read(written(tmp_path, files))
    assert found.by_name == {"rag": TWO}
    assert found.notes == (
        "a chat template of chat_template.jinja is empty, so it counts as none",
        "a chat template of tokenizer_config.json is empty, so it counts as none",
    )


def test_a_setting_stays_the_default_beside_files_for_other_uses(tmp_path):
    """transformers then has no default template, and refuses a plain conversation."""
    files = {
        "additional_chat_templates/rag.jinja": ONE,
        "tokenizer_config.json": {"chat_template": TWO},
    }
    found = read(written(tmp_path, files))
    assert found.default == TWO
    assert "additional_chat_templates has no default chat template" in found.notes[0]


@pytest.mark.parametrize(
    "template", [3, {"default": 3}, [{"name": "default"}], ["text"], [{"template": "text"}]]
)
def test_a_template_that_is_not_text_is_refused_with_its_file(tmp_path, template):
    directory = written(tmp_path, {"tokenizer_config.json": {"chat_template": template}})
    with pytest.raises(UsageError, match=r"tokenizer_config.json: chat_template is neither"):
        read(directory)


def test_a_file_that_is_not_utf8_is_refused_by_name(tmp_path):
    (written(tmp_path, {}) / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UsageError, match=r"chat_template.jinja is not UTF-8"):
        read(tmp_path)


def test_a_users_own_file_may_be_jinja_or_a_setting(tmp_path):
    written(tmp_path, {"a.jinja": ONE, "tokenizer_config.json": {"chat_template": TWO}})
    assert of_file(tmp_path / "a.jinja") == ONE
    assert of_file(tmp_path / "tokenizer_config.json") == TWO
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(UsageError, match="has no default chat template"):
        of_file(tmp_path / "b.json")
