import json
from contextlib import contextmanager

import pytest

from edgekit.errors import UsageError
from edgekit.merge import merge
from edgekit.source import opening
from edgekit.source.adapters import merging
from edgekit.source.checkpoint import Checkpoint
from edgekit.tests.tiny import adapters as tiny


np = pytest.importorskip("numpy")


class Notebook:
    """A listener that writes down what it hears."""

    def __init__(self):
        self.lines = []
        self.total = self.done = 0

    def say(self, line):
        self.lines.append(line)

    @contextmanager
    def track(self, title, total):
        self.lines.append(title)
        self.total = total
        yield self.count

    def count(self, units):
        self.done += units


@pytest.fixture(autouse=True)
def cache(without_transformers, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def base(tmp_path):
    return tiny.write_base(tmp_path / "base", dtype="BF16", tie_word_embeddings=True)


def test_adapters_become_part_of_an_ordinary_checkpoint(base, tmp_path):
    one = tiny.write_adapter(tmp_path / "one", tiny.q_proj_updates(seed=1))
    two = tiny.write_adapter(tmp_path / "two", tiny.q_proj_updates(seed=2))
    out = merge(base, [one, two], tmp_path / "out", precision="f32")
    expected = merging.merge(merging.merge(Checkpoint.open(base), one), two)
    written = Checkpoint.open(out)
    for role, _ in expected.spec.weights():
        np.testing.assert_array_equal(written.weight(role), expected.weight(role))
    assert "one + two" in (out / "README.md").read_text()


def test_the_listener_hears_notes_and_every_byte(base, tmp_path):
    updates = tiny.q_proj_updates() | {"lm_head.weight": np.ones((40, 16))}
    directory = tiny.write_adapter(tmp_path / "a", updates, modules_to_save=["lm_head"])
    notebook = Notebook()
    out = merge(base, [directory], tmp_path / "out", listener=notebook)
    assert any("no longer tied" in line for line in notebook.lines)
    assert notebook.done == notebook.total > 0
    assert not Checkpoint.open(out).spec.is_tied


def test_a_grown_vocabulary_brings_its_tokenizer_along(base, tmp_path):
    updates = tiny.q_proj_updates() | {"model.embed_tokens.weight": np.ones((41, 16))}
    directory = tiny.write_adapter(tmp_path / "a", updates)
    tiny.write_tokenizer(directory, words=[*tiny.WORDS, "<tool>"], template="{{ 'tool' }}")
    written = Checkpoint.open(merge(base, [directory], tmp_path / "out"))
    assert written.spec.vocab_size == 41
    assert written.text.chat_template == "{{ 'tool' }}"
    assert "<tool>" in written.text.tokenizer_json.read_text()


def test_an_adapter_that_does_not_fit_leaves_nothing(base, tmp_path):
    directory = tiny.write_adapter(tmp_path / "a", tiny.q_proj_updates(layers=5))
    with pytest.raises(UsageError, match="at least 5 layers"):
        merge(base, [directory], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base"]


def test_an_existing_output_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(UsageError, match=r" exists"):
        merge(tmp_path / "no-base", [tmp_path / "no-adapter"], tmp_path)


def test_no_adapter_is_refused(base, tmp_path):
    with pytest.raises(UsageError, match="no adapter to merge"):
        merge(base, [], tmp_path / "out")


ENDS_WITH_S = "{% for m in messages %}{{ m.content }} <s>{% endfor %}"


def test_what_is_written_names_every_token_that_ends_an_answer(base, tmp_path):
    directory = tiny.write_adapter(tmp_path / "a", tiny.q_proj_updates())
    (directory / "chat_template.jinja").write_text(ENDS_WITH_S)
    (directory / "generation_config.json").write_text('{"eos_token_id": 0, "temperature": 0.5}')
    out = merge(base, [directory], tmp_path / "out")
    written = json.loads((out / "generation_config.json").read_text())
    known = opening.open_checkpoint(base, adapters=[directory]).text.declared_stop_ids
    assert {0, 1} <= set(known)
    assert written == {"eos_token_id": list(known), "temperature": 0.5}
    assert opening.open_checkpoint(out).text.declared_stop_ids == known


@pytest.mark.toolchain
def test_transformers_stops_where_what_is_written_says(base, tmp_path):
    from transformers import GenerationConfig

    directory = tiny.write_adapter(tmp_path / "a", tiny.q_proj_updates())
    (directory / "generation_config.json").write_text('{"eos_token_id": [1, 5]}')
    out = merge(base, [directory], tmp_path / "out")
    assert {1, 5} <= set(GenerationConfig.from_pretrained(out).eos_token_id)


@pytest.mark.toolchain
def test_transformers_reads_the_adapters_tokens_in_what_is_written(tmp_path):
    from transformers import AutoTokenizer

    base = tiny.write_base(tmp_path / "base", vocab_size=64)
    directory = tiny.write_adapter(tmp_path / "a", tiny.q_proj_updates())
    (directory / "added_tokens.json").write_text('{"</call>": 41, "<call>": 40}')
    out = merge(base, [directory], tmp_path / "out")
    found = AutoTokenizer.from_pretrained(out)("<call>w5</call>", add_special_tokens=False)
    assert found["input_ids"] == [40, 8, 41]
