"""MLC's runtime on this machine: a library for its processor in TVM's virtual machine."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.errors import BundleError, ToolchainError
from edgekit.formats.mlc import chat_config, decoder_file, shards
from edgekit.formats.mlc.compiling import cpu
from edgekit.formats.mlc.compiling.attention_kernels import PAGE_TOKENS
from edgekit.formats.mlc.compiling.shape import LibraryShape
from edgekit.formats.mlc.libraries import PREFILL_CHUNK_TOKENS
from edgekit.runtime import reading
from edgekit.runtime.processors import chosen_threads, usable_cores


if TYPE_CHECKING:
    from edgekit.formats.mlc.packing import PackedTensor
    from edgekit.formats.mlc.shards import Record
    from edgekit.runtime.session import Logits

_SEQUENCE = 0  # the only one in the cache
_FAST_CORES = 1  # TVM's mode for threads


def shape_of(path: Path) -> LibraryShape:
    """Return the shape of an artifact's library.

    Args:
        path: The tensor cache.

    Raises:
        BundleError: If a file is missing or damaged, or the artifact holds other tensors.
    """
    config = chat_config.read(path.with_name(chat_config.NAME))
    return LibraryShape.of(
        config["model_type"],
        decoder_file.read(path.with_name(decoder_file.NAME)),
        config["quantization"],
        context_tokens=config["context_window_size"],
    )


class MlcSession:
    """A model in TVM's virtual machine; satisfies `edgekit.runtime.session.Session`."""

    def __init__(self, path: Path, *, context_tokens: int, threads: int | None = None) -> None:
        """Load a model, compiling a library of its shape where none was kept.

        Raises:
            BundleError: If a file is missing or damaged.
        """
        import tvm
        from tvm import relax

        count = chosen_threads(threads)
        _prepare_threads()
        shape = shape_of(path)
        self._chunk_tokens = PREFILL_CHUNK_TOKENS
        self._state_sizes = [size for _, _, size in shape.spec.states()]
        self._device = tvm.cpu()
        self.vocabulary_tokens, self.context_tokens = shape.spec.vocab_size, context_tokens
        library = cpu.compiled(shape)
        with failing():
            module = tvm.runtime.load_module(str(library))
            tvm.get_global_func("runtime.config_threadpool")(_FAST_CORES, count)
            self._machine = relax.VirtualMachine(module, self._device)
            self._begin, self._end, self._clear, self._add = (
                tvm.get_global_func(f"vm.builtin.kv_state_{name}")
                for name in ("begin_forward", "end_forward", "clear", "add_sequence")
            )
        self._weights = tvm.runtime.convert(
            [self._tensor(values) for values in _stored(path, shape)]
        )
        self._cache = self._make_cache()
        self._read = 0
        self.reset()

    def prefill(self, ids: Sequence[int]) -> "Logits":
        """Read ``ids`` after what is cached; return float32 ``(vocabulary_tokens,)`` logits.

        Raises:
            UsageError: If ``ids`` is empty, has an unknown id, or outgrows the context.
        """
        reading.refuse_empty(ids)
        reading.refuse(self, ids, cached_tokens=self._read)
        last: Logits | None = None
        for _, part in reading.batches(ids, self._chunk_tokens):
            last = self._run("prefill" if len(part) > 1 else "decode", part)
        assert last is not None  # noqa: S101 - there is at least one id
        row: Logits = last[0]
        return row

    def decode(self, token: int) -> "Logits":
        """Read one token after what is cached; return float32 ``(vocabulary_tokens,)`` logits."""
        return self.prefill([token])

    def all_logits(self, ids: Sequence[int]) -> "Logits":
        """Read ``ids`` alone; return float32 ``(len(ids), vocabulary_tokens)`` logits."""
        import numpy as np

        self.reset()
        reading.refuse(self, ids, cached_tokens=0)
        rows = np.empty((len(ids), self.vocabulary_tokens), np.float32)
        for first, part in reading.batches(ids, self._chunk_tokens):
            rows[first : first + len(part)] = self._run("all_logits", part)
        self.reset()
        return rows

    def rewind(self, tokens: int) -> bool:
        """Return False: a cache of pages may have states beside it."""
        del tokens
        return False

    def reset(self) -> None:
        """Empty the cache, and what layers keep besides."""
        import numpy as np
        import tvm

        with failing():
            zeros = [self._tensor(np.zeros(size, np.float32)) for size in self._state_sizes]
            self._states = tvm.runtime.convert(zeros)
            self._clear(self._cache)
            self._add(self._cache, _SEQUENCE)
        self._read = 0

    def close(self) -> None:
        """Give the memory back."""
        self._cache = self._states = self._weights = self._machine = None

    def _run(self, function: str, ids: Sequence[int]) -> "Logits":
        """Read some tokens; return float32 logits, a row for the last one or for each."""
        import numpy as np
        from tvm_ffi import Shape

        with failing():
            embedded = self._machine["embed"](self._tensor(np.array(ids, np.int32)), self._weights)
            x = embedded.numpy().reshape(1, len(ids), -1)
            self._begin(self._cache, Shape([_SEQUENCE]), Shape([len(ids)]))
            said, _, self._states = self._machine[function](
                self._tensor(x), self._cache, self._states, self._weights
            )
            self._end(self._cache)
            logits: Logits = said.numpy()[0]
        self._read += len(ids)
        return logits

    def _make_cache(self) -> Any:
        from tvm_ffi import Shape

        sizes = (
            1,
            self.context_tokens,
            min(self._chunk_tokens, self.context_tokens),
            PAGE_TOKENS,
            0,
        )
        with failing():
            return self._machine["create_tir_paged_kv_cache"](*(Shape([size]) for size in sizes))

    def _tensor(self, values: Any) -> Any:
        import tvm

        return tvm.runtime.tensor(values, self._device)


