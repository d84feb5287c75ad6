"""The tensors of a GGUF file, byte for byte against llama.cpp's own quantizer and converter."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgekit import formats
from edgekit.formats import BuildRequest
from edgekit.formats.gguf import conversion, layout, pretokenizers
from edgekit.formats.gguf.runtime import log
from edgekit.formats.gguf.tensor_types import FILE_TYPES
from edgekit.source.checkpoint import Checkpoint
from edgekit.tests.needs import needs
from edgekit.tests.tiny.checkpoints import write_tiny_checkpoint


pytestmark = [pytest.mark.toolchain, needs("torch", "llama_cpp")]

RECIPES = formats.get("gguf").RECIPES
# Rows that fill blocks of 256, rows that fill only blocks of 32, and rows that fill none.
SIZES = {
    "256": {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4},
    "96": {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 4},
    "72": {"hidden_size": 72, "intermediate_size": 100, "num_attention_heads": 4},
}
FAMILIES = ("llama", "qwen2", "gemma3", "phi3")
CASES = [*((name, width) for name in FAMILIES for width in ("256", "96")), ("llama", "72")]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def checkpoint(request, tmp_path_factory):
    name, width = request.param
    sizes = SIZES[width] | {"num_hidden_layers": 5, "num_key_value_heads": 2}
    if name == "gemma3":
        width = sizes["hidden_size"] // sizes["num_attention_heads"]
        sizes |= {"head_dim": width, "query_pre_attn_scalar": width}
    path = write_tiny_checkpoint(tmp_path_factory.mktemp("native") / "model", name, **sizes)
    return Checkpoint.open(path)


@pytest.fixture(scope="module")
def exact(checkpoint, tmp_path_factory):
    """Return the F32 file that llama.cpp's quantizer starts from."""
    return convert(checkpoint, "F32", tmp_path_factory.mktemp("exact"))


def convert(checkpoint, recipe, directory):
    pre = pretokenizers.likely_pre(checkpoint.text)
    entry = conversion.convert(
        checkpoint,
        BuildRequest(recipe=RECIPES[recipe]),
        directory,
        pre=pre,
        progress=lambda _: None,
    )
    return directory / entry


def quantized(exact, recipe, out):
    """Do what ``llama-quantize exact out recipe`` does."""
    log()  # else llama.cpp talks on standard error
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = FILE_TYPES[recipe]
    parameters.nthread = 1
    status = llama_cpp.llama_model_quantize(
        os.fsencode(exact), os.fsencode(out), ctypes.byref(parameters)
    )
    assert status == 0, log().tail
    return out


def tensors(path):
    """Return tensor type, columns and bytes of every tensor."""
    content = path.read_bytes()
    return {
        info.name: (
            info.tensor_type,
            info.shape[-1],
            content[info.offset : info.offset + info.size_bytes],
        )
        for info in layout.read(path).tensors
    }


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "F32"])
def test_every_recipe_makes_the_tensors_that_llama_quantize_makes(
    recipe, checkpoint, exact, tmp_path
):
    theirs = tensors(quantized(exact, recipe, tmp_path / "theirs.gguf"))
    ours = tensors(convert(checkpoint, recipe, tmp_path))
    assert {name: made[:2] for name, made in ours.items()} == {
        name: made[:2] for name, made in theirs.items()
    }
    assert [name for name, made in ours.items() if made != theirs[name]] == []


def test_projections_of_phi_are_fused_as_in_published_files_so_that_they_are_mixed_alike(tmp_path):
    path = write_tiny_checkpoint(tmp_path / "model", "phi3", **SIZES["256"])
    made = tensors(convert(Checkpoint.open(path), "Q5_K_M", tmp_path))
    kinds = {name.partition("attn_qkv.")[0]: kind for name, (kind, *_) in made.items()
             if "attn_qkv" in name}  # fmt: skip
    assert kinds == {"blk.0.": "Q5_K", "blk.1.": "Q5_K", "blk.2.": "Q6_K"}
    assert not {"blk.0.attn_q.weight", "blk.0.ffn_gate.weight"} & made.keys()


# llama.cpp's converter is Python of its own, and comes with its source only.

KINDS = ("F32", "F16", "BF16", "Q8_0")  # the tensor types it writes and edgekit has
CONVERTER = """
import runpy, sys
tree, model, out, *kinds = sys.argv[1:]
sys.path[:0] = [tree, tree + "/gguf-py"]
import conversion
find = conversion.get_model_class
def find_without_vocabulary(*args, **options):  # it knows no tokenizer that a test has trained
    found = find(*args, **options)
    found.set_vocab = lambda self: None
    return found
conversion.get_model_class = find_without_vocabulary
for kind in kinds:
    sys.argv = [
        tree + "/convert_hf_to_gguf.py", model, "--outfile", f"{out}/{kind}.gguf",
        "--outtype", kind.lower(),
    ]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def llama_cpp_tree():
    tree = os.environ.get("EDGEKIT_LLAMA_CPP")
    if not tree:
        pytest.skip("EDGEKIT_LLAMA_CPP names no directory with llama.cpp's source")
    assert (Path(tree) / "convert_hf_to_gguf.py").is_file()
    return tree


@pytest.fixture(scope="module")
def natively_converted(checkpoint, llama_cpp_tree, tmp_path_factory):
    """Return a directory with one file for each of `KINDS`."""
    out = tmp_path_factory.mktemp("theirs")
    command = [
        sys.executable, "-c", CONVERTER, llama_cpp_tree, str(checkpoint.directory), str(out), *KINDS
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return out


@pytest.mark.parametrize("recipe", KINDS)
def test_llama_cpps_converter_makes_the_same_tensors(
    recipe, checkpoint, natively_converted, tmp_path
):
    theirs = tensors(natively_converted / f"{recipe}.gguf")
    ours = tensors(convert(checkpoint, recipe, tmp_path))
    assert ours.keys() == theirs.keys()
    for name, (tensor_type, columns, content) in theirs.items():
        assert ours[name][:2] == (tensor_type, columns), name
        # Of Gemma's embedding it leaves out the rows that no token has.
        assert ours[name][2][: len(content)] == content, name
        assert len(ours[name][2]) == len(content) or name == "token_embd.weight"
