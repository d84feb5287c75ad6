"""A library for browsers with WebGPU, compiled once for each shape: WebAssembly and its shaders."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.formats.mlc.compiling import (
    attention,
    cpu,
    web_library,
    webgpu_attention_kernels,
)
from edgekit.formats.mlc.compiling.webgpu_kernels import WebGpuKernels


if TYPE_CHECKING:
    from edgekit.formats.mlc.compiling.shape import LibraryShape

# As old an instruction set as Debian's linker expects.
HOST = {"kind": "llvm", "mtriple": "wasm32-unknown-unknown-wasm", "mcpu": "mvp"}
_UNUSED = ("batch_tree_attn", "tree_attn_paged_kv", "tir_kv_cache_transpose_append_mla")


def target() -> Any:
    """Return a browser with WebGPU, as TVM names it."""
    import tvm

    return tvm.target.Target({"kind": "webgpu"}, host=HOST)


def module(shape, where):
    import tvm
    from tvm import relax
    from tvm.s_tir import dlight

    m = web_library.written(shape, WebGpuKernels(), where)
    attention.replace_own(m, shape, webgpu_attention_kernels.attend)
    for name in _UNUSED:
        m[m.get_global_var(name)] = _nothing().with_attr("global_symbol", name)
    return m


def compile_object(path: Path, shape: "LibraryShape") -> None:
    """Compile a library and write it, an object of WebAssembly that is not linked yet."""
    import tvm
    from tvm import relax
    from tvm.s_tir import dlight as dl

    where = target()
    with where:
        m = module(shape, where)
        with tvm.transform.PassContext(opt_level=3):
            m = cpu.kernels_of(m)
            m = dl.ApplyDefaultSchedule(
                dl.gpu.Reduction(), dl.gpu.GeneralReduction(), dl.gpu.Fallback()
            )(m)
            built = relax.build(m, target=where, relax_pipeline="default_build", system_lib=True)
    def fc(output, objects, **options):
        print(output, objects, options)
        import subprocess
        rt = "/tmp/h-web/rt/"
        subprocess.run(["em++", "-O1", "-std=c++17", "--no-entry", "-sWASM_BIGINT=1", "-sERROR_ON_UNDEFINED_SYMBOLS=0", "-sSTANDALONE_WASM=1", "-sALLOW_MEMORY_GROWTH=1", "-sTOTAL_MEMORY=160MB", "-o", output, rt+"wasm_runtime.o", rt+"tvmjs_support.o", rt+"webgpu_runtime.o", *objects], check=True)

    fc.object_format = "o"
    built.export_library(str(path), fcompile=fc)


def _nothing():
    from tvm.script import tirx as T

    @T.prim_func(private=True, s_tir=True)
    def nothing():
        T.func_attr({"tirx.is_scheduled": True})
        T.evaluate(0)

    return nothing
