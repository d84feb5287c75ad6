"""Programs for Vulkan: what they compute, what is in them, and who refuses them."""

import hashlib
import json
import subprocess
import sys
from typing import TYPE_CHECKING, cast

import pytest

from edgekit import formats
from edgekit.errors import BundleError, UsageError
from edgekit.export import export
from edgekit.formats import BuildRequest
from edgekit.formats.executorch import app_kit, conversion, program, running, tensor_types, writing
from edgekit.formats.executorch.backends import vulkan
from edgekit.formats.executorch.backends.vulkan import limits, size
from edgekit.formats.executorch.backends.vulkan import writing as vulkan_writing
from edgekit.inspect import inspect, lines
from edgekit.proof import interpreter, transformers_logits
from edgekit.proof.fidelity import Comparison
from edgekit.source import opening
from edgekit.target import load as load_target
from edgekit.tests.needs import needs
from edgekit.tests.tiny.checkpoints import write_tiny_checkpoint
from edgekit.validate import validate


if TYPE_CHECKING:
    from edgekit.formats import ReadableRunning

np = pytest.importorskip("numpy")


pytestmark = [
    pytest.mark.toolchain,
    needs("torch", "transformers", "executorch"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]

executorch = cast("ReadableRunning", formats.get("executorch"))
CONTEXT_TOKENS = 160
MAX_KL_NATS = 1e-10
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
REFUSED = {
    "gemma2": "attention with a cap on scores", "odd-sizes": "rope over 18 channels",
    "stablelm-1.6b": "rope over 4 channels", "vaultgemma": "attention with a cap on scores",
}  # fmt: skip
FAR = {"sliding_window": 256}  # further than the context
COMPUTED = [
    ("llama", {}), ("llama3-rope-tied", {}), ("llama-bias", {}), ("odd-head-width", {}),
    ("one-kv-head", {}), ("qwen3", {}), ("smollm3", {}), ("phi3", FAR), ("phi3.5-longrope", {}),
    ("gemma3", FAR), ("stablelm-1.6b", {"hidden_size": 128}), ("olmo3-yarn", FAR), ("hunyuan", {}),
    ("phi", {}), ("nemotron", {"head_dim": 16}), ("apertus", {}), ("ministral3", {}),
    ("cohere-norms", {}), ("cohere2", FAR),
]  # fmt: skip


def opened(directory, kind="llama", **fields):
    return opening.open_checkpoint(write_tiny_checkpoint(directory / "model", kind, **fields))


def convert(checkpoint, recipe, directory, context_tokens=CONTEXT_TOKENS):
    directory.mkdir(parents=True, exist_ok=True)
    request = BuildRequest(
        recipe=tensor_types.RECIPES[recipe], context_tokens=context_tokens, variant="vulkan"
    )
    assert conversion.variant_of(checkpoint.spec, request) == "vulkan"
    entry = conversion.convert(checkpoint, request, directory, progress=lambda _: None)
    return directory / entry


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return opened(tmp_path_factory.mktemp("vulkan-model"), **WIDE)


@pytest.fixture(scope="module")
def four_bit_path(checkpoint, tmp_path_factory):
    return convert(checkpoint, "8da4w", tmp_path_factory.mktemp("vulkan"))


def embedding(path, spec, read):
    """Return what the program has in front of its delegate, with the file's own bytes."""
    import torch

    from edgekit.formats.executorch import embeddings
    from edgekit.tests.witnesses.vulkan_interpreter import Interpreter

    named = Interpreter(path).named
    shape, stored = read.held["token_embedding"]
    parts = [
        torch.frombuffer(bytearray(named[part.key]), dtype=dtype)
        for part, dtype in zip(
            tensor_types.parts("token_embedding", shape, stored),
            {
                "F32": [torch.float32], "F16": [torch.float16],
                "INT8": [torch.int8, torch.float32],
            }.get(stored, [torch.uint8, torch.float32]),
            strict=True,
        )
    ]  # fmt: skip
    if stored == "INT8":
        return embeddings.Int8Embedding(parts[0].view(shape), parts[1])
    if len(parts) == 1:
        return embeddings.FloatEmbedding(parts[0].view(shape))
    rows = spec.vocab_size
    return embeddings.AcrossInt4Embedding(parts[0].view(rows, -1), parts[1].view(-1, rows))


def said(path, spec, ids, read, context_tokens=CONTEXT_TOKENS):
    """Return the program's logits after a prompt, single tokens, and a second prompt."""
    import torch
    from executorch.exir.passes import _quant_patterns_and_replacements  # noqa: F401 - operators

    from edgekit.formats.executorch.backends.vulkan import wrapper
    from edgekit.tests.witnesses.vulkan_interpreter import Interpreter

    decoder = wrapper.VulkanDecoder(
        spec, embedding=embedding(path, spec, read), inner=Interpreter(path),
        context_tokens=context_tokens,
    )  # fmt: skip
    rows, found, at = [], [], 0
    with torch.inference_mode():
        for count in (21, *[1] * 8, len(ids) - 29):
            step = torch.tensor([ids[at : at + count]])
            found.append(decoder(step, torch.arange(at, at + count))[0].numpy())
            at += count
            rows.append(at - 1)
    return rows, np.stack(found)


def agreement(expected, rows, found, ids):
    comparison = Comparison()
    comparison.add(expected[rows], found, np.array(ids)[rows])
    return comparison.result()


def random_ids(spec, count=80):
    return np.random.default_rng(3).integers(0, spec.vocab_size, count).tolist()


# What is computed


@pytest.mark.parametrize(("kind", "fields"), COMPUTED)
def test_the_delegates_operators_say_what_transformers_says(kind, fields, tmp_path):
    checkpoint = opened(tmp_path, kind, **fields)
    border = checkpoint.spec.original_max_position_embeddings
    context = min(CONTEXT_TOKENS, border or CONTEXT_TOKENS)
    path, ids = convert(checkpoint, "F32", tmp_path, context), random_ids(checkpoint.spec)
    read = running.read_back(path, checkpoint.spec)
    rows, found = said(path, checkpoint.spec, ids, read, context)
    (expected,) = transformers_logits.logits(checkpoint, [ids])
    assert agreement(expected, rows, found, ids).mean_kl_nats <= MAX_KL_NATS
    layout = writing.lay_out(
        checkpoint, BuildRequest(recipe=tensor_types.RECIPES["F32"], variant="vulkan")
    )
    assert path.stat().st_size == pytest.approx(layout.artifact_bytes, rel=0.01)
    report = json.loads((path.parent / conversion.COVERAGE).read_text())
    assert report["operators_in_backend"] == size.operators(checkpoint.spec)
    assert report["matrices_outside"] == []


@pytest.mark.parametrize(
    ("kind", "recipe", "fields"),
    [
        ("llama", "F16", {}), ("llama", "8da4w", {}), ("llama", "8da4w_g64", {}),
        ("llama", "8da4w_all", {}), ("apertus", "F16", {}),
        ("llama", "8da4w", {"vocab_size": 9001}),  # more rows than an int8 texture may have
        ("phi", "8da4w", {}),  # a head of int8 with a bias
    ],
)  # fmt: skip
def test_the_weights_read_back_are_those_that_the_delegate_multiplies_with(
    kind, recipe, fields, tmp_path
):
    checkpoint = opened(tmp_path, kind, **WIDE, **fields)
    path, ids = convert(checkpoint, recipe, tmp_path), random_ids(checkpoint.spec)
    read = running.read_back(path, checkpoint.spec)
    rows, found = said(path, checkpoint.spec, ids, read)
    (expected,) = interpreter.logits(read, [ids])
    assert agreement(expected, rows, found, ids).mean_kl_nats <= 1e-9
    layout = writing.lay_out(
        checkpoint, BuildRequest(recipe=tensor_types.RECIPES[recipe], variant="vulkan")
    )
    assert layout.is_half == (recipe == "F16")
    assert layout.substituted == ()
    assert path.stat().st_size == pytest.approx(layout.artifact_bytes, rel=0.01)
    held = {name: kind for name, _, kind in running.contents(path)}
    assert held == {placement.role: placement.tensor_type for placement in layout.placements}


@pytest.mark.parametrize(
    ("context_tokens", "vocabulary"), [(4096, 600), (96, 70_000), (4096, 70_000)]
)
def test_what_outgrows_a_phones_textures_is_computed_in_buffers(
    context_tokens, vocabulary, tmp_path
):
    from edgekit.tests.witnesses.vulkan_interpreter import Interpreter

    checkpoint = opened(tmp_path, vocab_size=vocabulary)
    path = convert(checkpoint, "F32", tmp_path, context_tokens)
    ids, read = random_ids(checkpoint.spec), running.read_back(path, checkpoint.spec)
    rows, found = said(path, checkpoint.spec, ids, read, context_tokens)
    (expected,) = interpreter.logits(read, [ids])
    assert agreement(expected, rows, found, ids).mean_kl_nats <= MAX_KL_NATS
    tensors = [value.value for value in Interpreter(path).graph.values]
    deepest, widest = 2048, 4 * 16384
    for tensor in tensors:
        if getattr(tensor, "storage_type", 0) == 1:  # a texture; its depth is the third last axis
            assert tensor.dims[-1] <= widest
            assert tensor.dims[:-2] == [] or tensor.dims[-3] <= deepest


def test_a_matrix_that_outgrows_a_buffer_is_multiplied_in_parts(tmp_path, monkeypatch):
    from edgekit.tests.witnesses.vulkan_interpreter import Interpreter

    monkeypatch.setattr(limits, "BUFFER_BYTES", 2**13)  # 32 rows of 64 weights
    monkeypatch.setattr(vulkan_writing, "batch_tokens", lambda *_, **__: 128)
    checkpoint = opened(tmp_path, "llama-bias")
    path, ids = convert(checkpoint, "F32", tmp_path), random_ids(checkpoint.spec)
    assert "layers.0.query_bias@32" in Interpreter(path).named
    read = running.read_back(path, checkpoint.spec)
    rows, found = said(path, checkpoint.spec, ids, read)
    (expected,) = interpreter.logits(read, [ids])
    assert agreement(expected, rows, found, ids).mean_kl_nats <= MAX_KL_NATS


def test_no_more_is_read_at_once_than_its_scores_fit_into_a_buffer(checkpoint):
    spec = checkpoint.spec
    assert vulkan_writing.batch_tokens(spec, context_tokens=64) == 64
    assert vulkan_writing.batch_tokens(spec, context_tokens=4096) == 128
    context = 2**18
    batch = vulkan_writing.batch_tokens(spec, context_tokens=context)
    assert 0 < batch < 128
    assert 4 * spec.attention.heads * batch * context < limits.BUFFER_BYTES


def test_tensors_share_memory_and_so_need_little_of_it(tmp_path):
    from edgekit.tests.witnesses.vulkan_interpreter import Interpreter

    objects = []
    for layers in (2, 6):
        checkpoint = opened(tmp_path / str(layers), num_hidden_layers=layers)
        graph = Interpreter(convert(checkpoint, "F32", tmp_path / str(layers))).graph
        tensors = [v.value for v in graph.values if hasattr(v.value, "mem_obj_id")]
        objects.append({tensor.mem_obj_id for tensor in tensors if tensor.constant_id < 0})
    assert objects[0] == objects[1]
    assert len(objects[0]) < 20


def test_a_position_past_the_context_fails_before_it_is_written(checkpoint, four_bit_path):
    """A range as long as the text reaches is planned for the context, and grows no further."""
    import torch

    from edgekit.formats.executorch.backends.vulkan import wrapper
    from edgekit.tests.witnesses.vulkan_interpreter import Interpreter

    forward = program.read(four_bit_path).method("forward")
    assert forward
    assert "aten::arange.start_out" in forward.operators
    read = running.read_back(four_bit_path, checkpoint.spec)
    decoder = wrapper.VulkanDecoder(
        checkpoint.spec, embedding=embedding(four_bit_path, checkpoint.spec, read),
        inner=Interpreter(four_bit_path), context_tokens=CONTEXT_TOKENS,
    )  # fmt: skip
    with pytest.raises(RuntimeError), torch.inference_mode():
        decoder(torch.tensor([[1]]), torch.tensor([CONTEXT_TOKENS]))


# What is in it


def test_all_but_the_embedding_is_in_the_backend(checkpoint, four_bit_path):
    report = json.loads((four_bit_path.parent / conversion.COVERAGE).read_text())
    assert report["backend"] == "VulkanBackend"
    assert report["matrices_in_backend"] == 2 * 7 + 1
    assert report["weight_bytes_outside"] == 0  # the head has the same table
    multiplying = ("aten::mm", "aten::addmm", "aten::linear", "aten::bmm")
    assert not [c for c in report["operator_calls_outside"] if c.startswith(multiplying)]
    forward = program.read(four_bit_path).method("forward")
    assert forward
    assert forward.backends == ("VulkanBackend",)


def test_a_tied_table_is_in_the_file_once(checkpoint, four_bit_path):
    codes, scales = tensor_types.encode(checkpoint.weight("token_embedding"), "INT8")
    content = four_bit_path.read_bytes()
    assert (content.count(codes.tobytes()), content.count(scales.tobytes())) == (1, 1)


def test_caches_take_no_room_in_the_file(checkpoint, tmp_path):
    sizes = [
        convert(checkpoint, "8da4w_all", tmp_path / str(context), context).stat().st_size
        for context in (128, 2048)
    ]
    assert abs(sizes[0] - sizes[1]) < 1024


def test_codes_lie_across_their_scales(checkpoint, four_bit_path):
    from edgekit.tests.witnesses.vulkan_interpreter import Interpreter

    codes, scales = tensor_types.encode(checkpoint.weight("layers.1.down"), "Q4GSW_G32")
    named = Interpreter(four_bit_path).named
    assert named["layers.1.down"] == codes.tobytes()
    assert named["layers.1.down.scale"] == scales.T.tobytes()


def test_runners_are_told_how_much_they_may_read_at_once(checkpoint):
    found = conversion.metadata(checkpoint, 2048, "vulkan")
    assert (found["get_max_seq_len"], found["get_max_context_len"]) == (128, 2048)
    assert found["enable_dynamic_shape"] is True


def test_two_processes_write_the_same_bytes(checkpoint, four_bit_path, tmp_path):
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from edgekit.formats import BuildRequest\n"
        "from edgekit.formats.executorch import conversion, tensor_types\n"
        "from edgekit.source.opening import open_checkpoint\n"
        "request = BuildRequest(recipe=tensor_types.RECIPES['8da4w'],\n"
        "    context_tokens=int(sys.argv[3]), variant='vulkan')\n"
        "conversion.convert(open_checkpoint(sys.argv[1]), request,\n"
        "    Path(sys.argv[2]), progress=lambda _: None)\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, checkpoint.directory, tmp_path, str(CONTEXT_TOKENS)],
        check=True, capture_output=True,
    )  # fmt: skip
    digests = {
        hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (four_bit_path, tmp_path / conversion.ENTRY)
    }
    assert len(digests) == 1


