"""The tokenizer inside ExecuTorch's runners, and what a bundle hands to the developer of an app."""

import json
import re
from dataclasses import replace

import pytest

from edgekit.doctor import _tiny_checkpoint
from edgekit.errors import MissingDependencyError
from edgekit.formats.executorch import app_kit, tokenizer
from edgekit.formats.executorch.tokenizer import RUNNER_COPY, Preparation
from edgekit.source import opening
from edgekit.tests.tiny.checkpoints import write_tiny_checkpoint
from edgekit.tests.tiny.tokenizers import VOICES, train
from edgekit.tests.witnesses.tiny_runner import sentencepiece_tokenizer
from edgekit.text import corpus
from edgekit.text.rules import ThoughtMarks
from edgekit.text.template import TemplateCall


pytestmark = pytest.mark.toolchain
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("pytorch_tokenizers", reason="pip install 'edgekit[executorch]'")
pytest.importorskip("jinja2")


def write_tokenizer(directory, content):
    path = directory / "tokenizer.json"
    path.write_text(content, encoding="utf-8")
    return path


@pytest.mark.parametrize("voice", list(VOICES))
def test_the_copy_reads_the_corpus_as_the_checkpoint_does(voice, tmp_path):
    path = write_tokenizer(tmp_path, train(voice))
    copy = tokenizer.runner_copy(path)
    assert copy is not None
    (tmp_path / RUNNER_COPY).write_bytes(copy)
    lines = corpus.lines()
    exact = tokenizers.Tokenizer.from_file(str(path))
    expected = [exact.encode(line, add_special_tokens=False).ids for line in lines]
    assert tokenizer.runtime_ids(tmp_path / "model.pte", lines) == expected


@pytest.mark.parametrize(
    ("voice", "text", "prepared"),
    [
        ("qwen2", "cafe\u0301", "caf\u00e9"),
        ("phi3", "<|user|>\n \u3000Hi<|end|>\n<s> ", "<|user|>Hi<|end|><s> "),
    ],
)
def test_without_preparation_the_runner_would_read_otherwise(voice, text, prepared, tmp_path):
    path = write_tokenizer(tmp_path, train(voice))
    assert Preparation.of(json.loads(train(voice)))(text) == prepared
    exact = tokenizers.Tokenizer.from_file(str(path)).encode(text, add_special_tokens=False).ids
    (tmp_path / RUNNER_COPY).write_bytes(tokenizer.runner_copy(path) or b"")
    assert tokenizer.runner_ids(tmp_path / RUNNER_COPY, [text, prepared]) != [exact, exact]
    assert tokenizer.runtime_ids(tmp_path / "model.pte", [text, prepared]) == [exact, exact]


def test_a_file_that_composes_is_read_wrongly_as_it_is(tmp_path):
    """If this fails, the runner's tokenizer has learnt to compose; then drop the preparation."""
    path = write_tokenizer(tmp_path, train("qwen2"))
    exact = tokenizers.Tokenizer.from_file(str(path)).encode("café").ids
    assert tokenizer.runner_ids(path, ["café"]) != [exact]


def test_bytes_among_the_added_tokens_are_taken_off_the_list(tmp_path):
    fields = json.loads(train("tinyllama"))
    ids = fields["model"]["vocab"]
    like = fields["added_tokens"][0] | {"special": False}
    fields["added_tokens"] += [
        like | {"content": name, "id": ids[name]} for name in (f"<0x{b:02X}>" for b in range(256))
    ]
    path = write_tokenizer(tmp_path, json.dumps(fields))
    exact = tokenizers.Tokenizer.from_file(str(path)).encode("潮 🌊", add_special_tokens=False).ids
    copy = tokenizer.runner_copy(path)
    assert copy is not None
    (tmp_path / RUNNER_COPY).write_bytes(copy)
    assert tokenizer.runtime_ids(tmp_path / "model.pte", ["潮 🌊"]) == [exact]


def unigram():
    model = tokenizers.models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0)], unk_id=0)
    return tokenizers.Tokenizer(model).to_str()


