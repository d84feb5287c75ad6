"""Recipes as ``--quant`` spells them: one of a format's, with another type for some roles."""

from typing import Any

import pytest

from edgekit import formats, recipes
from edgekit.errors import UsageError
from edgekit.formats import BuildRequest
from edgekit.source import families, published
from edgekit.source.config import Config
from edgekit.tests.tiny.random_checkpoints import random_checkpoint


def spec_of(name):
    model = published.models()[name]
    config = Config(dict(model.config), origin="published")
    return families.get(model.model_type).describe(config)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    wide: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256}
    return random_checkpoint(tmp_path_factory.mktemp("random") / "model", **wide)


def types_of(checkpoint, format, quant):
    request = BuildRequest(recipe=recipes.find(format, quant))
    layout = formats.writing(format).lay_out(checkpoint, request)
    return {placement.role: placement.tensor_type for placement in layout.placements}


@pytest.mark.parametrize(
    ("format", "quant", "role", "expected"),
    [("gguf", "Q4_0,down=q8_0", "down", "Q8_0"), ("gguf", "q4_0, down = F16", "down", "F16"),
     ("onnx", "INT4,down=F32", "down", "F32")],
)  # fmt: skip
def test_a_change_moves_one_role_of_every_layer_and_no_other(
    checkpoint, format, quant, role, expected
):
    plain = types_of(checkpoint, format, quant.partition(",")[0])
    changed = types_of(checkpoint, format, quant)
    moved = {name for name in plain if plain[name] != changed[name]}
    assert moved == {f"layers.{index}.{role}" for index in range(2)}
    assert {changed[name] for name in moved} == {expected}


def test_a_recipe_is_called_as_a_user_writes_it():
    found = recipes.find("gguf", "q4_k_m,down=q6_k,VALUE=Q8_0".lower())
    assert found.name == "Q4_K_M"
    assert found.full_name == "Q4_K_M,down=Q6_K,value=Q8_0"
    assert recipes.find("gguf", found.full_name) == found


@pytest.mark.parametrize(
    ("quant", "message", "hint"),
    [
        ("Q4_KM", "gguf has no quant named 'Q4_KM'", "Q4_K_M"),
        ("Q4_K_M,down", "--quant has 'down', expected ROLE=TYPE", "down=Q6_K"),
        ("Q4_K_M,=Q6_K", "--quant has '=Q6_K', expected ROLE=TYPE", "down=Q6_K"),
        ("Q4_K_M,down=Q9_K", "gguf has no tensor type named 'Q9_K'", "did you mean"),
        ("Q4_K_M,", "--quant has '', expected ROLE=TYPE", "down=Q6_K"),
    ],
)
def test_a_malformed_recipe_is_refused_with_the_way_out(quant, message, hint):
    with pytest.raises(UsageError) as refusal:
        recipes.find("gguf", quant)
    assert message in str(refusal.value)
    assert hint in refusal.value.hint


def test_a_format_of_one_type_for_all_says_so():
    with pytest.raises(UsageError, match="mlc has one tensor type for each recipe"):
        recipes.find("mlc", "q4f16_1,down=q0f16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("delta_outptu=Q8_0", "no weight of this model has the role 'delta_outptu'"),
        ("conv_output=Q8_0", "no weight of this model has the role 'conv_output'"),
        ("attention_norm=Q8_0", "no recipe rounds attention_norm"),
        ("delta_taps=Q8_0", "no recipe rounds delta_taps"),
    ],
)
@pytest.mark.parametrize("recipe", ["Q4_K_M", "F32"])
def test_a_change_of_what_is_not_there_or_stays_exact_is_refused(recipe, change, message):
    found = recipes.find("gguf", f"{recipe},{change}")
    with pytest.raises(UsageError) as refusal:
        recipes.refuse_misfits(found, spec_of("Qwen/Qwen3.5-0.8B"), format="gguf")
    assert message in str(refusal.value)


def test_a_change_of_a_matrix_is_taken():
    spec = spec_of("Qwen/Qwen3.5-0.8B")
    found = recipes.find("gguf", "Q4_K_M,delta_output=Q8_0")
    recipes.refuse_misfits(found, spec, format="gguf")
    assert found.tensor_type_for("layers.3.delta_output", spec) == "Q8_0"
