"""Every family through an ONNX graph in ONNX Runtime, against transformers in float32."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from edgekit.errors import UsageError
from edgekit.formats import BuildRequest
from edgekit.formats.onnx import conversion, graph, model, tensor_types
from edgekit.formats.onnx.runtime import OnnxSession
from edgekit.model.checkpoint_protocol import Tensor
from edgekit.proof import transformers_logits
from edgekit.proof.fidelity import Comparison, Fidelity
from edgekit.source import opening
from edgekit.source.checkpoint import Checkpoint
from edgekit.tests.needs import needs
from edgekit.tests.tiny.checkpoints import TINY, YARN, write_tiny_checkpoint


pytestmark = [pytest.mark.toolchain, needs("torch", "onnxruntime")]
np = pytest.importorskip("numpy")

F32 = tensor_types.RECIPES["F32"]
MIN_POSITIONS = 500
MAX_KL_NATS = 1e-9
# Found: 3e-7 to 2e-5, and 6e-6 to 5e-3 where activations are rounded to 8 bits too, which random
# convolutions of seven taps make 1.5e-2.
MAX_HALF_KL_NATS = {"F16_GPU": 5e-5, "UINT4_GPU": 2e-2}
STRETCHED = ("phi3-longrope", "phi3.5-longrope", "phi4-mini")
LONGER = {"max_position_embeddings": 192}  # three times the context before it was stretched


@dataclass(frozen=True, kw_only=True)
class Made:
    """A checkpoint and the model made of it."""

    checkpoint: Checkpoint
    path: Path

    def open(self) -> OnnxSession:
        tokens = self.checkpoint.spec.context_tokens
        return OnnxSession(self.path, context_tokens=tokens, threads=1)

    def chunks(self, *, tokens: int | None = None, unseen: int = 0) -> Iterator[list[int]]:
        """Yield random texts, as long as can be, until there are enough positions.

        ``unseen`` is how many of each text are not compared.
        """
        spec, random, left = self.checkpoint.spec, np.random.default_rng(0), MIN_POSITIONS
        tokens = tokens or spec.context_tokens
        while left > 0:
            left -= tokens - unseen
            yield random.integers(0, spec.vocab_size, tokens).tolist()

    @property
    def unchanged_tokens(self) -> int:
        """How long a text may grow before what is cached of it would be computed otherwise."""
        borders = filter(
            None,
            (rope.original_max_position_embeddings for rope in graph.ropes(self.checkpoint.spec)),
        )
        return min(self.checkpoint.spec.context_tokens, *borders, 256)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def open_tiny(directory: Path, name: str, **fields: Any) -> Checkpoint:
    return opening.open_checkpoint(write_tiny_checkpoint(directory / "model", name, **fields))


def make(directory: Path, name: str, **fields: Any) -> Made:
    checkpoint = open_tiny(directory, name, **fields)
    entry = conversion.convert(
        checkpoint, BuildRequest(recipe=F32), directory, progress=lambda _: None
    )
    return Made(checkpoint=checkpoint, path=directory / entry)


@pytest.fixture(scope="module", params=TINY)
def made(request, tmp_path_factory):
    return make(tmp_path_factory.mktemp("onnx"), request.param)


def compare(expected, said, ids) -> Fidelity:
    comparison = Comparison()
    comparison.add(expected, np.stack(said), np.array(ids))
    return comparison.result()


def last_kl_nats(expected, said) -> float:
    """Return how far the logits after a text's last token are off."""
    return compare(expected[[-1, -1]], [said, said], [0, 0]).mean_kl_nats


def test_logits_are_those_of_transformers(made):
    chunks, comparison, session = list(made.chunks()), Comparison(), made.open()
    for ids, expected in zip(
        chunks, transformers_logits.logits(made.checkpoint, chunks), strict=True
    ):
        comparison.add(expected, session.all_logits(ids), np.array(ids))
    session.close()
    found = comparison.result()
    assert found.positions >= MIN_POSITIONS
    assert found.mean_kl_nats <= MAX_KL_NATS
    assert found.same_top_token == 1


def test_token_by_token_and_in_a_second_turn_too(made):
    # A prompt, an answer, another prompt, and an answer to the end; of a prompt one row is seen.
    chunks = list(made.chunks(tokens=made.unchanged_tokens, unseen=9 + 24))
    session, comparison = made.open(), Comparison()
    for ids, expected in zip(
        chunks, transformers_logits.logits(made.checkpoint, chunks), strict=True
    ):
        said = [session.prefill(ids[:10]).copy(), *decoded(session, ids[10:30])]
        said += [session.prefill(ids[30:55]).copy(), *decoded(session, ids[55:])]
        rows = [*range(9, 30), *range(54, len(ids))]
        comparison.add(expected[rows], np.stack(said), np.array(ids)[rows])
        session.reset()
    session.close()
    found = comparison.result()
    assert found.positions >= MIN_POSITIONS
    assert found.mean_kl_nats <= MAX_KL_NATS
    assert found.same_top_token == 1


