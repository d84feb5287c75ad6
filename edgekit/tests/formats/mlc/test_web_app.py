"""What an app in a browser gets, in a real browser with a real WebLLM."""

import json
import shutil
from types import SimpleNamespace

import pytest

from edgekit.formats import GpuBuffer
from edgekit.formats.mlc import browsing, clients, conversation, web_app
from edgekit.tests.tiny.voices import speak
from edgekit.tests.witnesses import javascript_clients


MIB = 1 << 20
LIMITS = {
    "maxBufferSize": 2048 * MIB,
    "maxStorageBufferBindingSize": 2048 * MIB,
    "maxComputeWorkgroupStorageSize": 32768,
    "maxStorageBuffersPerShaderStage": 10,
}
PREBUILT = SimpleNamespace(
    name="x-webgpu.wasm",
    url="https://raw.githubusercontent.com/mlc-ai/binary-mlc-llm-libs/main/web-llm-models/"
    "v0_2_80/x-webgpu.wasm",
    webllm_version="0.2.80",
)
EMBEDDING = {"name": "model.embed_tokens.q_weight", "shape": [608, 8]}
USER = {"role": "user", "content": " Hi "}


def write_app(directory, voice="smollm", *, raw_prompt=False, **changes):
    """Write the app's part of a bundle, and the two files that it looks at."""
    model = speak(directory / "model", voice)
    said = conversation.derive(model, raw_prompt=raw_prompt)
    config = {"context_window_size": 2048, "quantization": "q4f32_1"}
    bundle = directory / "bundle"
    bundle.mkdir()
    fields = {"model_id": "tiny", "library": None, "vram_bytes": 300 * MIB} | changes
    web_app.write(bundle, config=config, conversation=said, **fields)
    (bundle / "mlc-chat-config.json").write_text(json.dumps(config))
    shard = {"dataPath": "params_shard_0.bin", "nbytes": 8, "records": [EMBEDDING]}
    cache = {"records": [shard]}
    (bundle / "tensor-cache.json").write_text(json.dumps(cache))
    return bundle


def settings_of(bundle):
    return json.loads((bundle / "webllm.json").read_text(encoding="utf-8"))


def test_webllm_json_is_an_app_config_with_one_model(tmp_path):
    bundle = write_app(tmp_path, largest_buffer=GpuBuffer(name="model.norm", size_bytes=77))

    assert settings_of(bundle)["model_list"] == [
        {
            "model": "http://localhost:8080/resolve/main/../../",
            "model_id": "tiny",
            "model_lib": "http://localhost:8080/model-webgpu.wasm",
            "vram_required_MB": 300.0,
            "low_resource_required": True,
            "required_features": [],
            "overrides": {"context_window_size": 2048},
            "buffer_size_required_bytes": 77,
        }
    ]


def test_webllm_is_told_to_hold_one_state_of_a_model_that_keeps_any(tmp_path):
    bundle = write_app(tmp_path, has_states=True)
    (record,) = settings_of(bundle)["model_list"]
    assert record["overrides"] == {"context_window_size": 2048, "max_history_size": 1}


def test_a_template_that_takes_two_forms_gives_two_models(tmp_path):
    plain, with_system = settings_of(write_app(tmp_path, "stablelm"))["model_list"]

    assert with_system["model_id"] == "tiny-with-system"
    changed = with_system["overrides"].pop("conv_config")
    assert changed["system_template"] == "<|im_start|>system\n{system_message}"
    assert with_system | {"model_id": "tiny"} == plain


def test_the_page_names_the_version_of_webllm_that_it_is_tested_with():
    package = json.loads((javascript_clients.SCRIPTS / "package.json").read_text())
    page = (web_app.PAGE_DIRECTORY / "index.html").read_text(encoding="utf-8")

    tested = package["dependencies"]["@mlc-ai/web-llm"]
    assert tested == web_app.PREBUILT_FOR
    assert f"@mlc-ai/web-llm@{tested} " in page.replace("\n", " ")
    (package,) = browsing.PACKAGES
    assert package.version == tested


def visit(bundle, **request):
    return visit_page(bundle, **request).answer


def visit_page(bundle, *, gpus=(), talks=(), ends=(), has_webllm=True):
    javascript_clients.need_browser()
    if has_webllm:
        packages = javascript_clients.installed_packages()
        library = bundle / "node_modules/@mlc-ai/web-llm/lib/index.js"
        library.parent.mkdir(parents=True)
        shutil.copyfile(packages / "@mlc-ai/web-llm/lib/index.js", library)
    request = {"gpus": list(gpus), "talks": list(talks), "ends": list(ends)}
    seen = javascript_clients.run_page("mlc_page.mjs", request, directory=bundle)
    assert seen.foreign == ()
    return seen


