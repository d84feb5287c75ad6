"""Attention over the paged cache on a processor, in place of TVM's own, which takes one number at once.

Each replaces the function of the same name that `TIRPagedKVCache` puts into a module, and takes
the same arguments. Keys come in blocks of a page; sums are in float32.
"""

import math
from typing import Any

from edgekit.formats.mlc.compiling.model import PAGE_TOKENS


_MOST_LANES = 16
_LOG2_E = math.log2(math.e)
_NEVER = -5e4  # the logarithm of nothing, as TVM's own kernels write it


def replacements(heads: int, kv_heads: int, width: int, dtype: str, window: int) -> dict[str, Any]:
    """Return the functions by name; ``window`` is how far windowed layers look back."""
    sizes = (heads, kv_heads, width, dtype)
    prefill, decode = _paged(*sizes, window=window, is_windowed=False)
    windowed_prefill, windowed_decode = _paged(*sizes, window=window, is_windowed=True)
    return {
        "batch_prefill_ragged_kv": _ragged(*sizes),
        "batch_prefill_paged_kv_cpu": prefill,
        "batch_decode_paged_kv_cpu": decode,
        "batch_prefill_paged_kv_cpu_sliding_window": windowed_prefill,
        "batch_decode_paged_kv_cpu_sliding_window": windowed_decode,
    }


def _attend(heads, kv_heads, width):
    """Return what computes one head of one token over the keys from ``first`` to ``last``.

    ``key`` and ``value`` read one number of a key and a value; TVM expands both in place.
    """
    from tvm.script import tirx as T

    lanes = math.gcd(width, _MOST_LANES)
    parts = width // lanes

    @T.macro
    def attend(query, key, value, out, lse, t, h, first, last, scale, dtype):
        q = T.sblock_alloc_buffer((width,), "float32", scope="local")
        o = T.sblock_alloc_buffer((width,), "float32", scope="local")
        total = T.sblock_alloc_buffer((lanes,), "float32", scope="local")
        score = T.sblock_alloc_buffer((PAGE_TOKENS,), "float32", scope="local")
        state = T.sblock_alloc_buffer((4,), "float32", scope="local")  # max, sum, new max, factor
        state[0] = T.float32(_NEVER)
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
                                    "float32", key(b * PAGE_TOKENS + j, c * lanes + lane)
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
                                    "float32", value(b * PAGE_TOKENS + j, c * lanes + lane)
                                )
        state[1] = T.max(state[1], T.float32(1e-30))
        for c in T.serial(parts):
            for lane in T.vectorized(lanes):
                out[t, h, c * lanes + lane] = T.Cast(dtype, o[c * lanes + lane] / state[1])
        lse[t, h] = state[0] + T.log2(state[1])

    return attend


