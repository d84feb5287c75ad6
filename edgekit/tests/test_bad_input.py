"""Damaged and hostile input through the whole export: one sentence, a status, nothing left."""

import json
import shutil
import struct
from dataclasses import replace

import pytest

from edgekit.cli import main
from edgekit.doctor import _RandomTensor, _tiny_checkpoint
from edgekit.errors import ToolchainError
from edgekit.formats import BuildRequest
from edgekit.formats.gguf import architectures, conversion, layout, pretokenizers
from edgekit.formats.gguf.tensor_types import RECIPES
from edgekit.proof import load_probe
from edgekit.source import families
from edgekit.source.opening import open_checkpoint
from edgekit.source.writer import write_checkpoint
from edgekit.text import template as template_limits


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return a model directory that exports, written without torch."""
    pytest.importorskip("numpy")
    pytest.importorskip("jinja2")
    pytest.importorskip("tokenizers")
    directory = tmp_path_factory.mktemp("whole")
    return write_checkpoint(_tiny_checkpoint(directory), directory / "model", precision="f32")


@pytest.fixture
def model(whole, tmp_path, monkeypatch):
    """Return a copy of it to damage."""
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    return shutil.copytree(whole, tmp_path / "model")


def refusal(model, capsys, *options, status=2):
    """Export, and return the one sentence it ends with."""
    out = model.parent / "outputs" / "bundle"
    command = ["export", str(model), "--target", "raspberry-pi-5-8gb", "-o", str(out), *options]
    with pytest.raises(SystemExit) as caught:
        main(command)
    said = capsys.readouterr()
    assert caught.value.code == status, said.err
    assert said.out == ""
    assert "Traceback" not in said.err
    assert not out.parent.exists() or list(out.parent.iterdir()) == []  # nor a hidden sibling
    [sentence] = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(said.err.partition("error: ")[2].splitlines()) <= 2 or status != 2  # and a hint
    return sentence


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Weights


def spoil(model, tensor, value):
    """Put a number in the place of a tensor's first."""
    path = model / "model.safetensors"
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    first = 8 + length + json.loads(data[8 : 8 + length])[tensor]["data_offsets"][0]
    data[first : first + 4] = struct.pack("<f", value)
    path.write_bytes(data)


@pytest.mark.toolchain
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "tensor",
    ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"],
)
@pytest.mark.parametrize("split", [(), ("--split", "100kB")])
def test_a_weight_that_is_no_number_is_named(tensor, value, split, model, capsys):
    spoil(model, tensor, value)
    sentence = refusal(model, capsys, "--no-verify", "--quant", "F32", *split)
    assert f"{tensor} in {model} holds NaN or infinity" in sentence


@pytest.mark.toolchain
def test_a_weight_beyond_float16_is_named(model, capsys):
    spoil(model, "model.layers.0.mlp.up_proj.weight", 1e30)
    sentence = refusal(model, capsys, "--no-verify", "--quant", "F16")
    assert "blk.0.ffn_up.weight: a weight is 1e+30, too large for F16" in sentence


@pytest.mark.parametrize("kept", [0, 7, 8, 300, -4, -5000])
def test_truncated_weights_are_named(kept, model, capsys):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert str(path) in refusal(model, capsys, "--no-verify")


def test_a_flipped_bit_in_a_header_is_a_refusal(model, capsys):
    path = model / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    at = data.index(b'"data_offsets":[0,') + len('"data_offsets":[')
    assert at < length
    path.write_bytes(data[:at] + b"1" + data[at + 1 :])
    assert "claims bytes 1 to" in refusal(model, capsys, "--no-verify")


def test_a_tensor_that_a_header_has_twice_is_named(model, capsys):
    path = model / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    entry = (
        b'"model.norm.weight":'
        + json.dumps(json.loads(data[8 : 8 + length])["model.norm.weight"]).encode()
    )
    header = b"{" + entry + b"," + data[9 : 8 + length]
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    assert "the key 'model.norm.weight' is there twice" in refusal(model, capsys, "--no-verify")


