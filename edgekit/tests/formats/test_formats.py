"""The contract of a format. A new package in ``formats`` is a new case of every test here."""

import inspect
import json
import sys
from dataclasses import replace
from importlib import metadata
from itertools import pairwise

import pytest
from click.testing import CliRunner

from edgekit import formats
from edgekit.cli import cli
from edgekit.doctor import _tiny_checkpoint
from edgekit.errors import BundleError, UsageError
from edgekit.formats import BuildRequest, ContextLimit, Format, MemoryUse, Running, Writing
from edgekit.installed import extras
from edgekit.model.mixers import Attention
from edgekit.model.norm import Norm
from edgekit.model.rope import Rope
from edgekit.model.spec import DecoderSpec, Layer
from edgekit.plan import Choice
from edgekit.plan import make as make_plan
from edgekit.proof.interpreter import InterpreterSession
from edgekit.target import load as load_target


FORMATS = formats.names()
PLAIN = DecoderSpec(  # nothing that a recipe treats apart, and rows that fill every block
    vocab_size=257,
    hidden_size=256,
    intermediate_size=512,
    context_tokens=512,
    layers=(Layer(rope=Rope(width=64, theta=10_000.0)),) * 8,
    attention=Attention(heads=4, num_kv_heads=4, head_dim=64, softmax_scale=0.125),
    norm=Norm(kind="rms", epsilon=1e-5),
)


PROTOCOLS = (Format, Writing, Running)


class Whole:
    """The three modules of a format, as one thing to look at."""

    def __init__(self, name):
        self.name = name
        self.parts = formats.get(name), formats.writing(name), formats.running(name)

    def __getattr__(self, name):
        face, *sides = self.parts
        for part in [face] if name.isupper() else sides:
            if hasattr(part, name):
                return getattr(part, name)
        raise AttributeError(name)

    @property
    def exact(self):
        """What its most faithful recipe is."""
        return asked(next(iter(self.RECIPES.values())))


def asked(recipe):
    return BuildRequest(recipe=recipe)


def methods(protocol):
    return {
        name: member
        for name, member in vars(protocol).items()
        if inspect.isfunction(member) and not name.startswith("_")
    }


def constants(protocol):
    return {name for name in getattr(protocol, "__annotations__", {}) if name.isupper()}


def parameters_of(function):
    return [p for p in inspect.signature(function).parameters.values() if p.name != "self"]


def broken_promises(fmt):
    """Yield what each module of a format lacks, or offers otherwise than its protocol says."""
    for protocol, module in zip(PROTOCOLS, fmt.parts, strict=True):
        yield from broken_by(module, protocol)


def broken_by(module, protocol):
    for name in constants(protocol):
        if not hasattr(module, name):
            yield f"no {name}"
    for name, promised in methods(protocol).items():
        if not callable(getattr(module, name, None)):
            yield f"no {name}"
            continue
        offered = parameters_of(getattr(module, name))
        by_name = {parameter.name: parameter for parameter in offered}
        for parameter in parameters_of(promised):
            found = by_name.pop(parameter.name, None)
            if found is None or (found.kind, found.default) != (parameter.kind, parameter.default):
                yield f"{name} has {found}, promised {parameter}"
        for left in by_name.values():
            if left.default is left.empty:
                yield f"{name} asks for {left.name}"


