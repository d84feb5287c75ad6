"""Other programs open the directory as edgekit writes it."""

import json

import pytest

from edgekit import source
from edgekit.doctor import _tiny_checkpoint
from edgekit.formats.onnx import clients, conversion, storage
from edgekit.formats.onnx.runtime import OnnxSession
from edgekit.generate import Sampling, generate
from edgekit.tests.tiny_checkpoints import write_tiny_checkpoint
from edgekit.text import Text


np = pytest.importorskip("numpy")

PROMPT = "Low tide is at noon, so"
ANSWER_TOKENS = 16


def export(checkpoint, directory, *, recipe="F32"):
    """Write all that a bundle holds of the model and its text."""
    chosen = storage.RECIPES[recipe]
    entry = conversion.convert(checkpoint, chosen, directory, progress=lambda _: None)
    clients.write(checkpoint, directory, entry, context_tokens=100)
    return Text.open(directory, checkpoint.text.copy_into(directory))


def test_the_settings_say_what_the_graph_is(tmp_path):
    checkpoint = _tiny_checkpoint(tmp_path)
    config = clients.genai_config(checkpoint, "model.onnx", context_tokens=48)
    assert config["model"]["eos_token_id"] == [256]
    assert config["search"]["max_length"] == 48
    decoder = config["model"]["decoder"]
    assert decoder["inputs"]["past_key_names"] == "past_key_values.%d.key"
    assert decoder["outputs"]["present_value_names"] == "present.%d.value"
    assert (decoder["num_hidden_layers"], decoder["num_key_value_heads"]) == (2, 2)
    assert json.loads(json.dumps(config)) == config


@pytest.mark.toolchain
def test_the_settings_of_the_checkpoint_are_those_of_the_artifact(tmp_path):
    pytest.importorskip("torch")
    directory = write_tiny_checkpoint(tmp_path / "model", "llama")
    config = json.loads((directory / "config.json").read_text())
    checkpoint = source.open_checkpoint(directory)
    quantised = config | {"quantization_config": {"quant_method": "bitsandbytes"}}
    (directory / "config.json").write_text(json.dumps(quantised))
    found = clients.transformers_files(checkpoint, data_files=2)
    told = found["config.json"].pop("transformers.js_config")
    assert told == {"dtype": "fp32", "use_external_data_format": 2}
    assert found["config.json"] == {k: v for k, v in config.items() if v is not None}
    stops = found["generation_config.json"]["eos_token_id"]
    assert stops == list(checkpoint.text.declared_stop_ids)
    assert found["tokenizer_config.json"]["chat_template"] == checkpoint.text.chat_template


@pytest.mark.toolchain
@pytest.mark.parametrize(
    ("name", "recipe"),
    [("llama", "F32"), ("llama", "UINT4"), ("odd-sizes", "F32"), ("qwen2-window", "F32"),
     ("phi4-mini", "F32"), ("gemma2", "F32"), ("stablelm-12b", "F32")],
)  # fmt: skip
def test_onnx_runtime_genai_writes_the_same_answer(name, recipe, tmp_path):
    genai = pytest.importorskip("onnxruntime_genai")
    pytest.importorskip("torch")
    checkpoint = source.open_checkpoint(write_tiny_checkpoint(tmp_path / "model", name))
    text = export(checkpoint, tmp_path, recipe=recipe)
    ids = text.encode(PROMPT, adds_bos=False)
    session = OnnxSession(tmp_path / conversion.ENTRY, context_tokens=100, threads=1)
    ours = list(generate(session, ids, max_tokens=ANSWER_TOKENS, stop_ids=(), sampling=Sampling()))
    session.close()

    model = genai.Model(str(tmp_path))
    tokenizer, settings = genai.Tokenizer(model), genai.GeneratorParams(model)
    settings.set_search_options(max_length=len(ids) + ANSWER_TOKENS)
    generator = genai.Generator(model, settings)
    assert tokenizer.encode(PROMPT).tolist() == ids
    generator.append_tokens(np.array([ids], np.int32))
    theirs = []
    while not generator.is_done():
        generator.generate_next_token()
        theirs.append(int(generator.get_next_tokens()[0]))
    stops = [index for index, id in enumerate(ours) if id in checkpoint.text.declared_stop_ids]
    assert theirs == ours[: stops[0] + 1 if stops else None]
    assert tokenizer.decode(ids) == PROMPT
