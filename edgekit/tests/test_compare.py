"""Plans without weights, and several side by side."""

import csv
import io
import json
import shutil
from dataclasses import replace
from typing import Any

import pytest

from edgekit.cli import main
from edgekit.compare import compare
from edgekit.comparison_page import as_html
from edgekit.errors import UsageError
from edgekit.plan import plan
from edgekit.source import opening, published, stand_in
from edgekit.tests.needs import needs


PI = "raspberry-pi-5-8gb"
pytestmark = needs("tokenizers")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path_factory.getbasetemp() / "shapes-cache"))


def run(capsys, *words):
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in words])
    said = capsys.readouterr()
    return exit_.value.code, said.out, said.err


# Names of published models


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M"),
        ("SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M"),
        ("Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-1.5B"),
        ("gemma-2-2b-it", "google/gemma-2-2b"),
        ("phi-3.5-mini", "microsoft/Phi-3.5-mini-instruct"),
    ],
)
def test_a_model_is_found_by_its_name_with_and_without_what_it_was_tuned_for(said, found):
    model = published.find(said)
    assert model is not None
    assert model.name == found


@pytest.mark.parametrize("said", ["", "b", "SmolLM2", "Qwen", "other/SmolLM2-135M"])
def test_another_name_is_no_published_model(said):
    assert published.find(said) is None


def test_a_size_is_every_model_of_about_that_size_smallest_first():
    found = published.of_size("3b")
    assert {"Qwen/Qwen2.5-3B", "meta-llama/Llama-3.2-3B"} < {it.name for it in found}
    sizes = [it.parameters_about for it in found]
    assert sizes == sorted(sizes)
    assert 2.5e9 < sizes[0] < sizes[-1] < 3.5e9
    assert [it.name for it in published.of_size("135 M")] == ["HuggingFaceTB/SmolLM2-135M"]
    assert published.of_size("3") == published.of_size("large") == []


def test_every_published_model_says_where_it_was_read_and_when():
    assert published.models()
    for model in published.models().values():
        assert model.source, model.name
        assert model.date >= "2026-11-28", model.name


# Plans without weights


def test_a_published_model_is_planned_from_its_name():
    made = plan("SmolLM2-135M", PI)
    assert made.recipe.name == "Q8_0"
    assert not made.layout.is_exact
    note = made.notes[0]
    assert "HuggingFaceTB/SmolLM2-135M" in note
    assert "Apache-2.0" in note
    assert "https://" in note


def test_a_config_alone_is_planned_like_the_whole_model(tiny_checkpoint, tmp_path):
    shutil.copy(tiny_checkpoint / "config.json", tmp_path)
    whole, alone = plan(tiny_checkpoint, PI, quant="F16"), plan(tmp_path, PI, quant="F16")
    weights = [placement.size_bytes for placement in whole.layout.placements]
    assert [placement.size_bytes for placement in alone.layout.placements] == weights
    assert whole.layout.is_exact
    assert not alone.layout.is_exact
    assert "holds no weights" in " ".join(alone.notes)


def test_a_config_with_its_own_tokenizer_is_planned_to_the_byte(tiny_checkpoint, tmp_path):
    for path in tiny_checkpoint.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, tmp_path)
    for quant in ("F32", "Q8_0"):
        whole, alone = plan(tiny_checkpoint, PI, quant=quant), plan(tmp_path, PI, quant=quant)
        names = len(tmp_path.name) - len(tiny_checkpoint.name)  # general.name, in whole words
        assert abs(alone.estimate.artifact_bytes - whole.estimate.artifact_bytes) <= 32 + names


@pytest.mark.slow
def test_a_plan_by_name_holds_for_every_format_that_has_the_family():
    rows = compare(["LFM2-350M"], ["android-high"], every_recipe=True)
    formats = {row.format for row in rows if row.estimate}
    assert {"gguf", "onnx", "executorch"} <= formats