def test_a_key_that_a_config_has_twice_is_named(model, capsys):
    path = model / "config.json"
    path.write_text('{"hidden_size": 64,' + path.read_text().lstrip()[1:])
    assert "the key 'hidden_size' is there twice" in refusal(model, capsys, "--no-verify")


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_size", 2**62), ("vocab_size", 10**12), ("num_hidden_layers", 10**9),
     ("rms_norm_eps", -1), ("num_key_value_heads", 3)],
)  # fmt: skip
def test_absurd_sizes_are_named(field, value, model, capsys):
    edit_json(model / "config.json", **{field: value})
    sentence = refusal(model, capsys, "--no-verify")
    assert field in sentence or "cannot share 3 key and value heads" in sentence


# Text


def test_a_missing_tokenizer_is_named(model, capsys):
    (model / "tokenizer.json").unlink()
    assert f"{model} has no tokenizer.json" in refusal(model, capsys, "--no-verify")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"model": {}}', '{"model": 3, "added_tokens": 4}']
)
def test_a_damaged_tokenizer_is_named(text, model, capsys):
    (model / "tokenizer.json").write_text(text)
    assert "tokenizer" in refusal(model, capsys, "--no-verify")


TEMPLATES = {
    "not Jinja": "{% if %}",
    "unclosed": "{% for m in messages %}",
    "undefined": "{{ messages[7].role.x }}",
    "arithmetic": "{{ 1 / 0 }}",
    "always refuses": "{{ raise_exception('never') }}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "grows": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}"
    "{% endfor %}{{ ns.x }}",
    "reaches out": "{{ ''.__class__.__mro__ }}",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize(
    "options", [("--no-verify",), pytest.param((), marks=pytest.mark.toolchain)]
)
def test_a_template_that_does_not_render_is_refused_before_anything_is_written(
    template, options, model, capsys, monkeypatch
):
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.2)
    (model / "chat_template.jinja").write_text(template)
    if not options:
        pytest.importorskip("torch")
    assert "the chat template" in refusal(model, capsys, *options)


def test_sampling_that_makes_no_sense_is_named(model, capsys):
    (model / "generation_config.json").write_text('{"eos_token_id": 0, "top_p": "all"}')
    assert "top_p = 'all'" in refusal(model, capsys, "--no-verify")


@pytest.mark.parametrize("value", ["1" + "0" * 400, "NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_k", "repetition_penalty"])
def test_a_setting_that_no_float_holds_is_named(field, value, model, capsys):
    (model / "generation_config.json").write_text(f'{{"eos_token_id": 0, "{field}": {value}}}')
    assert f"{field} = " in refusal(model, capsys, "--no-verify")


# GGUF


@pytest.fixture
def gguf(without_transformers, whole, tmp_path, monkeypatch):
    """Return a GGUF file to damage."""
    pytest.importorskip("gguf")
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    return to_gguf(open_checkpoint(whole), tmp_path)


def to_gguf(checkpoint, directory):
    pre = pretokenizers.likely_pre(checkpoint.text)
    conversion.convert(
        checkpoint, BuildRequest(recipe=RECIPES["F32"]), directory, pre=pre, progress=lambda _: None
    )
    return directory / "model.gguf"


@pytest.mark.parametrize("kept", [0, 3, 23, 200, 3000, -64, -5000])
def test_a_truncated_gguf_file_is_named_with_the_place(kept, gguf, capsys, tmp_path):
    gguf.write_bytes(gguf.read_bytes()[:kept])
    assert f"{gguf}: " in (sentence := refusal(gguf, capsys, "--no-verify"))
    assert " at byte " in sentence
    assert not list((tmp_path / "cache" / "checkpoints").rglob("*.json"))


@pytest.mark.parametrize(
    ("at", "bit"), [(0, 0), (4, 6), (8, 7), (12, 5), (16, 6), (20, 0), (24, 6), (31, 7), (52, 5)]
)
def test_a_flipped_bit_in_a_gguf_header_is_named_with_the_place(at, bit, gguf, capsys):
    data = bytearray(gguf.read_bytes())
    data[at] ^= 1 << bit
    gguf.write_bytes(data)
    assert " at byte " in refusal(gguf, capsys, "--no-verify")


def test_a_key_that_a_gguf_file_has_twice_is_named(gguf, capsys):
    data = gguf.read_bytes()
    key = struct.pack("<Q", 12) + b"general.name"
    at = data.index(key)
    other = data.index(struct.pack("<Q", 12) + b"general.type")
    damaged = bytearray(data)
    damaged[other : other + len(key)] = key
    gguf.write_bytes(damaged)
    assert other < at
    assert "repeats 'general.name'" in refusal(gguf, capsys, "--no-verify")


