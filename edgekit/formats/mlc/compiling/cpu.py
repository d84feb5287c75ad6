"""A library for the processor of this machine, compiled once for each shape."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.formats.mlc.compiling import cpu_attention_kernels, library, tools
from edgekit.formats.mlc.compiling.cpu_kernels import CpuKernels


if TYPE_CHECKING:
    from edgekit.formats.mlc.compiling.shape import LibraryShape


def target() -> Any:
    """Return this machine's processor, as TVM names it."""
    import tvm
    from tvm.target import codegen

    return tvm.target.Target(
        {
            "kind": "llvm",
            "mtriple": codegen.llvm_get_system_triple(),
            "mcpu": codegen.llvm_get_system_cpu(),
        }
    )


def compiled(shape: "LibraryShape") -> Path:
    """Return a library, compiled now unless one of this shape is kept."""
    return tools.library(shape.key(str(target())), "model.so", lambda path: compile_to(path, shape))


def compile_to(path: Path, shape: "LibraryShape") -> None:
    """Compile a library and write it, a shared object."""
    import tvm
    from tvm import relax

    where = target()
    with where:
        module = library.written(shape, CpuKernels(), where)
        module = with_own_attention(module, shape)
        with tvm.transform.PassContext(opt_level=3):
            built = relax.build(module, target=where, relax_pipeline=pipeline())
    built.export_library(str(path))


def with_own_attention(module: Any, shape: "LibraryShape") -> Any:
    """Put edgekit's attention in the place of TVM's functions of the same names."""
    a = shape.spec.attention
    own = cpu_attention_kernels.replacements(
        a.heads, a.num_kv_heads, a.head_dim, shape.dtype, shape.window_tokens or 1024
    )
    for name, function in own.items():
        place = module.get_global_var(name)
        module[place] = function.with_attr("global_symbol", name)
    return module


def pipeline() -> Any:
    """Return what makes calls of kernels of the operations of a module."""
    import tvm
    from tvm import relax

    return tvm.transform.Sequential(
        [
            relax.transform.LegalizeOps(),
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FoldConstant(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
            relax.transform.DeadCodeElimination(),
            relax.get_pipeline("default_build"),
        ]
    )