def decoded(session, ids):
    return [session.decode(token).copy() for token in ids]


@pytest.mark.parametrize("recipe", ["F16_GPU", "UINT4_GPU"])
def test_half_precision_loses_no_more_than_its_digits(recipe, made, tmp_path):
    """Also where weights have four bits: held against the same weights in float32."""
    if made.checkpoint.spec.has_experts:
        with pytest.raises(UsageError, match="edgekit writes none in float16"):
            conversion.plan(made.checkpoint, BuildRequest(recipe=tensor_types.RECIPES[recipe]))
        return
    ids = next(made.chunks())
    chosen, single = tensor_types.RECIPES[recipe], {"F16_GPU": "F32", "UINT4_GPU": "UINT4"}[recipe]
    said = []
    for name in (chosen.name, single):
        directory = tmp_path / name
        directory.mkdir()
        entry = conversion.convert(
            made.checkpoint,
            BuildRequest(recipe=tensor_types.RECIPES[name]),
            directory,
            progress=lambda _: None,
        )
        tokens = made.checkpoint.spec.context_tokens
        session = OnnxSession(directory / entry, context_tokens=tokens, threads=1)
        said.append(session.all_logits(ids))
        session.close()
    assert np.isfinite(said[0]).all()
    assert compare(said[1], said[0], ids).mean_kl_nats <= MAX_HALF_KL_NATS[recipe]


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gemma4"])
def test_what_outgrows_float16_between_layers_is_kept_in_float32(name, tmp_path):
    """Gemma's sums over layers pass 65504; here they are made to."""
    checkpoint, scale = open_tiny(tmp_path, name), 2e5
    assert np.abs(checkpoint.weight("token_embedding")[:40]).max() * scale > 65504
    spec = replace(checkpoint.spec, embedding_scale=scale)
    checkpoint = replace(checkpoint, spec=spec)
    ids, said = list(range(40)), []
    for recipe in ("F32", "F16_GPU"):
        entry = conversion.convert(
            checkpoint,
            BuildRequest(recipe=tensor_types.RECIPES[recipe]),
            tmp_path,
            progress=lambda _: None,
        )
        session = OnnxSession(tmp_path / entry, context_tokens=40, threads=1)
        said.append(session.all_logits(ids))
        session.close()
    assert compare(said[0], said[1], ids).mean_kl_nats <= MAX_HALF_KL_NATS["F16_GPU"]


def test_the_files_are_as_planned(made):
    planned = conversion.lay_out(made.checkpoint, BuildRequest(recipe=F32))
    size = sum(file.stat().st_size for file in model.files(made.path))
    assert (planned.is_exact, planned.artifact_bytes) == (True, size)
    held = {name: (shape, kind) for name, shape, kind in tensor_types.contents(made.path)}
    for role, shape in made.checkpoint.spec.weights():
        assert held.pop(role) == (shape, "F32")
    assert all(name.startswith("rope.") for name in held)


def test_the_onnx_package_reads_what_was_written(made):
    onnx = pytest.importorskip("onnx")
    proto = onnx.load(str(made.path))
    assert proto.SerializeToString() != b""
    for weight in proto.graph.initializer:
        values = onnx.numpy_helper.to_array(weight)
        if weight.name == "layers.0.up":
            np.testing.assert_array_equal(values, made.checkpoint.weight("layers.0.up"))
            return
    pytest.fail("the matrix up of layer 0 is not there")


# Every tensor, once


@dataclass(frozen=True)
class Counted:
    """A tensor that notes which of its rows are read."""

    tensor: Tensor
    name: str
    seen: Counter[tuple[str, int]]

    @property
    def shape(self):
        return self.tensor.shape

    @property
    def size_bytes(self):
        return self.tensor.size_bytes

    def read(self, first_row=0, rows=None):
        found = self.tensor.read(first_row, rows)
        self.seen.update((self.name, row) for row in range(first_row, first_row + len(found)))
        return found


@pytest.mark.parametrize("name", TINY)
def test_every_row_of_every_tensor_is_read_once(name, tmp_path):
    checkpoint, seen = open_tiny(tmp_path, name), Counter[tuple[str, int]]()
    counted = {key: Counted(tensor, key, seen) for key, tensor in checkpoint.tensors.items()}
    watched = replace(checkpoint, tensors=counted)
    conversion.convert(
        watched,
        BuildRequest(recipe=tensor_types.RECIPES["UINT4"]),
        tmp_path,
        progress=lambda _: None,
    )
    expected = {
        (key, row) for key, tensor in checkpoint.tensors.items() for row in range(tensor.shape[0])
    }
    assert set(seen) == expected
    assert set(seen.values()) == {1}