@pytest.mark.toolchain
def test_the_page_says_which_limit_of_a_gpu_is_too_low_for_which_buffer(tmp_path):
    largest = GpuBuffer(name="lm_head.q_weight", size_bytes=200 * MIB)
    bundle = write_app(tmp_path, largest_buffer=largest)
    gpus = [
        None,
        {},
        {"features": [], "limits": LIMITS | {"maxStorageBufferBindingSize": 512 * MIB}},
        {"features": [], "limits": LIMITS | {"maxBufferSize": 100 * MIB}},
        {"features": [], "limits": LIMITS | {"maxStorageBuffersPerShaderStage": 8}},
    ]

    found = visit(bundle, gpus=gpus)["missing"]

    assert found == [
        "This browser has no WebGPU here: take a current one, and https or localhost.",
        "WebGPU finds no GPU in this browser.",
        "lm_head.q_weight needs 200 MiB of maxStorageBufferBindingSize, WebLLM gets 128 MiB here.",
        "WebLLM itself needs 256 MiB of maxBufferSize, WebLLM gets 100 MiB here.",
        "WebLLM needs a maxStorageBuffersPerShaderStage of 10, this GPU has 8.",
    ]


@pytest.mark.toolchain
def test_a_scheme_in_16_bits_is_refused_by_a_gpu_without_them(tmp_path):
    bundle = write_app(tmp_path, needs_shader_f16=True)

    found = visit(bundle, gpus=["this"])  # SwiftShader has no shader-f16

    assert found["missing"] == [found["page"]]
    assert found["page"].startswith("The weights are q4f32_1, which needs shader-f16")


@pytest.mark.toolchain
def test_a_library_that_is_not_there_is_missed(tmp_path):
    found = visit(write_app(tmp_path), gpus=["this"])

    assert found["missing"] == [found["page"]]
    assert "/files/model-webgpu.wasm: WebLLM needs one that was compiled" in found["page"]


@pytest.mark.toolchain
def test_a_library_for_another_shape_is_refused_before_it_is_loaded(tmp_path):
    bundle = write_app(tmp_path)
    any_rows, other = EMBEDDING | {"shape": ["vocab_size", 8]}, EMBEDDING | {"shape": [608, 16]}
    metadata = {"model_type": "llama", "params": [any_rows, other], "memory_usage": {"prefill": 1}}
    library = b"\0asm\1\0\0\0" + b"\xff" * 9 + json.dumps(metadata).encode() + b"}\0"
    (bundle / "model-webgpu.wasm").write_bytes(library)

    assert visit(bundle)["page"] == (
        "The library is for model.embed_tokens.q_weight of 608 x 16, here it is 608 x 8."
    )


@pytest.mark.toolchain
def test_a_library_of_another_version_of_webllm_is_named_with_its_version(tmp_path):
    assert visit(write_app(tmp_path, library=PREBUILT))["page"] == (
        "The library is of version v0_2_80, this WebLLM takes v0_2_86/base: "
        "use @mlc-ai/web-llm 0.2.80."
    )


@pytest.mark.toolchain
def test_a_chat_goes_on_from_the_cache_only_after_an_answer_that_ended_by_itself(tmp_path):
    """And the page says that WebLLM is not next to it."""
    ends = ["stop", "length", "stop", "stop"]
    found = visit(write_app(tmp_path), ends=ends, has_webllm=False)

    assert found["resets"] == [[True, False, True, False]] * 2
    assert found["page"] == "WebLLM is missing: this page's source says how to put it here."


@pytest.mark.toolchain
def test_webllm_looks_for_the_files_beside_the_page(tmp_path):
    """Though it appends resolve/main/ to addresses that have none."""
    bundle = write_app(tmp_path)
    (bundle / "model-webgpu.wasm").write_bytes(b"\0asm\1\0\0\0")  # a module with nothing in it

    seen = visit_page(bundle)

    assert "There is no library" not in seen.answer["page"]  # WebLLM had it, and failed
    assert seen.paths.count("/files/mlc-chat-config.json") == 2
    assert not [path for path in seen.paths if "resolve" in path]


@pytest.mark.toolchain
def test_messages_become_what_the_chat_template_would_make_of_them(tmp_path):
    bundle = write_app(tmp_path, "llama3")
    llama3 = settings_of(bundle)["edgekit"]["chat"]
    thinking = llama3 | {"drops_thoughts": True, "trimmed_roles": []}
    gemma = llama3 | {"takes_system": False}
    keeping = thinking | {"keeps_breaks": True}
    filling = llama3 | {"fills_answers": True}
    answer = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes "}
    prices = {"role": "assistant", "content": "$1 {function_string} $& {function_string}"}
    system = {"role": "system", "content": "$1 is $&"}

    trimmed, cut, kept, filled, escaped, no_system, unloaded, wanted = visit(
        bundle,
        talks=[
            [[USER, answer], llama3, False],
            [[answer], thinking, False],
            [[answer], keeping, False],
            [[prices], filling, False],
            [[system, USER], llama3, True],
            [[system, USER], gemma, False],
            [[system, USER], llama3, False],
            [[USER], llama3, True],
        ],
    )["prepared"]

    assert trimmed[0]["content"] == "Hi"
    assert cut[0]["content"] == "Yes "
    assert kept[0]["content"] == "\n\nYes "
    template = {"role_templates": {"assistant": clients.ANSWER}}
    assert filled == clients.sent_to_webllm(template, [prices])
    assert filled[0]["content"].startswith("$$1 {function_string}{function_string} $$& {f")
    assert escaped[0]["content"] == "$$1 is $$&"
    assert no_system.startswith("This model's chat template has no system message")
    assert unloaded == "Load the model with hasSystem: true for a system message."
    assert wanted == "A conversation with this model starts with a system message."
