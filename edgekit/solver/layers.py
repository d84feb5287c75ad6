"""All matrices of a decoder, layer by layer, each solved for the inputs that it will really get.

A calibration text passes through the layers. Before it leaves one, the layer's matrices are solved
for what reached them, and it goes on through the solved ones: later layers make up for what earlier
ones err by. One layer's weights and second moments are in memory at a time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from edgekit.errors import UsageError
from edgekit.formats import DecoderWeights
from edgekit.progress import Listener
from edgekit.proof.interpreter import Stream
from edgekit.quant.lattice import Lattice
from edgekit.quant.recipe import split_role
from edgekit.solver.feedback import Feedback, solve


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    Rows: TypeAlias = npt.NDArray[np.float32]
    Stored: TypeAlias = npt.NDArray[np.generic]
    Moment: TypeAlias = npt.NDArray[np.float64]


_TOKENS_AT_ONCE = 2048  # for a second moment: 50 MiB for a width of 6,144


def solve_layers(
    model: DecoderWeights,
    texts: Sequence[Sequence[int]],
    lattices: Mapping[str, Lattice],
    *,
    reads_as: Callable[[str], str],
    listener: Listener,
) -> "dict[str, list[Stored]]":
    """Return what an artifact stores of every matrix, an array with the rows first for each part.

    Experts are solved for what all of them read together.

    Args:
        model: The decoder and its weights.
        texts: Token ids of a calibration text, in pieces.
        lattices: Of what is solved, by role.
        reads_as: Returns the first of the roles that read the same inputs as one does.
        listener: Who is told how far it is.

    Raises:
        UsageError: If a weight is too large for its scales, or an input is NaN or infinite: the
            message names the matrix.
    """
    partly = _PartlySolved(model)
    stream, depth = Stream(partly, texts), len(model.spec.layers)
    stored: dict[str, list[Stored]] = {}
    work = 2 * depth * sum(map(len, texts))
    with listener.track("solve", work) as advance:
        for index in range(depth):
            here = [role for role in lattices if split_role(role)[0] == index]
            moments = _Moments({reads_as(role) for role in here})
            stream.look_through(index, observe=moments.observe, advance=advance)
            for role, factored in _factored(here, moments, lattices, reads_as):
                weight = model.weight(role)  # the matrices of experts, one below the other
                try:
                    solved = solve(weight.reshape(-1, weight.shape[-1]), factored, lattices[role])
                except UsageError as error:
                    raise UsageError(f"{role}: {error}", hint=error.hint) from error
                stored[role] = solved.stored
                partly.solved[role] = solved.values.reshape(weight.shape)
            stream.pass_through(index, advance=advance)
            partly.solved.clear()
    return stored


def _factored(
    roles: Sequence[str],
    moments: "_Moments",
    lattices: Mapping[str, Lattice],
    reads_as: Callable[[str], str],
) -> Iterator[tuple[str, Feedback]]:
    """Yield each role with the factor of its inputs, which is made once for all that share it."""
    made: dict[tuple[str, int], Feedback] = {}
    for role in roles:
        key = reads_as(role), lattices[role].block_weights
        if key not in made:
            made[key] = Feedback.of(moments.of(key[0]), block_weights=key[1])
        yield role, made[key]


class _Moments:
    """Sums of x x^T, by the role that reads x."""

    def __init__(self, roles: set[str]) -> None:
        self._roles = roles
        self._waiting: dict[str, list[torch.Tensor]] = {}  # added at once: sums take long to write
        self._sums: dict[str, Moment] = {}

    def observe(self, role: str, x: "torch.Tensor") -> None:
        if role not in self._roles:
            return
        if not bool(x.isfinite().all()):
            raise UsageError(
                f"what {role} is multiplied with is NaN or infinite on the calibration text",
                hint="the model overflows float32; --quant-method native needs no calibration",
            )
        waiting = self._waiting.setdefault(role, [])
        waiting.append(x)
        if sum(map(len, waiting)) >= _TOKENS_AT_ONCE:
            self._add(role)

    def of(self, role: str) -> "Moment":
        """Return the sum over all that was observed: float64 ``(columns, columns)``."""
        if self._waiting.get(role):
            self._add(role)
        return self._sums[role]

    def _add(self, role: str) -> None:
        import torch

        x = torch.cat(self._waiting.pop(role))
        moment = (x.T @ x).double().numpy()
        self._sums[role] = self._sums[role] + moment if role in self._sums else moment


class _PartlySolved:
    """A model, of which some matrices are what an artifact will hold."""

    def __init__(self, model: DecoderWeights) -> None:
        self.spec = model.spec
        self.solved: dict[str, Rows] = {}
        self._model = model

    def weight(self, role: str, first_row: int = 0, rows: int | None = None) -> "Rows":
        if role in self.solved:
            return self.solved[role][first_row : None if rows is None else first_row + rows]
        return self._model.weight(role, first_row, rows)