# Longrope


@pytest.mark.parametrize("name", STRETCHED)
@pytest.mark.parametrize("steps", [[60, 1, 1, 1, 1, 1, 1, 1], [70, 1, 20], [30, 60, 1]])
def test_past_the_original_context_every_position_takes_the_long_factors(name, steps, tmp_path):
    """As in transformers' ``generate``, which reads the text again where it outgrows the border."""
    fields = {} if name == "phi3-longrope" else {"original_max_position_embeddings": 64}
    made = make(tmp_path, name, **fields | LONGER)
    ids, session, read = next(made.chunks()), made.open(), 0
    for step in steps:
        part = ids[read : read + step]
        said = session.decode(part[0]) if step == 1 else session.prefill(part)
        read += step
        (expected,) = transformers_logits.logits(made.checkpoint, [ids[:read]])
        assert last_kl_nats(expected, said) <= MAX_KL_NATS, read
    assert read > 64
    session.close()


@pytest.mark.parametrize("fields", [{}, {"truncate": False, "beta_fast": 8, "mscale": 0.7,
                                        "mscale_all_dim": 1.3}])  # fmt: skip
def test_yarn_is_computed_past_its_original_context(fields, tmp_path):
    made = make(tmp_path, "qwen3", rope_parameters=YARN | fields)
    ids = next(made.chunks())
    assert len(ids) > YARN["original_max_position_embeddings"]
    (expected,) = transformers_logits.logits(made.checkpoint, [ids])
    session = made.open()
    assert compare(expected, session.all_logits(ids), ids).mean_kl_nats <= MAX_KL_NATS
    session.close()


def test_queries_grow_at_every_multiple_of_a_length_that_no_number_of_digits_holds(tmp_path):
    """A seventh of the context: its inverse is rounded."""
    original = {"original_max_position_embeddings": 7, "llama_4_scaling_beta": 0.5}
    made = make(tmp_path, "ministral3", rope_parameters=YARN | original)
    growth = made.checkpoint.spec.attention.query_growth
    assert growth is not None
    assert growth.step_tokens == 7
    ids = next(made.chunks())
    (expected,) = transformers_logits.logits(made.checkpoint, [ids])
    session = made.open()
    assert compare(expected, session.all_logits(ids), ids).mean_kl_nats <= MAX_KL_NATS
    session.close()


def test_a_prompt_of_several_batches_takes_them_from_the_first_batch_on(tmp_path):
    made = make(tmp_path, "phi4-mini", original_max_position_embeddings=300)
    ids = next(made.chunks())
    assert len(ids) == 512
    (expected,) = transformers_logits.logits(made.checkpoint, [ids])
    session = made.open()
    assert last_kl_nats(expected, session.prefill(ids)) <= MAX_KL_NATS
    session.close()


def test_a_long_text_in_wide_windows_is_read_alike(tmp_path):
    made = make(tmp_path, "gemma2", max_position_embeddings=600, sliding_window=300)
    ids = next(made.chunks())
    (expected,) = transformers_logits.logits(made.checkpoint, [ids])
    session = made.open()
    assert compare(expected, session.all_logits(ids), ids).mean_kl_nats <= MAX_KL_NATS
    session.close()


# Files of a size


def test_the_weights_can_be_split_over_files_which_any_runtime_finds(tmp_path):
    checkpoint = open_tiny(tmp_path, "llama", hidden_size=512, intermediate_size=1024)
    expected_sizes = conversion.lay_out(checkpoint, BuildRequest(recipe=F32, split_bytes=3 * 2**20))
    entry = conversion.convert(
        checkpoint,
        BuildRequest(recipe=F32, split_bytes=3 * 2**20),
        tmp_path,
        progress=lambda _: None,
    )
    files = model.files(tmp_path / entry)
    sizes = [file.stat().st_size for file in files]
    assert [file.name for file in files[:3]] == [
        "model.onnx",
        "model.onnx_data",
        "model.onnx_data_1",
    ]
    assert max(sizes) <= 3 * 2**20
    assert sum(sizes) == expected_sizes.artifact_bytes
    ids = [3, 1, 4, 1, 5]
    session = OnnxSession(tmp_path / entry, context_tokens=32, threads=1)
    (expected,) = transformers_logits.logits(checkpoint, [ids])
    np.testing.assert_allclose(session.all_logits(ids), expected, rtol=0, atol=1e-3)
    session.close()
    with pytest.raises(UsageError, match=r"too small: .* alone takes"):
        conversion.lay_out(checkpoint, BuildRequest(recipe=F32, split_bytes=2**20 - 1))
