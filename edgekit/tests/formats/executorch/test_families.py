"""Every family as an ExecuTorch program: the module in torch, and what XNNPACK makes of it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from edgekit import formats
from edgekit.formats import BuildRequest
from edgekit.formats.executorch import (
    conversion,
    memory,
    planned,
    program,
    running,
    slopes,
    tensor_types,
    writing,
)
from edgekit.formats.executorch.backends import xnnpack
from edgekit.formats.executorch.backends.xnnpack import limits, size
from edgekit.formats.executorch.contents import SLICE
from edgekit.model.spec import DecoderSpec
from edgekit.proof import transformers_logits
from edgekit.proof.fidelity import Comparison, Fidelity
from edgekit.runtime import reading
from edgekit.source import opening
from edgekit.source.checkpoint import Checkpoint
from edgekit.tests.needs import needs
from edgekit.tests.tiny.checkpoints import (
    ORIGINAL_TOKENS,
    TINY,
    WINDOW_TOKENS,
    YARN,
    write_tiny_checkpoint,
)
from edgekit.tests.tiny.executorch_artifacts import KINDS


if TYPE_CHECKING:
    from edgekit.formats.executorch.backends.xnnpack.decoder import XnnpackDecoder

np = pytest.importorskip("numpy")


pytestmark = [
    pytest.mark.toolchain,
    needs("torch", "transformers", "executorch"),
    # What torch and ExecuTorch say about their own insides.
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]

MAX_KL_NATS = 1e-10
NETS_MAX_KL_NATS = 1e-9  # transformers differs as much from itself in float64
# Its scores are not divided by the root of a head's width, so what rounding leaves of them counts.
UNSCALED_MAX_KL_NATS = {"gemma4-31b": 1e-8}
MIN_POSITIONS = 300
SMALL = {"num_hidden_layers": 2}
HELD = [name for name, case in TINY.items() if "num_experts" not in case.fields]  # others: refused
executorch = formats.get("executorch")


@dataclass(frozen=True, kw_only=True)
class Step:
    """Some tokens read at once."""

    ids: tuple[int, ...]
    position: int  # of the first

    @property
    def last(self) -> int:
        return self.position + len(self.ids) - 1


def steps(ids: list[int]) -> Iterator[Step]:
    """Yield a prompt, single tokens past every window, a second prompt, and all the rest singly."""
    prompts = {0: 2 * WINDOW_TOKENS, 4 * WINDOW_TOKENS: 3 * WINDOW_TOKENS}
    at = 0
    while at < len(ids):
        count = prompts.get(at, 1)
        yield Step(ids=tuple(ids[at : at + count]), position=at)
        at += count


def max_kl_nats(spec: DecoderSpec) -> float:
    return NETS_MAX_KL_NATS if spec.has_delta_nets else MAX_KL_NATS


def texts(checkpoint: Checkpoint) -> list[list[int]]:
    random = np.random.default_rng(7)
    spec = checkpoint.spec
    return [random.integers(0, spec.vocab_size, spec.context_tokens).tolist() for _ in range(2)]


def expected_logits(checkpoint: Checkpoint, ids: list[int]):
    """Return what transformers says to each beginning of a text, in one row for each.

    Past the original context of a longrope every position of a beginning is rotated differently.
    """
    (rows,) = transformers_logits.logits(checkpoint, [ids])
    border = checkpoint.spec.original_max_position_embeddings
    if border is None or border >= len(ids):
        return rows
    (short,) = transformers_logits.logits(checkpoint, [ids[:border]])
    return np.concatenate((short, rows[border:]))


def agreement(expected, said, rows, ids) -> Fidelity:
    comparison = Comparison()
    comparison.add(expected[rows], np.stack(said), np.array(ids)[rows])
    return comparison.result()


def found_in(path: Path, checkpoint: Checkpoint, ids: list[int], context_tokens: int) -> Fidelity:
    """Read a text in steps, as apps do, and compare what is said with transformers."""
    session = running.load(path, context_tokens=context_tokens, threads=1)
    said, rows = [], []
    for step in steps(ids):
        several = len(step.ids) > 1
        logits = session.prefill(step.ids) if several else session.decode(step.ids[0])
        said.append(logits.copy())
        rows.append(step.last)
    session.close()
    return agreement(expected_logits(checkpoint, ids), said, rows, ids)


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A tiny checkpoint, and the program made of it."""

    checkpoint: Checkpoint
    path: Path
    max_kl_nats: float


