"""What layers keep of a text instead of keys and values, between two segments of a decoder.

A state holds what was read last, of whatever text: positions hide nothing of it. So the program
itself begins anew with zeros where a call begins at position 0.
"""

# This is the workstation's half: nothing that runs on a device imports it.
import torch  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253

from edgekit.formats.executorch.backends.xnnpack import delta_net, short_conv
from edgekit.model.mixers import DeltaNet
from edgekit.model.spec import DecoderSpec


CONV, RECURRENT = "conv", "recurrent"  # as mixers name what they keep


class States(nn.Module):  # type: ignore[misc]  # it is Any here
    """The states of all layers, as float32 buffers that a call of the program changes."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.spec = spec
        for index, name, shape in spec.states():
            # A convolution's columns as rows: they come and go token by token.
            laid = torch.zeros(1, *(shape[::-1] if name == CONV else shape))
            self.register_buffer(f"{name}_{index}", laid, persistent=False)
        if any(name == RECURRENT for _, name, _ in spec.states()):
            self.register_buffer("masks", delta_net.masks(), persistent=False)

    def read(self, index: int, start: "Start", x: Tensor, *made: Tensor) -> tuple[Tensor, ...]:
        """Return what the next segment reads first: x and what the second half of a layer needs.

        Args:
            index: Of the layer, which keeps a state.
            start: What this call begins with.
            x: The residual stream.
            made: What else the segment before made; what the convolution sees is the last.
        """
        *gates, seen = made
        conv = self.get_buffer(f"{CONV}_{index}")
        window = short_conv.window(start.of(conv), seen)
        conv.copy_(window.kept.view(conv.shape))
        is_last = index == len(self.spec.layers) - 1  # only the last token's logits are wanted
        if not isinstance(self.spec.mixer(index), DeltaNet):
            rows = (x, *gates, *window.slices)
            return tuple(row[-1:] for row in rows) if is_last else rows
        gate, *others = gates
        tokens = seen.shape[0]
        masks = self.get_buffer("masks")[:, :tokens, :tokens]
        state = start.of(self.get_buffer(f"{RECURRENT}_{index}"))
        given = (*others, masks, state, *window.slices)
        if not is_last:
            return x, gate, *given
        chosen = start.input_pos == start.input_pos[-1:]
        return x[-1:], gate[-1:], *given, chosen.to(torch.float32)[None, None]

    def keep(self, index: int, *made: Tensor) -> tuple[Tensor, ...]:
        """Return what a segment made without the new state of the layer it ends, which is kept."""
        if not isinstance(self.spec.mixer(index), DeltaNet):
            return made
        state, *others = made
        self.get_buffer(f"{RECURRENT}_{index}").copy_(state[None])
        return tuple(others)


class Start:
    """What states a call begins with: those that were kept, or zeros where a text begins.

    Chosen, not multiplied with zero: memory that nobody has written yet may hold NaN. And chosen as
    a row of two, which is copied: `where` asks for every number by itself, which took 10 ms of a
    layer of Qwen 3.5 0.8B.
    """

    def __init__(self, input_pos: Tensor) -> None:
        self.input_pos = input_pos  # ``(tokens,)``, int64
        self._row = (input_pos[:1] > 0).to(torch.int64)
        self._zeros: dict[torch.Size, Tensor] = {}

    def of(self, state: Tensor) -> Tensor:
        """Return a state without its first axis, which has length 1."""
        zeros = self._zeros.setdefault(state.shape, torch.zeros(state.shape))
        rows = torch.cat((zeros, state)).index_select(0, self._row)
        return rows.view(state.shape[1:])
