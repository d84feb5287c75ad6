"""The program around a model of Core ML: it keeps the cache, which a delegate reads."""

from collections.abc import Mapping
from typing import Any

# This is the workstation's half: nothing that runs on a device imports it.
import torch  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253

from edgekit.formats.executorch import lowering
from edgekit.formats.executorch.backends.coreml import decoder
from edgekit.model.spec import DecoderSpec
from edgekit.runtime.silence import silence


def delegate(spec: DecoderSpec, *, backend: str, compute_units: str) -> nn.Module:
    """Return what stands for a model of Core ML; it has no content yet.

    Args:
        spec: The decoder.
        backend: The name of the delegate.
        compute_units: Which processors of a device compute, by the delegate's name.
    """

    def outputs(tokens: Tensor, _: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        logits = torch.empty(len(tokens), spec.vocab_size)
        return logits, *(cache.new_empty(cache[:, :1].shape) for cache in caches)

    units = {"compute_units": compute_units.encode()}
    with silence():
        return lowering.delegate(backend, b"", outputs, settings=units)


def emit(
    spec: DecoderSpec, model: nn.Module, *, context_tokens: int, constants: Mapping[str, Any]
) -> Any:
    """Return a program of executorch.exir.schema.

    Args:
        spec: The decoder.
        model: From token, position and caches to logits and what to add to the caches.
        context_tokens: How many tokens the caches hold.
        constants: What methods without arguments return, by name.
    """
    with silence(), torch.no_grad():
        one = torch.zeros(1, dtype=torch.int64)
        exported = torch.export.export(
            _Decoder(spec, model, context_tokens), (one[None], one), strict=False
        )
        program = lowering.program_of(exported, constants)
        lowering.close_gaps(program)
        _empty_constants(program)
        return program


def _empty_constants(program: Any) -> None:
    """Give a program without constants the segment for them that runtimes look for."""
    from executorch.exir.schema import DataSegment, SubsegmentOffsets

    program.segments = [DataSegment(offset=0, size=0)]
    program.constant_segment = SubsegmentOffsets(segment_index=0, offsets=[0])
    program.constant_buffer = []


class _Decoder(nn.Module):  # type: ignore[misc]  # it is Any here
    """Adds to the caches what a model says: ExecuTorch sets them to zero when it loads them."""

    def __init__(self, spec: DecoderSpec, model: nn.Module, context_tokens: int) -> None:
        super().__init__()
        self.model, self.names = model, decoder.caches(spec)
        shape = decoder.cache_shape(spec, context_tokens)
        for name in self.names:
            cache = torch.zeros(shape, dtype=torch.float16)
            self.register_buffer(name, cache, persistent=False)

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        caches = [self.get_buffer(name) for name in self.names]
        logits, *added = self.model(tokens, input_pos, *caches)
        for cache, new in zip(caches, added, strict=True):
            torch.ops.aten.index_put_(cache, [None, input_pos], new)
        return logits
