"""Versions of foreign programs: what the code was read in is what is installed and written down."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from edgekit import versions
from edgekit.formats.mlc import libraries, web_app


ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "edgekit"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINNED = {
    "llama-cpp-python": versions.LLAMA_CPP_PYTHON,
    "executorch": versions.EXECUTORCH,
    "apache-tvm": versions.APACHE_TVM,
    "apache-tvm-ffi": versions.APACHE_TVM_FFI,
}
# Parts that are nobody's interface, and the one module that reaches each. They were read in the
# pinned version, and are read again when the pin changes.
EXECUTORCH = "formats/executorch"
PRIVATE = {
    "import llama_cpp": "formats/gguf/runtime.py",  # its ctypes structs
    "ggml.ggml_quantize_chunk.argtypes": "formats/gguf/tensor_types.py",  # of the same library
    "onnxruntime_pybind11_state": "formats/onnx/runtime.py",  # its exceptions have no base
    "exir._serialize._flatbuffer_program": f"{EXECUTORCH}/assembly.py",
    "exir._serialize._program ": f"{EXECUTORCH}/assembly.py",
    "exir._serialize._named_data_store": f"{EXECUTORCH}/backends/xnnpack/delegates.py",
    "_quant_patterns_and_replacements": f"{EXECUTORCH}/embeddings.py",
    "exir.lowered_backend_module": f"{EXECUTORCH}/lowering.py",
    "backends.vulkan.serialization": f"{EXECUTORCH}/backends/vulkan/graph.py",
    "backends.xnnpack.serialization": f"{EXECUTORCH}/backends/xnnpack/delegates.py",
    "xnnpack.operators.node_visitor": f"{EXECUTORCH}/backends/xnnpack/delegates.py",
    "batch_prefill_ragged_kv": "formats/mlc/compiling/attention_kernels.py",  # TVM's own names
    "uvicorn.protocols.http.h11_impl": "serve.py",  # its connection has no clock before a request
}


def pins(package):
    found = {
        requirement.partition("==")[2]
        for requirements in PROJECT["optional-dependencies"].values()
        for requirement in requirements
        if requirement.startswith(f"{package}==")
    }
    assert found
    return found


@pytest.mark.parametrize("package", PINNED)
def test_a_pin_is_the_version_that_was_read(package):
    assert pins(package) == {PINNED[package]}


@pytest.mark.parametrize("package", PINNED)
def test_what_is_installed_is_what_was_read(package):
    try:
        installed = metadata.version(package)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    assert installed == PINNED[package]


def test_webllm_is_named_once():
    table = tomllib.loads(libraries.TABLE.read_text(encoding="utf-8"))
    page = (web_app.PAGE_DIRECTORY / "index.html").read_text(encoding="utf-8")
    assert table["webllm_version"] == versions.WEBLLM
    assert set(re.findall(r"@mlc-ai/web-llm@([\d.]+)", page)) == {versions.WEBLLM}
    assert web_app.PREBUILT_FOR == versions.WEBLLM


def test_no_other_version_of_a_pinned_program_is_named():
    kinds = ("*.py", "*.cpp", "*.cmake", "*.toml", "*.html", "*.mjs")
    files = [path for kind in kinds for path in PACKAGE.rglob(kind)]
    assert len(files) > 200
    text = "".join(path.read_text(encoding="utf-8") for path in files)
    assert set(re.findall(r"[Ee]xecu[Tt]orch (\d+\.\d+\.\d+)", text)) == {versions.EXECUTORCH}
    named = set(re.findall(r"llama\.cpp ([0-9a-f]{9})\b", text))
    assert named == {versions.LLAMA_CPP_COMMIT}


@pytest.mark.parametrize("words", PRIVATE)
def test_what_is_nobodys_interface_is_reached_from_one_place(words):
    reaching = [
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if "tests" not in path.relative_to(PACKAGE).parts
        and words in path.read_text(encoding="utf-8")
    ]
    assert reaching == [PRIVATE[words]]