@pytest.mark.parametrize("given", ["an adapter", "a template"])
def test_what_needs_weights_is_refused_where_there_are_none(given, shapes):
    options: dict[str, dict[str, Any]] = {
        "an adapter": {"adapters": [shapes]},
        "a template": {"chat_template": "chatml"},
    }
    with pytest.raises(UsageError, match="there are no weights of small"):
        plan(shapes / "small", PI, **options[given])


@pytest.mark.parametrize("rows", ["many", 0, 1 << 40, None])
def test_a_config_without_a_vocabulary_is_refused(rows, tiny_checkpoint, tmp_path):
    fields = json.loads((tiny_checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"vocab_size": rows}))
    with pytest.raises(UsageError, match="vocab_size"):
        plan(tmp_path, PI)


def test_an_export_of_a_name_says_what_plans_know(capsys, tmp_path):
    status, _, err = run(capsys, "export", "SmolLM2-135M", "--target", PI, "-o", tmp_path / "out")
    assert status == 2
    assert "edgekit plan SmolLM2-135M" in err
    assert not (tmp_path / "out").exists()


def test_a_name_with_a_slip_finds_those_that_are_near(capsys):
    status, _, err = run(capsys, "plan", "SmolLM2-136M", "--target", PI)
    assert status == 2
    assert "SmolLM2-135M" in err


@pytest.mark.parametrize("size", [1, 2, 3, 300, 32_000])
def test_a_stand_in_tokenizer_has_as_many_tokens_as_the_model(size, tmp_path):
    from tokenizers import Tokenizer

    stand_in.write_text_files(tmp_path, vocab_size=size)
    made = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert made.get_vocab_size() == size
    if size > 300:
        assert made.decode(made.encode("a tea to eat").ids) == "a tea to eat"


@pytest.mark.toolchain
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "vocabulary"),
    [("Qwen/Qwen3-0.6B", "qwen3"), ("google/gemma-3-270m", "gemma3")],
)  # fmt: skip
def test_sizes_by_name_are_within_four_percent_of_those_with_the_real_tokenizer(
    name, vocabulary, tmp_path
):
    from edgekit.tests.witnesses import real_vocabularies

    shape = opening.open_shape(name)
    assert shape is not None
    shutil.copytree(real_vocabularies.tokenizer_files(vocabulary), tmp_path, dirs_exist_ok=True)
    shutil.copy(shape.directory / "config.json", tmp_path)
    for format, quant in (("gguf", "Q4_K_M"), ("executorch", "8da4w")):
        by_name = plan(name, "android-high", format=format, quant=quant)
        real = plan(tmp_path, "android-high", format=format, quant=quant)
        ratio = by_name.estimate.artifact_bytes / real.estimate.artifact_bytes
        assert 0.96 < ratio < 1.04, (format, ratio)


# Side by side


@pytest.fixture
def shapes(tiny_checkpoint, tmp_path):
    """Two models of which only the config is there: one small, one that is in no device's reach."""
    fields = json.loads((tiny_checkpoint / "config.json").read_text())
    for name, wider in (("small", {}), ("huge", {"intermediate_size": 1 << 30})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(fields | wider))
    return tmp_path


def test_a_row_for_each_model_and_target_says_what_a_plan_would_take(shapes):
    rows = compare([shapes / "small", shapes / "huge"], [PI, "pi4"])
    assert [(row.model, row.target) for row in rows] == [
        ("small", PI), ("small", "raspberry-pi-4-4gb"),
        ("huge", PI), ("huge", "raspberry-pi-4-4gb"),
    ]  # fmt: skip
    made = plan(shapes / "small", PI)
    assert (rows[0].recipe, rows[0].estimate) == (made.recipe.name, made.estimate)
    assert rows[0].is_chosen


