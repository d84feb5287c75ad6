"""Artifacts in TVM's virtual machine: libraries compiled here compute what the decoder says.

The other side is torch on the weights that are read back; that it says what transformers says is
held in test_interpreter.py and, for these artifacts, by the gates.
"""

import shutil
from dataclasses import replace

import pytest

from edgekit.cache import cache_directory
from edgekit.doctor import _tiny_checkpoint
from edgekit.errors import BundleError, UsageError
from edgekit.formats import BuildRequest
from edgekit.formats.mlc import (
    artifact,
    chat_config,
    conversion,
    decoder_file,
    decoders,
    packing,
    reading,
    running,
    writing,
)
from edgekit.model.rope import Rope
from edgekit.model.spec import Layer
from edgekit.proof.interpreter import InterpreterSession
from edgekit.runtime.processors import usable_cores
from edgekit.tests.formats.mlc.test_weights import open_golden
from edgekit.tests.needs import needs


np = pytest.importorskip("numpy")
pytestmark = [
    pytest.mark.toolchain,
    needs("tvm", "torch", "tokenizers", "jinja2"),
    pytest.mark.skipif(not running.is_run_here(None), reason="no C++ compiler"),
]

CONTEXT_TOKENS = 64
IDS = [72, 11, 8, 8, 11, 22, 4, 9, 90, 3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43, 38, 32]
# Windows, norms on queries and keys, layer norms, biases, parallel blocks, MLPs without gates and
# delta nets:
# among these, everything in which the models that MLC has differ.
GOLDEN = [
    "gemma2_f32", "nemotron_f32", "olmo2_f32", "phi_f32", "qwen3_5_untied_f32", "qwen3_tied_f32",
]  # fmt: skip
SHORT, LONG = Rope(width=16, theta=10_000.0), Rope(width=8, theta=500_000.0)


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def quiet(_weights):
    """Take no notice of progress."""


def write_golden(name, scheme, directory):
    """Write the weights of a checkpoint that has no chat template, and what a session reads."""
    checkpoint = open_golden(name, directory / "checkpoint")
    out = directory / "out"
    out.mkdir()
    entry = conversion.write(checkpoint, packing.RECIPES[scheme], out, progress=quiet)
    tiny = _tiny_checkpoint(directory)
    config = chat_config.build(tiny, scheme, context_tokens=CONTEXT_TOKENS, conv_template={})
    config["model_type"] = decoders.model_type(checkpoint.architecture, checkpoint.spec)
    artifact._write_json(out / chat_config.NAME, config)
    decoder_file.write(out, checkpoint.spec)
    return out / entry, checkpoint.spec


def write_tiny(directory, scheme="q4f32_1", **changes):
    tiny = _tiny_checkpoint(directory)
    tiny = replace(tiny, spec=replace(tiny.spec, **changes))
    request = BuildRequest(recipe=packing.RECIPES[scheme], context_tokens=CONTEXT_TOKENS)
    return directory / writing.convert(tiny, request, directory, progress=quiet), tiny.spec


def assert_alike(path, spec, *, within):
    """Hold a session's logits, at once and token by token, against the weights that are stored."""
    read = InterpreterSession(reading.open_weights(path, spec), context_tokens=CONTEXT_TOKENS)
    ids = [id % spec.vocab_size for id in IDS]
    expected = read.all_logits(ids)
    assert expected.std() > 0.01
    session = running.load(path, context_tokens=CONTEXT_TOKENS)
    np.testing.assert_allclose(session.all_logits(ids), expected, rtol=0, atol=within)
    session.prefill(ids[:20])
    np.testing.assert_allclose(session.prefill(ids[20:]), expected[-1], rtol=0, atol=within)
    session.reset()
    for token, row in zip(ids, expected, strict=True):
        np.testing.assert_allclose(session.decode(token), row, rtol=0, atol=within)
    session.close()


@pytest.mark.parametrize("name", GOLDEN)
def test_a_decoder_of_every_kind_says_what_its_weights_say(tmp_path, name):
    path, spec = write_golden(name, "q4f32_1", tmp_path)
    assert_alike(path, spec, within=1e-4)


