"""ONNX Runtime: load a model, and drive it token by token over one cache that never moves."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.errors import BundleError, MissingDependencyError, ToolchainError
from edgekit.formats.onnx import model
from edgekit.formats.onnx.graph import FIRST_LOGIT, NEEDED_VERSION, ROPE_BORDER, TEXT_TOKENS
from edgekit.runtime import reading
from edgekit.runtime.processors import chosen_threads


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgekit.runtime.session import Logits


# Rows of a prompt computed at once; attention needs heads x rows x context floats for them.
BATCH_TOKENS = 256
# 1.22 and 1.23 see another attention window than the graph says, without a word: a mean KL of 0.56
# nats on a tiny Mistral. 1.24.1, 1.25.0, 1.26.0 and 1.32.0 agree with transformers.
MIN_VERSION = (1, 24)
_FATAL_ONLY = 4  # ORT_LOGGING_LEVEL_FATAL: errors are raised, and need not be printed too


def library() -> Any:
    """Import ONNX Runtime.

    Raises:
        MissingDependencyError: If it is not installed, or a version that computes otherwise.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            f"ONNX Runtime is not installed ({error})", hint="pip install 'edgekit[run-onnx]'"
        ) from error
    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) < MIN_VERSION:
        raise MissingDependencyError(
            f"ONNX Runtime {onnxruntime.__version__} is too old: it errs in attention windows",
            hint="pip install --upgrade 'edgekit[run-onnx]'",
        )
    return onnxruntime


# Ways to other processors that no machine edgekit is proven on has.
_OTHER_PROVIDERS = {
    "QNNExecutionProvider": "QNN", "CoreMLExecutionProvider": "Core ML",
    "NnapiExecutionProvider": "NNAPI",
}  # fmt: skip


def processors() -> str:
    """Say what edgekit has ONNX Runtime compute with, and what it never proves or measures."""
    available = library().get_available_providers()
    missing = [name for provider, name in _OTHER_PROVIDERS.items() if provider not in available]
    present = [name for provider, name in _OTHER_PROVIDERS.items() if provider in available]
    parts = [f"{', '.join(missing)} not in this build"] if missing else []
    parts += [f"{', '.join(present)} in this build, but never used"] if present else []
    return "; ".join(("on the CPU only", *parts))


def refusals() -> tuple[type[Exception], ...]:
    """Return what ONNX Runtime raises; its exceptions have no base of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return (
        state.EPFail, state.EngineError, state.Fail, state.InvalidArgument, state.InvalidGraph,
        state.InvalidProtobuf, state.NoModel, state.NoSuchFile, state.NotImplemented,
        state.RuntimeException, RuntimeError,
        UnicodeDecodeError,  # where its message quotes a damaged name
    )  # fmt: skip


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Tell what ONNX Runtime finds wrong with a model as a damaged bundle.

    Raises:
        BundleError: With the words of ONNX Runtime.
    """
    try:
        yield
    except refusals() as error:
        raise BundleError(
            f"ONNX Runtime {library().__version__} refuses {path}: {error}"
        ) from error


def _refuse_older(path: Path, metadata: Mapping[str, str], version: str) -> None:
    needed = metadata.get(NEEDED_VERSION)
    if needed is not None and _numbers(version) < _numbers(needed):
        raise MissingDependencyError(
            f"ONNX Runtime {version} lacks operators that {path.name} needs, for layers with a "
            f"state or with experts; {needed} has them",
            hint="pip install --upgrade 'edgekit[run-onnx]'",
        )


def _numbers(version: str) -> tuple[int, ...]:
    """Return what a version counts with; a build of an unreleased one may add a word."""
    return tuple(int(number) for number in version.split(".")[:3] if number.isdigit())