def test_memory_grows_with_the_context_and_is_halved_by_float16(checkpoint):
    def use(recipe, context_tokens):
        layout = writing.lay_out(
            checkpoint, BuildRequest(recipe=tensor_types.RECIPES[recipe], variant="vulkan")
        )
        return writing.memory_use(checkpoint, layout, context_tokens=context_tokens, by_app=False)

    assert use("F32", 4096).cache_bytes == 8 * use("F32", 512).cache_bytes
    assert use("F32", 512).cache_bytes == 2 * use("F16", 512).cache_bytes
    assert use("F16", 512).weights_bytes < use("F32", 512).weights_bytes


# Who refuses it


def test_a_bundle_says_that_it_was_not_executed_and_is_not_validated_here(tmp_path):
    model = write_tiny_checkpoint(tmp_path / "model", "llama")
    target = load_target("android-high")
    made = export(
        model, target, out=tmp_path / "out", format="executorch", quant="F32", variant="vulkan",
        context_tokens=CONTEXT_TOKENS, calibrate=False,
    )  # fmt: skip
    assert made.agreement
    assert "not executed here, it needs an Android phone" in made.agreement.said_by
    assert made.agreement.mean_kl_nats <= MAX_KL_NATS
    printed = "\n".join(lines(inspect(tmp_path / "out")))
    assert "not executed here" in printed
    with pytest.raises(UsageError, match="needs an Android phone") as refusal:
        validate(tmp_path / "out", target)
    assert target.title in str(refusal.value)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_decoder_that_the_delegate_does_not_compute_is_refused(kind, tmp_path):
    spec = opened(tmp_path, kind).spec
    with pytest.raises(UsageError, match=f"has no {REFUSED[kind]}") as refusal:
        conversion.variant_of(
            spec, BuildRequest(recipe=tensor_types.RECIPES["F32"], variant="vulkan")
        )
    assert "--variant portable" in refusal.value.hint


