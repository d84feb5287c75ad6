"""Core ML: programs for the GPU of iPhones, iPads and Macs.

A program reads one token; the runners of ExecuTorch read prompts so where a program says that its
shape is fixed. What Core ML gets is written without Apple's converter: `decoder` says what
is computed, `mil` spells it, `package` says where its files are.
"""

from edgekit.formats.executorch import tensor_types
from edgekit.formats.executorch.backends import Backend, Build


_RECIPES = tuple(name for name in tensor_types.RECIPES if name != "F32")  # it multiplies float16
_SLOW = "Core ML reads a prompt token by token"
_UNROUNDED = "Core ML multiplies in float16: weights are rounded, what they meet is not"
BACKEND = Backend(
    package=__name__,
    id="CoreMLBackend",
    name="Core ML",
    device="an iPhone or iPad with iOS 18, or a Mac with macOS 15, or later",
    recipes=_RECIPES,
    half_recipes=frozenset(_RECIPES),
    notes={name: (_SLOW, _UNROUNDED) if name.startswith("8da") else (_SLOW,) for name in _RECIPES},
    reads_by_token=True,
    builds={
        "coreml": Build(
            kind="all of it in Core ML, on the GPU",
            ios=("executorch_llm", "backend_coreml", "kernels_optimized"),
            constants={"enable_dynamic_shape": False},  # one token at a time
        )
    },
)