@pytest.fixture(scope="module", params=KINDS)
def converted(request, tmp_path_factory) -> Converted:
    directory = tmp_path_factory.mktemp("executorch")
    checkpoint = opening.open_checkpoint(write_tiny_checkpoint(directory / "model", request.param))
    context = checkpoint.spec.context_tokens
    entry = conversion.convert(
        checkpoint,
        BuildRequest(
            recipe=tensor_types.RECIPES["F32"], context_tokens=context, variant=xnnpack.PORTABLE
        ),
        directory,
        progress=lambda _: None,
    )
    return Converted(
        checkpoint=checkpoint,
        path=directory / entry,
        max_kl_nats=UNSCALED_MAX_KL_NATS.get(request.param, MAX_KL_NATS),
    )


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_program_says_what_transformers_says(converted):
    checkpoint, positions = converted.checkpoint, 0
    for ids in texts(checkpoint):
        found = found_in(converted.path, checkpoint, ids, checkpoint.spec.context_tokens)
        assert found.mean_kl_nats <= converted.max_kl_nats
        assert found.same_top_token == 1
        positions += found.positions
    assert positions >= MIN_POSITIONS


def test_the_file_holds_every_weight_as_planned(converted):
    spec = converted.checkpoint.spec
    held = {name: (shape, kind) for name, shape, kind in running.contents(converted.path)}
    assert held == {role: (shape, "F32") for role, shape in planned.shapes(spec)}


def test_the_size_is_predicted_within_one_percent(converted):
    layout = writing.lay_out(converted.checkpoint, BuildRequest(recipe=tensor_types.RECIPES["F32"]))
    found = converted.path.stat().st_size
    assert found == pytest.approx(layout.artifact_bytes, rel=0.01)


def test_every_operator_is_counted_and_every_matrix_in_the_backend(converted):
    report = json.loads((converted.path.parent / conversion.COVERAGE).read_text())
    spec = converted.checkpoint.spec
    assert report["matrices_outside"] == []
    assert report["operators_in_backend"] == size.operators(
        spec, uses_llm_operators=False, is_rounded=False
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gemma2", "INT4_G32"), ("phi3", "INT4_G32"), ("odd-sizes", "INT8"),  # 72 fill no group
        ("phi", "INT4_G32"), ("gemma4", "INT4_G32"),
    ],
)  # fmt: skip
def test_four_bits_everywhere_say_nearly_what_transformers_says(name, words, tmp_path):
    checkpoint = opening.open_checkpoint(write_tiny_checkpoint(tmp_path / "model", name))
    ids, recipe = texts(checkpoint)[0][:64], tensor_types.RECIPES["8da4w_all"]
    entry = conversion.convert(
        checkpoint,
        BuildRequest(recipe=recipe, context_tokens=64, variant=xnnpack.PORTABLE),
        tmp_path,
        progress=lambda _: None,
    )
    held = {name: kind for name, _, kind in running.contents(tmp_path / entry)}
    layout = writing.lay_out(checkpoint, BuildRequest(recipe=recipe))
    assert held == {placement.role: placement.tensor_type for placement in layout.placements}
    assert held["token_embedding"] == words
    session = running.load(tmp_path / entry, context_tokens=64, threads=1)
    said, expected = session.all_logits(ids), expected_logits(checkpoint, ids)
    session.close()
    assert abs(said - expected).mean() < 0.6 * abs(expected).mean()