def _prepare_threads() -> None:
    """Tell TVM, which reads it when it starts threads for the first time, how many there may be.

    It would take half of the cores for hyper-threads, bind this thread to one core, with whatever
    this process does later in it, and have threads turn while they wait.
    """
    os.environ["TVM_BIND_THREADS"] = "0"
    os.environ["TVM_THREAD_POOL_SPIN_COUNT"] = "0"
    os.environ["TVM_NUM_THREADS"] = str(usable_cores() or 1)


def _stored(path: Path, shape: LibraryShape) -> Iterator[Any]:
    """Yield the tensors of an artifact as a library takes them.

    Raises:
        BundleError: If one is missing, or has another shape.
    """
    found = shards.read(path)
    shards.check_files(path.parent, found, hashes=False)
    records = {record.tensor.name: record for shard in found for record in shard.records}
    for tensor in shape.tensors:
        yield _widened(path, tensor, records.get(tensor.name))


def _widened(path: Path, tensor: "PackedTensor", record: "Record | None") -> Any:
    """Return the numbers of a tensor, a bfloat16 as the float32 it stands for."""
    import numpy as np

    from edgekit.quant import rounding

    if record is None or record.tensor != tensor:
        had = "none" if record is None else f"{list(record.tensor.shape)} as {record.tensor.dtype}"
        raise BundleError(
            f"{path}: {tensor.name} is {had}, its library takes {list(tensor.shape)} as "
            f"{tensor.dtype}"
        )
    values = shards.load(path.parent, record)
    is_bfloat16 = values.dtype == np.uint16
    return rounding.from_bfloat16(values.astype(np.uint16)) if is_bfloat16 else np.array(values)


@contextmanager
def failing() -> Iterator[None]:
    """Tell what TVM raises as a failure of the toolchain.

    Raises:
        ToolchainError: With the words of TVM.
    """
    try:
        yield
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise ToolchainError("TVM failed", log=str(error)) from error
