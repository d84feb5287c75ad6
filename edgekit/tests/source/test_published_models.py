"""Published models, opened from their config and the headers of their files alone."""

import json
import math
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