@pytest.fixture(params=FORMATS)
def fmt(request):
    return Whole(request.param)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return a checkpoint of two layers whose weights need no file."""
    return _tiny_checkpoint(tmp_path_factory.mktemp("text"))


@pytest.fixture
def plain(tiny):
    """Return the headers of one whose layers are all alike."""
    return replace(tiny, spec=PLAIN)


def needs_runtime(name):
    """Skip where a package that runs the format is not installed."""
    for package in extras()[formats.get(name).RUN_EXTRA]:
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            pytest.skip(f"{package} is not installed")


def convert(fmt, checkpoint, request, directory):
    directory.mkdir()
    return directory / fmt.convert(checkpoint, request, directory, progress=lambda _: None)


def open_session(fmt, path, spec):
    """Open an artifact in its runtime, or where none is here, its weights in the reference."""
    if fmt.is_run_here(None):
        return fmt.load(path, context_tokens=32, threads=1)
    return InterpreterSession(fmt.read_back(path, spec), context_tokens=32)


# What is offered


def test_there_is_one_at_least():
    assert "gguf" in FORMATS
    assert [name for name, _ in formats.get_all()] == FORMATS


def test_an_unknown_name_is_refused_with_those_that_are_known():
    with pytest.raises(UsageError, match="no format named 'ggml'") as refusal:
        formats.get("ggml")
    assert "gguf" in refusal.value.hint


def test_a_format_offers_what_the_protocol_promises(fmt):
    assert list(broken_promises(fmt)) == []


def test_files_tell_their_format_by_the_end_of_their_name(fmt, tmp_path):
    name = formats.of_file(tmp_path / f"model{fmt.ENDING}")
    assert name is not None
    assert name == fmt.name
    assert formats.of_file(tmp_path / "model.bin") is None


def test_what_no_program_here_can_start_can_be_read_back(fmt):
    assert hasattr(fmt, "read_back") or all(map(fmt.is_run_here, fmt.VARIANTS or (None,)))


def test_the_extras_exist(fmt):
    extras = set(metadata.metadata("edgekit").get_all("Provides-Extra") or [])
    assert {fmt.EXTRA, fmt.RUN_EXTRA} <= extras


def test_storages_know_what_they_cost(fmt):
    assert len(fmt.TENSOR_TYPES) > 1
    for name, tensor_type in fmt.TENSOR_TYPES.items():
        assert tensor_type.name == name
        assert tensor_type.block_weights >= 1
        assert 0 < tensor_type.bits_per_weight <= 32


def test_recipes_name_only_storages_that_exist_and_say_how_much_they_may_lose(fmt):
    assert fmt.RECIPES
    for name, recipe in fmt.RECIPES.items():
        assert recipe.name == name
        assert {
            recipe.default,
            *(rule.tensor_type for rule in recipe.rules),
        } <= fmt.TENSOR_TYPES.keys()
        assert recipe.max_mean_kl_nats > 0
        assert 0 < recipe.min_same_top_token <= 1


def test_the_first_of_the_usual_recipes_may_lose_least_and_the_last_most(fmt):
    recipes = [fmt.RECIPES[name] for name in fmt.DEFAULT_RECIPES]
    limits = [recipe.max_mean_kl_nats for recipe in recipes]
    assert (limits[0], limits[-1]) == (min(limits), max(limits))
    shares = [recipe.min_same_top_token for recipe in recipes]
    assert (shares[0], shares[-1]) == (max(shares), min(shares))


def test_the_usual_recipes_are_recipes_none_larger_than_the_one_before(fmt, plain):
    assert set(fmt.DEFAULT_RECIPES) <= fmt.RECIPES.keys()
    layouts = [fmt.lay_out(plain, asked(fmt.RECIPES[name])) for name in fmt.DEFAULT_RECIPES]
    sizes = [sum(placement.size_bytes for placement in it.placements) for it in layouts]
    assert all(larger >= smaller for larger, smaller in pairwise(sizes)), sizes
    assert sizes[0] > sizes[-1]


def test_a_layout_places_every_weight_once_and_in_a_storage_of_the_format(fmt, plain):
    assert len(fmt.RECIPES) > 1
    for recipe in fmt.RECIPES.values():
        layout = fmt.lay_out(plain, asked(recipe))
        assert {p.role for p in layout.placements} == {role for role, _ in PLAIN.weights()}
        assert sum(p.parameters for p in layout.placements) == plain.parameters
        assert {p.tensor_type for p in layout.placements} <= fmt.TENSOR_TYPES.keys()
        assert layout.substituted == ()  # all rows fill their blocks
        assert 0 < layout.artifact_bytes - sum(p.size_bytes for p in layout.placements) < 110_000


def test_a_substitution_is_told(fmt, tiny):
    """The tiny model's rows of 64 are not a multiple of 256."""
    assert fmt.RECIPES
    for recipe in fmt.RECIPES.values():
        layout = fmt.lay_out(tiny, asked(recipe))
        assert len(layout.placements) == len(dict(tiny.spec.weights()))
        for placement in layout.placements:
            tensor_type = fmt.TENSOR_TYPES[placement.wanted]
            rows_fill = tensor_type.pads_rows or 64 % tensor_type.block_weights == 0
            assert rows_fill or placement in layout.substituted


def test_a_context_limit_is_within_the_model_and_has_a_reason(fmt, plain):
    limit = fmt.context_limit(plain)
    assert isinstance(limit, ContextLimit)
    assert 0 < limit.tokens <= PLAIN.context_tokens
    assert limit.reason


def test_memory_grows_with_the_context_and_with_the_weights(fmt, plain):
    def use(recipe, context_tokens):
        layout = fmt.lay_out(plain, asked(fmt.RECIPES[recipe]))
        return fmt.memory_use(plain, layout, context_tokens=context_tokens, by_app=False)

    large, small = fmt.DEFAULT_RECIPES[0], fmt.DEFAULT_RECIPES[-1]
    found = use(small, 512)
    assert isinstance(found, MemoryUse)
    assert min(found.weights_bytes, found.cache_bytes, found.compute_bytes) > 0
    assert use(large, 512).peak_bytes > found.peak_bytes
    assert use(small, 4096).cache_bytes == 8 * found.cache_bytes
    assert use(small, 4096).weights_bytes == found.weights_bytes


