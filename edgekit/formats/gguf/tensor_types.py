"""How weights are stored: the recipes of llama-quantize, reproduced byte by byte.

Which weight gets which tensor type is decided here, from its role; the arithmetic of the quantized
tensor types is ggml's own, called through the library that ships inside llama-cpp-python.
Source: ``llama_tensor_get_type_impl`` and ``tensor_type_fallback`` in src/llama-quant.cpp of
llama.cpp 0c1e57098. What concerns mixtures of 8 experts, Falcon and 70B models is not reproduced.
"""

import ctypes
import functools
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.errors import MissingDependencyError, UsageError
from edgekit.formats.gguf.layout import ALL_TENSOR_TYPES, TENSOR_TYPE_NUMBERS
from edgekit.model.spec import DecoderSpec
from edgekit.quant import rounding
from edgekit.quant.recipe import Recipe, Rule, TensorType, with_limits


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    _Rows = npt.NDArray[np.float32]
    _Bytes = npt.NDArray[np.uint8]
    _Encoded = npt.NDArray[np.generic]
    _Started = tuple[_Bytes, list[Future[None]]]


# How long a byte of each takes when decoding, beside one of Q4_0: fitted to three phones' CPUs by
# the benchmark planner_error. The others are guessed from those of as many bits.
_DECODE_COSTS = {
    "F32": 0.8, "F16": 0.8, "BF16": 0.8, "Q8_0": 0.8, "Q6_K": 1.3, "Q5_K": 1.3, "Q5_1": 1.3,
    "Q5_0": 1.3, "Q4_K": 1.0, "Q4_1": 1.0, "Q4_0": 1.0, "IQ4_NL": 1.0, "Q3_K": 1.0, "Q2_K": 1.0,
}  # fmt: skip
# What takes longer to unpack than to read, by the same fit: on each phone as much longer as its
# bandwidth is greater beside the arithmetic with which it reads prompts.
_DECODE_FLOP = {"Q3_K": 17.0, "Q2_K": 15.3}
TENSOR_TYPES: Mapping[str, TensorType] = {
    name: replace(ALL_TENSOR_TYPES[name], decode_cost=cost, decode_flop=_DECODE_FLOP.get(name, 0.0))
    for name, cost in _DECODE_COSTS.items()
}

# Coarse enough for importance weighting: how much an error counts, column by column.
WEIGHTED = TENSOR_TYPES.keys() - {"F32", "F16", "BF16", "Q8_0"}

QUANTIZATION_VERSION = 2  # general.quantization_version: GGML_QNT_VERSION in ggml.h
FILE_TYPES: Mapping[str, int] = {  # general.file_type: enum llama_ftype in llama.h
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q2_K": 10, "Q3_K_M": 12, "Q4_K_S": 14,
    "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "IQ4_NL": 25, "BF16": 32,
}  # fmt: skip

# ggml adds biases, multiplies norms and convolves in float32, and they are small. So is what says
# how long a delta net remembers, where every error counts again with the next token, and what
# chooses the experts of a token, where a small one takes another.
_EXACT = Rule(
    pattern=".*(norm|bias)|.*_taps|delta_(decay|alpha|beta)|layer_scale|router", tensor_type="F32"
)
# The matrix that makes the logits is the one where rounding hurts most.
_HEAD = (
    Rule(pattern="output_head", tensor_type="Q6_K"),
    Rule(pattern="(token|layer)_embedding", tensor_type="Q6_K", decoders="tied"),
)
# llama-quantize leaves it alone; it is small.
_PROJECTION = Rule(pattern="layer_embedding_projection", tensor_type="F16")
# What a grade up is below 5 bits. In 150 GGUF files of Qwen 3.5 that Unsloth measured, a coarse
# delta_output cost the most by far and saved little, and attention beside delta nets came next.
_UP = {
    "Q4_K": "Q5_K", "Q4_1": "Q5_K", "IQ4_NL": "Q5_K", "Q4_0": "Q5_K", "Q3_K": "Q4_K",
    "Q2_K": "Q3_K",
}  # fmt: skip
_ATTENDING = "delta_(qkv|gate|output)|query|key|value|attention_output"


def _finer(default: str) -> Rule:
    """Return what keeps the mixers of a decoder with delta nets a grade finer than the rest."""
    return Rule(pattern=_ATTENDING, tensor_type=_UP[default], decoders="delta")


