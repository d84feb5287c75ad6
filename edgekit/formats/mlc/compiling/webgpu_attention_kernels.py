"""Attention of a token over its keys on a browser's GPU: a workgroup for each head of each token."""

import math
from typing import Any

from edgekit.formats.mlc.compiling.attention_kernels import NEVER


_THREADS = 64  # and keys whose scores are in the workgroup's memory at once
_LOG2_E = math.log2(math.e)


def attend(heads: int, kv_heads: int, width: int, dtype: str) -> Any:
    """Return what goes over the keys; an `attention_kernels.Attend`. Sums are in float32."""
    from tvm.script import tirx as T

    group, parts = heads // kv_heads, -(-width // _THREADS)

    @T.macro
    def attend_all(query, key, value, out, lse, count, first, last, scale):
        for t in T.thread_binding(count, thread="blockIdx.y"):
            for h in T.thread_binding(heads, thread="blockIdx.x"):
                for tx in T.thread_binding(_THREADS, thread="threadIdx.x"):
                    with T.sblock("attend"):
                        T.reads(query[0:count, 0:heads, 0:width])
                        T.writes(out[0:count, 0:heads, 0:width], lse[0:count, 0:heads])
                        q = T.sblock_alloc_buffer((width,), "float32", scope="shared")
                        scores = T.sblock_alloc_buffer((_THREADS,), "float32", scope="shared")
                        o = T.sblock_alloc_buffer((parts,), "float32", scope="local")
                        state = T.sblock_alloc_buffer((4,), "float32", scope="local")
                        # The highest score, the sum of weights, and what both were before.
                        begin: T.let[T.int32] = first(t)
                        end: T.let[T.int32] = last(t)
                        state[0] = T.float32(NEVER)
                        state[1] = T.float32(0)
                        for p in T.serial(parts):
                            o[p] = T.float32(0)
                            if p * _THREADS + tx < width:
                                q[p * _THREADS + tx] = T.Cast(
                                    "float32", query[t, h, p * _THREADS + tx]
                                ) * (scale * T.float32(_LOG2_E))
                        for b in T.serial((end - begin + _THREADS - 1) // _THREADS):
                            at: T.let[T.int32] = begin + b * _THREADS
                            T.tvm_storage_sync("shared")
                            state[2] = T.float32(NEVER)
                            if at + tx < end:
                                state[2] = T.float32(0)
                                for d in T.serial(width):
                                    state[2] = state[2] + q[d] * T.Cast(
                                        "float32", key(at + tx, h // group, d)
                                    )
                            scores[tx] = state[2]
                            T.tvm_storage_sync("shared")
                            state[2] = state[0]
                            for j in T.serial(_THREADS):
                                state[0] = T.max(state[0], scores[j])
                            state[3] = T.exp2(state[2] - state[0])
                            state[1] = state[1] * state[3]
                            for p in T.serial(parts):
                                o[p] = o[p] * state[3]
                            for j in T.serial(T.min(end - at, _THREADS)):
                                state[3] = T.exp2(scores[j] - state[0])
                                state[1] = state[1] + state[3]
                                for p in T.serial(parts):
                                    if p * _THREADS + tx < width:
                                        o[p] = o[p] + state[3] * T.Cast(
                                            "float32",
                                            value(at + j, h // group, p * _THREADS + tx),
                                        )
                        state[1] = T.max(state[1], T.float32(1e-30))
                        for p in T.serial(parts):
                            if p * _THREADS + tx < width:
                                out[t, h, p * _THREADS + tx] = T.Cast(dtype, o[p] / state[1])
                        if tx == 0:
                            lse[t, h] = state[0] + T.log2(state[1])

    return attend_all