def test_a_file_that_is_no_artifact_is_refused_as_a_damaged_bundle(fmt, tmp_path):
    path = tmp_path / "garbage"
    path.write_bytes(b"not a model" * 10)
    with pytest.raises(BundleError):
        fmt.contents(path)


# What is converted


@pytest.mark.toolchain
@pytest.mark.parametrize(
    ("name", "recipe"), [(name, recipe) for name in FORMATS for recipe in formats.get(name).RECIPES]
)
def test_what_it_converts_is_as_large_as_predicted_and_runs(name, recipe, tiny, tmp_path):
    fmt, recipe = Whole(name), formats.get(name).RECIPES[recipe]
    needs_runtime(fmt.name)
    layout = fmt.lay_out(tiny, asked(recipe))
    path = convert(fmt, tiny, asked(recipe), tmp_path / "artifact")
    size = sum(file.stat().st_size for file in fmt.files(path))
    if layout.is_exact:
        assert size == layout.artifact_bytes
    assert size == pytest.approx(layout.artifact_bytes, rel=0.1)
    stored = sorted(tensor_type for _, shape, tensor_type in fmt.contents(path) if len(shape) > 1)
    matrices = [p for p in layout.placements if not p.role.endswith(("norm", "bias"))]
    assert stored == sorted(placement.tensor_type for placement in matrices)
    session = open_session(fmt, path, tiny.spec)
    try:
        assert session.vocabulary_tokens == tiny.spec.vocab_size
        assert session.context_tokens == 32
        prompt = session.prefill([1, 2, 3]).copy()
        assert prompt.shape == (tiny.spec.vocab_size,)
        assert abs(prompt).max() > 0
        session.decode(int(prompt.argmax()))
        rows = session.all_logits([1, 2, 3])
        assert rows.shape == (3, tiny.spec.vocab_size)
        assert abs(rows[-1] - prompt).max() < 0.02 * abs(prompt).max()
        with pytest.raises(UsageError):
            session.all_logits([1] * 33)
    finally:
        session.close()


@pytest.mark.toolchain
@pytest.mark.parametrize("position", [0, -1])
def test_converting_twice_gives_the_same_bytes(fmt, position, tiny, tmp_path):
    needs_runtime(fmt.name)
    recipe = fmt.RECIPES[fmt.DEFAULT_RECIPES[position]]
    written = []
    for name in ("first", "second"):
        path = convert(fmt, tiny, asked(recipe), tmp_path / name)
        written.append({file.name: file.read_bytes() for file in path.parent.iterdir()})
    assert written[0] == written[1]


@pytest.mark.toolchain
def test_the_runtime_reads_text_as_the_tokenizer_does_or_has_no_tokenizer(fmt, tiny, tmp_path):
    needs_runtime(fmt.name)
    from tokenizers import Tokenizer

    path = convert(fmt, tiny, fmt.exact, tmp_path / "artifact")
    texts = ["", "Low tide at 5:47.", "<|end|>", "조수 🌊", " a\n\n b"]
    found = fmt.runtime_ids(path, texts)
    if found is not None:
        tokenizer = Tokenizer.from_file(str(tiny.text.tokenizer_json))
        assert found == [tokenizer.encode(text).ids for text in texts]


@pytest.mark.toolchain
def test_progress_counts_every_weight(fmt, tiny, tmp_path):
    needs_runtime(fmt.name)
    done: list[int] = []
    (tmp_path / "artifact").mkdir()
    fmt.convert(tiny, fmt.exact, tmp_path / "artifact", progress=done.append)
    assert sum(done) == tiny.parameters


# A newcomer


