"""Programs for Core ML: nothing here runs them, so coremltools and numpy read what was written."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from edgekit import formats
from edgekit.errors import BundleError, UsageError
from edgekit.formats import BuildRequest
from edgekit.formats.executorch import conversion, program, running, tensor_types, writing
from edgekit.formats.executorch.backends.coreml import decoder, mil, reading
from edgekit.plan import estimate
from edgekit.proof import interpreter, transformers_logits
from edgekit.proof.fidelity import Comparison
from edgekit.runtime.silence import silence
from edgekit.source import opening
from edgekit.source.checkpoint import Checkpoint
from edgekit.target import load as load_target
from edgekit.tests.needs import needs
from edgekit.tests.tiny.checkpoints import WINDOW_TOKENS, write_tiny_checkpoint
from edgekit.tests.tiny.executorch_artifacts import ALIKE_KINDS
from edgekit.tests.witnesses.coreml_interpreter import Interpreter


np = pytest.importorskip("numpy")

pytestmark = [
    pytest.mark.toolchain,
    needs("torch", "transformers", "executorch"),
    # What torch, ExecuTorch and coremltools say about their own insides.
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]

TEXT_TOKENS, CONTEXT_TOKENS = 72, 96
FLIPS = 200
executorch = formats.get("executorch")


@pytest.fixture(scope="module", autouse=True)
def coremltools():
    with silence():
        return pytest.importorskip("coremltools", reason="pip install coremltools")


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A tiny checkpoint, and the program made of it."""

    checkpoint: Checkpoint
    directory: Path
    recipe: str

    @property
    def path(self) -> Path:
        return self.directory / "model.pte"

    @property
    def package(self) -> Path:
        return self.unpacked() / "model.mlpackage"

    def unpacked(self) -> Path:
        """Return the directory that a device makes of the program, by ExecuTorch's own code."""
        from executorch.backends.apple.coreml import executorchcoreml

        out = self.directory / "unpacked"
        if not out.exists():
            out.mkdir()
            executorchcoreml.unflatten_directory_contents(self.payload(), str(out))
        (made,) = out.iterdir()
        return made

    def payload(self) -> bytes:
        _, (first, size) = program.read(self.path).segments
        return self.path.read_bytes()[first : first + size]

    def interpreter(self, *, rounds: bool) -> Interpreter:
        with silence():
            return Interpreter(self.package, rounds=rounds)


def convert(checkpoint: Checkpoint, directory: Path, recipe: str, context: int) -> Converted:
    directory.mkdir()
    conversion.convert(
        checkpoint,
        BuildRequest(recipe=tensor_types.RECIPES[recipe], context_tokens=context, variant="coreml"),
        directory,
        progress=lambda _: None,
    )
    return Converted(checkpoint=checkpoint, directory=directory, recipe=recipe)


def converted(home: Path, kind: str, recipe: str = "F16", *, seed: int = 0) -> Converted:
    """Convert a checkpoint of float16, so that F16 loses nothing of it."""
    import torch

    path = write_tiny_checkpoint(home / "model", kind, seed=seed, dtype=torch.float16)
    checkpoint = opening.open_checkpoint(path)
    context = min(
        CONTEXT_TOKENS, checkpoint.spec.original_max_position_embeddings or CONTEXT_TOKENS
    )
    return convert(checkpoint, home / "artifact", recipe, context)


