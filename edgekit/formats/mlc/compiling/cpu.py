"""A library for the processor of this machine, compiled once for each shape."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.formats.mlc.compiling import attention_kernels, cpu_attention_kernels, library, tools
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
        attention_kernels.replace_own(module, shape, cpu_attention_kernels.attend, suffix="_cpu")
        with tvm.transform.PassContext(opt_level=3):
            module = kernels_of(module)
            built = relax.build(module, target=where, relax_pipeline="default_build")
    built.export_library(str(path))


def kernels_of(module: Any) -> Any:
    """Return a module whose operations are calls of kernels, those next to each other fused."""
    import tvm
    from tvm import relax

    fuse = tvm.transform.Sequential(
        [
            relax.transform.LegalizeOps(),
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FoldConstant(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
            relax.transform.DeadCodeElimination(),
        ]
    )
    return fuse(module)
