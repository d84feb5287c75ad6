"""XNNPACK: programs for the CPU of phones, boards and computers."""

from edgekit.formats.executorch import tensor_types
from edgekit.formats.executorch.backends import Backend, Build


PORTABLE, LLM = "portable", "llm-ops"

_PRODUCTS = ("executorch_llm", "backend_xnnpack", "kernels_optimized", "kernels_quantized")
_ANDROID = "The library `executorch-android` has all the kernels that this program calls."
BACKEND = Backend(
    package=__name__,
    id="XnnpackBackend",
    name="XNNPACK",
    recipes=tuple(tensor_types.RECIPES),
    builds={
        PORTABLE: Build(
            kind="plain operators: any ExecuTorch runtime with XNNPACK runs it",
            android=_ANDROID,
            ios=_PRODUCTS,
            constants={"use_sdpa_with_kv_cache": False},
        ),
        LLM: Build(
            kind="attention by llama::custom_sdpa: runners that link the LLM kernels run it",
            android=_ANDROID,
            ios=(*_PRODUCTS, "kernels_llm"),
            constants={"use_sdpa_with_kv_cache": True},
        ),
    },
)