ECHO = {
    "__init__": '''
"""A pretended format whose model says what it heard."""

from edgekit.quant.recipe import Recipe, TensorType

TENSOR_TYPES = {"word": TensorType(name="word", block_weights=1, block_bytes=2)}
RECIPES = {
    "loud": Recipe(name="loud", default="word", max_mean_kl_nats=1.0, min_same_top_token=0.5)
}
DEFAULT_RECIPES = ("loud",)
MIXES_TENSOR_TYPES = False
EXTRA = RUN_EXTRA = "demo"
RUNTIME = "an echo"
ENDING = ".echo"
VARIANTS = ()
COMPILES = ""
''',
    "writing": """
import json

from edgekit.errors import UsageError
from edgekit.formats import ContextLimit, Layout, MemoryUse
from edgekit.quant.planned import PlannedWeight


def lay_out(checkpoint, request):
    if request.split_bytes is not None:
        raise UsageError("an echo is never split")
    placements = tuple(
        PlannedWeight(
            role=role, shape=shape, tensor_type="word", wanted=request.recipe.default,
            size_bytes=2 * shape[0] * (shape[1] if shape[1:] else 1), is_coarse=False,
        )
        for role, shape in checkpoint.spec.weights()
    )
    return Layout(placements=placements, artifact_bytes=2 * checkpoint.parameters, is_exact=False)


def context_limit(checkpoint, *, compiles=False):
    return ContextLimit(tokens=64, reason="an echo fades")


def memory_use(checkpoint, layout, *, context_tokens, by_app):
    return MemoryUse(
        weights_bytes=layout.artifact_bytes, cache_bytes=context_tokens, compute_bytes=1,
        runtime_bytes=1,
    )


def convert(checkpoint, request, directory, *, progress):
    (directory / "model.echo").write_text(json.dumps({"vocabulary": checkpoint.spec.vocab_size}))
    progress(checkpoint.parameters)
    return "model.echo"
""",
    "running": """
import json

from edgekit.errors import BundleError


class EchoSession:
    def __init__(self, path, context_tokens):
        self.vocabulary_tokens = read(path)["vocabulary"]
        self.context_tokens = context_tokens

    def row(self, token):
        return [float(id == token) for id in range(self.vocabulary_tokens)]

    def prefill(self, ids):
        return self.row(ids[-1])

    def decode(self, token):
        return self.row(token)

    def all_logits(self, ids):
        return [self.row(token) for token in ids]

    def rewind(self, tokens):
        return True

    def reset(self):
        pass

    def close(self):
        pass


def read(path):
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise BundleError(f"{path} is not an echo: {error}") from error


def is_run_here(variant):
    return True


def load(path, *, context_tokens, threads=None, has_exact_cache=False):
    return EchoSession(path, context_tokens)


def runtime_ids(path, texts):
    return None


def own_template(path):
    return None


def runtime_state():
    return "an echo, anywhere"


def files(path):
    return [path]


def contents(path):
    return [("vocabulary", (read(path)["vocabulary"],), "word")]
""",
}


@pytest.fixture
def echo(tmp_path, monkeypatch):
    """Put a new package next to the formats, as somebody who adds one would."""
    package = tmp_path / "formats" / "echo"
    package.mkdir(parents=True)
    for name, text in ECHO.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(tmp_path / "formats")])
    yield "echo"
    for name in ("", ".writing", ".running"):
        sys.modules.pop(f"edgekit.formats.echo{name}", None)
    vars(formats).pop("echo", None)


def test_a_new_package_is_a_format_without_an_edit_elsewhere(echo, tiny, tmp_path):
    assert formats.names() == sorted([*FORMATS, echo])
    fmt = Whole(echo)
    assert list(broken_promises(fmt)) == []
    path = convert(fmt, tiny, fmt.exact, tmp_path / "artifact")
    session = fmt.load(path, context_tokens=8)
    assert session.prefill([1, 2, 3])[3] == 1


def test_the_command_lists_it(echo):
    printed = CliRunner().invoke(cli, ["formats"]).stdout
    assert "echo        loud" in printed.splitlines()
    assert json.loads(CliRunner().invoke(cli, ["formats", "--json"]).stdout)["echo"] == {
        "loud": "word"
    }


def test_a_plan_can_choose_it(echo, tiny):
    target = load_target("raspberry-pi-5-8gb")
    made = make_plan(tiny, target, Choice(format=echo))
    assert (made.format, made.recipe.name, made.context_tokens) == ("echo", "loud", 64)
    assert any("an echo fades" in note for note in made.notes)
    preferring = replace(target, formats=(echo, *target.formats))
    assert make_plan(tiny, preferring).format == "echo"


def test_one_that_breaks_the_contract_is_found_out(echo, tmp_path):
    package = tmp_path / "formats" / "echo"
    text = (package / "running.py").read_text().replace("def runtime_ids", "def _runtime_ids")
    (package / "running.py").write_text(text.replace("threads=None", "cores=4"))
    face = (package / "__init__.py").read_text()
    (package / "__init__.py").write_text(face.replace("EXTRA = RUN", "RUN"))
    assert sorted(broken_promises(Whole(echo))) == [
        "load has None, promised threads: int | None = None",
        "no EXTRA",
        "no runtime_ids",
    ]
