"""MLPs of which every token takes a few, in ONNX Runtime's ``MoE`` and ``QMoE``.

The operators take a softmax of what they are given, then the largest. So they are given the
logarithm of the score of each expert that a token takes, and next to nothing for the others: the
softmax is then the share of each, whatever chose them. Gate and up are in one matrix, row by row in
turn, which the runtime makes once, at load.
Source: docs/ContribOperators.md of ONNX Runtime 1.32, whose ``MoE`` on a CPU knows no other order.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from edgekit.formats.onnx import tensor_types
from edgekit.formats.onnx.model import CONTRIB
from edgekit.formats.onnx.operators import FLOAT32, Operators
from edgekit.formats.onnx.tensor_types import SCALES, ZERO_POINTS
from edgekit.model.spec import EXPERT_EPSILON, EXPERT_MATRICES, DecoderSpec, Experts


# ``MoE`` says in 1.25.1 what it says in 1.32. ``QMoE`` has accuracy_level from 1.31 on, with which
# a token of four bits takes half the time.
FIRST_VERSION, FIRST_IN_BLOCKS = "1.25.1", "1.31.0"
_NEVER = -1e30  # the score of what is not taken; its exponential is zero
_SMALLEST = 1e-30  # of a score, which has a logarithm


def needed_version(spec: DecoderSpec, stored: Mapping[str, str]) -> str:
    """Return the first version that has the operators of a decoder's experts.

    Args:
        spec: A decoder with experts.
        stored: The tensor type of each weight, by role.
    """
    roles = (role for role, _ in spec.weights() if role.endswith(EXPERT_MATRICES))
    in_blocks = any(stored[role] in tensor_types.BLOCKS for role in roles)
    return FIRST_IN_BLOCKS if in_blocks else FIRST_VERSION


def stored_columns(role: str, spec: DecoderSpec, *, columns: int) -> int:
    """Return how many columns a tensor type must suit: those of all matrices of an expert."""
    prefix, _, part = role.rpartition(".")
    if part not in EXPERT_MATRICES:
        return columns
    mlp = spec.mlp(int(prefix.removeprefix("layers.")))
    return math.gcd(spec.hidden_size, mlp.intermediate_size)


@dataclass(frozen=True, kw_only=True)
class ExpertsOfLayer:
    """Adds the experts of one layer to a graph."""

    graph: Operators
    experts: Experts
    hidden_size: int
    intermediate_size: int
    tensor_type: str  # of all their matrices

    def mix(self, prefix: str, x: str, logits: str) -> str:
        """Return what the experts say, of the shape of ``x``, float32 ``(batch, tokens, columns)``.

        Args:
            prefix: Of the roles of the layer.
            x: What the MLP reads.
            logits: What the router makes of it: ``(batch, tokens, experts)``.
        """
        op, constant, scalar = self.graph.op, self.graph.constant, self.graph.scalar
        flat = op("Reshape", x, constant(-1, self.hidden_size))
        scores = op("Sigmoid", op("Reshape", logits, constant(-1, self.experts.count)))
        chosen_by = op("Add", scores, f"{prefix}expert_bias") if self.experts.has_bias else scores
        outputs = tuple(f"{prefix}{name}" for name in ("best", "taken"))
        op("TopK", chosen_by, constant(self.experts.used), outputs=outputs, axis=1, sorted=0)
        taken = op("GatherElements", scores, outputs[1], axis=1)
        never = op("Add", op("Mul", scores, scalar(0)), scalar(_NEVER))
        logs = op("Log", op("Max", taken, scalar(_SMALLEST)))
        mixed = self._apply(prefix, flat, op("ScatterElements", never, outputs[1], logs, axis=1))
        total = op("ReduceSum", taken, constant(1), keepdims=1)
        if self.experts.normalizes:
            total = op("Div", total, op("Add", total, scalar(EXPERT_EPSILON)))
        return op("Reshape", op("Mul", mixed, total), op("Shape", x))

    def _apply(self, prefix: str, x: str, choice: str) -> str:
        down = f"{prefix}expert_down"
        if self.tensor_type in tensor_types.FLOATS:
            return self._call("MoE", (x, choice, self._gate_and_up(prefix), "", self._float(down)))
        blocks = tensor_types.BLOCKS[self.tensor_type]
        scales = self._gate_and_up(prefix, SCALES), down + SCALES
        inputs = [x, choice, self._gate_and_up(prefix), scales[0], "", down, scales[1], ""]
        if not blocks.is_symmetric:
            inputs += ["", "", "", self._gate_and_up(prefix, ZERO_POINTS), down + ZERO_POINTS]
        return self._call(
            "QMoE",
            inputs,
            expert_weight_bits=blocks.bits,
            block_size=blocks.weights,
            accuracy_level=self.graph.how.accuracy_level,
        )

    def _call(self, op: str, inputs: Iterable[str], **how: int) -> str:
        return self.graph.op(
            op, *inputs, domain=CONTRIB, outputs=(), k=self.experts.used,
            normalize_routing_weights=0,
            activation_type="swiglu", swiglu_fusion=1, activation_alpha=1.0, activation_beta=0.0,
            **how,
        )  # fmt: skip

    def _gate_and_up(self, prefix: str, part: str = "") -> str:
        """Return rows of both in turn, of one of the tensors that hold them."""
        axis = self.graph.constant(2)
        both = [
            self.graph.op("Unsqueeze", f"{prefix}{role}{part}", axis)
            for role in EXPERT_MATRICES[:2]
        ]
        rows = self.graph.constant(self.experts.count, 2 * self.intermediate_size, -1)
        made = self.graph.op("Reshape", self.graph.op("Concat", *both, axis=2), rows)
        return self._float(made)

    def _float(self, name: str) -> str:
        is_half = self.tensor_type == "F16"
        return self.graph.op("Cast", name, to=FLOAT32) if is_half else name