@pytest.fixture(scope="module", params=ALIKE_KINDS)
def of_each_kind(request, tmp_path_factory) -> Converted:
    return converted(tmp_path_factory.mktemp("coreml"), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Converted:
    return converted(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module", params=["8da8w", "8da4w", "8da4w_g64", "8da4w_all"])
def rounded(request, tmp_path_factory) -> Converted:
    return converted(tmp_path_factory.mktemp("rounded"), "gemma2", request.param)


def a_text(checkpoint: Checkpoint) -> list[int]:
    border = checkpoint.spec.original_max_position_embeddings or TEXT_TOKENS
    length = min(TEXT_TOKENS, border)
    assert length > 2 * WINDOW_TOKENS
    ids = np.random.default_rng(7).integers(0, checkpoint.spec.vocab_size, length)
    return [int(id) for id in ids]


def agreement(expected, interpreter: Interpreter, ids: list[int]):
    said = [interpreter.read(token, at) for at, token in enumerate(ids)]
    comparison = Comparison()
    comparison.add(expected, np.stack(said).astype(np.float32), np.array(ids))
    return comparison.result()


@pytest.fixture(scope="module")
def expected_of_each_kind(of_each_kind):
    (expected,) = transformers_logits.logits(
        of_each_kind.checkpoint, [a_text(of_each_kind.checkpoint)]
    )
    return expected


def test_the_program_says_what_transformers_says(of_each_kind, expected_of_each_kind):
    ids = a_text(of_each_kind.checkpoint)
    found = agreement(expected_of_each_kind, of_each_kind.interpreter(rounds=False), ids)
    assert found.mean_kl_nats <= 1e-10
    assert found.same_top_token == 1


def test_float16_changes_little(of_each_kind, expected_of_each_kind):
    ids = a_text(of_each_kind.checkpoint)
    found = agreement(expected_of_each_kind, of_each_kind.interpreter(rounds=True), ids)
    assert 0 < found.mean_kl_nats <= 1e-4
    assert found.same_top_token >= 0.97


def test_the_file_holds_every_weight_as_planned(of_each_kind):
    spec = of_each_kind.checkpoint.spec
    layout = writing.lay_out(
        of_each_kind.checkpoint, BuildRequest(recipe=tensor_types.RECIPES["F16"], variant="coreml")
    )
    shapes = dict(spec.weights())
    held = running.contents(of_each_kind.path)
    assert sorted(held) == sorted(
        (it.role, shapes[it.role], it.tensor_type) for it in layout.placements
    )


def test_the_size_is_predicted_within_one_percent(of_each_kind):
    layout = writing.lay_out(
        of_each_kind.checkpoint, BuildRequest(recipe=tensor_types.RECIPES["F16"], variant="coreml")
    )
    assert of_each_kind.path.stat().st_size == pytest.approx(layout.artifact_bytes, rel=0.01)
    assert layout.is_half


def test_weights_come_back_as_they_were(of_each_kind):
    checkpoint = of_each_kind.checkpoint
    read = reading.read_back(of_each_kind.path, checkpoint.spec)
    for role, _ in checkpoint.spec.weights():
        found = read.weight(role)
        expected = checkpoint.weight(role) + np.float32(checkpoint.spec.unit_offset(role))
        if "xielu" in role:  # programs hold what a softplus makes of it
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
        else:
            np.testing.assert_array_equal(found, expected)


def test_all_is_in_one_delegate_but_the_writing_of_the_cache(of_each_kind):
    report = json.loads((of_each_kind.directory / conversion.COVERAGE).read_text())
    method = program.read(of_each_kind.path).method("forward")
    assert method is not None
    assert method.backends == ("CoreMLBackend",)
    assert method.operators == ("aten::index_put_",)
    depth = len(of_each_kind.checkpoint.spec.layers)
    assert report["operator_calls_outside"] == {"aten::index_put_": 2 * depth}


def outputs(spec) -> Iterator[tuple[str, object]]:
    (function,) = spec.mlProgram.functions.values()
    (block,) = function.block_specializations.values()
    for operator in block.operations:
        for output in operator.outputs:
            yield output.name, output.type


@pytest.mark.filterwarnings("ignore")  # of a parser that nobody else calls
@pytest.mark.parametrize("kind", ["gemma3", "stablelm-12b", "phi4-mini", "apertus", "ministral3"])
def test_coremltools_infers_the_types_that_were_written(kind, tmp_path, coremltools):
    from coremltools.converters.mil.frontend.milproto import helper, load

    made = converted(tmp_path, kind, "8da4w_all")
    with silence():
        model = coremltools.models.MLModel(str(made.package), skip_model_load=True).get_spec()
        weights = made.package / "Data" / "com.apple.CoreML" / "weights"
        parsed = load.load(model, model.specificationVersion, str(weights))
        parsed.validate()
    inferred = {
        output.name: output.sym_type
        for operator in parsed.functions["main"].operations
        for output in operator.outputs
    }
    written_outputs = list(outputs(model))
    assert len(written_outputs) > 100
    for name, written in written_outputs:
        read = helper.proto_to_types(written)
        assert read.__type_info__() == inferred[name].__type_info__(), name


def test_codes_come_back_as_the_grid_chose_them(rounded):
    checkpoint = rounded.checkpoint
    read = reading.read_back(rounded.path, checkpoint.spec)
    for role, shape, stored in running.contents(rounded.path):
        if len(shape) > 1:
            parts = tensor_types.encode(checkpoint.weight(role), stored)
            chosen = tensor_types.decode([part.reshape(shape[0], -1) for part in parts], stored)
            # XNNPACK's scales are float32 or bfloat16, Core ML's float16.
            np.testing.assert_allclose(read.weight(role), chosen, rtol=2**-11)


def test_coremltools_reads_the_weights_that_are_read_back(rounded):
    read = reading.read_back(rounded.path, rounded.checkpoint.spec)
    constants = rounded.interpreter(rounds=False).constants
    for role, _ in rounded.checkpoint.spec.weights():
        held = constants[mil.identifier(role)]
        np.testing.assert_array_equal(held.astype(np.float32), read.weight(role))


def test_a_program_of_rounded_weights_says_what_the_reference_says_of_them(rounded):
    ids = a_text(rounded.checkpoint)
    read = reading.read_back(rounded.path, rounded.checkpoint.spec)
    (expected,) = interpreter.logits(read, [ids])
    found = agreement(expected, rounded.interpreter(rounds=False), ids)
    assert found.mean_kl_nats <= 1e-10


def test_some_rows_are_read_alone(rounded):
    read = reading.read_back(rounded.path, rounded.checkpoint.spec)
    for role in ("token_embedding", "layers.1.down", "layers.0.attention_norm"):
        np.testing.assert_array_equal(read.weight(role, 3, 5), read.weight(role)[3:8])


def test_positions_past_the_first_step_turn_as_transformers_turns_them(tmp_path):
    import torch

    path = write_tiny_checkpoint(
        tmp_path / "model", "mistral", dtype=torch.float16, max_position_embeddings=1024
    )
    checkpoint = opening.open_checkpoint(path)
    context = 2 * decoder.STEP + 20
    made = convert(checkpoint, tmp_path / "artifact", "F16", context)
    ids = np.random.default_rng(3).integers(0, checkpoint.spec.vocab_size, context).tolist()
    (expected,) = transformers_logits.logits(checkpoint, [ids])
    found = agreement(expected, made.interpreter(rounds=False), ids)
    assert found.mean_kl_nats <= 1e-10
    assert found.same_top_token == 1


def test_squares_beyond_float16_do_no_harm(tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    path = write_tiny_checkpoint(tmp_path / "model", "mistral", dtype=torch.float16)
    weights = load_file(path / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 3000
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = opening.open_checkpoint(path)
    assert not checkpoint.spec.is_tied
    made = convert(checkpoint, tmp_path / "artifact", "F16", CONTEXT_TOKENS)
    ids = a_text(checkpoint)
    (expected,) = transformers_logits.logits(checkpoint, [ids])
    found = agreement(expected, made.interpreter(rounds=True), ids)
    assert found.mean_kl_nats <= 1e-4


@pytest.mark.parametrize("kind", ["arcee", "apertus"])
def test_squares_of_an_mlp_beyond_float16_do_no_harm(kind, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    path = write_tiny_checkpoint(tmp_path / "model", kind, dtype=torch.float16)
    factors = {"layers.1.mlp.up_proj": 256, "layers.1.mlp.down_proj": 2**-12}
    for shard in path.glob("*.safetensors"):
        weights = load_file(shard)
        for name, factor in factors.items():
            if f"model.{name}.weight" in weights:
                weights[f"model.{name}.weight"] *= factor
        save_file(weights, shard, metadata={"format": "pt"})
    checkpoint = opening.open_checkpoint(path)
    made = convert(checkpoint, tmp_path / "artifact", "F16", CONTEXT_TOKENS)
    ids = a_text(checkpoint)
    (expected,) = transformers_logits.logits(checkpoint, [ids])
    found = agreement(expected, made.interpreter(rounds=True), ids)
    assert found.mean_kl_nats <= 1e-4


def test_two_exports_are_the_same_bytes(llama, tmp_path):
    again = convert(llama.checkpoint, tmp_path / "again", "F16", CONTEXT_TOKENS)
    assert again.path.read_bytes() == llama.path.read_bytes()


def test_a_program_is_named_after_its_content(llama, tmp_path):
    """A device keeps what it compiled under that name."""
    metadata = json.loads((llama.unpacked() / "metadata.json").read_text())
    other = converted(tmp_path, "llama", seed=1)
    other_name = json.loads((other.unpacked() / "metadata.json").read_text())["identifier"]
    assert metadata["identifier"].startswith("edgekit_")
    assert metadata["identifier"] != other_name
    assert metadata["inputNames"][:4] == ["tokens", "input_pos", "keys_0", "values_0"]
    assert metadata["outputNames"][:3] == ["logits", "new_keys_0", "new_values_0"]


def test_runners_read_prompts_token_by_token(llama):
    from executorch.extension.pybindings import portable_lib

    with silence():
        module = portable_lib._load_for_executorch(str(llama.path))
        assert module.run_method("enable_dynamic_shape") == [False]
        assert module.run_method("get_max_seq_len") == [CONTEXT_TOKENS]
        stops = module.run_method("get_eos_ids")
    assert stops == list(llama.checkpoint.text.declared_stop_ids)


def test_the_cache_is_empty_at_first_and_then_holds_each_token_at_its_place(llama):
    import torch
    from executorch.extension.pybindings import portable_lib

    from edgekit.formats.executorch import assembly
    from edgekit.formats.executorch.backends.coreml import wrapper

    class Counts(torch.nn.Module):  # type: ignore[misc]
        """Stands for Core ML: says what is in the first cache, and adds the token to all."""

        def forward(self, tokens, input_pos, *caches):
            new = tokens.to(torch.float16)[..., None].expand(caches[0][:, :1].shape)
            logits = caches[0].to(torch.float32).mean((0, 2))[None]
            return logits, *(new.clone() for _ in caches)

    made = wrapper.emit(
        llama.checkpoint.spec, Counts(), context_tokens=8, constants={"get_n_layers": 3}
    )
    head, base = assembly.head_of(made, 0)
    with silence():
        module = portable_lib._load_for_executorch_from_buffer(head.ljust(base, b"\0"))
        said = [
            module.forward((torch.tensor([[token]]), torch.tensor([at])))[0].tolist()[0]
            for at, token in enumerate([5, 7, 9, 11])
        ]
    assert said == [
        [0] * 8, [5, *[0] * 7], [5, 7, *[0] * 6], [5, 7, 9, *[0] * 5],
    ]  # fmt: skip


def test_a_program_is_refused_here_with_what_it_needs(llama):
    assert not running.is_run_here("coreml")
    with pytest.raises(UsageError, match=r"is for Core ML, .* iPhone or iPad with iOS 18"):
        running.load(llama.path, context_tokens=8)


def test_float32_is_refused(llama):
    with pytest.raises(UsageError, match="has no recipe F32") as refused:
        writing.lay_out(
            llama.checkpoint, BuildRequest(recipe=tensor_types.RECIPES["F32"], variant="coreml")
        )
    assert "F16" in (refused.value.hint or "")


def test_a_context_past_a_longrope_border_is_refused(tmp_path):
    path = write_tiny_checkpoint(tmp_path / "model", "phi3-longrope")
    checkpoint = opening.open_checkpoint(path)
    border = checkpoint.spec.original_max_position_embeddings
    assert border is not None
    with pytest.raises(UsageError, match=f"beyond {border} tokens") as refused:
        convert(checkpoint, tmp_path / "artifact", "F16", border + 1)
    assert refused.value.hint == f"pass --context {border} or less"


def test_a_scale_beyond_float16_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    path = write_tiny_checkpoint(tmp_path / "model", "llama")
    weights = load_file(path / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] *= 1e8
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match="too large for F16"):
        convert(opening.open_checkpoint(path), tmp_path / "artifact", "8da8w", CONTEXT_TOKENS)


def test_a_damaged_program_is_refused_or_read_as_before(llama, tmp_path):
    content, dice = llama.path.read_bytes(), random.Random(0)
    _, (first, _) = program.read(llama.path).segments
    path = tmp_path / "model.pte"
    model_bytes = len((llama.package / "Data" / "com.apple.CoreML" / "model.mlmodel").read_bytes())
    refused = 0
    for _ in range(FLIPS):
        damaged = bytearray(content)
        end = dice.choice([first, len(content)])  # the head, or the model and the list of files
        at = dice.randrange(end - min(end, model_bytes + 2048), end)
        damaged[at] ^= 1 << dice.randrange(8)
        path.write_bytes(damaged)
        try:
            running.contents(path)
        except BundleError:
            refused += 1
    assert refused > FLIPS // 20


def test_another_model_is_not_read_back(llama, tmp_path):
    other = opening.open_checkpoint(write_tiny_checkpoint(tmp_path / "other", "qwen3"))
    with pytest.raises(BundleError, match="holds another model"):
        reading.read_back(llama.path, other.spec)


def test_a_plan_counts_a_prompt_by_its_tokens_as_runners_read_it(tmp_path):
    checkpoint = opening.open_checkpoint(write_tiny_checkpoint(tmp_path / "llama", "llama"))
    target = load_target("iphone-8gb")

    def first_token_s(variant):
        layout = writing.lay_out(
            checkpoint, BuildRequest(recipe=tensor_types.RECIPES["F16"], variant=variant)
        )
        found = estimate(checkpoint, layout, target, format="executorch", context_tokens=256)
        return found.first_token_s[128].likely * found.decode_tokens_per_s.likely

    assert first_token_s("coreml") == pytest.approx(128 + 1)
    assert first_token_s("portable") < 10
