"""Programs for XNNPACK: attention by plain operators, or by the one of ExecuTorch's LLM runners."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.errors import UsageError
from edgekit.formats.executorch import assembly, coverage, memory
from edgekit.formats.executorch.backends import xnnpack
from edgekit.formats.executorch.backends._writing import BackendWriting
from edgekit.formats.executorch.backends.xnnpack import size


if TYPE_CHECKING:
    from edgekit.formats import Layout, MemoryUse
    from edgekit.formats.executorch.planned import Job, ProgramWeight
    from edgekit.model.spec import DecoderSpec


class XnnpackWriting(BackendWriting):
    """All is computed in float32, and a tensor type is what its name says."""

    backend = xnnpack.BACKEND

    def refuse(self, spec: "DecoderSpec", variant: str) -> None:
        """Check that ``custom_sdpa`` computes the attention of a decoder, where it must.

        Raises:
            UsageError: If not; it names what the operator lacks.
        """
        lacks = None
        if spec.attention.attn_logit_softcap is not None:
            lacks = "a cap on scores"
        elif any(layer.window_tokens is not None for layer in spec.layers):
            lacks = "windows"
        if variant == xnnpack.LLM and lacks:
            raise UsageError(
                "the custom_sdpa operator of ExecuTorch's LLM runners has no attention with "
                f"{lacks}",
                hint=f"take --variant {xnnpack.PORTABLE}: any ExecuTorch runtime has its operators",
            )

    def file_bytes(
        self, spec: "DecoderSpec", planned: tuple["ProgramWeight", ...], variant: str
    ) -> int:
        """Return about how large the program gets."""
        parts = [part for weight in planned for part in weight.parts]
        return size.file_bytes(spec, parts, uses_llm_operators=variant == xnnpack.LLM)

    def memory_use(
        self, spec: "DecoderSpec", layout: "Layout", *, context_tokens: int
    ) -> "MemoryUse":
        """Return what ExecuTorch will hold."""
        return memory.use(spec, layout, context_tokens=context_tokens)

    def write(self, job: "Job", path: Path) -> Mapping[str, Any]:
        """Write the program, one block of rows in memory at a time."""
        from edgekit.formats.executorch.backends.xnnpack import wrapper

        lowered = wrapper.lower(
            job.spec,
            job.tensor_types,
            context_tokens=job.context_tokens,
            uses_llm_operators=job.variant == xnnpack.LLM,
            constants=job.constants,
        )
        report = coverage.report(
            lowered.coverage, job.weights, id=self.backend.id, name=self.backend.name
        )
        parts = [part for weight in job.weights for part in weight.parts]
        assembly.assemble(lowered, parts).write(job, path)
        return report


WRITING = XnnpackWriting()
