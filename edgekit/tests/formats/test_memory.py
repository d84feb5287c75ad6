"""What the runtimes of three formats hold, to the byte, for a decoder of round numbers."""

from dataclasses import replace

import pytest

from edgekit.formats import Layout
from edgekit.formats.executorch import memory as executorch
from edgekit.formats.gguf import memory as gguf
from edgekit.formats.onnx import memory as onnx
from edgekit.model.mixers import Attention
from edgekit.model.norm import Norm
from edgekit.model.spec import DecoderSpec, Layer
from edgekit.quant.planned import PlannedWeight


SPEC = DecoderSpec(
    vocab_size=1000, hidden_size=64, intermediate_size=128, context_tokens=512,
    layers=(Layer(rope=None),) * 2, norm=Norm(kind="rms", epsilon=1e-5),
    attention=Attention(heads=4, num_kv_heads=2, head_dim=16, softmax_scale=0.25),
)  # fmt: skip
TIED = replace(SPEC, is_tied=True)


def placement(role, tensor_type, *, parameters=3200, size_bytes=2000):
    return PlannedWeight(
        role=role, shape=(parameters,), tensor_type=tensor_type, wanted=tensor_type,
        size_bytes=size_bytes, is_coarse=False,
    )  # fmt: skip


def layout(*sizes, is_half=False):
    placements = tuple(placement("layers.0.up", "F32", size_bytes=size) for size in sizes)
    return Layout(placements=placements, artifact_bytes=0, is_exact=True, is_half=is_half)


def test_gguf_holds_the_file_a_cache_in_steps_of_256_and_one_batch():
    found = gguf.use(SPEC, layout(5000, 700), context_tokens=300)
    assert found.weights_bytes == 5700
    assert found.cache_bytes == 2 * 512 * (2 * 32) * 2  # layers, cells, keys and values, float16
    # 256 tokens of 2 * 128 + 64 numbers and 64 more in float32, masks over 512 cells; one row
    assert found.compute_bytes == 256 * (4 * (320 + 64) + 512 * (4 + 2)) + 4 * 1000
    assert found.runtime_bytes == 48 * 2**20 + 800 * 1000
    short = gguf.use(SPEC, layout(1), context_tokens=10).compute_bytes
    assert short == 10 * (4 * (320 + 64) + 256 * (4 + 2)) + 4 * 1000


def test_gguf_leaves_on_disk_what_a_token_reads_a_row_of_unless_an_app_maps_it_whole():
    table = placement("layer_embedding", "Q6_K", size_bytes=7000)
    larger = placement("layer_embedding", "Q6_K", size_bytes=2**32 + 1)
    rest = layout(5000).placements
    for held, in_app in ((table, 12_000), (larger, 5000)):
        found = replace(layout(), placements=(*rest, held))
        assert gguf.use(SPEC, found, context_tokens=256).weights_bytes == 5000
        assert gguf.use_by_app(SPEC, found, context_tokens=256).weights_bytes == in_app


@pytest.mark.parametrize(("is_half", "item_bytes"), [(False, 4), (True, 2)])
def test_onnx_keeps_a_cache_as_wide_as_its_graph_computes(is_half, item_bytes):
    found = onnx.use(SPEC, layout(5000, 700, is_half=is_half), context_tokens=100)
    assert found.weights_bytes == 5700
    assert found.cache_bytes == 2 * 100 * (2 * 32) * item_bytes
    assert found.compute_bytes == 4 * (100 * (3 * 128 + 2 * 64 + 4 * 100) + 1000)
    assert found.runtime_bytes == 64 * 2**20 + 2 * 2**19 + 500 * 1000


@pytest.mark.parametrize(
    ("spec", "role", "tensor_type", "in_float32", "in_half"),
    [
        (SPEC, "layers.0.up", "F32", 2000, 2000),
        (SPEC, "layers.0.up", "F16", 4 * 3200, 6 * 3200),
        (SPEC, "output_head", "F16", 8 * 3200, 4 * 3200),
        (TIED, "token_embedding", "F16", 8 * 3200, 4 * 3200),
        (SPEC, "token_embedding", "F16", 2000, 2000),  # read row by row
        (SPEC, "layers.0.up", "UINT4", 2000 + 100 * 4, 2000 + 100 * 8),  # 100 blocks of 32
        (TIED, "token_embedding", "UINT4", 4000 + 100 * 4, 4000 + 100 * 8),  # in both forms
    ],
)
def test_onnx_packs_a_weight_for_what_it_is_used_for(spec, role, tensor_type, in_float32, in_half):
    given = placement(role, tensor_type)
    found = [onnx.weight_bytes(spec, given, is_half=is_half) for is_half in (False, True)]
    assert found == [in_float32, in_half]


def test_executorch_sets_a_whole_context_aside_and_packs_while_the_file_is_there():
    found = executorch.use(SPEC, layout(5000, 700), context_tokens=100)
    assert found.weights_bytes == 5700
    assert found.cache_bytes == 2 * 100 * (2 * 32) * 4
    between = 4 * (100 * (2 * 64 + 2 * 64 + 4 * 32) + 1000)
    reading = 2 * 4 * 100 * (4 * 100 + 3 * 128 + 2 * 64)
    assert found.compute_bytes == between + reading
    assert found.runtime_bytes == 40 * 2**20 + 2 * 2**19 + 500 * 1000
    ungated = executorch.use(replace(SPEC, is_gated=False), layout(5000), context_tokens=100)
    assert found.compute_bytes - ungated.compute_bytes == 2 * 4 * 100 * 128
    packing = executorch.use(SPEC, layout(5000, reading + 1), context_tokens=100)
    assert packing.compute_bytes == between + reading + 1


def test_executorch_holds_what_a_text_reads_of_the_embeddings_of_layers():
    def table(size_bytes):
        return replace(
            layout(5000),
            placements=(
                *layout(5000).placements,
                placement("layer_embedding", "INT8", size_bytes=size_bytes),
            ),
        )

    plain = executorch.use(SPEC, layout(5000), context_tokens=100)
    for size_bytes, counted in ((2**30, 100 * 2**16), (2**20, 2**20)):
        found = executorch.use(SPEC, table(size_bytes), context_tokens=100)
        assert found.weights_bytes == 5000 + counted
        assert found.compute_bytes == plain.compute_bytes  # it is not packed