@pytest.fixture(scope="module")
def shared_caches(tmp_path_factory) -> Converted:
    """A Gemma 4 of four layers, the last two of which read what the first two keep."""
    directory = tmp_path_factory.mktemp("gemma4")
    path = write_tiny_checkpoint(
        directory / "model", "gemma4", num_hidden_layers=4, num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    checkpoint = opening.open_checkpoint(path)
    return Converted(
        checkpoint=checkpoint,
        path=for_phones(checkpoint, directory, context_tokens=checkpoint.spec.context_tokens),
        max_kl_nats=MAX_KL_NATS,
    )


def test_a_text_is_read_in_any_parts_after_another_by_layers_that_share_caches(shared_caches):
    checkpoint = shared_caches.checkpoint
    spec = checkpoint.spec
    session = running.load(shared_caches.path, context_tokens=spec.context_tokens, threads=1)
    parts = [[spec.context_tokens], [1, 7, 1, 8, 9, 63, 64, 65], [1] * spec.context_tokens]
    positions = 0
    for ids in texts(checkpoint):
        said, ends = [], []
        for counts in parts:
            session.reset()
            for end, count in zip(np.cumsum(counts), counts, strict=True):
                said.append(session.prefill(ids[end - count : end]).copy())
                ends.append(end)
        rows = np.array(ends) - 1
        found = agreement(expected_logits(checkpoint, ids), said, rows, ids)
        assert found.max_kl_nats <= 10 * MAX_KL_NATS
        assert found.same_top_token == 1
        positions += found.positions
    session.close()
    assert positions >= 2 * spec.context_tokens


def test_only_layers_with_caches_of_their_own_get_any(shared_caches):
    report = json.loads((shared_caches.path.parent / conversion.COVERAGE).read_text())
    calls = report["operator_calls_outside"]
    assert calls["llama::custom_sdpa.out"] == 2
    assert calls["llama::update_cache.out"] == 2  # keys and values of one layer
    assert calls["aten::index_put_"] == 2
    assert calls["aten::embedding.out"] == 1 + 4  # tokens, and a row for each layer


def test_what_a_program_sets_aside_is_planned_for(shared_caches):
    spec, context = shared_caches.checkpoint.spec, shared_caches.checkpoint.spec.context_tokens
    method = program.read(shared_caches.path).method("forward")
    assert method is not None
    caches = memory.cache_bytes(spec, context_tokens=context)
    widths = 2 * 2 * 16 + 2 * 2 * 32  # keys and values of two layers
    assert caches == 4 * widths * context
    planned_bytes = caches + memory.planned_bytes(spec, context_tokens=context, call_tokens=context)
    assert method.planned_bytes <= planned_bytes <= 1.3 * method.planned_bytes


def test_yarn_is_computed_past_its_original_context(tmp_path):
    path = write_tiny_checkpoint(tmp_path / "model", "llama", rope_parameters=YARN, **SMALL)
    checkpoint = opening.open_checkpoint(path)
    path = for_phones(checkpoint, tmp_path, context_tokens=3 * ORIGINAL_TOKENS)
    session = running.load(path, context_tokens=3 * ORIGINAL_TOKENS, threads=1)
    ids = texts(checkpoint)[0][: 3 * ORIGINAL_TOKENS]
    said = session.all_logits(ids)
    session.close()
    found = agreement(expected_logits(checkpoint, ids), list(said), range(len(ids)), ids)
    assert found.mean_kl_nats <= MAX_KL_NATS


# Attention by the operator of phones' runners, where it computes a layer's


def for_phones(checkpoint: Checkpoint, directory: Path, *, context_tokens: int) -> Path:
    request = BuildRequest(
        recipe=tensor_types.RECIPES["F32"], context_tokens=context_tokens, variant=xnnpack.LLM
    )
    return directory / conversion.convert(checkpoint, request, directory, progress=lambda _: None)


def layers_that_call_it(path: Path) -> int:
    report = json.loads((path.parent / conversion.COVERAGE).read_text())
    calls: int = report["operator_calls_outside"].get("llama::custom_sdpa.out", 0)
    return calls


@pytest.mark.parametrize(
    ("name", "layers_by_operator"),
    [
        ("gemma3", 1), ("gemma2", 0), ("qwen2-window", 1), ("ministral3", 3),
        ("gemma4-other-donors", 2),
    ],
)  # fmt: skip
def test_programs_for_phones_say_it_past_every_window(name, layers_by_operator, tmp_path):
    checkpoint = opening.open_checkpoint(write_tiny_checkpoint(tmp_path / "model", name))
    context = 6 * WINDOW_TOKENS
    path = for_phones(checkpoint, tmp_path, context_tokens=context)
    assert layers_that_call_it(path) == layers_by_operator
    layout = writing.lay_out(
        checkpoint,
        BuildRequest(
            recipe=tensor_types.RECIPES["F32"], context_tokens=context, variant=xnnpack.LLM
        ),
    )
    assert path.stat().st_size == pytest.approx(layout.artifact_bytes, rel=0.01)
    found = found_in(path, checkpoint, texts(checkpoint)[0][:context], context)
    assert found.mean_kl_nats <= MAX_KL_NATS
    assert found.same_top_token == 1


def test_a_window_that_no_text_outgrows_leaves_all_layers_to_the_operator(tmp_path):
    checkpoint = opening.open_checkpoint(write_tiny_checkpoint(tmp_path / "model", "gemma3"))
    path = for_phones(checkpoint, tmp_path, context_tokens=WINDOW_TOKENS)
    assert layers_that_call_it(path) == len(checkpoint.spec.layers)
    session = running.load(path, context_tokens=WINDOW_TOKENS, threads=1)
    ids = texts(checkpoint)[0][:WINDOW_TOKENS]
    said = session.all_logits(ids)
    session.close()
    found = agreement(expected_logits(checkpoint, ids), list(said), range(len(ids)), ids)
    assert found.mean_kl_nats <= MAX_KL_NATS


# The module by itself, before anything is lowered


def eager(checkpoint: Checkpoint) -> "XnnpackDecoder":
    import torch

    from edgekit.formats.executorch import embeddings
    from edgekit.formats.executorch.backends.xnnpack import decoder

    spec = checkpoint.spec

    def weight(key: str):
        role, _, first = key.partition(SLICE)
        values = np.concatenate([rows for _, rows in checkpoint.blocks(role)])
        if (
            first and spec.layer_embedding
        ):  # of what makes the embeddings of all layers, what makes one's
            values = values[int(first) :][: spec.layer_embedding.width]
        return torch.from_numpy(slopes.to_slopes(role, values))

    segments = []
    for index, shape in enumerate(decoder.segment_shapes(spec, uses_llm_operators=False)):
        roles = decoder.segment_roles(spec, index)
        weights = {name: weight(role) for name, role in roles.items()}
        segments.append(decoder.Segment(spec, shape, weights))
    return decoder.XnnpackDecoder(
        spec,
        tables={
            role: embeddings.FloatEmbedding(weight(role).reshape(shape))
            for role, shape in planned.shapes(spec)
            if role in planned.TABLES
        },
        segments=segments,
        context_tokens=spec.context_tokens,
    )


@pytest.mark.parametrize("name", HELD)
def test_the_module_says_what_transformers_says(name, tmp_path):
    import torch

    checkpoint = opening.open_checkpoint(write_tiny_checkpoint(tmp_path / "model", name))
    border = checkpoint.spec.original_max_position_embeddings or checkpoint.spec.context_tokens
    ids = texts(checkpoint)[0][:border]
    module, said, rows = eager(checkpoint), [], []
    with torch.inference_mode():
        longest = limits.call_tokens(checkpoint.spec, context_tokens=len(ids))
        for step in steps(ids):
            for first, part in reading.batches(step.ids, longest):
                positions = step.position + torch.arange(first, first + len(part))
                made = module(torch.tensor([part]), positions)[0].numpy()
                if first + len(part) == len(step.ids):
                    said.append(made)
            rows.append(step.last)
    found = agreement(expected_logits(checkpoint, ids), said, rows, ids)
    assert found.mean_kl_nats <= UNSCALED_MAX_KL_NATS.get(name, max_kl_nats(checkpoint.spec))
    assert found.same_top_token == 1
