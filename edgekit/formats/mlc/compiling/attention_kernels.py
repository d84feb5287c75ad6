"""Attention over the paged cache, in place of TVM's own.

TVM's functions take one number at once on a processor, and on a GPU are long shaders that an adapter
without a GPU compiles for minutes. Each function here replaces the one of the same name that
`TIRPagedKVCache` puts into a module, and takes the same arguments; how a target goes over the keys
of a token is its own.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from edgekit.formats.mlc.compiling.shape import LibraryShape
    from edgekit.model.mixers import Attention
    from edgekit.model.spec import Layer

PAGE_TOKENS = 16
NEVER = -5e4  # the logarithm of nothing, as TVM's own kernels write it

# From heads, heads of keys, their width and what they are stored in to a macro of TVMScript:
# `attend(query, key, value, out, lse, count, first, last, scale)`. It
# writes, for each of ``count`` tokens and each head, what attention makes of the keys from
# ``first(token)`` to ``last(token)``, and the logarithm of the sum of weights, to base 2. ``key``
# and ``value`` give one number of a place, a head and a channel, and are expanded where they stand.
Attend = Callable[[int, int, int, str], Any]


def scale_of(attention: "Attention", layer: "Layer") -> float:
    """Return what a layer multiplies scores with, as functions here read it: below 0 with a window.

    TVM 0.27 has windows for some layers of a cache, but loses the pages of the others wherever it
    does not keep its tables in one piece, as on WebGPU.
    """
    return -attention.softmax_scale if layer.window_tokens else attention.softmax_scale


def replace_own(module: Any, shape: "LibraryShape", attend: Attend, *, suffix: str = "") -> None:
    """Put functions that attend as a target does in the place of TVM's functions."""
    a, window = shape.spec.attention, shape.window_tokens
    sizes = (a.heads, a.num_kv_heads, a.head_dim, shape.dtype)
    macro = attend(*sizes)
    prefill, decode = _paged(macro, *sizes, window)
    found = {
        "batch_prefill_ragged_kv": _ragged(macro, *sizes, window),
        f"batch_prefill_paged_kv{suffix}": prefill,
        f"batch_decode_paged_kv{suffix}": decode,
        f"batch_prefill_paged_kv{suffix}_sliding_window": nothing(),
        f"batch_decode_paged_kv{suffix}_sliding_window": nothing(),
    }
    for name, function in found.items():
        put(module, name, function)


def put(module: Any, name: str, function: Any) -> None:
    """Put a function in the place of another."""
    module[module.get_global_var(name)] = function.with_attr("global_symbol", name)


def nothing() -> Any:
    """Return a function that is never called."""
    from tvm.script import tirx as T

    @T.prim_func(private=True, s_tir=True)
    def function():
        T.func_attr({"tirx.is_scheduled": True})
        T.evaluate(0)

    return function


def _first(scale, window, position):
    """Return the first key that a token sees, counted from the first that there is."""
    from tvm.script import tirx as T

    if window is None:
        return T.int32(0)
    return T.if_then_else(scale < 0, T.max(position - (window - 1), 0), 0)


def _ragged(attend, heads, kv_heads, width, dtype, window):
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
            lambda row: _first(sm_scale, window, row),
            lambda row: T.if_then_else(causal > 0, row + 1, kv_count),
            T.abs(sm_scale),
        )

    return ragged


def _paged(attend, heads, kv_heads, width, dtype, window):
    """Return attention over what is cached: of a chunk that is not, and of a token that is."""
    from tvm.script import tirx as T

    def length(indptr, info):
        whole = (indptr[1] - indptr[0] - 1) * PAGE_TOKENS + info[0]
        return T.if_then_else(indptr[0] != indptr[1], whole, 0)

    def reader(pages, indptr, values, part):
        def read(pos, h, d):
            page = values[indptr[0] + pos // PAGE_TOKENS]
            return pages[page, part, h, pos % PAGE_TOKENS, d]

        return read

    @T.macro
    def attend_cached(
        var_q, var_pages, var_indptr, var_values, var_info, var_out, var_lse, is_cached, sm_scale
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
        info = T.match_buffer(var_info, (1,), "int32", elem_offset=info_offset)
        out = T.match_buffer(var_out, (count, heads, width), dtype)
        lse = T.match_buffer(var_lse, (count, heads), "float32")
        attend(
            query,
            reader(pages, indptr, values, 0),
            reader(pages, indptr, values, 1),
            out,
            lse,
            count,
            lambda row: T.min(
                _first(sm_scale, window, length(indptr, info) + (-1 if is_cached else row)),
                length(indptr, info),
            ),
            lambda _row: length(indptr, info),
            T.abs(sm_scale),
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
            var_q, var_pages, var_indptr, var_values, var_info, var_out, var_lse, False, sm_scale
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
            True,
            sm_scale,
        )

    return prefill, decode
