"""The program around Vulkan's delegate: tokens and positions in, logits out."""

from collections.abc import Mapping
from typing import Any

# This is the workstation's half: nothing that runs on a device imports it.
import torch  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253

from edgekit.formats.executorch import arithmetic, embeddings, lowering
from edgekit.formats.executorch.assembly import Lowered
from edgekit.formats.executorch.backends import vulkan
from edgekit.formats.executorch.backends.vulkan import decoder
from edgekit.formats.executorch.coverage import Coverage
from edgekit.formats.executorch.positions import Positions
from edgekit.model.spec import DecoderSpec
from edgekit.runtime.silence import silence


def lower(
    spec: DecoderSpec,
    tensor_types: Mapping[str, str],
    *,
    context_tokens: int,
    batch_tokens: int,
    constants: Mapping[str, Any],
) -> Lowered:
    """Return the program of a decoder.

    Args:
        spec: The decoder.
        tensor_types: How each weight is stored, by role.
        context_tokens: How many tokens its caches hold.
        batch_tokens: How many are read at once, at most.
        constants: What methods without arguments return, by name.
    """
    with silence(), torch.no_grad():
        made = decoder.delegate(
            spec, tensor_types, context_tokens=context_tokens, batch_tokens=batch_tokens
        )
        table = embeddings.empty(
            "token_embedding",
            (spec.vocab_size, spec.hidden_size),
            tensor_types["token_embedding"],
        )
        whole = VulkanDecoder(
            spec,
            embedding=table.module,
            inner=_delegate(spec, made.content),
            context_tokens=context_tokens,
        )
        program = lowering.emit(whole, constants, longest_tokens=batch_tokens)
    return Lowered(
        program=program,
        numbers=made.numbers,
        tables=lowering.spread_tables(program, table.stand_ins),
        slices=made.slices,
        coverage=Coverage(
            delegated_operators=made.operators,
            delegated_weights=made.weights,
            portable_operators=lowering.portable_calls(program),
        ),
    )


class VulkanDecoder(nn.Module):  # type: ignore[misc]  # it is Any here
    """All that is not on the GPU, and ``inner``, which is."""

    def __init__(
        self, spec: DecoderSpec, *, embedding: nn.Module, inner: nn.Module, context_tokens: int
    ) -> None:
        super().__init__()
        self.spec, self.context_tokens = spec, context_tokens
        self.embedding, self.inner = embedding, inner
        self.positions = Positions(spec)

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        """Return ``(1, vocabulary)``.

        Args:
            tokens: ``(1, tokens)``, int64.
            input_pos: ``(tokens,)``, int64, without gaps: what was read before is in the cache.
        """
        positions = self._within(input_pos)
        rows = self.embedding(tokens.reshape(-1)) * self.spec.embedding_scale
        waves = self.positions.waves(positions)
        both = (
            torch.cat((wave, wave), -1).squeeze(1)
            for rope in arithmetic.ropes(self.spec)
            for wave in waves[rope]
        )
        growth = self.positions.growth(positions)
        grown = () if growth is None else (growth[None],)
        (logits,) = self.inner(rows[None], *both, *grown, positions)
        return logits

    def _within(self, input_pos: Tensor) -> Tensor:
        """Return the positions; no range is as long as one past the context, so that it fails.

        On the GPU nothing would: a token would be written past the end of its cache.
        """
        filled: int = input_pos[-1].item() + 1
        torch._check(filled >= 1)  # noqa: SLF001 - documented for torch.export under this name
        torch._check(filled <= self.context_tokens)  # noqa: SLF001
        return input_pos + torch.arange(filled)[:1]


def _delegate(spec: DecoderSpec, content: bytes) -> nn.Module:
    def logits(x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        return (x.new_empty(1, spec.vocab_size),)

    return lowering.delegate(vulkan.BACKEND.id, content, logits)
