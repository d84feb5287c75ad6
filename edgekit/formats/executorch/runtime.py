"""ExecuTorch: load a program, and drive it token by token over the cache inside it, without torch.

The cache is never cleared: what lies after the last position read is behind the mask.
"""

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.errors import BundleError, MissingDependencyError, ToolchainError, UsageError
from edgekit.formats.executorch import backends, memory, program, shim_build, stock_runtime
from edgekit.runtime import reading
from edgekit.runtime.processors import chosen_threads


if TYPE_CHECKING:
    from edgekit.runtime.session import Logits


FORWARD = "forward"
ROPE_BORDER = "get_rope_border_tokens"  # beyond it a long-rope model has other frequencies
LLM_KERNELS = "llama::"  # what phone runners link; the wheel has them in a library next to torch
_QUANTIZED_KERNELS = "quantized_decomposed::"
_OK = 0  # Error::Ok in runtime/core/error.h
_CONSTANTS = 32  # how many numbers a metadata method may return
_open_sessions: set[int] = set()  # handles; one thread pool serves them all


class ExecutorchSession:
    """A program in ExecuTorch with its cache; satisfies `edgekit.runtime.session.Session`."""

    def __init__(self, path: Path, *, context_tokens: int, threads: int | None = None) -> None:
        """Load a program; its cache has the size it was exported with."""
        import numpy as np

        self._path = path
        found = program.read(path)
        _refuse_elsewhere(path, found)
        self._shim = shim_build.load()
        _refuse_missing(self._shim, path, _forward_of(found, path))
        _set_threads(self._shim, threads)
        self._handle = self._open()
        try:
            self.vocabulary_tokens = self._constant("get_vocab_size")
            self.context_tokens = self._smaller_context(context_tokens)
            longest = self._longest_batch()
            self._batch_tokens = min(memory.BATCH_TOKENS, longest)
            has_border = found.method(ROPE_BORDER) is not None
            self._border_tokens = self._constant(ROPE_BORDER) if has_border else None
        except (BundleError, UsageError):
            self.close()
            raise
        self._cached: list[int] = []  # what has been read
        self._ids = np.empty(longest, np.int64)
        self._ids_address = self._ids.ctypes.data
        self._logits, self._rows, self._width = (
            ctypes.c_void_p(),
            ctypes.c_int64(),
            ctypes.c_int64(),
        )
        self._out = [ctypes.byref(it) for it in (self._logits, self._rows, self._width)]
        self._last_rows: dict[tuple[int | None, int], Logits] = {}  # by address; it rarely moves

    def prefill(self, ids: Sequence[int]) -> "Logits":
        """Read ``ids`` after what is cached; return float32 ``(vocabulary_tokens,)`` logits.

        Raises:
            UsageError: If ``ids`` is empty, has an unknown id, or outgrows the context.
        """
        reading.refuse_empty(ids)
        return self._append(ids)

    def decode(self, token: int) -> "Logits":
        """Read one token after what is cached; return float32 ``(vocabulary_tokens,)`` logits."""
        return self._append((token,))

    def all_logits(self, ids: Sequence[int]) -> "Logits":
        """Read ``ids`` alone; return float32 ``(len(ids), vocabulary_tokens)`` logits.

        Token by token, since a program gives those of the last one only.
        """
        import numpy as np

        self.reset()
        self._refuse(ids)
        rows = np.empty((len(ids), self.vocabulary_tokens), np.float32)
        for index, token in enumerate(ids):
            rows[index] = self.decode(token)
        return rows

    def rewind(self, tokens: int) -> bool:
        """Return False: a program does not tell what else it keeps."""
        del tokens
        return False

    def reset(self) -> None:
        """Empty the cache: the next token is at position 0, and the mask hides the others."""
        self._cached.clear()

    def close(self) -> None:
        """Give the memory back."""
        if self._handle:
            self._shim.edgekit_close(self._handle)
            _open_sessions.discard(self._handle)
        self._handle = 0

    def _open(self) -> int:
        handle = ctypes.c_void_p()
        status = self._shim.edgekit_open(os.fsencode(self._path), True, ctypes.byref(handle))
        said = _log(self._shim)
        if status != _OK or not handle.value:
            raise BundleError(
                f"ExecuTorch refuses {self._path} with error {status:#x}: {_first_line(said)}",
                hint="copy the bundle again, or export it with the ExecuTorch installed here",
            )
        _open_sessions.add(handle.value)
        return handle.value

    def _constant(self, method: str) -> int:
        """Return the number that a metadata method gives."""
        values, count = (ctypes.c_int64 * _CONSTANTS)(), ctypes.c_int(_CONSTANTS)
        status = self._shim.edgekit_constants(
            self._handle, method.encode(), values, ctypes.byref(count)
        )
        if status != _OK or count.value != 1 or values[0] < 1:
            raise BundleError(
                f"{self._path} has no usable {method}: {_first_line(_log(self._shim))}",
                hint="export again",
            )
        return int(values[0])

    def _smaller_context(self, wanted: int) -> int:
        exported = self._constant("get_max_context_len")
        if wanted > exported:
            raise UsageError(
                f"{self._path} was exported for {exported} tokens of context, {wanted} were asked",
                hint=f"pass --context {exported} or less, or export with --context {wanted}",
            )
        return wanted

    def _longest_batch(self) -> int:
        tokens, positions = ctypes.c_int64(), ctypes.c_int64()
        status = self._shim.edgekit_limits(
            self._handle, ctypes.byref(tokens), ctypes.byref(positions)
        )
        batch = min(tokens.value, positions.value)
        if status != _OK or batch < 1:
            raise BundleError(
                f"{self._path} has a {FORWARD} of another form than tokens and positions",
                hint="export again",
            )
        return batch

    def _append(self, ids: Sequence[int]) -> "Logits":
        self._refuse(ids)
        cached = len(self._cached)
        if reading.outgrows(self._border_tokens, cached_tokens=cached, new_tokens=len(ids)):
            ids = [*self._cached, *ids]
            self.reset()
        for batch in self._batches(ids):
            self._read(batch)
        return self._last_row()

    def _batches(self, ids: Sequence[int]) -> Iterator[Sequence[int]]:
        """Split what is read: scores take memory for each pair of a query and a key.

        A program tells by the last token of a call whether a long-rope text is past its border, so
        the first call of one that is must reach past it.
        """
        border, first = self._border_tokens, 0
        if border is not None and not self._cached and len(ids) > border:
            first = border + 1
            yield ids[:first]
        yield from (part for _, part in reading.batches(ids[first:], self._batch_tokens))

    def _read(self, ids: Sequence[int]) -> None:
        count, position = len(ids), len(self._cached)
        self._ids[:count] = ids
        status = self._shim.edgekit_read(
            self._handle, self._ids_address, count, position, *self._out
        )
        if status != _OK:
            raise ToolchainError(
                f"ExecuTorch failed with error {status:#x} at token {position}",
                log=_log(self._shim),
            )
        self._cached += ids

    def _last_row(self) -> "Logits":
        """Return what the last call said, without a copy."""
        key = (self._logits.value, self._rows.value)
        row = self._last_rows.get(key)
        if row is None:
            row = self._map_last_row()
            self._last_rows = {key: row}
        return row

    def _map_last_row(self) -> "Logits":
        import numpy as np

        width, rows = self._width.value, self._rows.value
        if width != self.vocabulary_tokens or rows < 1:
            raise BundleError(
                f"{self._path} gives {rows} rows of {width} logits, its vocabulary has "
                f"{self.vocabulary_tokens}",
                hint="export again",
            )
        pointer = ctypes.cast(self._logits, ctypes.POINTER(ctypes.c_float))
        last: Logits = np.ctypeslib.as_array(pointer, (rows, width))[-1]
        return last

    def _refuse(self, ids: Sequence[int]) -> None:
        reading.refuse(self, ids, cached_tokens=len(self._cached))