@pytest.mark.parametrize(
    "content", [unigram(), sentencepiece_tokenizer(decoder="metaspace").to_str()],
    ids=["Unigram", "Metaspace"],
)  # fmt: skip
def test_what_the_runner_cannot_read_has_no_copy(content, tmp_path):
    path = write_tokenizer(tmp_path, content)
    assert tokenizer.runner_copy(path) is None
    assert tokenizer.runtime_ids(tmp_path / "model.pte", ["a"]) is None


def test_a_missing_tokenizer_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(
        tokenizer, "environment", lambda: {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
    )
    (tmp_path / "pytorch_tokenizers.py").write_text("raise ImportError('no such library')")
    (tmp_path / "edgekit").symlink_to(tokenizer.__file__.partition("/formats/")[0])
    with pytest.raises(MissingDependencyError, match="no such library") as refusal:
        tokenizer.runner_ids(tmp_path / "tokenizer.json", [])
    assert "edgekit[executorch]" in refusal.value.hint


def test_a_tokenizer_over_which_the_runner_fails_has_no_copy(tmp_path):
    path = _tiny_checkpoint(tmp_path).text.tokenizer_json
    fields = json.loads(path.read_text(encoding="utf-8"))
    assert tokenizer.runner_ids(path, ["a!"]) == [[64, 0]]
    fields["added_tokens"][0]["id"] = 0  # the id of "!"
    path.write_text(json.dumps(fields), encoding="utf-8")
    assert tokenizer.runner_ids(path, ["a!"]) is None


# What lies next to the program


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return opening.open_checkpoint(write_tiny_checkpoint(tmp_path_factory.mktemp("phi3"), "phi3"))


def hand_over(checkpoint, directory):
    app_kit.write(checkpoint, directory, "model.pte", context_tokens=256, variant="llm-ops")
    return (directory / app_kit.README).read_text(encoding="utf-8")


def test_the_readme_has_lines_for_exactly_this_bundle(checkpoint, tmp_path):
    readme = hand_over(checkpoint, tmp_path)
    kotlin, swift = readme.split("```kotlin")[1].split("```swift")
    for lines in (kotlin, swift):
        assert '"<|user|>\\n"' in lines
        assert '"<|end|>\\n<|assistant|>\\n"' in lines
        assert '"<|endoftext|>", "<|assistant|>", "<|end|>"' in lines
        assert "/model.pte" in lines
        assert f"/{RUNNER_COPY}" in lines
        assert "256" in lines
    assert "variant llm-ops" in readme
    assert "not compiled there" in readme


@pytest.mark.parametrize(("kind", "is_limited"), [("lfm2", False), ("qwen3.5", True)])
def test_the_readme_limits_answers_where_a_call_reads_less_than_the_context(
    kind, is_limited, tmp_path
):
    """Which a stock runner takes for a cache that overwrites itself, and writes past its end."""
    checkpoint = opening.open_checkpoint(write_tiny_checkpoint(tmp_path / "model", kind))
    readme = hand_over(checkpoint, tmp_path)
    assert ("reads 64 tokens at most" in readme) == is_limited
    assert (".seqLen(256).maxNewTokens(128)" in readme) == is_limited
    assert ("$0.sequenceLength = 256\n  $0.maximumNewTokens = 128\n" in readme) == is_limited


def test_the_lines_for_kotlin_and_swift_prepare_a_prompt_as_edgekit_does(checkpoint, tmp_path):
    readme = hand_over(checkpoint, tmp_path)
    text = "<|system|>\n\nA <|user|> \u2003\tB<|end|>\x85C <s> D"
    prepared = Preparation.of(json.loads(train("phi3")))(text)
    assert prepared == "<|system|>A <|user|>B<|end|>C <s> D"
    for pattern in (
        re.findall(r'Regex\("(.*)"\), "\\\$1"\)', readme)[0].replace("\\$", "$"),
        re.findall(r'  of: "(.*)", with: "\$1"', readme)[0],
    ):
        assert re.sub(json.loads(f'"{pattern}"'), r"\1", text) == prepared


def test_the_readme_says_what_stands_around_a_thought(checkpoint, tmp_path):
    assert "before an answer" not in hand_over(checkpoint, tmp_path)
    marks = ThoughtMarks(opens="<|channel>thought", closes="<channel|>")
    thinking = replace(checkpoint, text=replace(checkpoint.text, thoughts=marks))
    assert r"between `<\|channel>thought` and `<channel\|>`" in hand_over(thinking, tmp_path)


def test_a_template_does_not_leave_its_place_in_the_readme(checkpoint, tmp_path):
    hostile = '```\n````kotlin\n# ${evil()} \\(evil()) " \x1b\x0c '
    source = "{{ before }}{{ messages[0].content }}<|end|>"
    files = checkpoint.text.with_template(source, TemplateCall(variables={"before": hostile}))
    readme = hand_over(replace(checkpoint, text=files), tmp_path)
    block = readme.split("`````\n")[1]
    assert block.startswith(hostile)
    assert '"```\\n````kotlin\\n# \\${evil()} \\\\(evil()) \\" \\u001b\\u000c "' in readme
    assert '"```\\n````kotlin\\n# ${evil()} \\\\(evil()) \\" \\u{1b}\\u{c} "' in readme


def test_every_prompt_becomes_its_ids_in_the_runner(checkpoint, tmp_path):
    hand_over(checkpoint, tmp_path)
    found = json.loads((tmp_path / app_kit.PROMPTS).read_text(encoding="utf-8"))
    assert len(found["prompts"]) == len(corpus.CONVERSATIONS)
    prompts = [entry["prompt"] for entry in found["prompts"]]
    ids = [entry["ids"] for entry in found["prompts"]]
    assert tokenizer.runner_ids(tmp_path / RUNNER_COPY, prompts) == ids
    assert found["stop_ids"] == list(checkpoint.text.declared_stop_ids)


def test_stop_strings_are_handed_to_the_app(checkpoint, tmp_path):
    text = replace(checkpoint.text, stop_strings=("END", "\n\n"))
    readme = hand_over(replace(checkpoint, text=text), tmp_path)
    assert '`; and before the text `"END"`, `"\\n\\n"`, which the app must look for' in readme
    found = json.loads((tmp_path / app_kit.PROMPTS).read_text(encoding="utf-8"))
    assert found["stop_strings"] == ["END", "\n\n"]


def test_a_date_in_the_prompt_is_said_to_be_that_of_the_export(checkpoint, tmp_path):
    dated = "{{ strftime_now('%Y-%m-%d') }} " + checkpoint.text.chat_template
    text = checkpoint.text.with_template(dated)
    readme = hand_over(replace(checkpoint, text=text), tmp_path)
    assert "here it is that of the export" in readme
    (tmp_path / "plain").mkdir()
    assert "date" not in hand_over(checkpoint, tmp_path / "plain")


def test_a_model_without_a_template_goes_on_with_text(checkpoint, tmp_path):
    bare = replace(checkpoint, text=replace(checkpoint.text, chat_template=None))
    readme = hand_over(bare, tmp_path)
    assert "it continues text" in readme
    found = json.loads((tmp_path / app_kit.PROMPTS).read_text(encoding="utf-8"))
    assert len(found["prompts"]) == len(app_kit.PLAIN_TEXTS)


def test_a_model_the_runner_cannot_read_is_handed_over_with_ids_only(checkpoint, tmp_path):
    path = write_tokenizer(tmp_path, sentencepiece_tokenizer(decoder="metaspace").to_str())
    text = replace(checkpoint.text, tokenizer_json=path, declared_stop_ids=(2,))
    other = replace(checkpoint, text=text)
    assert app_kit.note(other) == tokenizer.NOTE
    out = tmp_path / "out"
    out.mkdir()
    readme = hand_over(other, out)
    assert "ids only" in readme
    assert "LlmModule(" not in readme
    assert not (out / RUNNER_COPY).exists()


def test_a_developer_is_told_to_prepare_prompts_only_where_it_is_needed(checkpoint, tmp_path):
    assert "prepare prompts" in (app_kit.note(checkpoint) or "")
    path = write_tokenizer(tmp_path, train("smollm"))
    plain = replace(checkpoint, text=replace(checkpoint.text, tokenizer_json=path))
    assert app_kit.note(plain) is None
