"""Attention of a token over its keys on a processor: blocks of a page, sums in float32."""

import math
from typing import Any

from edgekit.formats.mlc.compiling.attention_kernels import NEVER, PAGE_TOKENS


_MOST_LANES = 16
_LOG2_E = math.log2(math.e)


def attend(heads: int, kv_heads: int, width: int, dtype: str) -> Any:
    """Return what goes over the keys; an `attention_kernels.Attend`."""
    from tvm.script import tirx as T

    lanes, group = math.gcd(width, _MOST_LANES), heads // kv_heads
    parts = width // lanes

    @T.macro
    def attend_one(query, key, value, out, lse, t, h, first, last, scale):
        q = T.sblock_alloc_buffer((width,), "float32", scope="local")
        o = T.sblock_alloc_buffer((width,), "float32", scope="local")
        total = T.sblock_alloc_buffer((lanes,), "float32", scope="local")
        score = T.sblock_alloc_buffer((PAGE_TOKENS,), "float32", scope="local")
        state = T.sblock_alloc_buffer((4,), "float32", scope="local")  # max, sum, new max, factor
        state[0] = T.float32(NEVER)
        state[1] = T.float32(0)
        for c in T.serial(parts):
            for lane in T.vectorized(lanes):
                q[c * lanes + lane] = T.Cast("float32", query[t, h, c * lanes + lane]) * scale
                o[c * lanes + lane] = T.float32(0)
        for b in T.serial(T.ceildiv(last, PAGE_TOKENS)):
            if (b + 1) * PAGE_TOKENS > first:
                state[2] = state[0]
                for j in T.serial(PAGE_TOKENS):
                    if T.And(b * PAGE_TOKENS + j >= first, b * PAGE_TOKENS + j < last):
                        for lane in T.vectorized(lanes):
                            total[lane] = T.float32(0)
                        for c in T.serial(parts):
                            for lane in T.vectorized(lanes):
                                total[lane] = total[lane] + q[c * lanes + lane] * T.Cast(
                                    "float32",
                                    key(b * PAGE_TOKENS + j, h // group, c * lanes + lane),
                                )
                        state[3] = T.float32(0)
                        for lane in T.serial(lanes):
                            state[3] = state[3] + total[lane]
                        score[j] = state[3]
                        state[2] = T.max(state[2], state[3])
                state[3] = T.exp2(state[0] - state[2])
                state[0] = state[2]
                state[1] = state[1] * state[3]
                for c in T.serial(parts):
                    for lane in T.vectorized(lanes):
                        o[c * lanes + lane] = o[c * lanes + lane] * state[3]
                for j in T.serial(PAGE_TOKENS):
                    if T.And(b * PAGE_TOKENS + j >= first, b * PAGE_TOKENS + j < last):
                        state[3] = T.exp2(score[j] - state[0])
                        state[1] = state[1] + state[3]
                        for c in T.serial(parts):
                            for lane in T.vectorized(lanes):
                                o[c * lanes + lane] = o[c * lanes + lane] + state[3] * T.Cast(
                                    "float32",
                                    value(b * PAGE_TOKENS + j, h // group, c * lanes + lane),
                                )
        state[1] = T.max(state[1], T.float32(1e-30))
        for c in T.serial(parts):
            for lane in T.vectorized(lanes):
                out[t, h, c * lanes + lane] = T.Cast(dtype, o[c * lanes + lane] / state[1])
        lse[t, h] = state[0] + T.log2(state[1])

    @T.macro
    def attend_all(query, key, value, out, lse, count, first, last, scale):
        for th in T.parallel(count * heads):
            with T.sblock("attend"):
                at = T.axis.spatial(count * heads, th)
                T.reads(query[0:count, 0:heads, 0:width])
                T.writes(out[0:count, 0:heads, 0:width], lse[0:count, 0:heads])
                begin: T.let[T.int32] = first(at // heads)
                end: T.let[T.int32] = last(at // heads)
                attend_one(
                    query,
                    key,
                    value,
                    out,
                    lse,
                    at // heads,
                    at % heads,
                    begin,
                    end,
                    scale * T.float32(_LOG2_E),
                )

    return attend_all
