"""What a model directory says about itself, and how a GGUF file carries it on."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from edgekit.doctor import _tiny_checkpoint
from edgekit.errors import UsageError
from edgekit.formats import BuildRequest
from edgekit.formats.gguf import conversion, layout, provenance
from edgekit.formats.gguf.tensor_types import RECIPES
from edgekit.model import card as model_card
from edgekit.model.card import ModelCard, front_matter
from edgekit.source.checkpoint import AdapterRecord, Checkpoint
from edgekit.source.writer import write_checkpoint


CARD = """\
---
license: other
license_name: "my-licence"   # a comment
license_link: https://example.org/licence#terms
base_model: HuggingFaceTB/SmolLM2-135M
datasets:
- HuggingFaceTB/smoltalk
-   'squad'
language: [en, no, "zh"]
tags:
  - chat
  - it's
model-index:
- name: x
  results:
  - task:
      type: text
widget:
  - text: hello
---
# Title

license: not-this
"""


def card_of(directory, text):
    (directory / "README.md").write_text(text, encoding="utf-8")
    return model_card.read(directory)


def test_names_and_lists_of_names_are_read(tmp_path):
    assert card_of(tmp_path, CARD) == ModelCard(
        licence="other",
        licence_name="my-licence",
        licence_link="https://example.org/licence#terms",
        base_models=("HuggingFaceTB/SmolLM2-135M",),
        datasets=("HuggingFaceTB/smoltalk", "squad"),
        languages=("en", "no", "zh"),
        tags=("chat", "it's"),
    )


@pytest.mark.parametrize(
    "text",
    ["", "# no front matter\nlicense: mit", "---\nlicense: mit\n", "x\n---\nlicense: mit\n---\n",
     "---\n---\n", "\0" * 100, "---\n" * 2],
)  # fmt: skip
def test_a_card_without_front_matter_says_nothing(text, tmp_path):
    assert card_of(tmp_path, text) == ModelCard()


def test_a_directory_without_a_card_says_nothing(tmp_path):
    assert model_card.read(tmp_path) == ModelCard()
    assert model_card.read(tmp_path / "nowhere") == ModelCard()


@pytest.mark.parametrize(
    ("line", "value"),
    [("license: mit", ("mit",)), ("license:   mit  # c", ("mit",)), ("license: 'm''i'", ("m'i",)),
     (r'license: "a\"b"', ('a"b',)), ("license: [mit]", ("mit",)), ("license: []", None),
     ("license: null", None), ("license: ~", None), ("license: &a mit", None),
     ("license: *a", None), ("license: |", None), ("license: {a: b}", None),
     ("license: !t x", None), ("license: a\x07b", None), ('license: "half', None),
     ("license: no", ("no",)), ("license: 2.0", ("2.0",)), ("license:mit", None),
     ("license: [a, 'b, c']", ("a", "b, c"))],
)  # fmt: skip
def test_only_what_is_surely_a_name_is_taken(line, value):
    assert front_matter(f"---\n{line}\n---\n").get("license") == value


def test_a_card_of_any_size_is_read_in_no_time(tmp_path):
    text = "---\n" + "tags:\n" + "- [[[[{{{{'\"\n" * 200_000 + "---\n"
    assert card_of(tmp_path, text).tags == ()


@pytest.fixture
def model(tmp_path):
    pytest.importorskip("numpy")
    (tmp_path / "made").mkdir()
    return write_checkpoint(_tiny_checkpoint(tmp_path / "made"), tmp_path / "model")


def keys_of(model, **changes):
    written = provenance.write(replace(Checkpoint.open(model), **changes))
    return {key.removeprefix("general."): value for key, (_, value) in written.items()}


def test_a_gguf_file_carries_licence_base_datasets_languages_and_tags(model):
    card_of(model, CARD)
    keys = keys_of(model)
    del keys["quantized_by"]
    assert keys == {
        "license": "other",
        "license.name": "my-licence",
        "license.link": "https://example.org/licence#terms",
        "base_model.count": 1,
        "base_model.0.name": "SmolLM2-135M",
        "base_model.0.organization": "HuggingFaceTB",
        "base_model.0.repo_url": "https://huggingface.co/HuggingFaceTB/SmolLM2-135M",
        "dataset.count": 2,
        "dataset.0.name": "smoltalk",
        "dataset.0.organization": "HuggingFaceTB",
        "dataset.0.repo_url": "https://huggingface.co/datasets/HuggingFaceTB/smoltalk",
        "dataset.1.name": "squad",
        "languages": ["en", "no", "zh"],
        "tags": ["chat", "it's"],
    }


@pytest.mark.parametrize(
    ("name", "fields"),
    [("https://huggingface.co/a/b/", {"name": "b", "organization": "a",
                                     "repo_url": "https://huggingface.co/a/b"}),
     ("https://example.org/x", {"repo_url": "https://example.org/x"}),
     ("./checkpoints/mine", {"name": "mine"}), ("../mine", {"name": "mine"}),
     ("/home/me/mine/", {"name": "mine"}), ("mine", {"name": "mine"})],
)  # fmt: skip
def test_a_base_that_is_a_url_or_a_path_is_named_as_far_as_it_says(name, fields, model):
    card_of(model, f"---\nbase_model: {name}\n---\n")
    keys = keys_of(model)
    assert {key.removeprefix("base_model.0."): value for key, value in keys.items()
            if key.startswith("base_model.0.")} == fields  # fmt: skip


def adapter_in(directory: Path, *, base, card=""):
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    (directory / "README.md").write_text(card)
    return AdapterRecord(directory=directory, name=directory.name, sha256="")


def test_a_merged_adapter_makes_its_base_the_parent_and_adds_its_datasets(model, tmp_path):
    card_of(model, CARD)
    adapter = adapter_in(
        tmp_path / "lora", base="me/base", card="---\ndatasets: [me/notes, squad]\n---\n"
    )
    keys = keys_of(model, adapter=adapter)
    assert keys["finetune"] == "lora"
    assert (keys["base_model.count"], keys["base_model.0.name"]) == (1, "base")
    names = [keys[f"dataset.{index}.name"] for index in range(keys["dataset.count"])]
    assert names == ["notes", "squad", "smoltalk"]
    assert keys["license"] == "other"


@pytest.mark.parametrize("base", ["/home/me/some path/base", "./base", "", None, 7])
def test_an_adapter_that_names_a_path_has_the_models_name_as_its_base(base, model, tmp_path):
    adapter = adapter_in(tmp_path / "lora", base=base)
    card = replace(Checkpoint.open(model), adapter=adapter).card
    assert card.base_models == ("model",)


def test_the_base_on_an_adapters_card_counts_where_its_config_has_a_path(model, tmp_path):
    adapter = adapter_in(tmp_path / "lora", base="/x", card="---\nbase_model: me/it\n---\n")
    assert keys_of(model, adapter=adapter)["base_model.0.organization"] == "me"


def test_the_size_of_the_file_counts_what_the_card_says(model, tmp_path):
    sizes = []
    for text in ("", CARD):
        card_of(model, text)
        checkpoint = Checkpoint.open(model)
        recipe = RECIPES["F32"]
        planned = conversion.lay_out(checkpoint, BuildRequest(recipe=recipe)).artifact_bytes
        directory = tmp_path / str(len(text))
        directory.mkdir()
        name = conversion.convert(
            checkpoint, BuildRequest(recipe=recipe), directory, pre="gpt-2", progress=lambda _: None
        )
        layout.read(directory / name)
        sizes.append((directory / name).stat().st_size)
        assert abs(sizes[-1] - planned) <= 32  # the name of the pre-tokenizer is found by trial
    assert sizes[1] > sizes[0] + 500


# Sampling


def sampling_of(directory, fields):
    text = fields if isinstance(fields, str) else json.dumps(fields)
    (directory / "generation_config.json").write_text(text)
    return model_card.read_sampling(directory)


def test_stated_sampling_goes_into_the_gguf_file_with_llama_cpps_types(model):
    sampling_of(model, {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.2})
    keys = provenance.write(Checkpoint.open(model))
    found = {key.removeprefix("general.sampling."): value for key, value in keys.items()
             if ".sampling." in key}  # fmt: skip
    assert found == {
        "temp": ("float32", 0.6),
        "top_k": ("int32", 20),
        "top_p": ("float32", 0.95),
        "penalty_repeat": ("float32", 1.2),
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", "warm"), ("temperature", -1), ("temperature", True), ("top_k", 2**40),
     ("top_p", 1.5), ("min_p", float("nan")), ("repetition_penalty", [1])],
)  # fmt: skip
def test_sampling_that_cannot_be_meant_is_refused_with_file_and_field(name, value, tmp_path):
    with pytest.raises(UsageError, match=rf"generation_config\.json: {name} = "):
        sampling_of(tmp_path, {name: value})


def test_a_top_k_of_minus_one_is_off(tmp_path):
    """As vLLM spells it."""
    assert sampling_of(tmp_path, {"top_k": -1}).top_k == 0
    assert model_card.generation_settings({"top_k": -1, "a": 1}) == {"top_k": 0, "a": 1}
    assert model_card.generation_settings({"top_k": 5}) == {"top_k": 5}


def test_no_generation_config_states_nothing(tmp_path):
    assert model_card.read_sampling(tmp_path) == model_card.SamplingDefaults()
    with pytest.raises(UsageError, match="holds a list, expected an object"):
        sampling_of(tmp_path, [])