def _forward_of(found: program.Program, path: Path) -> program.Method:
    method = found.method(FORWARD)
    if method is None:
        raise BundleError(f"{path} has no method {FORWARD!r}", hint="export again")
    return method


def _refuse_elsewhere(path: Path, found: program.Program) -> None:
    """Name the device that a program needs, if it is another than this machine."""
    backend = backends.of_program(found)
    if backend and backend.device:
        raise UsageError(
            f"{path} is for {backend.name}, which this machine has not: it needs {backend.device}",
            hint="run and measure it there, as the README.md next to it shows; "
            "`edgekit validate --measurement FILE` holds that against the budget; "
            f"or export with --variant {backends.variants()[0]} to run it here",
        )


def _refuse_missing(shim: Any, path: Path, method: program.Method) -> None:
    """Name what the program calls and this runtime lacks, before it is loaded."""
    missing = _missing_kernels(shim, method)
    if any(name.startswith(_QUANTIZED_KERNELS) for name in missing):
        ctypes.CDLL(str(shim_build.Wheel.find().library(shim_build.QUANTIZED_KERNELS)))
        missing = _missing_kernels(shim, method)
    if any(name.startswith(LLM_KERNELS) for name in missing):
        with suppress(MissingDependencyError):  # of torch, on a device
            stock_runtime.add_llm_kernels()
        missing = _missing_kernels(shim, method)
    shim.edgekit_start()  # again: the wheel's own bindings take the log as well
    backends = {name for name in method.backends if not shim.edgekit_has_backend(name.encode())}
    if backends:
        raise UsageError(
            f"{path} is for {', '.join(sorted(backends))}, which this machine has not",
            hint="run it on the device it was exported for, or export it for XNNPACK",
        )
    if missing:
        raise _missing(path, missing)


def _missing_kernels(shim: Any, method: program.Method) -> list[str]:
    return [name for name in method.operators if not shim.edgekit_has_kernel(name.encode())]


def _missing(path: Path, kernels: list[str]) -> UsageError | BundleError:
    found = ", ".join(kernels)
    if all(name.startswith(LLM_KERNELS) for name in kernels):
        return UsageError(
            f"{path} calls {found}, which the LLM runners on phones have and this one has not",
            hint="export with --variant portable to run it here",
        )
    return BundleError(
        f"{path} calls {found}, which ExecuTorch {shim_build.Wheel.find().version} has not",
        hint="export it again with the ExecuTorch installed here",
    )


def _set_threads(shim: Any, threads: int | None) -> None:
    """Give the process's thread pool its size; XNNPACK keeps the pool while a program is open."""
    has, wanted = shim.edgekit_threads(0), chosen_threads(threads)
    if wanted == has:
        return
    if _open_sessions:
        if threads is None:
            return
        raise UsageError(
            f"ExecuTorch runs with {has} threads as long as another model is open, {threads} were "
            "asked",
            hint=f"close the other session first, or pass {has}",
        )
    shim.edgekit_threads(wanted)


def _log(shim: Any) -> str:
    return str(shim.edgekit_log().decode("utf-8", errors="replace")).strip()


def _first_line(log: str) -> str:
    return log.partition("\n")[0] or "no reason given"
