"""Programs of Core ML, computed by numpy: a second reading of what `mil` wrote.

Files are opened by coremltools: its unflattened package, its protocol buffers, its reader of
weights. What an operator computes is what coremltools' documentation of it says.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


np = pytest.importorskip("numpy")
_FLOATS = {10: np.float16, 11: np.float32}  # of MIL's DataType
_OTHERS = {1: np.bool_, 2: np.str_, 21: np.int8, 23: np.int32}
_INT4 = 25


class Interpreter:
    """A program, and the cache that ExecuTorch keeps for it."""

    def __init__(self, package: Path, *, rounds: bool) -> None:
        """Load a package.

        Args:
            package: A directory ``*.mlpackage``.
            rounds: Whether every value is rounded to its type; else all is float64.
        """
        from coremltools.libmilstoragepython import _BlobStorageReader
        from coremltools.proto import Model_pb2

        content = package / "Data" / "com.apple.CoreML"
        model = Model_pb2.Model()
        model.ParseFromString((content / "model.mlmodel").read_bytes())
        (function,) = model.mlProgram.functions.values()
        (block,) = function.block_specializations.values()
        self.description = model.description
        self._blobs = _BlobStorageReader(str(content / "weights" / "weight.bin"))
        self._rounds = rounds
        self.constants = self._read_constants(block.operations)
        self._operators = [it for it in block.operations if not it.type.startswith("const")]
        self._caches = {
            given.name: np.zeros(tuple(given.type.multiArrayType.shape))
            for given in model.description.input
            if given.name.startswith(("keys_", "values_"))
        }
        self._outputs = list(block.outputs)

    def read(self, token: int, position: int):
        """Read a token, and return the logits."""
        values: dict[str, Any] = self.constants | self._caches
        values |= {"tokens": np.array([[token]]), "input_pos": np.array([position])}
        for operator in self._operators:
            given = {
                name: [values[binding.name] for binding in argument.arguments]
                for name, argument in operator.inputs.items()
            }
            (output,) = operator.outputs
            made = self._apply(operator.type, given)
            shape = tuple(it.constant.size for it in output.type.tensorType.dimensions)
            assert made.shape == shape, (operator.type, output.name, made.shape, shape)
            values[output.name] = self._rounded(made, output.type.tensorType.dataType)
        for name, cache in self._caches.items():
            cache[:, position : position + 1] = values[f"new_{name}"]
        return values[self._outputs[0]][0]

    def _apply(self, kind: str, given: dict[str, list[Any]]):
        single = {name: them[0] for name, them in given.items() if name != "values"}
        if kind == "concat":
            return np.concatenate(given["values"], axis=single["axis"])
        return _OPERATORS[kind](**single)

    def _rounded(self, made, kind: int):
        if kind not in _FLOATS:
            return made
        if self._rounds:
            with np.errstate(over="raise"):
                made = made.astype(_FLOATS[kind])
        return made.astype(np.float64)

    def _read_constants(self, operators) -> dict[str, Any]:
        found = {}
        for operator in operators:
            if operator.type == "const":
                found[operator.outputs[0].name] = self._value(operator.attributes["val"])
            elif operator.type == "constexpr_blockwise_shift_scale":
                codes, scales = (
                    self._value(operator.inputs[name].arguments[0].value)
                    for name in ("data", "scale")
                )
                block = codes.shape[1] // scales.shape[1]
                whole = codes * scales.repeat(block, 1)
                found[operator.outputs[0].name] = self._rounded(whole, 10)
        return found

    def _value(self, value):
        kind = value.type.tensorType.dataType
        shape = tuple(it.constant.size for it in value.type.tensorType.dimensions)
        if value.WhichOneof("value") == "blobFileValue":
            return self._blob(value.blobFileValue.offset, kind).reshape(shape)
        tensor = value.immediateValue.tensor
        content = getattr(tensor, tensor.WhichOneof("value")).values
        if kind == 2:
            return str(content[0])
        array = np.array(content, _FLOATS.get(kind) or _OTHERS[kind]).reshape(shape)
        return array.astype(np.float64) if kind in _FLOATS else array

    def _blob(self, offset: int, kind: int):
        if kind == 10:
            return self._blobs.read_fp16_data(offset).view(np.float16).astype(np.float64)
        if kind == 11:
            return np.asarray(self._blobs.read_float_data(offset)).astype(np.float64)
        read = self._blobs.read_int4_data if kind == _INT4 else self._blobs.read_int8_data
        return np.asarray(read(offset)).astype(np.float64)


def _slice(x, begin, end):
    return x[tuple(slice(first, last) for first, last in zip(begin, end, strict=True))]


def _softmax(x, axis):
    shares = np.exp(x - x.max(axis, keepdims=True))
    return shares / shares.sum(axis, keepdims=True)


def _gather(x, indices, axis, batch_dims, validate_indices):
    assert (int(axis), int(batch_dims), bool(validate_indices)) == (0, 0, False)
    return x[indices]


def _matmul(x, y, transpose_x, transpose_y):
    assert not transpose_x
    return x @ (y.swapaxes(-1, -2) if transpose_y else y)


def _gelu(x, mode):
    assert mode == "TANH_APPROXIMATION"
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


_OPERATORS: dict[str, Callable[..., Any]] = {
    "abs": lambda x: np.abs(x),  # noqa: PLW0108 - by name
    "add": lambda x, y: x + y,
    "cast": lambda x, dtype: x.astype(np.float64),
    "exp": lambda x: np.exp(x),  # noqa: PLW0108 - by name
    "floor_div": lambda x, y: x // y,
    "gather": _gather,
    "gelu": _gelu,
    "greater_equal": lambda x, y: x >= y,
    "identity": lambda x: x,
    "less_equal": lambda x, y: x <= y,
    "linear": lambda x, weight, bias: x @ weight.T + bias,
    "logical_or": lambda x, y: x | y,
    "matmul": _matmul,
    "maximum": lambda x, y: np.maximum(x, y),  # noqa: PLW0108 - by name
    "mul": lambda x, y: x * y,
    "range_1d": lambda start, end, step: np.arange(start, end, step),  # noqa: PLW0108 - by name
    "real_div": lambda x, y: x / y,
    "reduce_max": lambda x, axes, keep_dims: x.max(tuple(axes), keepdims=bool(keep_dims)),
    "reduce_mean": lambda x, axes, keep_dims: x.mean(tuple(axes), keepdims=bool(keep_dims)),
    "relu": lambda x: np.maximum(x, 0),
    "reshape": lambda x, shape: x.reshape(shape),
    "rsqrt": lambda x, epsilon: 1 / np.sqrt(x + epsilon),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "slice_by_index": _slice,
    "softmax": _softmax,
    "sub": lambda x, y: x - y,
    "tanh": lambda x: np.tanh(x),  # noqa: PLW0108 - by name
}
