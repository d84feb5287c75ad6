"""Adapters of mlx-lm; where torch is there, PEFT says what the same factors mean."""

import json
from typing import Any

import pytest

from edgekit.errors import UsageError
from edgekit.proof import transformers_logits
from edgekit.source import families
from edgekit.source.adapters import merging
from edgekit.source.checkpoint import Checkpoint
from edgekit.source.writer import write_checkpoint
from edgekit.tests.tiny import adapters as tiny


np = pytest.importorskip("numpy")

QUERY = "model.layers.{}.self_attn.q_proj"
EMBEDDING = "model.embed_tokens"
KINDS = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b", "lora_magnitude_vector": "m",
         "lora_embedding_A": "lora_a", "lora_embedding_B": "lora_b"}  # fmt: skip


def random(*shape, seed=5):
    return np.random.default_rng(seed).normal(0, 0.3, shape).astype(np.float32)


def updates(*layers, rank=4, rows=16):
    found = {}
    for layer in layers:
        found[f"{QUERY.format(layer)}.lora_a"] = random(16, rank, seed=layer)
        found[f"{QUERY.format(layer)}.lora_b"] = random(rank, rows, seed=layer + 9)
    return found


def write(directory, tensors, *, lora_parameters: Any = None, **config):
    """Write what ``mlx_lm.lora --train`` writes."""
    directory.mkdir(parents=True, exist_ok=True)
    fields = {
        "adapter_path": "adapters", "batch_size": 4, "data": "data", "fine_tune_type": "lora",
        "iters": 1000, "learning_rate": 1e-5, "mask_prompt": False, "max_seq_length": 2048,
        "model": "somewhere/base", "num_layers": -1, "optimizer": "adam", "seed": 0,
        "lora_parameters": {"rank": 4, "dropout": 0.0, "scale": 20.0} | (lora_parameters or {}),
    }  # fmt: skip
    said = {name: value for name, value in (fields | config).items() if value is not None}
    (directory / "adapter_config.json").write_text(json.dumps(said))
    tiny.write_safetensors(directory / "adapters.safetensors", tensors)
    return directory


def test_the_product_is_scaled_as_it_is_and_transposed(base, tmp_path):
    given = updates(0, 1)
    merged = merging.merge(base, write(tmp_path / "a", given))
    product = given[f"{QUERY.format(0)}.lora_a"] @ given[f"{QUERY.format(0)}.lora_b"]
    found = merged.weight("layers.0.query") - base.weight("layers.0.query")
    np.testing.assert_allclose(found, 20 * product.T, rtol=1e-5, atol=1e-5)
    assert merged.adapter is not None
    assert merged.adapter.notes == ()
    assert merged.adapter.name == "a"


@pytest.mark.parametrize(
    ("fields", "layers"),
    [({"num_layers": 1}, [1]), ({"lora_layers": 1, "num_layers": None}, [1]),
     ({"num_layers": 16}, [0, 1]), ({}, [0, 1])],
)  # fmt: skip
def test_the_last_layers_are_the_ones_that_were_trained(base, tmp_path, fields, layers):
    merged = merging.merge(base, write(tmp_path / "a", updates(*layers), **fields)).tensors
    changed = [n for n in range(2) if merged[f"{QUERY.format(n)}.weight"]
               is not base.tensors[f"{QUERY.format(n)}.weight"]]  # fmt: skip
    assert changed == layers


@pytest.mark.parametrize(
    ("layers", "config", "words"),
    [
        ([0], {}, "is for 1 layers, the base has 2"),
        ([0, 1, 2], {}, "is for 3 layers, the base has 2"),
        ([1], {}, "lacks self_attn.q_proj of layer 0"),
        ([1], {"num_layers": 2}, "lacks self_attn.q_proj of layer 0"),
        ([0, 1], {"lora_parameters": {"rank": 3}}, r"\[4, 16\], expected \[3, 16\]"),
        ([0, 1], {"lora_parameters": {"alpha": 16}}, "has an alpha"),
        ([0, 1], {"lora_parameters": {"scale": "x"}}, "scale = 'x'"),
        ([0, 1], {"lora_parameters": {"sparsity": 0.5}}, "sparsity"),
        ([0, 1], {"lora_parameters": {"keys": [3]}}, "expected names of modules"),
        ([0, 1], {"fine_tune_type": "prefix"}, "fine_tune_type = 'prefix'"),
        ([0, 1], {"fine_tune_type": "dora"}, "expected lora_A, lora_B, lora_magnitude_vector"),
    ],
)
def test_what_does_not_fit_is_refused(base, tmp_path, layers, config, words):
    with pytest.raises(UsageError, match=words):
        merging.merge(base, write(tmp_path / "a", updates(*layers), **config))


def test_another_kind_of_layer_is_refused_with_the_way_out(base, tmp_path):
    given = updates(0, 1) | {f"{QUERY.format(0)}.lora_a_scales": random(4, 4)}
    with pytest.raises(UsageError, match="lora_a_scales") as refused:
        merging.merge(base, write(tmp_path / "a", given))
    assert "mlx_lm.fuse" in refused.value.hint


