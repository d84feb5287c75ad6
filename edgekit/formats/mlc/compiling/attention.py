"""Attention over the paged cache, in place of TVM's own.

TVM's functions take one number at once on a processor, and on a GPU are long shaders that an adapter
without a GPU compiles for minutes. Each function here replaces the one of the same name that
`TIRPagedKVCache` puts into a module, and takes the same arguments; how a target goes over the keys
of a token is its own.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from edgekit.formats.mlc.compiling.model import PAGE_TOKENS


if TYPE_CHECKING:
    from edgekit.formats.mlc.compiling.shape import LibraryShape

NEVER = -5e4  # the logarithm of nothing, as TVM's own kernels write it

# From heads, heads of keys, their width and what they are stored in to a macro of TVMScript:
#     attend(query, key, value, out, lse, count, first, last, scale)
# writes, for each of ``count`` tokens and each head, what attention makes of the keys from
# ``first(token)`` to ``last(token)``, and the logarithm of the sum of weights, to base 2. ``key``
# and ``value`` give one number of a place, a head and a channel, and are expanded where they stand.
Attend = Callable[[int, int, int, str], Any]


def replace_own(module: Any, shape: "LibraryShape", attend: Attend, *, suffix: str = "") -> None:
    """Put functions that attend as a target does in the place of TVM's functions."""
    a, window = shape.spec.attention, shape.window_tokens or 1024
    macro = attend(a.heads, a.num_kv_heads, a.head_dim, shape.dtype)
    sizes = (a.heads, a.num_kv_heads, a.head_dim, shape.dtype)
    prefill, decode = _paged(macro, *sizes, window=window, is_windowed=False)
    windowed_prefill, windowed_decode = _paged(macro, *sizes, window=window, is_windowed=True)
    found = {
        "batch_prefill_ragged_kv": _ragged(macro, *sizes),
        f"batch_prefill_paged_kv{suffix}": prefill,
        f"batch_decode_paged_kv{suffix}": decode,
        f"batch_prefill_paged_kv{suffix}_sliding_window": windowed_prefill,
        f"batch_decode_paged_kv{suffix}_sliding_window": windowed_decode,
    }
    for name, function in found.items():
        module[module.get_global_var(name)] = function.with_attr("global_symbol", name)


def _ragged(attend, heads, kv_heads, width, dtype):
    """Return attention of a prompt's chunk over itself."""
    from tvm.script import tirx as T

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
        attend(
            query,
            lambda pos, h, d: k[pos, h, d],
            lambda pos, h, d: v[pos, h, d],
            out,
            lse,
            count,
            lambda _row: T.int32(0),
            lambda row: T.if_then_else(causal > 0, row + 1, kv_count),
            sm_scale,
        )

    return ragged


def _paged(attend, heads, kv_heads, width, dtype, *, window, is_windowed):
    """Return attention of a chunk over what is cached; ``window`` counts the chunk in."""
    from tvm.script import tirx as T

    infos = (3, 1) if is_windowed else (1,)

    def length(indptr, info):
        whole = (indptr[1] - indptr[0] - 1) * PAGE_TOKENS
        if is_windowed:
            whole = whole + info[0, 0] - info[1, 0] + info[2, 0]
        else:
            whole = whole + info[0]
        return T.if_then_else(indptr[0] != indptr[1], whole, 0)

    def place(info, pos):
        if not is_windowed:
            return pos
        return T.if_then_else(pos < info[2, 0], pos, pos - info[2, 0] + info[1, 0])

    def first(causal, row, cached):
        if not is_windowed:
            return T.int32(0)
        seen = T.max(window - row - 1, 0)
        return T.if_then_else(causal > 0, T.max(cached - seen, 0), 0)

    def reader(pages, indptr, values, info, part):
        def read(pos, h, d):
            at = place(info, pos)
            return pages[values[indptr[0] + at // PAGE_TOKENS], part, h, at % PAGE_TOKENS, d]

        return read

    @T.macro
    def attend_cached(
        var_q, var_pages, var_indptr, var_values, var_info, var_out, var_lse, causal, sm_scale
    ):
        count = T.int32()
        page_count = T.int32()
        value_count = T.int32()
        pages_offset = T.int64()
        indptr_offset = T.int32()
        values_offset = T.int32()
        info_offset = T.int32()
        query = T.match_buffer(var_q, (count, heads, width), dtype)
        pages = T.match_buffer(
            var_pages,
            (page_count, 2, kv_heads, PAGE_TOKENS, width),
            dtype,
            elem_offset=pages_offset,
        )
        indptr = T.match_buffer(var_indptr, (2,), "int32", elem_offset=indptr_offset)
        values = T.match_buffer(var_values, (value_count,), "int32", elem_offset=values_offset)
        info = T.match_buffer(var_info, infos, "int32", elem_offset=info_offset)
        out = T.match_buffer(var_out, (count, heads, width), dtype)
        lse = T.match_buffer(var_lse, (count, heads), "float32")
        attend(
            query,
            reader(pages, indptr, values, info, 0),
            reader(pages, indptr, values, info, 1),
            out,
            lse,
            count,
            lambda row: first(causal, row, length(indptr, info)),
            lambda _row: length(indptr, info),
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
