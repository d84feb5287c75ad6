"""What MLC models take of a GPU, held against what WebLLM says of its own."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from edgekit.doctor import _tiny_checkpoint
from edgekit.formats import BuildRequest
from edgekit.formats.mlc import artifact, conversion, memory, writing
from edgekit.formats.mlc.packing import RECIPES
from edgekit.model.mixers import DeltaNet
from edgekit.model.rope import Rope
from edgekit.model.spec import Layer
from edgekit.model.tokenizer_files import TokenizerFiles
from edgekit.source.checkpoint import Checkpoint
from edgekit.tests.formats.mlc.test_config import COMPUTED


pytest.importorskip("numpy")
pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

PUBLISHED = json.loads(
    (Path(__file__).parent / "data" / "webllm_vram.json").read_text()
)["models"]  # fmt: skip
NO_TEXT = TokenizerFiles(
    tokenizer_json=Path("absent"), special_tokens={}, chat_template=None, declared_stop_ids=(),
    stop_ids_by_file={},
)  # fmt: skip
CASES = [(model, *row) for model in PUBLISHED for row in model["published"]]


def spec_of(model):
    """Return a decoder of the sizes of a model, as MLC's of its type computes it."""
    architecture, width = model["architecture"], model["head_dim"]
    spec = COMPUTED[architecture]
    layers = (Layer(rope=Rope(width=width, theta=1e4)),) * model["layers"]
    if "value_heads" in model:
        net = DeltaNet(
            key_heads=16, value_heads=model["value_heads"], key_head_dim=128, value_head_dim=128,
            taps=4, norm=replace(spec.norm, unit_offset=False),
        )  # fmt: skip
        layers = (*[Layer(mixer=net)] * 3, layers[0]) * (len(layers) // 4)
    return replace(
        spec,
        vocab_size=model["vocabulary"],
        hidden_size=model["hidden_size"],
        intermediate_size=model["intermediate_size"],
        context_tokens=8192,
        layers=layers,
        attention=replace(
            spec.attention,
            heads=model["heads"],
            num_kv_heads=model["num_kv_heads"],
            head_dim=width,
            softmax_scale=width**-0.5,
            has_qkv_bias=spec.attention.has_qkv_bias or architecture == "stablelm",
        ),
        embedding_scale=1.0 if spec.embedding_scale == 1 else model["hidden_size"] ** 0.5,
        is_tied=model["is_tied"],
    )


def checkpoint_of(model, directory):
    """Return headers without a file: a layout reads no weights."""
    return Checkpoint(
        directory=directory,
        architecture=model["architecture"],
        spec=spec_of(model),
        tensors={},
        text=NO_TEXT,
    )


@pytest.fixture(scope="module")
def planned_mib(tmp_path_factory):
    """Return what a case takes; one layout serves every context of a model."""
    directory, layouts = tmp_path_factory.mktemp("published"), {}

    def planned(model, scheme, context_tokens):
        checkpoint, key = checkpoint_of(model, directory), (repr(spec_of(model)), scheme)
        if key not in layouts:
            request = BuildRequest(recipe=RECIPES[scheme])
            layouts[key] = conversion.lay_out(checkpoint, request)
        used = writing.memory_use(
            checkpoint, layouts[key], context_tokens=context_tokens, by_app=False
        )
        return memory.vram_bytes(used) / 2**20

    return planned


@pytest.mark.slow
def test_what_webllm_requires_is_planned_within_a_twentieth(planned_mib):
    errors = {
        (model["name"], scheme, context): planned_mib(model, scheme, context) / mib - 1
        for model, scheme, context, mib in CASES
    }
    beyond = {case: error for case, error in errors.items() if abs(error) > 0.05}
    assert len(errors) == 138
    # The rest are models whose figures date from other compilers than those of their neighbours.
    assert {name for name, _, _ in beyond} <= {
        "Llama-2-7b-chat-hf", "Llama-2-13b-chat-hf", "Hermes-2-Pro-Mistral-7B",
        "Hermes-3-Llama-3.1-8B", "gemma-2b-it",
    }  # fmt: skip
    assert len(beyond) <= 8


def test_the_cache_is_kept_in_whole_pages(tmp_path):
    spec = _tiny_checkpoint(tmp_path).spec
    token_bytes = 2 * 2 * 32 * 2
    found = [memory.cache_bytes(spec, context_tokens=n, item_bytes=2) for n in (1, 16, 17)]
    assert found == [16 * token_bytes, 16 * token_bytes, 32 * token_bytes]


def test_delta_nets_keep_their_states_and_no_keys_and_values():
    spec = COMPUTED["qwen3_5_text"]  # four nets, and two layers that attend
    keys_and_values = 2 * 2 * (2 * 16) * 16
    matrices, columns = 4 * (4 * 8 * 8), 4 * (2 * 2 * 8 + 4 * 8) * 3
    half, full = (memory.cache_bytes(spec, context_tokens=16, item_bytes=size) for size in (2, 4))
    assert half == 2 * keys_and_values + 4 * matrices + 2 * columns
    assert full == 4 * (keys_and_values + matrices + columns)


def test_what_is_stored_as_bfloat16_is_twice_as_large_in_memory(tmp_path):
    tiny = _tiny_checkpoint(tmp_path)
    assert len(RECIPES) > 1
    for recipe in RECIPES.values():
        layout = writing.lay_out(tiny, BuildRequest(recipe=recipe))
        used = writing.memory_use(tiny, layout, context_tokens=64, by_app=False)
        planned = conversion.plan(tiny, recipe)
        tensors = [record.tensor for shard in planned.shards for record in shard.records]
        assert used.weights_bytes == sum(tensor.memory_bytes for tensor in tensors)


def test_a_head_of_fixed_size_makes_room_for_the_logits_of_a_chunk(tmp_path):
    spec = _tiny_checkpoint(tmp_path).spec
    llama, qwen = (
        memory.compute_bytes(name, spec, chunk_tokens=64, item_bytes=2)
        for name in ("llama", "qwen2")
    )
    assert qwen - llama == 64 * 257 * 4
    phi = [
        memory.compute_bytes("phi3", replace(spec, is_tied=tied), chunk_tokens=64, item_bytes=2)
        for tied in (False, True)
    ]
    assert phi == [llama, qwen]


def test_a_phones_app_is_told_what_was_planned_for_its_shorter_chunks(tmp_path):
    tiny = _tiny_checkpoint(tmp_path)
    layout = writing.lay_out(tiny, BuildRequest(recipe=RECIPES["q4f16_1"]))
    (entry,) = artifact.package_config(tiny, layout, model_id="m", context_tokens=512)["model_list"]
    used = writing.memory_use(tiny, layout, context_tokens=512, by_app=False)
    assert entry["overrides"] == {"context_window_size": 512, "prefill_chunk_size": 128}
    assert entry["bundle_weight"] is True
    assert entry["estimated_vram_bytes"] == memory.vram_bytes(used) - used.compute_bytes * 3 // 4