def notes(recipe: Recipe, spec: DecoderSpec) -> Iterator[str]:
    """Yield in sentences what a recipe keeps fine in decoders like this one."""
    if spec.has_delta_nets:
        if recipe.default in _UP:
            yield (
                "the matrices of delta nets and of attention are a grade finer than the others, "
                f"{_UP[recipe.default]} or more where those are {recipe.default}: what their "
                "rounding errs by adds up in the state"
            )
        if recipe.default != "F32":
            yield (
                "ssm_alpha, ssm_beta, the taps and the decay of delta nets are float32: they "
                "decide how long a state lasts"
            )
    if spec.layer_embedding:
        stored = recipe.tensor_type_for("layer_embedding", spec)
        yield (
            f"the embeddings of the layers (per_layer_token_embd) are {stored}; a token reads one "
            "row of them, and edgekit run leaves the others on disk"
        )


# What an artifact may differ from its checkpoint: mean KL in nats, share of equal top tokens.
# Twice, and a tenth less than, what SmolLM2-135M-Instruct showed on edgekit's corpus, 3 152
# positions, its weights dithered within a Q4_1 step since it was decoded from one: _DEMO_KL_NATS
# (of F32, most is flash attention in float16), and in the same order 0.999 0.997 0.987 0.94 0.89
# 0.81 0.78 0.79 0.71 0.58 0.65 0.56 0.63 0.48 of the top tokens, rounded to nearest. The smaller a
# model, the more it loses, and this is the smallest anybody ships. Random models have more near
# ties: of F16, BF16 and Q8_0 the limits hold all tiny ones with 20 seeds (benchmark false_alarms).
# Below 6 bits KL alone judges closely, and half of the demo's top tokens are enough: of 44 tiny
# models and random texts the worst kept 0.58 of Q4_K_M's and 0.33 of Q4_0's, and with 20 seeds 0.31
# of IQ4_NL's. Their rows fill no blocks of Q5_K and Q4_K, so mixtures of those may lose three times
# the demo's KL.
_DEMO_KL_NATS = {
    "F32": 8.6e-7, "F16": 8.9e-6, "BF16": 4.8e-4, "Q8_0": 8.3e-3, "Q6_K": 0.023, "Q5_K_M": 0.084,
    "Q5_K_S": 0.12, "Q4_K_M": 0.11, "Q4_K_S": 0.22, "Q4_1": 0.45, "IQ4_NL": 0.37, "Q4_0": 0.56,
    "Q3_K_M": 0.38, "Q2_K": 0.76,
}  # fmt: skip
_LIMITS = {
    "F32": (1e-6, 0.99), "F16": (1e-4, 0.97), "BF16": (2e-3, 0.93), "Q8_0": (0.02, 0.86),
    "Q6_K": (0.05, 0.80), "Q5_K_M": (0.25, 0.40), "Q5_K_S": (0.36, 0.39), "Q4_K_M": (0.33, 0.39),
    "Q4_K_S": (0.66, 0.35), "Q4_1": (0.9, 0.29), "IQ4_NL": (0.75, 0.29), "Q4_0": (1.1, 0.28),
    "Q3_K_M": (0.8, 0.31), "Q2_K": (1.6, 0.24),
}  # fmt: skip
_recipe = with_limits(_LIMITS, _DEMO_KL_NATS)


RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _recipe("F32", "F32"),
        _recipe("F16", "F16", _EXACT),
        _recipe("BF16", "BF16", _EXACT),
        _recipe("Q8_0", "Q8_0", _EXACT, _PROJECTION),
        _recipe("Q6_K", "Q6_K", _EXACT, _PROJECTION),
        _recipe(
            "Q5_K_M", "Q5_K", _EXACT, _PROJECTION, *_HEAD,
            Rule(pattern="value|delta_qkv|(expert_)?down", tensor_type="Q6_K", layers="sensitive"),
        ),
        _recipe("Q5_K_S", "Q5_K", _EXACT, _PROJECTION, *_HEAD),
        _recipe(
            "Q4_K_M", "Q4_K", _EXACT, _PROJECTION, *_HEAD,
            Rule(pattern="value|delta_qkv|(expert_)?down", tensor_type="Q6_K", layers="sensitive"),
            _finer("Q4_K"),
        ),
        _recipe(
            "Q4_K_S", "Q4_K", _EXACT, _PROJECTION, *_HEAD,
            Rule(pattern="value", tensor_type="Q5_K", layers="first_four"),
            Rule(pattern="(expert_)?down", tensor_type="Q5_K", layers="first_eighth"),
            _finer("Q4_K"),
        ),
        _recipe("Q4_1", "Q4_1", _EXACT, _PROJECTION, *_HEAD, _finer("Q4_1")),
        _recipe(
            "IQ4_NL", "IQ4_NL", _EXACT, _PROJECTION, *_HEAD,
            Rule(pattern="value", tensor_type="Q5_K", decoders="grouped"),
            Rule(pattern="(expert_)?down", tensor_type="Q5_K", layers="first_eighth"),
            _finer("IQ4_NL"),
        ),
        _recipe("Q4_0", "Q4_0", _EXACT, _PROJECTION, *_HEAD, _finer("Q4_0")),
        _recipe(
            "Q3_K_M", "Q3_K", _EXACT, _PROJECTION, *_HEAD,
            Rule(pattern="value", tensor_type="Q5_K", layers="first_two"),
            Rule(pattern="(expert_)?down", tensor_type="Q5_K", layers="first_sixteenth"),
            Rule(pattern="value|(expert_)?down|attention_output", tensor_type="Q4_K"),
            _finer("Q3_K"),
        ),
        _recipe(
            "Q2_K", "Q2_K", _EXACT, _PROJECTION, *_HEAD,
            Rule(pattern="value", tensor_type="Q4_K", decoders="grouped"),
            Rule(pattern="value|(expert_)?down|attention_output", tensor_type="Q3_K"),
            _finer("Q2_K"),
        ),
    )
}  # fmt: skip

