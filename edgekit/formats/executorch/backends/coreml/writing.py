"""Programs for Core ML: one token at a time, its operators and blobs written by edgekit itself."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from edgekit.errors import UsageError
from edgekit.formats import MemoryUse
from edgekit.formats.executorch import (
    assembly,
    coverage,
    kinds,
    lowering,
    memory,
    tensor_types,
)
from edgekit.formats.executorch.backends import coreml
from edgekit.formats.executorch.backends._writing import BackendWriting
from edgekit.formats.executorch.backends.coreml import decoder, mil, package
from edgekit.formats.executorch.coverage import Coverage
from edgekit.quant import rounding


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgekit.formats import Layout
    from edgekit.formats.executorch.backends.coreml.decoder import CoreMLProgram
    from edgekit.formats.executorch.planned import Job, ProgramWeight
    from edgekit.model.spec import DecoderSpec

    Array = npt.NDArray[np.generic]


# Not the Neural Engine: it has no float32, and the residual stream is that.
COMPUTE_UNITS = "cpu_and_gpu"
_HEAD_BYTES, _LAYER_BYTES = 3_700, 520  # of the program around; known within a tenth
_HASHED_BYTES = 2**20  # at once
_ROUNDED = tensor_types.FOUR_BITS | {"INT8"}


class CoreMLWriting(BackendWriting):
    """Every decoder whose layers are alike can be said in Core ML's operators."""

    backend = coreml.BACKEND

    def refuse(self, spec: "DecoderSpec", variant: str, *, context_tokens: int) -> None:
        """Check that all layers attend alike, and a text so long is rotated as its beginning is.

        Raises:
            UsageError: If not; it names a layer, or says from where on.
        """
        del variant
        hint = "take --variant portable: XNNPACK computes it on the phone's CPU"
        kinds.refuse(spec, self.backend.name, hint=hint)
        border = spec.original_max_position_embeddings
        if border is not None and context_tokens > border:
            raise UsageError(
                f"beyond {border} tokens every position is rotated differently, and Core ML cannot "
                f"read again what it read before; a context of {context_tokens} tokens was asked",
                hint=f"pass --context {border} or less",
            )

    def file_bytes(
        self, spec: "DecoderSpec", planned: tuple["ProgramWeight", ...], variant: str
    ) -> int:
        """Return how large the program gets."""
        del variant
        tensor_types = {weight.role: weight.tensor_type for weight in planned}
        made = decoder.write(spec, tensor_types, spec.context_tokens)
        around_bytes = _HEAD_BYTES + _LAYER_BYTES * len(spec.layers)
        return around_bytes + package.pack(made).size_bytes

    def memory_use(
        self, spec: "DecoderSpec", layout: "Layout", *, context_tokens: int
    ) -> MemoryUse:
        """Return what the phone will hold, estimated and not measured."""
        is_rounded = any(placement.tensor_type in _ROUNDED for placement in layout.placements)
        table_bytes = 2 * spec.vocab_size * spec.hidden_size
        return MemoryUse(
            weights_bytes=sum(placement.size_bytes for placement in layout.placements),
            # In float16, and once more: Core ML copies what it is handed.
            cache_bytes=memory.cache_bytes(spec, context_tokens=context_tokens),
            # What tokens are looked up in may be spread to float16.
            compute_bytes=4 * spec.vocab_size + (table_bytes if is_rounded else 0),
            runtime_bytes=memory.RUNTIME_BYTES + memory.VOCABULARY_ENTRY_BYTES * spec.vocab_size,
        )

    def write(self, job: "Job", path: Path) -> Mapping[str, Any]:
        """Write the program, one block of rows in memory at a time."""
        from edgekit.formats.executorch.backends.coreml import wrapper

        made = decoder.write(job.spec, job.tensor_types, job.context_tokens)
        packed = package.pack(made)
        program = wrapper.emit(
            job.spec,
            wrapper.delegate(job.spec, backend=self.backend.id, compute_units=COMPUTE_UNITS),
            context_tokens=job.context_tokens,
            constants=job.constants,
        )
        head, base = assembly.head_of_delegate(program, packed.size_bytes)
        with path.open("w+b") as stream:
            stream.truncate(base + packed.size_bytes)
            stream.write(head)
            for at, content in packed.pieces:
                stream.seek(base + at)
                stream.write(content)
            _write_blobs(job, made, stream, first=base + packed.places[package.WEIGHTS][0])
            _write_identifier(stream, base, packed.identifier_at)
        return _report(job, made, program)


WRITING = CoreMLWriting()


def _write_blobs(job: "Job", made: "CoreMLProgram", stream: BinaryIO, *, first: int) -> None:
    """Write the file of weights; tables without content are holes in it, which read as zeros."""
    stream.seek(first)
    stream.write(mil.file_header(len(made.blobs)))
    for blob in made.blobs.values():
        stream.seek(first + blob.offset)
        stream.write(blob.header)
    for key, table in decoder.tables(job.spec):
        stream.seek(first + made.blobs[key].first)
        stream.write(table.tobytes())
    for weight in job.weights:
        for row, encoded in job.encoded(weight):
            for part, values in zip(weight.parts, _for_coreml(encoded, weight), strict=True):
                blob = made.blobs[part.key]
                stream.seek(first + blob.first + row * (blob.size_bytes // weight.shape[0]))
                stream.write(values.tobytes())


def _for_coreml(encoded: "list[Array]", weight: "ProgramWeight") -> "list[Array]":
    """Return codes as two's complement, and scales as float16."""
    import numpy as np

    if not encoded[1:]:
        return encoded
    codes, scales = encoded
    if weight.tensor_type == "INT8":
        return [codes, rounding.float16(scales.astype(np.float32), hint="take F16")]
    wide = rounding.from_bfloat16(scales.astype(np.uint16, copy=False))
    return [codes.astype(np.uint8) ^ np.uint8(0x88), rounding.float16(wide, hint="take F16")]


def _write_identifier(stream: BinaryIO, base: int, identifier_at: int) -> None:
    """Name the content after itself: devices keep what they compiled under that name."""
    found = hashlib.sha256()
    stream.seek(base)
    while content := stream.read(_HASHED_BYTES):
        found.update(content)
    stream.seek(base + identifier_at)
    stream.write(found.hexdigest().encode())


def _report(job: "Job", made: "CoreMLProgram", program: Any) -> dict[str, Any]:
    found = Coverage(
        delegated_operators=sum(made.operators.values()),
        delegated_weights=frozenset(job.tensor_types),
        portable_operators=lowering.portable_calls(program),
    )
    return coverage.report(found, job.weights, id=coreml.BACKEND.id, name=coreml.BACKEND.name)