def test_a_gguf_weight_that_is_no_number_is_named(gguf, capsys):
    info = next(t for t in layout.read(gguf).tensors if t.name == "blk.1.ffn_down.weight")
    data = bytearray(gguf.read_bytes())
    data[info.offset : info.offset + 4] = struct.pack("<f", float("nan"))
    gguf.write_bytes(data)
    sentence = refusal(gguf, capsys, "--no-verify")
    assert "model.layers.1.mlp.down_proj.weight" in sentence
    assert "NaN" in sentence


# Adapters


def test_a_directory_that_is_no_adapter_is_named(model, capsys, tmp_path):
    sentence = refusal(model, capsys, "--adapter", str(tmp_path / "none"), "--no-verify")
    assert f"{tmp_path / 'none'} is not an adapter" in sentence


# What llama.cpp aborts over


def deep(directory, layers):
    """Return the tiny checkpoint with more layers, each of them small."""
    tiny = _tiny_checkpoint(directory)
    attention = replace(tiny.spec.attention, heads=2, num_kv_heads=1)
    spec = replace(
        tiny.spec, layers=tiny.spec.layers[:1] * layers, attention=attention, hidden_size=32,
        intermediate_size=32,
    )  # fmt: skip
    family = families.get("llama")
    tensors = {
        family.source(role, spec).tensor: _RandomTensor(shape, seed)
        for seed, (role, shape) in enumerate(spec.weights())
    }
    return replace(tiny, spec=spec, tensors=tensors)


def test_more_layers_than_llama_cpp_holds_are_refused_in_one_sentence(
    tmp_path, capsys, monkeypatch
):
    pytest.importorskip("numpy")
    assert architectures.MAX_LAYERS == 512
    monkeypatch.setattr(architectures, "MAX_LAYERS", 3)
    model = write_checkpoint(deep(tmp_path, 4), tmp_path / "model", precision="f16")
    sentence = refusal(model, capsys, "--no-verify", "--format", "gguf")
    assert "4 layers are more than llama.cpp's 3" in sentence


@pytest.mark.toolchain
def test_a_file_that_llama_cpp_aborts_over_ends_a_child_and_not_us(gguf):
    pytest.importorskip("llama_cpp")
    data = bytearray(gguf.read_bytes())
    key = b"llama.block_count"
    at = data.index(key) + len(key) + 4  # after the number of its type
    data[at : at + 4] = struct.pack("<I", 600)
    gguf.write_bytes(data)
    assert layout.read(gguf).metadata["llama.block_count"] == 600  # we see nothing wrong
    with pytest.raises(ToolchainError, match=r"llama\.cpp aborted; it was given") as caught:
        load_probe.probe("gguf", gguf, context_tokens=64)
    assert "GGML_ASSERT" in caught.value.log


@pytest.mark.toolchain
def test_a_file_that_llama_cpp_refuses_is_refused_with_its_words(tmp_path):
    pytest.importorskip("llama_cpp")
    (tmp_path / "no.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ToolchainError, match=r"llama\.cpp failed; it was given") as caught:
        load_probe.probe("gguf", tmp_path / "no.gguf", context_tokens=64)
    assert "llama.cpp refuses" in caught.value.log


@pytest.mark.toolchain
def test_a_file_that_loads_and_runs_is_no_error(gguf):
    pytest.importorskip("llama_cpp")
    load_probe.probe("gguf", gguf, context_tokens=64)


@pytest.mark.toolchain
def test_an_abort_in_the_proof_is_an_error_with_its_log_and_nothing_left(
    tmp_path, capsys, monkeypatch
):
    pytest.importorskip("torch")
    pytest.importorskip("llama_cpp")
    model = write_checkpoint(deep(tmp_path, 513), tmp_path / "model", precision="f16")
    monkeypatch.setattr(architectures, "MAX_LAYERS", 10**6)  # as if we did not know
    out = tmp_path / "outputs" / "bundle"
    with pytest.raises(SystemExit) as caught:
        main([
            "export", str(model), "--target", "raspberry-pi-5-8gb", "--quant", "F16",
            "-o", str(out),
        ])  # fmt: skip
    said = capsys.readouterr().err
    assert caught.value.code == ToolchainError.exit_status
    assert "llama.cpp aborted" in said
    assert "GGML_ASSERT" in said
    assert list(out.parent.iterdir()) == []
