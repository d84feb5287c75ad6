"""From the modules of a decoder to an ExecuTorch program whose arithmetic XNNPACK does.

Passes over a graph cost Python time for every node, and a whole decoder of 30 layers keeps them
busy for many minutes. But its layers are one program with different weights: `delegates` writes it
down once for each shape. What torch and ExecuTorch must see as a whole are the caches between the
segments: some nodes a layer.
"""

from collections.abc import Mapping
from typing import Any

# This is the workstation's half: nothing that runs on a device imports it.
import torch  # noqa: TID253

from edgekit.formats.executorch import embeddings, lowering
from edgekit.formats.executorch.assembly import Lowered
from edgekit.formats.executorch.backends.xnnpack import limits
from edgekit.formats.executorch.backends.xnnpack.decoder import XnnpackDecoder
from edgekit.formats.executorch.backends.xnnpack.delegates import Segments
from edgekit.formats.executorch.coverage import Coverage
from edgekit.formats.executorch.planned import TABLES, shapes
from edgekit.model.spec import DecoderSpec
from edgekit.runtime.silence import silence


def lower(
    spec: DecoderSpec,
    tensor_types: Mapping[str, str],
    *,
    context_tokens: int,
    uses_llm_operators: bool,
    constants: Mapping[str, Any],
) -> Lowered:
    """Return the program of a decoder.

    Args:
        spec: The decoder.
        tensor_types: How each weight is stored, by role.
        context_tokens: How many tokens its caches hold.
        uses_llm_operators: Whether attention and caches are operators of ExecuTorch's LLM runners.
        constants: What methods without arguments return, by name.
    """
    with silence(), torch.no_grad():
        made = Segments(spec, tensor_types, context_tokens, uses_llm_operators=uses_llm_operators)
        held = dict(shapes(spec))
        tables = {
            role: embeddings.empty(role, held[role], tensor_types[role])
            for role in TABLES
            if role in held
        }
        decoder = XnnpackDecoder(
            spec,
            tables={role: table.module for role, table in tables.items()},
            segments=made.modules,
            context_tokens=context_tokens,
            uses_llm_operators=uses_llm_operators,
        )
        if uses_llm_operators:
            from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401 - operators
        longest = limits.call_tokens(spec, context_tokens=context_tokens)
        program = lowering.emit(decoder, constants, longest_tokens=longest)
        lowering.close_gaps(program)
        return Lowered(
            program=program,
            numbers=made.numbers,
            slices=made.slices,
            tables=lowering.spread_tables(
                program, [part for table in tables.values() for part in table.stand_ins]
            ),
            coverage=Coverage(
                delegated_operators=made.operators,
                delegated_weights=frozenset(made.weights),
                portable_operators=lowering.portable_calls(program),
            ),
        )