def test_a_recipe_that_it_cannot_hold_is_refused_with_those_it_can(checkpoint):
    with pytest.raises(UsageError, match="no recipe 8da8w") as refusal:
        writing.lay_out(
            checkpoint, BuildRequest(recipe=tensor_types.RECIPES["8da8w"], variant="vulkan")
        )
    assert "8da4w" in refusal.value.hint


@pytest.mark.parametrize(
    ("kind", "most", "why"),
    [("phi3-longrope", 64, "rotated differently"), ("gemma3", 16, "looks back no further")],
)
def test_a_context_past_which_attention_would_be_another_is_refused(kind, most, why, tmp_path):
    checkpoint = opened(tmp_path, kind)
    with pytest.raises(UsageError, match=why) as refusal:
        convert(checkpoint, "F32", tmp_path, most + 1)
    assert f"--context {most}" in refusal.value.hint
    assert convert(checkpoint, "F32", tmp_path, most).is_file()


def test_this_machine_says_which_device_it_lacks(four_bit_path):
    assert not running.is_run_here("vulkan")
    with pytest.raises(UsageError, match="for Vulkan, which this machine has not") as refusal:
        running.load(four_bit_path, context_tokens=32)
    assert "an Android phone whose GPU has Vulkan 1.1" in str(refusal.value)
    assert "validate --measurement" in refusal.value.hint