def _ragged(heads, kv_heads, width, dtype):
    """Return attention of a prompt's chunk over itself."""
    from tvm.script import tirx as T

    attend, group = _attend(heads, kv_heads, width), heads // kv_heads

    @T.prim_func(private=True, s_tir=True)
    def ragged(
        var_q: T.handle,
        var_q_indptr: T.handle,
        var_k: T.handle,
        var_v: T.handle,
        var_kv_indptr: T.handle,
        var_q_position: T.handle,
        var_k_offset: T.handle,
        var_out: T.handle,
        var_lse: T.handle,
        causal: T.int32,
        rotary_mode: T.int32,
        rope_scale: T.float32,
        rope_theta: T.float32,
        sm_scale: T.float32,
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        count = T.int32()
        kv_count = T.int32()
        query = T.match_buffer(var_q, (count, heads, width), dtype)
        k = T.match_buffer(var_k, (kv_count, kv_heads, width), dtype)
        v = T.match_buffer(var_v, (kv_count, kv_heads, width), dtype)
        out = T.match_buffer(var_out, (count, heads, width), dtype)
        lse = T.match_buffer(var_lse, (count, heads), "float32")
        for th in T.parallel(count * heads):
            with T.sblock("attend"):
                at = T.axis.spatial(count * heads, th)
                T.reads(
                    query[0:count, 0:heads, 0:width],
                    k[0:kv_count, 0:kv_heads, 0:width],
                    v[0:kv_count, 0:kv_heads, 0:width],
                )
                T.writes(out[0:count, 0:heads, 0:width], lse[0:count, 0:heads])
                attend(
                    query,
                    lambda pos, d: k[pos, at % heads // group, d],
                    lambda pos, d: v[pos, at % heads // group, d],
                    out,
                    lse,
                    at // heads,
                    at % heads,
                    0,
                    T.if_then_else(causal > 0, at // heads + 1, kv_count),
                    sm_scale * T.float32(_LOG2_E),
                    dtype,
                )

    return ragged


def _paged(heads, kv_heads, width, dtype, *, window, is_windowed):
    """Return attention of a chunk over what is cached; ``window`` counts the chunk in."""
    from tvm.script import tirx as T

    attend, group = _attend(heads, kv_heads, width), heads // kv_heads
    infos = (3, 1) if is_windowed else (1,)

    def length(indptr, info):
        whole = (indptr[1] - indptr[0] - 1) * PAGE_TOKENS
        if is_windowed:
            return whole + info[0, 0] - info[1, 0] + info[2, 0]
        return whole + info[0]

    def place(info, pos):
        if not is_windowed:
            return pos
        return T.if_then_else(pos < info[2, 0], pos, pos - info[2, 0] + info[1, 0])

    def first(causal, row, cached):
        if not is_windowed:
            return T.int32(0)
        seen = T.max(window - row - 1, 0)
        return T.if_then_else(causal > 0, T.max(cached - seen, 0), 0)

    @T.macro
    def attend_pages(query, pages, indptr, values, info, out, lse, t, h, causal, sm_scale):
        cached: T.let[T.int32] = T.if_then_else(indptr[0] != indptr[1], length(indptr, info), 0)
        attend(
            query,
            lambda pos, d: pages[
                values[indptr[0] + place(info, pos) // PAGE_TOKENS],
                0,
                h // group,
                place(info, pos) % PAGE_TOKENS,
                d,
            ],
            lambda pos, d: pages[
                values[indptr[0] + place(info, pos) // PAGE_TOKENS],
                1,
                h // group,
                place(info, pos) % PAGE_TOKENS,
                d,
            ],
            out,
            lse,
            t,
            h,
            first(causal, t, cached),
            cached,
            sm_scale * T.float32(_LOG2_E),
            dtype,
        )

    @T.macro
    def attend_cached(
        var_q, var_pages, var_indptr, var_values, var_info, var_out, var_lse, causal, sm_scale
    ):
        count = T.int32()
        page_count = T.int32()
        value_count = T.int32()
        indptr_offset = T.int32()
        values_offset = T.int32()
        info_offset = T.int32()
        query = T.match_buffer(var_q, (count, heads, width), dtype)
        pages = T.match_buffer(var_pages, (page_count, 2, kv_heads, PAGE_TOKENS, width), dtype)
        indptr = T.match_buffer(var_indptr, (2,), "int32", elem_offset=indptr_offset)
        values = T.match_buffer(var_values, (value_count,), "int32", elem_offset=values_offset)
        info = T.match_buffer(var_info, infos, "int32", elem_offset=info_offset)
        out = T.match_buffer(var_out, (count, heads, width), dtype)
        lse = T.match_buffer(var_lse, (count, heads), "float32")
        for th in T.parallel(count * heads):
            with T.sblock("attend"):
                at = T.axis.spatial(count * heads, th)
                T.reads(
                    query[0:count, 0:heads, 0:width],
                    pages[0:page_count, 0:2, 0:kv_heads, 0:PAGE_TOKENS, 0:width],
                )
                T.writes(out[0:count, 0:heads, 0:width], lse[0:count, 0:heads])
                attend_pages(
                    query,
                    pages,
                    indptr,
                    values,
                    info,
                    out,
                    lse,
                    at // heads,
                    at % heads,
                    causal,
                    sm_scale,
                )

    @T.prim_func(private=True, s_tir=True)
    def prefill(
        var_q: T.handle,
        var_q_indptr: T.handle,
        var_pages: T.handle,
        var_indptr: T.handle,
        var_values: T.handle,
        var_info: T.handle,
        var_k_offset: T.handle,
        var_q_position: T.handle,
        var_out: T.handle,
        var_lse: T.handle,
        causal: T.int32,
        rotary_mode: T.int32,
        rope_scale: T.float32,
        rope_theta: T.float32,
        sm_scale: T.float32,
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        attend_cached(
            var_q, var_pages, var_indptr, var_values, var_info, var_out, var_lse, causal, sm_scale
        )

    @T.prim_func(private=True, s_tir=True)
    def decode(
        var_q: T.handle,
        var_pages: T.handle,
        var_indptr: T.handle,
        var_values: T.handle,
        var_info: T.handle,
        var_k_offset: T.handle,
        var_q_position: T.handle,
        var_out: T.handle,
        var_lse: T.handle,
        rotary_mode: T.int32,
        rope_scale: T.float32,
        rope_theta: T.float32,
        sm_scale: T.float32,
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        attend_cached(
            var_q,
            var_pages,
            var_indptr,
            var_values,
            var_info,
            var_out,
            var_lse,
            T.int32(0),
            sm_scale,
        )

    return prefill, decode
