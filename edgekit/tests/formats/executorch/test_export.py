"""What an export of an ExecuTorch program writes, and what it refuses to."""

import hashlib
import json
import struct
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest

from edgekit import formats
from edgekit.errors import BundleError, ToolchainError
from edgekit.formats import BuildRequest
from edgekit.formats.executorch import (
    conversion,
    coverage,
    memory,
    program,
    running,
    tensor_types,
    writing,
)
from edgekit.formats.executorch.backends import xnnpack
from edgekit.formats.executorch.backends.xnnpack import size
from edgekit.formats.executorch.coverage import Coverage
from edgekit.model.checkpoint_protocol import Calibration, Tensor
from edgekit.proof import transformers_logits
from edgekit.quant.recipe import Recipe, Rule
from edgekit.source import opening
from edgekit.tests.needs import needs
from edgekit.tests.tiny.checkpoints import write_tiny_checkpoint
from edgekit.tests.tiny.executorch_artifacts import decoded


np = pytest.importorskip("numpy")


pytestmark = [
    pytest.mark.toolchain,
    needs("torch", "transformers", "executorch"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]

CONTEXT_TOKENS = 96
executorch = formats.get("executorch")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Two layers whose rows fill every group, and a head tied to the embedding."""
    directory = tmp_path_factory.mktemp("executorch-model")
    return opening.open_checkpoint(
        write_tiny_checkpoint(
            directory / "model", "llama", hidden_size=128, intermediate_size=256,
            num_hidden_layers=2,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    directory = tmp_path_factory.mktemp("executorch-untied")
    return opening.open_checkpoint(
        write_tiny_checkpoint(directory / "model", "llama-bias", num_hidden_layers=1)
    )


def convert(checkpoint, recipe, directory, variant=None):
    directory.mkdir(parents=True)
    entry = conversion.convert(
        checkpoint,
        BuildRequest(
            recipe=recipe if isinstance(recipe, Recipe) else tensor_types.RECIPES[recipe],
            context_tokens=CONTEXT_TOKENS,
            variant=variant or xnnpack.PORTABLE,
        ),
        directory,
        progress=lambda _: None,
    )
    return directory / entry


@pytest.fixture(scope="module")
def float_path(checkpoint, tmp_path_factory):
    return convert(checkpoint, "F32", tmp_path_factory.mktemp("float") / "artifact")


@pytest.fixture(scope="module")
def four_bit_path(checkpoint, tmp_path_factory):
    return convert(checkpoint, "8da4w", tmp_path_factory.mktemp("four-bit") / "artifact")


@pytest.fixture(scope="module")
def all_four_bit_path(checkpoint, tmp_path_factory):
    return convert(checkpoint, "8da4w_all", tmp_path_factory.mktemp("all-four-bit") / "artifact")


def logits(path, ids):
    session = running.load(path, context_tokens=CONTEXT_TOKENS, threads=1)
    try:
        return session.all_logits(ids).copy()
    finally:
        session.close()


def operators_of(path):
    forward = program.read(path).method("forward")
    assert forward
    return forward.operators


IDS = np.random.default_rng(1).integers(0, 500, 40).tolist()


# What is inside


@pytest.mark.parametrize(
    ("recipe", "made", "words"),
    [("8da4w", "four_bit_path", "INT8"), ("8da4w_all", "all_four_bit_path", "INT4_G32")],
)
def test_a_quantized_program_holds_what_its_recipe_asks_for(
    checkpoint, request, recipe, made, words
):
    path = request.getfixturevalue(made)
    layout = writing.lay_out(checkpoint, BuildRequest(recipe=tensor_types.RECIPES[recipe]))
    held = {name: (shape, kind) for name, shape, kind in running.contents(path)}
    shapes = dict(checkpoint.spec.weights())
    assert held == {p.role: (shapes[p.role], p.tensor_type) for p in layout.placements}
    assert held["layers.1.down"] == ((128, 256), "INT4_G32")
    assert held["token_embedding"] == (shapes["token_embedding"], words)
    assert path.stat().st_size == pytest.approx(layout.artifact_bytes, rel=0.01)


def test_a_tied_table_is_in_the_file_once(checkpoint, float_path):
    table = checkpoint.weight("token_embedding")
    stored = float_path.read_bytes()
    assert stored.count(table.tobytes()) == 1
    found = program.read(float_path)
    (index,) = [index for key, index in found.named_data if key == "token_embedding"]
    first, size = found.segments[index]
    assert stored[first : first + size] == table.tobytes()


def test_a_tied_table_of_four_bits_is_there_once_too(checkpoint, all_four_bit_path):
    content = all_four_bit_path.read_bytes()
    for part in tensor_types.encode(checkpoint.weight("token_embedding"), "INT4_G32"):
        assert content.count(part.tobytes()) == 1
    report = json.loads((all_four_bit_path.parent / conversion.COVERAGE).read_text())
    assert report["operator_calls_outside"]["quantized_decomposed::embedding_4bit.dtype_out"] == 1
    assert report["weight_bytes_outside"] == 0


@pytest.mark.parametrize(("recipe", "words"), [("8da8w", "INT8"), ("8da4w_all", "INT4_G32")])
def test_an_untied_head_has_its_own(untied, tmp_path, recipe, words):
    path = convert(untied, recipe, tmp_path / "artifact")
    held = {name: kind for name, _, kind in running.contents(path)}
    assert (held["token_embedding"], held["output_head"]) == (words, words)
    assert held["layers.0.query_bias"] == held["layers.0.mlp_norm"] == "F32"


def test_codes_are_those_of_the_storage(checkpoint, four_bit_path):
    found = program.read(four_bit_path)
    content = four_bit_path.read_bytes()
    codes, scales = tensor_types.encode(checkpoint.weight("layers.1.gate"), "INT4_G32")
    for key, expected in (("layers.1.gate", codes), ("layers.1.gate.scale", scales)):
        (index,) = [index for name, index in found.named_data if name == key]
        first, size = found.segments[index]
        assert content[first : first + size] == expected.tobytes()


def test_a_calibration_leads_the_codes_of_layers_only(checkpoint, four_bit_path, tmp_path):
    spec = checkpoint.spec
    random = np.random.default_rng(5)
    importance = {
        role: random.lognormal(sigma=3, size=shape[-1]).astype(np.float32)
        for role, shape in spec.weights()
        if len(shape) > 1
    }
    led = replace(checkpoint, calibration=Calibration(text_sha256="a" * 64, importance=importance))
    assert (
        writing.lay_out(led, BuildRequest(recipe=tensor_types.RECIPES["8da4w"])).calibration
        == "a" * 64
    )
    assert (
        writing.lay_out(led, BuildRequest(recipe=tensor_types.RECIPES["8da8w"])).calibration is None
    )
    path = convert(led, "8da4w", tmp_path / "led")

    def part(file, key):
        found = program.read(file)
        (index,) = [index for name, index in found.named_data if name == key]
        first, size = found.segments[index]
        return file.read_bytes()[first : first + size]

    assert part(path, "layers.0.up") != part(four_bit_path, "layers.0.up")
    assert part(path, "token_embedding") == part(four_bit_path, "token_embedding")


def test_runners_find_what_they_ask_a_program_for(float_path):
    methods = {method.name for method in program.read(float_path).methods}
    assert methods == {
        "forward", "get_max_seq_len", "get_max_context_len", "get_vocab_size", "get_bos_id",
        "get_eos_ids", "use_kv_cache", "use_sdpa_with_kv_cache", "enable_dynamic_shape",
        "get_n_layers",
    }  # fmt: skip


def test_what_they_find_is_true(checkpoint):
    found = conversion.metadata(checkpoint, CONTEXT_TOKENS, xnnpack.LLM)
    assert found["get_max_seq_len"] == found["get_max_context_len"] == CONTEXT_TOKENS
    assert found["get_vocab_size"] == checkpoint.spec.vocab_size
    assert found["get_eos_ids"] == list(checkpoint.text.declared_stop_ids)
    assert found["use_sdpa_with_kv_cache"] is True
    assert found["get_n_layers"] == 2
    portable = conversion.metadata(checkpoint, CONTEXT_TOKENS, xnnpack.PORTABLE)
    assert portable["use_sdpa_with_kv_cache"] is False


def test_every_matrix_is_in_the_backend(checkpoint, float_path):
    report = json.loads((float_path.parent / conversion.COVERAGE).read_text())
    assert report["matrices_outside"] == []
    assert report["matrices_in_backend"] == 2 * 7 + 1  # the head's among them
    assert report["operators_in_backend"] == size.operators(
        checkpoint.spec, uses_llm_operators=False, is_rounded=False
    )
    assert report["operators_in_backend"] > 2 * sum(report["operator_calls_outside"].values())
    assert report["weight_bytes_outside"] == 0  # the tied table is the head's, too
    for name in ("aten::mm", "aten::addmm", "aten::linear", "aten::bmm"):
        assert not any(call.startswith(name) for call in report["operator_calls_outside"])


def test_a_matrix_outside_of_the_backend_stops_the_export(checkpoint):
    planned = conversion.weights(checkpoint.spec, tensor_types.RECIPES["8da4w"], xnnpack.BACKEND)
    roles = frozenset(weight.role for weight in planned) - {"layers.1.down"}
    found = Coverage(delegated_operators=1, delegated_weights=roles, portable_operators={})
    with pytest.raises(ToolchainError, match=r"not multiply by layers\.1\.down"):
        coverage.report(found, planned, id="XnnpackBackend", name="XNNPACK")


# What it says


def test_eight_bits_say_nearly_what_the_checkpoint_says(checkpoint, tmp_path):
    (expected,) = transformers_logits.logits(checkpoint, [IDS])
    said = logits(convert(checkpoint, "8da8w", tmp_path / "artifact"), IDS)
    error = abs(said - expected).mean() / abs(expected).mean()
    assert 0.001 < error < 0.1


def test_four_bits_say_it_less_well(checkpoint, four_bit_path):
    (expected,) = transformers_logits.logits(checkpoint, [IDS])
    error = abs(logits(four_bit_path, IDS) - expected).mean() / abs(expected).mean()
    assert 0.1 < error < 0.6


@dataclass(frozen=True)
class Rounded:
    """A tensor of a checkpoint, as four bits hold it."""

    exact: Tensor

    @property
    def shape(self):
        return self.exact.shape

    @property
    def size_bytes(self):
        return self.exact.size_bytes

    def read(self, first_row=0, rows=None):
        return decoded(
            tensor_types.encode(self.exact.read(first_row, rows), "INT4_G32"), "INT4_G32"
        )


# Next to a head of four bits, what it is multiplied with is rounded; next to another, nothing is.
@pytest.mark.parametrize(("model", "error"), [("untied", 1e-5), ("checkpoint", 0.03)])
def test_an_embedding_of_four_bits_gives_what_its_codes_stand_for(request, tmp_path, model, error):
    given = request.getfixturevalue(model)
    name = "model.embed_tokens.weight"
    rounded = replace(given, tensors={**given.tensors, name: Rounded(given.tensors[name])})
    words = replace(
        tensor_types.RECIPES["F32"],
        rules=(Rule(pattern="token_embedding", tensor_type="INT4_G32"),),
    )
    said = logits(convert(given, words, tmp_path / "words"), IDS)
    expected = logits(convert(rounded, "F32", tmp_path / "rounded"), IDS)
    assert abs(said - expected).mean() <= error * abs(expected).mean()


def test_four_bits_everywhere_say_it_worse_still(checkpoint, all_four_bit_path):
    (expected,) = transformers_logits.logits(checkpoint, [IDS])
    error = abs(logits(all_four_bit_path, IDS) - expected).mean() / abs(expected).mean()
    assert 0.1 < error < 0.7


def test_the_llm_operators_say_the_same(checkpoint, tmp_path):
    path = convert(checkpoint, "F32", tmp_path / "artifact", variant="llm-ops")
    operators = operators_of(path)
    assert {"llama::custom_sdpa.out", "llama::update_cache.out"} <= set(operators)
    (expected,) = transformers_logits.logits(checkpoint, [IDS])
    np.testing.assert_allclose(logits(path, IDS), expected, rtol=0, atol=1e-3)


def test_any_runtime_has_the_operators_of_the_portable_variant(float_path):
    assert not [
        name
        for name in operators_of(float_path)
        if not name.startswith(("aten::", "executorch_prim::"))
    ]


# The bytes


def test_two_processes_write_the_same_bytes(checkpoint, four_bit_path, tmp_path):
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from edgekit.formats import BuildRequest\n"
        "from edgekit.formats.executorch import conversion, tensor_types\n"
        "from edgekit.source.opening import open_checkpoint\n"
        "request = BuildRequest(recipe=tensor_types.RECIPES['8da4w'],\n"
        "    context_tokens=int(sys.argv[3]), variant='portable')\n"
        "conversion.convert(open_checkpoint(sys.argv[1]), request,\n"
        "    Path(sys.argv[2]), progress=lambda _: None)\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, checkpoint.directory, tmp_path, str(CONTEXT_TOKENS)],
        check=True, capture_output=True,
    )  # fmt: skip
    digests = [
        hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (four_bit_path, tmp_path / conversion.ENTRY)
    ]
    assert digests[0] == digests[1]


def f32(context_tokens):
    return BuildRequest(
        recipe=tensor_types.RECIPES["F32"], context_tokens=context_tokens, variant=xnnpack.PORTABLE
    )


def test_the_size_hardly_depends_on_the_context(untied, tmp_path):
    entry = conversion.convert(untied, f32(4096), tmp_path, progress=lambda _: None)
    layout = writing.lay_out(untied, BuildRequest(recipe=tensor_types.RECIPES["F32"]))
    assert (tmp_path / entry).stat().st_size == pytest.approx(layout.artifact_bytes, rel=0.01)


def test_what_is_set_aside_grows_with_the_context_and_no_faster(checkpoint, float_path, tmp_path):
    (tmp_path / "long").mkdir()
    entry = conversion.convert(
        checkpoint, f32(8 * CONTEXT_TOKENS), tmp_path / "long", progress=lambda _: None
    )
    planned = [
        forward.planned_bytes
        for path in (float_path, tmp_path / "long" / entry)
        if (forward := program.read(path).method("forward"))
    ]
    assert planned[1] < 8.1 * planned[0]
    cache = memory.cache_bytes(checkpoint.spec, context_tokens=8 * CONTEXT_TOKENS)
    between = memory.planned_bytes(
        checkpoint.spec, context_tokens=8 * CONTEXT_TOKENS, call_tokens=8 * CONTEXT_TOKENS
    )
    assert planned[1] == pytest.approx(cache + between, rel=0.2)


# Damage


@pytest.mark.parametrize("field", range(8))
def test_a_program_without_one_of_its_lists_is_read_or_refused(float_path, tmp_path, field):
    content = bytearray(float_path.read_bytes())
    (root,) = struct.unpack_from("<I", content)
    (back,) = struct.unpack_from("<i", content, root)
    struct.pack_into("<H", content, root - back + 4 + 2 * field, 0)  # of the vtable: it is absent
    path = tmp_path / "model.pte"
    path.write_bytes(content)
    needed = {
        1: "no delegate", 4: "no segments", 5: "a table is missing", 7: "takes None bytes",
    }  # fmt: skip
    if field not in needed:
        assert running.contents(path) == running.contents(float_path)
        return
    with pytest.raises(BundleError, match=needed[field]):
        running.contents(path)


@pytest.mark.parametrize("made", ["float_path", "all_four_bit_path"])
def test_contents_of_a_bent_file_are_read_or_refused(request, tmp_path, made):
    whole = request.getfixturevalue(made)
    path, content = tmp_path / "model.pte", whole.read_bytes()
    found = program.read(whole)
    starts = [(40, min(first for first, _ in found.segments))]
    starts += [(first, first + size) for first, size in found.segments if size < 10_000]
    random, refused = np.random.default_rng(11), 0
    for _ in range(600):
        position = int(random.integers(*starts[random.integers(len(starts))]))
        bent = bytearray(content)
        bent[position] ^= 1 << int(random.integers(8))
        path.write_bytes(bent)
        try:
            running.contents(path)
        except BundleError:
            refused += 1
    assert refused > 10
