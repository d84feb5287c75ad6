"""An artifact as MLC's model multiplies with it: weights by role, in float32."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.errors import BundleError
from edgekit.formats.mlc import chat_config, decoders, names, packing, shards
from edgekit.formats.mlc.names import Parameter
from edgekit.formats.mlc.packing import Scheme
from edgekit.formats.mlc.shards import Record, Shard
from edgekit.model.shapes import Shape
from edgekit.model.spec import DecoderSpec


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Rows = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class StoredParameter:
    """A parameter and the tensors that hold it."""

    parameter: Parameter
    tensor_type: str
    records: tuple[Record, ...]
    is_transposed: bool


@dataclass(frozen=True, kw_only=True)
class MlcWeights:
    """The weights of an artifact, and what MLC computes with them."""

    directory: Path
    spec: DecoderSpec  # as MLC computes it: see `decoders.computed`
    held: Mapping[
        str, tuple[StoredParameter, int, int]
    ]  # by role: where, its first row there, how many

    def weight(self, role: str, first_row: int = 0, rows: int | None = None) -> "Rows":
        """Return some rows of a weight, or all, in float32."""
        held, start, count = self.held[role]
        rows = count - first_row if rows is None else rows
        first = start + first_row
        stored = []
        for record in held.records:
            tensor = shards.load(self.directory, record)
            part = (
                tensor[:, first : first + rows].T
                if held.is_transposed
                else tensor[first : first + rows]
            )
            stored.append(part)
        values = packing.decode(stored, held.tensor_type, columns=held.parameter.columns)
        return values.reshape(held.parameter.part_shape(rows))


def open_weights(path: Path, spec: DecoderSpec) -> MlcWeights:
    """Return the weights of the artifact whose tensor cache is at ``path``.

    Args:
        path: The tensor cache.
        spec: What the checkpoint computes.

    Raises:
        BundleError: If a file is missing, altered, or holds another model.
    """
    config = chat_config.read(path.with_name(chat_config.NAME))
    found = shards.read(path)
    shards.check_files(path.parent, found, hashes=True)
    name = config["model_type"]
    parameters = names.parameters(name, spec)
    held: dict[str, tuple[StoredParameter, int, int]] = {}
    for where in _find(path, parameters.values(), found, spec, config["quantization"]):
        for role, first, rows in where.parameter.parts():
            held[role] = (where, first, rows)
    return MlcWeights(directory=path.parent, spec=decoders.computed(name, spec), held=held)


def contents(path: Path) -> list[tuple[str, Shape, str]]:
    """Return role, shape and tensor type of every weight that an artifact holds.

    Raises:
        BundleError: If a file is missing or damaged; hashes are not compared.
    """
    found = shards.read(path)
    shards.check_files(path.parent, found, hashes=False)
    settings = path.with_name(chat_config.NAME)
    config = chat_config.read(settings)
    tensors = {record.tensor.name for shard in found for record in shard.records}
    spec = chat_config.shapes(settings, config, tensors)
    parameters = names.parameters(config["model_type"], spec)
    return [
        (role, where.parameter.part_shape(rows), where.tensor_type)
        for where in _find(path, parameters.values(), found, spec, config["quantization"])
        for role, _, rows in where.parameter.parts()
        if not where.parameter.is_copy
    ]


def _find(
    path: Path,
    parameters: Iterable[Parameter],
    found: Iterable[Shard],
    spec: DecoderSpec,
    scheme_name: str,
) -> list[StoredParameter]:
    """Return where each parameter is; every tensor must be of one."""
    records = {record.tensor.name: record for shard in found for record in shard.records}
    scheme, recipe = packing.SCHEMES[scheme_name], packing.RECIPES[scheme_name]
    held = []
    for parameter in parameters:
        vector = recipe.tensor_type_for(parameter.roles[0], spec)
        tensor_types = scheme.tensor_types if parameter.is_matrix else (vector,)
        held.append(_held(path, parameter, records, scheme, tensor_types))
    left = records.keys() - {record.tensor.name for where in held for record in where.records}
    if left:
        raise BundleError(f"{path} has a tensor that the model does not use: {min(left)}")
    return held


def _held(
    path: Path,
    parameter: Parameter,
    records: Mapping[str, Record],
    scheme: Scheme,
    tensor_types: Iterable[str],
) -> StoredParameter:
    """Find the tensors of a parameter, in whichever of some tensor types they are."""
    for tensor_type in tensor_types:
        expected = packing.tensors(parameter, tensor_type, scheme)
        found = [records[tensor.name] for tensor in expected if tensor.name in records]
        if [record.tensor for record in found] == expected:
            return StoredParameter(
                parameter=parameter,
                tensor_type=tensor_type,
                records=tuple(found),
                is_transposed=packing.is_transposed(parameter, tensor_type, scheme),
            )
    codes = parameter.name.removesuffix("weight") + "q_weight"
    tensor = next((records[n].tensor for n in (parameter.name, codes) if n in records), None)
    if tensor is None:
        raise BundleError(f"{path} lacks the tensor {parameter.name}")
    raise BundleError(
        f"{path}: {tensor.name} has shape {list(tensor.shape)} as {tensor.dtype}, which does not "
        f"hold {list(parameter.shape)}"
    )
