"""XNNPACK: programs for the CPU of phones, boards and computers."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.errors import UsageError
from edgekit.formats.executorch import coverage, memory, storage
from edgekit.formats.executorch.backends import Build
from edgekit.formats.executorch.backends.xnnpack import reading, size
from edgekit.formats.executorch.contents import named_weights


if TYPE_CHECKING:
    from edgekit.formats import Layout, MemoryUse
    from edgekit.formats.executorch.planned import Job, Weight
    from edgekit.formats.executorch.program import Program
    from edgekit.model.spec import DecoderSpec, Shape


PORTABLE, LLM = "portable", "llm-ops"
ID, NAME = "XnnpackBackend", "XNNPACK"
DEVICE: str | None = None  # it is in every runtime, this machine's too
RECIPES = tuple(storage.RECIPES)
READS_BY_TOKEN = False

_PRODUCTS = ("executorch_llm", "backend_xnnpack", "kernels_optimized", "kernels_quantized")
_ANDROID = "The library `executorch-android` has all the kernels that this program calls."
BUILDS: Mapping[str, Build] = {
    PORTABLE: Build(
        kind="plain operators: any ExecuTorch runtime with XNNPACK runs it",
        android=_ANDROID,
        ios=_PRODUCTS,
    ),
    LLM: Build(
        kind="attention by llama::custom_sdpa: runners that link the LLM kernels run it",
        android=_ANDROID,
        ios=(*_PRODUCTS, "kernels_llm"),
    ),
}


def refuse(spec: "DecoderSpec", variant: str) -> None:
    """Check that ExecuTorch's ``custom_sdpa`` computes the attention of a decoder, if it must."""
    lacks = None
    if spec.attention.score_cap is not None:
        lacks = "a cap on scores"
    elif any(layer.window_tokens is not None for layer in spec.layers):
        lacks = "windows"
    if variant == LLM and lacks:
        raise UsageError(
            f"the custom_sdpa operator of ExecuTorch's LLM runners has no attention with {lacks}",
            hint=f"take --variant {PORTABLE}: any ExecuTorch runtime has its operators",
        )


def meant_by(wanted: str, *, recipe: str) -> str:
    """Return a recipe's storage as it is."""
    del recipe
    return wanted


def stored_as(wanted: str, shape: "Shape", *, recipe: str) -> str:
    """Return the storage that a weight really gets."""
    del recipe
    return storage.stored_as(wanted, shape[-1])


def file_bytes(spec: "DecoderSpec", planned: tuple["Weight", ...], variant: str) -> int:
    """Return about how large the program gets."""
    parts = [part for weight in planned for part in weight.parts]
    return size.file_bytes(spec, parts, uses_llm_operators=variant == LLM)


def computes_half(recipe: str) -> bool:
    """Return False: all is computed in float32, whatever weights are stored as."""
    del recipe
    return False


def notes(recipe: str) -> tuple[str, ...]:
    """Return nothing: a recipe is what its name says."""
    del recipe
    return ()


def memory_use(spec: "DecoderSpec", layout: "Layout", *, context_tokens: int) -> "MemoryUse":
    """Return what ExecuTorch will hold."""
    return memory.use(spec, layout, context_tokens=context_tokens)


def metadata(spec: "DecoderSpec", variant: str, *, context_tokens: int) -> Mapping[str, Any]:
    """Tell a runner whether attention is its own operator."""
    del spec, context_tokens
    return {"use_sdpa_with_kv_cache": variant == LLM}


def write(job: "Job", path: Path) -> Mapping[str, Any]:
    """Write the program, one block of rows in memory at a time."""
    from edgekit.formats.executorch import assembly
    from edgekit.formats.executorch.backends.xnnpack import wrapper

    lowered = wrapper.lower(
        job.spec,
        job.storages,
        context_tokens=job.context_tokens,
        uses_llm_operators=job.variant == LLM,
        constants=job.constants,
    )
    found = coverage.report(lowered.coverage, job.weights, id=ID, name=NAME)
    parts = [part for weight in job.weights for part in weight.parts]
    assembly.assemble(lowered, parts).write(job, path)
    return found


def contents(path: Path, head: "Program") -> list[tuple[str, "Shape", str]]:
    """Return name, shape and storage of every weight."""
    return named_weights(path, head, reading.delegated)