def test_every_recipe_has_a_row_and_one_is_chosen(shapes):
    rows = compare([shapes / "small"], [PI], every_recipe=True, format="gguf")
    chosen = [row.recipe for row in rows if row.is_chosen]
    assert chosen == [plan(shapes / "small", PI, format="gguf").recipe.name]
    assert {"F32", "Q8_0", "Q2_K"} < {row.recipe for row in rows}
    bits = {row.recipe: row.bits_per_weight for row in rows}
    assert bits["F32"] == pytest.approx(32)
    assert bits["Q4_0"] < bits["Q4_1"] < bits["Q8_0"]


def test_what_fits_nowhere_has_a_row_with_its_reasons(shapes):
    (row,) = compare([shapes / "huge"], ["raspberry-pi-zero-2w"])
    assert row.fits == "no"
    assert not row.is_chosen
    assert any("memory" in miss for miss in row.misses)


@pytest.mark.slow
def test_what_no_format_holds_has_a_row_with_the_refusal():
    (row,) = compare(["vaultgemma-1b"], [PI], format="gguf", quant="Q4_0")
    assert (row.fits, row.estimate) == ("no", None)


def test_a_comparison_is_csv_and_json_in_plain_units(capsys, shapes):
    words = ("compare", shapes / "small", "--target", PI)
    _, out, _ = run(capsys, *words, "--csv")
    (row,) = csv.DictReader(io.StringIO(out))
    _, out, _ = run(capsys, *words, "--json")
    (document,) = json.loads(out)
    assert row.keys() == document.keys()
    assert int(row["artifact_bytes"]) == document["artifact_bytes"]
    assert document["fits"] == "yes"
    assert document["is_chosen"] is True


def test_a_size_is_compared_by_plan_too(capsys):
    status, out, _ = run(capsys, "plan", "135m", "--target", "pi5")
    assert status == 0
    assert "SmolLM2-135M" in out
    assert "* what a plan takes" in out


@pytest.mark.parametrize("words", [[], ["--target", PI, "--all-targets"]])
def test_a_comparison_is_told_its_targets(words, capsys):
    status, _, err = run(capsys, "compare", "SmolLM2-135M", *words)
    assert status == 2
    assert "--all-targets" in err


# As a page


def test_a_page_shows_every_row_and_the_limits(shapes, capsys, tmp_path):
    path = tmp_path / "page.html"
    words = ("compare", shapes / "small", "--target", PI, "--target", "pi4", "--all-quants")
    status, _, _ = run(capsys, *words, "--html", path)
    assert status == 0
    page = path.read_text("utf-8")
    rows = compare([shapes / "small"], [PI, "pi4"], every_recipe=True)
    assert page.count("<tr class=") == len(rows)
    assert page.count("<svg") == page.count("<h2>") == 2
    costly = [row for row in rows if row.demo_kl_nats and row.demo_kl_nats >= 1e-3]
    assert page.count("<circle") == len(costly)
    assert "default-src 'none'" in page


def test_a_page_draws_the_memory_limit_where_it_is_near(shapes):
    rows = compare([shapes / "small"], [PI], quant="Q8_0")
    assert rows[0].estimate is not None
    peak_bytes = rows[0].estimate.memory.peak_bytes
    assert "memory limit" not in as_html(rows)  # megabytes below one of gigabytes
    near = replace(rows[0].limits, peak_memory_bytes=2 * peak_bytes)
    assert "memory limit" in as_html([replace(rows[0], limits=near)])


def test_no_name_is_markup_on_the_page(shapes):
    (row,) = compare([shapes / "small"], [PI], quant="Q8_0")
    page = as_html([replace(row, model="<script>alert(1)</script>\x1b[2J", misses=("<b>",))])
    assert "<script" not in page
    assert "<b>" not in page
    assert "\x1b" not in page


def test_a_recipe_that_was_not_measured_has_a_row_and_no_dot(shapes):
    (row,) = compare([shapes / "small"], [PI], quant="Q8_0,down=F16")
    assert row.demo_kl_nats is None
    assert "<circle" not in as_html([row])