def test_a_config_without_its_weights_is_refused(base, tmp_path):
    directory = write(tmp_path / "a", updates(0, 1))
    (directory / "adapters.safetensors").rename(directory / "adapters.npz")
    with pytest.raises(UsageError, match=r"has no adapters\.safetensors"):
        merging.merge(base, directory)
    (directory / "adapter_config.json").write_text('{"r": 4}')
    with pytest.raises(UsageError, match="has no peft_type"):
        merging.merge(base, directory)


def test_whole_weights_replace_the_bases(base, tmp_path):
    given = {f"{QUERY.format(1)}.weight": random(16, 16), "model.layers.1.input_layernorm.weight":
             random(16)}  # fmt: skip
    fields: dict[str, Any] = {"fine_tune_type": "full", "num_layers": 1}
    merged = merging.merge(base, write(tmp_path / "a", given, **fields))
    np.testing.assert_array_equal(merged.weight("layers.1.query"), next(iter(given.values())))


def in_mlx_form(made, directory, *, model_type="llama", **config):
    """Write the adapter that PEFT made as mlx-lm would have, which names modules as files do."""
    stored = {}
    for key, tensor in tiny.load_tensors(made.adapter / "adapter_model.safetensors").items():
        name = key.removeprefix(merging.PREFIX)
        if name.endswith(".base_layer.weight"):
            continue
        kind = next(kind for kind in KINDS if name.endswith(f".{kind}"))
        module = families.stored_name(model_type, name.removesuffix(f".{kind}"))
        stored[f"{module}.{KINDS[kind]}"] = tensor.numpy().T
    return write(directory, stored, **config)


TRAINED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": ({}, {"target_modules": ["q_proj", "down_proj"]}),
    "all linear": ({"tie_word_embeddings": True}, {"target_modules": "all-linear"}),
    "exaone": ({"model_type": "exaone"}, {"target_modules": "all-linear"}),
    "dora": ({}, {"target_modules": ["v_proj", "up_proj"], "use_dora": True}),
    "dora with biases": (
        {"model_type": "qwen2"}, {"target_modules": ["q_proj", "v_proj"], "use_dora": True}
    ),
    "embedding": ({}, {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding and head, tied": (
        {"tie_word_embeddings": True},
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
}  # fmt: skip


@pytest.mark.toolchain
@pytest.mark.parametrize("kind", TRAINED)
def test_it_says_what_peft_says_with_the_same_factors(tmp_path, kind):
    config, lora = TRAINED[kind]
    made = tiny.train_with_peft(tmp_path, base=config, lora_alpha=8, **lora)
    is_dora = "use_dora" in lora
    directory = in_mlx_form(
        made, tmp_path / "mlx", lora_parameters={"scale": 2.0},
        fine_tune_type="dora" if is_dora else "lora",
        model_type=config.get("model_type", "llama"),
    )  # fmt: skip
    if "tied" in kind:  # one layer in MLX; PEFT's file has it twice
        path = directory / "adapters.safetensors"
        stored = {name: tensor.numpy() for name, tensor in tiny.load_tensors(path).items()
                  if not name.startswith("lm_head")}  # fmt: skip
        tiny.write_safetensors(path, stored)
    merged = merging.merge(Checkpoint.open(made.base), directory)
    assert merged.spec.is_tied == bool(config.get("tie_word_embeddings"))
    (side_by_side,) = transformers_logits.logits(merged, tiny.IDS, fits_in_memory=True)
    assert np.abs(side_by_side - made.logits).max() <= 1e-4
    write_checkpoint(merged, tmp_path / "merged", precision="f32")
    found = tiny.logits_of(tiny.load(tmp_path / "merged"))
    assert np.abs(found - made.logits).max() <= 1e-4
    assert np.abs(made.logits - made.base_logits).max() > 0.02


@pytest.mark.toolchain
@pytest.mark.parametrize("is_first", [True, False])
def test_it_is_stacked_with_peft(tmp_path, is_first):
    directory = tiny.write_base(tmp_path / "base", tie_word_embeddings=True)
    own = write(tmp_path / "mlx", updates(0, 1) | {
        f"{EMBEDDING}.lora_a": random(40, 4), f"{EMBEDDING}.lora_b": random(4, 16),
        f"{EMBEDDING}.m": random(40) + 1,
        **{f"{QUERY.format(n)}.m": random(16, seed=n) + 1 for n in range(2)},
    }, fine_tune_type="dora")  # fmt: skip
    tensors = tiny.q_proj_updates()
    tensors |= {f"{QUERY.format(n)}.lora_magnitude_vector": random(16, seed=n) for n in range(2)}
    other = tiny.write_adapter(tmp_path / "peft", tensors, use_dora=True)
    merged = Checkpoint.open(directory)
    for adapter in (own, other) if is_first else (other, own):
        merged = merging.merge(merged, adapter)
    assert merged.spec.is_tied
    (side_by_side,) = transformers_logits.logits(merged, tiny.IDS, fits_in_memory=True)
    write_checkpoint(merged, tmp_path / "merged", precision="f32")
    found = tiny.logits_of(tiny.load(tmp_path / "merged"))
    assert np.abs(found - side_by_side).max() <= 1e-4
