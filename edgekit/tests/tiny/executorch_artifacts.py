"""Tiny programs for ExecuTorch, each exported once for all tests that read them."""

import atexit
import functools
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from edgekit import formats
from edgekit.formats import BuildRequest
from edgekit.formats.executorch import tensor_types, writing
from edgekit.runtime.child import environment
from edgekit.source import opening
from edgekit.tests.tiny.checkpoints import write_tiny_checkpoint


CONTEXT_TOKENS = 192
IDS = [1, 87, 85, 303, 201, 57, 74, 272, 447, 271, 2, 201]  # of the tokenizer, in no language
# Kinds that each ask something of a back-end that none before them does. The others differ from
# these in names, in voices and in sizes; the support matrix has them all.
KINDS = (
    "llama", "llama3-rope-tied", "llama-linear-rope", "llama-bias", "odd-head-width", "odd-sizes",
    "one-kv-head", "mistral-window", "qwen2-window", "qwen3", "phi3", "phi3-longrope",
    "phi3.5-longrope", "phi4-mini", "gemma2", "gemma2-wide-heads", "gemma3", "stablelm-1.6b",
    "stablelm-12b", "smollm3",
    "olmo3-yarn",  # norms after only, one norm for all heads, ropes that differ
    "hunyuan",  # a norm after the rotation
    "phi",  # no gate, one norm for both, a head with a bias
    "nemotron",  # squares, a LayerNorm that adds one
    "apertus",  # xIELU
    "cohere2",  # a LayerNorm without bias, layers without a rope beside windows
    "ministral3",  # queries that grow
    "gemma4",  # shared caches, two widths of heads and of MLPs, embeddings and scales of layers
    "gemma4-31b",  # values that are keys
    "lfm2-bias",  # short convolutions, the last layer's among them
    "qwen3.5-pattern",  # delta nets, and gates on attention
)  # fmt: skip
# Refuses torch as a device without it does.
WITHOUT_TORCH = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "torchao", "transformers"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NoTorch())
"""


@functools.cache
def tiny(variant: str = "portable", *, recipe: str = "F32", kind: str = "llama") -> Path:
    """Return a directory with a random model, its tokenizer and its template."""
    home = Path(tempfile.mkdtemp(prefix="edgekit-executorch-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    checkpoint = opening.open_checkpoint(write_tiny_checkpoint(home / "checkpoint", kind))
    directory = home / "artifact"
    directory.mkdir()
    checkpoint.text.copy_into(directory)
    fmt = formats.get("executorch")
    entry = writing.convert(
        checkpoint,
        BuildRequest(recipe=fmt.RECIPES[recipe], context_tokens=CONTEXT_TOKENS, variant=variant),
        directory,
        progress=lambda _: None,
    )
    assert entry == "model.pte"
    return directory


def python(code: str, *arguments: object) -> str:
    """Run code in a fresh interpreter and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True, text=True, errors="replace", check=False, timeout=300,
        env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def decoded(parts, stored):
    """Return the weights that the parts of a matrix stand for."""
    import numpy as np

    if stored in {"F32", "F16"}:
        return parts[0].astype(np.float32)
    codes, scales = parts
    if stored == "INT8":
        return codes.astype(np.float32) * scales[:, None]
    group = tensor_types.TENSOR_TYPES[stored].block_weights
    whole = np.stack((codes & 15, codes >> 4), -1).reshape(len(codes), -1).astype(np.float32) - 8
    wide = (scales.astype(np.uint32) << 16).view(np.float32)
    return whole * wide.repeat(group, axis=1)


def greedy(session, prompt, tokens, *, vocabulary=None):
    """Return the likeliest tokens after a prompt, of the first so many of the vocabulary."""
    session.reset()
    said = [int(session.prefill(prompt)[:vocabulary].argmax())]
    while len(said) < tokens:
        said.append(int(session.decode(said[-1])[:vocabulary].argmax()))
    return said
