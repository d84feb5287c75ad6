"""Adapters whose names have what was around the model in training."""

import doctest

import pytest

from edgekit.errors import UsageError
from edgekit.proof import transformers_logits
from edgekit.source import names
from edgekit.source.adapters import merging
from edgekit.source.checkpoint import Checkpoint
from edgekit.tests.tiny import adapters as tiny


np = pytest.importorskip("numpy")

Q0 = "model.layers.0.self_attn.q_proj"
# What stands in front of the modules in the file, by how the training was wrapped.
PREFIXES = {
    "torch.compile": "base_model.model._orig_mod.",
    "torch.compile, outside": "_orig_mod.base_model.model.",
    "data parallel": "module.base_model.model.",
    "PEFT twice": "base_model.model.base_model.model.",
    "no wrapper": "",
    "a model that sees": "base_model.model.model.language_model.",
    "a model that sees, version 4": "base_model.model.language_model.",
}
INFIXES = {
    "FSDP": ("model.", "_fsdp_wrapped_module.model.", "mlp", "_fsdp_wrapped_module.mlp"),
    "checkpoint wrapper": ("self_attn.", "_checkpoint_wrapped_module.self_attn."),
    "compiled layers": ("self_attn.", "_orig_mod.self_attn."),
}  # fmt: skip


def notes_of(merged):
    assert merged.adapter is not None
    return merged.adapter.notes


def write_named(directory, tensors, **config):
    """Write an adapter whose tensors have just these names."""
    tiny.write_adapter(directory, {"x": np.zeros(1)}, **config)
    tiny.write_safetensors(directory / "adapter_model.safetensors", tensors)
    return directory


def with_prefix(prefix, tensors):
    has_no_body = prefix.endswith("model.language_model.")
    return {
        prefix + (name.removeprefix("model.") if has_no_body else name): values
        for name, values in tensors.items()
    }


def with_infix(pairs, tensors):
    found = {}
    for name, values in tensors.items():
        for old, new in zip(pairs[::2], pairs[1::2], strict=True):
            name = name.replace(old, new, 1)  # noqa: PLW2901 - one after the other
        found[f"base_model.model.{name}"] = values
    return found


@pytest.mark.parametrize("kind", [*PREFIXES, *INFIXES])
def test_what_was_around_a_model_is_left_out_of_its_names(base, tmp_path, kind):
    updates = tiny.q_proj_updates()
    named = (
        with_prefix(PREFIXES[kind], updates)
        if kind in PREFIXES
        else with_infix(INFIXES[kind], updates)
    )
    merged = merging.merge(base, write_named(tmp_path / "a", named))
    usual = merging.merge(base, tiny.write_adapter(tmp_path / "b", updates))
    for layer in range(2):
        role = f"layers.{layer}.query"
        np.testing.assert_array_equal(merged.weight(role), usual.weight(role))
    told = [note for note in notes_of(merged) if "around the model in training" in note]
    assert len(told) == (kind != "no wrapper")


def test_patterns_are_matched_against_the_names_of_the_training(base, tmp_path):
    updates = tiny.q_proj_updates(rank=6)
    named = with_prefix("base_model.model.model.language_model.", updates)
    pattern = r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj)).*?"
    config = {
        "target_modules": pattern,
        "rank_pattern": {r"model\.language_model\.layers\.\d\.self_attn\.q_proj": 6},
    }
    merged = merging.merge(base, write_named(tmp_path / "a", named, **config))
    delta = 8 / 6 * updates[f"{Q0}.lora_B.weight"] @ updates[f"{Q0}.lora_A.weight"]
    found = merged.weight("layers.0.query") - base.weight("layers.0.query")
    np.testing.assert_allclose(found, delta, atol=1e-6)


def test_what_else_a_wrapper_held_is_left_out_with_a_note(base, tmp_path):
    named = with_prefix("base_model.model.model.language_model.", tiny.q_proj_updates())
    vision = "base_model.model.model.visual.blocks.0.attn.q_proj.lora_"
    named |= {f"{vision}A.weight": np.ones((4, 8)), f"{vision}B.weight": np.ones((8, 4))}
    notes = notes_of(merging.merge(base, write_named(tmp_path / "a", named)))
    assert any("1 are outside the decoder" in it and "model.visual.blocks.0" in it for it in notes)


def test_a_tensor_with_and_without_a_wrapper_is_refused(base, tmp_path):
    updates = tiny.q_proj_updates()
    named = with_prefix("base_model.model.", updates) | with_prefix("module.", updates)
    with pytest.raises(UsageError, match="twice, with and without a wrapper"):
        merging.merge(base, write_named(tmp_path / "a", named))


@pytest.mark.toolchain
@pytest.mark.parametrize("kind", ["torch.compile", "a model that sees"])
def test_peft_says_the_same_of_an_adapter_with_a_prefix(tmp_path, kind):
    lora = {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 2}}
    made = tiny.train_with_peft(tmp_path, base={}, **lora)
    weights = made.adapter / "adapter_model.safetensors"
    stored = {
        key.removeprefix(merging.PREFIX): tensor.numpy()
        for key, tensor in tiny.load_tensors(weights).items()
    }
    tiny.write_safetensors(weights, with_prefix(PREFIXES[kind], stored))
    merged = merging.merge(Checkpoint.open(made.base), made.adapter)
    (said,) = transformers_logits.logits(merged, tiny.IDS, fits_in_memory=True)
    assert np.abs(said - made.logits).max() <= 1e-5
    assert np.abs(said - made.base_logits).max() > 0.02


def test_the_examples_are_right():
    assert doctest.testmod(names) == (0, 1)
