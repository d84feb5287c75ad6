"""What every part of a graph is made with: operators in order, and small constants by value."""

from dataclasses import dataclass, field

from edgekit.formats.onnx.model import Attribute, Constant, Dtype, Node
from edgekit.formats.onnx.tensor_types import GraphBuild


FLOAT32, INT32, FLOAT16 = 1, 6, 10  # TensorProto.DataType
TO_THE_END = 2**63 - 1


@dataclass(kw_only=True)
class Operators:
    """Collects operators; every method adds some and returns the name of what they make."""

    how: GraphBuild
    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, Constant] = field(default_factory=dict)

    def op(
        self,
        op: str,
        *inputs: str,
        domain: str = "",
        outputs: tuple[str, ...] = (),
        **attributes: Attribute,
    ) -> str:
        """Add an operator and return its first output."""
        outputs = outputs or (f"{op}_{len(self.nodes)}",)
        self.nodes.append(
            Node(op=op, inputs=inputs, outputs=outputs, domain=domain, attributes=attributes)
        )
        return outputs[0]

    def constant(self, *values: float, dtype: Dtype = "int64", is_scalar: bool = False) -> str:
        """Return numbers, a row of them unless it is a scalar."""
        shape = () if is_scalar else (len(values),)
        name = "_".join((dtype, *map(str, values), *("scalar",) * is_scalar))
        self.constants[name] = Constant(name=name, dtype=dtype, shape=shape, values=values)
        return name

    def scalar(self, value: float, *, dtype: Dtype = "float32") -> str:
        """Return one number."""
        return self.constant(value, dtype=dtype, is_scalar=True)

    def narrowed(self, x: str) -> str:
        """Return what products take; what is added up over all layers may outgrow float16."""
        return self.op("Cast", x, to=FLOAT16) if self.how.is_half else x

    def widened(self, x: str) -> str:
        """Return in float32 what a product gave."""
        return self.op("Cast", x, to=FLOAT32) if self.how.is_half else x
