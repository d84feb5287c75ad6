"""Programs for XNNPACK: attention by plain operators, or by the one of ExecuTorch's LLM runners."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.formats.executorch import assembly, coverage, memory
from edgekit.formats.executorch.backends import xnnpack
from edgekit.formats.executorch.backends._writing import BackendWriting
from edgekit.formats.executorch.backends.xnnpack import attention, limits, size


if TYPE_CHECKING:
    from edgekit.formats import Layout, MemoryUse
    from edgekit.formats.executorch.planned import Job, ProgramWeight
    from edgekit.model.spec import DecoderSpec


class XnnpackWriting(BackendWriting):
    """All is computed in float32, and a tensor type is what its name says."""

    backend = xnnpack.BACKEND

    def notes(self, spec: "DecoderSpec", variant: str) -> Iterator[str]:
        """Yield which layers the operator of LLM runners leaves to others, and what stays fine."""
        found = attention.note(spec) if variant == xnnpack.LLM else None
        yield from () if found is None else (found,)
        if spec.has_delta_nets:
            yield (
                f"a call reads at most {limits.CALL_TOKENS} tokens of a prompt; taps, decays, "
                "betas and alphas of delta nets are float32 in every recipe, their other matrices "
                "of eight bits at least"
            )
        elif spec.has_states:
            yield "the taps of convolutions are float32 in every recipe"

    def file_bytes(
        self, spec: "DecoderSpec", planned: tuple["ProgramWeight", ...], variant: str
    ) -> int:
        """Return about how large the program gets."""
        parts = [part for weight in planned for part in weight.parts]
        return size.file_bytes(spec, parts, uses_llm_operators=variant == xnnpack.LLM)

    def constants(
        self, spec: "DecoderSpec", variant: str, *, context_tokens: int
    ) -> Mapping[str, Any]:
        """Tell a runner how many tokens it may have read at once."""
        longest = limits.call_tokens(spec, context_tokens=context_tokens)
        return {**self.backend.builds[variant].constants, "get_max_seq_len": longest}

    def memory_use(
        self, spec: "DecoderSpec", layout: "Layout", *, context_tokens: int
    ) -> "MemoryUse":
        """Return what ExecuTorch will hold."""
        longest = limits.call_tokens(spec, context_tokens=context_tokens)
        return memory.use(spec, layout, context_tokens=context_tokens, call_tokens=longest)

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
