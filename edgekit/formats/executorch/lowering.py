"""From modules of torch to an ExecuTorch program around what a back-end computes."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

# This is the workstation's half: nothing that runs on a device imports it.
import torch  # noqa: TID253
from torch import Tensor, fx, nn  # noqa: TID253

from edgekit.formats.executorch.embeddings import StandIn


TRACED_TOKENS = 3  # any number but those of a model's axes


def delegate(
    backend: str,
    content: bytes,
    shapes: Callable[..., tuple[Tensor, ...]],
    *,
    settings: Mapping[str, bytes] | None = None,
) -> nn.Module:
    """Return what a back-end computes, as a module that a decoder is exported with.

    Args:
        backend: The name of the back-end.
        content: What its runtime reads.
        shapes: From inputs to outputs, of which tracing asks for no more than the shapes.
        settings: What else its runtime is told, by key.
    """
    from executorch.exir.backend.compile_spec_schema import CompileSpec
    from executorch.exir.lowered_backend_module import LoweredBackendModule

    told = [CompileSpec(key, value) for key, value in (settings or {}).items()]
    made: nn.Module = LoweredBackendModule(_StandIn(shapes), backend, content, told)
    return made


class _StandIn:
    """Stands for the program of torch that a delegate was made of."""

    def __init__(self, shapes: Callable[..., tuple[Tensor, ...]]) -> None:
        self._shapes = shapes
        self.graph = fx.Graph()  # to be looked through for debug handles
        self.graph.output(())

    def module(self) -> Callable[..., tuple[Tensor, ...]]:
        return self._shapes


def emit(decoder: nn.Module, constants: Mapping[str, Any], *, longest_tokens: int) -> Any:
    """Return the program of a module with delegates: tokens and their positions in, logits out.

    Args:
        decoder: The module.
        constants: What methods without arguments return, by name.
        longest_tokens: How many are read at once, at most.
    """
    import executorch.kernels.quantized  # noqa: F401 - operators

    tokens = torch.export.Dim("tokens", min=1, max=longest_tokens)
    exported = torch.export.export(
        decoder,
        (torch.zeros(1, TRACED_TOKENS, dtype=torch.int64), torch.arange(TRACED_TOKENS)),
        dynamic_shapes=({1: tokens}, {0: tokens}),
        strict=False,
    )
    return program_of(exported, constants)


def program_of(exported: Any, constants: Mapping[str, Any]) -> Any:
    """Return the program of what torch has exported, of executorch.exir.schema."""
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge

    edge = to_edge(
        exported,
        constant_methods=dict(constants),
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
    )
    made = edge.to_executorch(ExecutorchBackendConfig(run_reinplace_pass=True))
    return made.executorch_program


_PLANNED = 1  # the memory that tensors share
_MEMORY_ALIGNMENT = 16


def close_gaps(program: Any) -> None:
    """Take out of the memory plan what no tensor uses.

    ExecuTorch 1.5.1 plans room for the caches as written and again for the caches themselves.
    """
    placed = [
        (tensor, tensor.allocation_info.memory_offset, _size_bytes(tensor))
        for tensor in _tensors(program)
        if tensor.allocation_info and tensor.allocation_info.memory_id == _PLANNED
    ]
    end = moved_by = 0
    for tensor, offset, size in sorted(placed, key=lambda entry: entry[1]):
        moved_by += max(0, offset - end)
        high, low = divmod(offset - moved_by, 2**32)
        tensor.allocation_info.memory_offset_high = high
        tensor.allocation_info.memory_offset_low = low
        end = max(end, offset + -(-size // _MEMORY_ALIGNMENT) * _MEMORY_ALIGNMENT)
    program.execution_plan[0].non_const_buffer_sizes[_PLANNED] = end - moved_by


def _size_bytes(tensor: Any) -> int:
    from executorch.exir.tensor import get_scalar_type

    items: int = math.prod(tensor.sizes)
    return items * int(get_scalar_type(tensor.scalar_type).itemsize)


def _tensors(program: Any) -> Iterator[Any]:
    from executorch.exir.schema import Tensor as SchemaTensor

    for value in program.execution_plan[0].values:
        if isinstance(value.val, SchemaTensor):
            yield value.val


def spread_tables(program: Any, stand_ins: Iterable[StandIn]) -> dict[int, str]:
    """Give tables the shapes that they will have.

    Returns:
        Which constants are parts of them, and the keys of those.
    """
    contents = [buffer.storage for buffer in program.constant_buffer]
    found = {contents.index(stand_in.content): stand_in for stand_in in stand_ins}
    for tensor in _tensors(program):
        if tensor.data_buffer_idx in found and not tensor.allocation_info:
            tensor.sizes = list(found[tensor.data_buffer_idx].shape)
    return {index: stand_in.key for index, stand_in in found.items()}


def portable_calls(program: Any) -> dict[str, int]:
    """Return how often a program calls each of ExecuTorch's own kernels."""
    from executorch.exir.schema import KernelCall

    plan = program.execution_plan[0]
    counts: dict[str, int] = {}
    for instruction in plan.chains[0].instructions:
        call = instruction.instr_args
        if isinstance(call, KernelCall):
            operator = plan.operators[call.op_index]
            name = f"{operator.name}.{operator.overload}".rstrip(".")
            counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))