@pytest.mark.parametrize(
    "layers",
    [
        (Layer(rope=SHORT, window_tokens=16), Layer(rope=LONG)),
        (Layer(rope=None), Layer(rope=LONG, window_tokens=8)),
        (Layer(rope=SHORT, window_tokens=16), Layer(rope=SHORT, window_tokens=16)),
    ],
    ids=["two ropes", "no positions", "windows only"],
)
def test_layers_may_differ_in_ropes_and_windows(tmp_path, layers):
    path, spec = write_tiny(tmp_path)
    spec = replace(spec, layers=layers)
    decoder_file.write(path.parent, spec)  # the weights are the same
    assert_alike(path, spec, within=1e-4)


def test_queries_and_keys_may_be_normalized_after_their_rotation(tmp_path):
    path, spec = write_golden("qwen3_tied_f32", "q4f32_1", tmp_path)
    spec = replace(spec, attention=replace(spec.attention, normalizes_after_rope=True))
    decoder_file.write(path.parent, spec)
    assert_alike(path, spec, within=1e-4)


@pytest.mark.parametrize(
    ("scheme", "within"), [("q0f32", 1e-5), ("q4f16_0", 5e-3), ("q3f16_1", 5e-3)]
)
def test_weights_are_read_as_every_kind_of_scheme_stores_them(tmp_path, scheme, within):
    assert_alike(*write_tiny(tmp_path, scheme), within=within)


def test_a_delta_net_is_computed_in_float16_too(tmp_path):
    path, spec = write_golden("qwen3_5_tied_f32", "q4f16_0", tmp_path)
    assert_alike(path, spec, within=2e-2)


def test_a_second_fine_tune_of_a_shape_takes_the_library_of_the_first(tmp_path):
    def libraries():
        return sorted((cache_directory() / "mlc").iterdir())

    for name in ("first", "second", "wider"):
        (tmp_path / name).mkdir()
    path, spec = write_tiny(tmp_path / "first")
    running.load(path, context_tokens=CONTEXT_TOKENS).close()
    kept = libraries()
    assert kept
    path, _ = write_tiny(tmp_path / "second", context_tokens=spec.context_tokens // 2)
    running.load(path, context_tokens=32).close()
    assert libraries() == kept
    path, _ = write_tiny(tmp_path / "wider", norm=replace(spec.norm, epsilon=1e-3))
    running.load(path, context_tokens=32).close()
    assert len(libraries()) == len(kept) + 1


def test_a_decoder_that_is_not_the_weights_is_refused_before_it_is_run(tmp_path):
    path, spec = write_tiny(tmp_path)
    decoder_file.write(path.parent, replace(spec, hidden_size=128))
    with pytest.raises(BundleError, match="its library takes"):
        running.load(path, context_tokens=32)


def test_a_bundle_of_an_older_edgekit_is_named(tmp_path):
    path, _ = write_tiny(tmp_path)
    copy = tmp_path / "older"
    shutil.copytree(path.parent, copy, ignore=shutil.ignore_patterns(decoder_file.NAME, "older"))
    with pytest.raises(BundleError, match=decoder_file.NAME) as refusal:
        running.load(copy / path.name, context_tokens=32)
    assert "export it again" in refusal.value.hint


def test_threads_are_not_bound_to_a_core(tmp_path):
    cores = usable_cores()
    path, _ = write_tiny(tmp_path)
    running.load(path, context_tokens=32).close()
    assert usable_cores() == cores


def test_windows_of_several_lengths_are_refused(tmp_path):
    path, spec = write_tiny(tmp_path)
    windows = (Layer(rope=SHORT, window_tokens=8), Layer(rope=SHORT, window_tokens=16))
    decoder_file.write(path.parent, replace(spec, layers=windows))
    with pytest.raises(UsageError, match="one window for all layers, the decoder 2"):
        running.load(path, context_tokens=CONTEXT_TOKENS)