def open_model(path: Path, *, threads: int | None = None) -> Any:
    """Load a model after a look at its files and return ONNX Runtime's session.

    Raises:
        BundleError: If a file is damaged or missing, or ONNX Runtime refuses it.
        MissingDependencyError: If ONNX Runtime is older than an operator of the model.
        UsageError: If the machine cannot run that many threads.
    """
    onnxruntime = library()
    model.read(path)
    metadata = model.metadata(path)
    _refuse_older(path, metadata, onnxruntime.__version__)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = chosen_threads(threads)
    options.log_severity_level = _FATAL_ONLY
    # Memory goes back when a prompt has been read, instead of being kept for the next. What states
    # take at every token is kept meanwhile: fresh pages for it cost 5 % of a token of Qwen3.5 0.8B.
    options.enable_cpu_mem_arena = NEEDED_VERSION in metadata
    options.enable_mem_pattern = False  # of one length of the text; the next token has another
    # Threads wait without turning while the token is chosen and written.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with refusing(path):
        return onnxruntime.InferenceSession(
            str(path),
            sess_options=options,
            providers=["CPUExecutionProvider"],
            enable_fallback=False,  # which prints, and tries the same again
        )


def _giving_back() -> Any:
    """Return options of a call that gives the memory it took back to the machine."""
    options = library().RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


@dataclass(kw_only=True)
class _Step:
    """What a call of the runtime reads and writes.

    Keys and values stay in place. States would be overwritten while they are read, so there are two
    of each, and two steps in turn.
    """

    binding: Any
    bound: tuple[int, ...] = ()  # shape and place of what changes, as it is bound
    past_states: "list[npt.NDArray[np.float32]]" = field(default_factory=list)

    def bind(self, name: str, past: Any, present: Any) -> None:
        """Let an input and the output that follows it be these arrays."""
        to = name.replace("past_key_values", "present").replace("past_", "present_")
        self.binding.bind_input(name, "cpu", 0, past.dtype, past.shape, past.ctypes.data)
        self.binding.bind_output(to, "cpu", 0, past.dtype, past.shape, present.ctypes.data)


