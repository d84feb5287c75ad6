"""llama.cpp: load a GGUF file, and drive it token by token with nothing between.

The low-level binding is used, not its ``Llama`` class: that one costs half a millisecond a token,
which is a tenth of a small model's time, and cannot limit how many rows of logits are kept.
"""

import ctypes
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.errors import BundleError, MissingDependencyError, ToolchainError
from edgekit.formats.gguf import split
from edgekit.runtime import reading
from edgekit.runtime.processors import chosen_threads


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgekit.runtime.session import Logits


# Rows of a prompt computed at once. Larger is no faster for models of this size, and the buffer
# for the logits and the attention scores grows with it.
BATCH_TOKENS = 256
LOG_LINES = 40
_WARNING = 3  # GGML_LOG_LEVEL_WARN in ggml.h; the binding's own table is older
_CONTINUED = 5  # GGML_LOG_LEVEL_CONT
BUILD = Path(__file__).with_name("llama_cpp.cmake")  # what compiling the binding may leave out


def library() -> Any:
    """Import the binding to llama.cpp.

    Raises:
        MissingDependencyError: If it is not installed.
    """
    # ggml starts a debugger for a backtrace when it aborts; that can hang a device.
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    try:
        import llama_cpp
    except ImportError as error:
        raise MissingDependencyError(
            f"llama.cpp is not installed ({error})",
            hint="pip install 'edgekit[run-gguf]' (a C++ compiler builds it for this CPU); "
            f"quicker with CMAKE_ARGS=-DCMAKE_PROJECT_llama_cpp_INCLUDE={BUILD}",
        ) from error
    return llama_cpp


