"""A library for browsers with WebGPU, compiled once for each shape: WebAssembly and its shaders."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.errors import UsageError
from edgekit.formats.mlc.compiling import (
    attention_kernels,
    cpu,
    tools,
    web_library,
    web_runtime,
    webgpu_attention_kernels,
)
from edgekit.formats.mlc.compiling.webgpu_kernels import WebGpuKernels
from edgekit.model.mixers import DeltaNet


if TYPE_CHECKING:
    from edgekit.formats.mlc.compiling.shape import LibraryShape

# As few instructions as every browser, and Debian's linker, knows.
HOST = {"kind": "llvm", "mtriple": "wasm32-unknown-unknown-wasm", "mcpu": "mvp"}
MOST_THREADS = 256  # of a workgroup, which WebGPU has everywhere
# What WebLLM never asks of a cache: several continuations of a text at once, and latent attention.
_UNUSED = ("batch_tree_attn", "tree_attn_paged_kv", "tir_kv_cache_transpose_append_mla")


def target() -> Any:
    """Return a browser with WebGPU, as TVM names it."""
    import tvm

    return tvm.target.Target({"kind": "webgpu"}, host=HOST)


def compiled(shape: "LibraryShape") -> Path:
    """Return a library, compiled now unless one of this shape is kept."""
    return tools.library(shape.key(str(HOST)), "model.wasm", lambda path: compile_to(path, shape))


def refuse(shape: "LibraryShape") -> None:
    """Check that a library for browsers can hold a model.

    Raises:
        UsageError: If it cannot.
    """
    for layer in shape.spec.layers:
        net = layer.mixer
        if isinstance(net, DeltaNet) and net.value_head_dim > MOST_THREADS:
            raise UsageError(
                f"a library for browsers has {MOST_THREADS} threads for the values of a head, the "
                f"checkpoint's are {net.value_head_dim} wide",
                hint="another format has them: --format gguf",
            )


def compile_to(path: Path, shape: "LibraryShape") -> None:
    """Compile a library and link it with TVM's runtime."""
    import tvm
    from tvm import relax
    from tvm.s_tir import dlight

    where = target()
    with where:
        module = web_library.written(shape, WebGpuKernels(), where)
        attention_kernels.replace_own(module, shape, webgpu_attention_kernels.attend)
        for name in _UNUSED:
            attention_kernels.put(module, name, attention_kernels.nothing())
        with tvm.transform.PassContext(opt_level=3):
            schedule = dlight.ApplyDefaultSchedule(
                dlight.gpu.Reduction(), dlight.gpu.GeneralReduction(), dlight.gpu.Fallback()
            )
            module = schedule(cpu.kernels_of(module))
            built = relax.build(module, target=where, relax_pipeline=_pipeline(), system_lib=True)
    built.export_library(str(path), fcompile=_linked)


def _linked(out: str, objects: Sequence[str], **options: Any) -> None:
    del options
    web_runtime.link(objects, Path(out))


_linked.object_format = "o"  # type: ignore[attr-defined] # Emscripten cannot read a newer bitcode


def _pipeline() -> Any:
    """Return TVM's own last steps, and one that makes two libraries of a shape the same."""
    import tvm
    from tvm import relax

    put_in_order = tvm.transform.module_pass(_with_sizes_in_order, opt_level=0)
    return tvm.transform.Sequential([relax.get_pipeline("default_build"), put_in_order])


def _with_sizes_in_order(module: Any, _context: Any) -> Any:
    """Return a module that computes sizes in the order of their places: TVM's has no order."""
    from tvm import tirx

    for place, function in module.functions_items():
        if place.name_hint.startswith("shape_func") and isinstance(function.body, tirx.SeqStmt):
            steps = sorted(function.body.seq, key=lambda step: int(step.indices[0]))
            module[place] = function.with_body(tirx.SeqStmt(steps))
    return module
