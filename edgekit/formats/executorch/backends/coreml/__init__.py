"""Core ML: programs for the GPU of iPhones, iPads and Macs.

A program reads one token; the runners of ExecuTorch read prompts so where a program says that its
shape is fixed. What Core ML gets is written without Apple's converter: `decoder` says what
is computed, `mil` spells it, `package` says where its files are.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from edgekit.errors import UsageError
from edgekit.formats import MemoryUse
from edgekit.formats.executorch import coverage, memory, storage
from edgekit.formats.executorch.backends import Build
from edgekit.formats.executorch.backends.coreml import decoder, mil, package, reading
from edgekit.formats.executorch.coverage import Coverage
from edgekit.quant import grid


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgekit.formats import Layout, Model
    from edgekit.formats.executorch.backends.coreml.decoder import CoreMLProgram
    from edgekit.formats.executorch.planned import Job, Weight
    from edgekit.formats.executorch.program import Program
    from edgekit.model.spec import DecoderSpec, Shape

    Array = npt.NDArray[np.generic]


ID, NAME = reading.BACKEND, "Core ML"
DEVICE = "an iPhone or iPad with iOS 18, or a Mac with macOS 15, or later"
BUILDS: Mapping[str, Build] = {
    "coreml": Build(
        kind="all of it in Core ML, on the GPU",
        ios=("executorch_llm", "backend_coreml", "kernels_optimized"),
    )
}
RECIPES = tuple(name for name in storage.RECIPES if name != "F32")  # it multiplies float16
READS_BY_TOKEN = True
# Not the Neural Engine: it has no float32, and the residual stream is that.
COMPUTE_UNITS = "cpu_and_gpu"
_HEAD_BYTES, _LAYER_BYTES = 3_700, 520  # of the program around; known within a tenth
_HASHED_BYTES = 2**20  # at once
_ROUNDED = storage.FOUR_BITS | {"INT8"}


def refuse(spec: "DecoderSpec", variant: str) -> None:
    """Refuse nothing: every decoder can be said in Core ML's operators."""
    del spec, variant


def meant_by(wanted: str, *, recipe: str) -> str:
    """Return a recipe's storage as it is."""
    del recipe
    return wanted


def stored_as(wanted: str, shape: "Shape", *, recipe: str) -> str:
    """Return the storage that a weight really gets."""
    del recipe
    return storage.stored_as(wanted, shape[-1])


def file_bytes(spec: "DecoderSpec", planned: tuple["Weight", ...], variant: str) -> int:
    """Return how large the program gets."""
    del variant
    storages = {weight.role: weight.stored for weight in planned}
    made = decoder.write(spec, storages, spec.context_tokens)
    around_bytes = _HEAD_BYTES + _LAYER_BYTES * len(spec.layers)
    return around_bytes + package.pack(made).size_bytes


def computes_half(recipe: str) -> bool:
    """Return True: products are computed, and the cache is kept, in float16."""
    del recipe
    return True


def notes(recipe: str) -> tuple[str, ...]:
    """Return what a user should know of this recipe on this back-end."""
    slow = "Core ML reads a prompt token by token"
    if not recipe.startswith("8da"):
        return (slow,)
    return slow, "Core ML multiplies in float16: weights are rounded, what they meet is not"


def memory_use(spec: "DecoderSpec", layout: "Layout", *, context_tokens: int) -> MemoryUse:
    """Return what the phone will hold, reckoned and not measured."""
    is_rounded = any(placement.storage in _ROUNDED for placement in layout.placements)
    table_bytes = 2 * spec.vocabulary * spec.hidden_width
    return MemoryUse(
        weights_bytes=sum(placement.size_bytes for placement in layout.placements),
        # In float16, and once more: Core ML copies what it is handed.
        cache_bytes=memory.cache_bytes(spec, context_tokens=context_tokens),
        # What tokens are looked up in may be spread to float16.
        compute_bytes=4 * spec.vocabulary + (table_bytes if is_rounded else 0),
        runtime_bytes=memory.RUNTIME_BYTES + memory.VOCABULARY_ENTRY_BYTES * spec.vocabulary,
    )


def metadata(spec: "DecoderSpec", variant: str, *, context_tokens: int) -> Mapping[str, Any]:
    """Tell a runner that a program takes one token at a time."""
    del spec, variant, context_tokens
    return {"enable_dynamic_shape": False}


def write(job: "Job", path: Path) -> Mapping[str, Any]:
    """Write the program, one block of rows in memory at a time."""
    from edgekit.formats.executorch import assembly
    from edgekit.formats.executorch.backends.coreml import wrapper

    _refuse_long_context(job)
    made = decoder.write(job.spec, job.storages, job.context_tokens)
    packed = package.pack(made)
    program = wrapper.emit(
        job.spec,
        wrapper.delegate(job.spec, backend=ID, compute_units=COMPUTE_UNITS),
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


def _refuse_long_context(job: "Job") -> None:
    border = job.spec.border_tokens
    if border is not None and job.context_tokens > border:
        raise UsageError(
            f"beyond {border} tokens every position turns otherwise, and Core ML cannot read anew "
            f"what it read before; a context of {job.context_tokens} tokens was asked",
            hint=f"pass --context {border} or less",
        )


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


def _for_coreml(encoded: "list[Array]", weight: "Weight") -> "list[Array]":
    """Return codes as two's complement, and scales as float16."""
    import numpy as np

    if not encoded[1:]:
        return encoded
    codes, scales = encoded
    if weight.stored == "INT8":
        return [codes, grid.to_float16(scales.astype(np.float32), hint="take F16")]
    wide = (scales.astype(np.uint32) << 16).view(np.float32)  # from bfloat16
    return [codes.astype(np.uint8) ^ np.uint8(0x88), grid.to_float16(wide, hint="take F16")]


def _write_identifier(stream: BinaryIO, base: int, identifier_at: int) -> None:
    """Name the content after itself: devices keep what they compiled under that name."""
    found = hashlib.sha256()
    stream.seek(base)
    while content := stream.read(_HASHED_BYTES):
        found.update(content)
    stream.seek(base + identifier_at)
    stream.write(found.hexdigest().encode())


def _report(job: "Job", made: "CoreMLProgram", program: Any) -> dict[str, Any]:
    from edgekit.formats.executorch import lowering

    found = Coverage(
        delegated_operators=sum(made.operators.values()),
        delegated_weights=frozenset(job.storages),
        portable_operators=lowering.portable_calls(program),
    )
    return coverage.report(found, job.weights, id=ID, name=NAME)


def contents(path: Path, head: "Program") -> "list[tuple[str, Shape, str]]":
    """Return name, shape and storage of every weight."""
    return reading.contents(path, head)


def read_back(path: Path, spec: "DecoderSpec") -> "Model":
    """Return the weights as Core ML multiplies with them."""
    return reading.open_weights(path, spec)
