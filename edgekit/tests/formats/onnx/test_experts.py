"""Experts in ONNX Runtime, whose operators take them in one tensor type, on a processor."""

import json

import pytest

from edgekit import recipes
from edgekit.errors import MissingDependencyError, UsageError
from edgekit.formats import BuildRequest
from edgekit.formats.onnx import conversion, memory
from edgekit.formats.onnx.runtime import OnnxSession
from edgekit.model.spec import EXPERT_MATRICES
from edgekit.proof import transformers_logits
from edgekit.source import opening
from edgekit.tests.formats.onnx.test_families import compare, open_tiny
from edgekit.tests.needs import needs


pytestmark = [pytest.mark.toolchain, needs("torch", "onnxruntime")]
np = pytest.importorskip("numpy")

KIND = "lfm2-moe-scaled"  # whose rows fill blocks


def requested(tensor_type):
    changes = ",".join(f"{role}={tensor_type}" for role in EXPERT_MATRICES)
    return BuildRequest(recipe=recipes.find("onnx", f"F32,{changes}"))


def put_on_a_grid(directory, *, bits):
    """Make the weights of all experts what blocks of 32 hold without loss."""
    from safetensors.numpy import load_file, save_file

    random, top = np.random.default_rng(0), 2 ** (bits - 1)
    tensors = load_file(directory / "model.safetensors")
    for name, values in tensors.items():
        if ".experts." in name:
            codes = random.integers(-top, top, (*values.shape[:-1], values.shape[-1] // 32, 32))
            codes[..., 0], codes[..., 1] = -top, top - 1
            scales = np.abs(values.reshape(codes.shape)).max(-1, keepdims=True) / top
            tensors[name] = (codes * scales).astype(np.float32).reshape(values.shape)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("tensor_type", "bits"), [("INT4", 4), ("UINT4", 4), ("INT8", 8)])
def test_experts_in_blocks_say_what_the_same_weights_say_in_transformers(
    tensor_type, bits, tmp_path
):
    """But for activations, which are rounded to 8 bits: measured 5e-4 to 2e-3 nats."""
    open_tiny(tmp_path, KIND)
    put_on_a_grid(tmp_path / "model", bits=bits)
    checkpoint = opening.open_checkpoint(tmp_path / "model")
    planned = conversion.lay_out(checkpoint, requested(tensor_type))
    assert {it.tensor_type for it in planned.placements if it.role.endswith(EXPERT_MATRICES)} == {
        tensor_type
    }
    entry = conversion.convert(
        checkpoint, requested(tensor_type), tmp_path, progress=lambda _: None
    )
    ids = np.random.default_rng(1).integers(0, checkpoint.spec.vocab_size, 200).tolist()
    (expected,) = transformers_logits.logits(checkpoint, [ids])
    session = OnnxSession(tmp_path / entry, context_tokens=256, threads=1)
    found = compare(expected, session.all_logits(ids), ids)
    session.close()
    assert found.mean_kl_nats <= 5e-3
    assert found.same_top_token > 0.9


def test_experts_of_several_tensor_types_are_refused(tmp_path):
    request = BuildRequest(recipe=recipes.find("onnx", "F32,expert_up=INT8"))
    with pytest.raises(UsageError, match="the experts of layer 1 have several tensor types"):
        conversion.plan(open_tiny(tmp_path, KIND), request)


@pytest.mark.parametrize(
    ("request_of", "version"), [("F32", "1.25.1"), ("INT4", "1.31.0"), ("INT8", "1.31.0")]
)
def test_a_plan_says_which_runtime_has_the_operators(request_of, version, tmp_path):
    checkpoint = open_tiny(tmp_path, KIND)
    recipe = BuildRequest(recipe=recipes.find("onnx", request_of))
    notes = conversion.lay_out(checkpoint, recipe).notes
    assert any(f"by operators of ONNX Runtime {version} and later" in note for note in notes)


def test_an_older_runtime_is_refused_by_the_version_that_has_them(tmp_path, monkeypatch):
    import onnxruntime

    checkpoint = open_tiny(tmp_path, KIND)
    entry = conversion.convert(checkpoint, requested("INT4"), tmp_path, progress=lambda _: None)
    monkeypatch.setattr(onnxruntime, "__version__", "1.30.0")
    with pytest.raises(MissingDependencyError, match=r"1\.30\.0 lacks .* 1\.31\.0 has them"):
        OnnxSession(tmp_path / entry, context_tokens=256, threads=1)


def test_clients_are_told_of_layers_they_know(tmp_path):
    """As an LFM2, whose states they give it."""
    from edgekit.formats.onnx import clients

    settings = clients.genai_config(open_tiny(tmp_path, KIND), "onnx/model.onnx", context_tokens=64)
    assert settings["model"]["type"] == "lfm2"
    assert json.dumps(settings["model"]["decoder"]["layer_types"]) == json.dumps(
        ["full_attention", "conv", "full_attention"]
    )


@pytest.mark.parametrize(("recipe", "item_bytes"), [("F32", 8), ("F16", 8), ("INT8", 2.375)])
def test_a_plan_holds_experts_twice_while_they_are_put_together(recipe, item_bytes, tmp_path):
    """Codes and scales in the file, and again in what the operator takes; and packed scales."""
    checkpoint = open_tiny(tmp_path, KIND)
    planned = conversion.lay_out(checkpoint, BuildRequest(recipe=recipes.find("onnx", recipe)))
    held = {
        it.role: memory.weight_bytes(checkpoint.spec, it, is_half=False) / it.parameters
        for it in planned.placements
    }
    assert held["layers.1.expert_down"] == held["layers.1.expert_gate"] == item_bytes
    assert held["layers.1.router"] == 4