class Log:
    """The last lines llama.cpp said; it writes to standard error unless it is caught."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=LOG_LINES)
        self._is_kept = False
        self._callback = library().llama_log_callback(self._keep)
        library().llama_log_set(self._callback, ctypes.c_void_p(0))

    def _keep(self, level: int, text: bytes, _data: object) -> None:
        if level != _CONTINUED:  # else it belongs to what was said before: a dot of progress
            self._is_kept = level >= _WARNING
        if self._is_kept:
            self._lines.append(text.decode("utf-8", errors="replace"))

    @property
    def tail(self) -> str:
        """What was said, oldest first."""
        return "".join(self._lines).strip()

    def forget(self) -> None:
        """Begin again, so that a refusal quotes nothing about another file."""
        self._lines.clear()


_LOG: list[Log] = []  # one for the process: the library keeps a single callback


def log() -> Log:
    """Return the log of this process; the first call starts catching it."""
    if not _LOG:
        _LOG.append(Log())
    return _LOG[0]


def open_model(path: Path, *, vocabulary_only: bool = False) -> Any:
    """Load a file and return llama.cpp's handle.

    Raises:
        BundleError: If llama.cpp refuses the file; the message carries its last words. If a part
            of a split one is missing.
    """
    split.paths(path)
    llama, said = library(), log()
    said.forget()
    parameters = llama.llama_model_default_params()
    parameters.vocab_only = vocabulary_only
    # Plain reads: with a memory map the pages of repacked weights would be held twice.
    parameters.load_mode = 0  # LLAMA_LOAD_MODE_NONE
    # Gemma 4's embeddings for the layers are larger than the rest; a token reads one row of them.
    parameters.lazy_mode = 2  # LLAMA_LAZY_MODE_ON
    model = llama.llama_model_load_from_file(os.fsencode(path), parameters)
    if not model:
        raise BundleError(f"llama.cpp refuses {path}: {said.tail or 'no reason given'}")
    return model


class GgufSession:
    """A model in llama.cpp with its cache; satisfies `edgekit.runtime.session.Session`."""

    def __init__(
        self,
        path: Path,
        *,
        context_tokens: int,
        threads: int | None = None,
        has_exact_cache: bool = False,
    ) -> None:
        """Load a file; with an exact cache, attention keeps float32: slower, to prove weights."""
        self._threads = chosen_threads(threads)
        self._has_exact_cache = has_exact_cache
        self._llama = library()
        self._model = open_model(path)
        self.vocabulary_tokens = int(
            self._llama.llama_vocab_n_tokens(self._llama.llama_model_get_vocab(self._model))
        )
        self.context_tokens = context_tokens
        self._context: Any = None
        self._scoring: Any = None  # a context that keeps every row of logits, made when asked for
        try:
            self._context = self._new_context(rows=1)
        except ToolchainError:
            self.close()
            raise
        self._cached_tokens = 0
        self._single = (ctypes.c_int32 * 1)()
        self._single_batch = self._llama.llama_batch_get_one(self._single, 1)
        self._rows: dict[int, npt.NDArray[np.float32]] = {}  # by address; it rarely moves

    def prefill(self, ids: Sequence[int]) -> "Logits":
        """Read ``ids`` after what is cached; return float32 ``(vocabulary_tokens,)`` logits.

        Raises:
            UsageError: If ``ids`` is empty, has an unknown id, or outgrows the context.
        """
        reading.refuse_empty(ids)
        self._refuse(ids)
        for _, part in reading.batches(ids, BATCH_TOKENS):
            tokens = (ctypes.c_int32 * len(part))(*part)
            self._run(self._context, self._llama.llama_batch_get_one(tokens, len(part)))
        self._cached_tokens += len(ids)
        return self._last_row()

    def decode(self, token: int) -> "Logits":
        """Read one token after what is cached; return float32 ``(vocabulary_tokens,)`` logits."""
        self._refuse((token,))
        self._single[0] = token
        self._run(self._context, self._single_batch)
        self._cached_tokens += 1
        return self._last_row()

    def all_logits(self, ids: Sequence[int]) -> "Logits":
        """Read ``ids`` alone; return float32 ``(len(ids), vocabulary_tokens)`` logits."""
        import numpy as np

        self.reset()
        self._refuse(ids)
        if self._scoring is None:
            self._scoring = self._new_context(rows=BATCH_TOKENS)
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._scoring), False)
        rows = np.empty((len(ids), self.vocabulary_tokens), np.float32)
        for first, part in reading.batches(ids, BATCH_TOKENS):
            with _batch_of_all_rows(self._llama, part, first) as batch:
                self._run(self._scoring, batch)
            logits = self._llama.llama_get_logits(self._scoring)
            rows[first : first + len(part)] = np.ctypeslib.as_array(
                logits, shape=(len(part), self.vocabulary_tokens)
            )
        return rows

    def rewind(self, tokens: int) -> bool:
        """Forget what follows so many tokens; return whether llama.cpp can."""
        llama, memory = self._llama, self._llama.llama_get_memory(self._context)
        # Of a window it may keep no more than the newest keys.
        first_needed = max(0, tokens - llama.llama_model_n_swa(self._model))
        is_kept = llama.llama_memory_seq_pos_min(memory, 0) <= first_needed
        if not is_kept or not llama.llama_memory_seq_rm(memory, 0, tokens, -1):
            return False
        self._cached_tokens = tokens
        return True

    def reset(self) -> None:
        """Empty the cache."""
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), False)
        self._cached_tokens = 0

    def close(self) -> None:
        """Give the memory back."""
        for context in (self._context, self._scoring):
            if context is not None:
                self._llama.llama_free(context)
        if self._model is not None:
            self._llama.llama_model_free(self._model)
        self._context = self._scoring = self._model = None

    def _new_context(self, *, rows: int) -> Any:
        parameters = self._llama.llama_context_default_params()
        parameters.n_ctx = self.context_tokens
        parameters.n_batch = parameters.n_ubatch = min(BATCH_TOKENS, self.context_tokens)
        # Without this limit a buffer of batch x vocabulary floats is reserved: 98 MiB of a
        # 135-million-parameter model's memory, 300 MiB for a vocabulary of 151 000.
        parameters.n_outputs_max = rows
        parameters.n_threads = parameters.n_threads_batch = self._threads
        parameters.no_perf = True
        parameters.swa_full = False  # a layer with a window keeps no more than it sees
        if self._has_exact_cache:
            # GGML_TYPE_F32 instead of F16, and no flash attention: that rounds to float16 inside.
            parameters.type_k = parameters.type_v = parameters.flash_attn_type = 0
        context = self._llama.llama_init_from_model(self._model, parameters)
        if not context:
            raise ToolchainError(
                f"llama.cpp cannot hold {self.context_tokens} tokens of context",
                hint="pass a smaller --context",
                log=log().tail,
            )
        return context

    def _run(self, context: Any, batch: Any) -> None:
        status = self._llama.llama_decode(context, batch)
        if status != 0:
            raise ToolchainError(f"llama_decode returned {status}", log=log().tail)

    def _last_row(self) -> "Logits":
        import numpy as np

        pointer = self._llama.llama_get_logits_ith(self._context, -1)
        address = ctypes.cast(pointer, ctypes.c_void_p).value or 0
        row = self._rows.get(address)
        if row is None:
            row = np.ctypeslib.as_array(pointer, shape=(self.vocabulary_tokens,))
            self._rows = {address: row}
        return row

    def _refuse(self, ids: Sequence[int]) -> None:
        reading.refuse(self, ids, cached_tokens=self._cached_tokens)


@contextmanager
def _batch_of_all_rows(llama: Any, ids: Sequence[int], first_position: int) -> Iterator[Any]:
    """Yield a batch that asks for the logits after every token."""
    batch = llama.llama_batch_init(len(ids), 0, 1)
    try:
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index] = token
            batch.pos[index] = first_position + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = 1
        yield batch
    finally:
        llama.llama_batch_free(batch)


def runtime_ids(path: Path, texts: Sequence[str]) -> list[list[int]]:
    """Return what llama.cpp's own tokenizer makes of ``texts``, special tokens parsed."""
    llama = library()
    model = open_model(path, vocabulary_only=True)
    try:
        vocabulary = llama.llama_model_get_vocab(model)
        return [_tokenize(llama, vocabulary, text.encode()) for text in texts]
    finally:
        llama.llama_model_free(model)


def _tokenize(llama: Any, vocabulary: Any, text: bytes) -> list[int]:
    capacity = len(text) + 8  # no token is shorter than a byte, but for a space put in front
    buffer = (ctypes.c_int32 * capacity)()
    count = llama.llama_tokenize(vocabulary, text, len(text), buffer, capacity, False, True)
    if count < 0:
        raise ToolchainError(f"llama_tokenize needs {-count} tokens for {len(text)} bytes")
    return list(buffer[:count])