def test_a_bent_delegate_is_read_or_refused(four_bit_path, tmp_path):
    content = four_bit_path.read_bytes()
    begin = content.index(b"VH00") + 26
    path, random, refused = tmp_path / "model.pte", np.random.default_rng(11), 0
    for _ in range(300):
        bent = bytearray(content)
        bent[begin + int(random.integers(4000))] ^= 1 << int(random.integers(8))
        path.write_bytes(bent)
        try:
            running.contents(path)
        except BundleError:
            refused += 1
    assert refused > 5


def test_a_program_of_another_model_is_not_read_back(four_bit_path, tmp_path):
    other = opened(tmp_path, "llama-bias")
    with pytest.raises(BundleError, match="holds no"):
        running.read_back(four_bit_path, other.spec)


def test_the_readme_says_what_to_link_and_that_nothing_ran(checkpoint, tmp_path):
    app_kit.write(checkpoint, tmp_path, "model.pte", context_tokens=96, variant="vulkan")
    text = (tmp_path / app_kit.README).read_text(encoding="utf-8")
    assert "`executorch-android-vulkan`" in text
    assert "**not executed**" in text
    assert "needs an Android phone whose GPU has Vulkan 1.1" in text
    assert "## iOS" not in text


def test_recipes_are_those_of_the_format():
    assert set(vulkan.BACKEND.recipes) < tensor_types.RECIPES.keys()