class OnnxSession:
    """A model in ONNX Runtime with its cache; satisfies `edgekit.runtime.session.Session`."""

    def __init__(self, path: Path, *, context_tokens: int, threads: int | None = None) -> None:
        """Load a model; its cache takes memory as it fills."""
        self._session = open_model(path, threads=threads)
        self._cache: list[npt.NDArray[np.floating]] = []
        self.context_tokens = context_tokens
        self._read: list[int] = []  # what is cached
        with refusing(path):
            (self.vocabulary_tokens,) = self._session.get_outputs()[0].shape[2:]
            self._border_tokens = self._read_border()
            self._steps = self._bind_caches()
        self._after_prompts = _giving_back() if self._has_states else None
        self._allocate()

    def prefill(self, ids: Sequence[int]) -> "Logits":
        """Read ``ids`` after what is cached; return float32 ``(vocabulary_tokens,)`` logits.

        Raises:
            UsageError: If ``ids`` is empty, has an unknown id, or outgrows the context.
        """
        reading.refuse_empty(ids)
        return self._append(ids)

    def decode(self, token: int) -> "Logits":
        """Read one token after what is cached; return float32 ``(vocabulary_tokens,)`` logits."""
        return self._append([token])

    def all_logits(self, ids: Sequence[int]) -> "Logits":
        """Read ``ids`` alone; return float32 ``(len(ids), vocabulary_tokens)`` logits."""
        import numpy as np

        self.reset()
        self._refuse(ids)
        rows = np.empty((len(ids), self.vocabulary_tokens), np.float32)
        for first, part in reading.batches(ids, BATCH_TOKENS):
            self._run(part, rows[first : first + len(part)], text_tokens=len(ids))
        self.reset()  # so that the next text begins again, as in llama.cpp
        return rows

    def rewind(self, tokens: int) -> bool:
        """Forget what follows so many tokens; return whether the rest is what it would be alone."""
        border = self._border_tokens
        is_shorter_text = border is not None and tokens <= border < len(self._read)
        if (self._has_states and tokens < len(self._read)) or is_shorter_text:
            return False
        del self._read[tokens:]
        return True

    def reset(self) -> None:
        """Empty the cache."""
        self._read.clear()
        for state in self._steps[0].past_states:
            state.fill(0)  # no mask hides one

    def close(self) -> None:
        """Give the memory back."""
        self._session = None
        self._steps.clear()
        self._cache.clear()

    def _append(self, ids: Sequence[int]) -> "Logits":
        self._refuse(ids)
        cached = len(self._read)
        if reading.outgrows(self._border_tokens, cached_tokens=cached, new_tokens=len(ids)):
            ids = [*self._read, *ids]
            self.reset()
        text_tokens = len(self._read) + len(ids)
        for _, part in reading.batches(ids, BATCH_TOKENS):
            self._run(part, self._last, text_tokens=text_tokens)
        last: Logits = self._last[0]
        return last

    def _run(self, ids: Sequence[int], logits: "Logits", *, text_tokens: int) -> None:
        """Read some tokens; the logits after the last of them fill as many rows as are given."""
        count, cached = len(ids), len(self._read)
        self._ids[:count] = ids
        self._positions[:count] = range(cached, cached + count)
        self._first_logit[0] = count - len(logits)
        self._text_tokens[0] = text_tokens
        try:
            self._bind_step(count, logits)
            self._session.run_with_iobinding(
                self._steps[0].binding, self._after_prompts if count > 1 else None
            )
        except refusals() as error:
            raise ToolchainError("ONNX Runtime failed", log=str(error)) from error
        self._read += ids
        self._steps.reverse()

    def _bind_step(self, count: int, logits: "Logits") -> None:
        """Bind what has another shape or place than at the last step: mostly the mask alone."""
        bind = self._bind
        bind("attention_mask", self._mask, (1, len(self._read) + count))
        place = (count, len(logits), logits.ctypes.data)
        step = self._steps[0]
        if place == step.bound:
            return
        bind("input_ids", self._ids, (1, count))
        if not self._has_states:  # else the graph counts them itself
            bind("position_ids", self._positions, (1, count))
        bind(FIRST_LOGIT, self._first_logit, (1,))
        if self._border_tokens is not None:
            bind(TEXT_TOKENS, self._text_tokens, (1,))
        step.binding.bind_output(
            "logits", "cpu", 0, logits.dtype, (1, *logits.shape), logits.ctypes.data
        )
        step.bound = place

    def _bind(self, name: str, values: "npt.NDArray[np.int64]", shape: tuple[int, ...]) -> None:
        binding = self._steps[0].binding
        binding.bind_input(name, "cpu", 0, values.dtype, shape, values.ctypes.data)

    def _bind_caches(self) -> "list[_Step]":
        """Let the runtime write keys and values where it reads them, and states in turn."""
        import numpy as np

        caches, states = {}, {}
        for port in self._session.get_inputs():
            if port.name.startswith("past_key_values."):
                _, heads, _, width = port.shape
                dtype = np.float16 if port.type == "tensor(float16)" else np.float32
                values = np.zeros((1, heads, self.context_tokens, width), dtype)
                caches[port.name] = values, values
            elif port.name.startswith("past_"):
                first, second = (np.zeros((1, *port.shape[1:]), np.float32) for _ in range(2))
                states[port.name] = first, second
        self._cache += [values for values, _ in caches.values()]
        steps = []
        for past in (0, 1) if states else (0,):
            step = _Step(binding=self._session.io_binding())
            for name, pair in (caches | states).items():
                step.bind(name, pair[past], pair[1 - past])
            step.past_states += [pair[past] for pair in states.values()]
            steps.append(step)
        return steps

    @property
    def _has_states(self) -> bool:
        return len(self._steps) > 1

    def _allocate(self) -> None:
        """Make what every call reads and writes, once."""
        import numpy as np

        self._ids = np.empty(BATCH_TOKENS, np.int64)
        self._positions = np.empty(BATCH_TOKENS, np.int64)
        self._mask = np.ones(self.context_tokens, np.int64)
        self._first_logit = np.zeros(1, np.int64)
        self._text_tokens = np.zeros(1, np.int64)
        self._last = np.empty((1, self.vocabulary_tokens), np.float32)

    def _read_border(self) -> int | None:
        found = self._session.get_modelmeta().custom_metadata_map.get(ROPE_BORDER)
        return None if found is None else int(found)

    def _refuse(self, ids: Sequence[int]) -> None:
        reading.refuse(self, ids, cached_tokens=len(self._read))