# A row that does not fill blocks of 256 gets blocks of 32, with more bits.
_SUBSTITUTES = {
    "Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_0", "Q3_K": "Q4_0", "Q2_K": "Q4_0",
}  # fmt: skip


def stored_as(wanted: str, columns: int) -> str:
    """Return the tensor type that rows of ``columns`` weights really get.

    >>> stored_as("Q4_K", 2048), stored_as("Q4_K", 576), stored_as("Q4_K", 100)
    ('Q4_K', 'Q5_0', 'F16')
    """
    for tensor_type in (wanted, _SUBSTITUTES.get(wanted, wanted)):
        if columns % TENSOR_TYPES[tensor_type].block_weights == 0:
            return tensor_type
    return "F16"


def quantize(
    values: "npt.NDArray[np.float32]",
    tensor_type: str,
    *,
    importance: "npt.NDArray[np.float32] | None" = None,
) -> "npt.NDArray[np.uint8]":
    """Encode the rows of a matrix, on all processors.

    Args:
        values: The last axis holds the columns; every row is encoded by itself.
        tensor_type: One of `TENSOR_TYPES`, whose blocks the columns fill.
        importance: How much an error counts, column by column; one row of weights for all rows.

    Returns:
        What the file holds: uint8, shape ``(rows, bytes of a row)``.

    Raises:
        UsageError: If a value is NaN, infinite, or beyond what the tensor type can hold.
        MissingDependencyError: If ggml is not installed and this tensor type needs it.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return _finish(_start(pool, values, tensor_type, importance))


def quantize_each(
    blocks: "Iterable[tuple[str, _Rows | _Encoded, str]]",
    *,
    importance: "Mapping[str, _Rows] | None" = None,
) -> "Iterator[tuple[str, _Bytes]]":
    """Encode one block of rows after another, as `quantize` does.

    While one is encoded, the next is made and the one before is in the hands of the caller, so
    that reading and writing cost no time of their own; two blocks are in memory at a time.

    Args:
        blocks: A tensor's name, some of its rows, and their tensor type. Rows of uint8 are encoded
            already.
        importance: By name of the tensor, where it is known.

    Yields:
        The tensor's name and its encoded rows, uint8 of shape ``(rows, row bytes)``, in the order
        of ``blocks``.

    Raises:
        UsageError: As `quantize`; the message begins with the tensor's name.
    """
    importance = importance or {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        before: tuple[str, _Started] | None = None
        for name, rows, tensor_type in blocks:
            started = _start(pool, rows, tensor_type, importance.get(name))
            if before:
                yield _finish_named(*before)
            before = name, started
        if before:
            yield _finish_named(*before)


def _finish_named(name: str, started: "_Started") -> "tuple[str, _Bytes]":
    try:
        return name, _finish(started)
    except UsageError as error:
        raise UsageError(f"{name}: {error}", hint=error.hint) from error


def _start(
    pool: ThreadPoolExecutor,
    values: "_Rows | _Encoded",
    tensor_type: str,
    importance: "_Rows | None",
) -> "_Started":
    """Return where the bytes will be and what fills it; numpy and ggml let go of Python's lock."""
    import numpy as np

    if values.dtype == np.uint8:
        return values.view(np.uint8), []
    rows = np.ascontiguousarray(values, dtype=np.float32).reshape(-1, values.shape[-1])
    count, columns = rows.shape
    block = TENSOR_TYPES[tensor_type]
    if columns % block.block_weights:
        raise ValueError(f"{columns} columns do not fill the blocks of {tensor_type}")
    encoded = np.empty((count, columns // block.block_weights * block.block_bytes), dtype=np.uint8)
    encode = _encoder(tensor_type, columns, importance)

    def work(first: int) -> None:
        part = slice(first, first + step)
        _refuse_unstorable(rows[part], tensor_type)
        encode(rows[part], encoded[part])

    step = max(1, _CHUNK_WEIGHTS // columns)
    return encoded, [pool.submit(work, first) for first in range(0, count, step)]


def _finish(started: "_Started") -> "_Bytes":
    encoded, futures = started
    for future in futures:
        future.result()  # raises what the work raised
    return encoded


_CHUNK_WEIGHTS = (
    2**18
)  # 1 MiB of float32: stays in the cache, and a call costs nothing compared to it
# A block's scale is a float16; K-quants multiply it by a small scale and a code, 2**12 together.
_MAX_SCALED = 65504 * 2**12
_WIDER = "only F32 and BF16 hold every float32"


def _refuse_unstorable(rows: "_Rows", tensor_type: str) -> None:
    import numpy as np

    largest = np.maximum(rows.max(), -rows.min())  # NaN if there is one
    if not np.isfinite(largest):
        raise UsageError("a weight is NaN or infinite")
    limits = {"F32": np.inf, "BF16": np.inf, "F16": rounding.FLOAT16_OVERFLOW}
    if largest >= limits.get(tensor_type, _MAX_SCALED):
        raise UsageError(f"a weight is {largest:g}, too large for {tensor_type}", hint=_WIDER)


def _encoder(
    tensor_type: str, columns: int, importance: "_Rows | None"
) -> Callable[["_Rows", "_Bytes"], None]:
    """Return what encodes some rows into the bytes of as many."""
    match tensor_type:
        case "F32":
            return _to_f32
        case "F16":
            return _to_f16
        case "BF16":
            return _to_bf16
        case _:
            weights = _column_weights(importance, columns)
            return functools.partial(_to_blocks, _ggml(), tensor_type, weights)


def _to_f32(rows: "_Rows", encoded: "_Bytes") -> None:
    encoded.view("<f4")[...] = rows


def _to_f16(rows: "_Rows", encoded: "_Bytes") -> None:
    encoded.view("<f2")[...] = rows


def _to_bf16(rows: "_Rows", encoded: "_Bytes") -> None:
    rounding.bfloat16(rows, out=encoded.view("<u2"))


def _to_blocks(
    ggml: ctypes.CDLL, tensor_type: str, weights: "_Rows | None", rows: "_Rows", encoded: "_Bytes"
) -> None:
    number = TENSOR_TYPE_NUMBERS[tensor_type]
    importance = None if weights is None else weights.ctypes.data
    source, target = rows.ctypes.data, encoded.ctypes.data
    ggml.ggml_quantize_chunk(number, source, target, 0, *rows.shape, importance)
    if not ggml.ggml_validate_row_data(number, target, encoded.nbytes):
        raise UsageError(f"a block of weights is too large for {tensor_type}", hint=_WIDER)


def _column_weights(importance: "_Rows | None", columns: int) -> "_Rows | None":
    import numpy as np

    if importance is None:
        return None
    weights = np.ascontiguousarray(importance, dtype=np.float32)
    if weights.shape != (columns,):
        raise ValueError(f"importance has the shape {weights.shape}, expected ({columns},)")
    return weights


@functools.cache
def _ggml() -> ctypes.CDLL:
    """Open ggml's base library without importing llama_cpp, which would load the whole runtime."""
    path = _ggml_path()
    try:
        ggml = ctypes.CDLL(str(path))
    except OSError as error:
        raise MissingDependencyError(
            f"{path} does not load: {error}",
            hint="build it for this machine: pip install --force-reinstall llama-cpp-python",
        ) from error
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    ggml.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, pointer, pointer, number, number, number, pointer,
    ]  # fmt: skip
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_validate_row_data.argtypes = [ctypes.c_int, pointer, ctypes.c_size_t]
    ggml.ggml_validate_row_data.restype = ctypes.c_bool
    return ggml


def _ggml_path() -> Path:
    found = importlib.util.find_spec("llama_cpp")
    if found is not None and found.origin is not None:
        library = Path(found.origin).parent / "lib"
        for name in ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll"):
            if (library / name).exists():
                return library / name
    raise MissingDependencyError(
        "quantizing needs ggml, which comes with llama-cpp-python",
        hint="pip install 'edgekit[gguf]'",
    )
