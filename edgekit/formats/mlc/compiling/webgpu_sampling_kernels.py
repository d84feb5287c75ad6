"""What WebLLM asks of a library to choose a token: for one text at once, in float32."""

from typing import Any


_OPAQUE = 8  # TVM's kOpaque: fused with nothing
_THREADS = 256
_BLOCK = 2 * _THREADS  # what a workgroup sorts in its memory: each thread compares a pair
_BLOCK_LEVELS = _BLOCK.bit_length() - 1
_ATTRIBUTES = {"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": _OPAQUE}
_WHOLE = 2.0  # more than all probabilities together
_NEVER = -3.4e38  # the logit of a token that a grammar forbids


def padded(count: int) -> int:
    """Return how many numbers are sorted where there are ``count``.

    >>> padded(512), padded(49152)
    (512, 65536)
    """
    return max(_BLOCK, 1 << (count - 1).bit_length())


def softmax(count: int) -> Any:
    """Return the function from logits ``(1, 1, count)`` and a temperature to probabilities."""
    from tvm.script import tirx as T

    steps = -(-count // _THREADS)

    @T.prim_func(private=True, s_tir=True)
    def function(var_logits: T.handle, var_temperature: T.handle, var_out: T.handle):
        T.func_attr(_ATTRIBUTES)
        logits = T.match_buffer(var_logits, (1, 1, count), "float32")
        temperature = T.match_buffer(var_temperature, (1,), "float32")
        out = T.match_buffer(var_out, (1, 1, count), "float32")
        for _bx in T.thread_binding(1, thread="blockIdx.x"):
            for tx in T.thread_binding(_THREADS, thread="threadIdx.x"):
                with T.sblock("softmax"):
                    own = T.sblock_alloc_buffer((1,), "float32", scope="local")
                    parts = T.sblock_alloc_buffer((_THREADS,), "float32", scope="shared")
                    found = T.sblock_alloc_buffer((2,), "float32", scope="shared")
                    own[0] = T.float32(_NEVER)
                    for i in T.serial(steps):
                        if i * _THREADS + tx < count:
                            own[0] = T.max(own[0], logits[0, 0, i * _THREADS + tx])
                    parts[tx] = own[0]
                    T.tvm_storage_sync("shared")
                    if tx == 0:
                        for i in T.serial(_THREADS):
                            own[0] = T.max(own[0], parts[i])
                        found[0] = own[0]
                    T.tvm_storage_sync("shared")
                    own[0] = T.float32(0)
                    for i in T.serial(steps):
                        if i * _THREADS + tx < count:
                            own[0] = own[0] + T.exp(
                                (logits[0, 0, i * _THREADS + tx] - found[0]) / temperature[0]
                            )
                    parts[tx] = own[0]
                    T.tvm_storage_sync("shared")
                    if tx == 0:
                        for i in T.serial(1, _THREADS):
                            own[0] = own[0] + parts[i]
                        found[1] = own[0]
                    T.tvm_storage_sync("shared")
                    for i in T.serial(steps):
                        if i * _THREADS + tx < count:
                            out[0, 0, i * _THREADS + tx] = (
                                T.exp((logits[0, 0, i * _THREADS + tx] - found[0]) / temperature[0])
                                / found[1]
                            )

    return function


def sort(count: int) -> Any:
    """Return the function from ``(1, count)`` to the same with the highest first, and their places.

    It is a bitonic sort: both results are as long as `padded` says, what is there besides is last.
    """
    from tvm.script import tirx as T

    whole = padded(count)
    levels = whole.bit_length() - 1

    @T.macro
    def compare(keys, ids, low, high, is_falling):
        """Put the higher of two in front where numbers fall; of equal ones the first in the text."""
        key = T.sblock_alloc_buffer((2,), "float32", scope="local")
        id_ = T.sblock_alloc_buffer((2,), "int32", scope="local")
        order = T.sblock_alloc_buffer((1,), "int32", scope="local")  # 1 where they are exchanged
        key[0] = keys[low]
        key[1] = keys[high]
        id_[0] = ids[low]
        id_[1] = ids[high]
        order[0] = T.if_then_else(
            T.Or(key[0] < key[1], T.And(key[0] == key[1], id_[0] > id_[1])) == is_falling, 1, 0
        )
        T.tvm_storage_sync("shared")
        keys[low] = key[order[0]]
        ids[low] = id_[order[0]]
        keys[high] = key[1 - order[0]]
        ids[high] = id_[1 - order[0]]

    @T.macro
    def sort_block(keys, ids, first, level, distances, tx):
        """Compare what lies within a block, from one distance down to neighbours."""
        for d in T.serial(distances):
            distance: T.let[T.int32] = T.shift_left(1, distances - 1 - d)
            low: T.let[T.int32] = tx // distance * (2 * distance) + tx % distance
            compare(
                keys,
                ids,
                low,
                low + distance,
                T.bitwise_and(T.shift_right(first + low, level), 1) == 0,
            )
            T.tvm_storage_sync("shared")

    @T.prim_func(private=True, s_tir=True)
    def function(var_probs: T.handle, var_keys: T.handle, var_ids: T.handle):
        T.func_attr(_ATTRIBUTES)
        probs = T.match_buffer(var_probs, (1, count), "float32")
        out_keys = T.match_buffer(var_keys, (whole,), "float32")
        out_ids = T.match_buffer(var_ids, (whole,), "int32")
        for bx in T.thread_binding(whole // _BLOCK, thread="blockIdx.x"):
            for tx in T.thread_binding(_THREADS, thread="threadIdx.x"):
                with T.sblock("blocks"):
                    keys = T.sblock_alloc_buffer((_BLOCK,), "float32", scope="shared")
                    ids = T.sblock_alloc_buffer((_BLOCK,), "int32", scope="shared")
                    for half in T.serial(2):
                        at: T.let[T.int32] = half * _THREADS + tx
                        keys[at] = T.if_then_else(
                            bx * _BLOCK + at < count,
                            probs[0, T.min(bx * _BLOCK + at, count - 1)],
                            T.float32(-1),
                        )
                        ids[at] = bx * _BLOCK + at
                    T.tvm_storage_sync("shared")
                    for level in T.serial(_BLOCK_LEVELS):
                        sort_block(keys, ids, bx * _BLOCK, level + 1, level + 1, tx)
                    for half in T.serial(2):
                        sorted_at: T.let[T.int32] = half * _THREADS + tx
                        out_keys[bx * _BLOCK + sorted_at] = keys[sorted_at]
                        out_ids[bx * _BLOCK + sorted_at] = ids[sorted_at]
        for above in T.serial(levels - _BLOCK_LEVELS):
            for d in T.serial(above + 1):
                for bx in T.thread_binding(whole // _BLOCK, thread="blockIdx.x"):
                    for tx in T.thread_binding(_THREADS, thread="threadIdx.x"):
                        with T.sblock("pairs"):
                            distance: T.let[T.int32] = T.shift_left(_BLOCK, above - d)
                            pair: T.let[T.int32] = bx * _THREADS + tx
                            low: T.let[T.int32] = (
                                pair // distance * (2 * distance) + pair % distance
                            )
                            compare(
                                out_keys,
                                out_ids,
                                low,
                                low + distance,
                                T.bitwise_and(T.shift_right(low, above + _BLOCK_LEVELS + 1), 1)
                                == 0,
                            )
            for bx in T.thread_binding(whole // _BLOCK, thread="blockIdx.x"):
                for tx in T.thread_binding(_THREADS, thread="threadIdx.x"):
                    with T.sblock("merge"):
                        keys = T.sblock_alloc_buffer((_BLOCK,), "float32", scope="shared")
                        ids = T.sblock_alloc_buffer((_BLOCK,), "int32", scope="shared")
                        for half in T.serial(2):
                            loaded_at: T.let[T.int32] = half * _THREADS + tx
                            keys[loaded_at] = out_keys[bx * _BLOCK + loaded_at]
                            ids[loaded_at] = out_ids[bx * _BLOCK + loaded_at]
                        T.tvm_storage_sync("shared")
                        sort_block(
                            keys,
                            ids,
                            bx * _BLOCK,
                            above + _BLOCK_LEVELS + 1,
                            _BLOCK_LEVELS,
                            tx,
                        )
                        for half in T.serial(2):
                            merged_at: T.let[T.int32] = half * _THREADS + tx
                            out_keys[bx * _BLOCK + merged_at] = keys[merged_at]
                            out_ids[bx * _BLOCK + merged_at] = ids[merged_at]

    return function


def sample(count: int) -> Any:
    """Return the function that draws a token from the fewest that have ``top_p`` together."""
    from tvm.script import tirx as T

    each = -(-count // _THREADS)

    @T.macro
    def walk(probs, sums, at, passed, part, limit):
        """Go to the first number with which the sum is above a limit."""
        at[0] = 0
        passed[0] = T.float32(0)
        for i in T.serial(_THREADS - 1):
            part[0] = T.if_then_else(at[0] == i, sums[i], T.float32(_WHOLE))
            if passed[0] + part[0] <= limit:
                passed[0] = passed[0] + part[0]
                at[0] = at[0] + 1
        at[0] = T.min(at[0] * each, count - 1)
        passed[0] = passed[0] + probs[0, at[0]]
        while T.And(at[0] < count - 1, passed[0] <= limit):
            at[0] = at[0] + 1
            passed[0] = passed[0] + probs[0, at[0]]

    @T.prim_func(private=True, s_tir=True)
    def function(
        var_probs: T.handle,
        var_ids: T.handle,
        var_uniform: T.handle,
        var_rows: T.handle,
        var_top_p: T.handle,
        var_out: T.handle,
    ):
        T.func_attr(_ATTRIBUTES)
        probs = T.match_buffer(var_probs, (1, count), "float32")
        ids = T.match_buffer(var_ids, (1, count), "int32")
        uniform = T.match_buffer(var_uniform, (1,), "float32")
        _rows = T.match_buffer(var_rows, (1,), "int32")
        top_p = T.match_buffer(var_top_p, (1,), "float32")
        out = T.match_buffer(var_out, (1,), "int32")
        for _bx in T.thread_binding(1, thread="blockIdx.x"):
            for tx in T.thread_binding(_THREADS, thread="threadIdx.x"):
                with T.sblock("sample"):
                    own = T.sblock_alloc_buffer((1,), "float32", scope="local")
                    at = T.sblock_alloc_buffer((1,), "int32", scope="local")
                    passed = T.sblock_alloc_buffer((1,), "float32", scope="local")
                    part = T.sblock_alloc_buffer((1,), "float32", scope="local")
                    sums = T.sblock_alloc_buffer((_THREADS,), "float32", scope="shared")
                    own[0] = T.float32(0)
                    for i in T.serial(each):
                        if tx * each + i < count:
                            own[0] = own[0] + probs[0, tx * each + i]
                    sums[tx] = own[0]
                    T.tvm_storage_sync("shared")
                    if tx == 0:
                        walk(probs, sums, at, passed, part, top_p[0] * T.float32(1 - 1e-6))
                        own[0] = uniform[0] * passed[0]
                        walk(probs, sums, at, passed, part, own[0])
                        out[0] = ids[0, at[0]]

    return function


def mask(count: int) -> Any:
    """Return the function that forbids the tokens whose bit is not set."""
    from tvm.script import tirx as T

    words = -(-count // 32)

    @T.prim_func(private=True, s_tir=True)
    def function(var_logits: T.handle, var_rows: T.handle, var_bits: T.handle):
        T.func_attr(_ATTRIBUTES)
        logits = T.match_buffer(var_logits, (1, count), "float32")
        _rows = T.match_buffer(var_rows, (1,), "int32")
        bits = T.match_buffer(var_bits, (1, words), "int32")
        for bx in T.thread_binding(-(-count // _THREADS), thread="blockIdx.x"):
            for tx in T.thread_binding(_THREADS, thread="threadIdx.x"):
                with T.sblock("mask"):
                    at: T.let[T.int32] = bx * _THREADS + tx
                    word: T.let[T.int32] = bits[0, T.min(at, count - 1) // 32]
                    if T.And(at < count, T.bitwise_and(T.shift_right(word, at % 32), 1) == 0):
                        logits[0, at] = T.float32(_NEVER)

    return function


def add_bias(count: int) -> Any:
    """Return the function that adds a number to the logits of some tokens."""
    from tvm.script import tirx as T

    @T.prim_func(private=True, s_tir=True)
    def function(
        var_logits: T.handle, var_rows: T.handle, var_tokens: T.handle, var_bias: T.handle
    ):
        T.func_attr(_ATTRIBUTES)
        named = T.int64()
        logits = T.match_buffer(var_logits, (1, count), "float32")
        _rows = T.match_buffer(var_rows, (named,), "int32")
        tokens = T.match_buffer(var_tokens, (named,), "int32")
        bias = T.match_buffer(var_bias, (named,), "float32")
        for bx in T.thread_binding((named + _THREADS - 1) // _THREADS, thread="blockIdx.x"):
            for tx in T.thread_binding(_THREADS, thread="threadIdx.x"):
                with T.sblock("bias"):
                    at: T.let[T.int64] = T.Cast("int64", bx * _THREADS + tx)
                    if at < named:
                        logits[0, tokens[at]] = logits[0, tokens[at]] + bias[at]

    return function


def penalize(count: int) -> Any:
    """Return the function that makes tokens less likely which have been said.

    The penalties are for presence, for each time, and a factor for repetition.
    """
    from tvm.script import tirx as T

    @T.prim_func(private=True, s_tir=True)
    def function(
        var_logits: T.handle,
        var_sequences: T.handle,
        var_rows: T.handle,
        var_tokens: T.handle,
        var_times: T.handle,
        var_penalties: T.handle,
    ):
        T.func_attr(_ATTRIBUTES)
        named = T.int64()
        logits = T.match_buffer(var_logits, (1, count), "float32")
        _sequences = T.match_buffer(var_sequences, (1,), "int32")
        _rows = T.match_buffer(var_rows, (named,), "int32")
        tokens = T.match_buffer(var_tokens, (named,), "int32")
        times = T.match_buffer(var_times, (named,), "int32")
        penalties = T.match_buffer(var_penalties, (1, 3), "float32")
        for bx in T.thread_binding((named + _THREADS - 1) // _THREADS, thread="blockIdx.x"):
            for tx in T.thread_binding(_THREADS, thread="threadIdx.x"):
                with T.sblock("penalize"):
                    at: T.let[T.int64] = T.Cast("int64", bx * _THREADS + tx)
                    if at < named:
                        left: T.let[T.float32] = logits[0, tokens[at]] - (
                            penalties[0, 0] + T.Cast("float32", times[at]) * penalties[0, 1]
                        )
                        logits[0, tokens[at]] = T.if_then_else(
                            left < 0, left * penalties[0, 2], left / penalties[0, 2]
                        )

    return function
