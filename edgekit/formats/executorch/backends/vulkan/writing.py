"""Programs for Vulkan: the whole decoder with its cache in one delegate."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.errors import UsageError
from edgekit.formats.executorch import assembly, coverage, kinds, tensor_types
from edgekit.formats.executorch.backends import vulkan
from edgekit.formats.executorch.backends._writing import BackendWriting
from edgekit.formats.executorch.backends.vulkan import limits, memory, size


if TYPE_CHECKING:
    from edgekit.formats import Layout, MemoryUse
    from edgekit.formats.executorch.planned import Job, ProgramWeight
    from edgekit.model.shapes import Shape
    from edgekit.model.spec import DecoderSpec


BATCH_TOKENS = 128  # are read at once, unless scores of so many outgrow a buffer
_ROTARY_LANES = 8  # channels that its shader rotates together
_ROW_LANES = 4  # rows of four bits that it packs together


class VulkanWriting(BackendWriting):
    """The delegate computes in float16 or float32, as weights are stored."""

    backend = vulkan.BACKEND

    def refuse(self, spec: "DecoderSpec", variant: str, *, context_tokens: int) -> None:
        """Check that the delegate computes a decoder in texts this long.

        Raises:
            UsageError: If not; it names what the delegate lacks, or how far it goes.
        """
        del variant
        hint = "take --variant portable: XNNPACK computes it on the phone's CPU"
        kinds.refuse(spec, self.backend.name, hint=hint)
        lacks = next(_lacks(spec), None)
        if lacks:
            raise UsageError(f"the Vulkan delegate of ExecuTorch has no {lacks}", hint=hint)
        _refuse_context(spec, context_tokens)

    def meant_by(self, wanted: str, *, recipe: str) -> str:
        """Return float16 for all where it computes in that, else the delegate's own four bits."""
        return (
            "F16"
            if recipe in self.backend.half_recipes
            else tensor_types.ACROSS.get(wanted, wanted)
        )

    def stored_as(self, wanted: str, shape: "Shape", *, recipe: str) -> str:
        """Return the tensor type that a weight really gets.

        Its int8 is for one row of inputs, so matrices that fill no group of four bits stay F32.
        """
        del recipe
        if wanted not in tensor_types.VULKAN_FOUR_BITS:
            return wanted
        rows, columns = shape
        fits = tensor_types.stored_as(wanted, columns)
        return fits if fits in tensor_types.VULKAN_FOUR_BITS and rows % _ROW_LANES == 0 else "F32"

    def file_bytes(
        self, spec: "DecoderSpec", planned: tuple["ProgramWeight", ...], variant: str
    ) -> int:
        """Return about how large the program gets."""
        del variant
        return size.file_bytes(spec, [part for weight in planned for part in weight.parts])

    def constants(
        self, spec: "DecoderSpec", variant: str, *, context_tokens: int
    ) -> Mapping[str, Any]:
        """Tell a runner how many tokens it may have read at once."""
        del variant
        return {"get_max_seq_len": batch_tokens(spec, context_tokens=context_tokens)}

    def memory_use(
        self, spec: "DecoderSpec", layout: "Layout", *, context_tokens: int
    ) -> "MemoryUse":
        """Return what the phone will hold, its GPU's part included."""
        batch = batch_tokens(spec, context_tokens=context_tokens)
        return memory.use(spec, layout, context_tokens=context_tokens, batch_tokens=batch)

    def write(self, job: "Job", path: Path) -> Mapping[str, Any]:
        """Write the program, one block of rows in memory at a time."""
        from edgekit.formats.executorch.backends.vulkan import wrapper

        lowered = wrapper.lower(
            job.spec,
            job.tensor_types,
            context_tokens=job.context_tokens,
            batch_tokens=batch_tokens(job.spec, context_tokens=job.context_tokens),
            constants=job.constants,
        )
        report = coverage.report(
            lowered.coverage, job.weights, id=self.backend.id, name=self.backend.name
        )
        parts = [part for weight in job.weights for part in weight.parts]
        assembly.assemble(lowered, parts).write(job, path)
        return report


WRITING = VulkanWriting()


def _lacks(spec: "DecoderSpec") -> Iterator[str]:
    a = spec.attention
    if a.attn_logit_softcap is not None:
        yield "attention with a cap on scores"
    if spec.final_logit_softcap is not None:
        yield "cap on logits"
    widths = {layer.rope.width for layer in spec.layers if layer.rope}
    if any(width % _ROTARY_LANES for width in widths):
        yield f"rope over {min(widths)} channels: they must be a multiple of {_ROTARY_LANES}"


def batch_tokens(spec: "DecoderSpec", *, context_tokens: int) -> int:
    """Return how many tokens are read at once: their scores of all heads are one buffer."""
    score_bytes = 4 * spec.attention.heads * context_tokens
    most = max(1, (limits.BUFFER_BYTES - 1) // score_bytes // 4 * 4)
    return min(BATCH_TOKENS, context_tokens, most)


def _refuse_context(spec: "DecoderSpec", context_tokens: int) -> None:
    """Check that attention sees all it should and that no position is rotated differently."""
    border = spec.original_max_position_embeddings
    windows = [layer.window_tokens for layer in spec.layers if layer.window_tokens]
    for most, why in (
        (border, "beyond, every position is rotated differently, and no text is read again"),
        (min(windows, default=None), "attention looks back no further, and the delegate's would"),
    ):
        if most is not None and context_tokens > most:
            raise UsageError(
                f"{context_tokens} tokens of context are too many for Vulkan in ExecuTorch: "
                f"this model has {most} there, as {why}",
                hint=f"take --context {most}, or --variant portable",
            )
